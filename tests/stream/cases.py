"""Stores of every form, made of arrays that the tests keep, and what their rows become, by float64 numpy alone.

n scans, c channels. Volumes are (n, c, *spatial).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.reader import Store

N = 12


@dataclass(frozen=True)
class Case:
    sources: NDArray[np.float64]
    dtype: Any
    codec: Any
    mask: NDArray[np.bool_] | None = None
    step: float = 0.0
    """What rounding to the stored dtype may change in a value."""

    def store(self, folder: Path, name: str) -> Store:
        ids = [f"sub-{i:02d}" for i in range(len(self.sources))]
        shape = self.sources.shape[1:]
        from_arrays(folder / name, self.sources, ids, shape=shape, mask=self.mask, dtype=self.dtype, codec=self.codec)
        return Store.open(folder / name)

    def expected(self, rows: Any, normalise: str, train: Any = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(values, how far off they may be) of `rows`, by the definition of each normalisation."""
        x, axes = self.sources[rows], tuple(range(2, self.sources.ndim))
        if normalise == "volume":
            mean, std = x.mean(axes, keepdims=True), x.std(axes, keepdims=True)
        elif normalise == "dataset":
            pool = self.sources if train is None else self.sources[train]  # every voxel of every training scan
            mean, std = pool.mean((0, *axes), keepdims=True), pool.std((0, *axes), keepdims=True)
        else:
            mean, std = np.zeros(1), np.ones(1)
        value = (x - mean) / std
        # Three roundings of float32, at the size of what is added.
        return value, self.step / std + 2e-7 * (np.abs(x / std) + np.abs(mean / std) + np.abs(value))


def _integers(*shape: int, seed: int) -> NDArray[np.float64]:
    """Up to 2048, which f16 keeps exactly; each scan and channel with its own level."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 1200, (N, shape[0], *[1] * (len(shape) - 1)))
    return (level + rng.integers(0, 800, (N, *shape))).astype(np.float64)


def _packed(*shape: int, seed: int) -> Case:
    """Another mask for each channel; 0 outside."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < np.linspace(0.5, 0.3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return Case(np.where(mask, _integers(*shape, seed=seed) + 1, 0.0), "f16", "none", mask)


def _i16(*shape: int, seed: int) -> Case:
    x = np.random.default_rng(seed).normal(3, 1, (N, *shape))
    return Case(x, "i16", "zstd", step=0.51 * float(np.ptp(x)) / 65534)


def _table(features: int, seed: int) -> Case:
    x = np.random.default_rng(seed).normal(size=(N, features)) * 10.0 ** np.arange(features) + 7
    return Case(x, "f32", "none", step=0.0)


CASES: dict[str, Case] = {
    "dense_f16_lz4": Case(_integers(1, 36, 36, 36, seed=0), "f16", "lz4"),  # 46,656 voxels: ATen shares it out
    "dense_f32_none": Case(np.random.default_rng(1).normal(size=(N, 1, 8, 9, 7)), "f32", "none"),
    "dense_i16_zstd": _i16(1, 8, 9, 7, seed=2),
    "dense_two_channels": Case(_integers(2, 8, 9, 7, seed=3), "f16", "zstd"),
    "packed_f16": _packed(1, 42, 43, 44, seed=4),
    "packed_two_channels": _packed(2, 8, 9, 7, seed=5),
    "images": Case(_integers(3, 8, 8, seed=6), "f16", "lz4"),
    "table": _table(5, seed=7),
}
