"""The objectives of arXiv 2111.05643 and its antecedents: y-Aware InfoNCE, conditional alignment and uniformity.

Letters: `cauc_dist.losses.tiled`; definitions, choices and costs: docs/losses.md.

z (V, b, D) of unit rows and y (n, k) in, a scalar of z's dtype and device out, differentiable in z, not in y.
`exchange` says how z's rows reach those of other processes (`cauc_dist.gather`); by default they are the whole batch,
b = n. Time M^2 D, memory a few times z. Nothing checks that rows are of unit norm: that is the caller's.
"""

from typing import Literal

import torch
from torch import Tensor

from cauc_dist.kernels import Kernel
from cauc_dist.losses import terms
from cauc_dist.losses.batch import Batch, Exchange
from cauc_dist.losses.checks import Views, choice, codes, embeddings, metadata, positive, spread, temperature
from cauc_dist.losses.similar import similar
from cauc_dist.losses.terms import Term, evaluate
from cauc_dist.losses.tiled import Weights


def y_aware_infonce(
    z: Tensor,
    y: Tensor,
    kernel: Kernel,
    tau: float = 0.1,
    normalise: Literal["row", "column"] = "row",
    exchange: Exchange = Batch,
) -> Tensor:
    """InfoNCE in which every other embedding is a positive, to the degree its metadata is near.

    (1/M) sum_i sum_{j!=i} p_ij [ -s_ij + log sum_{k!=i} e^{s_ik} ],  p_ij = w_ij / sum_{k!=i} w_ik   (arXiv 2106.08808)

    over all M embeddings, own other view included. `normalise="column"` reproduces the code published with that
    paper: p_ij = w_ij / sum_{k!=j} w_jk, and the sum over views of the mean over anchors, V times ours.
    """
    temperature(tau)
    choice("normalise", normalise, "row", "column")
    z, batch = embeddings(z, exchange=exchange)
    y = metadata(y, batch)
    likes = similar(Weights(kernel, y, z.dtype), y, batch)
    return evaluate(z, batch, (1.0, terms.info_nce(tau, likes, normalise == "row")))


def conditional_alignment(
    z: Tensor,
    y: Tensor,
    kernel: Kernel,
    alpha: float = 2.0,
    normalise: Literal["row", "global"] = "row",
    exchange: Exchange = Batch,
) -> Tensor:
    """Mean distance of embeddings of near metadata, own other view with weight 1   (arXiv 2111.05643).

    row:    (1/M) sum_i sum_{j!=i} p_ij d_ij^(alpha/2),  p_ij = w_ij / sum_{k!=i} w_ik     (the one inside y-Aware)
    global: sum_{i!=j} w_ij d_ij^(alpha/2) / sum_{i!=j} w_ij

    Where d = 0 and alpha < 2 the gradient is 0.
    """
    z, batch = embeddings(z, exchange=exchange)
    y = metadata(y, batch)
    return evaluate(z, batch, (1.0, _alignment(batch, y, Weights(kernel, y, z.dtype), alpha, normalise)))


def _alignment(batch: Batch, y: Tensor, weights: Weights, alpha: float, normalise: str) -> Term:
    positive(alpha=alpha)
    choice("normalise", normalise, "row", "global")
    likes = similar(weights, y, batch)
    if alpha == 2:
        return terms.alignment(likes, normalise == "row")
    return terms.powered_alignment(likes, weights, normalise == "row", alpha / 2)


def uniformity(z: Tensor, t: float = 2.0, views: Views = "within", exchange: Exchange = Batch) -> Tensor:
    """Spread over the sphere: log mean_{i<j} e^{-t d_ij}   (Wang & Isola, arXiv 2005.10242).

    `within`: over pairs of one view, averaged over views. `pooled`: over all pairs of the M embeddings.
    """
    spread(t)
    choice("views", views, "within", "pooled")
    z, batch = embeddings(z, exchange=exchange)
    return evaluate(z, batch, (1.0, terms.uniformity(t, views == "pooled")))


def conditional_uniformity(
    z: Tensor,
    y: Tensor,
    kernel: Kernel,
    t: float = 2.0,
    normalise: Literal["global", "row"] = "global",
    views: Views = "within",
    within: Tensor | None = None,
    exchange: Exchange = Batch,
) -> Tensor:
    """Spread of embeddings of UNLIKE metadata: pairs repel with weight c_ij = 1 - w_ij.

    global: log[ sum_{i!=j} c_ij e^{-t d_ij} / sum_{i!=j} c_ij ]       (arXiv 2111.05643 up to a constant)
    row:    c_ij divided by its row sum first, rows of zero mass left out                 (Ruppli et al. 2023)

    `views` as in `uniformity`; an own other view has c = 0. `within`: labels (n,), e.g. the site; only pairs of one
    label repel. 0 with zero gradient where no pair has weight (constant metadata).
    """
    z, batch = embeddings(z, exchange=exchange)
    weights = Weights(kernel, metadata(y, batch), z.dtype)
    return evaluate(z, batch, (1.0, _uniformity(batch, weights, t, normalise, views, within)))


def _uniformity(batch: Batch, weights: Weights, t: float, normalise: str, views: str, within: Tensor | None) -> Term:
    spread(t)
    choice("normalise", normalise, "global", "row")
    choice("views", views, "within", "pooled")
    if within is not None:
        weights = weights.among(codes(within, batch))
    return terms.uniformity(t, views == "pooled", weights, normalise == "row")


def cauc(
    z: Tensor,
    y: Tensor,
    kernel: Kernel,
    t: float = 2.0,
    alpha: float = 2.0,
    lambda_align: float | None = None,
    lambda_unif: float = 1.0,
    normalise_align: Literal["row", "global"] = "row",
    normalise_unif: Literal["global", "row"] = "global",
    views: Views = "within",
    within: Tensor | None = None,
    exchange: Exchange = Batch,
) -> Tensor:
    """lambda_align * conditional alignment + lambda_unif * conditional uniformity   (arXiv 2111.05643).

    lambda_align defaults to t: y-Aware InfoNCE of tau is, but for a constant, the row alignment times 1/(2 tau) plus
    a uniformity of t = 1/(2 tau) (docs/losses.md, exact fact 1).
    """
    z, batch = embeddings(z, exchange=exchange)
    y = metadata(y, batch)
    weights = Weights(kernel, y, z.dtype)
    align = _alignment(batch, y, weights, alpha, normalise_align)
    unif = _uniformity(batch, weights, t, normalise_unif, views, within)
    # The uniformity first: its own tiles are computed while other ranks' rows are on their way.
    return evaluate(z, batch, (lambda_unif, unif), (t if lambda_align is None else lambda_align, align))


def calign_unif(
    z: Tensor,
    y: Tensor,
    kernel: Kernel,
    t: float = 2.0,
    alpha: float = 2.0,
    lambda_align: float | None = None,
    lambda_unif: float = 1.0,
    normalise_align: Literal["row", "global"] = "row",
    views: Views = "within",
    exchange: Exchange = Batch,
) -> Tensor:
    """lambda_align * conditional alignment + lambda_unif * uniformity: `cauc` with c = 1   (ours, for comparison).

    lambda_align defaults to t, as for `cauc`.
    """
    spread(t)
    choice("views", views, "within", "pooled")
    z, batch = embeddings(z, exchange=exchange)
    y = metadata(y, batch)
    align = _alignment(batch, y, Weights(kernel, y, z.dtype), alpha, normalise_align)
    unif = terms.uniformity(t, views == "pooled")
    return evaluate(z, batch, (lambda_unif, unif), (t if lambda_align is None else lambda_align, align))


def align_cunif(
    z: Tensor,
    y: Tensor,
    kernel: Kernel,
    t: float = 2.0,
    alpha: float = 2.0,
    lambda_align: float | None = None,
    lambda_unif: float = 1.0,
    normalise_unif: Literal["global", "row"] = "global",
    views: Views = "within",
    within: Tensor | None = None,
    exchange: Exchange = Batch,
) -> Tensor:
    """lambda_align * mean_i ||z_i - z_i'||^alpha + lambda_unif * conditional uniformity   (ours, for comparison).

    Only a subject's own views attract. lambda_align defaults to t, as for `cauc`.
    """
    positive(alpha=alpha)
    z, batch = embeddings(z, views=2, exchange=exchange)
    weights = Weights(kernel, metadata(y, batch), z.dtype)
    unif = _uniformity(batch, weights, t, normalise_unif, views, within)
    align = terms.view_alignment(alpha)
    return evaluate(z, batch, (lambda_unif, unif), (t if lambda_align is None else lambda_align, align))


def geometry(
    z: Tensor,
    y: Tensor | None = None,
    kernel: Kernel | None = None,
    t: float = 2.0,
    alpha: float = 2.0,
    exchange: Exchange = Batch,
) -> dict[str, float]:
    """What to watch in any training: alignment and uniformity, and their conditional forms where a kernel is given.

    Of defaults but for t and alpha, without gradient; one exchange for all of them. effective_rank: of the embeddings
    of the batch, 1 where they collapse to a line, D where they fill all directions alike.
    """
    spread(t)
    positive(alpha=alpha)
    z, batch = embeddings(z.detach(), exchange=exchange)
    watched = {"uniformity": terms.uniformity(t, pooled=False)}
    if len(z) > 1:
        watched["alignment"] = terms.view_alignment(alpha)
    if kernel is not None and y is not None:
        y = metadata(y, batch)
        weights = Weights(kernel, y, z.dtype)
        watched["conditional_alignment"] = _alignment(batch, y, weights, alpha, "row")
        watched["conditional_uniformity"] = _uniformity(batch, weights, t, "global", "within", None)
    gram = batch.total(lambda _, block: _gram(block))
    found = dict(zip(watched, terms.measure(batch, *watched.values()), strict=True))
    return found | {"effective_rank": effective_rank(gram)}


def _gram(z: Tensor) -> Tensor:
    rows = z.flatten(0, 1).double()
    return rows.T @ rows


def effective_rank(gram: Tensor) -> float:
    """exp of the entropy of the singular values, as shares of their sum (Roy & Vetterli 2007), from Z^T Z (D, D)."""
    singular = torch.linalg.eigvalsh(gram.double().cpu()).clamp_min(0).sqrt()  # a GPU takes longer for so few numbers
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())
