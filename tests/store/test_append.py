"""A store that grows is at any moment the old one or the new one, whole."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cauc_dist.errors import BadInput
from cauc_dist.store.append import add_column, append, split_store
from cauc_dist.store.ingest import ingest
from cauc_dist.store.planned import Settings
from cauc_dist.store.reader import Store
from tests.store.cohorts import bids, blob, by_tensorstore, by_zarr, contents, noise, scan, table

HERE = Path(__file__).parents[2]
OLD, NEW = 40, 35  # shards of 32 rows: 32 + 8, then, from row 64 on, 32 + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """first/ (sub-00 to 39), its packed store old.zarr, more/ (sub-40 to 74) with one more column and site."""
    folder = tmp_path_factory.mktemp("append")
    bids(folder / "first", [blob(i) for i in range(OLD)])
    bids(folder / "more", [blob(i) for i in range(OLD, OLD + NEW)], first=OLD)
    rows = "".join(f"sub-{i:02d}\t{20 + i}\t{'AB'[i % 2]}\n" for i in range(OLD))
    table(folder / "first", f"participant_id\tage\tsite\n{rows}")
    rows = "".join(f"sub-{i:02d}\t{'0AB'[i % 3]}\t{i}\n" for i in range(OLD, OLD + NEW))
    table(folder / "more", f"participant_id\tsite\theight\n{rows}")
    ingest(folder / "first", folder / "old.zarr", Settings(layout="packed"))
    return folder


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "old.zarr", tmp_path / "s.zarr"))


@pytest.fixture(scope="module")
def grown(folder: Path) -> Path:
    """What one undisturbed append makes of old.zarr."""
    path = Path(shutil.copytree(folder / "old.zarr", folder / "grown.zarr"))
    append(folder / "more", path)
    return path


def volumes(store: Store) -> np.ndarray:
    return np.stack([store.volume(i)[0] for i in range(len(store))])


def as_f16(i: int) -> np.ndarray:
    """blob(i) as the store has it: scaled by a power of two to at most 2048, rounded, scaled back."""
    x = blob(i).astype(np.float64)
    scale = next(2.0**k for k in range(-40, 40) if 1024 < x.max() / 2.0**k <= 2048)
    return (x / scale).astype(np.float16).astype(np.float64) * scale


# ---- what a grown store holds ---------------------------------------------------------------------------------


def test_the_grown_store_holds_the_old_scans_and_then_the_new(grown: Path) -> None:
    store = Store.open(grown)
    assert store.ids == tuple(f"sub-{i:02d}" for i in range(OLD + NEW))
    assert np.array_equal(volumes(store), [as_f16(i) for i in range(OLD + NEW)])
    assert store.stats["max"][:, 0].tolist() == [float(blob(i).max()) for i in range(OLD + NEW)]
    assert store.attributes["n"] == 64 + NEW
    assert len(store.attributes["sources"]) == 2
    valid = by_zarr(grown, "valid")
    assert valid.tolist() == [1] * OLD + [0] * (64 - OLD) + [1] * NEW
    for read in (by_zarr, by_tensorstore):  # other readers see the holes as NaN
        rows = read(grown, "volumes")
        assert rows.shape[0] == 64 + NEW
        assert np.array_equal(np.isnan(rows).all(axis=1), valid == 0)
    table = (grown / "participants.tsv").read_text().splitlines()
    assert len(table) == 1 + OLD + NEW


def test_columns_of_one_side_are_missing_on_the_other_and_levels_keep_their_codes(grown: Path) -> None:
    store = Store.open(grown)
    names = [column.name for column in store.columns]
    assert names == ["age", "site", "height"]
    assert store.column("site").levels == ("A", "B", "0")  # the old codes stay, though 0 sorts first
    age, site, height = store.metadata(names).T
    nothing = np.full(max(OLD, NEW), np.nan)
    np.testing.assert_array_equal(age, [*range(20, 20 + OLD), *nothing[:NEW]])
    np.testing.assert_array_equal(height, [*nothing[:OLD], *range(OLD, OLD + NEW)])
    levels = store.column("site").levels
    expected = ["AB"[i % 2] for i in range(OLD)] + ["0AB"[i % 3] for i in range(OLD, OLD + NEW)]
    assert [levels[int(code)] for code in site] == expected


def test_readers_see_the_store_as_it_was_when_they_opened_it(folder: Path, store: Path) -> None:
    before = Store.open(store)
    append(folder / "more", store)
    after = Store.open(store)
    assert (len(before), len(after)) == (OLD, OLD + NEW)
    assert np.array_equal(volumes(before), volumes(after)[:OLD])
    assert before.fingerprint == Store.open(folder / "old.zarr").fingerprint
    assert before.fingerprint != after.fingerprint
    assert np.array_equal(after.keys[:OLD], before.keys)


def test_scans_that_are_there_already_are_set_aside(folder: Path, store: Path, tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [blob(i) for i in (100, 101, 102)], first=38)
    summary = append(source, store)
    assert summary.set_aside == (("sub-38", "already in s.zarr"), ("sub-39", "already in s.zarr"))
    opened = Store.open(store)
    assert opened.ids[-2:] == ("sub-39", "sub-40")
    assert np.array_equal(opened.volume(39)[0], as_f16(39))
    assert np.array_equal(opened.volume(40)[0], as_f16(102))
    before = contents(store)
    with pytest.raises(BadInput, match=r"all 3 scans are in .* already; wanted new ones"):
        append(source, store)
    assert contents(store) == before


def test_a_scan_outside_the_mask_or_with_old_voxels_is_set_aside(store: Path, tmp_path: Path) -> None:
    outside = blob(50)
    outside[7, 0, :3] = 5
    summary = append(bids(tmp_path / "b", [outside, blob(51)], first=50), store)
    assert summary.set_aside == (("sub-50", "3 voxels outside the store's mask are not 0"),)
    assert Store.open(store).set_aside == summary.set_aside
    assert np.array_equal(Store.open(store).volume(OLD)[0], as_f16(51))


def test_a_store_grows_again_and_again(store: Path, tmp_path: Path) -> None:
    for k in range(3):
        append(bids(tmp_path / f"b{k}", [blob(50 + k), blob(60 + k)], first=50 + 2 * k), store)
    opened = Store.open(store)
    assert np.array_equal(volumes(opened)[OLD:], [as_f16(i) for i in (50, 60, 51, 61, 52, 62)])
    assert by_zarr(store, "ids").shape[0] == 64 + 32 + 32 + 2


# ---- what is refused, leaving all as it was -------------------------------------------------------------------


def unchanged(store: Path, source: Path, words: str) -> None:
    """Refused with these words; store and neighbours as they were, and the next good append is not in its way."""
    before = contents(store)
    with pytest.raises(BadInput, match=words):
        append(source, store)
    assert contents(store) == before
    assert not list(store.parent.glob(".*"))


def test_scans_of_another_shape_are_refused(store: Path, tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [blob(50, (8, 9, 6))], first=50)
    unchanged(store, source, r"scans of 1x8x9x6; wanted 1x8x9x7, as in the store.")
    two = tmp_path / "two"
    for name in "ab":
        two.mkdir(exist_ok=True)
        np.save(two / f"{name}.npy", np.stack([blob(50), blob(ord(name))]))
    table(two, "participant_id\tage\na\t1\nb\t2\n")
    unchanged(store, two, r"scans of 2x8x9x7; wanted 1x8x9x7, as in the store. Ingest them into a store of their own")


def test_a_column_that_changes_its_kind_is_refused(store: Path, tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [blob(50), blob(51)], first=50)
    table(source, "participant_id\tage\nsub-50\told\nsub-51\tyoung\n")
    unchanged(store, source, r"column age of category values; wanted number values, as in the store. Mend the table")


def test_names_longer_than_the_store_holds_are_refused(store: Path, tmp_path: Path) -> None:
    name = "sub-" + "x" * 80
    scan(tmp_path / "b", name, blob(50))
    table(tmp_path / "b", f"participant_id\tage\n{name}\t5\n")
    unchanged(store, tmp_path / "b", r"names of more than 64 bytes; wanted no longer ones. Ingest into a new store")


def test_nothing_usable_is_refused(store: Path, tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [np.ones((8, 9, 7), np.float32)], first=50)
    with pytest.raises(BadInput, match=r"no scan can be used \(sub-50: .*\); wanted one at least"):
        append(source, store)
    assert len(Store.open(store)) == OLD
    assert np.array_equal(Store.open(store).volume(0)[0], as_f16(0))
    assert append(bids(tmp_path / "c", [blob(50)], first=50), store).n == 1


def test_there_must_be_a_store(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no store at .*nowhere"):
        append(folder / "more", tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_refused(folder: Path, store: Path) -> None:
    seen = []

    def second(*_: object) -> None:
        for write in (lambda: append(folder / "more", store), lambda: add_column(store, "x", ["a"] * OLD)):
            with pytest.raises(BadInput, match=r"another ingest is writing .*s.zarr"):
                write()
            seen.append(1)

    append(folder / "more", store, workers=1, progress=second)
    assert len(seen) == 4
    assert len(Store.open(store)) == OLD + NEW


# ---- one more column ------------------------------------------------------------------------------------------


def test_a_column_is_added_for_usable_scans_and_seen_when_the_store_is_opened_again(
    grown: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(grown, tmp_path / "s.zarr"))
    before = Store.open(store)
    labels = [name[-1] for name in before.ids]
    add_column(store, "last", labels)
    after = Store.open(store)
    column = after.column("last")
    assert column.kind == "category"
    assert [column.levels[int(code)] for code in after.metadata(["last"])[:, 0]] == labels
    assert np.isnan(by_zarr(store, column.array)[OLD:64]).all()  # the holes
    names = ["age", "site", "height"]
    np.testing.assert_array_equal(after.metadata(names), before.metadata(names))
    assert after.fingerprint == before.fingerprint  # a run that began before may go on
    assert [line.split("\t")[-1] for line in (store / "participants.tsv").read_text().splitlines()] == ["last", *labels]
    with pytest.raises(BadInput, match=r"has a column last; wanted a new one. Choose another name"):
        add_column(store, "last", labels)
    assert not list(tmp_path.glob(".*"))


def test_split_deals_subjects_by_shares_within_each_stratum(tmp_path: Path) -> None:
    """40 subjects of 2 scans each, half of each sex."""
    source = tmp_path / "b"
    for i in range(40):
        for k in (1, 2):
            scan(source, f"sub-{i:02d}/ses-{k}", noise(2 * i + k, (4, 4, 4)), name=f"sub-{i:02d}_ses-{k}_T1w.nii.gz")
    rows = "".join(f"sub-{i:02d}\t{'MF'[i % 2]}\t{20 + i if i else 'n/a'}\n" for i in range(40))
    table(source, f"participant_id\tsex\tage\n{rows}")
    store = tmp_path / "s.zarr"
    ingest(source, store)
    told = split_store(store, "part", {"train": 0.8, "test": 0.2}, ["sex"], seed=1)
    assert told == {"train": (32, 64), "test": (8, 16)}
    opened = Store.open(store)
    part, sex = opened.metadata(["part", "sex"]).T
    parts = dict[str, set[float]]()
    for subject, p in zip(opened.subjects, part, strict=True):
        parts.setdefault(subject, set()).add(p)
    assert all(len(p) == 1 for p in parts.values())
    test = opened.column("part").levels.index("test")
    assert [int(((part == test) & (sex == s)).sum()) for s in (0, 1)] == [8, 8]
    split_store(store, "again", {"train": 0.8, "test": 0.2}, ["sex"], seed=1)
    split_store(store, "other", {"train": 0.8, "test": 0.2}, ["sex"], seed=2)
    again, other = Store.open(store).metadata(["again", "other"]).T
    assert np.array_equal(again, part)
    assert not np.array_equal(other, part)
    split_store(store, "by age", {"train": 0.5, "test": 0.5}, ["age"], seed=1)
    opened = Store.open(store)
    age, half = opened.metadata(["age", "by age"]).T
    old = age > np.nanmedian(age)
    assert abs(int(half[old].sum()) - old.sum() / 2) <= 4  # of 40 scans; each fifth may be one subject off
    with pytest.raises(BadInput, match=r"no column 'aeg'.*Did you mean age"):
        split_store(store, "x", {"train": 0.5, "test": 0.5}, ["aeg"], seed=1)


# ---- killed anywhere ------------------------------------------------------------------------------------------

# Every change of the store is a rename; before or after the k-th, the process ends. Forked from one that has imported
# all and has no threads yet: to import takes longer than to append.
CODE = """
import os, shutil, sys
from pathlib import Path
from cauc_dist.store.append import add_column, append
source, old, into, what, step = *map(Path, sys.argv[1:4]), sys.argv[4], int(sys.argv[5])
def counted(name, done, k, after):
    real = getattr(os, name)
    def count(*args, **kwargs):
        done[0] += 1
        mine = done[0] == k
        if mine and not after:
            os._exit(9)
        result = real(*args, **kwargs)
        if mine:
            os._exit(9)
        return result
    setattr(os, name, count)
def work(store, k, after):
    shutil.copytree(old, store)
    if not (child := os.fork()):
        done = [0]
        counted("replace", done, k, after)  # pathlib goes through os
        counted("rename", done, k, after)
        append(source, store, workers=1) if what == "append" else add_column(store, "part", ["a", "b"] * 20)
        Path(into, "steps").write_text(str(done[0]))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert work(into / "whole.zarr", 0, False) == 0
steps = int(Path(into, "steps").read_text())
kills = [(k, k % 2) for k in range(1, steps - 1, step)] + [(steps, 0), (steps, 1)]  # the last one is the commit
for k, after in kills:
    assert work(into / f"{k:04d}{after}.zarr", k, after) == 9
"""


def seen(store: Path) -> tuple[Any, ...]:
    opened = Store.open(store)
    names = [column.name for column in opened.columns]
    return opened.ids, names, opened.metadata(names).tobytes(), volumes(opened).tobytes(), opened.fingerprint


@pytest.mark.parametrize(("what", "step"), [("append", 3), ("column", 3)])
def test_killed_anywhere_the_store_is_the_old_one_and_the_same_command_completes(
    folder: Path, tmp_path: Path, what: str, step: int
) -> None:
    source, start = folder / "more", folder / "old.zarr"
    command = [sys.executable, "-c", CODE, *map(str, (source, start, tmp_path, what, step))]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    *killed, whole = sorted(tmp_path.glob("*.zarr"))
    old, new = seen(start), seen(whole)
    states = [seen(store) for store in killed]
    assert states == [old] * (len(killed) - 1) + [new]  # old until the commit, new from then on
    assert len(killed) > 6
    for store, state in zip(killed, states, strict=True):
        if state == old:
            append(source, store, workers=1) if what == "append" else add_column(store, "part", ["a", "b"] * 20)
        assert seen(store) == new
        assert contents(store) == contents(whole)
