"""What an opened store says, and that damage is an error which names the scan, never zeros."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from cauc_dist import phantoms
from cauc_dist.errors import BadInput
from cauc_dist.store import layout, rows
from cauc_dist.store.ingest import from_arrays, ingest
from cauc_dist.store.layout import Column
from cauc_dist.store.planned import Settings
from cauc_dist.store.reader import Damaged, Store
from cauc_dist.store.shards import Form
from tests.store.cohorts import change, contents, noise, shard, spans

N, PER = 34, 32


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader") / "b"
    phantoms.write_cohort(folder, n=N, size=16)
    lines = [line.split("\t") for line in (folder / "participants.tsv").read_text().splitlines()]
    lines = [[*lines[0], "empty", "same"], *([*line, "n/a", "3"] for line in lines[1:])]
    (folder / "participants.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def packed(cohort: Path) -> Path:
    ingest(cohort, cohort.parent / "packed.zarr", Settings(layout="packed"))
    return cohort.parent / "packed.zarr"


@pytest.fixture(scope="module")
def dense(cohort: Path) -> Path:
    ingest(cohort, cohort.parent / "dense.zarr", Settings(layout="dense"))
    return cohort.parent / "dense.zarr"


@pytest.fixture(params=["packed", "dense"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy to break: rows as they are (packed, no compression), or to be decoded (dense, lz4)."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "s.zarr"))


def read(store: Store, i: int) -> np.ndarray:
    out = np.empty(store.row_shape, store.dtype)
    store.read_into(i, out)
    return out


# ---- what a store says ----------------------------------------------------------------------------------------


def test_a_store_says_what_it_holds(packed: Path, dense: Path, cohort: Path) -> None:
    store, other = Store.open(packed), Store.open(str(dense) + "/")
    ids = tuple(f"sub-{i:04d}" for i in range(N))
    assert (len(store), store.ids, store.subjects, store.shape) == (N, ids, ids, (1, 16, 16, 16))
    assert (store.where, store.name, other.name) == (str(packed), "packed.zarr", "dense.zarr")
    kinds = [(c.name, c.kind, c.levels) for c in store.columns]
    assert kinds[:3] == [("age", "number", ()), ("sex", "category", ("F", "M")), ("site", "category", ("A", "B", "C"))]
    assert store.column("sex") == store.columns[1]
    assert all(values.shape == (N, 1) for values in store.stats.values())
    assert set(store.stats) == {"mean", "std", "min", "max", "nonzero", "scale", "offset"}
    assert store.mask is not None
    assert store.mask.shape == store.shape
    assert (store.layout, store.row_shape, store.dtype) == ("packed", (store.mask.sum(),), np.float16)
    assert (other.layout, other.row_shape, other.mask) == ("dense", (1, 16, 16, 16), None)
    assert store.set_aside == ()


def test_keys_are_of_the_ids_alone(packed: Path, dense: Path) -> None:
    # The first 8 bytes of `printf sub-0000 | sha256sum`, little endian.
    assert Store.open(packed).keys[0] == int.from_bytes(bytes.fromhex("e953696cc6be0f70"), "little")
    assert Store.open(packed).keys.dtype == np.uint64
    assert np.array_equal(Store.open(packed).keys, Store.open(dense).keys)
    assert len(set(Store.open(packed).keys.tolist())) == N


def test_metadata_comes_in_the_order_asked_for(packed: Path) -> None:
    store = Store.open(packed)
    table = [line.split("\t") for line in (packed / "participants.tsv").read_text().splitlines()[1:]]
    expected = [["FM".index(sex), float(age)] for _, _, age, sex, *_ in table]
    assert store.metadata(["sex", "age"]).tolist() == expected
    assert store.metadata([]).shape == (N, 0)
    assert np.isnan(store.metadata(["empty"])).all()


def test_an_unknown_column_is_answered_with_the_nearest(packed: Path) -> None:
    store = Store.open(packed)
    with pytest.raises(BadInput, match=r"no column 'agee' in .*Did you mean age"):
        store.metadata(["sex", "agee"])
    with pytest.raises(BadInput, match=r"no column 'agee'"):
        store.column("agee")
    with pytest.raises(BadInput, match=r"no column 'agee'"):
        store.require(["agee"])


def test_require_passes_columns_that_vary_and_refuses_the_others(packed: Path) -> None:
    store = Store.open(packed)
    store.require(["age", "sex", "site"])
    with pytest.raises(BadInput, match=r"column same of .* is the same for all scans.*Leave this column out"):
        store.require(["age", "same"])
    with pytest.raises(BadInput, match=r"column empty of .* is empty; wanted at least two different values"):
        store.require(["empty"])
    with pytest.raises(BadInput, match=r"column age of .* is the same"):
        store.require(["age"], np.array([5]))


def test_files_are_all_that_a_copy_needs(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    names = opened.files()
    assert sorted(names) == sorted(contents(store))
    assert names[-1] == "zarr.json"


def test_rows_that_are_no_scans_have_no_number(store: Path) -> None:
    before = [read(Store.open(store), i) for i in range(N)]
    valid = zarr.open_array(store / "valid", mode="r+")
    valid[4], valid[20] = 0, 2
    opened = Store.open(store)
    kept = [i for i in range(N) if i not in (4, 20)]
    assert opened.ids == tuple(f"sub-{i:04d}" for i in kept)
    assert np.array_equal(opened.keys, Store.open(store).keys)
    for new, old in enumerate(kept):
        assert np.array_equal(read(opened, new), before[old])
    table = (store / "participants.tsv").read_text().splitlines()[1:]
    assert opened.metadata(["age"])[:, 0].tolist() == [float(table[i].split("\t")[2]) for i in kept]


# ---- what is not a store --------------------------------------------------------------------------------------


def test_what_is_not_a_store_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no store at .*ingest first"):
        Store.open(tmp_path / "nowhere")
    for folder in (tmp_path, packed / "volumes", packed.parent):
        with pytest.raises(BadInput, match=r"is not a store; wanted a zarr.json with format cauc_dist\.store"):
            Store.open(folder)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(BadInput, match=r"is not a store"):
        Store.open(tmp_path / "other.zarr")
    with pytest.raises(BadInput, match=r"store ftp://x/y; wanted a folder, http://, https://, s3://. Copy the store"):
        Store.open("ftp://x/y")


def test_another_version_is_refused(store: Path) -> None:
    change(store / "zarr.json", lambda told: told["attributes"].update(version=1))
    with pytest.raises(BadInput, match=r"format cauc_dist.store 1 \(written by .*wanted cauc_dist.store 2. Ingest"):
        Store.open(store)


# ---- damage ---------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_a_scan_is_an_error_that_names_it(store: Path) -> None:
    path = shard(store, 0)
    whole = path.read_bytes()
    first, length = spans(path, PER)[7]
    ends = [0, 8 * length - 1, 8 * (length - 4)]  # the first bit, the last, the first of the crc
    for at in [*ends, *np.random.default_rng(0).integers(0, length * 8, 12).tolist()]:
        broken = bytearray(whole)
        broken[first + at // 8] ^= 1 << at % 8
        path.write_bytes(broken)
        opened = Store.open(store)
        with pytest.raises(Damaged, match=r"scan sub-0007 \(row 7\) of .* is damaged .*crc32c.*ingest the data again"):
            read(opened, 7)
        with pytest.raises(Damaged, match=r"scan sub-0007 "):
            opened.volume(7)
        read(opened, 6)
        read(opened, 8)


def test_a_flipped_bit_in_a_shard_s_index_is_an_error(store: Path) -> None:
    path = shard(store, 0)
    whole = path.read_bytes()
    for back in (1, 4, 5, 4 + 16 * PER):  # of the crc, its first byte, the last of the index, the first
        broken = bytearray(whole)
        broken[-back] ^= 1
        path.write_bytes(broken)
        with pytest.raises(Damaged, match=r"scan sub-0003 .*the index of shard 0: its crc32c does not match"):
            read(Store.open(store), 3)


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_cut_shard_is_an_error(store: Path, keep: int) -> None:
    shard(store, 0).write_bytes(shard(store, 0).read_bytes()[:keep])
    with pytest.raises(Damaged, match=r"scan sub-0003 .* is damaged \((the index of )?shard 0"):
        read(Store.open(store), 3)


def test_a_shard_cut_while_it_is_open_is_an_error(store: Path) -> None:
    opened = Store.open(store)
    read(opened, 3)
    first, length = spans(shard(store, 0), PER)[5]
    os.truncate(shard(store, 0), first + length // 2)
    read(opened, 4)
    with pytest.raises(Damaged, match=r"scan sub-0005 .*the file ends after \d+ of \d+ bytes"):
        read(opened, 5)


def test_an_absent_shard_is_an_error_and_not_zeros(store: Path) -> None:
    shard(store, 1).unlink()
    opened = Store.open(store)
    read(opened, 31)
    with pytest.raises(Damaged, match=r"scan sub-0032 .* is damaged .*No such file"):
        read(opened, 32)


def test_an_unwritten_row_is_an_error_and_not_the_fill_value(tmp_path: Path) -> None:
    kinds = [noise(0)[None], np.full((1, 8, 9, 7), np.nan), noise(1)[None]]
    from_arrays(tmp_path / "s.zarr", kinds, ["a", "b", "c"], shape=(1, 8, 9, 7))
    zarr.open_array(tmp_path / "s.zarr/valid", mode="r+")[1] = 1  # as if it were a scan
    with pytest.raises(Damaged, match=r"scan b \(row 1\).*row 1 was never written to shard 0"):
        read(Store.open(tmp_path / "s.zarr"), 1)


ROW_ARRAYS = ["ids", "subjects", "valid", "checksums", "stats/std", "meta/age", "meta/empty"]


@pytest.mark.parametrize("name", ROW_ARRAYS)
def test_small_arrays_are_checked_when_the_store_opens(store: Path, name: str) -> None:
    (path,) = (f for f in (store / name / "c").rglob("*") if f.is_file())
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(Damaged, match=r"store .* is damaged .*crc32c"):
        Store.open(store)
    path.write_bytes(whole[:3])
    with pytest.raises(Damaged, match=r"store .* is damaged .*a chunk of 3 bytes"):
        Store.open(store)
    path.unlink()
    with pytest.raises(Damaged, match=rf"is damaged .*No such file.*{name}"):
        Store.open(store)


def test_a_changed_mask_is_an_error(packed: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(packed, tmp_path / "s.zarr"))
    mask = zarr.open_array(store / "mask", mode="r+")
    mask[0, 0, 0, 0] = True
    with pytest.raises(Damaged, match=r"the mask has (\d+) voxels, a row of volumes \(\d+,\)"):
        Store.open(store)


@pytest.mark.parametrize("name", ["ids", "volumes"])
def test_an_array_that_is_gone_or_short_is_an_error(store: Path, name: str) -> None:
    zarr.open_array(store / name, mode="r+").resize((N - 1, *zarr.open_array(store / name).shape[1:]))
    with pytest.raises(Damaged, match=rf"{name} has 33 rows, not 34"):
        Store.open(store)
    shutil.rmtree(store / name)
    with pytest.raises(Damaged, match=rf"is damaged .*No such file.*{name}/zarr.json"):
        Store.open(store)


# ---- many rows ------------------------------------------------------------------------------------------------


def test_a_store_of_100_000_scans_opens_in_a_moment(tmp_path: Path) -> None:
    """Its volumes are not there: only what is read to open it."""
    n, rng = 100_000, np.random.default_rng(0)
    form = Form((1, 2, 2, 2), "f16", "lz4")
    rows.create(tmp_path / "s.zarr", form, n, 1563)
    ids = [f"sub-{i:06d}_ses-1" for i in range(n)]
    valid = rng.choice(np.array([0, 1, 1, 1, 2], np.uint8), n)
    values = {"ids": layout.encode_text(ids), "subjects": layout.encode_text([name[:10] for name in ids])}
    values |= {"valid": valid, "checksums": rng.integers(0, 256, (n, 32), np.uint8)}
    values |= {f"stats/{name}": rng.normal(size=(n, 1)) for name in layout.STATS}
    columns = [Column("age", "number"), Column("site", "category", tuple("abc"))]
    metadata = [rng.uniform(20, 80, n), rng.integers(0, 3, n).astype(float)]
    rows.write(tmp_path / "s.zarr", values, columns, metadata)
    told = {"format": layout.FORMAT, "version": layout.VERSION, "n": n, "shape": [1, 2, 2, 2], "layout": "dense"}
    rows.commit(tmp_path / "s.zarr", {**told, "columns": ["age", "site"], "settings": {}, "set_aside": []})
    began = time.perf_counter()
    store = Store.open(tmp_path / "s.zarr")
    assert time.perf_counter() - began < 4  # .3 s here
    usable = np.flatnonzero(valid == 1)
    assert store.ids == tuple(ids[i] for i in usable)
    assert np.array_equal(store.metadata(["age", "site"]), np.stack(metadata, 1)[usable])
    assert np.array_equal(store.stats["std"], values["stats/std"][usable])
    assert len(set(store.keys.tolist())) == len(usable)
