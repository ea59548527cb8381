"""From a source to a store: what is stored, what is set aside or refused, and that it is whole or not there at all."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cauc_dist.errors import BadInput
from cauc_dist.store.ingest import Summary, estimate, ingest
from cauc_dist.store.planned import Settings
from cauc_dist.store.reader import Store
from tests.store.cohorts import SIDES, bids, blob, by_zarr, contents, noise, scan, shard, table

HERE = Path(__file__).parents[2]
EXACT = Settings(dtype="f32", layout="dense", codec="none")


def made(source: Path, store: Path, settings: Settings | None = None, **options: Any) -> Summary:
    summary = ingest(source, store, settings, **options)
    assert summary is not None
    return summary


def volumes(store: Path) -> np.ndarray:
    """(N, *spatial) of one channel."""
    opened = Store.open(store)
    return np.stack([opened.volume(i)[0] for i in range(len(opened))])


def refused(source: Path, *words: str, settings: Settings | None = None, **options: Any) -> None:
    """Ingest refuses, says all the words, and leaves no trace beside the source."""
    store = source.parent / "deep/refused.zarr"
    with pytest.raises(BadInput) as error:
        ingest(source, store, settings, **options)
    for word in words:
        assert word in str(error.value)
    assert not store.parent.exists()


# ---- the window -----------------------------------------------------------------------------------------------


def test_scans_are_turned_to_ras(tmp_path: Path) -> None:
    stored = noise(0, (5, 6, 7))  # axes of the file: superior, left, posterior
    affine = np.array([[0, -2, 0, 0], [0, 0, -3, 0], [4, 0, 0, 0], [0, 0, 0, 1]], float)
    made(bids(tmp_path / "b", [stored], affine), tmp_path / "s.zarr", EXACT)
    store = Store.open(tmp_path / "s.zarr")
    assert store.shape == (1, 6, 7, 5)
    assert (store.attributes["voxel_mm"], store.attributes["orientation"]) == ([2, 3, 4], "RAS")
    expected = np.array([[[stored[z, 5 - x, 6 - y] for z in range(5)] for y in range(7)] for x in range(6)])
    assert np.array_equal(store.volume(0)[0], expected)


def test_the_window_is_central_cut_where_larger_and_zero_where_smaller(tmp_path: Path) -> None:
    scans = [noise(0, (9, 8, 7)), noise(1, (4, 8, 6))]
    settings = Settings(shape=(6, 5, 7), pad=True, dtype="f32")
    summary = made(bids(tmp_path / "b", scans), tmp_path / "s.zarr", settings)
    expected = np.zeros((6, 5, 7), np.float32)
    expected[1:5, :, 0:6] = scans[1][:, 1:6, :]  # 2 zeros in x: one each side; 1 in z: after
    assert np.array_equal(volumes(tmp_path / "s.zarr"), [scans[0][1:7, 1:6, :], expected])
    assert Store.open(tmp_path / "s.zarr").stats["mean"][1] == pytest.approx(expected.astype(np.float64).mean())
    assert (summary.shapes, summary.shape) == (2, (1, 6, 5, 7))
    assert "2 scans of 6x5x7 (from 2 shapes)" in str(summary)


def test_unequal_shapes_name_the_largest_common_window_and_the_median(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0, (8, 9, 7)), noise(1, (10, 6, 7)), noise(2, (8, 9, 7))])
    refused(source, "2 shapes, from 8x6x7 to 10x9x7", "wanted one shape", "Give shape 8 6 7", "median 8 9 7 with pad")
    assert made(source, tmp_path / "s.zarr", Settings(shape=(8, 6, 7))).n == 3
    assert made(source, tmp_path / "t.zarr", Settings(shape=(8, 9, 7), pad=True)).n == 3


def test_a_window_larger_than_a_scan_wants_pad(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0, (8, 9, 7)), noise(1, (10, 6, 7))])
    words = ("2 of 2 scans are smaller than 9x7x7", "Give shape 8 6 7, or ask for pad")
    refused(source, *words, settings=Settings(shape=(9, 7, 7)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(shape=(4, 0, 4)), ("shape 4x0x4", "positive numbers", "Give e.g. 96 112 96")),
        (Settings(shape=(4, 4)), ("shape 4x4 for scans of 3 axes", "a side for each axis", "Give 3 numbers")),
        (Settings(resample=(1, -1, 1)), ("resample 1x-1x1", "three lengths in mm", "Give e.g. 1.5 1.5 1.5")),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: Settings, words: tuple[str, ...]) -> None:
    refused(bids(tmp_path / "b", [noise(0)]), *words, settings=settings)


@pytest.mark.parametrize("task", [(2, 2), (-1, 2), (0, 0)])
def test_tasks_count_from_0(tmp_path: Path, task: tuple[int, int]) -> None:
    words = (f"task {task[0]}/{task[1]}", "wanted 0/n to n-1/n", "Count tasks from 0")
    refused(bids(tmp_path / "b", [noise(0)]), *words, task=task)


# ---- one space ------------------------------------------------------------------------------------------------


def test_mixed_voxel_sizes_are_refused_one_percent_is_not_and_resampling_mends_it(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0), noise(1)])
    scan(source, "sub-01", noise(1), np.diag([2.015, 2, 2, 1]))
    assert made(source, tmp_path / "s.zarr").n == 2
    scan(source, "sub-01", noise(1), np.diag([4, 2, 2, 1]))
    refused(source, "voxel sizes from 2x2x2 to 4x2x2 mm", "one voxel size within 1 %", "Ask for resample, e.g. 3 2 2")
    settings = Settings(resample=(2, 2, 2), shape=(8, 9, 7), dtype="f32", layout="dense")
    assert made(source, tmp_path / "r.zarr", settings).n == 2
    assert Store.open(tmp_path / "r.zarr").attributes["voxel_mm"] == [2, 2, 2]
    # 15 planes from 8, every second one the scan's own; the central 8 of them begin at the third.
    assert np.array_equal(volumes(tmp_path / "r.zarr")[1][1::2], noise(1).astype(np.float64)[2:6])


def test_scans_turned_against_each_other_are_refused_and_a_few_degrees_are_not(tmp_path: Path) -> None:
    def turned(degrees: float) -> np.ndarray:
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        affine = np.diag([2.0, 2, 2, 1])
        affine[:2, :2] = 2 * np.array([[c, -s], [s, c]])
        return affine

    source = bids(tmp_path / "b", [noise(0), noise(1)])
    scan(source, "sub-01", noise(1), turned(4))
    assert made(source, tmp_path / "s.zarr").n == 2
    scan(source, "sub-01", noise(1), turned(20))
    refused(source, "turned by up to 20 degrees", "wanted one space", "Register the scans to one template")


# ---- packed or dense ------------------------------------------------------------------------------------------

BOX = (10, 4, 4)


def extra(i: int, planes: int) -> np.ndarray:
    return blob(i, BOX, planes / 10)


@pytest.mark.parametrize(("planes", "form"), [(7, "packed"), (8, "dense")])
def test_packed_is_chosen_where_the_scans_together_use_at_most_70_percent(
    tmp_path: Path, planes: int, form: str
) -> None:
    source = bids(tmp_path / "b", [extra(0, 3), extra(1, planes), extra(2, 5)])
    summary = made(source, tmp_path / "s.zarr")
    assert summary.layout == form
    assert summary.coverage == (0.7 if form == "packed" else 1)
    assert ("70% of the voxels kept" in str(summary)) == (form == "packed")


def test_every_scan_has_its_say_in_the_choice_and_not_only_the_sample(tmp_path: Path) -> None:
    scans = [extra(i, 8 if i == 1 else 6) for i in range(40)]  # 16 of 40 are looked at first: 0, 2 or 3, 5, ...
    assert made(bids(tmp_path / "b", scans), tmp_path / "s.zarr").layout == "dense"


def test_the_mask_is_the_union_of_all_usable_scans_and_the_values_are_theirs(tmp_path: Path) -> None:
    scans = [extra(i, 5) for i in range(40)]
    scans[1][9, 3, 2] = 7  # of one scan alone, that no sample sees
    scans[3][:] = np.nan  # not usable: has no say
    scans[4][:] = 3  # nor has this one
    summary = made(bids(tmp_path / "b", scans), tmp_path / "s.zarr", Settings(dtype="f32"))
    assert summary.layout == "packed"
    assert [name for name, _ in summary.set_aside] == ["sub-03", "sub-04"]
    usable = [x for i, x in enumerate(scans) if i not in (3, 4)]
    mask = Store.open(tmp_path / "s.zarr").mask
    assert mask is not None
    assert np.array_equal(mask[0], np.any([x != 0 for x in usable], axis=0))
    assert np.array_equal(volumes(tmp_path / "s.zarr"), usable)


def test_codec_none_goes_with_packed_and_lz4_with_dense(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [extra(i, 5) for i in range(3)])
    for layout, codecs in (("packed", []), ("dense", ["blosc"])):
        made(source, tmp_path / f"{layout}.zarr", Settings(layout=layout))  # type: ignore[arg-type]
        told = json.loads((tmp_path / f"{layout}.zarr/volumes/zarr.json").read_text())
        names = [codec["name"] for codec in told["codecs"][0]["configuration"]["codecs"]]
        assert names == ["bytes", *codecs, "crc32c"]


def test_layout_and_dtype_of_images_and_tables_are_dense_and_f32(tmp_path: Path) -> None:
    table(tmp_path / "i", "participant_id\tage\na\t1\nb\t2\n")
    for i, name in enumerate("ab"):
        np.save(tmp_path / f"i/{name}.npy", noise(i, (3, 8, 8)))
    refused(tmp_path / "i", "layout packed for images or tables", "wanted volumes", settings=Settings(layout="packed"))
    made(tmp_path / "i", tmp_path / "i.zarr")
    assert Store.open(tmp_path / "i.zarr").shape == (3, 8, 8)
    assert json.loads((tmp_path / "i.zarr/volumes/zarr.json").read_text())["dimension_names"] == [
        "scan",
        "channel",
        "y",
        "x",
    ]
    table(tmp_path / "t", "participant_id\tage\na\t1\nb\t2\n")
    for i, name in enumerate("ab"):
        np.save(tmp_path / f"t/{name}.npy", noise(i, (5,)))
    refused(tmp_path / "t", "dtype f16 for tables", "wanted f32", "to auto", settings=Settings(dtype="f16"))
    refused(tmp_path / "t", "shape 5 for scans of 0 axes", "Leave the shape out", settings=Settings(shape=(5,)))
    made(tmp_path / "t", tmp_path / "t.zarr")
    assert np.array_equal(by_zarr(tmp_path / "t.zarr", "volumes"), [noise(0, (5,)), noise(1, (5,))])


# ---- what is set aside ----------------------------------------------------------------------------------------


def spoiled(value: float) -> np.ndarray:
    volume = noise(1).astype(np.float64)
    volume[3, 4, 5] = value
    return volume


BAD_VOXELS: list[tuple[Callable[[], np.ndarray], str]] = [
    (lambda: spoiled(np.nan), "1 voxels are NaN or infinite"),
    (lambda: spoiled(-np.inf), "1 voxels are NaN or infinite"),
    (lambda: np.full(SIDES, 3, np.int16), "constant (3 everywhere)"),
    (lambda: 1e6 + noise(1).astype(np.float64) / 1e3, "its values differ too little for f16"),
    (lambda: np.stack([noise(1), noise(2)], -1), "4-D (8x9x7x2), not one volume"),
    (lambda: noise(0), "the same voxels as sub-00"),
]


def test_what_cannot_be_trained_on_is_set_aside_with_its_reason_and_the_rest_is_kept(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0), *(volume() for volume, _ in BAD_VOXELS), noise(9)])
    (source / "sub-07/anat/sub-07_T1w.nii.gz").write_bytes(b"not a scan")
    scan(source, "sub-08", noise(8))
    scan(source, "sub-10", noise(10))
    with (source / "participants.tsv").open("a") as rows:
        rows.write("sub-08\t50\tM\nsub-09\t51\tF\n")
    summary = made(source, tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr")
    reasons = dict(summary.set_aside)
    for i, (_, words) in enumerate(BAD_VOXELS, start=1):
        assert words in reasons[f"sub-{i:02d}"]
    assert "unreadable" in reasons["sub-07"]
    assert set(reasons) == {*(f"sub-{i:02d}" for i in range(1, 8)), "sub-09", "sub-10"}
    assert store.ids == ("sub-00", "sub-08")
    assert store.metadata(["age"])[:, 0].tolist() == [20, 50]
    assert store.set_aside == summary.set_aside
    # Those whose header tells enough have no row; the others have one that nobody sees.
    assert by_zarr(tmp_path / "s.zarr", "valid").tolist() == [1, 2, 2, 2, 2, 2, 1]


def test_scans_of_other_channels_than_most_are_set_aside(tmp_path: Path) -> None:
    table(tmp_path / "i", "participant_id\tage\n" + "".join(f"{name}\t1\n" for name in "abcd"))
    for i, name in enumerate("abcd"):
        np.save(tmp_path / f"i/{name}.npy", noise(i, (2 if name == "b" else 1, *SIDES)))
    summary = made(tmp_path / "i", tmp_path / "s.zarr")
    assert summary.set_aside == (("b", "2 channels and 3 axes; most scans have 1 and 3"),)
    assert Store.open(tmp_path / "s.zarr").ids == ("a", "c", "d")


def test_rows_of_a_table_may_be_equal(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("participant_id,a,b\nx,1,2\ny,1,2\nz,3,4\n")
    (tmp_path / "p.csv").write_text("participant_id,age\nx,30\ny,40\nz,50\n")
    summary = made(tmp_path / "f.csv", tmp_path / "s.zarr", table=tmp_path / "p.csv")
    assert (summary.n, summary.set_aside) == (3, ())
    assert np.array_equal(by_zarr(tmp_path / "s.zarr", "volumes"), [[1, 2], [1, 2], [3, 4]])


def test_nothing_usable_is_refused_with_the_reasons(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [np.full(SIDES, np.nan, np.float32), np.ones(SIDES, np.float32)])
    words = ("no scan can be used", "sub-00: 504 voxels are NaN or infinite; sub-01: constant (1 everywhere)", "Mend")
    refused(source, *words)
    for path in source.rglob("*.nii.gz"):
        path.write_bytes(b"nothing")
    refused(source, "no scan can be used", "sub-00: unreadable")


def test_a_long_list_of_set_aside_is_cut_in_the_summary_only(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0)])
    table(source, "participant_id\tage\nsub-00\t1\n" + "".join(f"sub-x{i}\t1\n" for i in range(9)))
    summary = made(source, tmp_path / "s.zarr")
    assert "set aside: 4 more, all on the page of `cauc store info --out`" in str(summary)
    assert len(summary.set_aside) == len(Store.open(tmp_path / "s.zarr").set_aside) == 9


# ---- the same bytes whoever does the work ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 scans to be packed after a survey: 3 parts of it, 3 shards."""
    return bids(tmp_path_factory.mktemp("many") / "b", [extra(i, 5) for i in range(70)])


@pytest.fixture(scope="module")
def alone(many: Path) -> dict[str, bytes]:
    """The store that one undisturbed process makes of them."""
    done: list[tuple[str, int, int]] = []
    made(many, many.parent / "alone.zarr", workers=1, progress=lambda *now: done.append(now))
    parts = [(32, 70), (64, 70), (70, 70)]
    assert done == [("survey", *part) for part in parts] + [("write", *part) for part in parts]
    files = contents(many.parent / "alone.zarr")
    assert len([name for name in files if name.startswith("volumes/c/")]) == 3
    assert Store.open(many.parent / "alone.zarr").layout == "packed"
    return files


START = """
import os, signal, sys, time
from pathlib import Path
from cauc_dist.store.ingest import ingest
if __name__ == "__main__":
    source, store = Path(sys.argv[1]), Path(sys.argv[2])
"""


def start(code: str, *words: object) -> subprocess.Popen[str]:
    """A process of its own that knows `source` and `store`; its output is not kept unless it fails."""
    lines = START + "".join(f"    {line}\n" for line in code.splitlines())
    command = [sys.executable, "-c", lines, *map(str, words)]
    return subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    errors = process.communicate(timeout=100)[1]
    return process.returncode, errors


KILL = "def kill(what, done, n):\n    if what == '{}' and done >= {}: os.kill(os.getpid(), 9)\n"


def test_bytes_do_not_depend_on_the_number_of_workers(many: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    made(many, tmp_path / "s.zarr", workers=3)
    assert contents(tmp_path / "s.zarr") == alone


def test_tasks_in_any_order_one_of_them_killed_make_the_same_bytes(
    many: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"

    def task(i: int, progress: str = "None") -> subprocess.Popen[str]:
        call = f"ingest(source, store, workers=1, task=({i}, 3), wait_minutes=1, progress={progress})"
        return start(f"{KILL.format('survey', 32)}sys.exit(0 if {call} is None else 7)", many, store)

    killed = task(1, "kill")
    others = [task(2), task(0)]  # they wait for the survey of the first
    assert ended(killed)[0] == -signal.SIGKILL
    assert not store.exists()
    # The last one to finish, and no other, has made the store.
    assert sorted(ended(process) for process in [*others, task(1)]) == [(0, ""), (0, ""), (7, "")]
    assert contents(store) == alone
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_a_task_that_waits_in_vain_for_the_survey_says_so_and_keeps_its_work(
    many: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    with pytest.raises(BadInput, match=r"2 of 3 parts of the survey are not done; wanted .*0.001 minutes. Start the"):
        ingest(many, store, task=(0, 3), wait_minutes=0.001)
    for i in (2, 1):
        with pytest.raises(BadInput, match=r"survey") if i == 2 else contextlib.nullcontext():
            assert ingest(many, store, task=(i, 3), wait_minutes=0.001) is None
    assert not store.exists()
    assert ingest(many, store, task=(0, 3)) is None
    summary = ingest(many, store, task=(2, 3))  # the last one
    assert summary is not None
    assert summary.n == 70
    assert contents(store) == alone


@pytest.mark.parametrize(("what", "scans"), [("survey", 64), ("write", 32), ("write", 70)])
def test_killed_half_way_nothing_is_there_and_the_next_run_ends_with_the_same_bytes(
    many: Path, alone: dict[str, bytes], tmp_path: Path, what: str, scans: int
) -> None:
    store, partial = tmp_path / "s.zarr", tmp_path / ".s.zarr.partial"
    code = KILL.format(what, scans) + "ingest(source, store, workers=1, progress=kill)"
    assert ended(start(code, many, store))[0] == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".s.zarr.partial"]
    with pytest.raises(BadInput, match=r"is not a store"):
        Store.open(partial)
    done: list[tuple[str, int, int]] = []
    made(many, store, workers=1, progress=lambda *now: done.append(now))
    # What was done before is not done again.
    parts = [(what, scans, 70) for what in ("survey", "write") for scans in (32, 64, 70)]
    assert done == parts[parts.index((what, scans, 70)) + 1 :]
    assert contents(store) == alone
    assert not partial.exists()


def test_a_shard_that_lost_bytes_in_a_crash_is_written_again(
    many: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    store, partial = tmp_path / "s.zarr", tmp_path / ".s.zarr.partial"
    code = KILL.format("write", 64) + "ingest(source, store, workers=1, progress=kill)"
    assert ended(start(code, many, store))[0] == -signal.SIGKILL
    (first, second) = (shard(partial / "store", k) for k in (0, 1))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    made(many, store, workers=1)
    assert contents(store) == alone


def test_other_settings_or_data_over_unfinished_work_are_refused_unless_fresh(
    many: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(many, store, Settings(dtype="i16"), workers=1, progress=stop)
    with pytest.raises(BadInput, match=r"holds an unfinished ingest of other data or settings.*the same.*--fresh"):
        ingest(many, store)
    made(many, store, workers=1, fresh=True)
    assert contents(store) == alone


def test_a_scan_changed_between_two_runs_is_other_data(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(i) for i in range(3)]), tmp_path / "s.zarr"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source, store, EXACT, progress=stop)
    scan(source, "sub-01", noise(7))
    with pytest.raises(BadInput, match=r"other data or settings"):
        ingest(source, store, EXACT)
    made(source, store, EXACT, fresh=True)
    assert np.array_equal(volumes(store), [noise(0), noise(7), noise(2)])


def test_interrupted_before_the_plan_nothing_stays(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0), noise(1, (9, 9, 9))])
    refused(source, "2 shapes")  # asserts that not even the folder above is left
    (tmp_path / "deep").mkdir()
    with pytest.raises(BadInput):
        ingest(source, tmp_path / "deep/s.zarr")
    assert list((tmp_path / "deep").iterdir()) == []  # which was there before, and stays


# ---- one at a time, and never over what is there --------------------------------------------------------------


def test_a_second_writer_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(i) for i in range(3)]), tmp_path / "s.zarr"
    seen: list[str] = []

    def second(*_: object) -> None:
        for task in ((0, 1), (1, 2)):
            with pytest.raises(BadInput, match=r"another ingest is writing .*one at a time. Wait for it") as error:
                ingest(source, store, EXACT, task=task)
            seen.append(str(error.value))

    made(source, store, EXACT, progress=second)
    assert len(seen) == 2
    assert np.array_equal(volumes(store), [noise(i) for i in range(3)])


def test_the_same_task_twice_at_once_is_refused(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(i) for i in range(3)]), tmp_path / "s.zarr"
    seen: list[object] = []

    def second(*_: object) -> None:
        with pytest.raises(BadInput, match=r"another ingest is writing"):
            ingest(source, store, EXACT, task=(0, 2))
        seen.append(ingest(source, store, EXACT, task=(1, 2)))  # the other one may; it finds all done, and commits

    assert ingest(source, store, EXACT, task=(0, 2), progress=second) is None
    assert isinstance(seen[0], Summary)
    assert np.array_equal(volumes(store), [noise(i) for i in range(3)])


def test_a_lock_that_its_owner_has_removed_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = bids(tmp_path / "b", [noise(0), noise(1)]), tmp_path / "s.zarr"
    real, partial = fcntl.flock, tmp_path / ".s.zarr.partial"

    def finished_and_begun_by_a_third(handle: int, how: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(partial)
        partial.mkdir()
        (partial / "lock").touch()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", finished_and_begun_by_a_third)
    with pytest.raises(BadInput, match=r"another ingest is writing"):
        ingest(source, store)
    assert made(source, store).n == 2


def test_a_store_is_never_overwritten(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(0), noise(1)]), tmp_path / "s.zarr"
    made(source, store)
    before = contents(store)
    with pytest.raises(BadInput, match=r"exists already; wanted a new path. Name another store"):
        ingest(source, store, fresh=True)
    assert contents(store) == before


def test_what_appears_at_the_store_s_name_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(0), noise(1)]), tmp_path / "s.zarr"

    def meanwhile(*_: object) -> None:
        store.mkdir(exist_ok=True)

    with pytest.raises(BadInput, match=r"exists already"):
        ingest(source, store, progress=meanwhile)
    assert not list(store.iterdir())
    store.rmdir()
    assert made(source, store).n == 2  # the work was kept


def test_a_full_disk_is_told_in_words_and_the_work_goes_on_afterwards(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(i) for i in range(40)]), tmp_path / "s.zarr"

    def full(what: str, *_: int) -> None:
        if what == "write":
            raise OSError(errno.ENOSPC, "No space left on device")

    settings = Settings(layout="dense", dtype="f32")
    with pytest.raises(BadInput, match=r"the disk of .* is full \(\d+ MB free\); wanted more room. Free some space"):
        ingest(source, store, settings, workers=1, progress=full)
    done: list[int] = []
    made(source, store, settings, workers=1, progress=lambda _, now, __: done.append(now))
    assert done == [40]
    assert np.array_equal(volumes(store), [noise(i) for i in range(40)])


# ---- estimate -------------------------------------------------------------------------------------------------


def test_an_estimate_writes_nothing_and_is_right_about_form_shards_and_bytes(
    many: Path, alone: dict[str, bytes]
) -> None:
    before = contents(many.parent)
    told = estimate(many)
    assert contents(many.parent) == before
    store = Store.open(many.parent / "alone.zarr")
    assert (told.kind, told.n, told.subjects, told.shape) == ("BIDS", 70, 70, store.shape)
    assert told.form == "packed f16, codec none"
    assert told.shards == 3
    row = 4 * 4 * 5 * 2
    assert told.bytes_out == 70 * row
    stored = sum(len(data) for name, data in alone.items() if name.startswith("volumes/c/"))
    assert stored == 70 * (row + 4) + 3 * (32 * 16 + 4)  # a crc a row, an index a shard
    assert told.columns == ("age (number)", "sex (category)")
    assert told.seconds > 0
    assert told.workers == 1
    assert estimate(many, Settings(layout="dense", dtype="i16"), workers=7).form == "dense i16, codec lz4"
    assert estimate(many, workers=7).workers == 7
    text = str(told)
    for words in ("BIDS", "70 scans of 70 subjects", "packed f16", "in 3 shards", "age (number), sex (category)"):
        assert words in text


def test_an_estimate_refuses_what_the_ingest_would(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0, (8, 9, 7)), noise(1, (10, 6, 7))])
    with pytest.raises(BadInput, match=r"2 shapes"):
        estimate(source)
    told = estimate(source, Settings(shape=(8, 6, 7)))
    assert told.bytes_out == 2 * 8 * 6 * 7 * 2


# ---- metadata and provenance ----------------------------------------------------------------------------------


def test_any_column_name_comes_back_and_none_leaves_meta(tmp_path: Path) -> None:
    names = ["..", "a/b", "zarr.json", "__x", "Age (years)", "höhe", "."]
    source = bids(tmp_path / "b", [noise(0), noise(1)])
    cells = "\t".join(map(str, range(len(names))))
    table(source, "\t".join(["participant_id", *names]) + f"\nsub-00\t{cells}\nsub-01\t{cells}\n")
    made(source, tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr")
    assert [column.name for column in store.columns] == names
    assert store.metadata(names).tolist() == [list(range(len(names)))] * 2
    folders = [p for p in (tmp_path / "s.zarr/meta").iterdir() if p.is_dir()]
    assert len(folders) == len(names)


def test_a_table_for_people_holds_every_usable_scan(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0), np.ones(SIDES, np.float32), noise(2)])
    text = "participant_id\tage\tsite\tn\nsub-00\t20.5\tb\t1\nsub-01\t1\ta\t2\nsub-02\tn/a\tn/a\t3\n"
    table(source, text)
    made(source, tmp_path / "s.zarr")
    written = (tmp_path / "s.zarr/participants.tsv").read_text()
    assert written == (
        "scan_id\tparticipant_id\tage\tsite\tn\nsub-00\tsub-00\t20.5\tb\t1\nsub-02\tsub-02\tn/a\tn/a\t3\n"
    )


def test_fingerprint_follows_scans_and_settings_and_neither_place_nor_metadata(tmp_path: Path) -> None:
    def of(name: str, scans: list[np.ndarray], text: str = "", settings: Settings | None = None) -> str:
        source = bids(tmp_path / name, scans)
        if text:
            table(source, text)
        made(source, tmp_path / f"{name}.zarr", settings)
        return Store.open(tmp_path / f"{name}.zarr").fingerprint

    two = [noise(0), noise(1)]
    first = of("a", two)
    assert len(first) == 64
    assert of("b", two) == first
    assert of("c", two, "participant_id\tage\nsub-00\t99\nsub-01\t9\n") == first
    assert of("d", [*two, np.ones(SIDES, np.float32)]) == first  # what is set aside is not there
    others = [
        of("e", two[::-1]),
        of("f", two[:1]),
        of("g", two, settings=Settings(dtype="f32")),
        of("h", two, settings=Settings(shape=(8, 8, 7))),
        of("i", two, settings=Settings(layout="packed")),
    ]
    assert len({first, *others}) == 6


@pytest.mark.skipif(not os.environ.get("CAUC_DATA"), reason="real scans: set CAUC_DATA to their folder")
@pytest.mark.parametrize("dtype", ["f16", "i16"])
def test_real_scans_of_236_shapes_beyond_what_f16_holds_keep_their_values(tmp_path: Path, dtype: Any) -> None:
    source, window = Path(os.environ["CAUC_DATA"]) / "hippocampus260", (31, 40, 24)
    summary = made(source, tmp_path / "s.zarr", Settings(shape=window, dtype=dtype))
    assert (summary.n, summary.shapes) == (260, 236)
    store = Store.open(tmp_path / "s.zarr")
    worst = 0.0
    for i in [*range(0, 260, 20), int(store.stats["max"].argmax())]:
        image: Any = nib.load(source / store.subjects[i] / f"anat/{store.subjects[i]}_T1w.nii.gz")  # RAS already
        first = [(side - wanted) // 2 for side, wanted in zip(image.shape, window, strict=True)]
        truth = np.asarray(image.dataobj, np.float64)[
            tuple(slice(f, f + w) for f, w in zip(first, window, strict=True))
        ]
        error = np.abs(store.volume(i)[0] - truth).max() / np.ptp(truth)
        assert error <= (2**-11 if dtype == "f16" else 0.51 / 65534)
        worst = max(worst, error)
        assert store.stats["max"][i, 0] == truth.max()
    assert worst <= summary.error.max_of_range
    assert store.stats["max"].max() > 65504
    assert summary.error.psnr_db is not None
    assert summary.error.psnr_db > (70 if dtype == "f16" else 95)
