"""A chain of blocks that may keep their inputs only: activation checkpointing.

Chen et al., arXiv 1604.06174. Gradients have the same bits; a forward pass more is the price.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cauc_dist.encoders.norm import Kept, frozen


class Blocks(nn.Sequential):
    """nn.Sequential; where `recompute` is on, training keeps what goes into a block and computes the rest again.

    BatchNorm takes its statistics in the first of the two passes only. torch's non-reentrant form: the
    reentrant one drops the gradients of a first block, whose input needs none.
    """

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        again = self.recompute and self.training and torch.is_grad_enabled()
        for block in self:
            x = checkpoint(block, x, use_reentrant=False, context_fn=_passes) if again else block(x)
        return x


def _passes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    moments = Kept()
    return frozen(tracks=True, keep=moments), frozen(use=moments)


def recompute(model: nn.Module) -> None:
    """Turn it on in every chain of the model."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.recompute = True
