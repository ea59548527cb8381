"""The global batch as one process sees it: its own rows, and a way to meet the others.

V views, b subjects here, n subjects in the global batch, D width of z, W processes.

An objective is a sum over all pairs of embeddings. All its weights and similarities are symmetric, so the pairs of a
process's own rows with ALL rows give the complete gradient of its own rows: a process needs the others' rows to read,
a few sums, and nothing in its backward pass. `Batch` is the case of one process that holds everything;
`cauc_dist.gather` has the ones that reach other ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["self", "one", "both"]
"""Whom a block is met by. self: our own rows. one: its owner does its own part. both: we do its owner's part too."""

Act = Callable[[int, Tensor, Kind], Tensor | None]
"""(first subject of the block, the block z (V, m, D), kind) -> for `both`, what its owner is owed, with m second."""


class Batch:
    """Every row is here, z (V, n, D): nothing is sent, and each unordered pair is visited once."""

    world_size = 1
    sums_here = True
    """Whether `total` sums over all blocks in this process, rather than over what each process made of its own."""

    def __init__(self, z: Tensor) -> None:
        if z.ndim != 3:
            raise ValueError(f"z has shape {tuple(z.shape)}; wanted (V, n, D): views, subjects, width")
        self.z, self.n, self.start = z.detach(), z.shape[1], 0

    @property
    def own(self) -> slice:
        """Our subjects in the global batch."""
        return slice(self.start, self.start + self.z.shape[1])

    def gather(self, x: Tensor) -> Tensor:
        """x of every process, of one shape: (W, ...)."""
        return x[None]

    def everyone(self, x: Tensor) -> Tensor:
        """(b, ...) of each subject here -> (n, ...) of all, in global order."""
        return x

    def meet(self, act: Act) -> Tensor | None:
        """Let our rows meet every block of the batch; returns the sum of what others owe us."""
        return act(self.start, self.z, "self")

    def total(self, of: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The sum over all blocks of `of(first subject, z (V, m, D))`, for an `of` that is a sum over subjects."""
        return of(self.start, self.z)

    def whole(self, z: Tensor) -> Tensor:
        """All rows (V, n, D) in this process, differentiable in our rows z: for a loss that every process computes."""
        return z

    def release(self) -> None:
        """Let go of others' rows: the backward pass needs none."""

    def agree(self, upstream: Tensor, tolerance: float = 0.0) -> None:
        """Refuse an upstream gradient (0-d) that differs between processes, where the batch is told to look."""


Exchange = Callable[[Tensor], Batch]
"""Our rows z (V, b, D) -> the batch that they are part of. `Batch` itself: this process holds all of it."""


class NonFinite(ValueError):
    """Embeddings that are NaN or infinite; `subjects` are their places in the global batch, alike on every process."""

    def __init__(self, subjects: list[int], message: str) -> None:
        super().__init__(message)
        self.subjects = subjects

    @classmethod
    def of(cls, batch: Batch) -> "NonFinite":
        """Which rows of z are not finite; a collective: call it on every process."""
        bad = batch.everyone((~batch.z.isfinite().all(-1)).T.contiguous().to(torch.uint8))  # (n, V)
        count, subjects = int(bad.sum()), bad.any(1).nonzero().flatten().tolist()
        places = [f"({view}, {subject})" for subject, view in bad.nonzero().tolist()]
        named = ", ".join(places[:8]) + (f" and {count - 8} more" if count > 8 else "")
        found = f"z is not finite in {count} of {bad.numel()} embeddings, at (view, subject) {named}"
        if not subjects:
            found = "every z is finite, but sums over its pairs are not"
        return cls(
            subjects, f"{found}; wanted finite rows of unit norm. Lower the learning rate, or look at these scans"
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast: bf16 products cost 8e-3 in a cosine, .08 in a logit at tau .1. Also a decorator."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
