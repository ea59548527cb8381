"""From a feature map to one row a sample, in fp32 whatever the feature map is in.

B  samples     C  channels
"""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32; float64 stays float64 (the exactness tests run in it)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_pool(x: Tensor) -> Tensor:
    """Global average: (B, C, *spatial) -> (B, C), fp32."""
    return at_least_fp32(x).flatten(2).mean(2)


def mean_max_pool(x: Tensor) -> Tensor:
    """Global average and global maximum side by side: (B, C, *spatial) -> (B, 2C), fp32.

    The maximum says whether a pattern occurs anywhere, which the average of a large volume drowns.
    """
    values = at_least_fp32(x).flatten(2)
    return torch.cat([values.mean(2), values.amax(2)], 1)
