import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from cauc_dist import phantoms
from cauc_dist.errors import BadInput
from cauc_dist.store.ingest import ingest
from cauc_dist.store.reader import Store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    phantoms.write_cohort(folder / "b", n=34, size=16)
    rows = [line.split("\t") for line in (folder / "b/participants.tsv").read_text().splitlines()]
    rows = [[*rows[0], "empty", "same"], *([*row, "n/a", "3"] for row in rows[1:])]
    (folder / "b/participants.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    ingest(folder / "b", folder / "s.zarr")
    return folder / "s.zarr"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made, tmp_path / "s.zarr"))


def only_file(folder: Path) -> Path:
    (path,) = (f for f in (folder / "c").rglob("*") if f.is_file())
    return path


def shard(store: Path, k: int) -> Path:
    return store / f"volumes/c/{k}/0/0/0/0"


def test_metadata_comes_in_the_order_asked_for(made: Path) -> None:
    store = Store.open(made)
    table = [line.split("\t") for line in (made / "participants.tsv").read_text().splitlines()[1:]]
    expected = [["FM".index(sex), float(age)] for _, age, sex, *_ in table]
    assert store.metadata(["sex", "age"]).tolist() == expected
    assert store.metadata([]).shape == (34, 0)
    assert np.isnan(store.metadata(["empty"])).all()


def test_a_store_says_what_it_holds(made: Path) -> None:
    store = Store.open(made)
    assert len(store) == 34
    assert store.shape == (1, 16, 16, 16)
    assert store.path == made
    assert store.ids == store.subjects == tuple(f"sub-{i:04d}" for i in range(34))
    assert [(c.name, c.kind) for c in store.columns][:3] == [
        ("age", "number"),
        ("sex", "category"),
        ("site", "category"),
    ]
    assert set(store.stats) == {"mean", "std", "min", "max", "nonzero", "scale", "offset"}
    assert len(store.fingerprint) == 64
    assert store.fingerprint == Store.open(made).fingerprint


def test_an_unknown_column_is_answered_with_the_nearest(made: Path) -> None:
    with pytest.raises(BadInput, match=r"no column 'agee' in .*Did you mean age"):
        Store.open(made).metadata(["sex", "agee"])


def test_require_passes_columns_that_vary_and_refuses_the_others(made: Path) -> None:
    store = Store.open(made)
    store.require(["age", "sex", "site"])
    with pytest.raises(BadInput, match=r"column same of .* is the same for all scans.*Leave this column out"):
        store.require(["age", "same"])
    with pytest.raises(BadInput, match=r"column empty of .* is empty; wanted at least two different values"):
        store.require(["empty"])
    with pytest.raises(BadInput, match=r"no column 'foo'"):
        store.require(["foo"])
    with pytest.raises(BadInput, match=r"column age of .* is the same"):
        store.require(["age"], np.array([5]))


def test_what_is_not_a_store_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no store at .*ingest first"):
        Store.open(tmp_path / "nowhere")
    for folder in (tmp_path, made / "volumes", made.parent):
        with pytest.raises(BadInput, match=r"is not a store; wanted a zarr.json with format cauc_dist\.store"):
            Store.open(folder)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(BadInput, match=r"is not a store"):
        Store.open(tmp_path / "other.zarr")


def test_another_version_is_refused(store: Path) -> None:
    text = json.loads((store / "zarr.json").read_text())
    text["attributes"]["version"] = 2
    (store / "zarr.json").write_text(json.dumps(text))
    with pytest.raises(BadInput, match=r"format cauc_dist.store 2 \(written by .*wanted cauc_dist.store 1.*version"):
        Store.open(store)


def test_a_flipped_bit_anywhere_in_a_scan_is_an_error_that_names_it(store: Path) -> None:
    path = shard(store, 0)
    whole = path.read_bytes()
    index = np.frombuffer(whole[-4 - 16 * 32 : -4], "<u8").reshape(32, 2)
    first, length = map(int, index[7])
    for at in np.random.default_rng(0).integers(0, length * 8, 12):
        broken = bytearray(whole)
        broken[first + int(at) // 8] ^= 1 << int(at) % 8
        path.write_bytes(broken)
        opened = Store.open(store)
        with pytest.raises(BadInput, match=r"scan sub-0007 \(row 7\) of .* is damaged .*ingest the data again"):
            opened.stored(7)
        opened.stored(6)
        opened.stored(8)


def test_a_cut_shard_is_an_error(store: Path) -> None:
    shard(store, 0).write_bytes(shard(store, 0).read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"scan sub-0003 .* is damaged"):
        Store.open(store).stored(3)


def test_an_absent_shard_is_an_error_and_not_zeros(store: Path) -> None:
    shard(store, 1).unlink()
    opened = Store.open(store)
    opened.stored(31)
    with pytest.raises(BadInput, match=r"scan sub-0032 .*its chunk is not there"):
        opened.stored(32)


def test_a_row_that_is_not_valid_is_an_error(store: Path) -> None:
    valid = zarr.open_array(store / "valid", mode="r+")
    valid[4] = 0
    with pytest.raises(BadInput, match=r"scan sub-0004 .*is not there"):
        Store.open(store).stored(4)


@pytest.mark.parametrize("name", ["ids", "subjects", "valid", "checksums", "stats/std", "meta/age", "meta/empty"])
def test_small_arrays_are_checked_when_the_store_opens(store: Path, name: str) -> None:
    path = only_file(store / name)
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(BadInput, match=r"store .* is damaged .*checksum"):
        Store.open(store)
    path.unlink()
    with pytest.raises(BadInput, match=rf"is damaged .a chunk of {name} is not there"):
        Store.open(store)


def test_an_array_that_is_gone_or_short_is_an_error(store: Path) -> None:
    text = json.loads((store / "zarr.json").read_text())
    text["attributes"]["n"] = 35
    (store / "zarr.json").write_text(json.dumps(text))
    with pytest.raises(BadInput, match=r"35 scans were committed, arrays have \[34\] rows"):
        Store.open(store)
    shutil.rmtree(store / "stats/mean")
    with pytest.raises(BadInput, match=r"is damaged"):
        Store.open(store)
