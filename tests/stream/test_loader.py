import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from cauc_dist import phantoms
from cauc_dist.augment import views
from cauc_dist.config import Augment
from cauc_dist.errors import BadInput
from cauc_dist.store.ingest import Settings, ingest
from cauc_dist.store.reader import Damaged, Store
from cauc_dist.stream import loader as module
from cauc_dist.stream.loader import Batch, Loader, chunks, read_all
from cauc_dist.stream.plan import Plan
from cauc_dist.stream.values import values
from tests.stream.cases import CASES, N

PATIENCE = 20.0  # seconds until a test gives up on an event; reached only when it fails
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("loader")
    return {name: case.store(folder, name) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def store(stores: dict[str, Store]) -> Store:
    return stores["packed_two_channels"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """24 scans: enough for a plan of several steps."""
    case = CASES["dense_two_channels"]
    twice = replace(case, sources=np.concatenate([case.sources, case.sources[::-1] + 1]))
    return twice.store(tmp_path_factory.mktemp("many"), "many")


class Slow:
    """A store with something to wait for in every read; counts what begins, ends and overlaps."""

    def __init__(self, store: Store) -> None:
        self.inner, self.ids, self.shape, self.row_shape = store, store.ids, store.shape, store.row_shape
        self.dtype, self.mask, self.stats = store.dtype, store.mask, store.stats
        self.lock, self.begun, self.ended, self.now, self.most = threading.Condition(), [], [], 0, 0  # type: ignore[var-annotated]

    def read_into(self, i: int, out: Any) -> None:
        with self.lock:
            self.begun.append(i)
            self.now += 1
            self.most = max(self.most, self.now)
        self.pause(i)
        self.inner.read_into(i, out)
        with self.lock:
            self.now -= 1
            self.ended.append(i)
            self.lock.notify_all()

    def pause(self, i: int) -> None:
        time.sleep(0.01)

    def wait_for(self, ended: int) -> bool:
        with self.lock:
            return self.lock.wait_for(lambda: len(self.ended) >= ended, PATIENCE)


def plan_of(store: Store, batch_size: int, seed: int = 0) -> Plan:
    return Plan(range(len(store.ids)), store.ids, batch_size, seed)


def load(
    store: Any, plan: Plan, start: int, stop: int, rank: int = 0, world_size: int = 1, **settings: Any
) -> list[Batch]:
    """Batches with memory of their own."""
    with Loader(store, plan, rank=rank, world_size=world_size, start=start, stop=stop, **settings) as loader:
        return [batch._replace(volumes=batch.volumes.clone()) for batch in loader]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert loader_threads() == []


def allowed(name: str) -> list[str]:
    return ["dataset", "none"] if name == "table" else ["volume", "dataset", "none"]


# ---- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_batches_are_the_plan_s_rows_normalised_as_the_sources_say(stores: dict[str, Store], name: str) -> None:
    """Three epochs and three normalisations; the plan trains on 9 of the 12 scans."""
    case, store, train = CASES[name], stores[name], np.array([0, 1, 2, 4, 5, 7, 8, 9, 11])
    plan = Plan(train, [store.ids[i] for i in train], 4, seed=3)
    for normalise in allowed(name):
        batches = load(store, plan, 1, 6, normalise=normalise, threads=3)
        assert [batch.step for batch in batches] == [1, 2, 3, 4, 5]
        for batch in batches:
            assert np.array_equal(batch.rows, plan.batch(batch.step))
            assert batch.volumes.dtype == torch.float32
            assert batch.sound.tolist() == [True] * 4
            assert batch.damaged == ()
            expected, off = case.expected(batch.rows, normalise, train)
            assert batch.volumes.shape == expected.shape
            assert (np.abs(batch.volumes.numpy() - expected) <= off).all()


def test_scans_of_a_folder_arrive_as_their_files_say(tmp_path: Path) -> None:
    """The whole way, with nibabel as the oracle: packed and dense, cut to a window."""
    phantoms.write_cohort(tmp_path / "b", n=4, size=20)
    for layout in ("packed", "dense"):
        settings = Settings(shape=(16, 18, 20), layout=layout, dtype="f32")  # type: ignore[arg-type]
        ingest(tmp_path / "b", tmp_path / f"{layout}.zarr", settings)
        store = Store.open(tmp_path / f"{layout}.zarr")
        assert store.layout == layout
        (batch,) = load(store, plan_of(store, 4), 0, 1)
        for volume, row in zip(batch.volumes, batch.rows, strict=True):
            (path,) = (tmp_path / "b").rglob(f"{store.ids[row]}_T1w.nii.gz")
            x = np.asarray(nib.load(path).dataobj, np.float64)[2:18, 1:19]  # type: ignore[attr-defined]
            np.testing.assert_allclose(volume[0].numpy(), (x - x.mean()) / x.std(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_ranks_threads_and_prefetch_change_no_bit(stores: dict[str, Store], name: str) -> None:
    store, normalise = stores[name], allowed(name)[0]
    plan = plan_of(store, 4, seed=5)
    alone = load(store, plan, 0, 6, normalise=normalise, threads=1, prefetch=1)
    for world_size, threads, prefetch in ((1, 4, 3), (2, 1, 2), (4, 3, 1)):
        ways = {"normalise": normalise, "threads": threads, "prefetch": prefetch}
        ranks = [load(store, plan, 0, 6, rank, world_size, **ways) for rank in range(world_size)]
        for step, whole in enumerate(alone):
            assert torch.equal(torch.cat([mine[step].volumes for mine in ranks]), whole.volumes)
            assert np.array_equal(np.concatenate([mine[step].rows for mine in ranks]), whole.rows)


@pytest.mark.parametrize("name", CASES)
def test_without_expansion_a_batch_holds_the_rows_as_stored(stores: dict[str, Store], name: str) -> None:
    store = stores[name]
    batches = load(store, plan_of(store, 3, seed=1), 0, 8, expand=False, normalise="none")
    for batch in batches:
        assert batch.volumes.shape == (3, *store.row_shape)
        assert batch.volumes.numpy().dtype == store.dtype
        row = np.empty(store.row_shape, store.dtype)
        for stored, i in zip(batch.volumes.numpy(), batch.rows, strict=True):
            store.read_into(int(i), row)
            assert np.array_equal(stored, row)


@pytest.mark.parametrize("normalise", ["volume", "dataset", "none"])
def test_a_slot_that_is_used_again_has_the_new_scan_s_background(stores: dict[str, Store], normalise: str) -> None:
    """Memory of a packed volume keeps what was outside the mask of the scan before it."""
    store = stores["packed_two_channels"]
    mask = CASES["packed_two_channels"].mask
    assert mask is not None
    batches = load(store, plan_of(store, 1), 0, 5 * N, normalise=normalise, threads=1, prefetch=1)
    for batch in batches:
        source = CASES["packed_two_channels"].sources
        some = source[batch.rows] if normalise == "volume" else source
        for c in range(2):
            mean, std = (some[:, c].mean(), some[:, c].std()) if normalise != "none" else (0.0, 1.0)
            outside = batch.volumes[0, c].numpy()[~mask[c]]
            np.testing.assert_allclose(outside, -mean / std, rtol=1e-6)
    assert len({float(batch.volumes[0, 0].min()) for batch in batches}) == (N if normalise == "volume" else 1)


def test_read_all_and_chunks_give_the_rows_asked_for(stores: dict[str, Store]) -> None:
    store, case = stores["packed_two_channels"], CASES["packed_two_channels"]
    rows, how = [5, 3, 10, 3, 0], values(store, "volume")
    whole = read_all(store, rows, how, threads=3)
    expected, off = case.expected(rows, "volume")
    assert (np.abs(whole.numpy() - expected) <= off).all()
    pieces = list(chunks(store, rows, 2, how))  # kept: they are the caller's
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat(pieces), whole)
    assert read_all(store, [], how).shape == (0, *store.shape)
    assert list(chunks(store, [], 2, how)) == []


# ---- resume -------------------------------------------------------------------------------------------------------


def views_of(store: Store, plan: Plan, start: int, stop: int, world_size: int, threads: int) -> list[torch.Tensor]:
    """Views (V, batch_size, c, *spatial) of each step, put together from all ranks."""
    augment = Augment(p_flip=0.5, p_crop=0.5, p_cutout=0.5, p_blur=1, p_noise=1)
    ranks = []
    for rank in range(world_size):
        mine = [
            views(batch.volumes, store.keys[batch.rows], seed=7, epoch=plan.epoch(batch.step), augment=augment)
            for batch in load(store, plan, start, stop, rank, world_size, threads=threads)
        ]
        ranks.append([v.view(augment.views, -1, *store.shape) for v in mine])
    return [torch.cat(step, 1) for step in zip(*ranks, strict=True)]


def test_resuming_at_any_step_on_other_ranks_and_threads_gives_the_views_of_never_having_stopped(many: Store) -> None:
    plan = plan_of(many, 4, seed=1)
    assert plan.steps_per_epoch == 6
    never = views_of(many, plan, 0, 12, world_size=1, threads=1)
    assert not torch.equal(never[0], never[6])
    for start, world_size, threads in ((1, 2, 1), (5, 4, 3), (6, 1, 2), (9, 4, 1)):
        resumed = views_of(many, plan_of(many, 4, seed=1), start, 12, world_size, threads)
        assert all(torch.equal(a, b) for a, b in zip(never[start:], resumed, strict=True))


# ---- order of events ----------------------------------------------------------------------------------------------


def test_a_slow_store_is_hidden_while_the_consumer_works(many: Store) -> None:
    slow, plan = Slow(many), plan_of(many, 4)
    with Loader(slow, plan, rank=0, world_size=1, start=0, stop=6, threads=2, prefetch=2) as loader:
        for step in range(6):
            batch = next(loader)
            # The consumer works and asks for nothing, yet the two batches after this one are read to their end.
            assert slow.wait_for(4 * min(6, step + 3))
            assert batch.step == step
        assert sorted(slow.begun) == list(range(24))


def test_reads_run_at_most_prefetch_batches_ahead(many: Store) -> None:
    slow = Slow(many)
    with Loader(slow, plan_of(many, 4), rank=0, world_size=1, start=0, stop=6, prefetch=2) as loader:
        assert slow.wait_for(8)
        time.sleep(0.05)
        assert len(slow.begun) == 8  # before the first step: batches 0 and 1
        next(loader)
        assert slow.wait_for(12)
        time.sleep(0.05)
        assert len(slow.begun) == 12  # while step 0 is at work: 1 and 2


@pytest.mark.parametrize("expand", [True, False])
def test_a_ring_of_prefetch_and_one_batches_is_all_the_memory(many: Store, expand: bool) -> None:
    places = []
    with Loader(
        many, plan_of(many, 3), rank=0, world_size=1, start=0, stop=40, prefetch=3, threads=3, expand=expand
    ) as loader:
        places = [batch.volumes.data_ptr() for batch in loader]
    assert len(places) == 40
    assert len(set(places)) == 4


def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(many: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL_ROW", 0)  # every batch is read
    slow = Slow(many)
    with Loader(slow, plan_of(many, 4), rank=0, world_size=1, start=0, stop=18, prefetch=1, threads=3) as loader:
        for k, batch in enumerate(loader):
            kept = batch.volumes.clone()
            assert slow.wait_for(4 * min(18, k + 2))  # all that is read ahead has been read
            assert torch.equal(batch.volumes, kept)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("expand", [True, False])
def test_small_rows_are_read_once_and_are_the_same_bits_ever_after(
    stores: dict[str, Store], name: str, expand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(stores[name])

    def epochs(store: Any) -> list[torch.Tensor]:
        plan = plan_of(stores[name], 4)
        span: dict[str, Any] = {"rank": 0, "world_size": 1, "start": 0, "stop": 3 * plan.steps_per_epoch}
        how = {"normalise": "none", "expand": expand, "threads": 1}
        with Loader(store, plan, **span, **how) as batches:
            return [batch.volumes.clone() for batch in batches]

    kept = epochs(slow)
    row_bytes = np.prod(slow.row_shape) * slow.dtype.itemsize
    assert {slow.begun.count(row) for row in slow.begun} == {1 if row_bytes <= module.SMALL_ROW else 3}
    monkeypatch.setattr(module, "SMALL_STORE", 0)
    for ours, read in zip(kept, epochs(stores[name]), strict=True):
        assert torch.equal(ours, read)


def test_threads_overlap_their_reads(many: Store) -> None:
    class Meeting(Slow):
        barrier = threading.Barrier(4)

        def pause(self, i: int) -> None:
            self.barrier.wait(PATIENCE)  # passes only when four reads are under way at once

    meeting = Meeting(many)
    assert len(load(meeting, plan_of(many, 4), 0, 6, threads=4)) == 6
    assert meeting.most == 4


def test_wait_tells_the_seconds_the_consumer_stood_still(many: Store) -> None:
    class Gate(Slow):
        def pause(self, i: int) -> None:
            time.sleep(0.3)

    slow = Gate(many)
    with Loader(slow, plan_of(many, 1), rank=0, world_size=1, start=0, stop=2, threads=1) as loader:
        assert next(loader).wait > 0.15
        assert slow.wait_for(2)
        time.sleep(0.1)
        assert next(loader).wait < 0.15


# ---- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_leaving_early_stops_the_readers(many: Store, steps: int) -> None:
    slow = Slow(many)
    with Loader(slow, plan_of(many, 6), rank=0, world_size=1, start=0, stop=1000, threads=2, prefetch=20) as loader:
        for _ in range(steps):
            next(loader)
    begun = len(slow.begun)
    time.sleep(0.05)
    assert loader_threads() == []
    assert len(slow.begun) == begun == len(slow.ended)
    assert begun < 6 * (20 + steps)  # what was asked for and not begun is let go
    assert list(loader) == []


def test_an_error_of_the_consumer_stops_the_readers_and_passes(many: Store) -> None:
    loader = Loader(many, plan_of(many, 6), rank=0, world_size=1, start=0, stop=9)

    def step() -> None:
        with loader:
            next(loader)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert loader_threads() == []


def test_dropping_chunks_half_way_stops_the_readers(many: Store) -> None:
    pieces = chunks(many, range(24), 4, values(many, "none"))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert loader_threads() == []


# ---- what is broken -----------------------------------------------------------------------------------------------

DAMAGED = Damaged("scan x is damaged", wanted="all of it", do="Copy")


class Broken(Slow):
    """Raises `error` where scan `bad` is read."""

    def __init__(self, store: Store, bad: int, error: Exception) -> None:
        super().__init__(store)
        self.bad, self.error = bad, error

    def read_into(self, i: int, out: Any) -> None:
        if i == self.bad:
            out[...] = np.nan  # a read that fails half way
            raise self.error
        super().read_into(i, out)


@pytest.mark.parametrize(
    ("error", "on_damage", "kind", "words"),
    [
        (OSError("gone"), "raise", RuntimeError, "step 3: scan {} could not be read: OSError: gone"),
        (OSError("gone"), "skip", RuntimeError, "step 3: scan {} could not be read: OSError: gone"),
        (DAMAGED, "raise", BadInput, "step 3: scan x is damaged; wanted all of it. Copy."),
    ],
)
def test_an_error_comes_at_its_step_and_names_the_scan(
    many: Store, error: Exception, on_damage: str, kind: type[Exception], words: str
) -> None:
    """Only damage can be skipped: a disk that does not answer says nothing about a scan."""
    plan, got = plan_of(many, 6), []
    bad = int(plan.batch(3)[2])
    loader = Loader(
        Broken(many, bad, error),
        plan,
        rank=0,
        world_size=1,
        start=0,
        stop=4,
        prefetch=4,
        on_damage=on_damage,  # type: ignore[arg-type]
    )
    with loader, pytest.raises(kind) as raised:
        got.extend(batch.step for batch in loader)
    assert got == [0, 1, 2]
    assert str(raised.value) == words.format(many.ids[bad])
    assert raised.value.__cause__ is error
    assert loader_threads() == []


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("name", ["dense_two_channels", "packed_two_channels"])
def test_a_damaged_scan_is_skipped_where_asked_and_the_others_are_untouched(
    stores: dict[str, Store], name: str, expand: bool
) -> None:
    store = stores[name]
    plan = plan_of(store, 4, seed=2)
    bad = int(plan.batch(1)[2])
    broken = Broken(store, bad, DAMAGED)
    whole = load(store, plan, 0, 9, expand=expand, normalise="dataset")
    found = load(broken, plan, 0, 9, expand=expand, normalise="dataset", on_damage="skip")
    assert [batch.step for batch in found] == list(range(9))
    for got, wanted in zip(found, whole, strict=True):
        assert np.array_equal(got.rows, wanted.rows)
        assert got.sound.tolist() == [row != bad for row in got.rows]
        assert got.damaged == ("scan x is damaged",) * int(bad in got.rows)
        sound = torch.from_numpy(got.sound)
        assert torch.equal(got.volumes[sound], wanted.volumes[sound])
        # An encoder still computes on it, and 0 times NaN is NaN in every gradient.
        assert (got.volumes[~sound] == 0).all()


def test_chunks_are_a_ranks_rows_in_parts_and_all_of_them_again(many: Store) -> None:
    """5 subjects over 2 ranks, the first's 3 in 2 chunks; memory is that of a chunk."""
    plan = plan_of(many, 5)
    ours: dict[str, Any] = {"rank": 0, "world_size": 2, "start": 1, "stop": 3}
    with Loader(many, plan, **ours) as whole:
        wanted = {batch.step: (batch.rows.tolist(), batch.volumes.clone()) for batch in whole}
    with Loader(many, plan, chunks=2, **ours) as parts:
        found = [(b.step, b.rows.tolist(), b.volumes.clone(), len(b.volumes)) for b in parts]
    assert [(step, size) for step, _, _, size in found] == [(s, n) for s in (1, 2) for n in (2, 1, 2, 1)]
    for at in range(0, 8, 2):
        step = found[at][0]
        assert found[at][1] + found[at + 1][1] == wanted[step][0]
        assert torch.equal(torch.cat([found[at][2], found[at + 1][2]]), wanted[step][1])


def test_impossible_settings_are_refused_at_once(many: Store) -> None:
    plan = plan_of(many, 6)
    for settings, words in (
        ({"threads": 0}, "threads 0; wanted at least 1. Set threads to 1 or more"),
        ({"prefetch": 0}, "prefetch 0; wanted at least 1"),
        ({"on_damage": "ignore"}, "on_damage 'ignore'; wanted raise or skip. Use one of the two"),
        ({"normalise": "z"}, "normalise 'z'; wanted volume, dataset or none. Use one of the three"),
        ({"world_size": 7}, "batch_size 6 over 7 ranks"),
    ):
        with pytest.raises(BadInput, match=words):
            Loader(many, plan, **{"rank": 0, "world_size": 1, "start": 0, "stop": 1, **settings})  # type: ignore[arg-type]


# ---- memory -------------------------------------------------------------------------------------------------------

THREE_EPOCHS = """
import sys
from pathlib import Path
import numpy as np, torch
from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import Loader
from cauc_dist.stream.plan import Plan

torch.set_num_threads(1)
side, n, folder = 96, 24, Path(sys.argv[1])
noise = np.random.default_rng(0).normal(size=(1, side, side, side)).astype(np.float32)
ids = [f"sub-{i}" for i in range(n)]
mask = noise > 0 if sys.argv[2] == "packed" else None
given = (noise * (i + 1) if mask is None else noise * (i + 1) * mask for i in range(n))
from_arrays(folder / "s", given, ids, shape=noise.shape, dtype="f32", codec="lz4", mask=mask)
store = Store.open(folder / "s")
plan = Plan(range(n), ids, 4, seed=0)
with Loader(store, plan, rank=0, world_size=1, start=0, stop=4 * plan.steps_per_epoch) as batches:
    for batch in batches:
        if (batch.step + 1) % plan.steps_per_epoch == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(pages)
"""


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_three_epochs_take_no_more_memory_than_one(tmp_path: Path, layout: str) -> None:
    """An epoch reads 85 MB; the process holds 300 to 400, of which 2 % are 6 to 8."""
    told = subprocess.run(
        [sys.executable, "-c", THREE_EPOCHS, tmp_path, layout], check=True, capture_output=True, text=True, cwd=ROOT
    )
    first, *others = map(int, told.stdout.split())
    assert len(others) == 3
    assert max(others) <= 1.02 * first
    assert min(others) >= 0.98 * first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_rows_cross_as_stored_and_are_expanded_there(stores: dict[str, Store]) -> None:
    for name, store in stores.items():
        plan, normalise = plan_of(store, 4), allowed(name)[0]
        ours = load(store, plan, 0, 9, normalise=normalise, device=torch.device("cuda"))
        for batch, cpu in zip(ours, load(store, plan, 0, 9, normalise=normalise), strict=True):
            assert batch.volumes.device.type == "cuda"
            torch.testing.assert_close(batch.volumes.cpu(), cpu.volumes, rtol=1e-6, atol=1e-6)
