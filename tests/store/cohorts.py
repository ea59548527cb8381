"""Small sources to ingest, and looks at the files of a store that do not go through the code under test."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tensorstore
import zarr

SIDES = (8, 9, 7)


def noise(i: int, shape: tuple[int, ...] = SIDES) -> np.ndarray:
    """float32 without a zero: nothing to leave out."""
    return np.random.default_rng(i).normal(100, 20, shape).astype(np.float32)


def blob(i: int, shape: tuple[int, ...] = SIDES, inside: float = 0.5) -> np.ndarray:
    """float32, noise in the first part of x and 0 in the rest, with zeros inside: something to pack."""
    x = noise(i, shape)
    x[round(shape[0] * inside) :] = 0
    x[0, i % shape[1]] = 0
    return x


def scan(folder: Path, subject: str, volume: np.ndarray, affine: Any = None, name: str = "{}_T1w.nii.gz") -> Path:
    """The same bytes for the same volume: gzip would write the time."""
    path = folder / subject / "anat" / name.format(subject)
    path.parent.mkdir(parents=True, exist_ok=True)
    image: Any = nib.Nifti1Image(volume, np.diag([2, 2, 2, 1]) if affine is None else affine)
    path.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0) if path.suffix == ".gz" else image.to_bytes())
    return path


def table(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "participants.tsv").write_text(text)


def bids(folder: Path, volumes: Sequence[np.ndarray], affine: Any = None, first: int = 0) -> Path:
    """sub-00, sub-01, ... (from `first` on) with age 20, 21, ... and sex M F M F."""
    numbers = range(first, first + len(volumes))
    for i, volume in zip(numbers, volumes, strict=True):
        scan(folder, f"sub-{i:02d}", volume, affine)
    rows = "".join(f"sub-{i:02d}\t{20 + i}\t{'MF'[i % 2]}\n" for i in numbers)
    table(folder, f"participant_id\tage\tsex\n{rows}")
    return folder


def by_zarr(store: Path, name: str) -> Any:
    return zarr.open_array(store / name, mode="r")[...]


def by_tensorstore(store: Path, name: str) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / name)}}
    return tensorstore.open(spec, read=True).result().read().result()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def shard(store: Path, k: int) -> Path:
    (path,) = (f for f in (store / f"volumes/c/{k}").rglob("*") if f.is_file())
    return path


def spans(path: Path, rows: int) -> list[tuple[int, int]]:
    """(start, length) of each row of a shard, from its index at the end of the file."""
    index = np.frombuffer(path.read_bytes()[-4 - 16 * rows : -4], "<u8").reshape(rows, 2)
    return [(int(start), int(length)) for start, length in index]


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """A zarr.json, edited in place."""
    told = json.loads(path.read_text())
    edit(told)
    path.write_text(json.dumps(told))
