"""The objectives as pure functions of tensors. Definitions, sources, costs and limits: docs/losses.md."""

from cauc_dist.losses.baselines import align_uniform, decoupled_uniformity, ntxent, supcon
from cauc_dist.losses.dense import expw, rank_n_contrast, threshold
from cauc_dist.losses.paper import (
    align_cunif,
    calign_unif,
    cauc,
    conditional_alignment,
    conditional_uniformity,
    geometry,
    uniformity,
    y_aware_infonce,
)
from cauc_dist.losses.supervised import cross_entropy, squared_error
from cauc_dist.losses.terms import loss_and_grad

__all__ = [
    "align_cunif",
    "align_uniform",
    "calign_unif",
    "cauc",
    "conditional_alignment",
    "conditional_uniformity",
    "cross_entropy",
    "decoupled_uniformity",
    "expw",
    "geometry",
    "loss_and_grad",
    "ntxent",
    "rank_n_contrast",
    "squared_error",
    "supcon",
    "threshold",
    "uniformity",
    "y_aware_infonce",
]
