"""DenseNet-121 in three dimensions, as the published y-Aware code trains it.

B  volumes     c  input channels     G = 32 growth rate
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cauc_dist.encoders.blocks import Blocks
from cauc_dist.encoders.norm import norm
from cauc_dist.encoders.pool import mean_pool

GROWTH, STEM, BLOCKS, BOTTLENECK = 32, 64, (6, 12, 24, 16), 4

Norm = Literal["batch", "group"]


class DenseNet121(nn.Module):
    """(B, c, X, Y, Z) -> h (B, 1024), fp32; 11,240,576 parameters for c = 1, each side 29 voxels or more.

    Huang et al., arXiv 1608.06993 (growth 32, blocks of 6, 12, 24, 16 layers, compression 1/2), in the configuration of
    Dufumier et al., arXiv 2106.08808: no convolution has a bias, and NO norm stands between the last block and
    ReLU + average pooling (their classifier has one, their contrastive network has not). With the projector
    1024-512-128 that makes 11,831,040 parameters. Filters start as in He et al., arXiv 1502.01852: normal, variance
    2 / fan-in.

    Memory: dominated by activations, about 0.9 GiB a volume of 121x145x121 in fp32.
    """

    def __init__(self, channels: int, kind: Norm) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(channels, STEM, 7, stride=2, padding=3, bias=False),
            norm(kind, STEM),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(3, stride=2, padding=1),
        )
        stages: list[nn.Module] = []
        self.width = STEM
        for layers in BLOCKS:
            if stages:
                stages.append(_transition(self.width, kind))
                self.width //= 2
            stages.append(Blocks(*[_Layer(self.width + i * GROWTH, kind) for i in range(layers)]))
            self.width += layers * GROWTH
        self.stages = Blocks(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.stem(x))  # (B, 1024, ~X/32, ~Y/32, ~Z/32)
        return mean_pool(F.relu(features, inplace=True))


class _Layer(nn.Module):
    """Appends G feature maps to those it is given: norm, ReLU, 1x1x1 to 4G, norm, ReLU, 3x3x3 to G."""

    def __init__(self, channels: int, kind: Norm) -> None:
        super().__init__()
        self.new = nn.Sequential(
            norm(kind, channels),
            nn.ReLU(inplace=True),
            nn.Conv3d(channels, BOTTLENECK * GROWTH, 1, bias=False),
            norm(kind, BOTTLENECK * GROWTH),
            nn.ReLU(inplace=True),
            nn.Conv3d(BOTTLENECK * GROWTH, GROWTH, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 1)


def _transition(channels: int, kind: Norm) -> nn.Module:
    """Half the channels, half of each side (rounded down)."""
    return nn.Sequential(
        norm(kind, channels), nn.ReLU(inplace=True), nn.Conv3d(channels, channels // 2, 1, bias=False), nn.AvgPool3d(2)
    )
