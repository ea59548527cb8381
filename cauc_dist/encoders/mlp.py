"""An encoder for table rows, such as volumes of brain regions.

B  rows     c  columns of the table     w  units of a layer
"""

from typing import Literal

from torch import Tensor, nn

from cauc_dist.encoders.blocks import Blocks
from cauc_dist.encoders.norm import norm
from cauc_dist.encoders.pool import at_least_fp32


class MLP(nn.Module):
    """(B, c) -> h (B, w), fp32: two layers of w units, each linear, norm, ReLU.

    Weights start normal with variance 2 / fan-in (arXiv 1502.01852).
    """

    def __init__(self, columns: int, width: int, kind: Literal["batch", "group"]) -> None:
        super().__init__()
        self.layers = Blocks()
        for before in (columns, width):
            linear = nn.Linear(before, width, bias=False)
            nn.init.kaiming_normal_(linear.weight)
            self.layers.append(nn.Sequential(linear, norm(kind, width), nn.ReLU(inplace=True)))
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.layers(x))
