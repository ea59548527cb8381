"""Voxels of NIfTI and .npy files: orientation, exact values, headers, what is refused."""

import gzip
import hashlib
import itertools
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cauc_dist.store.sources import Header, Item, Unusable, checksum, header, read


def noise(i: int, shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(i).normal(100, 30, shape).astype(np.float32)


def item(*paths: Path) -> Item:
    return Item("sub-1", "sub-1", paths)


def nifti(path: Path, x: np.ndarray, affine: Any = None) -> Item:
    nib.Nifti1Image(x, np.diag([2, 2, 2, 1]) if affine is None else affine).to_filename(path)
    return item(path)


def reason(scan: Item, take: Callable[..., Any] = read, **settings: Any) -> str:
    with pytest.raises(Unusable) as error:
        take(scan, **settings)
    return str(error.value)


# ---- NIfTI: orientation and values ----------------------------------------------------------------------------

TURNS = [(order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)]


@pytest.mark.parametrize(("order", "signs"), TURNS)
def test_every_orientation_comes_back_as_right_anterior_superior(
    tmp_path: Path, order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    truth = noise(0)  # x, y, z
    sides = (2.0, 3.0, 4.0)
    turned = truth[tuple(slice(None, None, sign) for sign in signs)].transpose(order)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, world in enumerate(order):  # the file's axis runs along `world`, backwards where the sign is -1
        affine[world, axis] = signs[world] * sides[world]
        affine[world, 3] = 10 + world + (0 if signs[world] > 0 else sides[world] * (truth.shape[world] - 1))
    scan = nifti(tmp_path / f"s.nii{'.gz' * (order[0] % 2)}", turned, affine)
    expected = ((2, 0, 0, 10), (0, 3, 0, 11), (0, 0, 4, 12), (0, 0, 0, 1))
    assert header(scan) == Header((1, 5, 6, 7), sides, expected)
    x = read(scan)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    assert np.array_equal(x, truth[None])


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "<u2", "<i4", ">f4", "<f8", "<i8"])
def test_values_keep_their_type_where_the_header_scales_nothing(tmp_path: Path, dtype: str) -> None:
    truth = np.random.default_rng(0).integers(0, 100, (4, 5, 3)).astype(dtype)
    head = nib.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    head.set_data_dtype(truth.dtype)
    nib.Nifti1Image(truth, np.eye(4), head, dtype=truth.dtype).to_filename(tmp_path / "s.nii.gz")
    x = read(item(tmp_path / "s.nii.gz"))
    assert x.dtype == truth.dtype.newbyteorder("=")
    assert x.dtype.isnative
    assert np.array_equal(x[0], truth)


def test_slope_and_intercept_are_applied_in_float64(tmp_path: Path) -> None:
    stored = np.arange(-32768, 32767, 546, dtype=np.int16)[:120].reshape(4, 5, 6)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(0.1, -7.3)
    raw = bytearray(image.to_bytes())
    at = int(image.header["vox_offset"]) or 352
    raw[at : at + stored.nbytes] = stored.tobytes("F")  # nibabel would rescale on saving
    (tmp_path / "s.nii").write_bytes(raw)
    x = read(item(tmp_path / "s.nii"))
    slope, intercept = float(np.float32(0.1)), float(np.float32(-7.3))  # the header holds float32
    assert x.dtype == np.float64
    for at in np.ndindex(4, 5, 6):
        assert x[0][at] == int(stored[at]) * slope + intercept


def test_one_volume_in_four_dimensions_is_a_volume(tmp_path: Path) -> None:
    scan = nifti(tmp_path / "s.nii", noise(0)[..., None])
    assert header(scan).shape == (1, 5, 6, 7)
    assert np.array_equal(read(scan)[0], noise(0))


def test_a_name_with_spaces_and_percent_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a b%20c").mkdir()
    assert np.array_equal(read(nifti(tmp_path / "a b%20c" / "sub-1 %d_T1w.nii.gz", noise(0)))[0], noise(0))


# ---- channels -------------------------------------------------------------------------------------------------


def test_files_of_one_scan_become_its_channels_in_order(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", noise(0))
    flipped = np.diag([-2.0, 2, 2, 1])
    flipped[0, 3] = 8
    nifti(tmp_path / "b.nii.gz", noise(1)[::-1], flipped)
    scan = item(tmp_path / "a.nii", tmp_path / "b.nii.gz")
    assert header(scan).shape == (2, 5, 6, 7)
    assert np.array_equal(read(scan), np.stack([noise(0), noise(1)]))
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in scan.paths]
    assert checksum(scan) == hashlib.sha256(digests[0] + digests[1]).digest()
    assert checksum(item(tmp_path / "a.nii")) == digests[0]


def test_channels_that_do_not_lie_on_one_grid_are_refused(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", noise(0))
    nifti(tmp_path / "b.nii", noise(1, (5, 6, 8)))
    nifti(tmp_path / "c.nii", noise(1), np.diag([2, 2, 2.1, 1]))
    np.save(tmp_path / "d.npy", noise(1))
    for take in (header, read):
        assert reason(item(tmp_path / "a.nii", tmp_path / "b.nii"), take) == (
            "channels of different shapes (5x6x7, 5x6x8)"
        )
        for other in ("c.nii", "d.npy"):
            assert reason(item(tmp_path / "a.nii", tmp_path / other), take).startswith("channels of different affines")


# ---- resampling -----------------------------------------------------------------------------------------------


def test_resampling_gives_the_value_at_each_place_in_mm(tmp_path: Path) -> None:
    """A linear ramp of the place in mm is kept by linear interpolation, whatever the grids."""
    turn = nib.eulerangles.euler2mat(z=0.15, y=-0.1, x=0.2)
    affine = nib.affines.from_matvec(turn @ np.diag([2.0, 2.5, 3.0]), [-9, 4, 7])
    affine = affine.astype(np.float32).astype(np.float64)  # as the file holds it
    where = nib.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, (14, 12, 11)), indexing="ij"), -1))
    ramp = 500 + where @ [3.0, -2.0, 5.0]
    scan = nifti(tmp_path / "s.nii", ramp, affine)
    head = header(scan, (1.5, 1.5, 2.0))
    x = read(scan, (1.5, 1.5, 2.0))
    assert head.voxel == (1.5, 1.5, 2.0)
    assert x.shape == head.shape
    grid = np.array(head.affine)
    assert np.array_equal(grid[:3, :3], np.diag([1.5, 1.5, 2.0]))
    inside = 0
    for at in np.ndindex(head.shape[1:]):
        place = grid[:3, :3] @ at + grid[:3, 3]
        source = np.linalg.solve(affine[:3, :3], place - affine[:3, 3])
        if ((source >= 0.01) & (source <= np.array([14, 12, 11]) - 1.01)).all():
            inside += 1
            assert x[0][at] == pytest.approx(500 + place @ [3.0, -2.0, 5.0], abs=1e-6)
        elif ((source < -1) | (source > [14, 12, 11])).any():
            assert x[0][at] == 0
    assert inside > 1000
    assert np.array_equal(read(scan, (1.5, 1.5, 2.0)), x)


def test_resampled_integers_are_not_rounded(tmp_path: Path) -> None:
    scan = nifti(tmp_path / "s.nii", np.arange(4, dtype=np.int16)[:, None, None] * np.ones((1, 3, 3), np.int16))
    x = read(scan, (1.0, 2.0, 2.0))
    assert x.dtype == np.float64
    assert x[0, :, 1, 1].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]


def test_what_has_no_voxel_size_is_not_resampled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(0))
    assert "a .npy file has no voxel size" in reason(item(tmp_path / "a.npy"), resample=(1.0, 1.0, 1.0))
    row = Item("sub-1", "sub-1", (tmp_path / "rois.csv",), 0)
    for take in (header, read):
        assert "a row of a table or an image has no voxel size" in reason(row, take, resample=(1.0, 1.0, 1.0))


# ---- .npy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stored", "meant"),
    [
        ("a", (5, 6, 7), (1, 5, 6, 7)),
        ("a", (2, 5, 6, 7), (2, 5, 6, 7)),
        ("a", (1, 1, 5, 6, 7), (1, 5, 6, 7)),  # OpenBHB
        ("a", (1, 2, 5, 6, 7), (2, 5, 6, 7)),
        ("a", (3, 8, 9), (3, 8, 9)),
        ("a", (8, 9), (1, 8, 9)),
        ("a", (1, 9), (9,)),
        ("a", (9,), (9,)),
        ("a_ROI", (1, 7, 68), (476,)),
        ("a_ROI", (1, 1, 284), (284,)),
    ],
)
def test_an_array_is_a_volume_an_image_or_features_by_its_axes(
    tmp_path: Path, name: str, stored: tuple[int, ...], meant: tuple[int, ...]
) -> None:
    x = np.arange(math.prod(stored), dtype=np.float16).reshape(stored)
    np.save(tmp_path / f"{name}.npy", np.asfortranarray(x))
    scan = item(tmp_path / f"{name}.npy")
    assert header(scan) == Header(meant)
    back = read(scan)
    assert (back.shape, back.dtype) == (meant, np.float16)
    assert back.flags.c_contiguous
    assert np.array_equal(back.ravel(), x.ravel())


def test_truth_values_become_zeros_and_ones_and_bytes_turn_native(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(0) > 100)
    np.save(tmp_path / "b.npy", noise(0).astype(">f8"))
    assert read(item(tmp_path / "a.npy")).dtype == np.uint8
    assert np.array_equal(read(item(tmp_path / "a.npy"))[0], noise(0) > 100)
    assert read(item(tmp_path / "b.npy")).dtype.isnative
    assert np.array_equal(read(item(tmp_path / "b.npy"))[0], noise(0))


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("touch pickled",)


def test_an_array_that_would_run_a_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([Command()] * 8, object).reshape(2, 2, 2), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Command()))
    for name in ("a.npy", "b.npy"):
        for take in (header, read):
            assert reason(item(tmp_path / name), take).startswith("unreadable (ValueError")
    assert not (tmp_path / "pickled").exists()


# ---- what cannot be taken -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        (np.stack([noise(1), noise(2)], -1), "4-D (5x6x7x2), not one volume"),
        (noise(1)[0], "2-D (6x7), not one volume"),
        (noise(1).astype(np.complex64), "voxels of type complex64, not real numbers"),
        (np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "not real numbers"),
    ],
)
def test_a_nifti_that_is_not_one_real_volume_is_refused(tmp_path: Path, volume: np.ndarray, words: str) -> None:
    scan = nifti(tmp_path / "s.nii.gz", volume)
    for take in (header, read):
        assert words in reason(scan, take)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 2, 5, 6, 7), np.float32), "5-D (2x2x5x6x7), not one volume, image or row of features"),
        (np.zeros((0, 5), np.float32), "no values (0x5)"),
        (np.float32(3), "no values (a scalar)"),
        (np.zeros((5, 6, 7), np.complex128), "voxels of type complex128"),
        (np.zeros((5, 6, 7), np.longdouble), "not real numbers of at most 64 bits"),
        (np.zeros((5, 6, 7), "U3"), "voxels of type <U3"),
    ],
)
def test_an_npy_that_is_not_real_values_of_a_known_shape_is_refused(
    tmp_path: Path, array: np.ndarray, words: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    for take in (header, read):
        assert words in reason(item(tmp_path / "a.npy"), take)


def test_broken_files_are_named_unreadable(tmp_path: Path) -> None:
    whole = nifti(tmp_path / "s.nii.gz", noise(0)).paths[0].read_bytes()
    for content in (b"", b"not a scan" * 100, whole[: len(whole) // 2], gzip.compress(b"\0" * 5000)):
        (tmp_path / "s.nii.gz").write_bytes(content)
        assert reason(item(tmp_path / "s.nii.gz")).startswith("unreadable (")
    np.save(tmp_path / "a.npy", noise(0))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    assert reason(item(tmp_path / "a.npy")).startswith("unreadable (")
    assert reason(item(tmp_path / "gone.nii")).startswith("unreadable (FileNotFoundError")
    (tmp_path / "link.nii").symlink_to(tmp_path / "not fetched")
    assert reason(item(tmp_path / "link.nii"), header).startswith("unreadable (FileNotFoundError")


def test_any_flipped_bit_of_a_compressed_scan_is_found(tmp_path: Path) -> None:
    scan = nifti(tmp_path / "s.nii.gz", noise(0))
    whole = scan.paths[0].read_bytes()
    for at in range(20, len(whole), len(whole) // 40):  # past gzip's own header, whose time stamp nothing checks
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        scan.paths[0].write_bytes(flipped)
        assert reason(scan)


def test_a_header_that_promises_more_than_there_is_costs_no_memory(tmp_path: Path) -> None:
    scan = nifti(tmp_path / "s.nii", noise(0))
    raw = bytearray(scan.paths[0].read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()  # dim[1:4]: 108 TB
    scan.paths[0].write_bytes(raw)
    assert reason(scan) == f"unreadable (cut off: {len(raw)} bytes, {352 + 4 * 30000**3} promised by its header)"


def test_a_file_that_is_not_nifti_is_refused(tmp_path: Path) -> None:
    surface = nib.cifti2.BrainModelAxis(
        "CORTEX_LEFT", vertex=np.arange(4), nvertices={"CIFTI_STRUCTURE_CORTEX_LEFT": 4}
    )
    image = nib.Cifti2Image(np.ones((1, 4), np.float32), (nib.cifti2.ScalarAxis(["x"]), surface))
    image.to_filename(tmp_path / "s.nii")
    assert reason(item(tmp_path / "s.nii"), header) == "Cifti2Image, not NIfTI"


def test_an_affine_without_orientation_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(1), None)
    image.header["sform_code"] = 1
    image.header["srow_y"], image.header["srow_z"] = [0, 1, 0, 0], [0, 0, 1, 0]
    for row in ([0, 0, 0, 0], [1, 0, 0, np.nan], [np.inf, 0, 0, 0]):
        image.header["srow_x"] = row
        (tmp_path / "s.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
        for take in (header, read):
            assert reason(item(tmp_path / "s.nii.gz"), take) == "no orientation in its affine"
