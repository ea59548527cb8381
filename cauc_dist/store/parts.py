"""The parts of an ingest that any process may do: a look at some scans, or a shard of them, each told in arrays."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cauc_dist.store import layout, sources
from cauc_dist.store.shards import Encoder, Form, ShardWriter, shard_path
from cauc_dist.store.sources import Item, Unusable

Told = dict[str, NDArray[Any]]
Take = Callable[[], tuple[NDArray[Any], bytes | None]]
T = TypeVar("T")


@dataclass(frozen=True)
class Part(ABC):
    """Some items, and how they are read: as (c, *spatial) of `shape`."""

    name: str
    """Of its file in the journal."""
    items: tuple[Item, ...]
    shape: tuple[int, ...]
    resample: tuple[float, float, float] | None

    def read(self, item: Item) -> NDArray[Any]:
        """The scan in its window; raises Unusable."""
        return central(sources.read(item, self.resample), self.shape[1:])

    @abstractmethod
    def do(self) -> Told:
        """What the journal keeps."""


@dataclass(frozen=True)
class Survey(Part):
    """Which voxels are not 0 in every scan."""

    def do(self) -> Told:
        """`union`: the voxels that some usable scan has, as bits."""
        union = np.zeros(self.shape, bool)
        for item in self.items:
            x = or_reason(partial(self.read, item))
            if not isinstance(x, str) and _usable(x):  # one that is not: `Shard` says why
                union |= x != 0
        return {"union": np.packbits(union)}


def _usable(x: NDArray[Any]) -> bool:
    """Finite, and no channel constant: what will be set aside must not widen the mask of the others."""
    channels = x.reshape(len(x), -1)
    low, high = channels.min(1), channels.max(1)
    return bool(np.isfinite(low).all() and np.isfinite(high).all() and (low != high).all())


def coverage(union: NDArray[np.uint8], shape: tuple[int, ...]) -> float:
    """The part of the voxels of `shape` that is set in `union`."""
    return float(np.unpackbits(union, count=math.prod(shape)).mean())


@dataclass(frozen=True)
class Shard(Part):
    """Shard k of `array`: at most `per` rows. One process writes it, whole, once."""

    array: Path
    k: int
    per: int
    form: Form

    @property
    def path(self) -> Path:
        return shard_path(self.array, self.k, self.form)

    def do(self) -> Told:
        """Read, encode, write: see `write_shard`."""
        return write_shard(self.path, self.per, self.form, [partial(self._take, item) for item in self.items])

    def _take(self, item: Item) -> tuple[NDArray[Any], bytes]:
        return self.read(item), sources.checksum(item)


def write_shard(path: Path, per: int, form: Form, takes: Sequence[Take]) -> Told:
    """One shard of the scans that `takes` give as (x, checksum of the source), or raise Unusable for.

    Returns what is kept beside the voxels: a row a scan in `valid`, `stats` (7, c), `checksums`, `contents` (sha256 of
    the row as stored), `errors` (max_abs, max_of_range, psnr_db) and `reasons` ("": it is stored); `size` of the file.
    """
    n = len(takes)
    told: Told = {
        "valid": np.full(n, layout.SET_ASIDE, np.uint8),
        "stats": np.zeros((n, len(layout.STATS), layout.channels(form.shape))),
        "checksums": np.zeros((n, 32), np.uint8),
        "contents": np.zeros((n, 32), np.uint8),
        "errors": np.zeros((n, 3)),
    }
    reasons, encoder = [""] * n, Encoder(form)
    with ShardWriter(path, per, form) as writer:
        for j, take in enumerate(takes):
            try:
                x, checksum = take()
                encoded = encoder.encode(x)
            except Unusable as error:
                reasons[j] = str(error)
                continue
            writer.put(j, encoded.row)
            told["valid"][j] = layout.OK
            told["stats"][j] = encoded.stats
            content = hashlib.sha256(encoded.row.data).digest()
            told["checksums"][j] = np.frombuffer(checksum or content, np.uint8)
            told["contents"][j] = np.frombuffer(content, np.uint8)
            told["errors"][j] = encoded.max_abs, encoded.max_of_range, encoded.psnr_db
        size = writer.close()
    return told | {"reasons": np.array(reasons), "size": np.array(size)}


def do(part: Part) -> tuple[str, int, Told]:
    """(name, scans, what it tells): in a worker process."""
    return part.name, len(part.items), part.do()


def or_reason(take: Callable[[], T]) -> T | str:
    """What `take` gives, or in words why the scan is not usable."""
    try:
        return take()
    except Unusable as error:
        return str(error)


def central(x: NDArray[Any], window: tuple[int, ...]) -> NDArray[Any]:
    """The central box of x (c, *spatial): element (side - wanted) // 2 comes first where it cuts.

    Where it pads, (wanted - side) // 2 zeros go first.
    """
    for axis, wanted in enumerate(window, start=1):
        side = x.shape[axis]
        if side >= wanted:
            first = (side - wanted) // 2
            x = x[(slice(None),) * axis + (slice(first, first + wanted),)]
        else:
            before = (wanted - side) // 2
            x = np.pad(x, [(before, wanted - side - before) if a == axis else (0, 0) for a in range(x.ndim)])
    return np.ascontiguousarray(x)
