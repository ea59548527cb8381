"""The pair sums of `cauc_dist.losses.tiled` through the Triton kernels of `cauc_dist.losses.fused`, by the same names.

A launch takes all rows of one side against all columns of the other: on a GPU that beats the upper triangle, which
would need atomic additions. What the kernels cannot do is left to the tiles: see `usable`.
"""

import math
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cauc_dist.losses.batch import Batch, Kind

if TYPE_CHECKING:
    from cauc_dist.losses.fused import Side
    from cauc_dist.losses.tiled import Weights


SMALLEST = 16_384
"""Embeddings from which on the kernels beat plain tiles: on an H200 a launch or tile of less is all overhead."""


class Known(NamedTuple):
    """Metadata as the kernels want it."""

    u: Tensor | None
    """(n, K): similarity 2^(-sum_k (u_ik - u_jk)^2)."""
    cat: Tensor | None
    """(n,) int32, one code of all categories."""
    site: Tensor | None
    """(n,) int32, labels within which pairs repel."""


def usable(batch: Batch, kappa: float = 1.0, weights: "Weights | None" = None) -> bool:
    """Whether the kernels apply: fp32 on an NVIDIA GPU, D <= 256, kappa <= 40, and metadata that they know."""
    if (not batch.z.is_cuda and os.environ.get("TRITON_INTERPRET") != "1") or len(batch.z) * batch.n < SMALLEST:
        return False
    try:
        from cauc_dist.losses import fused
    except ImportError:  # a CUDA build of torch brings triton; without it the tiles do
        return False
    if kappa > fused.LARGEST or not fused.usable(batch.z):
        return False
    return weights is None or weights.known is not None


def known(weights: "Weights") -> Known | None:
    """The metadata of a product of gaussian and delta columns in which no value is missing; None for others."""
    kernel, rows = weights.kernel, weights.rows
    smooth = [k for k, factor in enumerate(kernel.factors) if factor.kind == "gaussian"]
    categories = [k for k, factor in enumerate(kernel.factors) if factor.kind == "delta"]
    if kernel.combine != "product" or rows.missing is not None or rows.y.dtype != torch.float32 or len(smooth) > 4:
        return None
    if len(smooth) + len(categories) < len(kernel.factors):
        return None
    unit = [math.sqrt(0.5 / math.log(2)) / kernel.factors[k].scale for k in smooth]
    u = (rows.y[:, smooth] * rows.y.new_tensor(unit)).contiguous() if smooth else None
    cat = torch.unique(rows.y[:, categories], dim=0, return_inverse=True)[1].int() if categories else None
    return Known(u, cat, None if weights.labels is None else weights.labels.int())


def side(batch: Batch, z: Tensor, start: int, view: int, known: Known | None, scale: Tensor | None) -> "Side":
    """Embeddings z (v, m, D) of views `view`... and subjects `start`...; scale (V, n), or (1, n) for all views."""
    from cauc_dist.losses.fused import Side

    views, m, width = z.shape
    run = slice(start, start + m)
    subject = torch.arange(start, start + m, dtype=torch.int32, device=z.device).repeat(views)
    of_view = torch.arange(view, view + views, dtype=torch.int32, device=z.device).repeat_interleave(m)

    def each(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[run].repeat(views, *[1] * (x.ndim - 1))

    if scale is not None:
        scale = scale[:, run].expand(views, m) if len(scale) == 1 else scale[view : view + views, run]
    return Side(
        x=z.reshape(-1, width).contiguous(),
        id=of_view * batch.n + subject,
        u=None if known is None else each(known.u),
        cat=None if known is None else each(known.cat),
        subject=None if known is None else subject,
        site=None if known is None else each(known.site),
        scale=None if scale is None else scale.reshape(-1).float().contiguous(),
    )


def exp_sums(
    batch: Batch, sets: int, kappa: float, weights: "Weights | None", scale: Tensor | None, grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `tiled.exp_sums`; scale (V, n) or (1, n)."""
    from cauc_dist.losses import fused

    views = len(batch.z) // sets
    S = torch.zeros(sets, dtype=torch.float64, device=batch.z.device)
    mass, G = S.new_zeros(()), torch.zeros_like(batch.z) if grad else None
    facts = None if weights is None else weights.known

    def act(start: int, z: Tensor, kind: Kind) -> Tensor | None:
        owed = torch.zeros_like(z) if kind == "both" and grad else None
        for s in range(sets):
            these = slice(s * views, (s + 1) * views)
            ours = side(batch, batch.z[these], batch.start, s * views, facts, scale)
            theirs = side(batch, z[these], start, s * views, facts, scale)
            sums, masses, products = fused.exp_sums(ours, theirs, kappa, grad)
            S[s] += sums.sum(dtype=torch.float64) * (2 if kind == "both" else 1)
            if s == 0:
                mass.add_(masses.sum(dtype=torch.float64), alpha=2 if kind == "both" else 1)
            if G is not None and products is not None:
                G[these] += products.view_as(G[these])
            if owed is not None:
                owed[these] += fused.exp_sums(theirs, ours, kappa, True)[2].view_as(owed[these])  # type: ignore[union-attr]
        return owed

    received = batch.meet(act)
    return S, mass, G if G is None or received is None else G + received


def exp_row_sums(batch: Batch, kappa: float) -> Tensor:
    """As `tiled.exp_row_sums`: (V, b)."""
    from cauc_dist.losses import fused

    sums = batch.z.new_zeros(batch.z.shape[:2])

    def act(start: int, z: Tensor, kind: Kind) -> Tensor | None:
        ours, theirs = side(batch, batch.z, batch.start, 0, None, None), side(batch, z, start, 0, None, None)
        sums.add_(fused.exp_sums(ours, theirs, kappa, False)[0].view_as(sums))
        return fused.exp_sums(theirs, ours, kappa, False)[0].view(*z.shape[:2], 1) if kind == "both" else None

    received = batch.meet(act)
    return sums if received is None else sums + received[..., 0]


def pull(batch: Batch, weights: "Weights", scale: Tensor) -> Tensor:
    """As `tiled.pull`: (b, D)."""
    from cauc_dist.losses import fused

    total = torch.zeros_like(batch.z[0])

    def act(start: int, z: Tensor, kind: Kind) -> Tensor | None:
        ours = side(batch, batch.z.sum(0, keepdim=True), batch.start, 0, weights.known, scale[None])
        theirs = side(batch, z.sum(0, keepdim=True), start, 0, weights.known, scale[None])
        total.add_(fused.pull(ours, theirs)[0])
        return fused.pull(theirs, ours)[0][None] if kind == "both" else None

    received = batch.meet(act)
    return total if received is None else total + received[0]


def row_sums(batch: Batch, weights: "Weights", alike: bool, v: Tensor | None = None) -> Tensor:
    """As `tiled.row_sums`: (b,) float64."""
    from cauc_dist.losses import fused

    x = batch.z.new_ones((1, batch.n, 1)) if v is None else v.float()[None, :, None]
    ours = side(batch, x[:, batch.own], batch.start, 0, weights.known, None)
    everyone = side(batch, x, 0, 0, weights.known, None)
    if alike:
        products, sums = fused.pull(ours, everyone)
        return (sums if v is None else products[:, 0]).double()
    return fused.exp_sums(ours, everyone, 1.0, False)[1].double()
