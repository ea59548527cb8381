"""What an ingest or append leaves behind, or finds, when it was cut off or given something odd."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cauc_dist.errors import BadInput
from cauc_dist.store.append import add_column, append
from cauc_dist.store.ingest import from_arrays, ingest
from cauc_dist.store.layout import Column
from cauc_dist.store.planned import Settings
from cauc_dist.store.reader import Store
from cauc_dist.store.workplace import Workplace

SHAPE = (1, 6, 6, 6)


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def folder(path: Path, seeds: range, table: str = "", shape: tuple[int, ...] = SHAPE) -> Path:
    """sub-<seed>.npy, a scan each, and their participants.tsv."""
    path.mkdir()
    for seed in seeds:
        np.save(path / f"sub-{seed}.npy", volume(seed, shape))
    rows = "".join(f"sub-{seed}\t{seed}\tn/a\n" for seed in seeds)
    (path / "participants.tsv").write_text(table or f"participant_id\tage\tdiagnosis\n{rows}")
    return path


def test_a_column_without_any_value_survives_a_new_column_and_an_append(tmp_path: Path) -> None:
    store = tmp_path / "s"
    ingest(folder(tmp_path / "a", range(4)), store)
    add_column(store, "part", ["x"] * 4)
    append(folder(tmp_path / "b", range(4, 6)), store)
    opened = Store.open(store)
    assert len(opened) == 6
    assert np.isnan(opened.metadata(["diagnosis"])).all()


def test_a_column_that_had_no_value_takes_the_kind_of_the_first_ones(tmp_path: Path) -> None:
    store = tmp_path / "s"
    ingest(folder(tmp_path / "a", range(4)), store)
    table = "participant_id\tage\tdiagnosis\nsub-4\t4\tcontrol\nsub-5\t5\tpatient\n"
    append(folder(tmp_path / "b", range(4, 6), table), store)
    assert Store.open(store).column("diagnosis") == Column("diagnosis", "category", ("control", "patient"))
    assert Store.open(store).metadata(["diagnosis"])[4:, 0].tolist() == [0, 1]


def test_what_a_cut_off_write_from_memory_left_is_no_part_of_the_next_store(tmp_path: Path) -> None:
    def broken() -> object:
        yield volume(0)
        raise KeyboardInterrupt

    ids = ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        from_arrays(tmp_path / "s", broken(), ids, shape=SHAPE)  # type: ignore[arg-type]
    place = tmp_path / ".s.partial"  # as a kill would have left it
    from_arrays(tmp_path / "old", [volume(0), volume(1)], ids, shape=SHAPE)
    shutil.copytree(tmp_path / "old", place / "store")
    from_arrays(tmp_path / "s", [volume(0), volume(1)], ids, shape=SHAPE, dtype="i16")
    assert Store.open(tmp_path / "s").dtype == np.int16
    shutil.copytree(tmp_path / "old", tmp_path / ".t.partial" / "store")
    ingest(folder(tmp_path / "a", range(2)), tmp_path / "t", Settings(dtype="i16"))
    assert np.abs(Store.open(tmp_path / "t").volume(1) - volume(1)).max() < 1e-3


def test_one_id_twice_is_refused_from_memory(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"1 ids twice \(a\); wanted one scan an id"):
        from_arrays(tmp_path / "s", [volume(0), volume(1)], ["a", "a"], shape=SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_fresh_in_one_task_leaves_the_work_of_the_others(tmp_path: Path) -> None:
    source, store = folder(tmp_path / "a", range(70)), tmp_path / "s"
    settings = Settings(layout="dense")
    assert ingest(source, store, settings, task=(0, 2), fresh=True) is None
    made = ingest(source, store, settings, task=(1, 2), fresh=True)
    assert made is not None
    assert made.n == 70


def test_a_link_to_nothing_is_set_aside(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", range(3))
    (source / "sub-1.npy").unlink()
    (source / "sub-1.npy").symlink_to(tmp_path / "annex")
    summary = ingest(source, tmp_path / "s")
    assert summary is not None
    assert [name for name, _ in summary.set_aside] == ["sub-1"]


def test_two_sessions_of_one_participant_are_one_subject_also_without_sub(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.mkdir()
    for k in (1, 2):
        np.save(source / f"001_ses-{k}.npy", volume(k))
    np.save(source / "002.npy", volume(3))
    (source / "participants.tsv").write_text("participant_id\tage\n001\t30\n002\t40\n")
    ingest(source, tmp_path / "s")
    opened = Store.open(tmp_path / "s")
    assert opened.ids == ("001_ses-1", "001_ses-2", "002")
    assert opened.subjects[0] == opened.subjects[1] != opened.subjects[2]


def test_the_same_file_under_another_name_is_set_aside_by_append(tmp_path: Path) -> None:
    ingest(folder(tmp_path / "a", range(3)), tmp_path / "s")
    source = folder(tmp_path / "b", range(3, 5))
    shutil.copy(tmp_path / "a" / "sub-0.npy", source / "sub-3.npy")
    assert append(source, tmp_path / "s").set_aside == (("sub-3", "the same voxels as sub-0"),)


def test_a_scan_that_was_set_aside_can_be_added_when_it_is_mended(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", range(3))
    np.save(source / "sub-1.npy", volume(1) * np.nan)
    ingest(source, tmp_path / "s")
    assert Store.open(tmp_path / "s").ids == ("sub-0", "sub-2")
    np.save(source / "sub-1.npy", volume(1))
    append(source, tmp_path / "s")
    assert Store.open(tmp_path / "s").ids == ("sub-0", "sub-2", "sub-1")


def test_an_unfinished_append_is_in_the_way_of_a_new_column_and_a_finished_one_in_nobodys(tmp_path: Path) -> None:
    store = tmp_path / "s"
    ingest(folder(tmp_path / "a", range(3)), store)
    for rows, refused in ((3, True), (2, False)):
        with pytest.raises(RuntimeError), Workplace.open(store, (0, 1), grows=True) as place:  # noqa: PT012
            place.plan({"rows": rows}, dict, fresh=True)
            raise RuntimeError
        if refused:
            with pytest.raises(BadInput, match="has an unfinished append; wanted a store at rest"):
                add_column(store, "part", ["x"] * 3)
        else:
            append(folder(tmp_path / "b", range(3, 5)), store)
    assert len(Store.open(store)) == 5


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(BadInput, match="Function not implemented; wanted a disk with file locks"):
        ingest(folder(tmp_path / "a", range(3)), tmp_path / "s")


def test_scans_with_voxels_of_another_size_are_not_appended(tmp_path: Path) -> None:
    import nibabel as nib

    for name, side in (("a", 1.5), ("b", 1.0)):
        anat = tmp_path / name / f"sub-{name}" / "anat"
        anat.mkdir(parents=True)
        image = nib.Nifti1Image(volume(len(name) + int(side))[0], np.diag([side, side, side, 1]))
        nib.save(image, anat / f"sub-{name}_T1w.nii.gz")
        (tmp_path / name / "participants.tsv").write_text(f"participant_id\tage\nsub-{name}\t3\n")
    ingest(tmp_path / "a", tmp_path / "s")
    with pytest.raises(BadInput, match=r"voxels of 1x1x1 mm; wanted 1.5x1.5x1.5 mm, as in the store"):
        append(tmp_path / "b", tmp_path / "s")
