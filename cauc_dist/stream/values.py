"""From what is stored to what an encoder sees: float32 volumes, normalised by one affine map a channel.

b samples, c channels, M voxels of the mask of a packed store, N scans of the store.
"""

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cauc_dist.errors import BadInput

Normalise = Literal["volume", "dataset", "none"]
Floats = NDArray[np.float64]


class Volumes(Protocol):
    """What is read from: a store.reader.Store, or anything like it."""

    @property
    def ids(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def row_shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def mask(self) -> NDArray[np.bool_] | None: ...
    @property
    def stats(self) -> dict[str, Floats]: ...
    def read_into(self, i: int, out: NDArray[Any]) -> None: ...


class Values(NamedTuple):
    """value = stored * scale + offset, and `background` outside the mask: (N, c) each."""

    scale: Floats
    offset: Floats
    background: Floats


def values(store: Volumes, normalise: Normalise, rows: NDArray[np.int64] | None = None) -> Values:
    """The map of every scan. `dataset` takes mean and variance of each channel over `rows` (default: all scans).

    volume: zero mean and unit variance in each channel of each scan. Computed in float64 from the source's statistics.
    """
    if len(store.shape) == 1:
        return _of_features(store, normalise, rows)
    scale, offset = store.stats["scale"], store.stats["offset"]
    if normalise == "none":
        mean, std = np.zeros_like(scale), np.ones_like(scale)
    elif normalise == "volume":
        mean, std = store.stats["mean"], store.stats["std"]
    elif normalise == "dataset":
        some = slice(None) if rows is None else rows
        means, variances = store.stats["mean"][some], store.stats["std"][some] ** 2
        center = means.mean(0)
        mean = np.broadcast_to(center, scale.shape)
        std = np.broadcast_to(np.sqrt((variances + (means - center) ** 2).mean(0)), scale.shape)
    else:
        raise BadInput(f"normalise {normalise!r}", wanted="volume, dataset or none", do="Use one of the three")
    return Values(scale / std, (offset - mean) / std, -mean / std)


def _of_features(store: Volumes, normalise: Normalise, rows: NDArray[np.int64] | None) -> Values:
    """One map for all rows of a table; `dataset` reads the training rows once."""
    shape = (len(store.ids), *store.shape)
    mean, squares, std = np.zeros(store.shape), np.zeros(store.shape), np.ones(store.shape)
    if normalise == "dataset":
        some, row = np.arange(len(store.ids)) if rows is None else rows, np.empty(store.row_shape, store.dtype)
        for n, i in enumerate(some.tolist(), start=1):  # Welford (1962): sums of squares would cancel
            store.read_into(i, row)
            away = row - mean
            mean += away / n
            squares += away * (row - mean)
        std = np.sqrt(squares / len(some))
        std[std == 0] = 1.0  # a feature that never varies says nothing: it becomes 0
    elif normalise != "none":
        do = "Use dataset: each feature by its mean and deviation over the training scans"
        raise BadInput(f"normalise {normalise} for tables", wanted="dataset or none", do=do)
    return Values(*(np.broadcast_to(x, shape) for x in (1 / std, -mean / std, np.zeros(store.shape))))


class Expand:
    """Rows as stored to float32 volumes."""

    def __init__(self, store: Volumes, values: Values, device: torch.device | None = None) -> None:
        self.table = len(store.shape) == 1
        self.shape, self.values, self.device = store.shape, values, device or torch.device("cpu")
        self._index: list[Tensor] | None = None
        self._ends = [int(np.prod(store.shape[1:])) * (c + 1) for c in range(store.shape[0])]
        if store.mask is not None:
            per_channel = store.mask.reshape(store.shape[0], -1)
            self._index = [torch.from_numpy(np.flatnonzero(mask)).to(self.device) for mask in per_channel]
            self._ends = np.cumsum([len(index) for index in self._index]).tolist()

    def row(self, raw: NDArray[Any], i: int, out: Tensor, scratch: Tensor) -> None:
        """Scan i from raw (row_shape) into out (c, *spatial); in any thread, in this thread only.

        scratch (M,) float32, for packed rows. What `out` holds outside the mask stays: see `background`.
        """
        if self.table:
            scale, offset = (torch.from_numpy(v[i].astype(np.float32)) for v in self.values[:2])
            out.copy_(torch.from_numpy(raw)).mul_(scale).add_(offset)
            return
        source, flat, start = torch.from_numpy(raw.reshape(-1)), out.view(self.shape[0], -1), 0
        for c, stop in enumerate(self._ends):
            target = flat[c] if self._index is None else scratch[start:stop]
            _map(source[start:stop], target, self.values.scale[i, c], self.values.offset[i, c])
            if self._index is not None:
                flat[c].scatter_(0, self._index[c], target)
            start = stop

    def background(self, i: int, out: NDArray[np.float32]) -> None:
        """Fill out (c, *spatial) with what scan i is outside the mask."""
        out.reshape(self.shape[0], -1)[...] = self.values.background[i][:, None]

    def batch(self, raw: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """(b, *row_shape) -> (b, c, *spatial) float32, all on the device: a few kernels a channel, whatever b."""
        scale, offset, background = (torch.from_numpy(v[rows]).float().to(self.device) for v in self.values)  # (b, c)
        if self.table:
            return (raw * scale).add_(offset)
        flat = raw.view(len(rows), -1)
        out = torch.empty((len(rows), *self.shape), device=self.device)
        channels, start = out.view(len(rows), self.shape[0], -1), 0
        for c, stop in enumerate(self._ends):
            values = (flat[:, start:stop] * scale[:, c, None]).add_(offset[:, c, None])  # raw stays as it is
            if self._index is None:
                channels[:, c] = values
            else:
                channels[:, c] = background[:, c, None]
                channels[:, c].scatter_(1, self._index[c].expand_as(values), values)
            start = stop
        return out


def _map(source: Tensor, target: Tensor, scale: float, offset: float) -> None:
    """target = source * scale + offset. torch casts f16 to f32 several times faster than numpy.

    Three operations on the whole: cut to pieces that stay in cache it is slower, since threads queue for Python's lock.
    """
    target.copy_(source)
    if scale != 1.0:
        target.mul_(scale)
    if offset != 0.0:
        target.add_(offset)
