"""Objectives to compare with whose formula resists tiles: triple sums and sorted rows. Whole M x M matrices.

V views, n subjects, M = V n embeddings, view-major; y (n, k) metadata, all of the global batch.
w (n, n) weights, 1 on the diagonal; s_ij = cos_ij / tau. A pair of an embedding with itself never counts.
With an `exchange` every process gets all rows and computes the whole loss; docs/losses.md has the limits of n.
"""

import torch
from torch import Tensor

from cauc_dist.kernels import Kernel, floating
from cauc_dist.losses.batch import Batch, Exchange, NonFinite, full_precision
from cauc_dist.losses.checks import embeddings, metadata, positive


@full_precision()
def threshold(z: Tensor, y: Tensor, kernel: Kernel, tau: float = 0.1, exchange: Exchange = Batch) -> Tensor:
    """Each positive k repels only those less alike than itself   (Barbano et al. 2023, arXiv 2211.08326, L^thr).

    -(1/M) sum_i sum_{k!=i} p_ik log[ e^{s_ik} / (e^{s_ik} + sum_{j!=i, w_ij < w_ik} e^{s_ij}) ]

    Sorted by w, the inner sum is a running log-sum-exp: M^2 log M time, M^2 memory. The released code has the
    inequality the other way round; this is the formula.
    """
    positive(tau=tau)
    z, batch = embeddings(z, exchange=exchange)
    z = batch.whole(z)
    s = others(cosine(pool(z))) / tau
    # Ranks in the precision of y: rounding w to z's would make ties.
    w = others(pool_weights(kernel(metadata(y, batch)), len(z)))
    less = _log_sum_up_to(s, w, strictly=True)
    p = divide(w, w.sum(1, keepdim=True)).to(z.dtype)
    return finite((p * (torch.logaddexp(s, less) - s)).sum() / len(s), batch)


@full_precision()
def expw(
    z: Tensor, y: Tensor, kernel: Kernel, tau: float = 0.1, shifted: bool = False, exchange: Exchange = Batch
) -> Tensor:
    """The less alike, the stronger the repulsion, inside the exponent   (Barbano et al. 2023, arXiv 2211.08326, L^exp).

    -(1/M) sum_i sum_{k!=i} p_ik [ s_ik - log sum_{j!=i} e^{s_ij (1 - w_ij)} ]

    `shifted`: from s its row maximum (self included, no gradient) is taken first. That is no mere stabilisation, since
    (1 - w) multiplies it: another loss, and the one the released code computes.
    """
    positive(tau=tau)
    z, batch = embeddings(z, exchange=exchange)
    z = batch.whole(z)
    s = cosine(pool(z)) / tau
    if shifted:
        s = s - s.detach().amax(1, keepdim=True)
    s = others(s)
    w = others(pool_weights(kernel(metadata(y, batch)).to(z.dtype), len(z)))
    c = others(pool_weights(kernel.complement(metadata(y, batch)).to(z.dtype), len(z)))
    p = divide(w, w.sum(1, keepdim=True))
    return finite((p * ((s * c).logsumexp(1, keepdim=True) - s)).sum() / len(s), batch)


@full_precision()
def rank_n_contrast(z: Tensor, y: Tensor, tau: float = 2.0, exchange: Exchange = Batch) -> Tensor:
    """Distances of embeddings in the order of distances of labels   (Zha et al. 2023, arXiv 2210.01189).

    -1/(M(M-1)) sum_{i!=j} log[ e^{S_ij} / sum_{k!=i, |y_i-y_k| >= |y_i-y_j|} e^{S_ik} ],  S_ij = -||z_i - z_j||_2 / tau

    |.| is the L1 distance over the columns of y (n, k); z is NOT normalised. No value of y may be missing.
    """
    positive(tau=tau)
    z, batch = embeddings(z, exchange=exchange)
    z = batch.whole(z)
    y = metadata(y, batch)
    if y.ndim != 2:
        raise ValueError(f"y has shape {tuple(y.shape)}; wanted (n, k)")
    if bool(y.isnan().any()):
        raise ValueError(f"y has {int(y.isnan().sum())} missing value(s); wanted none: rank_n_contrast ranks all pairs")
    S = others(torch.cdist(pool(z), pool(z), compute_mode="donot_use_mm_for_euclid_dist")) / -tau
    gap = others(pool_weights(_l1(floating(y)), len(z)))
    at_least = _log_sum_up_to(S, -gap, strictly=False)
    return finite((at_least - S).mean(), batch)


def finite(loss: Tensor, batch: Batch) -> Tensor:
    """The loss; NonFinite, with the rows of z, where it is not a finite number (every process has the same)."""
    if not bool(loss.isfinite()):
        raise NonFinite.of(batch)
    return loss


def smoother(y: Tensor, batch: Batch, kernel: Kernel, lam: float) -> Tensor:
    """A = (K + lam I)^-1 K (n, n), solved in fp64: K may be all but singular."""
    if not kernel.positive_semidefinite:
        raise ValueError(
            "the kernel has a column with missing='ignore', so it is not positive semi-definite; "
            "wanted 'marginal' or 'distinct' for the kernel form of decoupled_uniformity"
        )
    K = kernel(metadata(y, batch)).double()
    A: Tensor = torch.linalg.solve(K + lam * torch.eye(len(K), dtype=K.dtype, device=K.device), K)
    return A.to(batch.z.dtype)


def _l1(y: Tensor) -> Tensor:
    """(n, n): sum over columns of |y_i - y_j|."""
    return (y[:, None] - y[None, :]).abs().sum(-1)


def _log_sum_up_to(s: Tensor, key: Tensor, strictly: bool) -> Tensor:
    """Of each row i and k: log sum e^{s_ij} over the j with key_ij < key_ik (or <=); -inf where there is none."""
    ascending, order = key.sort(1)
    running = s.gather(1, order).logcumsumexp(1)
    count = torch.searchsorted(ascending, key, right=not strictly)
    return running.gather(1, (count - 1).clamp(min=0)).where(count > 0, -torch.inf)


def pool(z: Tensor) -> Tensor:
    """(V, n, D) -> (M, D), view-major."""
    return z.reshape(-1, z.shape[-1])


def pool_weights(w: Tensor, views: int) -> Tensor:
    """(n, n) -> (M, M): both views of a subject carry its metadata, so its own other view weighs w_ii."""
    return w.repeat(views, views)


def cosine(z: Tensor) -> Tensor:
    """(..., m, D) -> (..., m, m): z.z', the cosine of unit rows."""
    return z @ z.mT


def others(x: Tensor) -> Tensor:
    """(..., m, m) -> (..., m, m-1): each row without its own column."""
    m = x.shape[-1]
    # Flat, without its first number, in rows of m + 1: the diagonal is the last column.
    return x.flatten(-2)[..., 1:].reshape(*x.shape[:-2], m - 1, m + 1)[..., :-1].reshape(*x.shape[:-1], m - 1)


def divide(w: Tensor, mass: Tensor) -> Tensor:
    """w / mass; 0 where the mass is 0."""
    return w / mass.where(mass > 0, 1.0)
