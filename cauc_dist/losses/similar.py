"""The metadata weights as a linear map, W x: what alignment and the positives of InfoNCE need of them.

n subjects, b of them here     W (n, n) weights, diagonal 1     a (n,), v (n,)     zbar_j (D,) sum of a subject's views

Four ways, the first that applies:
matrix     a few hundred subjects: W itself.
distinct   metadata of few distinct values (whole years, classes): sums by value, then the small kernel, in float64.
low rank   few smooth columns: W_ij = C[cat_i, cat_j] L_i.L_j, C the kernel of the categories and L a pivoted Cholesky
           factor of the rest, on its distinct values. The residual of that factorisation is positive semi-definite, so
           that its largest diagonal number bounds every entry of it: the certificate. fp32 only.
exact      tiles of W, for everything else.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from cauc_dist.kernels import Kernel, Rows
from cauc_dist.losses import tiled
from cauc_dist.losses.batch import Batch

SMALL = 512
"""Up to so many subjects W itself is held: a tile of it would be no smaller."""


class Similar(Protocol):
    """W without its diagonal."""

    def row_sums(self, batch: Batch, v: Tensor | None = None) -> Tensor:
        """sum_{j!=i} w_ij v_j (n,) float64; v (n,), or 1."""

    def pull(self, batch: Batch, a: Tensor) -> Tensor:
        """sum_{j!=i} w_ij (a_i + a_j) zbar_j (b, D)."""


class Alone:
    """W = identity: no subject is like another."""

    def row_sums(self, batch: Batch, v: Tensor | None = None) -> Tensor:
        return torch.zeros(batch.n, dtype=torch.float64, device=batch.z.device)

    def pull(self, batch: Batch, a: Tensor) -> Tensor:
        return torch.zeros_like(batch.z[0])


@dataclass(frozen=True, eq=False)
class Exact:
    """W in tiles."""

    weights: tiled.Weights

    def row_sums(self, batch: Batch, v: Tensor | None = None) -> Tensor:
        return batch.everyone(tiled.row_sums(batch, self.weights, True, v))

    def pull(self, batch: Batch, a: Tensor) -> Tensor:
        return tiled.pull(batch, self.weights, a)


@dataclass(frozen=True, eq=False)
class Matrix:
    """W itself, its diagonal 0, in the precision of z."""

    w: Tensor

    def row_sums(self, batch: Batch, v: Tensor | None = None) -> Tensor:
        return self.w.sum(1, dtype=torch.float64) if v is None else self.w.to(v) @ v

    def pull(self, batch: Batch, a: Tensor) -> Tensor:
        a = a.to(self.w)

        def products(start: int, z: Tensor) -> Tensor:
            run = slice(start, start + z.shape[1])
            return (self.w[:, run] * (a[:, None] + a[run])) @ z.sum(0)  # (n, D)

        return batch.total(products)[batch.own]


@dataclass(frozen=True, eq=False)
class Factored:
    """W_ij = C[group_i, group_j] L_i.L_j off the diagonal."""

    group: Tensor
    """(n,) the category of each subject, 0 ... G-1."""
    among: Tensor | None = None
    """C (G, G) float64; None: the identity."""
    factor: Tensor | None = None
    """L (n, r) float64; None: 1."""

    @cached_property
    def groups(self) -> int:
        return int(self.group.max()) + 1 if self.among is None else len(self.among)

    @property
    def rank(self) -> int:
        return 1 if self.factor is None else self.factor.shape[1]

    def row_sums(self, batch: Batch, v: Tensor | None = None) -> Tensor:
        x = torch.ones(batch.n, 1, dtype=torch.float64, device=self.group.device)
        x = x if v is None else v.to(x)[:, None]
        everyone = slice(0, batch.n)
        sums = self._add(x.new_zeros((self.groups, self.rank, 1)), everyone, x)
        return self._from(sums, everyone)[:, 0] - self._diagonal(everyone) * x[:, 0]

    def pull(self, batch: Batch, a: Tensor) -> Tensor:
        a = a.double()

        def sums(start: int, z: Tensor) -> Tensor:
            total = a.new_zeros((self.groups, self.rank, 2 * z.shape[2]))
            for run in tiled.runs(slice(start, start + z.shape[1]), PART):
                x = z[:, run.start - start : run.stop - start].sum(0, dtype=torch.float64)
                self._add(total, run, torch.cat([x, a[run, None] * x], 1))
            return total

        total = batch.total(sums)
        return torch.cat([self._part(batch, run, total, a) for run in tiled.runs(batch.own, PART)] or [batch.z[0]])

    def _part(self, batch: Batch, run: slice, total: Tensor, a: Tensor) -> Tensor:
        x = batch.z[:, run.start - batch.start : run.stop - batch.start].sum(0, dtype=torch.float64)
        plain, scaled = self._from(total, run).chunk(2, dim=1)
        ours = a[run, None]
        return (ours * plain + scaled - (self._diagonal(run)[:, None] * 2 * ours) * x).to(batch.z.dtype)

    def _add(self, sums: Tensor, run: slice, x: Tensor) -> Tensor:
        """Adds to sums (G, r, E), for each category, L_j x_j of its subjects in the run; x (m, E)."""
        group = self.group[run]
        if self.factor is None:
            sums[:, 0].index_add_(0, group, x)
            return sums
        for g, members in enumerate(self._members(group)):
            if len(members):
                sums[g].addmm_(self.factor[run][members].T, x[members])
        return sums

    def _from(self, sums: Tensor, run: slice) -> Tensor:
        """(m, E): L_i times what the categories of i's likes have summed."""
        group = self.group[run]
        if self.among is not None:
            sums = torch.tensordot(self.among, sums, 1)
        if self.factor is None:
            return sums[group, 0]
        out = sums.new_empty((len(group), sums.shape[2]))
        for g, members in enumerate(self._members(group)):
            if len(members):
                out[members] = self.factor[run][members] @ sums[g]
        return out

    def _members(self, group: Tensor) -> list[Tensor]:
        if self.groups == 1:
            return [torch.arange(len(group), device=group.device)]
        counts = torch.bincount(group, minlength=self.groups)
        return list(group.argsort(stable=True).tensor_split(counts.cumsum(0)[:-1].tolist()))

    def _diagonal(self, run: slice) -> Tensor:
        """What the form above gives for a subject and itself (not 1 where values are missing)."""
        group = self.group[run]
        among = torch.ones(len(group), dtype=torch.float64, device=group.device)
        among = among if self.among is None else self.among[group, group]
        return among if self.factor is None else among * self.factor[run].square().sum(1)


PART = 4096
"""Subjects whose embeddings are held in float64 at a time."""


def similar(weights: tiled.Weights, y: Tensor, batch: Batch) -> Similar:
    """The way to W x for metadata y (n, k) and the embeddings of a batch."""
    if len(y) <= SMALL:
        everyone = slice(0, len(y))
        return Matrix(weights.alike(everyone, everyone))
    found = None
    if len(batch.z) > 1:  # with one view a row may have next to no weight, which taking its diagonal off would drown
        found = distinct(weights.kernel, y)
        # GPUs are faster at exact tiles; and unlike machines may find factors that do not fit each other.
        if found is None and batch.z.dtype == torch.float32 and batch.z.device.type == "cpu" and batch.sums_here:
            found = low_rank(weights.kernel, y)
    return found or Exact(weights)


def distinct(kernel: Kernel, y: Tensor, most: int = 1024) -> Factored | None:
    """By distinct rows of metadata, where there are at most `most`, and an eighth of n; exact for every kernel."""
    group, few = _unique(kernel.rows(y, torch.float64))
    return None if len(few) > min(most, len(y) // 8) else Factored(group, kernel(few, few))


def low_rank(kernel: Kernel, y: Tensor, tolerance: float | None = None, most: int = 256) -> Factored | None:
    """By category and pivoted Cholesky; None where the rank or the number of categories is not small.

    `tolerance` bounds every entry of W that is lost; by default eps / (2 n) of fp32: a row sum keeps its precision.
    """
    if not kernel.positive_semidefinite:
        return None
    n = len(y)
    rows = kernel.rows(y, torch.float64)
    # In a product, columns of categories factor out; in a mean they do not.
    split = kernel.combine == "product"
    categories = [k for k, factor in enumerate(kernel.factors) if split and factor.kind == "delta"]
    smooth = [k for k in range(len(kernel.factors)) if k not in categories]
    group, among = torch.zeros(n, dtype=torch.long, device=y.device), None
    if categories:
        group, few = _unique(_columns(rows, categories))
        if len(few) > min(most, n // 8):
            return None
        among = kernel.only(categories)(few, few)
    if not smooth:
        return Factored(group, among)
    place, few = _unique(_columns(rows, smooth))
    tolerance = torch.finfo(torch.float32).eps / (2 * n) if tolerance is None else tolerance
    groups = 1 if among is None else len(among)
    factor = pivoted_cholesky(kernel.only(smooth), few, tolerance, min(most, n // (8 * groups)))
    return None if factor is None else Factored(group, among, factor[place])


def pivoted_cholesky(kernel: Kernel, rows: Rows, tolerance: float, most: int) -> Tensor | None:
    """L (U, r) with kernel(rows, rows) = L L' + residual, every entry of the residual at most `tolerance`.

    None where that takes more than `most` columns. Memory U r, time U r^2   (Harbrecht, Peters & Schneider 2012).
    """
    residual = _diagonal(kernel, rows)
    columns = residual.new_empty((most, len(residual)))
    for r in range(most):
        pivot = int(residual.argmax())
        largest = float(residual[pivot])
        if largest <= tolerance:
            return columns[:r].T.contiguous()
        column = kernel(rows, rows[pivot : pivot + 1])[:, 0] - columns[:r].T @ columns[:r, pivot]
        columns[r] = column / math.sqrt(largest)
        residual = (residual - columns[r].square()).clamp_(min=0)
        residual[pivot] = 0
    return None


def _diagonal(kernel: Kernel, rows: Rows, size: int = 256) -> Tensor:
    """(U,): the kernel of each row with another subject of the same metadata: 1 unless a value is missing."""
    if rows.missing is None:
        return torch.ones(len(rows), dtype=rows.y.dtype, device=rows.y.device)
    return torch.cat([kernel(rows[run], rows[run]).diagonal() for run in tiled.runs(slice(0, len(rows)), size)])


def _unique(rows: Rows) -> tuple[Tensor, Rows]:
    """(which of the distinct rows each row is (n,), the distinct rows)."""
    keys = rows.y if rows.missing is None else torch.cat([rows.y, rows.missing.to(rows.y)], 1)
    if keys.shape[1] == 1:  # sorted as numbers, which is faster
        values, group = torch.unique(keys[:, 0], return_inverse=True)
    else:
        values, group = torch.unique(keys, dim=0, return_inverse=True)
    first = torch.full((len(values),), len(group), device=group.device)  # a row that has each of them
    first.scatter_reduce_(0, group, torch.arange(len(group), device=group.device), "amin")
    missing = None if rows.missing is None else rows.missing[first]
    return group, Rows(rows.y[first], missing, None if rows.fill is None else rows.fill[:, first])


def _columns(rows: Rows, columns: list[int]) -> Rows:
    return Rows(
        rows.y[:, columns],
        None if rows.missing is None else rows.missing[:, columns],
        None if rows.fill is None else rows.fill[:, :, columns],
    )
