"""Gather-all: the one collective that the loss needs.

V views, b subjects a rank, W ranks, n = b*W subjects in the global batch, D embedding width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed the first and warns of it; older versions know only the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _GatherAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        views, b, width = z.shape
        world_size, ctx.rank, ctx.b = dist.get_world_size(), dist.get_rank(), b
        ctx.world_size = world_size
        flat = z.new_empty((world_size * views, b, width))
        _all_gather(flat, z.contiguous())
        by_rank = flat.view(world_size, views, b, width)
        return by_rank.transpose(0, 1).reshape(views, world_size * b, width)  # (V, n, D): rank r owns rows r*b...

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        start = ctx.rank * ctx.b
        own: Tensor = grads[0][:, start : start + ctx.b] * ctx.world_size
        return own


def gather(z: Tensor) -> Tensor:
    """Every rank gets the embeddings of the whole global batch, in global order.

    z (V, b, D), the same shape on every rank -> (V, n, D), differentiable, any float dtype. One all-gather of
    V*b*D values forward, NO collective backward: the loss that follows is computed whole on every rank from the
    same numbers, so that every rank holds the same dL/dz_all and its own rows are all it needs. They are multiplied
    by W because the trainer AVERAGES parameter gradients over ranks (DeepSpeed, DDP): the sum over ranks of the
    gradients through each rank's own rows is the gradient of one process on the whole batch.

    Not for a loss that differs between ranks (one rank's anchors only): its column gradients would be lost.
    """
    return _GatherAll.apply(z)  # type: ignore[no-any-return, no-untyped-call]
