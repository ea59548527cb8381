"""Normalisation between layers: over groups of channels of one sample, or over the batch of all ranks.

B  rows on this rank     C  channels     N  values of one channel in the GLOBAL batch     W  ranks
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def norm(kind: Literal["batch", "group"], channels: int) -> nn.Module:
    """GroupNorm or a BatchNorm over all ranks, for (B, channels) and (B, channels, *spatial)."""
    return BatchNorm(channels) if kind == "batch" else nn.GroupNorm(groups(channels), channels)


Moments = tuple[Tensor, Tensor, Tensor]
"""Mean (C,), biased variance (C,), both float64, and N."""


class Kept(dict["BatchNorm", list[Moments]]):
    """The moments that each BatchNorm found in a forward pass, for another one of the same rows: W ranks need not meet.

    Two float64 a channel: .7 MB of a DenseNet121.
    """


@dataclass(frozen=True)
class _Pass:
    tracks: bool = True
    keep: Kept | None = None
    use: Kept | None = None


_now = _Pass()


@contextmanager
def frozen(*, tracks: bool = False, keep: Kept | None = None, use: Kept | None = None) -> Iterator[None]:
    """How BatchNorm behaves in a forward pass that is done twice.

    It leaves its running statistics alone in one of the two (`tracks`), and may `keep` the moments of the first to
    `use` them in the second, which takes them away.
    """
    global _now
    before, _now = _now, _Pass(tracks and _now.tracks, keep, _now.use if use is None else use)
    try:
        yield
    finally:
        _now = before


def groups(channels: int) -> int:
    """The largest divisor of `channels` that is at most 32 and leaves at least four channels in a group, or 1.

    32 is the default of Wu & He, arXiv 1803.08494. Four channels a group is ours: a group of one channel is instance
    norm, which gives everybody the same mean of each channel, and that mean is what global pooling reads.
    """
    return max((g for g in range(1, 33) if channels % g == 0 and channels // g >= 4), default=1)


class BatchNorm(_BatchNorm):
    """W ranks equal one process on the concatenated rows: value, running statistics, gradients; B may differ by rank.

    y = (x - mean) / sqrt(var + eps) * weight + bias; mean and (biased) var of the N values of a channel over the
    default process group. Without one, or at W = 1, it is nn.BatchNorm; state_dict is nn.BatchNorm's in both cases.
    Training costs one all-reduce of 2C+1 float64 forward and one of 2C backward, on any backend; a second forward of
    the same rows (GradCache, activation checkpointing) costs none. It keeps only x for the backward. In eval mode there
    is no collective. Statistics are fp32 for fp16 and bf16, and combined in fp64.

    Loss scaling presumed: the backward SUMS over ranks, so each rank must back-propagate its own share of ONE global
    loss L, all shares to the same scale s. The gradients that a rank then holds are s * (the part of dL/dparameter that
    runs through its rows), and their SUM over ranks is s * dL/dparameter. Here s = W: the loss hands every rank its
    slice of dL/dz times W, and DeepSpeed AVERAGES parameter gradients, which gives dL/dparameter. A loss that every
    rank computes on its own rows only, averaged by the engine, is L = mean of those losses, with s = W again.

    In training mode every rank must call it equally often, each time with a row or more: one that stays out hangs all.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"BatchNorm found an input of shape {tuple(input.shape)}, wanted (B, C) or (B, C, *spatial)"
            )

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            # Copies, not None: recomputing a block must save as many tensors as its first pass did.
            mean, var = (running if _now.tracks else running.clone() for running in self._running)
            self._count()
            return F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=self._pace, eps=self.eps)
        mean, var, count = self._moments(x)
        if _now.tracks:
            with torch.no_grad():
                for running, new in zip(self._running, (mean, var * (count / (count - 1))), strict=True):
                    running.lerp_(new.to(running), self._pace)
            self._count()
        rstd = torch.rsqrt(var + self.eps)
        return _Normalise.apply(x, self.weight, self.bias, mean, rstd, count)  # type: ignore[no-any-return, no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _moments(self, x: Tensor) -> Moments:
        """Those of an earlier pass over the same rows, where they were kept; else all ranks meet."""
        found = _now.use.get(self) if _now.use else None
        moments = found.pop(0) if found else _global_moments(x)
        if _now.keep is not None:
            _now.keep.setdefault(self, []).append(moments)
        return moments

    @property
    def _running(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var

    @property
    def _pace(self) -> float:
        assert self.momentum is not None
        return self.momentum

    def _count(self) -> None:
        if self.num_batches_tracked is not None and _now.tracks:
            self.num_batches_tracked.add_(1)


@torch.no_grad()
def _global_moments(x: Tensor) -> Moments:
    """Mean (C,), biased variance (C,), both float64, and N, over the rows of all ranks; the same bits on every rank.

    Each rank centres its own rows first: E[x^2] - mean^2 of whole volumes would cancel in fp32. What is left to
    subtract, the spread of W means, is done in float64.
    """
    var, mean = torch.var_mean(_wide(x), _all_but_channels(x), correction=0)
    mean, var, own = mean.double(), var.double(), x.numel() / x.shape[1]
    sums = torch.cat([own * mean, own * (var + mean * mean), mean.new_tensor([own])])  # (2C + 1,)
    dist.all_reduce(sums)
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    return mean, (square - mean * mean).clamp_min(0.0), sums[-1]


class _Normalise(torch.autograd.Function):
    """y = (x - mean) * rstd * weight + bias, where mean and rstd are themselves functions of all ranks' x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, count: Tensor) -> Tensor:
        mean, rstd = mean.to(weight), rstd.to(weight)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        y = (_wide(x) - _column(mean, x)).mul_(_column(rstd * weight, x)).add_(_column(bias, x))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        dy, axes = _wide(grads[0]), _all_but_channels(x)
        standard = (_wide(x) - _column(mean, x)).mul_(_column(rstd, x))
        dbias, dweight = dy.sum(axes), (dy * standard).sum(axes)  # this rank's rows
        sums = torch.cat([dbias, dweight]).double()
        dist.all_reduce(sums)
        of_mean, of_rstd = (sums / count).to(weight).chunk(2)  # what every rank's loss says about mean and rstd
        dx = (dy - _column(of_mean, x)).sub_(standard.mul_(_column(of_rstd, x))).mul_(_column(rstd * weight, x))
        return dx.to(x.dtype), dweight, dbias, None, None, None


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _all_but_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _column(v: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, ..., 1), to go with x."""
    return v.view(1, -1, *[1] * (x.dim() - 2))
