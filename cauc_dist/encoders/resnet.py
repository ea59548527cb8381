"""ResNet-18 for volumes and for small images.

B  samples     c  input channels
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from cauc_dist.encoders.blocks import Blocks
from cauc_dist.encoders.norm import norm
from cauc_dist.encoders.pool import mean_pool

PUBLISHED = 64  # channels of the first stage
STAGES = (1, 2, 4, 8)  # times as many; two blocks each, the first block of all stages but the first halves the sides

Norm = Literal["batch", "group"]


class ResNet18(nn.Module):
    """(B, c, *spatial) -> h (B, 8 w), fp32, of w = 64 channels in the first stage as published, or another number.

    He et al., arXiv 1512.03385: stem, four stages of two basic blocks, global average pooling; no biases in them.
    `axes=3`: each square kernel becomes a cube, stem 7x7x7 stride 2 and max-pooling 3 stride 2 (33,160,000 parameters
    for c = 1). `axes=2`: for images of 32x32 the stem is 3x3 stride 1 without pooling, as SimCLR's appendix B.9
    (arXiv 2002.05709) has it (11,168,832 parameters for c = 3).
    Filters start normal with variance 2 / fan-out (arXiv 1502.01852).
    """

    def __init__(self, axes: Literal[2, 3], channels: int, kind: Norm, width: int = PUBLISHED) -> None:
        super().__init__()
        if axes == 3:
            self.stem = nn.Sequential(
                nn.Conv3d(channels, width, 7, stride=2, padding=3, bias=False),
                norm(kind, width),
                nn.ReLU(inplace=True),
                nn.MaxPool3d(3, stride=2, padding=1),
            )
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(kind, width), nn.ReLU(inplace=True)
            )
        blocks, before = [], width
        for after in (times * width for times in STAGES):
            blocks += [_Block(axes, before, after, kind), _Block(axes, after, after, kind)]
            before = after
        self.blocks = Blocks(*blocks)
        self.width = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return mean_pool(self.blocks(self.stem(x)))


class _Block(nn.Module):
    """relu(residual(x) + shortcut(x)); a block that changes the channels halves the sides (rounded up)."""

    def __init__(self, axes: Literal[2, 3], before: int, after: int, kind: Norm) -> None:
        super().__init__()
        conv = nn.Conv3d if axes == 3 else nn.Conv2d
        stride = 1 if before == after else 2
        self.residual = nn.Sequential(
            conv(before, after, 3, stride=stride, padding=1, bias=False),
            norm(kind, after),
            nn.ReLU(inplace=True),
            conv(after, after, 3, padding=1, bias=False),
            norm(kind, after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(conv(before, after, 1, stride=stride, bias=False), norm(kind, after))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)
