"""The names and the arithmetic of a store, format 2 (docs/format.md). numpy only: no zarr, no files.

N rows, c channels, `spatial` = (X, Y, Z) of a volume, (X, Y) of an image, () of a table's row of c features.
M voxels of the mask in a packed store, L bytes of the longest name.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

FORMAT = "cauc_dist.store"
VERSION = 2
STATS = ("mean", "std", "min", "max", "nonzero", "scale", "offset")
HOLE, OK, SET_ASIDE = 0, 1, 2  # in `valid`: nothing was ever written there; a scan; a scan not to be used

Kind = Literal["number", "category"]
Layout = Literal["packed", "dense"]
DType = Literal["f16", "f32", "i16"]
Codec = Literal["lz4", "zstd", "none"]
STORED_AS: dict[DType, np.dtype[Any]] = {"f16": np.dtype("<f2"), "f32": np.dtype("<f4"), "i16": np.dtype("<i2")}
I16_LEVELS = 32767  # -32768 is the fill value: no stored voxel has it

SHARD_BYTES = 128 * 2**20
SHARDS_WANTED = 64  # of a large store: enough to share out, few enough to open
ROWS, ROW_BYTES = 65536, 8 * 2**20  # most of a chunk of a row array: few files to open, and an append rewrites one
NAME_BYTES = 64  # names are padded to a multiple: a later append brings longer ones
PACKS_BELOW = 0.7  # packed pays where the mask covers less than this of the box


@dataclass(frozen=True)
class Column:
    """One metadata column: numbers, or codes 0, 1, ... into `levels`; NaN is missing in both."""

    name: str
    kind: Kind
    levels: tuple[str, ...] = ()

    @property
    def array(self) -> str:
        """Path of the column's array: the name, percent-encoded so that no name can leave `meta/`."""
        safe = quote(self.name, safe="").replace(".", "%2E")
        return f"meta/{'%5F' + safe[1:] if safe.startswith('__') else safe}"


def channels(shape: tuple[int, ...]) -> int:
    """Statistics a scan: one set a channel; one for all features of a table's row."""
    return shape[0] if len(shape) > 1 else 1


def axes(dimensions: int) -> tuple[str, ...]:
    """Names of a dense row's axes with the scans' before them; images keep numpy's order of rows and columns."""
    spatial = {4: ("x", "y", "z"), 3: ("y", "x"), 1: ()}[dimensions]
    return ("scan", "channel", *spatial)


def rows_per_shard(n: int, row_bytes: int) -> int:
    """At most 128 MiB before compression, else 32 rows or a 64th of all, the larger; the machine plays no part."""
    return max(1, min(SHARD_BYTES // row_bytes, max(32, math.ceil(n / SHARDS_WANTED)), n))


def row_chunk(row_bytes: int) -> int:
    """Rows a chunk of a row array, whatever the number of rows: a power of two."""
    return min(ROWS, 1 << max(0, int(math.log2(ROW_BYTES / row_bytes))))


def empty(dtype: np.dtype[Any]) -> float | int:
    """The fill value: what a chunk that is not there reads as, and no stored voxel can be."""
    return math.nan if dtype.kind == "f" else -I16_LEVELS - 1


def affine_for(low: float, high: float, dtype: DType) -> tuple[float, float]:
    """(scale, offset) of values in [low, high]: value = stored * scale + offset.

    f16: offset 0, scale the power of two that brings the largest |value| into (1024, 2048]. A power of two makes
    stored * scale exact, f16 holds every integer up to 2048, and 2048 is far from its largest number, 65504: no scan
    overflows, and scans of integers up to 2048 survive unchanged. i16: 65535 levels from low to high. f32: (1, 0).
    """
    peak = max(abs(low), abs(high))
    if dtype == "f32" or peak == 0:
        return 1.0, 0.0
    if dtype == "i16":
        return (high / 2 - low / 2) / I16_LEVELS or 1.0, low / 2 + high / 2
    mantissa, exponent = math.frexp(peak)  # peak = mantissa * 2**exponent, mantissa in [.5, 1)
    return math.ldexp(1.0, (exponent - 1 if mantissa == 0.5 else exponent) - 11) or 1.0, 0.0


def encode_text(names: Sequence[str], width: int = 0) -> NDArray[np.uint8]:
    """(N, L) bytes: UTF-8, NUL-padded; L is `width`, or the multiple of 64 that holds the longest."""
    raw = [name.encode() for name in names]
    width = width or NAME_BYTES * max(1, math.ceil(max(map(len, raw)) / NAME_BYTES))
    return np.frombuffer(b"".join(r.ljust(width, b"\0") for r in raw), np.uint8).reshape(len(raw), width)


def decode_text(rows: NDArray[np.uint8]) -> tuple[str, ...]:
    packed = np.ascontiguousarray(rows).view(f"S{rows.shape[1]}")[:, 0]  # numpy drops the padding
    return tuple(name.decode() for name in packed.tolist())


def keys(ids: Sequence[str]) -> NDArray[np.uint64]:
    """(N,) the address of each scan for random draws, wherever it is kept: 8 bytes of the sha256 of its id."""
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def fingerprint(ids: Sequence[str], checksums: NDArray[np.uint8], settings: Mapping[str, Any]) -> str:
    """sha256 (hex) of the format, the ids in order, the source files' checksums and the ingest settings.

    `checksums` (N, 32) are the scans'. Equal for the same scans ingested in the same way anywhere; paths, dates,
    versions and metadata play no part: a column may be added to a store that is being trained on.
    """
    text = json.dumps([FORMAT, VERSION, list(ids), dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode() + b"\0" + checksums.tobytes()).hexdigest()
