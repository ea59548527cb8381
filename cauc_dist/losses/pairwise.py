"""What all objectives share: checks, similarities of pairs, and a weighted log-mean-exp. Dense: M x M numbers.

V  views of a subject (2)        n  subjects of the GLOBAL batch        M = V n  embeddings, view-major
D  width of an embedding         z  (V, n, D), rows of unit norm        k  metadata columns of y (n, k)
w  (n, n) weights in [0, 1], 1 on the diagonal      d_ij = ||z_i - z_j||^2 = 2 - 2 cos_ij      s_ij = cos_ij / tau

A pair of an embedding with itself never counts. Half-precision z is raised to fp32 before anything is computed.
"""

from typing import Literal

import torch
from torch import Tensor

from cauc_dist.kernels import Kernel

Views = Literal["within", "pooled"]


def embeddings(z: Tensor, views: int = 1) -> Tensor:
    """z (V, n, D) in fp32 or fp64; refuses another shape, fewer than two subjects, fewer than `views` views."""
    if z.ndim != 3:
        raise ValueError(f"z has shape {tuple(z.shape)}; wanted (V, n, D): views, subjects, width")
    if z.shape[1] < 2:
        raise ValueError(f"z has {z.shape[1]} subject(s); wanted at least 2: a pair needs two")
    if z.shape[0] < views:
        raise ValueError(f"z has {z.shape[0]} view(s); wanted at least {views} of each subject")
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def metadata(z: Tensor, y: Tensor) -> Tensor:
    """y (n, ...) on the device of z; refuses another number of rows than z has subjects."""
    if y.ndim == 0 or y.shape[0] != z.shape[1]:
        raise ValueError(f"y has shape {tuple(y.shape)}; wanted one row for each of {z.shape[1]} subjects")
    return y.to(z.device)


def weights(z: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """w (n, n): computed in the precision of y, given in that of z."""
    return kernel(metadata(z, y)).to(z.dtype)


def complements(z: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """c = w_max - w = 1 - w (n, n), diagonal 0: the supremum of every kernel of ours is 1."""
    return kernel.complement(metadata(z, y)).to(z.dtype)


def equal(labels: Tensor, z: Tensor) -> Tensor:
    """(n, n) bool: subjects of one label; a label that is NaN equals none but itself."""
    if labels.shape != (z.shape[1],):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; wanted ({z.shape[1]},): one label a subject")
    labels = labels.to(z.device)
    return (labels[:, None] == labels[None, :]).fill_diagonal_(True)


def positive(**numbers: float) -> None:
    """Refuses a number that is not above 0, by name."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} is {number}; wanted a number above 0")


def choice(name: str, found: str, *valid: str) -> None:
    """Refuses a word that is not one of the valid ones."""
    if found not in valid:
        raise ValueError(f"{name} is {found!r}; wanted {' or '.join(valid)}")


def pool(z: Tensor) -> Tensor:
    """(V, n, D) -> (M, D), view-major."""
    return z.reshape(-1, z.shape[-1])


def grouped(z: Tensor, views: Views) -> Tensor:
    """The sets whose pairs repel: `within`, V sets of n; `pooled`, one set of M."""
    choice("views", views, "within", "pooled")
    return z if views == "within" else pool(z)[None]


def pool_weights(w: Tensor, views: int) -> Tensor:
    """(n, n) -> (M, M): both views of a subject carry its metadata, so its own other view weighs w_ii."""
    return w.repeat(views, views)


def cosine(z: Tensor) -> Tensor:
    """(..., m, D) -> (..., m, m): z.z', the cosine of unit rows."""
    return z @ z.mT


def squared_distance(z: Tensor) -> Tensor:
    """d = 2 - 2 cos, of unit rows.

    Its gradient differs from that of ||z_i - z_j||^2 in the radial part only, which normalising z removes.
    """
    return 2 - 2 * cosine(z)


def others(x: Tensor) -> Tensor:
    """(..., m, m) -> (..., m, m-1): each row without its own column."""
    m = x.shape[-1]
    # Flat, without its first number, in rows of m + 1: the diagonal is the last column.
    return x.flatten(-2)[..., 1:].reshape(*x.shape[:-2], m - 1, m + 1)[..., :-1].reshape(*x.shape[:-1], m - 1)


def power(d: Tensor, exponent: float) -> Tensor:
    """d^exponent, with gradient 0 instead of infinity where d = 0."""
    if exponent == 1:
        return d
    apart = d > 0
    return d.where(apart, 1.0).pow(exponent).where(apart, 0.0)


def divide(w: Tensor, mass: Tensor) -> Tensor:
    """w / mass; 0 where the mass is 0."""
    return w / mass.where(mass > 0, 1.0)


def log_mean_exp(s: Tensor, c: Tensor) -> Tensor:
    """log[ sum c e^s / sum c ] over the last two dimensions; 0, with gradient 0, where all weights c are 0.

    In the log domain: e^{-t d} underflows in fp32 from t d = 87 on, and t = 1/(2 tau) is 50 for tau = .01.
    """
    some = c.sum((-2, -1), keepdim=True) > 0
    log_c = c.log().where(some, 0.0)
    value = torch.logsumexp(s + log_c, (-2, -1)) - torch.logsumexp(log_c, (-2, -1))
    return value.where(some[..., 0, 0], 0.0)
