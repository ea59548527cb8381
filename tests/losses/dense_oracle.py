"""The objectives as plain dense autograd over M x M matrices: the oracle for sizes where a loop is too slow.

z (V, n, D) float64 of unit rows, w (n, n) weights with a diagonal of 1, c (n, n) = 1 - w with a diagonal of 0.
d = 2 - 2 cos, except between the views of a subject and between centroids. Tested against the loops of `tests.oracles`.
"""

from itertools import combinations

import torch
from torch import Tensor


def pool(z: Tensor, views: str = "pooled") -> Tensor:
    """(sets, m, D): the sets whose pairs count."""
    return z.reshape(1, -1, z.shape[-1]) if views == "pooled" else z


def blocks(w: Tensor, z: Tensor, views: str = "pooled") -> Tensor:
    """(n, n) of subjects -> (m, m) of the embeddings of a set."""
    return w.repeat(len(z), len(z)) if views == "pooled" else w


def off(x: Tensor) -> Tensor:
    """(..., m, m) with a diagonal of 0."""
    return x.masked_fill(torch.eye(x.shape[-1], dtype=torch.bool), 0.0)


def inverse(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, 1 / mass, 0.0)


def squared(z: Tensor) -> Tensor:
    return 2 - 2 * z @ z.mT


def power(d: Tensor, exponent: float) -> Tensor:
    """d^exponent, gradient 0 where d = 0."""
    return d.where(d > 0, 1.0).pow(exponent).where(d > 0, 0.0)


def log_mean_exp(s: Tensor, c: Tensor) -> Tensor:
    """log[ sum c e^s / sum c ] of each set; 0 where no pair has weight."""
    if not c.any():
        return 0 * s.sum((-2, -1))
    return (s + c.log()).logsumexp((-2, -1)) - c.sum((-2, -1)).log()


def info_nce(z: Tensor, w: Tensor, tau: float, normalise: str = "row") -> Tensor:
    s = pool(z)[0] @ pool(z)[0].mT / tau
    w = off(blocks(w, z))
    p = w * inverse(w.sum(1))[:, None] if normalise == "row" else w * inverse(w.sum(0))[None, :]
    own = torch.eye(len(s), dtype=torch.bool)
    lse = s.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    return (p * (lse - s)).sum() / (len(s) if normalise == "row" else z.shape[1])


def conditional_alignment(z: Tensor, w: Tensor, alpha: float = 2.0, normalise: str = "row") -> Tensor:
    d, w = power(off(squared(pool(z)[0])), alpha / 2), off(blocks(w, z))
    if normalise == "global":
        return (w * d).sum() * inverse(w.sum())
    return (w * inverse(w.sum(1))[:, None] * d).sum() / len(d)


def uniformity(z: Tensor, t: float = 2.0, views: str = "within") -> Tensor:
    s = -t * squared(pool(z, views))
    return log_mean_exp(s, off(torch.ones_like(s))).mean()


def conditional_uniformity(
    z: Tensor,
    c: Tensor,
    t: float = 2.0,
    normalise: str = "global",
    views: str = "within",
    within: Tensor | None = None,
) -> Tensor:
    c = c if within is None else c * (within[:, None] == within[None, :])
    c = off(blocks(c, z, views))
    if normalise == "row":
        c = c * inverse(c.sum(1))[:, None]
    return log_mean_exp(-t * squared(pool(z, views)), c).mean()


def view_alignment(z: Tensor, alpha: float = 2.0) -> Tensor:
    d = torch.stack([(a - b).square().sum(-1) for a, b in combinations(z, 2)])
    return power(d, alpha / 2).mean()


def decoupled(z: Tensor, t: float = 2.0, w: Tensor | None = None, lam: float = 0.01) -> Tensor:
    mu = z.mean(0)
    if w is not None:
        mu = torch.linalg.solve(w + lam * torch.eye(len(w), dtype=w.dtype), w) @ mu
    s = -t * (mu[:, None] - mu[None, :]).square().sum(-1)
    return log_mean_exp(s, off(torch.ones_like(s)))
