"""Published objectives to compare with, dense. Letters and shapes: `cauc_dist.losses.pairwise`; see docs/losses.md.

All take z (V, n, D) of unit rows, except `rank_n_contrast`, whose z is NOT normalised; all give a scalar of z's dtype
and device, differentiable in z. Memory: a few M x M matrices, also those whose formula has a triple sum.
"""

from itertools import combinations

import torch
from torch import Tensor

from cauc_dist.kernels import Kernel, floating
from cauc_dist.losses.pairwise import (
    complements,
    cosine,
    divide,
    embeddings,
    equal,
    log_mean_exp,
    metadata,
    others,
    pool,
    pool_weights,
    positive,
    power,
    weights,
)
from cauc_dist.losses.paper import info_nce, uniformity


def ntxent(z: Tensor, tau: float = 0.1) -> Tensor:
    """SimCLR: (1/M) sum_i [ -s_ii' + log sum_{k!=i} e^{s_ik} ], i' the own other view   (arXiv 2002.05709).

    More than two views: the mean over the other ones.
    """
    z = embeddings(z, views=2)
    return info_nce(z, torch.eye(z.shape[1], dtype=z.dtype, device=z.device), tau)


def supcon(z: Tensor, labels: Tensor, tau: float = 0.1) -> Tensor:
    """Positives are all embeddings of one label, mean outside the log   (L_out, eq. 2 of arXiv 2004.11362).

    labels (n,), numbers; a subject without a label (NaN) has its own other view only.
    """
    z = embeddings(z)
    return info_nce(z, equal(labels, z).to(z.dtype), tau)


def align_uniform(
    z: Tensor, alpha: float = 2.0, t: float = 2.0, lambda_align: float = 1.0, lambda_unif: float = 1.0
) -> Tensor:
    """mean_i ||z_i - z_i'||^alpha + log mean_{i<j} e^{-t d_ij} averaged over views   (Wang & Isola, arXiv 2005.10242).

    Weights 1 and 1, the defaults of their released STL-10 script (for `cauc` the default is t and 1).
    """
    positive(alpha=alpha)
    z = embeddings(z, views=2)
    pairs = [(a - b).square().sum(-1) for a, b in combinations(z, 2)]
    align = power(torch.stack(pairs), alpha / 2).mean()
    return lambda_align * align + lambda_unif * uniformity(z, t)


def decoupled_uniformity(
    z: Tensor, y: Tensor | None = None, kernel: Kernel | None = None, t: float = 2.0, lam: float = 0.01
) -> Tensor:
    """Uniformity of the subjects' centroids, with no alignment term   (Dufumier et al. 2023, arXiv 2206.01646).

    log mean_{i<j} e^{-t ||mu_i - mu_j||^2}, mu_i the mean of the views of i, not normalised again. With a kernel, mu
    becomes A mu, A = (K + lam I)^-1 K, which has no gradient. A is solved in fp64: K may be all but singular. Without a
    kernel, y is not looked at.
    """
    positive(t=t, lam=lam)
    z = embeddings(z)
    mu = z.mean(0)  # (n, D)
    if kernel is not None:
        if y is None:
            raise ValueError("a kernel is given without y; wanted y (n, k) with it")
        mu = _smoother(z, y, kernel, lam) @ mu
    d = others(torch.cdist(mu, mu, compute_mode="donot_use_mm_for_euclid_dist").square())
    return log_mean_exp(-t * d, torch.ones_like(d))


def _smoother(z: Tensor, y: Tensor, kernel: Kernel, lam: float) -> Tensor:
    """A = (K + lam I)^-1 K (n, n)."""
    if not kernel.positive_semidefinite:
        raise ValueError(
            "the kernel has a column with missing='ignore', so it is not positive semi-definite; "
            "wanted 'marginal' or 'distinct' for the kernel form of decoupled_uniformity"
        )
    K = kernel(metadata(z, y)).double()
    A: Tensor = torch.linalg.solve(K + lam * torch.eye(len(K), dtype=K.dtype, device=K.device), K)
    return A.to(z.dtype)


def threshold(z: Tensor, y: Tensor, kernel: Kernel, tau: float = 0.1) -> Tensor:
    """Each positive k repels only those less alike than itself   (Barbano et al. 2023, arXiv 2211.08326, L^thr).

    -(1/M) sum_i sum_{k!=i} p_ik log[ e^{s_ik} / (e^{s_ik} + sum_{j!=i, w_ij < w_ik} e^{s_ij}) ]

    Sorted by w, the inner sum is a running log-sum-exp: M^2 log M time, M^2 memory. The released code has the
    inequality the other way round; this is the formula.
    """
    positive(tau=tau)
    z = embeddings(z)
    s = others(cosine(pool(z))) / tau
    # Ranks in the precision of y: rounding w to z's would make ties.
    w = others(pool_weights(kernel(metadata(z, y)), len(z)))
    less = _log_sum_up_to(s, w, strictly=True)
    p = divide(w, w.sum(1, keepdim=True)).to(z.dtype)
    return (p * (torch.logaddexp(s, less) - s)).sum() / len(s)


def expw(z: Tensor, y: Tensor, kernel: Kernel, tau: float = 0.1, shifted: bool = False) -> Tensor:
    """The less alike, the stronger the repulsion, inside the exponent   (Barbano et al. 2023, arXiv 2211.08326, L^exp).

    -(1/M) sum_i sum_{k!=i} p_ik [ s_ik - log sum_{j!=i} e^{s_ij (1 - w_ij)} ]

    `shifted`: from s its row maximum (self included, no gradient) is taken first. That is no mere stabilisation, since
    (1 - w) multiplies it: another loss, and the one the released code computes.
    """
    positive(tau=tau)
    z = embeddings(z)
    s = cosine(pool(z)) / tau
    if shifted:
        s = s - s.detach().amax(1, keepdim=True)
    s = others(s)
    w = others(pool_weights(weights(z, y, kernel), len(z)))
    c = others(pool_weights(complements(z, y, kernel), len(z)))
    p = divide(w, w.sum(1, keepdim=True))
    return (p * ((s * c).logsumexp(1, keepdim=True) - s)).sum() / len(s)


def rank_n_contrast(z: Tensor, y: Tensor, tau: float = 2.0) -> Tensor:
    """Distances of embeddings in the order of distances of labels   (Zha et al. 2023, arXiv 2210.01189).

    -1/(M(M-1)) sum_{i!=j} log[ e^{S_ij} / sum_{k!=i, |y_i-y_k| >= |y_i-y_j|} e^{S_ik} ],  S_ij = -||z_i - z_j||_2 / tau

    |.| is the L1 distance over the columns of y (n, k); z is NOT normalised. No value of y may be missing.
    """
    positive(tau=tau)
    z = embeddings(z)
    y = metadata(z, y)
    if y.ndim != 2:
        raise ValueError(f"y has shape {tuple(y.shape)}; wanted (n, k)")
    if bool(y.isnan().any()):
        raise ValueError(f"y has {int(y.isnan().sum())} missing value(s); wanted none: rank_n_contrast ranks all pairs")
    S = others(torch.cdist(pool(z), pool(z), compute_mode="donot_use_mm_for_euclid_dist")) / -tau
    gap = others(pool_weights(_l1(floating(y)), len(z)))
    at_least = _log_sum_up_to(S, -gap, strictly=False)
    return (at_least - S).mean()


def _l1(y: Tensor) -> Tensor:
    """(n, n): sum over columns of |y_i - y_j|."""
    return (y[:, None] - y[None, :]).abs().sum(-1)


def _log_sum_up_to(s: Tensor, key: Tensor, strictly: bool) -> Tensor:
    """Of each row i and k: log sum e^{s_ij} over the j with key_ij < key_ik (or <=); -inf where there is none."""
    ascending, order = key.sort(1)
    running = s.gather(1, order).logcumsumexp(1)
    count = torch.searchsorted(ascending, key, right=not strictly)
    return running.gather(1, (count - 1).clamp(min=0)).where(count > 0, -torch.inf)
