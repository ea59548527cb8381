"""One scan, read: NIfTI turned to RAS, or .npy as it is; values exactly as the file means them.

(c, X, Y, Z) is a volume, (c, X, Y) an image, (c,) a row of features. Anything that is wrong with one file is raised
as Unusable, so that the others can be kept.
"""

import contextlib
import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.processing import resample_from_to
from nibabel.spaces import vox2out_vox
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from cauc_dist.store.sources.cohort import Header, Spacing, Unusable, by

UNREADABLE = (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error, ImageFileError, HeaderDataError)
CHANNELS = 4  # a 3-D .npy whose first axis has at most as many is an image of that many channels
SAME_MM = 1e-3  # affines of the channels of one scan may differ by this much


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """A file that cannot be read becomes the reason for setting its scan aside."""
    try:
        yield
    except UNREADABLE as error:
        raise Unusable(f"unreadable ({type(error).__name__}: {error})") from error


def header(paths: tuple[Path, ...], resample: Spacing | None) -> Header:
    with readable():
        heads = [_header(p, resample) for p in paths]
    _agree(heads)
    return Header((sum(h.shape[0] for h in heads), *heads[0].shape[1:]), heads[0].voxel, heads[0].affine)


def read(paths: tuple[Path, ...], resample: Spacing | None) -> NDArray[Any]:
    if len(paths) > 1:
        header(paths, resample)  # refuses channels that do not belong together before their voxels are inflated
    with readable():
        parts = [_native(_npy(p, resample) if p.suffix == ".npy" else _nifti(p, resample)[None]) for p in paths]
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _agree(heads: list[Header]) -> None:
    for head in heads[1:]:
        if head.shape[1:] != heads[0].shape[1:]:
            raise Unusable(f"channels of different shapes ({by(heads[0].shape[1:])}, {by(head.shape[1:])})")
        if (head.affine is None) != (heads[0].affine is None) or not np.allclose(
            np.array(head.affine or 0.0), np.array(heads[0].affine or 0.0), rtol=0, atol=SAME_MM
        ):
            raise Unusable("channels of different affines: they do not lie on one grid")


def _real(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise Unusable(f"voxels of type {dtype}, not real numbers of at most 64 bits")


# ---- NIfTI ----------------------------------------------------------------------------------------------------


def _header(path: Path, resample: Spacing | None) -> Header:
    if path.suffix == ".npy":
        return Header(_npy(path, resample, "r").shape)
    image: Any = nib.load(path)
    _one_volume(image)
    order = np.argsort(_orientation(image)[:, 0])
    shape = tuple(int(image.shape[i]) for i in order)
    affine = _turned(image)
    if resample is not None:
        shape, affine = vox2out_vox((shape, affine), resample)  # type: ignore[no-untyped-call]
    a, b, c = (float(side) for side in nib.affines.voxel_sizes(affine))  # type: ignore[no-untyped-call]
    return Header((1, *map(int, shape)), (a, b, c), tuple(tuple(map(float, row)) for row in affine))


def _nifti(path: Path, resample: Spacing | None) -> NDArray[Any]:
    """(X, Y, Z) in RAS. Integers stay integers where the header scales nothing; else slope and intercept in float64."""
    # Unpacked whole: nibabel stops before gzip's checksum, and 44 of 60 flipped bits passed for a scan.
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    kind: Any = type(nib.load(path))
    image = kind.from_bytes(raw)
    _one_volume(image)
    wanted = image.dataobj.offset + image.dataobj.dtype.itemsize * math.prod(image.shape)
    if len(raw) < wanted:  # nibabel would first allocate all that a broken header promises
        raise Unusable(f"unreadable (cut off: {len(raw)} bytes, {wanted} promised by its header)")
    x: NDArray[Any] = image.dataobj.get_unscaled().reshape(image.shape[:3])
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    if (slope, intercept) != (1, 0):
        x = x.astype(np.float64) * np.float64(slope) + np.float64(intercept)
    x = nib.apply_orientation(x, _orientation(image))  # type: ignore[no-untyped-call]
    if resample is not None:
        affine = _turned(image)
        # In float64: scipy would round to the type it is given.
        flat = nib.Nifti1Image(x.astype(np.float64), affine)  # type: ignore[no-untyped-call]
        grid = vox2out_vox((x.shape, affine), resample)  # type: ignore[no-untyped-call]
        moved: Any = resample_from_to(flat, grid, order=1, mode="constant", cval=0.0)  # type: ignore[no-untyped-call]
        x = np.asarray(moved.dataobj)
    return x


def _one_volume(image: Any) -> None:
    if not isinstance(image, nib.Nifti1Image):
        raise Unusable(f"{type(image).__name__}, not NIfTI")
    shape = image.shape
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        raise Unusable(f"{len(shape)}-D ({by(shape)}), not one volume")
    if 0 in shape:
        raise Unusable(f"no voxels ({by(shape)})")
    _real(image.get_data_dtype())  # type: ignore[no-untyped-call]


def _orientation(image: Any) -> NDArray[np.float64]:
    """(3, 2): for each axis of the file the axis of RAS it is nearest to, and whether it runs the same way."""
    if np.isfinite(image.affine).all():
        turn: NDArray[np.float64] = nib.io_orientation(image.affine)  # type: ignore[no-untyped-call]
        if np.isfinite(turn).all():
            return turn
    raise Unusable("no orientation in its affine")


def _turned(image: Any) -> NDArray[np.float64]:
    """(4, 4) from the turned scan's voxels to mm."""
    back = nib.orientations.inv_ornt_aff(_orientation(image), image.shape[:3])  # type: ignore[no-untyped-call]
    turned: NDArray[np.float64] = image.affine @ back
    return turned


# ---- .npy -----------------------------------------------------------------------------------------------------


def _npy(path: Path, resample: Spacing | None, mmap: Literal["r"] | None = None) -> NDArray[Any]:
    if resample is not None:
        raise Unusable("a .npy file has no voxel size: it cannot be resampled")
    x: NDArray[Any] = np.load(path, mmap_mode=mmap)  # pickles are refused
    if not isinstance(x, np.ndarray):
        raise Unusable("an archive of arrays, not one")
    _real(x.dtype)
    return x.reshape(_meant(path, x.shape))


def _meant(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(c, X, Y, Z), (c, X, Y) or (c,): what an array of this shape is; only axes of 1 come and go.

    A file named *_ROI.npy is one row of features, whatever its axes.
    """
    if 0 in shape or not shape:
        raise Unusable(f"no values ({by(shape) or 'a scalar'})")
    if path.stem.endswith("_ROI"):
        return (math.prod(shape),)
    if len(shape) == 5 and shape[0] == 1:  # (1, c, X, Y, Z): a batch of one, as OpenBHB has it
        return shape[1:]
    if len(shape) in (1, 4):
        return shape
    if len(shape) == 2:  # (1, c): a row of features
        return shape[1:] if shape[0] == 1 else (1, *shape)
    if len(shape) == 3:
        return shape if shape[0] <= CHANNELS else (1, *shape)
    raise Unusable(f"{len(shape)}-D ({by(shape)}), not one volume, image or row of features")


def _native(x: NDArray[Any]) -> NDArray[Any]:
    """Machine byte order; truth values as 0 and 1."""
    return x.astype(np.uint8 if x.dtype.kind == "b" else x.dtype.newbyteorder("="), copy=False)
