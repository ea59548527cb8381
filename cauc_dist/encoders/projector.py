"""What follows the encoder in training: the projector, and the unit sphere.

B  samples     H  width of h     D  width of the embedding z
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cauc_dist.encoders.pool import at_least_fp32


class Projector(nn.Module):
    """h (B, width_in) -> (B, out): linear, ReLU, linear, biases start at 0 (arXiv 2106.08808 has 512 and 128)."""

    def __init__(self, width_in: int, hidden: int, out: int) -> None:
        super().__init__()
        first, last = nn.Linear(width_in, hidden), nn.Linear(hidden, out)
        nn.init.zeros_(first.bias)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(first, nn.ReLU(inplace=True), last)

    def forward(self, h: Tensor) -> Tensor:
        z: Tensor = self.layers(h)
        return z


class Model(nn.Module):
    """x (B, c, *spatial) -> z (B, D), rows of unit length, fp32: what DeepSpeed trains.

    Length and division are taken in fp32 even under bf16 autocast. A row of zeros stays zero. `normalise=False` leaves
    the rows as long as they are, for losses that compare distances off the sphere (Rank-N-Contrast, arXiv 2210.01189).
    `bf16`: encoder and projector under autocast. `channels_last`: channels innermost in memory.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        normalise: bool = True,
        *,
        bf16: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.normalise = encoder, projector, normalise
        self.bf16, self.channels_last = bf16, channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next((p.dtype for p in self.parameters()), x.dtype))
        if self.channels_last:
            x = x.contiguous(memory_format=_CHANNELS_LAST[x.ndim])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            z = self.projector(self.encoder(x))
        z = at_least_fp32(z)
        return unit_rows(z) if self.normalise else z


_CHANNELS_LAST = {2: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


def unit_rows(z: Tensor) -> Tensor:
    """Rows of unit length. Each is first divided by its largest entry, which changes neither its direction nor its
    gradient: the squares of a diverged network's rows overflow, and F.normalize would make them zeros that look well.
    """
    largest = z.detach().abs().amax(1, keepdim=True)
    return F.normalize(z / largest.clamp_min(torch.finfo(z.dtype).tiny), dim=1)
