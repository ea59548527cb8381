"""The optimiser of a run, and its learning rate at each step.

AdamW, Adam and SGD are torch's, LARS (layer-wise rates, arXiv 1708.03888) pytorch-optimizer's.
"""

import math
from typing import Any

import torch
from torch import nn

from cauc_dist.config import Optim
from cauc_dist.errors import BadInput


def moments(optim: Optim) -> tuple[str, ...]:
    """What the optimiser keeps of each parameter, in its shape, beside a step count. Zeros are a fresh start."""
    if optim.name in ("adamw", "adam"):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optim.momentum else ()


def make(optim: Optim, model: nn.Module, lr: float, *, fused: bool) -> torch.optim.Optimizer:
    """The optimiser of the parameters of `model` that learn; `fused`: torch's kernels that update in one launch.

    Matrices and filters decay; norms and biases (vectors and scalars) do not. For adam, sgd and lars the decay is an L2
    term in the gradient. lars: a matrix moves at lr * .001 |w| / (|g| + decay |w|), a vector at lr, as in SGD.
    """
    groups = _groups(model, optim.weight_decay)
    match optim.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=optim.betas, fused=fused)
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum, fused=fused)
        case "lars":
            from pytorch_optimizer import LARS  # .7 s that only its runs pay

            return LARS(groups, lr=lr, momentum=optim.momentum, trust_coefficient=1e-3)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def peak_lr(optim: Optim, batch_size: int) -> float:
    """The learning rate after warm-up: `lr`, or what `lr_scaling` makes of it for this global batch.

    linear: arXiv 1706.02677; sqrt: arXiv 2002.05709, B.1. BadInput where the batch that `lr` belongs to is not said.
    """
    if optim.lr_scaling == "none":
        return optim.lr
    if optim.reference_batch is None:
        raise BadInput(
            f"optim.lr_scaling {optim.lr_scaling} without optim.reference_batch",
            wanted="the batch size that optim.lr was chosen for",
            do="set --optim.reference-batch, or --optim.lr-scaling none",
        )
    ratio = batch_size / optim.reference_batch
    return optim.lr * (ratio if optim.lr_scaling == "linear" else math.sqrt(ratio))


def learning_rate(optim: Optim, peak: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Linear warm-up from 0 to `peak` over `warmup_epochs`, then a half cosine to 0 at the end, constant, or in steps.

    In steps: peak * step_factor ^ floor(epoch / step_epochs), epochs counted from the run's first.
    """
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * min(1.0, (step + 1) / max(1.0, warmup))
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "step":
        return float(peak * optim.step_factor ** (step // (optim.step_epochs * steps_per_epoch)))
    done = (step - warmup) / max(1.0, epochs * steps_per_epoch - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
