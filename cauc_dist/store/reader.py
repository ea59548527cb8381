"""A store, opened: names, statistics and metadata in memory, volumes read one at a time.

Only rows that hold a scan are seen here: holes and scans that were set aside have no number. Safe to read from many
threads. Each read checks the crc32c of what it read; a volume that is not there is an error, never zeros.
Shapes: N usable scans of n rows, c channels, M voxels of the mask, k metadata columns.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput, nearest
from cauc_dist.provenance import without_secrets
from cauc_dist.store import layout
from cauc_dist.store.chunks import Rows, open_rows, rows_a_file, shard_name, whole
from cauc_dist.store.files import Files, is_remote, open_files
from cauc_dist.store.layout import Column, Layout

Floats = NDArray[np.float64]

ROW_ARRAYS = ("ids", "subjects", "valid", "checksums", *(f"stats/{name}" for name in layout.STATS))
AGAIN = "Restore it from a copy, or ingest the data again into a new store"


class Damaged(BadInput):
    """Bytes of a store that are not those that were written, or are not there."""


@dataclass(frozen=True, eq=False)
class Store:
    """One store of format 2. `stats` holds float64 (N, c) by name: of each channel of the source, over its voxels.

    Of a table (N, 1): over the features of a row.
    """

    where: str
    ids: tuple[str, ...]
    subjects: tuple[str, ...]
    shape: tuple[int, ...]
    """(c, X, Y, Z) of a volume, (c, X, Y) of an image, (c,) of a row of features."""
    mask: NDArray[np.bool_] | None
    """(c, *spatial) of a packed store: what is outside is 0 in every scan."""
    columns: tuple[Column, ...]
    fingerprint: str
    stats: dict[str, Floats]
    attributes: dict[str, Any]
    set_aside: tuple[tuple[str, str], ...]
    """(scan, reason) of those that are in the source and not among the N."""
    checksums: NDArray[np.uint8] = field(repr=False)
    """(N, 32) sha256 of each source."""
    _values: dict[str, Floats] = field(repr=False)
    _at: NDArray[np.int64] = field(repr=False)
    _volumes: Rows = field(repr=False)
    _files: Files = field(repr=False)

    @staticmethod
    def open(where: str | Path) -> "Store":
        """Read all but the volumes, from a folder or an http(s):// or s3:// URL.

        BadInput where there is no store, one of another version, or a damaged one.
        """
        files = open_files(str(where).rstrip("/") if is_remote(where) else where)
        attributes = _attributes(files)
        try:
            return _open(files, attributes)
        except BadInput:
            raise
        except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
            raise _damaged(f"store {files.where}", error) from error

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def name(self) -> str:
        """The last part of where it is; of a URL without its query, which may be a signature."""
        return without_secrets(self.where).rstrip("/").rsplit("/", 1)[-1]

    @property
    def layout(self) -> Layout:
        return "dense" if self.mask is None else "packed"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row as stored: (M,) packed, `shape` dense."""
        return self._volumes.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._volumes.dtype

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """(N,) address of each scan for random draws: of its id alone."""
        return layout.keys(self.ids)

    def metadata(self, names: Sequence[str]) -> Floats:
        """(N, k) float64 in the order of `names`: numbers, or codes into the column's levels; NaN is missing."""
        for name in names:
            if name not in self._values:
                do = nearest(name, self._values).rstrip(".")
                raise BadInput(f"no column {name!r} in {self.where}", wanted="a column of its metadata", do=do)
        return np.stack([self._values[name] for name in names], axis=1) if names else np.empty((len(self), 0))

    def column(self, name: str) -> Column:
        """The column of that name; BadInput as `metadata`."""
        self.metadata([name])
        return next(column for column in self.columns if column.name == name)

    def require(self, names: Sequence[str], rows: NDArray[np.int64] | None = None) -> None:
        """BadInput where a column is unknown, empty, or the same for all scans (of `rows`): it could teach nothing."""
        values = self.metadata(names)[slice(None) if rows is None else rows]
        for name, column in zip(names, values.T, strict=True):
            different = np.unique(column[~np.isnan(column)])
            if len(different) < 2:
                found = f"column {name} of {self.where} is {'the same for all scans' if len(different) else 'empty'}"
                raise BadInput(found, wanted="at least two different values", do="Leave this column out of the kernel")

    def read_into(self, i: int, out: NDArray[Any]) -> None:
        """Row i as stored, into `out`: (row_shape) of `dtype`, contiguous. Damaged names the scan, OSError the file."""
        try:
            self._volumes.read_into(int(self._at[i]), out)
        except (ValueError, KeyError, EOFError, FileNotFoundError, RuntimeError) as error:
            raise _damaged(f"scan {self.ids[i]} (row {self._at[i]}) of {self.where}", error) from error

    def volume(self, i: int) -> Floats:
        """(c, *spatial) float64: the source's values as far as the store holds them, 0 outside the mask."""
        row = np.empty(self.row_shape, self.dtype)
        self.read_into(i, row)
        if len(self.shape) == 1:
            return row.astype(np.float64)
        out = np.zeros((self.shape[0], int(np.prod(self.shape[1:]))))
        scale, offset = self.stats["scale"][i], self.stats["offset"][i]
        if self.mask is None:
            out[...] = row.reshape(out.shape).astype(np.float64) * scale[:, None] + offset[:, None]
            return out.reshape(self.shape)
        start = 0
        for c, mask in enumerate(self.mask.reshape(out.shape)):
            stop = start + int(np.count_nonzero(mask))
            out[c, mask] = row[start:stop].astype(np.float64) * scale[c] + offset[c]
            start = stop
        return out.reshape(self.shape)

    def files(self) -> list[str]:
        """Names of all files of the store; last `zarr.json`, which makes a folder a store."""
        n, names = int(self.attributes["n"]), ["participants.tsv", "meta/zarr.json", "stats/zarr.json"]
        for array in [*ROW_ARRAYS, *(column.array for column in self.columns)]:
            dimensions = 2 if array.startswith("stats/") or array in ("ids", "subjects", "checksums") else 1
            names += _chunks(self._files, array, n, dimensions)
        names += _chunks(self._files, "volumes", n, len(self._volumes.shape))
        if self.mask is not None:
            names += _chunks(self._files, "mask", self.mask.shape[0], self.mask.ndim)
        return [*names, "zarr.json"]


def _attributes(files: Files) -> dict[str, Any]:
    """The group's attributes, which are the commit record: without them there is no store."""
    try:
        attributes = json.loads(files.read("zarr.json"))["attributes"]
        form, version = attributes["format"], attributes["version"]
    except (FileNotFoundError, NotADirectoryError) as error:
        if not is_remote(files.where) and Path(files.where).is_dir():
            raise _no_store(files.where) from error
        do = "Check the path, or ingest first"
        raise BadInput(f"no store at {files.where}", wanted="a folder made by ingest", do=do) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _no_store(files.where) from error
    if (form, version) != (layout.FORMAT, layout.VERSION):
        do = "Ingest the data again, or read it with the version of cauc_dist that wrote it"
        found = f"{files.where} has format {form} {version} (written by {attributes.get('cauc_dist')})"
        raise BadInput(found, wanted=f"{layout.FORMAT} {layout.VERSION}", do=do)
    return dict(attributes)


def _no_store(where: str) -> BadInput:
    do = "Give the folder that ingest wrote, not one above or inside it"
    return BadInput(f"{where} is not a store", wanted=f"a zarr.json with format {layout.FORMAT}", do=do)


def _open(files: Files, attributes: dict[str, Any]) -> Store:
    n = int(attributes["n"])
    rows = {name: whole(files, name, n)[0] for name in ROW_ARRAYS}
    at = np.flatnonzero(rows["valid"] == layout.OK)
    volumes = open_rows(files, "volumes")
    if volumes.shape[0] < n:
        raise ValueError(f"volumes has {volumes.shape[0]} rows, not {n}")
    ids = layout.decode_text(rows["ids"][at])
    mask = None
    if attributes["layout"] == "packed":
        mask = whole(files, "mask", attributes["shape"][0])[0]
        if (int(mask.sum()),) != volumes.shape[1:]:
            raise ValueError(f"the mask has {int(mask.sum())} voxels, a row of volumes {volumes.shape[1:]}")
    columns, values = [], {}
    for name in attributes["columns"]:
        array, told = whole(files, Column(name, "number").array, n)
        columns.append(Column(name, told["kind"], tuple(told["levels"])))
        values[name] = array[at]
    return Store(
        where=files.where,
        ids=ids,
        subjects=layout.decode_text(rows["subjects"][at]),
        shape=tuple(attributes["shape"]),
        mask=mask,
        columns=tuple(columns),
        fingerprint=layout.fingerprint(ids, rows["checksums"][at], attributes["settings"]),
        stats={name: rows[f"stats/{name}"][at] for name in layout.STATS},
        attributes=attributes,
        set_aside=tuple((name, reason) for name, reason in attributes["set_aside"]),
        checksums=rows["checksums"][at],
        _values=values,
        _at=at,
        _volumes=volumes,
        _files=files,
    )


def _chunks(files: Files, name: str, n: int, dimensions: int) -> list[str]:
    """zarr.json and the chunks (shards) of an array that hold its first n rows."""
    shards = range(math.ceil(n / rows_a_file(files, name)))
    return [f"{name}/zarr.json", *(shard_name(name, k, dimensions) for k in shards)]


def _damaged(what: str, error: object) -> Damaged:
    return Damaged(f"{what} is damaged ({error})", wanted="the bytes that ingest wrote", do=AGAIN)
