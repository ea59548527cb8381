"""Rows into shards: encoded one at a time, appended to a file that appears whole or not at all.

Memory is one row, whatever a shard holds. zarr-python builds a shard whole before it writes (16-42 volumes/s of
121x145x121 against 169 here), and two of its writers on one shard lose half the rows in silence: here each shard has
one owner, which writes it once.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray

from cauc_dist.durable import sync
from cauc_dist.store import layout
from cauc_dist.store.chunks import ABSENT, crc32c, shard_name
from cauc_dist.store.layout import Codec, DType, Layout
from cauc_dist.store.sources import Unusable

Floats = NDArray[np.float64]

BLOCK = 32768  # values
LARGEST = 1e140  # whose squares, summed over a volume, are still numbers of float64


@dataclass(frozen=True)
class Form:
    """How rows are kept. `mask` (c, *spatial) bool: packed, only its voxels are stored; None: dense."""

    shape: tuple[int, ...]
    """(c, *spatial) of a volume."""
    dtype: DType
    codec: Codec
    mask: NDArray[np.bool_] | None = None

    @property
    def layout(self) -> Layout:
        return "dense" if self.mask is None else "packed"

    @property
    def row(self) -> tuple[int, ...]:
        return self.shape if self.mask is None else (int(self.mask.sum()),)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row) * layout.STORED_AS[self.dtype].itemsize


@dataclass(frozen=True)
class Encoded:
    """A row as stored, and what is kept beside it: `stats` (7, c) in the order of layout.STATS, of the source."""

    row: NDArray[Any]
    stats: Floats
    max_abs: float
    """Largest |stored - source|."""
    max_of_range: float
    """The same over the channel's own range (max - min), the worst channel."""
    psnr_db: float
    """Peak = the channel's range; of the worst channel. inf: exact."""


class Encoder:
    """Volumes to rows of one form. Not for several threads: it keeps the mask's index and scratch memory."""

    def __init__(self, form: Form) -> None:
        self.form = form
        mask = form.mask if form.mask is None else form.mask.reshape(form.shape[0], -1)
        self._index = None if mask is None else [np.flatnonzero(channel) for channel in mask]
        self._kept: dict[tuple[int, Any], NDArray[Any]] = {}

    def encode(self, x: NDArray[Any]) -> Encoded:
        """x (c, *spatial), any real dtype; raises Unusable where nothing can be learnt from it, or it does not fit."""
        if x.dtype not in (np.float32, np.float64):
            x = x.astype(np.float64)
        if x.ndim == 1:
            return _features(x)
        channels = np.ascontiguousarray(x).reshape(len(x), -1)
        parts: list[NDArray[Any]] = []
        stats, errors = np.empty((len(layout.STATS), len(x))), []
        for c, channel in enumerate(channels):
            values, zeros = self._inside(c, channel)
            *summary, low, high, nonzero = _summary(values, zeros)
            if low == high:
                raise Unusable(f"constant ({low:g} everywhere)")
            scale, offset = layout.affine_for(low, high, self.form.dtype)
            stored, error, square = _stored(values, scale, offset, self.form.dtype)
            one = values.size > 0 and _constant(stored)
            if one and (not zeros or float(stored[0]) * scale + offset == 0):
                raise Unusable(f"its values differ too little for {self.form.dtype} ({low:.9g} to {high:.9g})")
            stats[:, c] = *summary, low, high, nonzero, scale, offset
            parts.append(stored)
            errors.append((error, high - low, math.sqrt(square / channel.size)))
        row = parts[0] if len(parts) == 1 else np.concatenate(parts)
        worst = max(rmse / span for _, span, rmse in errors if span) if any(s for _, s, _ in errors) else 0.0
        return Encoded(
            row.reshape(self.form.row),
            stats,
            max_abs=max(error for error, _, _ in errors),
            max_of_range=max((error / span for error, span, _ in errors if span), default=0.0),
            psnr_db=-20 * math.log10(worst) if worst else math.inf,
        )

    def _inside(self, c: int, channel: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """The voxels that are stored, and how many zeros are left out."""
        if self._index is None:
            return channel, 0
        values = np.take(channel, self._index[c], mode="clip", out=self._scratch(c, channel.dtype))
        outside = _nonzero(channel) - _nonzero(values)
        if outside:
            raise Unusable(f"{outside} voxels outside the store's mask are not 0")
        return values, channel.size - values.size

    def _scratch(self, c: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        assert self._index is not None
        if (c, dtype) not in self._kept:
            self._kept[c, dtype] = np.empty(len(self._index[c]), dtype)
        return self._kept[c, dtype]


def _features(x: NDArray[Any]) -> Encoded:
    """A row of a table: float32, one set of statistics for all its features."""
    if bad := np.count_nonzero(~np.isfinite(x)):
        raise Unusable(f"{bad} features are NaN or infinite")
    with np.errstate(over="ignore"):
        row = x.astype(np.float32)
    if not np.isfinite(row).all():
        raise Unusable(f"values up to {np.abs(x).max():g} do not fit f32")
    # No range to compare an error with: the largest feature's size has to do.
    error, size = np.abs(row - x.astype(np.float64)), float(np.abs(x).max())
    rmse = math.sqrt(float(np.square(error).mean()))
    psnr = 20 * math.log10(size / rmse) if rmse else math.inf
    stats = np.array([[*_summary(x, 0), 1.0, 0.0]]).T
    return Encoded(row, stats, float(error.max()), float(error.max()) / size if size else 0.0, psnr)


def _summary(values: NDArray[Any], zeros: int) -> tuple[float, float, float, float, int]:
    """(mean, std, min, max, nonzero) of `values` and as many zeros more, in float64; Unusable where not finite."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Unusable(f"{values.size - np.count_nonzero(np.isfinite(values))} voxels are NaN or infinite")
    if max(-low, high) > LARGEST:
        raise Unusable(f"values up to {max(-low, high):g}: too large to compute with")
    n = values.size + zeros
    mean = math.fsum(float(block.sum(dtype=np.float64)) for block in _blocks(values)) / n
    squares = math.fsum(float(np.square(block.astype(np.float64) - mean).sum()) for block in _blocks(values))
    if zeros:
        low, high = min(low, 0.0), max(high, 0.0)
    return mean, math.sqrt((squares + zeros * mean * mean) / n), low, high, _nonzero(values)


def _nonzero(values: NDArray[Any]) -> int:
    return int(np.count_nonzero(values != 0))  # numpy counts bools three times as fast as floats


def _constant(values: NDArray[Any]) -> bool:
    low, high = torch.from_numpy(values).aminmax()  # numpy takes 2 ns for a value of float16, torch .1
    return bool(low == high)


def _stored(values: NDArray[Any], scale: float, offset: float, dtype: DType) -> tuple[NDArray[Any], float, float]:
    """(stored, largest |error|, sum of squared errors), the error being that against the source, in float64."""
    stored = np.empty(values.shape, layout.STORED_AS[dtype])
    largest, squares = 0.0, []
    # A float32 source times a power of two, rounded to float16 and taken off itself: float32 holds each step exactly.
    narrow = values.dtype == np.float32 and dtype == "f16" and 2.0**-100 < scale < 2.0**100
    for source, out in zip(_blocks(values), _blocks(stored), strict=True):
        if narrow:
            torch.from_numpy(out).copy_(torch.from_numpy(source * np.float32(1 / scale)))  # 20 times numpy's cast
            error = torch.from_numpy(out).float().numpy()
        else:  # numpy rounds: torch would twice, by way of float32
            scaled = source if dtype == "f32" else (source.astype(np.float64) - offset) / scale
            with np.errstate(over="ignore"):
                out[...] = np.rint(scaled).clip(-layout.I16_LEVELS, layout.I16_LEVELS) if dtype == "i16" else scaled
            error = torch.from_numpy(out).float().double().numpy()
        error *= error.dtype.type(scale)
        error += error.dtype.type(offset)
        error -= source
        largest = max(largest, float(error.max()), -float(error.min()))
        squares.append(float(np.square(error, dtype=np.float64).sum()))
    if not math.isfinite(largest):
        raise Unusable(f"values up to {np.abs(values).max():g} do not fit {dtype}")
    return stored, largest, math.fsum(squares)


def _blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Parts that stay in cache with what is computed from them: a volume's worth of fresh memory costs page faults."""
    return (values[k : k + BLOCK] for k in range(0, values.size, BLOCK))


def _codec(form: Form) -> Any:
    if form.codec == "lz4":
        return Blosc("lz4", 5, Blosc.SHUFFLE)
    return Zstd(level=3, checksum=True) if form.codec == "zstd" else None


def shard_path(array: Path, k: int, form: Form) -> Path:
    return array.parent / shard_name(array.name, k, len(form.row) + 1)


class ShardWriter:
    """One shard, row by row, under a temporary name; `close` makes it durable and gives it its name."""

    def __init__(self, path: Path, rows: int, form: Form) -> None:
        self._target = path
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}.partial")
        self._file = self._temporary.open("wb")
        self._index = np.full((rows, 2), ABSENT, "<u8")
        self._codec = _codec(form)

    def put(self, j: int, row: NDArray[Any]) -> None:
        data = np.ascontiguousarray(row).reshape(-1).view(np.uint8)
        if self._codec is not None:
            data = np.frombuffer(self._codec.encode(row), np.uint8)
        self._index[j] = self._file.tell(), len(data) + 4
        self._file.write(data.data)
        self._file.write(crc32c(data).data)

    def close(self) -> int:
        """Size of the finished shard, bytes."""
        index = self._index.reshape(-1).view(np.uint8)
        self._file.write(index.data)
        self._file.write(crc32c(index).data)
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._target)
        sync(self._target.parent)
        return size

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Where `close` was not reached, nothing stays."""
        if not self._file.closed:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
