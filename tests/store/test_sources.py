"""Which scans a source has, under which names, with which metadata; what is set aside, what is refused."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cauc_dist.errors import BadInput
from cauc_dist.store.sources import Cohort, Header, Item, checksum, cifar, header, open_cohort, read

ROW = "participant_id\tage\n"


def touch(folder: Path, *names: str) -> Path:
    """Empty files: nothing here reads a voxel."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def bids(folder: Path, text: str, *names: str) -> Path:
    write(folder / "participants.tsv", text)
    return touch(folder, *names)


def plain(folder: Path, n: int, text: str = "") -> Path:
    """sub-0, sub-1, ... aged 20, 21, ..."""
    rows = "".join(f"sub-{i}\t{20 + i}\n" for i in range(n))
    return bids(folder, text or ROW + rows, *(f"sub-{i}/anat/sub-{i}_T1w.nii.gz" for i in range(n)))


def ids(cohort: Cohort) -> list[str]:
    return [item.id for item in cohort.items]


def column(cohort: Cohort, name: str) -> list[float | str | None]:
    """The column as a person would write it: numbers, names of categories, None where missing."""
    k = [c.name for c in cohort.columns].index(name)
    levels = cohort.columns[k].levels
    return [None if np.isnan(v) else levels[int(v)] if levels else float(v) for v in cohort.values[k]]


def refused(words: tuple[str, ...], source: Path, **settings: Any) -> None:
    with pytest.raises(BadInput) as error:
        open_cohort(source, **settings)
    for word in words:
        assert word in str(error.value)


# ---- BIDS -----------------------------------------------------------------------------------------------------


def test_every_session_run_and_datatype_is_a_scan_of_its_subject(tmp_path: Path) -> None:
    names = [
        "sub-02/anat/sub-02_T1w.nii",
        "sub-01/ses-b/anat/sub-01_ses-b_run-2_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-1_T1w.nii.gz",
        "sub-01/ses-a/other type/sub-01_ses-a_acq-mp%rage_T1w.npy",
        "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.json",
        "derivatives/x/sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/.cache/sub-01_run-9_T1w.nii.gz",
    ]
    source = bids(tmp_path / "a b", ROW + "sub-01\t30\nsub-02\t40\n", *names)
    cohort = open_cohort(source)
    expected = ["sub-01_ses-a_acq-mp%rage", "sub-01_ses-b_run-1", "sub-01_ses-b_run-2", "sub-02"]
    assert ids(cohort) == expected
    assert [item.subject for item in cohort.items] == ["sub-01", "sub-01", "sub-01", "sub-02"]
    assert cohort.items[0].paths == (source / names[3],)
    assert column(cohort, "age") == [30, 30, 30, 40]
    assert (cohort.kind, cohort.set_aside) == ("BIDS", ())
    assert cohort.tables == (source / "participants.tsv",)
    assert all(pickle.loads(pickle.dumps(item)) == item for item in cohort.items)


def test_provenance_tells_the_dataset_its_tables_and_the_space_of_the_names(tmp_path: Path) -> None:
    name = "sub-1/anat/sub-1_space-MNI_desc-preproc_T1w.nii.gz"
    source = bids(tmp_path / "b", ROW + "1\t3\n", name)
    write(source / "dataset_description.json", json.dumps({"Name": "Öne", "License": "CC0"}))
    cohort = open_cohort(source, suffix=("space-MNI_desc-preproc_T1w",))
    assert ids(cohort) == ["sub-1"]
    told = json.loads(json.dumps(cohort.described))
    assert told["tables_sha256"].keys() == {"participants.tsv"}
    assert len(told.pop("tables_sha256")["participants.tsv"]) == 64
    assert told == {
        "kind": "BIDS",
        "folder": str(source),
        "name": "Öne",
        "license": "CC0",
        "endings": ["space-MNI_desc-preproc_T1w"],
        "space": "MNI",
    }
    write(source / "dataset_description.json", "[no json")
    assert open_cohort(source).described["name"] is None


def test_several_suffixes_are_channels_and_a_scan_that_lacks_one_is_set_aside(tmp_path: Path) -> None:
    names = [f"sub-{i}/anat/sub-{i}_{s}" for i in (1, 2) for s in ("T2w.nii", "T1w.nii.gz")]
    source = bids(tmp_path / "b", ROW + "1\t3\n2\t4\n3\t5\n", *names, "sub-3/anat/sub-3_T1w.nii")
    cohort = open_cohort(source, suffix=("T1w", "T2w"))
    assert ids(cohort) == ["sub-1", "sub-2"]
    assert [path.name for path in cohort.items[1].paths] == ["sub-2_T1w.nii.gz", "sub-2_T2w.nii"]
    assert cohort.set_aside == (("sub-3", "no T2w"),)


def test_two_files_of_one_scan_are_set_aside_and_not_guessed_between(tmp_path: Path) -> None:
    source = plain(tmp_path / "b", 3)
    (source / "sub-2/anat/sub-2_T1w.nii.gz").unlink()
    touch(source, "sub-1/anat/sub-1_T1w.nii", *(f"sub-2/ses-1/{x}/sub-2_ses-1_T1w.nii.gz" for x in "ab"))
    cohort = open_cohort(source)
    assert ids(cohort) == ["sub-0"]
    assert cohort.set_aside == (  # and their rows are not called rows without a scan
        ("sub-1", "2 files of one scan: sub-1_T1w.nii, sub-1_T1w.nii.gz"),
        ("sub-2_ses-1", "2 files of one scan: sub-2_ses-1_T1w.nii.gz, sub-2_ses-1_T1w.nii.gz"),
    )


def test_a_scan_without_a_row_and_a_row_without_a_scan_are_set_aside(tmp_path: Path) -> None:
    source = plain(tmp_path / "b", 3, ROW + "sub-0\t20\nsub-9\t30\nsub-2\t40\n")
    cohort = open_cohort(source)
    assert ids(cohort) == ["sub-0", "sub-2"]
    assert column(cohort, "age") == [20, 40]
    assert cohort.set_aside == (("sub-1", "no row in participants.tsv"), ("sub-9", "no scan"))


def test_derivatives_that_hold_a_brain_twice_are_refused_until_one_is_named(tmp_path: Path) -> None:
    names = ["sub-1/anat/sub-1_desc-preproc_T1w.nii.gz", "sub-1/anat/sub-1_space-MNI_desc-preproc_T1w.nii.gz"]
    source = bids(tmp_path / "b", ROW + "1\t3\n", *names)
    refused(("scans that differ in space-", "sub-1_desc-preproc", "one space", "suffix space-MNI_T1w"), source)
    one = open_cohort(source, suffix=("space-MNI_desc-preproc_T1w",))
    assert one.items[0].paths == (source / names[1],)


def test_an_array_beside_the_subjects_does_not_make_bids_a_folder_of_arrays(tmp_path: Path) -> None:
    source = touch(plain(tmp_path / "b", 2), "mask.npy")
    assert (open_cohort(source).kind, ids(open_cohort(source))) == ("BIDS", ["sub-0", "sub-1"])


def test_links_are_followed_once(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", ROW + "1\t3\n")
    touch(tmp_path / "elsewhere", "anat/sub-1_T1w.nii.gz")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    (source / "sub-1").mkdir()
    (source / "sub-1/linked").symlink_to(tmp_path / "elsewhere")
    (source / "sub-2").mkdir()
    (source / "sub-2/sub-2_T1w.nii").symlink_to(tmp_path / "not fetched")
    cohort = open_cohort(source)
    assert ids(cohort) == ["sub-1"]
    assert cohort.set_aside == (("sub-2", "no row in participants.tsv"),)  # the link is a scan; reading says more


# ---- sessions -------------------------------------------------------------------------------------------------

TWO = [f"sub-{s}/ses-{i}/anat/sub-{s}_ses-{i}_T1w.nii.gz" for s in "AB" for i in "12"]


def test_a_sessions_table_of_the_subject_replaces_the_participants_entries(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", "participant_id\tage\tsex\nA\t50\tF\nB\t60\tM\n", *TWO)
    write(source / "sub-A/sub-A_sessions.tsv", "session_id\tage\tscore\nses-1\t50.5\t7\nses-2\tn/a\t8\n")
    cohort = open_cohort(source)
    assert column(cohort, "age") == [50.5, None, 60, 60]  # unknown at session 2, and not 50
    assert column(cohort, "score") == [7, 8, None, None]
    assert column(cohort, "sex") == ["F", "F", "M", "M"]
    assert cohort.counted == {"age": {"n/a": 1}, "score": {"n/a": 2}}


def test_a_sessions_table_of_the_folder_is_read_by_participant_and_session(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", ROW + "A\t50\nB\t60\n", *TWO)
    rows = "sub-B\tses-2\t63\nA\t02\t52\nA\t1\t51\n"
    write(source / "sessions.tsv", "participant_id\tsession_id\tage\n" + rows)
    write(source / "sub-A/sub-A_sessions.tsv", "session_id\tscore\n2\t8\n")
    cohort = open_cohort(source)
    assert column(cohort, "age") == [51, 52, 60, 63]
    assert column(cohort, "score") == [None, 8, None, None]
    assert cohort.tables == (source / "participants.tsv", source / "sessions.tsv")
    write(source / "sessions.tsv", "participant_id\tage\nA\t51\n")
    refused(("sessions.tsv has columns participant_id, age", "a column session_id", "Name the column"), source)


def test_a_participants_table_may_have_a_row_a_session(tmp_path: Path) -> None:
    rows = "A\t1\t50\nA\t2\t52\nB\tses-1\t60\nC\t1\t70\nD\t1\t80\nD\t2\t81\n"
    source = bids(
        tmp_path / "b",
        "participant_id\tsession\tage\n" + rows,
        *TWO,
        "sub-C/anat/sub-C_T1w.nii",
        "sub-D/anat/sub-D_T1w.nii",
    )
    cohort = open_cohort(source)
    assert ids(cohort) == ["sub-A_ses-1", "sub-A_ses-2", "sub-B_ses-1", "sub-C"]
    assert column(cohort, "age") == [50, 52, 60, 70]
    assert cohort.set_aside == (
        ("sub-B_ses-2", "no row for session 2 in participants.tsv"),
        ("sub-D", "2 rows in participants.tsv, and no session in the scan's name"),
        ("sub-D_ses-1", "no scan"),
        ("sub-D_ses-2", "no scan"),
    )


def test_a_session_that_only_the_folder_names_is_in_the_id(tmp_path: Path) -> None:
    names = [f"sub-A/ses-{i}/anat/sub-A_run-1_T1w.nii.gz" for i in "12"]
    source = bids(tmp_path / "b", "participant_id\tsession_id\tage\nA\t1\t50\nA\t2\t52\n", *names)
    cohort = open_cohort(source)
    assert ids(cohort) == ["sub-A_ses-1_run-1", "sub-A_ses-2_run-1"]
    assert column(cohort, "age") == [50, 52]


def test_a_repeated_session_or_participant_is_refused_by_name(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", ROW + "A\t50\nsub-A\t60\n", *TWO)
    refused(("repeats sub-A", "one row a participant.", "Keep one of them"), source)
    write(source / "participants.tsv", "participant_id\tsession\nA\t1\nB\t1\nA\tses-1\n")
    refused(("repeats sub-A_ses-1", "one row a participant and session"), source)
    write(source / "participants.tsv", ROW + "A\t50\nB\t60\n")
    write(source / "sub-A/sub-A_sessions.tsv", "session_id\tage\n1\t50\nses-1\t51\n")
    refused(("sub-A_sessions.tsv repeats a session", "one row a session", "Keep one"), source)


# ---- names and rows -------------------------------------------------------------------------------------------


def test_names_match_exactly_or_else_as_the_only_such_number(tmp_path: Path) -> None:
    names = [f"sub-{s}/anat/sub-{s}_T1w.nii" for s in ("007", "08", "8", "0012", "x1")]
    source = bids(tmp_path / "b", ROW + "7\t7\n08\t8\nsub-12\t12\n012\t13\nX1\t14\n", *names)
    cohort = open_cohort(source)
    assert dict(zip(ids(cohort), column(cohort, "age"), strict=True)) == {"sub-007": 7, "sub-08": 8}
    assert [name for name, reason in cohort.set_aside if reason == "no row in participants.tsv"] == [
        "sub-0012",  # 12 or 012?
        "sub-8",
        "sub-x1",
    ]
    assert {name for name, reason in cohort.set_aside if reason == "no scan"} == {"sub-12", "sub-012", "sub-X1"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("participants.tsv", '\ufeffparticipant_id\tsite "x"\r\n01\t"B, c\r\n\r\n02\tA\r\n'),
        ("participants.csv", '\ufeffparticipant_id,site "x"\n01,"""B, c"\n02,A\n'),
        ("participants.csv", 'participant_id;site "x"\n01;"""B, c"\n02;A\n'),
        ("participants.csv", 'participant_id\tsite "x"\r01\t"B, c\r02\tA'),
    ],
)
def test_tables_of_tabs_commas_or_semicolons_and_any_line_ends_are_read(tmp_path: Path, name: str, text: str) -> None:
    source = touch(tmp_path / "b", "sub-01/anat/sub-01_T1w.nii", "sub-02/anat/sub-02_T1w.nii")
    (source / name).write_bytes(text.encode())
    assert column(open_cohort(source), 'site "x"') == ['"B, c', "A"]


def test_a_named_table_replaces_the_folder_s(tmp_path: Path) -> None:
    source = plain(tmp_path / "b", 2)
    cohort = open_cohort(source, table=write(tmp_path / "t.csv", "participant_id,age\n0,90\n1,91\n"))
    assert column(cohort, "age") == [90, 91]
    assert cohort.tables == (tmp_path / "t.csv",)


BROKEN = [
    ("age\n20\n", ("has columns 'age'", "a column participant_id", "separate columns by tabs")),
    ("participant_id\tage\tage\nsub-0\t1\t2\n", ("participant_id, age, age", "a different name for each", "Rename")),
    (ROW + "sub-0\t1\t2\n", ("line 2 has 3 fields", "wanted 2", "n/a where unknown")),
    (ROW + "\n", ("has no rows", "a row a participant", "Check the table")),
    (ROW + "sub-0\t20\nsub-1\t30,5x\nsub-2\tn/a\n", ("column age", "but for 1 (sub-1: '30,5x')", "Correct these")),
    (ROW + "sub-0\t20,5\nsub-1\t30,5\n", ("column age has decimal commas (sub-0: '20,5', sub-1", "Rewrite them")),
    (ROW + "sub-x\t1\n", ("not one scan with a row", "sub-0: no row in participants.tsv; ", "names on both sides")),
]


@pytest.mark.parametrize(("text", "words"), BROKEN)
def test_a_broken_table_is_refused(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    refused(words, plain(tmp_path / "b", 3, text))


def test_a_missing_folder_table_scan_or_encoding_is_refused(tmp_path: Path) -> None:
    refused(("no folder", "a folder or table of scans", "Check the path"), tmp_path / "nowhere")
    source = touch(tmp_path / "b", "sub-0/anat/sub-0_bold.nii")
    refused(("no participants.tsv in", "a table of participants", "write the table"), source)
    refused(("no table", "a .tsv or .csv file"), source, table=tmp_path / "t.tsv")
    (source / "participants.tsv").write_bytes(b"participant_id\tn\xe4me\n")
    refused(("can't decode", "a UTF-8 text", "Save the table as UTF-8"), source)
    write(source / "participants.tsv", ROW + "0\t1\n")
    refused(("no scan in", "sub-*_T1w.nii[.gz] or .npy", "suffixes found: bold"), source)
    (source / "sub-0/anat/sub-0_bold.nii").unlink()
    refused(("no scan in", "Check the folder"), source)
    refused(("t.txt is a file", "a folder of scans", "a .csv or .tsv table"), touch(tmp_path, "t.txt") / "t.txt")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"suffix": ()}, ("suffix ''", "one or more, all different", "Name e.g. T1w")),
        ({"suffix": ("T1w", "T1w")}, ("suffix 'T1w T1w'",)),
        ({"missing": ("age",)}, ("missing 'age'", "column=code", "*=-9999 for all")),
        ({"missing": ("agge=0",)}, ("no column agge", "a column for each rule", "Did you mean age?")),
        ({"ranges": ("age=20",)}, ("range 'age=20'", "column=low:high", "age=0:")),
        ({"ranges": ("age=9:2",)}, ("range 'age=9:2'",)),
        ({"ranges": ("age=a:2",)}, ("range 'age=a:2'",)),
        ({"ranges": ("age=1:2", "age=1:3")}, ("two ranges of age", "one a column")),
        ({"ranges": ("sex=1:2",)}, ("column sex holds categories (F, M)", "Leave the range out")),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(words, plain(tmp_path / "b", 2, "participant_id\tage\tsex\n0\t1\tF\n1\t2\tM\n"), **settings)


# ---- what is missing ------------------------------------------------------------------------------------------


def test_missing_codes_and_ranges_become_missing_and_are_counted(tmp_path: Path) -> None:
    rows = ["0\t0.0\t-9999\tF", "1\t1850\t60\tunknown", "2\t100\tNaN\tM", "3\t230\t70\t", "4\tn/a\t71\t-9999"]
    source = plain(tmp_path / "b", 5, "participant_id\theight\tweight\tsex\n" + "\n".join(rows))
    missing = ("height=0", "*=-9999", "sex=unknown")
    cohort = open_cohort(source, missing=missing, ranges=("height=100:230", "weight=:70"))
    assert column(cohort, "height") == [None, None, 100, 230, None]
    assert column(cohort, "weight") == [None, 60, None, 70, None]
    assert column(cohort, "sex") == ["F", None, "M", None, None]
    assert cohort.counted == {
        "height": {"code 0": 1, "n/a": 1, "outside 100:230": 1},
        "weight": {"code -9999": 1, "n/a": 1, "outside :70": 1},
        "sex": {"code unknown": 1, "n/a": 1, "code -9999": 1},
    }


def test_few_numbers_among_texts_make_a_category_and_few_texts_among_numbers_none(tmp_path: Path) -> None:
    source = plain(tmp_path / "b", 4, "participant_id\tscanner\n0\tTrio\n1\t7\n2\tSkyra\n3\tn/a\n")
    assert column(open_cohort(source), "scanner") == ["Trio", "7", "Skyra", None]
    write(source / "participants.tsv", "participant_id\tscore\n0\t1_0\n1\t7\n2\t8\n3\t9\n")
    refused(("column score of the table is numbers but for 1 (sub-0: '1_0')",), source)
    cohort = open_cohort(source, missing=("score=1_0",))
    assert column(cohort, "score") == [None, 7, 8, 9]


# ---- OpenBHB --------------------------------------------------------------------------------------------------

PEOPLE = "participant_id\tsex\tage\tsiteXacq\tsplit\n"
SPLITS = {"100": ("train", "train"), "200": ("val", "internal_test"), "300": ("val", "external_test")}


def openbhb(folder: Path, *names: str) -> Path:
    """As published: integers for ids, <train|val>/derivatives/sub-<id>/ses-1/; arrays have a batch axis in front."""
    rows = "".join(f"{i}\tfemale\t{int(i) / 10}\t{k}\t{s}\n" for k, (i, (_, s)) in enumerate(SPLITS.items()))
    write(folder / "participants.tsv", PEOPLE + rows)
    for i, (part, _) in SPLITS.items():
        for name in names:
            touch(folder, f"{part}/derivatives/sub-{i}/ses-1/sub-{i}_preproc-{name}.npy")
    return folder


def test_openbhb_is_read_as_downloaded_by_its_short_names(tmp_path: Path) -> None:
    source = openbhb(tmp_path / "b", "cat12vbm_desc-gm_T1w", "quasiraw_T1w", "cat12vbm_desc-gm_ROI")
    for name, ending in (("vbm", "cat12vbm_desc-gm_T1w"), ("quasiraw", "quasiraw_T1w")):
        cohort = open_cohort(source, suffix=(name,))
        assert (cohort.kind, cohort.described["space"]) == ("OpenBHB", "MNI152")
        assert ids(cohort) == ["sub-100_ses-1", "sub-200_ses-1", "sub-300_ses-1"]
        assert [item.subject for item in cohort.items] == ["sub-100", "sub-200", "sub-300"]
        assert [item.paths[0].name for item in cohort.items] == [f"sub-{i}_preproc-{ending}.npy" for i in SPLITS]
        assert column(cohort, "split") == ["train", "internal_test", "external_test"]
        assert column(cohort, "siteXacq") == [0, 1, 2]
    np.save(open_cohort(source, suffix=("vbm",)).items[0].paths[0], np.ones((1, 1, 4, 5, 6), np.float32))
    assert header(open_cohort(source, suffix=("vbm",)).items[0]) == Header((1, 4, 5, 6))
    np.save(open_cohort(source, suffix=("vbm_roi",)).items[0].paths[0], np.ones((1, 1, 284)))
    assert read(open_cohort(source, suffix=("vbm_roi",)).items[0]).shape == (284,)
    refused(("vbm and quasiraw in", "one kind of scan", "Name one as suffix: desikan_roi,"), source)
    assert ids(open_cohort(openbhb(tmp_path / "c", "quasiraw_T1w"))) == [
        "sub-100_ses-1",
        "sub-200_ses-1",
        "sub-300_ses-1",
    ]
    write(tmp_path / "c/participants.tsv", ROW + "100\t1\n200\t2\n")  # a table of one's own
    assert ids(open_cohort(tmp_path / "c", suffix=("quasiraw",))) == ["sub-100_ses-1", "sub-200_ses-1"]
    refused(("neither vbm nor quasiraw in",), openbhb(tmp_path / "d", "freesurfer_desc-xhemi_T1w"))


def test_openbhb_s_tables_of_regions_are_joined_over_its_splits(tmp_path: Path) -> None:
    source = openbhb(tmp_path / "b")
    folder = "derivatives/freesurfer_roi/desikan_roi_features.csv"
    write(source / "train" / folder, "participant_id,session,a,b\n100,1,1.5,2\n")
    write(source / "val" / folder, "participant_id,session,a,b\n200,1,3,4\n300,1,5,6\n400,1,7,8\n")
    cohort = open_cohort(source, suffix=("fs_desikan_roi",))
    assert ids(cohort) == ["sub-100_ses-1", "sub-200_ses-1", "sub-300_ses-1"]
    assert np.array_equal([read(item) for item in cohort.items], [[1.5, 2], [3, 4], [5, 6]])
    assert column(cohort, "split") == ["train", "internal_test", "external_test"]
    assert cohort.set_aside == (("sub-400_ses-1", "no row in participants.tsv"),)
    refused(
        ("2 feature sets (desikan_roi, vbm_roi)", "one", "Name one of them"), source, suffix=("desikan_roi", "vbm_roi")
    )


# ---- <id>.npy -------------------------------------------------------------------------------------------------


def test_a_folder_of_arrays_takes_its_rows_by_name_or_by_subject(tmp_path: Path) -> None:
    names = ["p 1%.npy", "scan-7_x.npy", "sub-3_ses-1.npy", "sub-3_ses-2.npy", "007.npy", "alone.npy"]
    source = touch(tmp_path / "b", *names)
    write(source / "participants.csv", "participant_id,age\np 1%,1\nscan-7_x,2\n3,3\n7,4\nnobody,5\n")
    cohort = open_cohort(source)
    assert cohort.kind == "npy"
    assert ids(cohort) == ["007", "p 1%", "scan-7_x", "sub-3_ses-1", "sub-3_ses-2"]
    assert [item.subject for item in cohort.items] == ["007", "p 1%", "scan-7_x", "sub-3", "sub-3"]
    assert column(cohort, "age") == [4, 1, 2, 3, 3]
    assert cohort.set_aside == (("alone", "no row in participants.csv"), ("nobody", "no scan"))
    refused(("suffix for a folder of .npy files", "no use there", "Leave it out"), source, suffix=("T2w",))


# ---- tables of features ---------------------------------------------------------------------------------------


def test_a_table_of_features_is_joined_with_its_participants(tmp_path: Path) -> None:
    write(tmp_path / "participants.tsv", ROW + "sub-01\t30\n02\t40\n3\t50\n4\t60\n")
    rois = write(tmp_path / "my rois.csv", "b,participant_id,a\r\n1,2,0.1\r\n3,001,1e3\r\nn/a,3,2\r\n5,9,x\r\n")
    for source, settings in ((rois, {}), (tmp_path, {"features": rois})):
        cohort = open_cohort(source, **settings)
        assert (cohort.kind, ids(cohort)) == ("table", ["sub-001", "sub-2"])
        assert cohort.items[1] == Item("sub-2", "sub-2", (rois,), 0)
        assert header(cohort.items[0]) == Header((2,))
        assert [read(item).tolist() for item in cohort.items] == [[3, 1000], [1, 0.1]]
        assert column(cohort, "age") == [30, 40]
        assert cohort.described["features"] == ["b", "a"]
        assert cohort.set_aside == (
            ("sub-3", "no number in b"),
            ("sub-9", "no row in participants.tsv"),
            ("sub-4", "no row of features"),
        )


def test_the_checksum_of_a_row_is_of_its_own_bytes(tmp_path: Path) -> None:
    write(tmp_path / "participants.csv", "participant_id,age\n1,2\n3,4\n")
    rois = write(tmp_path / "rois.csv", "participant_id,a\n1,2.50\n3, 4\n")
    first, second = open_cohort(rois).items
    assert checksum(first) == hashlib.sha256(b"1,2.50").digest()
    assert checksum(second) == hashlib.sha256(b"3, 4").digest()
    write(rois, "participant_id,a\n1,7\n3,4\n10,5\n")
    assert (read(first).tolist(), checksum(first)) == ([7], hashlib.sha256(b"1,7").digest())  # not from the cache


def test_parts_are_put_together_and_become_the_column_split(tmp_path: Path) -> None:
    for part, i in (("train", 1), ("validation", 2)):
        write(tmp_path / f"{part}_participants.csv", "participant_id,age\n1,10\n2,20\n")
        write(tmp_path / f"{part}_rois.csv", f"participant_id,a\n{i},{i}.5\n")
    cohort = open_cohort(tmp_path)
    assert [read(item).tolist() for item in cohort.items] == [[1.5], [2.5]]
    assert column(cohort, "split") == ["train", "validation"]
    assert column(cohort, "age") == [10, 20]
    assert cohort.set_aside == ()
    assert [path.name for path in cohort.tables] == [
        "train_participants.csv",
        "validation_participants.csv",
        "train_rois.csv",
        "validation_rois.csv",
    ]
    people = write(tmp_path / "all.tsv", "participant_id\tsplit\n1\told\n2\tnew\n3\tnew\n")
    both = open_cohort(tmp_path, table=people)
    assert column(both, "split") == ["old", "new"]
    assert both.set_aside == (("sub-3", "no row of features"),)


def test_feature_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rois = write(tmp_path / "train_rois.csv", "participant_id,a\n1,2\n")
    refused(("train_rois.csv without train_participants.csv", "a table of participants", "Add it"), tmp_path)
    write(tmp_path / "train_participants.csv", "participant_id,age\n1,2\n2,3\n")
    refused(("suffix for a table of features", "Leave it out"), tmp_path, suffix=("T2w",))
    write(tmp_path / "test_participants.csv", "participant_id,age\n1,2\n2,3\n")
    write(tmp_path / "test_rois.csv", "participant_id,b\n2,2\n")
    refused(("differ in columns", "one set of features", "the same columns in the same order"), tmp_path)
    write(tmp_path / "test_rois.csv", "participant_id,a\n2,2\n1,3\n")
    refused(("train_rois.csv repeats sub-1", "one row of features a scan", "Keep one"), tmp_path)
    write(rois, "participant_id,session\n1,2\n")
    refused(("has no features", "columns beside the participant's"), rois, table=tmp_path / "test_participants.csv")


# ---- CIFAR-100 ------------------------------------------------------------------------------------------------


def test_a_cifar_file_that_is_not_the_official_one_is_refused_before_it_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Command:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    hostile = pickle.dumps(Command())
    touch(tmp_path / "c", "train", "test.xz")
    (tmp_path / "c/meta").write_bytes(hostile)
    refused(("meta has md5", "7973b15100ade9c7d40fb424638fde48, the official", "Fetch it again"), tmp_path / "c")
    monkeypatch.setattr(cifar.hashlib, "md5", lambda *_, **__: Digest())
    refused(("a pickle that asks for posix.system", "only arrays", "Do not trust"), tmp_path / "c")
    assert not (tmp_path / "ran").exists()


class Digest:
    """As if the md5 had been forged."""

    def hexdigest(self) -> str:
        return "7973b15100ade9c7d40fb424638fde48"


def test_a_cut_xz_file_and_settings_without_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"test\.xz: .*wanted a whole \.xz file.*Fetch it again"):
        read(Item("test-00001", "test-00001", (write(tmp_path / "test.xz", "\0"),), 0))
    source = touch(tmp_path / "c", "train", "test", "meta")
    settings = {"table": tmp_path, "suffix": ("T2w",), "missing": ("fine=1",), "ranges": ("fine=1:2",)}
    refused(("suffix and table and missing and ranges for CIFAR-100", "no use there"), source, **settings)


# ---- real data ------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("CAUC_DATA", ""))


def real(test: Callable[[], None]) -> Callable[[], None]:
    there = pytest.mark.skipif("CAUC_DATA" not in os.environ, reason="CAUC_DATA does not name the real data")
    return pytest.mark.real(there(test))


@real
def test_the_official_cifar_100_comes_with_its_labels_and_pixels() -> None:
    cohort = open_cohort(DATA / "cifar-100-python")
    assert len(cohort.items) == 60000
    assert ids(cohort) == sorted(ids(cohort))
    assert [(c.name, len(c.levels)) for c in cohort.columns] == [("fine", 100), ("coarse", 20), ("split", 2)]
    assert [ids(cohort)[i] for i in (0, 9999, 10000, 59999)] == [
        "test-00001",
        "test-10000",
        "train-00001",
        "train-50000",
    ]
    # The first training image is a cow before a white sky.
    assert [column(cohort, name)[10000] for name in ("fine", "coarse", "split")] == [
        "cattle",
        "large_omnivores_and_herbivores",
        "train",
    ]
    fine = np.array(cohort.values[0])
    assert (np.bincount(fine[:10000].astype(int)) == 100).all()
    assert (np.bincount(fine[10000:].astype(int)) == 500).all()
    first = read(cohort.items[10000])
    assert (first.shape, first.dtype, header(cohort.items[0]).shape) == ((3, 32, 32), np.uint8, (3, 32, 32))
    assert first[:, 0, 0].tolist() == [255, 255, 255]
    assert first[:, 31, 31].tolist() == [138, 173, 79]  # red, green, blue of grass


@real
def test_hippocampus_scans_equal_what_nibabel_reads() -> None:
    cohort = open_cohort(DATA / "hippocampus260")
    assert (len(cohort.items), cohort.set_aside) == (260, ())
    assert len({header(item).shape for item in cohort.items}) == 236
    for item in cohort.items[::20]:
        image = nib.load(item.paths[0])  # RAS already
        assert np.array_equal(read(item)[0], np.asarray(image.dataobj))


@real
def test_ixi_regions_have_21_heights_and_20_weights_of_zero() -> None:
    cohort = open_cohort(DATA / "ixi_roi", missing=("height=0", "weight=0"), ranges=("height=100:230",))
    split = column(cohort, "split")
    assert (split.count("train"), split.count("validation")) == (357, 90)
    assert cohort.counted["height"]["code 0"] == 21
    assert cohort.counted["weight"] == {"code 0": 20}
    assert header(cohort.items[0]).shape == (288,)
    lines = (DATA / "ixi_roi/train_rois.csv").read_text().splitlines()
    row = next(line.split(",") for line in lines if line.startswith("651,"))
    assert read(cohort.items[ids(cohort).index("sub-651")]).tolist() == [float(cell) for cell in row[1:]]
    assert column(cohort, "age")[ids(cohort).index("sub-651")] == 50.3956194387406
