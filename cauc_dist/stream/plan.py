"""Which scans a step sees, as a pure function of integers: no state, no files, no torch.

Every rank knows the whole global batch of every step; its own part is a slice. One rank is the slice of length
`batch_size`. Shapes: n = batch_size (GLOBAL), b = n / world_size.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cauc_dist.errors import BadInput

Rows = NDArray[np.int64]


def split(subjects: Sequence[str], folds: int, fold: int) -> tuple[Rows, Rows]:
    """(train rows, held-out rows), ascending: all scans of a subject fall on the same side.

    Subjects are put in the order of the sha256 of their names and dealt like cards, the k-th to part k % folds:
    the same on every machine, in any order of the scans, and parts differ by at most one subject. folds = 1
    trains on everybody and holds nobody out.
    """
    if not 0 <= fold < folds:
        raise BadInput(f"fold {fold} of {folds}", wanted=f"0 to {max(folds, 1) - 1}", do="Count folds from 0")
    names = sorted(set(subjects), key=lambda name: hashlib.sha256(name.encode()).digest())
    if folds > len(names):
        raise BadInput(f"{folds} folds of {len(names)} subjects", wanted="a subject in each", do="Ask for fewer folds")
    out = set(names[fold::folds]) if folds > 1 else set()
    held = np.array([name in out for name in subjects], bool)
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def per_rank(batch_size: int, world_size: int) -> int:
    """b: subjects a step on one rank; BadInput where the global batch does not divide."""
    if batch_size % world_size or batch_size < 1:
        below = batch_size // world_size * world_size
        use = f"{below} or {below + world_size}" if below > 0 else f"{world_size}"
        raise BadInput(
            f"batch_size {batch_size} does not divide over {world_size} ranks",
            wanted=f"a multiple of {world_size}",
            do=f"Use {use}",
        )
    return batch_size // world_size


def permutation(n: int, seed: int, epoch: int) -> Rows:
    """(n,) a permutation of 0..n-1 with the address (seed, epoch).

    The order of n raw Philox numbers, keyed by the address: numpy promises the raw stream of a bit generator
    for ever, and that of Generator.permutation not. Ties (1 in 2**64 a pair) keep their order.
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


class Plan:
    """The order of training rows over all epochs; the last incomplete batch of an epoch is dropped."""

    def __init__(self, rows: ArrayLike, batch_size: int, seed: int) -> None:
        self.rows: Rows = np.array(rows, np.int64)
        self.batch_size, self.seed = batch_size, seed
        if len(np.unique(self.rows)) < len(self.rows):
            raise ValueError(f"{len(self.rows)} rows with repeats; wanted each row once")
        if not 1 <= batch_size <= len(self.rows):
            found = f"batch_size {batch_size} for {len(self.rows)} training scans"
            raise BadInput(found, wanted="at least one full batch", do=f"Use 1 to {len(self.rows)}")
        self._cached: tuple[int, Rows] = (-1, self.rows)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.batch_size

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Rows:
        """(n,) rows of the global batch, computed without the steps before; O(rows) at the first step of an epoch."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[k * self.batch_size : (k + 1) * self.batch_size].copy()

    def rank_batch(self, step: int, rank: int, world_size: int) -> Rows:
        """(b,) rows of one rank: the rank-th of world_size equal slices of the global batch."""
        b = per_rank(self.batch_size, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}; wanted 0 to {world_size - 1}")
        return self.batch(step)[rank * b : (rank + 1) * b]

    def _order(self, epoch: int) -> Rows:
        cached, order = self._cached  # one read: another thread may put another epoch here
        if cached != epoch:
            order = self.rows[permutation(len(self.rows), self.seed, epoch)]
            self._cached = (epoch, order)
        return order
