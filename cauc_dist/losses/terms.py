"""The terms of the objectives as sums over pairs: what each process contributes, and value and gradient of the totals.

V views, b subjects here, n in the global batch, D width of z. A term looks at a batch once and gives a `Part`; the sums
of all parts of an objective travel in one exchange, after which every process knows the value, and the gradient of its
own rows, complete.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cauc_dist.losses import tiled
from cauc_dist.losses.batch import Batch, NonFinite, full_precision
from cauc_dist.losses.similar import Similar
from cauc_dist.losses.tiled import Weights


class Part(NamedTuple):
    """What one process knows of a term."""

    sums: Tensor
    """(s,) float64: its share of sums over all pairs."""
    finish: Callable[[list[float]], tuple[float, Tensor | None]]
    """s totals -> the term's value and, where asked for, the gradient of our rows (V, b, D)."""


Term = Callable[[Batch, bool], Part]
"""(batch, whether the gradient is wanted) -> part."""


def evaluate(z: Tensor, batch: Batch, *terms: tuple[float, Term]) -> Tensor:
    """sum of factor * term: a scalar of z's dtype, differentiable in z (V, b, D), the rows that this process holds.

    Raises NonFinite on every process alike where a row of z is NaN or infinite. Memory: a few times z.
    """
    return _Evaluate.apply(z, batch, terms)  # type: ignore[no-any-return, no-untyped-call]


def loss_and_grad(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Value and dL/dz of a loss of z (V, b, D), and nothing else: what GradCache needs between its two passes.

        value, dz = loss_and_grad(lambda z: cauc(z, y, kernel, exchange=exchange), z)

    dz (V, b, D) is tangent to the sphere, the only part of the gradient that normalising z lets through; times W, as
    the autograd face gives it, where an exchange has W ranks. No graph of z is kept.
    """
    z = z.detach().requires_grad_()
    off = float((torch.linalg.vector_norm(z.detach().float(), dim=-1) - 1).abs().max())
    if not off < 1e-2:
        raise ValueError(f"norms of z are up to {off:.2g} away from 1; wanted unit rows: dz is tangent to the sphere")
    with torch.enable_grad():
        value = loss(z)
        (dz,) = torch.autograd.grad(value, z)
    z = z.detach()
    return value.detach(), dz - (dz * z).sum(-1, keepdim=True) * z


def measure(batch: Batch, *terms: Term) -> list[float]:
    """The value of each term, without gradient, in one exchange."""
    return [value for value, _ in _solve(batch, terms, grad=False)]


def _solve(batch: Batch, terms: Sequence[Term], grad: bool) -> list[tuple[float, Tensor | None]]:
    with full_precision():
        parts = [term(batch, grad) for term in terms]
    finite = batch.z.abs().sum(dtype=torch.float64)[None]
    # A GPU is waited for here, once for all parts.
    totals: list[float] = batch.gather(torch.cat([finite, *(part.sums for part in parts)])).sum(0).tolist()
    if not all(map(math.isfinite, totals)):
        raise NonFinite.of(batch)
    batch.release()
    found, end = [], 1
    for part in parts:
        found.append(part.finish(totals[end : end + len(part.sums)]))
        end += len(part.sums)
    return found


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, batch: Batch, terms: Sequence[tuple[float, Term]]) -> Tensor:
        found = _solve(batch, [term for _, term in terms], ctx.needs_input_grad[0])
        gradient: Tensor | None = None
        for (factor, _), (_, slope) in zip(terms, found, strict=True):
            if slope is not None:
                gradient = slope.mul_(factor) if gradient is None else gradient.add_(slope, alpha=factor)
        ctx.batch, ctx.gradient = batch, gradient
        return z.new_tensor(sum(factor * term for (factor, _), (term, _) in zip(terms, found, strict=True)))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph=True: our gradient would pass for a constant
            raise RuntimeError("a second derivative of a tiled loss is asked for; it has only a first")
        ctx.batch.agree(upstream[0])
        # The trainer AVERAGES parameter gradients over processes; ours is that of our own rows, complete.
        return ctx.gradient * (upstream[0] * ctx.batch.world_size), None, None


def uniformity(t: float, pooled: bool, weights: Weights | None = None, by_row: bool = False) -> Term:
    """log[ sum_{i!=j} c_ij e^{-t d_ij} / sum_{i!=j} c_ij ] within views, averaged over them, or pooled.

    c = 1 without weights. `by_row`: c_ij (1/R_i + 1/R_j) with R_i = sum_j c_ij and 1/R_i = 0 where R_i = 0; c divided
    by its row sums, made symmetric.
    """

    def term(batch: Batch, grad: bool) -> Part:
        views = len(batch.z)
        sets = 1 if pooled else views
        scale = None
        if by_row and weights is not None:
            scale = reciprocal(batch.everyone(tiled.row_sums(batch, weights, alike=False))).to(batch.z.dtype)
        S, mass, G = tiled.exp_sums(batch, sets, 2 * t, weights, scale, grad)
        pairs = views // sets * batch.n * (views // sets * batch.n - 1)

        def finish(totals: list[float]) -> tuple[float, Tensor | None]:
            *sums, mass = totals
            mass = mass if weights is not None else pairs
            if mass == 0:  # no pair repels
                return 0.0, None if G is None else torch.zeros_like(batch.z)
            if G is not None:
                for part, total in zip(G.chunk(sets), sums, strict=True):
                    part.mul_(4 * t / (sets * total))
            value = sum(math.log(total / mass) - 2 * t for total in sums) / sets
            return value, None if G is None else G.to(batch.z.dtype)

        return Part(torch.cat([S, mass[None]]), finish)

    return term


def alignment(similar: Similar, by_row: bool) -> Term:
    """sum_i sum_{j!=i} p_ij d_ij / M by row, or sum w_ij d_ij / sum w_ij, over the M embeddings: linear in w.

    Hence views are summed first: a product of n subjects instead of M embeddings.
    """

    def term(batch: Batch, grad: bool) -> Part:
        views, m = len(batch.z), len(batch.z) * batch.n
        mass = pooled_mass(batch, similar)
        G = attraction(batch, similar, reciprocal(mass) if by_row else torch.ones_like(mass))
        # Of our i and all j: the sum of p_ij (1 for each row that has any mass), or that of w_ij.
        ours = views * ((mass > 0).double() if by_row else mass)[batch.own].sum()

        def finish(totals: list[float]) -> tuple[float, Tensor | None]:
            cosines, total = totals
            slope = -2 / (m if by_row else total or 1)
            return slope * (cosines - total), G.mul_(slope) if grad else None

        return Part(torch.stack([half_products(batch, G), ours]), finish)

    return term


def powered_alignment(similar: Similar, weights: Weights, by_row: bool, exponent: float) -> Term:
    """The same of d_ij^exponent, which is no sum of products of z: over all M embeddings, in tiles."""

    def term(batch: Batch, grad: bool) -> Part:
        m = len(batch.z) * batch.n
        mass = pooled_mass(batch, similar)
        scale = (reciprocal(mass) if by_row else torch.ones_like(mass)) / 2
        value, G = tiled.power_sums(batch, weights, scale.to(batch.z.dtype), exponent, grad)

        def finish(totals: list[float]) -> tuple[float, Tensor | None]:
            over = m if by_row else totals[1] or 1
            return totals[0] / over, None if G is None else G.mul_(-4 / over)

        return Part(torch.stack([value, mass[batch.own].sum() * len(batch.z)]), finish)

    return term


def view_alignment(alpha: float) -> Term:
    """mean over subjects and pairs of their views of ||z_i - z_i'||^alpha; where that is 0 the gradient is 0."""

    def term(batch: Batch, grad: bool) -> Part:
        z, pairs = batch.z, list(combinations(range(len(batch.z)), 2))
        value = torch.zeros((), dtype=torch.float64, device=z.device)
        G = torch.zeros_like(z)
        for a, b in pairs:
            apart = z[a] - z[b]
            d = apart.square().sum(-1)
            slope = d.pow(alpha / 2 - 1).masked_fill_(d == 0, 0.0)
            value += (slope * d).sum(dtype=torch.float64)
            apart *= alpha * slope[:, None]
            G[a] += apart
            G[b] -= apart
        count = batch.n * len(pairs)
        return Part(value[None], lambda sums: (sums[0] / count, G.div_(count) if grad else None))

    return term


def distance_uniformity(t: float) -> Term:
    """log mean_{i!=j} e^{-t ||x_i - x_j||^2} of x (1, b, D), of any norm up to 1."""

    def term(batch: Batch, grad: bool) -> Part:
        S, slope = tiled.distance_sums(batch, t)

        def finish(totals: list[float]) -> tuple[float, Tensor | None]:
            value = math.log(totals[0] / (batch.n * (batch.n - 1)))
            return value, slope.div_(totals[0]).to(batch.z.dtype) if grad else None

        return Part(S[None], finish)

    return term


def info_nce(tau: float, similar: Similar, by_row: bool = True) -> Term:
    """(1/A) sum_i sum_{j!=i} p_ij [ log sum_{k!=i} e^{s_ik} - s_ij ]: p by row with A = M, or by column with A = n.

    Pass 1 gives l_i = sum_{k!=i} e^{s_ik} of our rows, which everyone is told; pass 2 gives
    dz_i = (1/(A tau)) sum_{j!=i} [ e^{s_ij} (r_i / l_i + r_j / l_j) - w_ij (1/W_i + 1/W_j) ] z_j,   r_i = sum_j p_ij.
    """
    kappa = 1 / tau

    def term(batch: Batch, grad: bool) -> Part:
        views, n = len(batch.z), batch.n
        mass = pooled_mass(batch, similar)
        scale = reciprocal(mass)
        # By column: the sum over all others of w_ij / W_j.
        r = (mass > 0).double() if by_row else views * similar.row_sums(batch, scale) + (views - 1) * scale
        anchors = views * n if by_row else n
        sweep = tiled.Sweep(batch, 1, kappa)
        sums = batch.everyone(tiled.exp_row_sums(sweep).T.contiguous()).T  # (V, n)
        own = (r * sums.double().log())[:, batch.own].sum()
        pulled = attraction(batch, similar, scale)
        G = tiled.exp_products(sweep, r / sums) if grad else None

        def finish(totals: list[float]) -> tuple[float, Tensor | None]:
            value = (totals[0] - kappa * totals[1]) / anchors
            return value, None if G is None else G.to(pulled.dtype).sub_(pulled).mul_(kappa / anchors)

        return Part(torch.stack([own, half_products(batch, pulled)]), finish)

    return term


def pooled_mass(batch: Batch, similar: Similar) -> Tensor:
    """W_i (n,) float64: the weights of an embedding of each subject with the M - 1 others, own other views with 1."""
    views = len(batch.z)
    return views * similar.row_sums(batch) + (views - 1)


def attraction(batch: Batch, similar: Similar, a: Tensor) -> Tensor:
    """G_i = sum_{j!=i} w_ij (a_i + a_j) z_j over the M embeddings (V, b, D), own other views with w = 1; a (n,)."""
    pulled = similar.pull(batch, a)  # (b, D) over other subjects, all their views at once
    others = batch.z.sum(0) - batch.z  # of a subject's views, all but the one
    return others.mul_((2 * a[batch.own, None]).to(batch.z.dtype)).add_(pulled)


def half_products(batch: Batch, G: Tensor) -> Tensor:
    """sum_i z_i.G_i / 2 (float64): the sum over pairs that G is the gradient of."""
    products: Tensor = torch.linalg.vecdot(batch.z, G)
    return products.sum(dtype=torch.float64) / 2


def reciprocal(x: Tensor) -> Tensor:
    """1 / x; 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0.0)
