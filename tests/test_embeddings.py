"""Embeddings come in the order of the store under any number of ranks, and are read back as they were written."""

import csv
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cauc_dist import checkpoint, cli, embed, embeddings
from cauc_dist.config import Data, Objective
from cauc_dist.embeddings import Embeddings
from cauc_dist.errors import BAD_INPUT, BadInput
from cauc_dist.export import export
from cauc_dist.prepare import load, parts
from cauc_dist.store.ingest import ingest
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.train import build_model
from cauc_dist.world import World
from tests.ranks import run_ranks
from tests.store.cohorts import bids, noise
from tests.test_export import EXACT, config, trained

N = 11  # over 2 and 3 ranks no share is like another
SHAPE = (16, 17, 18)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven scans; ages fall as names rise, and one sex is not known."""
    folder = tmp_path_factory.mktemp("scans")
    source = bids(folder / "bids", [noise(i, SHAPE) for i in range(N)])
    rows = [f"sub-{i:02d}\t{60.25 - i}\t{'n/a' if i == 3 else 'MF'[i % 2]}\n" for i in range(N)]
    (source / "participants.tsv").write_text("participant_id\tage\tsex\n" + "".join(rows))
    ingest(source, folder / "store.zarr", EXACT)
    return folder / "store.zarr"


@pytest.fixture(scope="module")
def run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config(scans, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def alone(run: Path) -> Embeddings:
    source = embed.of_run(run, World())
    return source.embeddings(*source.represent(np.arange(N)))


def by_hand(run: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """h and z by the id of the scan, one scan at a time, normalised by numpy."""
    settings = load(run)
    store, (saved, _) = Store.open(settings.data.store), checkpoint.latest(run)
    assert saved is not None
    model = build_model(settings, store.shape)
    model.load_state_dict({name: saved.tensors.get(f"parameter/{name}", t) for name, t in model.state_dict().items()})
    h, z = {}, {}
    with torch.no_grad():
        for i, name in enumerate(store.ids):
            x = store.volume(i)
            x = torch.from_numpy((x - x.mean()) / x.std()).float()[None]
            h[name], z[name] = model.eval().encoder(x)[0].numpy(), model(x)[0].numpy()
    return h, z


def test_each_row_is_of_the_scan_whose_id_it_has(run: Path, scans: Path, alone: Embeddings) -> None:
    h, z = by_hand(run)
    assert alone.ids == Store.open(scans).ids
    assert alone.z is not None
    np.testing.assert_allclose(alone.h, [h[name] for name in alone.ids], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone.z, [z[name] for name in alone.ids], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(alone.z, axis=1), 1, rtol=1e-6)
    gaps = np.abs(alone.h[:, None] - alone.h[None]).max(-1) + np.eye(N)
    assert gaps.min() > 1e-3  # no two scans could be taken for each other


def test_z_is_off_the_sphere_where_the_loss_was(scans: Path, tmp_path: Path) -> None:
    off = Objective(name="rank_n_contrast", kernel=("age:gaussian:5",))
    folder = trained(config(scans, tmp_path / "run", objective=off))
    _, z = by_hand(folder)
    source = embed.of_run(folder, World())
    _, found = source.represent(np.arange(N))
    np.testing.assert_allclose(found, [z[name] for name in source.store.ids], rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(found, axis=1).std() > 1e-3


def share(run: Path, n: int) -> tuple[Any, Any]:
    return embed.over_ranks(embed.of_run(run, World()).represent, n)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_what_one_process_gives_in_the_order_of_the_store(
    run: Path, alone: Embeddings, world_size: int
) -> None:
    (h, z), *others = run_ranks(world_size, share, run, N)
    assert alone.z is not None
    assert h.dtype == z.dtype == np.float32
    np.testing.assert_allclose(h, alone.h, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(z, alone.z, rtol=1e-6, atol=1e-6)
    assert all(len(h) == 0 and z is None for h, z in others)


def numbered(rows: np.ndarray) -> tuple[np.ndarray, None]:
    return rows[:, None].astype(np.float32), None


def test_more_ranks_than_scans_is_no_trouble() -> None:
    (h, z), *_ = run_ranks(3, embed.over_ranks, numbered, 2)
    assert (h[:, 0].tolist(), z) == ([0, 1], None)


def broken(rows: np.ndarray) -> tuple[np.ndarray, None]:
    if 4 in rows:
        raise OSError("disk on fire")
    return numbered(rows)


def complaint(n: int) -> str:
    try:
        embed.over_ranks(broken, n)
    except BadInput as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_what_fails_on_one_rank_ends_all_of_them_in_the_same_words() -> None:
    told = "disk on fire; wanted a store that can be read. Check its disk, its permissions, or its network."
    assert run_ranks(2, complaint, 5) == [f"BadInput: {told}", f"Elsewhere: {told}"]


def test_the_command_line_on_three_ranks_writes_what_one_process_computes(
    run: Path, scans: Path, alone: Embeddings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["embed", str(run), str(tmp_path / "new" / "out"), "--ranks", "3", "--device", "cpu"]) == 0
    assert f"wrote {tmp_path / 'new' / 'out'}: {N} scans, h of {alone.h.shape[1]} numbers" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    found = Embeddings.load(tmp_path / "new" / "out", Store.open(scans))
    assert (found.ids, found.participants, found.columns) == (alone.ids, alone.participants, alone.columns)
    assert (found.method, found.step, found.fingerprint) == ("cauc", 7, Store.open(scans).fingerprint)
    np.testing.assert_allclose(found.h, alone.h, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.metadata, Store.open(scans).metadata(["age", "sex"]))


def test_the_table_has_the_participants_and_their_metadata_in_the_same_order(
    run: Path, scans: Path, alone: Embeddings, tmp_path: Path
) -> None:
    with (alone.save(tmp_path / "out") / "embeddings.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    store = Store.open(scans)
    assert [row["participant_id"] for row in rows] == list(store.subjects) == [f"sub-{i:02d}" for i in range(N)]
    assert [row["scan_id"] for row in rows] == list(store.ids)
    assert [row["age"] for row in rows] == [f"{60.25 - i}" for i in range(N)]
    assert [row["sex"] for row in rows] == ["M", "F", "M", "n/a", *("MF"[i % 2] for i in range(4, N))]
    train, _ = parts(load(run), store)
    assert [i for i, row in enumerate(rows) if row["pretraining"] == "train"] == train.tolist()
    assert {row["pretraining"] for row in rows} == {"train", "held-out"}


def small(**changes: Any) -> Embeddings:
    base = Embeddings(
        ids=("b", "ä"),
        participants=("sub-1", "sub-2"),
        h=np.array([[1, 2], [3, 4]], np.float32),
        z=None,
        columns=(Column("site", "category", ("A\tB", 'C"D')), Column("age", "number")),
        metadata=np.array([[1.0, np.nan], [0, 2e-7]]),
        trained=None,
        fingerprint="f" * 64,
        method="cauc",
        step=3,
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("changes", [{}, {"z": np.ones((2, 3), np.float32), "trained": np.array([True, False])}])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    one = small(**changes)
    found = Embeddings.load(one.save(tmp_path / "out"))
    for name, wanted in vars(one).items():
        value = getattr(found, name)
        assert type(value) is type(wanted)
        if isinstance(wanted, np.ndarray):
            assert (value.dtype, value.tobytes()) == (wanted.dtype, wanted.tobytes())
        else:
            assert value == wanted


def test_names_with_tabs_and_quotes_stay_one_cell(tmp_path: Path) -> None:
    with (small().save(tmp_path / "out") / "embeddings.tsv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[1:] == [["sub-1", "b", "n/a", 'C"D', "n/a"], ["sub-2", "ä", "n/a", "A\tB", "0.0000002"]]


def test_embeddings_of_another_store_are_refused(alone: Embeddings, store: Path, tmp_path: Path) -> None:
    folder = alone.save(tmp_path / "out")
    wanted = Store.open(store).fingerprint[:12]
    message = rf"is of a store with the fingerprint {alone.fingerprint[:12]}; wanted {wanted}, that of .*store.zarr"
    with pytest.raises(BadInput, match=message):
        Embeddings.load(folder, Store.open(store))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code ran')",))


def test_damage_is_refused_and_no_pickle_is_read(tmp_path: Path) -> None:
    folder = small().save(tmp_path / "out")
    path, data = folder / "embeddings.npz", (folder / "embeddings.npz").read_bytes()
    place = data.index(np.array([[1, 2], [3, 4]], np.float32).tobytes())
    flipped = data[: place + 1] + bytes([data[place + 1] ^ 1]) + data[place + 2 :]
    for damaged in (b"", data[:100], data[:-9], flipped):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"out holds no sound embeddings .*; wanted the embeddings.npz that"):
            Embeddings.load(folder)
    np.savez(path, ids=np.array([Evil()], object))
    with pytest.raises(BadInput, match="allow_pickle"):
        Embeddings.load(folder)
    one = small()
    np.savez(path, allow_pickle=False, **{**one._arrays(), "h": one.h[:1]})
    with pytest.raises(BadInput, match="of different lengths"):
        Embeddings.load(folder)
    with pytest.raises(BadInput, match="holds no sound embeddings"):
        Embeddings.load(tmp_path / "nowhere")


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(embeddings, "sync_tree", refuse)
    with pytest.raises(OSError, match="no space left"):
        small().save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("normalise", ["volume", "dataset", "none"])
def test_an_exported_encoder_gives_the_features_of_its_run(scans: Path, tmp_path: Path, normalise: str) -> None:
    data = Data(store=str(scans), normalise=normalise)  # type: ignore[arg-type]
    folder = trained(config(scans, tmp_path / "run", data=data))
    out = export(folder, tmp_path / "encoder")
    wanted, _ = embed.of_run(folder, World()).represent(np.arange(N))
    source = embed.open_source(out, str(scans), World(), "cpu")
    found = source.embeddings(*source.represent(np.arange(N)))
    np.testing.assert_allclose(found.h, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert (found.z, found.trained, found.method, found.step) == (None, None, "cauc", 7)


def test_an_exported_encoder_refuses_scans_unlike_its_own(run: Path, store: Path, scans: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "encoder")
    with pytest.raises(BadInput, match=r"has scans of shape \(1, 16, 16, 16\); wanted \(1, 16, 17, 18\), as in the"):
        embed.of_export(out, Store.open(store), World())
    other = ingest_with_voxels(tmp_path, 3.0)
    with pytest.raises(BadInput, match=r"has scans of voxel_mm \[3\.0, 3\.0, 3\.0\]; wanted \[2\.0, 2\.0, 2\.0\]"):
        embed.of_export(out, other, World())


def ingest_with_voxels(tmp_path: Path, size: float) -> Store:
    import nibabel as nib

    source = bids(tmp_path / "bids", [noise(i, SHAPE) for i in range(3)])
    for path in source.rglob("*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(image.get_fdata(), np.diag([size, size, size, 1.0])), path)
    ingest(source, tmp_path / "store.zarr", EXACT)
    return Store.open(tmp_path / "store.zarr")


@pytest.mark.parametrize(
    ("exported", "options", "message"),
    [
        (True, [], "is an encoder alone; wanted a store to embed. Give it by --store."),
        (False, ["--store", "other.zarr"], "--store other.zarr for the run"),
        (False, ["--ranks", "0"], "--ranks 0; wanted 1 or more processes"),
        (False, ["--out"], "taken exists already; wanted a new folder"),
    ],
)
def test_the_command_line_refuses_before_any_rank_starts(
    run: Path, tmp_path: Path, exported: bool, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = export(run, tmp_path / "encoder") if exported else run
    out = tmp_path / "taken"
    if options == ["--out"]:
        out.mkdir()
        options = []
    assert cli.main(["embed", str(source), str(out), *options]) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_damaged_scan_ends_every_rank_with_one_message(
    scans: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last rank's share is damaged, not rank 0's."""
    copy = tmp_path / "copy.zarr"
    shutil.copytree(scans, copy)
    folder = trained(config(copy, tmp_path / "run"))
    volume = max((p for p in (copy / "volumes").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(volume.read_bytes())
    row = int(np.prod(SHAPE)) * 4
    data[row * (N - 1) + row // 2] ^= 1
    volume.write_bytes(data)
    assert cli.main(["embed", str(folder), str(tmp_path / "out"), "--ranks", "2", "--device", "cpu"]) == BAD_INPUT
    told = capfd.readouterr().err
    assert told.count("error:") == 1, told
    assert "scan sub-10" in told
    assert "is damaged" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()
