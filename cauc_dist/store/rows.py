"""What is small in a store: its rows of names, statistics and metadata, written and grown; the commit.

A row array has chunks of many rows (65,536 numbers), padded and compressed: growing rewrites its last chunk, by rename,
then its shape. A reader trusts the `n` of the group's attributes, which are written last. So a store is whole at any
moment: the old one until the commit, the new one from then on. Shapes: N rows (holes among them), c channels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import Zstd
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from cauc_dist.durable import replace
from cauc_dist.store import layout
from cauc_dist.store.chunks import crc32c, shard_name
from cauc_dist.store.layout import Column
from cauc_dist.store.shards import Form

Values = Mapping[str, NDArray[Any]]

ZSTD = 3  # level


def create(folder: Path, form: Form, n: int, per: int) -> None:
    """The group, still without the attributes that make it a store, with `volumes` (its zarr.json) and the mask."""
    group = zarr.open_group(folder, mode="a", zarr_format=3)
    for parent in ("stats", "meta"):
        group.require_group(parent)
    stored = layout.STORED_AS[form.dtype]
    compressors: dict[str, list[Any]] = {
        "lz4": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=stored.itemsize)],
        "zstd": [ZstdCodec(level=3, checksum=True)],
        "none": [],
    }
    if "volumes" not in group:
        group.create_array(
            "volumes",
            shape=(n, *form.row),
            chunks=(1, *form.row),
            shards=(per, *form.row),
            dtype=stored,
            compressors=[*compressors[form.codec], Crc32cCodec()],
            fill_value=layout.empty(stored),  # what is absent must not read as zeros
            dimension_names=layout.axes(len(form.shape)) if form.mask is None else ("scan", "voxel"),
        )
    if form.mask is not None:
        _put(group, folder, "mask", form.mask)


def write(folder: Path, rows: Values, columns: Sequence[Column], metadata: Sequence[NDArray[np.float64]]) -> None:
    """All row arrays (N, ...) and metadata columns (N,), new or longer than they were; `volumes` grows with them."""
    group = zarr.open_group(folder, mode="r+", zarr_format=3)
    n = len(rows["ids"])
    _tell(folder / "volumes", n)
    for name, values in rows.items():
        _put(group, folder, name, values)
    for column, values in zip(columns, metadata, strict=True):
        _put(group, folder, column.array, values, asdict(column))
    replace(folder / "participants.tsv", _table(rows, columns, metadata).encode())


def commit(folder: Path, attributes: Mapping[str, Any]) -> None:
    """The attributes, which make a folder a store or a longer one, by one rename; all else is on the disk."""
    for left in folder.rglob("*.partial"):  # of a run that was killed
        left.unlink()
    told = json.loads((folder / "zarr.json").read_bytes())
    told["attributes"] = dict(attributes)
    replace(folder / "zarr.json", json.dumps(told, indent=1).encode())


def _put(
    group: zarr.Group, folder: Path, name: str, values: NDArray[Any], attributes: dict[str, Any] | None = None
) -> None:
    """Chunks by name and rename, each on the disk before it is seen: zarr-python's own writes are not synced.

    All of them are written, those of fill values too (zarr-python drops these): an absent chunk always means damage.
    """
    per = len(values) if name == "mask" else layout.row_chunk(values[:1].nbytes)
    fill = np.nan if values.dtype.kind == "f" else 0
    if name not in group:
        group.create_array(
            name,
            shape=values.shape,
            chunks=(per, *values.shape[1:]),
            dtype=values.dtype,
            compressors=[ZstdCodec(level=ZSTD), Crc32cCodec()],
            fill_value=fill,
            attributes=attributes,
        )
    for k, start in enumerate(range(0, len(values), per)):
        chunk = np.full((per, *values.shape[1:]), fill, values.dtype)
        part = values[start : start + per]
        chunk[: len(part)] = part
        data = Zstd(level=ZSTD).encode(np.ascontiguousarray(chunk))
        path = folder / shard_name(name, k, values.ndim)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, data + crc32c(np.frombuffer(data, np.uint8)).tobytes())
    _tell(folder / name, len(values), attributes)


def _tell(array: Path, n: int, attributes: dict[str, Any] | None = None) -> None:
    """An array's zarr.json says n rows (never fewer than it said), and has these attributes."""
    told = json.loads((array / "zarr.json").read_bytes())
    wanted = {**told, "shape": [max(n, told["shape"][0]), *told["shape"][1:]]}
    if attributes is not None:
        wanted["attributes"] = json.loads(json.dumps(attributes))
    if wanted != told:
        replace(array / "zarr.json", json.dumps(wanted, indent=2).encode())


def _table(rows: Values, columns: Sequence[Column], metadata: Sequence[NDArray[np.float64]]) -> str:
    """The rows as text for people: every scan, its subject and metadata, `n/a` where missing."""
    lines = ["\t".join(["scan_id", "participant_id", *(column.name for column in columns)])]
    ids, subjects = layout.decode_text(rows["ids"]), layout.decode_text(rows["subjects"])
    texts = [
        [_cell(column, value) for value in values.tolist()] for column, values in zip(columns, metadata, strict=True)
    ]
    for i in np.flatnonzero(rows["valid"] == layout.OK):
        lines.append("\t".join([ids[i], subjects[i], *(text[i] for text in texts)]))
    return "\n".join(lines) + "\n"


def _cell(column: Column, value: float) -> str:
    if value != value:
        return "n/a"
    return column.levels[int(value)] if column.kind == "category" else repr(value).removesuffix(".0")
