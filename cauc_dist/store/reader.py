"""A store, opened: names, statistics and metadata in memory, volumes read one at a time.

Safe to read from many threads. Each read checks the crc32c of what it read; a volume that is not there is an
error, never zeros. Shapes: N scans, (c, X, Y, Z) a volume, k columns.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cauc_dist.errors import BadInput, nearest
from cauc_dist.store import layout
from cauc_dist.store.layout import Column

Floats = NDArray[np.float64]

AGAIN = "Restore it from a copy, or ingest the data again into a new store"


@dataclass(frozen=True, eq=False)
class Store:
    """One store of format 1. `stats` holds float64 (N,) by name: the source's mean, std, ... over all voxels."""

    path: Path
    ids: tuple[str, ...]
    subjects: tuple[str, ...]
    shape: tuple[int, int, int, int]
    columns: tuple[Column, ...]
    fingerprint: str
    stats: dict[str, Floats]
    attributes: dict[str, Any]
    _values: dict[str, Floats] = field(repr=False)
    _valid: NDArray[np.uint8] = field(repr=False)
    _volumes: Any = field(repr=False)

    @staticmethod
    def open(path: Path) -> "Store":
        """Read all but the volumes; BadInput where the path is no store, of another version, or damaged."""
        attributes = _attributes(path)
        try:
            return _open(path, attributes)
        except BadInput:
            raise
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise _damaged(f"store {path}", error) from error

    def __len__(self) -> int:
        return len(self.ids)

    def metadata(self, names: Sequence[str]) -> Floats:
        """(N, k) float64 in the order of `names`: numbers, or codes into the column's levels; NaN is missing."""
        for name in names:
            if name not in self._values:
                do = nearest(name, self._values).rstrip(".")
                raise BadInput(f"no column {name!r} in {self.path}", wanted="a column of its metadata", do=do)
        return np.stack([self._values[name] for name in names], axis=1) if names else np.empty((len(self), 0))

    def require(self, names: Sequence[str], rows: NDArray[np.int64] | None = None) -> None:
        """BadInput where a column is unknown, empty, or the same for all scans (of `rows`): it could teach nothing."""
        values = self.metadata(names)[slice(None) if rows is None else rows]
        for name, column in zip(names, values.T, strict=True):
            different = np.unique(column[~np.isnan(column)])
            if len(different) < 2:
                found = f"column {name} of {self.path} is {'the same for all scans' if len(different) else 'empty'}"
                raise BadInput(found, wanted="at least two different values", do="Leave this column out of the kernel")

    def stored(self, i: int) -> NDArray[Any]:
        """Volume i as stored, (c, X, Y, Z) float16 or float32; the caller owns the array."""
        name = f"scan {self.ids[i]} (row {i}) of {self.path}"
        try:
            volume: NDArray[Any] = self._volumes[i]
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise _damaged(name, error) from error
        # Zarr fills what is absent with NaN, and ingest refuses NaN: one voxel tells.
        if self._valid[i] != layout.OK or np.isnan(volume.flat[0]):
            raise _damaged(name, "its chunk is not there")
        return volume

    def affine(self, i: int) -> tuple[float, float]:
        """(scale, offset) of volume i: value = stored * scale + offset."""
        return float(self.stats["scale"][i]), float(self.stats["offset"][i])


def _attributes(path: Path) -> dict[str, Any]:
    """The group's attributes, which are the commit record: without them there is no store."""
    if not path.is_dir():
        raise BadInput(f"no store at {path}", wanted="a folder made by ingest", do="Check the path, or ingest first")
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        form, version = attributes["format"], attributes["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        do = "Give the folder that ingest wrote, not one above or inside it"
        raise BadInput(f"{path} is not a store", wanted=f"a zarr.json with format {layout.FORMAT}", do=do) from error
    if (form, version) != (layout.FORMAT, layout.VERSION):
        do = "Ingest the data again, or read it with the version of cauc_dist that wrote it"
        wanted = f"{layout.FORMAT} {layout.VERSION}"
        raise BadInput(
            f"{path} has format {form} {version} (written by {attributes.get('cauc_dist')})", wanted=wanted, do=do
        )
    return dict(attributes)


def _open(path: Path, attributes: dict[str, Any]) -> Store:
    group = zarr.open_group(path, mode="r", zarr_format=3)
    volumes: Any = group["volumes"]
    columns = [Column(name, "number") for name in attributes["columns"]]
    columns = [_column(group, column) for column in columns]
    ids = layout.decode_text(_whole(group, "ids"))
    c, x, y, z = volumes.shape[1:]
    store = Store(
        path=path,
        ids=ids,
        subjects=layout.decode_text(_whole(group, "subjects")),
        shape=(c, x, y, z),
        columns=tuple(columns),
        fingerprint=layout.fingerprint(
            ids, _whole(group, "checksums"), attributes["source"]["participants_sha256"], attributes["settings"]
        ),
        stats={name: _whole(group, f"stats/{name}") for name in layout.STATS},
        attributes=attributes,
        _values={column.name: _whole(group, column.array) for column in columns},
        _valid=_whole(group, "valid"),
        _volumes=volumes,
    )
    rows = {volumes.shape[0], len(store.ids), len(store.subjects), len(store._valid), *map(len, store.stats.values())}
    if rows != {attributes["n"]}:
        raise ValueError(f"{attributes['n']} scans were committed, arrays have {sorted(rows)} rows")
    return store


def _column(group: zarr.Group, named: Column) -> Column:
    told: Any = group[named.array].attrs.asdict()
    return Column(named.name, told["kind"], tuple(told["levels"]))


def _whole(group: zarr.Group, name: str) -> Any:
    """A small array, all of it; KeyError or ValueError where any of it is absent or broken."""
    array: Any = group[name]
    if array.nchunks_initialized != array.nchunks:
        raise ValueError(f"a chunk of {name} is not there")
    return array[...]


def _damaged(what: str, error: object) -> BadInput:
    return BadInput(f"{what} is damaged ({error})", wanted="the bytes that ingest wrote", do=AGAIN)
