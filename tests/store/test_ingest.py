import gzip
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tensorstore
import zarr

from cauc_dist.errors import BadInput
from cauc_dist.store.ingest import ingest
from cauc_dist.store.reader import Store

HERE = Path(__file__).parents[2]


def noise(i: int, shape: tuple[int, ...] = (8, 9, 7)) -> np.ndarray:
    return np.random.default_rng(i).normal(100, 30, shape).astype(np.float32)


def scan(folder: Path, subject: str, volume: np.ndarray, affine: Any = None, name: str = "{}_T1w.nii.gz") -> Path:
    path = folder / subject / "anat" / name.format(subject)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, np.diag([2, 2, 2, 1]) if affine is None else affine), path)
    return path


def table(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "participants.tsv").write_text(text)


def bids(folder: Path, volumes: list[np.ndarray], affine: Any = None) -> Path:
    """sub-0, sub-1, ... with age 20, 21, ... and sex M F M F."""
    for i, volume in enumerate(volumes):
        scan(folder, f"sub-{i}", volume, affine)
    rows = "".join(f"sub-{i}\t{20 + i}\t{'MF'[i % 2]}\n" for i in range(len(volumes)))
    table(folder, f"participant_id\tage\tsex\n{rows}")
    return folder


def refused(source: Path, *words: str, **settings: Any) -> None:
    """Ingest refuses, says all the words, and leaves no trace beside the source."""
    store = source.parent / "refused.zarr"
    with pytest.raises(BadInput) as error:
        ingest(source, store, **settings)
    for word in words:
        assert word in str(error.value)
    assert not store.exists()
    assert not list(store.parent.glob(".refused*"))


# ---- what is stored -------------------------------------------------------------------------------------------


def test_stored_values_read_the_same_in_zarr_python_and_tensorstore(tmp_path: Path) -> None:
    volumes = [noise(i) for i in range(5)]
    ingest(bids(tmp_path / "b", volumes), tmp_path / "s.zarr")
    ours = Store.open(tmp_path / "s.zarr")
    plain = zarr.open_array(tmp_path / "s.zarr/volumes", mode="r")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "s.zarr/volumes")}}
    other = tensorstore.open(spec, read=True).result()
    for i, volume in enumerate(volumes):
        peak = float(np.abs(volume).max())
        scale = next(2.0**k for k in range(-40, 40) if 1024 < peak / 2.0**k <= 2048)
        expected = (volume.astype(np.float64) / scale).astype(np.float16)
        assert ours.affine(i) == (scale, 0.0)
        for read in (ours.stored(i)[0], plain[i, 0], other[i, 0].read().result()):
            assert read.dtype == np.float16
            assert np.array_equal(read, expected)


def test_names_statistics_and_columns_are_plain_arrays_for_any_reader(tmp_path: Path) -> None:
    volumes = [noise(i) for i in range(3)]
    volumes[1][2:4] = 0
    source = bids(tmp_path / "b", volumes)
    table(source, "participant_id\tage\tsex\nsub-0\t20.5\tM\nsub-1\tn/a\tF\nsub-2\t\tM\n")
    ingest(source, tmp_path / "s.zarr")

    def read(name: str) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "s.zarr" / name)}}
        return tensorstore.open(spec, read=True).result().read().result()

    assert [bytes(row).rstrip(b"\0") for row in read("ids")] == [b"sub-0", b"sub-1", b"sub-2"]
    assert np.array_equal(read("subjects"), read("ids"))
    assert (read("valid") == 1).all()
    np.testing.assert_array_equal(read("meta/age"), [20.5, np.nan, np.nan])
    np.testing.assert_array_equal(read("meta/sex"), [1, 0, 1])
    assert json.loads((tmp_path / "s.zarr/meta/sex/zarr.json").read_text())["attributes"]["levels"] == ["F", "M"]
    for i, volume in enumerate(volumes):
        voxels = [float(v) for v in volume.ravel()]
        mean = math.fsum(voxels) / len(voxels)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in voxels) / len(voxels))
        expected = {"mean": mean, "std": std, "min": min(voxels), "max": max(voxels), "nonzero": sum(map(bool, voxels))}
        for name, value in expected.items():
            assert read(f"stats/{name}")[i] == pytest.approx(value, rel=1e-12)
        file = source / f"sub-{i}/anat/sub-{i}_T1w.nii.gz"
        assert bytes(read("checksums")[i]) == hashlib.sha256(file.read_bytes()).digest()
    assert (tmp_path / "s.zarr/participants.tsv").read_bytes() == (source / "participants.tsv").read_bytes()


def test_f16_keeps_integers_to_2048_and_survives_1_7_million(tmp_path: Path) -> None:
    small = np.arange(2049, dtype=np.int16)[: 16 * 128].reshape(16, 16, 8) + np.int16(1)
    large = np.linspace(0, 1.7e6, small.size, dtype=np.float32).reshape(small.shape)
    summary = ingest(bids(tmp_path / "b", [small, large]), tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr")
    assert np.array_equal(store.stored(0)[0].astype(np.int64), small)
    assert store.affine(0) == (1.0, 0.0)
    back = store.stored(1)[0].astype(np.float64) * store.affine(1)[0]
    error = np.abs(back - large)
    assert summary.error.max_abs == error.max()
    assert summary.error.worst == "sub-1"
    assert summary.error.psnr_db == pytest.approx(10 * math.log10(1.7e6**2 / np.mean(error**2)), abs=1e-9)
    assert summary.error.psnr_db > 70
    assert "dB (sub-1)" in str(summary)


def test_f32_is_exact(tmp_path: Path) -> None:
    volume = noise(0) * np.float32(1e5)
    summary = ingest(bids(tmp_path / "b", [volume, noise(1)]), tmp_path / "s.zarr", dtype="f32")
    store = Store.open(tmp_path / "s.zarr")
    assert store.stored(0).dtype == np.float32
    assert np.array_equal(store.stored(0)[0], volume)
    assert store.affine(0) == (1.0, 0.0)
    assert summary.error.psnr_db is None
    assert summary.error.max_abs == 0
    assert "exactly" in str(summary)


def test_scans_are_turned_to_ras(tmp_path: Path) -> None:
    stored = noise(0, (5, 6, 7))  # axes of the file: superior, left, posterior
    affine = np.array([[0, -2, 0, 0], [0, 0, -3, 0], [4, 0, 0, 0], [0, 0, 0, 1]], float)
    ingest(bids(tmp_path / "b", [stored], affine), tmp_path / "s.zarr", dtype="f32")
    store = Store.open(tmp_path / "s.zarr")
    assert store.shape == (1, 6, 7, 5)
    assert store.attributes["voxel_mm"] == [2, 3, 4]
    expected = np.array([[[stored[z, 5 - x, 6 - y] for z in range(5)] for y in range(7)] for x in range(6)])
    assert np.array_equal(store.stored(0)[0], expected)


def test_the_window_is_central_cut_where_larger_and_zero_where_smaller(tmp_path: Path) -> None:
    volumes = [noise(0, (9, 8, 7)), noise(1, (4, 8, 6))]
    ingest(bids(tmp_path / "b", volumes), tmp_path / "s.zarr", shape=(6, 5, 7), pad=True, dtype="f32")
    store = Store.open(tmp_path / "s.zarr")
    assert np.array_equal(store.stored(0)[0], volumes[0][1:7, 1:6, :])
    expected = np.zeros((6, 5, 7), np.float32)
    expected[1:5, :, 0:6] = volumes[1][:, 1:6, :]  # 2 zeros in x: one each side; 1 in z: after
    assert np.array_equal(store.stored(1)[0], expected)
    assert store.stats["mean"][1] == pytest.approx(expected.astype(np.float64).mean())


def test_one_volume_in_four_dimensions_is_squeezed(tmp_path: Path) -> None:
    ingest(bids(tmp_path / "b", [noise(0)[..., None]]), tmp_path / "s.zarr", dtype="f32")
    assert np.array_equal(Store.open(tmp_path / "s.zarr").stored(0)[0], noise(0))


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(i) for i in range(70)])  # 3 shards
    done: list[tuple[int, int]] = []
    ingest(source, tmp_path / "1.zarr", workers=1, progress=lambda *now: done.append(now))
    ingest(source, tmp_path / "3.zarr", workers=3)
    files = sorted(f.relative_to(tmp_path / "1.zarr") for f in (tmp_path / "1.zarr").rglob("*") if f.is_file())
    assert len([f for f in files if f.parts[:2] == ("volumes", "c")]) == 3
    assert all((tmp_path / "1.zarr" / f).read_bytes() == (tmp_path / "3.zarr" / f).read_bytes() for f in files)
    assert done == [(32, 70), (64, 70), (70, 70)]


def test_any_column_name_comes_back_and_none_leaves_meta(tmp_path: Path) -> None:
    names = ["..", "a/b", "zarr.json", "__x", "Age (years)", "höhe"]
    source = bids(tmp_path / "b", [noise(0), noise(1)])
    cells = "\t".join(map(str, range(len(names))))
    table(source, "\t".join(["participant_id", *names]) + f"\nsub-0\t{cells}\nsub-1\t{cells}\n")
    ingest(source, tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr")
    assert [column.name for column in store.columns] == names
    assert np.array_equal(store.metadata(names)[0], range(len(names)))
    assert len(list((tmp_path / "s.zarr/meta").iterdir())) == len(names) + 1
    assert not any(f.name.startswith("zarr.json/") or f.name == ".." for f in (tmp_path / "s.zarr").iterdir())


def test_ids_without_sub_windows_lines_and_sessions_are_read(tmp_path: Path) -> None:
    source = tmp_path / "b"
    scan(source, "sub-01/ses-2", noise(0), name="sub-01_ses-2_T1w.nii")
    scan(source, "sub-02", noise(1))
    scan(source, "sub-02", noise(2), name="{}_T2w.nii.gz")
    (source / "participants.tsv").write_bytes(b"\xef\xbb\xbfparticipant_id\tsite\r\n02\tB\r\n01\tA\r\n")
    ingest(source, tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr")
    assert store.ids == ("sub-01_ses-2", "sub-02")
    assert store.subjects == ("sub-01", "sub-02")
    assert store.columns[0].levels == ("A", "B")
    assert store.metadata(["site"]).ravel().tolist() == [0, 1]


def test_fingerprint_follows_the_data_and_not_its_place(tmp_path: Path) -> None:
    def made(name: str, volume: np.ndarray, text: str = "", **settings: Any) -> str:
        source = bids(tmp_path / name, [volume])
        if text:
            table(source, text)
        for file in source.rglob("*.nii.gz"):  # gzip files carry the time of writing
            file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), mtime=0))
        ingest(source, tmp_path / f"{name}.zarr", **settings)
        return Store.open(tmp_path / f"{name}.zarr").fingerprint

    first = made("a", noise(0))
    assert made("b", noise(0)) == first
    others = [made("c", noise(1)), made("d", noise(0), dtype="f32"), made("e", noise(0), shape=(8, 8, 7))]
    others.append(made("f", noise(0), "participant_id\tage\tsex\nsub-0\t99\tM\n"))
    assert len({first, *others}) == 5


# ---- whole or not at all --------------------------------------------------------------------------------------


def in_another_process(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    start = (
        "import os, signal, sys, time, resource\nfrom pathlib import Path\nfrom cauc_dist.store.ingest import ingest\n"
    )
    command = [sys.executable, "-c", start + code, *map(str, words)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60)


def test_killed_half_way_nothing_is_there_and_the_next_run_completes(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(i) for i in range(70)]), tmp_path / "s.zarr"
    code = "ingest(Path(sys.argv[1]), Path(sys.argv[2]), workers=1, progress=lambda *_: os.kill(os.getpid(), 9))"
    assert in_another_process(code, source, store).returncode == -9
    partial = tmp_path / ".s.zarr.partial"
    assert not store.exists()
    assert (partial / "volumes/c/0/0/0/0/0").is_file()
    with pytest.raises(BadInput, match=r"is not a store"):
        Store.open(partial)
    (partial / "left-over").write_text("by another version")
    assert ingest(source, store).n == 70
    assert np.array_equal(
        Store.open(store).stats["max"], [noise(int(name[4:])).max() for name in Store.open(store).ids]
    )
    assert not partial.exists()
    assert not (store / "left-over").exists()


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(i) for i in range(40)]), tmp_path / "s.zarr"
    code = "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); ingest(Path(sys.argv[1]), Path(sys.argv[2]))"
    run = in_another_process(code, source, store)
    assert run.returncode == 1
    assert "OSError" in run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_second_writer_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(i) for i in range(40)]), tmp_path / "s.zarr"
    seen: list[str] = []

    def second(*_: int) -> None:
        with pytest.raises(BadInput) as error:
            ingest(source, store)
        seen.append(str(error.value))

    ingest(source, store, progress=second)
    assert seen
    assert "another ingest is writing" in seen[0]
    assert len(Store.open(store)) == 40


def test_a_store_is_never_overwritten(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(0)]), tmp_path / "s.zarr"
    ingest(source, store)
    with pytest.raises(BadInput, match=r"exists already; wanted a new path"):
        ingest(source, store)


def test_a_store_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    source, store = bids(tmp_path / "b", [noise(0)]), tmp_path / "s.zarr"

    def meanwhile(*_: int) -> None:
        store.mkdir()

    with pytest.raises(BadInput, match=r"exists already"):
        ingest(source, store, progress=meanwhile)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "s.zarr"]
    assert not list(store.iterdir())


# ---- what is refused ------------------------------------------------------------------------------------------


def test_unequal_shapes_name_the_largest_common_window(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0, (8, 9, 7)), noise(1, (10, 6, 7)), noise(2, (8, 9, 7))])
    refused(source, "2 shapes, from 8x6x7 to 10x9x7", "wanted one shape", "Give shape 8 6 7")
    assert ingest(source, tmp_path / "s.zarr", shape=(8, 6, 7)).shapes == 2


def test_a_window_larger_than_a_scan_wants_pad(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0, (8, 9, 7)), noise(1, (10, 6, 7))])
    refused(source, "2 of 2 scans are smaller than 9x7x7", "Give shape 8 6 7, or ask for pad", shape=(9, 7, 7))


def test_mixed_voxel_sizes_are_refused_and_one_percent_is_not(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0), noise(1)])
    scan(source, "sub-1", noise(1), np.diag([2.015, 2, 2, 1]))
    ingest(source, tmp_path / "s.zarr")
    scan(source, "sub-1", noise(1), np.diag([2.03, 2, 2, 1]))
    refused(source, "voxel sizes from 2x2x2 to 2.03x2x2 mm", "Resample")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "f8"}, ("dtype 'f8'", "wanted f16 or f32", "Name one of the two")),
        ({"shape": (4, 0, 4)}, ("shape 4x0x4", "three positive numbers", "Give e.g. 96 112 96")),
        ({"suffix": "T2w"}, ("no scan in", "sub-*_T2w.nii[.gz]", "Name one of the suffixes found: T1w")),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(bids(tmp_path / "b", [noise(0)]), *words, **settings)


ROW = "participant_id\tage\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("subject\tage\nsub-0\t1\n", ("has columns 'subject, age'", "a column participant_id")),
        ("", ("has columns ''", "a column participant_id", "separate columns by tabs")),
        ("participant_id\tage\tage\n", ("has columns participant_id, age, age", "a different name for each")),
        (ROW + "sub-0\t1\nsub-0\t2\n", ("line 3 repeats sub-0", "one row a participant")),
        (ROW + "sub-0\t1\t2\n", ("line 2 has 3 fields", "wanted 2", "n/a where unknown")),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    source = bids(tmp_path / "b", [noise(0)])
    table(source, text)
    refused(source, *words)


def test_a_missing_folder_table_or_encoding_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no folder", "a BIDS folder")
    (tmp_path / "b").mkdir()
    refused(tmp_path / "b", "no participants.tsv in", "write the table")
    (tmp_path / "b/participants.tsv").write_bytes(b"participant_id\tn\xe4me\n")
    refused(tmp_path / "b", "can't decode", "UTF-8")
    table(tmp_path / "b", ROW)
    refused(tmp_path / "b", "no scan in", "Check the folder")


def test_a_text_in_a_number_column_is_named_with_its_participant(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(i) for i in range(4)])
    table(source, ROW + "sub-0\t20\nsub-1\t30,5\nsub-2\tn/a\nsub-3\t41\n")
    refused(source, "column age", "numbers but for 1 (sub-1: '30,5')", "Correct these entries")


def test_few_numbers_among_texts_make_a_category(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(i) for i in range(4)])
    table(source, "participant_id\tscanner\nsub-0\tTrio\nsub-1\t7\nsub-2\tTrio\nsub-3\tn/a\n")
    ingest(source, tmp_path / "s.zarr")
    column = Store.open(tmp_path / "s.zarr").columns[0]
    assert (column.kind, column.levels) == ("category", ("7", "Trio"))


def test_leftovers_are_refused_or_set_aside_with_their_reason(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(i) for i in range(3)])
    table(source, ROW + "sub-0\t20\nsub-9\t30\nsub-2\t40\n")
    refused(source, "sub-9: no T1w scan", "sub-1: no row in participants.tsv", "partial to keep the 2 pairs")
    summary = ingest(source, tmp_path / "s.zarr", partial=True)
    store = Store.open(tmp_path / "s.zarr")
    assert store.ids == ("sub-0", "sub-2")
    assert store.metadata(["age"]).ravel().tolist() == [20, 40]
    assert summary.set_aside == (("sub-9", "no T1w scan"), ("sub-1", "no row in participants.tsv"))
    assert store.attributes["set_aside"] == [list(pair) for pair in summary.set_aside]
    assert "set aside: sub-9: no T1w scan" in str(summary)
    assert "2 scans of 8x9x7 (from 1 shape)" in str(summary)


def test_partial_without_a_single_pair_is_refused(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0)])
    table(source, ROW + "".join(f"sub-x{i}\t1\n" for i in range(9)))
    refused(source, "10 without a partner", "and 5 more", "Check the names on both sides", partial=True)


def test_a_long_list_of_set_aside_is_cut_in_the_summary_only(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0)])
    table(source, ROW + "sub-0\t1\n" + "".join(f"sub-x{i}\t1\n" for i in range(9)))
    summary = ingest(source, tmp_path / "s.zarr", partial=True)
    assert "set aside: 4 more" in str(summary)
    assert len(summary.set_aside) == 9


def test_several_scans_of_a_participant_are_refused_by_name(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0), noise(1)])
    scan(source, "sub-1/ses-2", noise(2), name="sub-1_ses-2_T1w.nii.gz")
    refused(source, "several T1w scans of 1 participants", "sub-1_T1w.nii.gz, sub-1_ses-2_T1w.nii.gz", "Leave one")


def spoiled(value: float) -> np.ndarray:
    volume = noise(1).astype(np.float64)
    volume[3, 4, 5] = value
    return volume


BAD_VOXELS: list[tuple[Callable[[], np.ndarray], dict[str, Any], str]] = [
    (lambda: spoiled(np.nan), {}, "sub-1: 1 voxels are NaN or infinite"),
    (lambda: spoiled(-np.inf), {}, "sub-1: 1 voxels are NaN or infinite"),
    (lambda: spoiled(1e60), {"dtype": "f32"}, "sub-1: values up to 1e+60 do not fit f32"),
    (lambda: np.full((8, 9, 7), 3, np.int16), {}, "sub-1: constant (3 everywhere)"),
    (lambda: 1e6 + noise(1).astype(np.float64) / 1e3, {}, "sub-1: its values differ too little for f16"),
    (lambda: np.stack([noise(1), noise(2)], -1), {}, "sub-1: 4-D (8x9x7x2), not one volume"),
    (lambda: noise(1)[0], {}, "sub-1: 2-D (9x7), not one volume"),
    (lambda: noise(1).astype(np.complex64), {}, "sub-1: voxels of type complex64, not real numbers"),
]


@pytest.mark.parametrize(("volume", "settings", "words"), BAD_VOXELS)
def test_a_volume_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, volume: Callable[[], np.ndarray], settings: dict[str, Any], words: str
) -> None:
    source = bids(tmp_path / "b", [noise(0), noise(1)])
    scan(source, "sub-1", volume())
    refused(source, "1 of 2 scans cannot be used", words, "Mend these files", **settings)


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(i) for i in range(40)])
    for i in (3, 36):  # of different shards
        scan(source, f"sub-{i}", np.zeros((8, 9, 7), np.float32))
    refused(source, "2 of 40 scans", "sub-3: constant (0 everywhere); sub-36: constant")


def test_unreadable_files_are_refused_before_and_while_reading(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(i) for i in range(3)])
    whole = (source / "sub-1/anat/sub-1_T1w.nii.gz").read_bytes()
    for content in (b"", b"not a scan" * 100, whole[: len(whole) // 2], gzip.compress(b"\0" * 5000)):
        (source / "sub-1/anat/sub-1_T1w.nii.gz").write_bytes(content)
        refused(source, "1 of 3 scans", "sub-1: unreadable (")


def test_any_flipped_bit_of_a_compressed_scan_is_refused(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(i) for i in range(3)])
    scan = source / "sub-1/anat/sub-1_T1w.nii.gz"
    whole = scan.read_bytes()
    for at in range(20, len(whole), len(whole) // 12):  # past gzip's own header, whose time stamp nothing checks
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        scan.write_bytes(flipped)
        refused(source, "1 of 3 scans", "sub-1: unreadable (")


def test_a_file_that_is_not_nifti_is_refused(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0)])
    surface = nib.cifti2.BrainModelAxis(
        "CORTEX_LEFT", vertex=np.arange(4), nvertices={"CIFTI_STRUCTURE_CORTEX_LEFT": 4}
    )
    image = nib.Cifti2Image(np.ones((1, 4), np.float32), (nib.cifti2.ScalarAxis(["x"]), surface))
    (source / "sub-0/anat/sub-0_T1w.nii.gz").unlink()
    image.to_filename(source / "sub-0/anat/sub-0_T1w.nii")
    refused(source, "sub-0: Cifti2Image, not NIfTI")


def test_an_affine_without_orientation_is_refused(tmp_path: Path) -> None:
    source = bids(tmp_path / "b", [noise(0), noise(1)])
    image = nib.Nifti1Image(noise(1), None)
    image.header["sform_code"], image.header["srow_x"] = 1, [0, 0, 0, 0]
    image.header["srow_y"], image.header["srow_z"] = [0, 1, 0, 0], [0, 0, 1, 0]
    (source / "sub-1/anat/sub-1_T1w.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    refused(source, "sub-1: no orientation in its affine")


@pytest.mark.skipif(not os.environ.get("CAUC_DATA"), reason="real scans: set CAUC_DATA to their folder")
def test_real_scans_of_236_shapes_and_up_to_1_7_million_keep_70_db(tmp_path: Path) -> None:
    source = Path(os.environ["CAUC_DATA"]) / "hippocampus260"
    summary = ingest(source, tmp_path / "s.zarr", shape=(31, 40, 24))
    assert (summary.n, summary.shapes) == (260, 236)
    assert summary.error.psnr_db is not None
    assert summary.error.psnr_db > 70
    store = Store.open(tmp_path / "s.zarr")
    peak = max(range(260), key=lambda i: store.stats["max"][i])
    image = nib.load(source / store.ids[peak] / f"anat/{store.ids[peak]}_T1w.nii.gz")  # RAS already
    first = [(side - wanted) // 2 for side, wanted in zip(image.shape, (31, 40, 24), strict=True)]
    box = tuple(slice(f, f + w) for f, w in zip(first, (31, 40, 24), strict=True))
    truth = np.asarray(image.dataobj, np.float64)[box]
    assert truth.max() > 65504
    assert truth.max() == store.stats["max"][peak]
    assert (
        np.abs(store.stored(peak)[0].astype(np.float64) * store.affine(peak)[0] - truth).max()
        <= store.affine(peak)[0] / 2
    )
