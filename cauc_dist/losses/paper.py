"""The objectives of arXiv 2111.05643 and its antecedents, dense: y-Aware InfoNCE, conditional alignment, conditional
uniformity. Letters and shapes: `cauc_dist.losses.pairwise`; definitions and choices: docs/losses.md.

Pure functions: z (V, n, D) of unit rows and y (n, k) in, a scalar of z's dtype and device out, differentiable in z.
y has no gradient. Nothing checks that rows are of unit norm (on a GPU that would wait for the device at each step).
Memory: a few M x M matrices (M = V n), with the backward pass; docs/losses.md has the measured limits.
"""

from typing import Literal

import torch
from torch import Tensor

from cauc_dist.kernels import Kernel
from cauc_dist.losses.pairwise import (
    Views,
    choice,
    complements,
    cosine,
    divide,
    embeddings,
    equal,
    grouped,
    log_mean_exp,
    others,
    pool,
    pool_weights,
    positive,
    power,
    squared_distance,
    weights,
)


def y_aware_infonce(
    z: Tensor, y: Tensor, kernel: Kernel, tau: float = 0.1, normalise: Literal["row", "column"] = "row"
) -> Tensor:
    """InfoNCE in which every other embedding is a positive, to the degree its metadata is near.

    (1/M) sum_i sum_{j!=i} p_ij [ -s_ij + log sum_{k!=i} e^{s_ik} ],  p_ij = w_ij / sum_{k!=i} w_ik   (arXiv 2106.08808)

    over all M embeddings, own other view included. `normalise="column"` reproduces the code published with that
    paper: p_ij = w_ij / sum_{k!=j} w_jk, and the sum over views of the mean over anchors, V times ours.
    """
    z = embeddings(z)
    return info_nce(z, weights(z, y, kernel), tau, normalise)


def info_nce(z: Tensor, w: Tensor, tau: float, normalise: Literal["row", "column"] = "row") -> Tensor:
    """The sum above for weights w (n, n) of subjects: NT-Xent for w = identity, SupCon for w = same class."""
    positive(tau=tau)
    choice("normalise", normalise, "row", "column")
    views, n, _ = z.shape
    s = others(cosine(pool(z))) / tau  # (M, M-1)
    w = pool_weights(w, views).fill_diagonal_(0)
    p = others(divide(w, w.sum(1 if normalise == "row" else 0, keepdim=True)))
    anchors = views * n if normalise == "row" else n
    return (p * (s.logsumexp(1, keepdim=True) - s)).sum() / anchors


def conditional_alignment(
    z: Tensor, y: Tensor, kernel: Kernel, alpha: float = 2.0, normalise: Literal["row", "global"] = "row"
) -> Tensor:
    """Mean distance of embeddings of near metadata, own other view with weight 1   (arXiv 2111.05643).

    row:    (1/M) sum_i sum_{j!=i} p_ij d_ij^(alpha/2),  p_ij = w_ij / sum_{k!=i} w_ik     (the one inside y-Aware)
    global: sum_{i!=j} w_ij d_ij^(alpha/2) / sum_{i!=j} w_ij
    """
    positive(alpha=alpha)
    choice("normalise", normalise, "row", "global")
    z = embeddings(z)
    d = power(squared_distance(pool(z)), alpha / 2)  # (M, M)
    w = pool_weights(weights(z, y, kernel), len(z)).fill_diagonal_(0)
    if normalise == "global":
        return divide((w * d).sum(), w.sum())
    return (divide(w, w.sum(1, keepdim=True)) * d).sum() / len(d)


def uniformity(z: Tensor, t: float = 2.0, views: Views = "within") -> Tensor:
    """Spread over the sphere: log mean_{i<j} e^{-t d_ij}   (Wang & Isola, arXiv 2005.10242).

    `within`: over pairs of one view, averaged over views. `pooled`: over all pairs of the M embeddings.
    """
    positive(t=t)
    d = others(squared_distance(grouped(embeddings(z), views)))  # (sets, m, m-1): i<j and j<i alike
    return log_mean_exp(-t * d, torch.ones_like(d)).mean()


def conditional_uniformity(
    z: Tensor,
    y: Tensor,
    kernel: Kernel,
    t: float = 2.0,
    normalise: Literal["global", "row"] = "global",
    views: Views = "within",
    within: Tensor | None = None,
) -> Tensor:
    """Spread of embeddings of UNLIKE metadata: pairs repel with weight c_ij = 1 - w_ij.

    global: log[ sum_{i!=j} c_ij e^{-t d_ij} / sum_{i!=j} c_ij ]       (arXiv 2111.05643 up to a constant)
    row:    c_ij divided by its row sum first, rows of zero mass left out                 (Ruppli et al. 2023)

    `views` as in `uniformity`. `within`: labels (n,), e.g. the site; only pairs of one label repel.
    0 with zero gradient where no pair has weight (constant metadata).
    """
    positive(t=t)
    choice("normalise", normalise, "global", "row")
    z = embeddings(z)
    sets = grouped(z, views)
    c = complements(z, y, kernel)
    if within is not None:
        c = c * equal(within, z)
    c = c if views == "within" else pool_weights(c, len(z))  # own other view: c = 0, never repelled
    if normalise == "row":
        c = divide(c, c.sum(1, keepdim=True))
    return log_mean_exp(-t * squared_distance(sets), c).mean()


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
) -> Tensor:
    """lambda_align * conditional alignment + lambda_unif * conditional uniformity   (arXiv 2111.05643).

    lambda_align defaults to t: y-Aware InfoNCE of tau is, but for a constant, the row alignment times 1/(2 tau) plus
    a uniformity of t = 1/(2 tau) (docs/losses.md, exact fact 1).
    """
    align = conditional_alignment(z, y, kernel, alpha, normalise_align)
    unif = conditional_uniformity(z, y, kernel, t, normalise_unif, views, within)
    return (t if lambda_align is None else lambda_align) * align + lambda_unif * unif
