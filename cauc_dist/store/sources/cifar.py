"""CIFAR-100 as its authors publish it: three pickles, taken only where their md5 is the official one."""

import functools
import hashlib
import io
import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput
from cauc_dist.store.layout import Column
from cauc_dist.store.sources.cohort import Cohort, Header, Item

MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
SPLITS = ("test", "train")  # levels in sorted order, as of every category
SHAPE = (3, 32, 32)
DESCRIBED = {"name": "CIFAR-100", "license": "research use; cite Krizhevsky 2009"}
ALLOWED = {  # what the official pickles name; numpy has moved its own since
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class Unpickler(pickle.Unpickler):
    """Arrays and Python's own containers, numbers and texts; anything else in a pickle is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise BadInput(f"a pickle that asks for {module}.{name}", wanted="only arrays", do="Do not trust this file")
        return ALLOWED[module, name]


def is_source(source: Path) -> bool:
    return (source / "meta").is_file() and all(_file(source, split).is_file() for split in SPLITS)


def cohort(source: Path) -> Cohort:
    """train-00001 ... train-50000 and test-00001 ... test-10000, with their fine and coarse label and split."""
    meta = _decoded(source / "meta")
    items: list[Item] = []
    fine: list[int] = []
    coarse: list[int] = []
    code: list[int] = []
    for number, split in enumerate(SPLITS):
        path = _file(source, split)
        labels = _decoded(path)
        names = [f"{split}-{i + 1:05}" for i in range(len(labels["fine_labels"]))]
        items += [Item(name, name, (path,), i) for i, name in enumerate(names)]
        fine += labels["fine_labels"]
        coarse += labels["coarse_labels"]
        code += [number] * len(names)
    columns = (
        Column("fine", "category", tuple(meta["fine_label_names"])),
        Column("coarse", "category", tuple(meta["coarse_label_names"])),
        Column("split", "category", SPLITS),
    )
    values = tuple(np.array(v, np.float64) for v in (fine, coarse, code))
    described = {"kind": "CIFAR-100", "folder": str(source.resolve()), **DESCRIBED, "md5": dict(MD5)}
    return Cohort("CIFAR-100", tuple(items), columns, values, (), described)


def header(item: Item) -> Header:
    return Header(SHAPE)


def read(item: Item) -> NDArray[np.uint8]:
    """(3, 32, 32): colour, row, column."""
    pixels: NDArray[np.uint8] = _decoded(item.paths[0])["data"][item.index or 0]
    return pixels.reshape(SHAPE).copy()


def row_bytes(item: Item) -> bytes:
    return read(item).tobytes()


def _file(source: Path, split: str) -> Path:
    plain = source / split
    return plain if plain.is_file() else source / f"{split}.xz"


@functools.lru_cache(maxsize=3)
def _decoded(path: Path) -> dict[str, Any]:
    """The official dictionary; the md5 is of the unpacked bytes, and comes before the first of them is interpreted."""
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (lzma.LZMAError, EOFError) as error:
        raise BadInput(f"{path}: {error}", wanted="a whole .xz file", do="Fetch it again") from error
    wanted = MD5[path.stem]
    if (found := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != wanted:
        raise BadInput(f"{path} has md5 {found}", wanted=f"{wanted}, the official file's", do="Fetch it again")
    loaded: dict[str, Any] = Unpickler(io.BytesIO(raw), encoding="latin1").load()
    return loaded
