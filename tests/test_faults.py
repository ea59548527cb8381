"""What goes wrong with disks and jobs, done for real: nothing is lost, nothing wrong is read, and the message names it.

Each test is drawn by a seed. `make faults` draws many more and writes down what each one did and what was found.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cauc_dist import journal, kernels, losses
from cauc_dist.augment import views
from cauc_dist.config import Data
from cauc_dist.errors import BadInput
from cauc_dist.prepare import load, plan_of, prepare
from cauc_dist.store.ingest import ingest
from cauc_dist.store.planned import Settings
from cauc_dist.store.reader import Damaged, Store
from cauc_dist.train import build_model, train
from cauc_dist.world import World
from tests import ranks as forked
from tests.faults import Ledger, seeds, small_disk
from tests.store.cohorts import bids, blob, contents, noise, scan, shard, spans
from tests.test_train import config, curve

ROOT = Path(__file__).parents[1]
PER = 32  # rows a shard of a small store


# ---- ingest: killed, out of room, twice at once -------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from cauc_dist.errors import BadInput
from cauc_dist.store.ingest import ingest
print("ready", flush=True)
sys.stdin.readline()
try:
    ingest(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]))
except BadInput as error:
    sys.exit(str(error))
"""


class Ingest:
    """`ingest` in a process group of its own; it begins at `go`."""

    def __init__(self, source: Path, store: Path, workers: int = 2) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, source, store, str(workers)],
            cwd=ROOT,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )

    def ready(self) -> "Ingest":
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return self

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """(exit code, what it complained of)."""
        _, complaint = self.process.communicate(timeout=120)
        return self.process.returncode, complaint

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 scans, half of their voxels 0: six parts of the survey, six shards."""
    side = (24, 24, 24)
    return bids(tmp_path_factory.mktemp("faults") / "bids", [blob(i, side) for i in range(6 * PER)])


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[int, float]]:
    """(every file of its store, seconds of the ingest by workers)."""
    seconds = {}
    for workers in (1, 2):
        store = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
        run = Ingest(source, store, workers).ready()
        began = time.perf_counter()
        run.go()
        assert run.end() == (0, "")
        seconds[workers] = time.perf_counter() - began
    assert len([name for name in contents(store) if name.startswith("volumes/c/")]) == 6
    assert Store.open(store).layout == "packed"
    return contents(store), seconds


def stage_of(store: Path) -> dict[str, Any]:
    """How far an ingest has come, by what lies on the disk."""
    place = store.with_name(f".{store.name}.partial")
    return {
        "begun": place.exists(),
        "planned": (place / "plan.json").exists(),
        "surveyed": len(list(place.glob("survey/*.npz"))),
        "shards": len(list(place.glob("records/*.npz"))),
        "store": store.exists(),
    }


@pytest.mark.parametrize("seed", seeds(50))
def test_an_ingest_killed_at_any_moment_goes_on_and_ends_with_the_same_bytes(
    source: Path, undisturbed: tuple[dict[str, bytes], dict[int, float]], tmp_path: Path, ledger: Ledger, seed: int
) -> None:
    """Workers and all. Moments are spread over the ingest's duration: one in each equal part of it.

    Two workers spend most of so short an ingest on their start; every second one is all work, in one process.
    """
    wanted, durations = undisturbed
    store, workers = tmp_path / "s.zarr", 1 + seed % 2
    seconds = durations[workers]
    moment = (seed + random.Random(seed).random()) / len(seeds(50)) * seconds
    facts = {"workers": workers, "moment_s": round(moment, 4), "of_s": round(seconds, 4)}
    with ledger.fault("ingest killed", seed, **facts) as entry:
        while True:
            run = Ingest(source, store, workers).ready()
            run.go()
            time.sleep(moment)
            run.kill()
            if not store.exists():
                break
            shutil.rmtree(store)  # it had ended, and the kill hit nothing
            moment *= 0.8
            entry["moment_s"] = round(moment, 4)
        entry["found"] = stage_of(store)
        assert ingest(source, store, workers=workers) is not None
        assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]
        assert contents(store) == wanted
        entry["bytes"] = "identical"


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk needs root, to mount a small one")
@pytest.mark.parametrize("seed", seeds(20))
def test_a_disk_that_fills_up_is_told_and_with_room_the_ingest_ends_with_the_same_bytes(
    source: Path, undisturbed: tuple[dict[str, bytes], dict[int, float]], tmp_path: Path, ledger: Ledger, seed: int
) -> None:
    wanted, _ = undisturbed
    need, size = sum(map(len, wanted.values())), 16 * 2**20
    room = int(random.Random(seed).random() * need)
    disk = tmp_path / "disk"
    with small_disk(disk, size), ledger.fault("disk full", seed, room_bytes=room, of_bytes=need) as entry:
        (disk / "filler").write_bytes(bytes(size - room))
        with pytest.raises(BadInput) as told:
            ingest(source, disk / "s.zarr", workers=1 + seed % 2)
        entry["found"] = {"told": str(told.value).replace(str(disk), "DISK"), **stage_of(disk / "s.zarr")}
        assert f"the disk of {disk / 's.zarr'} is full" in str(told.value)
        assert "the same command again" in str(told.value)
        assert not (disk / "s.zarr").exists()
        (disk / "filler").unlink()
        ingest(source, disk / "s.zarr", workers=1 + seed % 2)
        assert contents(disk / "s.zarr") == wanted
        entry["bytes"] = "identical"


@pytest.mark.parametrize("seed", seeds(20))
def test_of_two_ingests_into_one_store_one_makes_it_and_the_other_is_refused(
    source: Path, undisturbed: tuple[dict[str, bytes], dict[int, float]], tmp_path: Path, ledger: Ledger, seed: int
) -> None:
    """The second begins while the first is at work, or (seed 0) in the same instant."""
    wanted, durations = undisturbed
    seconds = durations[2]
    delay = 0.0 if seed == 0 else random.Random(seed).random() * seconds / 2
    with ledger.fault("two ingests at once", seed, delay_s=round(delay, 4), of_s=round(seconds, 4)) as entry:
        runs = [run.ready() for run in [Ingest(source, tmp_path / "s.zarr") for _ in range(2)]]
        runs[0].go()
        time.sleep(delay)
        runs[1].go()
        ends = [run.end() for run in runs]
        refused = [complaint for code, complaint in ends if code]
        entry["found"] = [complaint.strip().replace(str(tmp_path), "FOLDER") for complaint in refused]
        assert len(refused) == 1
        # On a machine that is faster than when it was timed, the first may be done already.
        at_work, done = "another ingest is writing {}; wanted one at a time", "{} exists already; wanted a new path"
        assert any(
            said.format(tmp_path / "s.zarr") in refused[0] for said in ((at_work,) if seed == 0 else (at_work, done))
        )
        assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]
        assert contents(tmp_path / "s.zarr") == wanted


# ---- bytes that change, or go -------------------------------------------------------------------------------------

FORMS = {
    "dense f16 lz4": Settings(layout="dense", dtype="f16", codec="lz4"),
    "packed f32 none": Settings(layout="packed", dtype="f32", codec="none"),
    "dense i16 zstd": Settings(layout="dense", dtype="i16", codec="zstd"),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[np.ndarray]]]:
    """Of each form: 40 scans in two shards, and their volumes as read when nothing was wrong."""
    folder = tmp_path_factory.mktemp("stores")
    sources = [blob(i, (12, 13, 11)) for i in range(PER + 8)]
    bids(folder / "bids", sources)
    made = {}
    for name, settings in FORMS.items():
        ingest(folder / "bids", folder / name, settings)
        store = Store.open(folder / name)
        volumes = [store.volume(i) for i in range(len(store))]
        np.testing.assert_allclose([v[0] for v in volumes], sources, atol=0.1)
        made[name] = folder / name, volumes
    return made


def read_everything(store: Store, volumes: list[np.ndarray]) -> dict[str, str]:
    """What each scan that cannot be read is said to be; every other one is as it was, or this fails."""
    broken = {}
    for i, (name, volume) in enumerate(zip(store.ids, volumes, strict=True)):
        try:
            found = store.volume(i)
        except Damaged as error:
            broken[name] = str(error)
        else:
            assert np.array_equal(found, volume), f"{name} is wrong, and nobody was told"
    for name, complaint in broken.items():
        assert complaint.startswith(f"scan {name} (row "), complaint
        assert "; wanted the bytes that ingest wrote. Restore it from a copy" in complaint
    return broken


def names(rows: range) -> set[str]:
    return {f"sub-{i:02d}" for i in rows}


@contextmanager
def restored(path: Path) -> Iterator[bytes]:
    """The file's bytes, which it has again afterwards."""
    whole = path.read_bytes()
    try:
        yield whole
    finally:
        path.write_bytes(whole)


def flip(path: Path, whole: bytes, byte: int, bit: int) -> None:
    changed = bytearray(whole)
    changed[byte] ^= 1 << bit
    path.write_bytes(changed)


@pytest.mark.parametrize("seed", seeds(67))
@pytest.mark.parametrize("form", FORMS)
def test_a_bit_that_flips_in_a_shard_is_found_and_the_subjects_are_named(
    stores: dict[str, tuple[Path, list[np.ndarray]]], ledger: Ledger, form: str, seed: int
) -> None:
    """Of a row: that scan alone. Of the index: the scans of that shard. Every third seed falls in the index."""
    where, volumes = stores[form]
    draw = random.Random(f"{form} {seed}")
    k = draw.randrange(2)
    rows = range(0, PER) if k == 0 else range(PER, PER + 8)
    path = shard(where, k)
    with restored(path) as whole:
        begins = len(whole) - 16 * PER - 4
        byte, bit = draw.randrange(begins if seed % 3 == 0 else 0, len(whole)), draw.randrange(8)
        hit = [i for i, (start, length) in zip(rows, spans(path, PER), strict=False) if start <= byte < start + length]
        wanted = names(range(hit[0], hit[0] + 1)) if hit else names(rows)
        assert len(hit) == (byte < begins)  # each byte of the file belongs to a row or to the index
        with ledger.fault("bit flip", seed, form=form, shard=k, byte=byte, of=len(whole), bit=bit) as entry:
            flip(path, whole, byte, bit)
            broken = read_everything(Store.open(where), volumes)
            entry["found"] = sorted(broken)
            assert set(broken) == wanted
            assert all(("the index of shard" in told) == (not hit) for told in broken.values())


@pytest.mark.parametrize("seed", seeds(50))
def test_a_bit_that_flips_in_names_metadata_statistics_or_mask_is_found_when_the_store_is_opened(
    stores: dict[str, tuple[Path, list[np.ndarray]]], ledger: Ledger, seed: int
) -> None:
    where, volumes = stores["packed f32 none"]
    draw = random.Random(seed)
    files = [f for f in sorted(where.rglob("c/**/*")) if f.is_file() and "volumes" not in f.parts]
    assert len(files) == 4 + 7 + 2 + 1  # ids, subjects, valid, checksums; statistics; age, sex; mask
    path = draw.choice(files)
    with restored(path) as whole:
        byte, bit = draw.randrange(len(whole)), draw.randrange(8)
        file = str(path.relative_to(where))
        with ledger.fault("bit flip in row arrays", seed, file=file, byte=byte, of=len(whole), bit=bit) as entry:
            flip(path, whole, byte, bit)
            with pytest.raises(Damaged) as told:
                Store.open(where)
            entry["found"] = str(told.value).replace(str(where), "STORE")
            assert str(told.value).startswith(f"store {where} is damaged (")
    assert read_everything(Store.open(where), volumes) == {}


@pytest.mark.parametrize("seed", seeds(20))
def test_the_scans_of_a_missing_shard_are_named_and_the_others_are_read(
    stores: dict[str, tuple[Path, list[np.ndarray]]], ledger: Ledger, seed: int
) -> None:
    form = sorted(FORMS)[seed % 3]
    where, volumes = stores[form]
    k = random.Random(seed).randrange(2)
    with restored(shard(where, k)), ledger.fault("missing shard", seed, form=form, shard=k) as entry:
        shard(where, k).unlink()
        broken = read_everything(Store.open(where), volumes)
        entry["found"] = sorted(broken)
        assert set(broken) == names(range(0, PER) if k == 0 else range(PER, PER + 8))


@pytest.mark.parametrize("seed", seeds(50))
def test_the_scans_of_a_truncated_shard_are_named_also_where_it_is_cut_while_it_is_open(
    stores: dict[str, tuple[Path, list[np.ndarray]]], ledger: Ledger, seed: int
) -> None:
    """A fresh reader finds no index. One that has it already still reads what lies before the cut."""
    form, opened = sorted(FORMS)[seed % 3], seed % 2 == 1
    where, volumes = stores[form]
    path, rows = shard(where, 0), range(PER)
    with restored(path) as whole:
        cut = random.Random(seed).randrange(len(whole))
        with ledger.fault("truncated shard", seed, form=form, cut=cut, of=len(whole), opened=opened) as entry:
            store = Store.open(where)
            wanted = names(rows)
            if opened:
                store.volume(0)
                wanted = {store.ids[i] for i in rows if sum(spans(path, PER)[i]) > cut}
            os.truncate(path, cut)
            broken = read_everything(store, volumes)
            entry["found"] = sorted(broken)
            assert set(broken) == wanted


# ---- scans that cannot be used ------------------------------------------------------------------------------------

EXACT = Settings(layout="dense", dtype="f32", codec="none")


@pytest.mark.parametrize("seed", seeds(20))
def test_a_volume_with_nan_is_set_aside_by_name_and_the_others_are_kept(
    tmp_path: Path, ledger: Ledger, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    volumes = [noise(i) for i in range(6)]
    bad, many = int(draw.integers(6)), (1, volumes[0].size, int(draw.integers(1, volumes[0].size)))[seed % 3]
    volumes[bad].flat[draw.choice(volumes[bad].size, many, replace=False)] = np.nan
    bids(tmp_path / "b", volumes)
    for settings in (EXACT, Settings(layout="packed")):
        where = tmp_path / settings.layout
        with ledger.fault("NaN volume", seed, scan=bad, voxels=many, layout=settings.layout) as entry:
            ingest(tmp_path / "b", where, settings)
            store = Store.open(where)
            entry["found"] = [list(pair) for pair in store.set_aside]
            assert store.set_aside == ((f"sub-{bad:02d}", f"{many} voxels are NaN or infinite"),)
            kept = [i for i in range(6) if i != bad]
            assert store.ids == tuple(f"sub-{i:02d}" for i in kept)
            np.testing.assert_allclose([store.volume(k)[0] for k in range(5)], [volumes[i] for i in kept], atol=0.1)
            assert np.array_equal(store.metadata(["age"])[:, 0], np.array(kept) + 20)


@pytest.mark.parametrize("seed", seeds(20))
def test_an_id_that_comes_twice_is_named_and_never_stored_twice(tmp_path: Path, ledger: Ledger, seed: int) -> None:
    """Two files of one scan are set aside, as nobody can tell which; so is the same brain under a second name.

    Two rows of a table that tell different things of a subject are refused.
    """
    draw = random.Random(seed)
    twice, volumes = draw.randrange(6), [noise(i) for i in range(6)]
    name = f"sub-{twice:02d}"

    def stored(where: Path) -> tuple[str, ...]:
        ingest(where / "b", where / "s.zarr", EXACT)
        return Store.open(where / "s.zarr").ids

    with ledger.fault("duplicate ids", seed, scan=twice, kind="two files") as entry:
        scan(bids(tmp_path / "files/b", volumes), name, noise(9), name="{}_T1w.nii")
        assert stored(tmp_path / "files") == tuple(f"sub-{i:02d}" for i in range(6) if i != twice)
        entry["found"] = [list(pair) for pair in Store.open(tmp_path / "files/s.zarr").set_aside]
        assert entry["found"] == [[name, f"2 files of one scan: {name}_T1w.nii, {name}_T1w.nii.gz"]]
    with ledger.fault("duplicate ids", seed, scan=twice, kind="the same voxels") as entry:
        bids(tmp_path / "voxels/b", [*volumes, volumes[twice]])
        assert stored(tmp_path / "voxels") == tuple(f"sub-{i:02d}" for i in range(6))
        entry["found"] = [list(pair) for pair in Store.open(tmp_path / "voxels/s.zarr").set_aside]
        assert entry["found"] == [["sub-06", f"the same voxels as {name}"]]
    with ledger.fault("duplicate ids", seed, scan=twice, kind="two rows of the table") as entry:
        table = bids(tmp_path / "rows/b", volumes) / "participants.tsv"
        table.write_text(table.read_text() + f"{name}\t99\tM\n")
        with pytest.raises(BadInput) as told:
            stored(tmp_path / "rows")
        entry["found"] = str(told.value).replace(str(tmp_path), "FOLDER")
        assert str(told.value) == f"{table} repeats {name}; wanted one row a participant. Keep one of them."
        assert [path.name for path in (tmp_path / "rows").iterdir()] == ["b"]


# ---- training on what is damaged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(5, few=1))
def test_training_ends_at_a_damaged_scan_and_names_it_or_goes_on_without_it_on_any_number_of_ranks(
    store: Path, tmp_path: Path, ledger: Ledger, seed: int
) -> None:
    shutil.copytree(store, tmp_path / "store.zarr")
    opened = Store.open(tmp_path / "store.zarr")
    skip = Data(store=str(tmp_path / "store.zarr"), on_damage="skip")
    run = config(tmp_path / "store.zarr", tmp_path / "r", data=skip)
    plan = plan_of(run, opened)
    rows = plan.batch(0)
    bad = int(rows[random.Random(seed).randrange(len(rows))])
    start, length = spans(shard(tmp_path / "store.zarr", 0), int(opened.attributes["n"]))[bad]
    byte = start + random.Random(seed).randrange(length)

    # What the first step's loss should be, from the sound store and without loader, engine or gather.
    sound = rows[rows != bad]
    volumes = torch.stack([torch.from_numpy(opened.volume(int(row))) for row in sound])
    axes = (1, 2, 3, 4)
    x = (volumes - volumes.mean(axes, keepdim=True)) / volumes.std(axes, correction=0, keepdim=True)
    v = views(x.float(), opened.keys[sound], seed=run.seed, epoch=0, augment=run.augment)
    with torch.no_grad():
        z = build_model(run, opened.shape)(v).view(2, len(sound), -1)
    y = torch.from_numpy(opened.metadata(["age", "sex"])[sound])
    kernel = kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta())
    expected = losses.cauc(z, y, kernel, lambda_align=1.0).item()

    path, name = shard(tmp_path / "store.zarr", 0), opened.ids[bad]
    flip(path, path.read_bytes(), byte, seed % 8)
    met = [step for step in range(6) if bad in plan.batch(step)]
    with ledger.fault("training on a damaged scan", seed, scan=name, byte=byte, bit=seed % 8) as entry:
        folder = prepare(config(tmp_path / "store.zarr", tmp_path / "raise"), 2)
        assert 2 in forked.train(folder, 2)  # the other one misses it, maybe
        told = "".join(Path(f"{folder}.rank-{rank}.log.err").read_text() for rank in range(2))
        assert f"error: step 0: scan {name} (row {bad}) of {tmp_path / 'store.zarr'} is damaged" in told
        assert curve(folder) == []
        curves = {}
        for ranks in (1, 2):
            folder = prepare(config(tmp_path / "store.zarr", tmp_path / f"skip{ranks}", data=skip), ranks)
            forked.run_ranks(ranks, train_here, folder)
            curves[ranks] = curve(folder)
            skips = [event for event in journal.read(folder) if event["event"] == "skip"]
            assert [(event["step"], event["scans"], event["skipped"]) for event in skips] == [
                (step, [name], k + 1) for k, step in enumerate(met)
            ]
        entry["found"] = {"raise": f"step 0, {name}", "skipped at": met, "loss": curves}
        assert len(curves[1]) == 6
        assert curves[2] == pytest.approx(curves[1], rel=1e-4, abs=1e-6)
        assert curves[1][0] == pytest.approx(expected, rel=1e-5)


def train_here(folder: Path) -> None:
    """On a rank: what `python -m cauc_dist.train` does."""
    rank = dist.get_rank()
    train(load(folder), World(rank, rank, dist.get_world_size()))
