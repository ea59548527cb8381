"""The names and the arithmetic of a store, format 1 (docs/format.md). numpy only: no zarr, no files.

Shapes: N scans, c channels, (X, Y, Z) voxels, L bytes of the longest name.
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
VERSION = 1
AXES = ("scan", "channel", "x", "y", "z")
STATS = ("mean", "std", "min", "max", "nonzero", "scale", "offset")
OK = 1  # in `valid`; 0 means that nothing was written there

Kind = Literal["number", "category"]
DType = Literal["f16", "f32"]
STORED_AS: dict[DType, np.dtype[Any]] = {"f16": np.dtype("<f2"), "f32": np.dtype("<f4")}

SHARD_SCANS = 32
SHARD_BYTES = 128 * 2**20


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


def scans_per_shard(n: int, shape: tuple[int, ...], dtype: DType) -> int:
    """At most 32 scans and 128 MB before compression, at least one; the machine plays no part."""
    volume = math.prod(shape) * STORED_AS[dtype].itemsize
    return max(1, min(SHARD_SCANS, SHARD_BYTES // volume, n))


def scale_for(peak: float, dtype: DType) -> float:
    """The power of two that brings `peak` = max|value| into (1024, 2048] for f16; 1 for f32.

    A power of two makes stored * scale exact, f16 holds every integer up to 2048, and 2048 is far from its
    largest number, 65504: no scan overflows, and scans of integers up to 2048 survive unchanged.
    """
    if dtype == "f32" or peak == 0:
        return 1.0
    mantissa, exponent = math.frexp(peak)  # peak = mantissa * 2**exponent, mantissa in [.5, 1)
    return math.ldexp(1.0, (exponent - 1 if mantissa == 0.5 else exponent) - 11)


def encode_text(names: Sequence[str]) -> NDArray[np.uint8]:
    """(N, L) bytes: UTF-8, NUL-padded; L is at least 1."""
    raw = [name.encode() for name in names]
    width = max([1, *map(len, raw)])
    return np.frombuffer(b"".join(r.ljust(width, b"\0") for r in raw), np.uint8).reshape(len(raw), width)


def decode_text(rows: NDArray[np.uint8]) -> tuple[str, ...]:
    return tuple(bytes(row).rstrip(b"\0").decode() for row in rows)


def fingerprint(ids: Sequence[str], checksums: NDArray[np.uint8], table: str, settings: Mapping[str, Any]) -> str:
    """sha256 (hex) of the format, the ids in order, the source files' checksums and the ingest settings.

    `checksums` (N, 32) are the scans', `table` (hex) is that of participants.tsv. Equal for the same data
    ingested in the same way anywhere; paths, dates and versions play no part.
    """
    text = json.dumps([FORMAT, VERSION, list(ids), table, dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode() + b"\0" + checksums.tobytes()).hexdigest()
