"""The objectives as pure functions of tensors, dense (M x M). Definitions, sources and limits: docs/losses.md."""

from cauc_dist.losses.baselines import (
    align_uniform,
    decoupled_uniformity,
    expw,
    ntxent,
    rank_n_contrast,
    supcon,
    threshold,
)
from cauc_dist.losses.paper import (
    cauc,
    conditional_alignment,
    conditional_uniformity,
    uniformity,
    y_aware_infonce,
)

__all__ = [
    "align_uniform",
    "cauc",
    "conditional_alignment",
    "conditional_uniformity",
    "decoupled_uniformity",
    "expw",
    "ntxent",
    "rank_n_contrast",
    "supcon",
    "threshold",
    "uniformity",
    "y_aware_infonce",
]
