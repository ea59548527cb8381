"""Every objective under a name, and small data with missing values: what the tests of losses share."""

from collections.abc import Callable

import torch
from torch import Tensor

from cauc_dist.kernels import Kernel, delta, gaussian, product
from cauc_dist.losses import (
    align_cunif,
    align_uniform,
    calign_unif,
    cauc,
    conditional_alignment,
    conditional_uniformity,
    cross_entropy,
    decoupled_uniformity,
    expw,
    ntxent,
    rank_n_contrast,
    squared_error,
    supcon,
    threshold,
    uniformity,
    y_aware_infonce,
)
from tests import oracles

Loss = Callable[[Tensor, Tensor, Kernel], Tensor]

TILED: dict[str, Loss] = {
    "y_aware": y_aware_infonce,
    "y_aware_column": lambda z, y, k: y_aware_infonce(z, y, k, tau=0.3, normalise="column"),
    "alignment": conditional_alignment,
    "alignment_alpha_1": lambda z, y, k: conditional_alignment(z, y, k, alpha=1.0),
    "alignment_global": lambda z, y, k: conditional_alignment(z, y, k, alpha=3.0, normalise="global"),
    "uniformity": lambda z, y, k: uniformity(z),
    "uniformity_pooled": lambda z, y, k: uniformity(z, t=3.0, views="pooled"),
    "conditional_uniformity": conditional_uniformity,
    "conditional_uniformity_row": lambda z, y, k: conditional_uniformity(z, y, k, normalise="row"),
    "conditional_uniformity_pooled": lambda z, y, k: conditional_uniformity(z, y, k, t=5.0, views="pooled"),
    "conditional_uniformity_pooled_row": lambda z, y, k: conditional_uniformity(
        z, y, k, normalise="row", views="pooled"
    ),
    "conditional_uniformity_of_a_sex": lambda z, y, k: conditional_uniformity(z, y, k, within=y[:, 1].nan_to_num(0.0)),
    "cauc": cauc,
    "calign_unif": calign_unif,
    "align_cunif": align_cunif,
    "ntxent": lambda z, y, k: ntxent(z),
    "supcon": lambda z, y, k: supcon(z, y[:, 1]),
    "view_alignment": lambda z, y, k: align_uniform(z, alpha=3.0, lambda_unif=0.0),
    "align_uniform": lambda z, y, k: align_uniform(z),
    "align_uniform_alpha_1": lambda z, y, k: align_uniform(z, alpha=1.0, t=3.0),
    "decoupled": lambda z, y, k: decoupled_uniformity(z),
    "kernel_decoupled": lambda z, y, k: decoupled_uniformity(z, y, k, lam=0.1),
}
"""Loss of z, y of two columns and its kernel; tile by tile."""

DENSE: dict[str, Loss] = {
    "threshold": threshold,
    "expw": expw,
    "expw_shifted": lambda z, y, k: expw(z, y, k, shifted=True),
    "rank_n_contrast": lambda z, y, k: rank_n_contrast(z, y.nan_to_num(25.0)),
}

SUPERVISED: dict[str, Loss] = {
    "cross_entropy": lambda z, y, k: cross_entropy(z, y[:, 1]),
    "squared_error": lambda z, y, k: squared_error(z, y),
}

ON_SPHERE = TILED | DENSE
EVERY = ON_SPHERE | SUPERVISED
WITHOUT_KERNEL = ["uniformity", "uniformity_pooled", "ntxent", "supcon", "view_alignment", "align_uniform"]
WITHOUT_KERNEL += ["align_uniform_alpha_1", "decoupled", "rank_n_contrast", *SUPERVISED]
WITH_KERNEL = [name for name in EVERY if name not in WITHOUT_KERNEL]


def grad(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z)
    (found,) = torch.autograd.grad(value, z)
    return value.detach(), found


def tangent(g: Tensor, z: Tensor) -> Tensor:
    """g without its part along z."""
    return g - (g * z).sum(-1, keepdim=True) * z


def hidden_case(views: int = 2, n: int = 6) -> tuple[Tensor, Tensor, Kernel, list[list[float]]]:
    """z, y of two columns with values missing, a fitted kernel, and its weights by a loop."""
    y, train = oracles.cohort(n, seed=4, hidden=0.3), oracles.cohort(9, seed=1, hidden=0.2)
    assert 0 < y.isnan().sum() < y.numel()
    kernel = product(age=gaussian(4.0), sex=delta("distinct")).fit(train)
    w = oracles.weights([("gaussian", 4.0, "marginal", 1.0), ("delta", 1.0, "distinct", 1.0)], train, y)
    return oracles.unit(views, n, 4, seed=2), y, kernel, w
