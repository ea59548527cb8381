"""Published objectives to compare with. Letters and shapes: `cauc_dist.losses.tiled`; see docs/losses.md.

z (V, b, D) of unit rows in, a scalar of z's dtype and device out, differentiable in z; `exchange` as in
`cauc_dist.losses.paper`. Time M^2 D, memory a few times z (the kernel form of `decoupled_uniformity`: n x n).
"""

from torch import Tensor

from cauc_dist.kernels import Kernel
from cauc_dist.losses import terms
from cauc_dist.losses.batch import Batch, Exchange, NonFinite, full_precision
from cauc_dist.losses.checks import Views, choice, codes, embeddings, positive, spread, temperature
from cauc_dist.losses.dense import smoother
from cauc_dist.losses.similar import Alone, Factored
from cauc_dist.losses.terms import evaluate


def ntxent(z: Tensor, tau: float = 0.1, exchange: Exchange = Batch) -> Tensor:
    """SimCLR: (1/M) sum_i [ -s_ii' + log sum_{k!=i} e^{s_ik} ], i' the own other view   (arXiv 2002.05709).

    More than two views: the mean over the other ones.
    """
    temperature(tau)
    z, batch = embeddings(z, views=2, exchange=exchange)
    return evaluate(z, batch, (1.0, terms.info_nce(tau, Alone())))


def supcon(z: Tensor, labels: Tensor, tau: float = 0.1, exchange: Exchange = Batch) -> Tensor:
    """Positives are all embeddings of one label, mean outside the log   (L_out, eq. 2 of arXiv 2004.11362).

    labels (n,), numbers; a subject without a label (NaN) has its own other view only.
    """
    temperature(tau)
    z, batch = embeddings(z, exchange=exchange)
    return evaluate(z, batch, (1.0, terms.info_nce(tau, Factored(codes(labels, batch)))))


def align_uniform(
    z: Tensor,
    alpha: float = 2.0,
    t: float = 2.0,
    lambda_align: float = 1.0,
    lambda_unif: float = 1.0,
    views: Views = "within",
    exchange: Exchange = Batch,
) -> Tensor:
    """mean_i ||z_i - z_i'||^alpha + log mean_{i<j} e^{-t d_ij}   (Wang & Isola, arXiv 2005.10242).

    Weights 1 and 1, the defaults of their released STL-10 script (for `cauc` the default is t and 1). `views` as in
    `uniformity`: averaged over views, as they do, or of all pairs.
    """
    positive(alpha=alpha)
    spread(t)
    choice("views", views, "within", "pooled")
    z, batch = embeddings(z, views=2, exchange=exchange)
    unif = terms.uniformity(t, views == "pooled")
    return evaluate(z, batch, (lambda_align, terms.view_alignment(alpha)), (lambda_unif, unif))


@full_precision()
def decoupled_uniformity(
    z: Tensor,
    y: Tensor | None = None,
    kernel: Kernel | None = None,
    t: float = 2.0,
    lam: float = 0.01,
    exchange: Exchange = Batch,
) -> Tensor:
    """Uniformity of the subjects' centroids, with no alignment term   (Dufumier et al. 2023, arXiv 2206.01646).

    log mean_{i<j} e^{-t ||mu_i - mu_j||^2}, mu_i the mean of the views of i, not normalised again. With a kernel, mu
    becomes A mu, A = (K + lam I)^-1 K, which has no gradient; every process then computes the whole loss. Without a
    kernel, y is not looked at.
    """
    spread(t)
    positive(lam=lam)
    z, batch = embeddings(z, exchange=exchange)
    if kernel is not None:
        if y is None:
            raise ValueError("a kernel is given without y; wanted y (n, k) with it")
        mu = smoother(y, batch, kernel, lam) @ batch.whole(z).mean(0)  # (n, D)
        centroids = Batch(mu[None])
    else:
        mu = z.mean(0)  # (b, D)
        centroids = exchange(mu[None])
    try:
        return evaluate(mu[None], centroids, (1.0, terms.distance_uniformity(t)))
    except NonFinite:  # on every process alike
        raise NonFinite.of(batch) from None  # names rows of z, not centroids
