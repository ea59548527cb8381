"""What every objective refuses before it computes anything: shapes, numbers and words that cannot be meant."""

import math
from typing import Literal

import torch
from torch import Tensor

from cauc_dist.losses.batch import Batch, Exchange
from cauc_dist.losses.tiled import DOUBLE

Views = Literal["within", "pooled"]


def embeddings(z: Tensor, views: int = 1, exchange: Exchange = Batch) -> tuple[Tensor, Batch]:
    """z (V, b, D) in fp32 or fp64, and its batch; refuses another shape, fewer than two subjects or `views` views."""
    z = z if z.dtype in (torch.float32, torch.float64) else z.float()
    batch = exchange(z)
    if z.shape[0] < views:
        raise ValueError(f"z has {z.shape[0]} view(s); wanted at least {views} of each subject")
    if batch.n < 2:
        raise ValueError(f"z has {batch.n} subject(s); wanted at least 2: a pair needs two")
    return z, batch


def metadata(y: Tensor, batch: Batch) -> Tensor:
    """y (n, ...) on the device of z; refuses another number of rows than the global batch has subjects."""
    if y.ndim == 0 or y.shape[0] != batch.n:
        raise ValueError(f"y has shape {tuple(y.shape)}; wanted one row for each of {batch.n} subjects")
    return y.to(batch.z.device)


def codes(labels: Tensor, batch: Batch) -> Tensor:
    """(n,) integers, equal for subjects of one label; a label that is NaN equals none but itself."""
    if labels.shape != (batch.n,):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; wanted ({batch.n},): one label a subject")
    found: Tensor = torch.unique(labels.to(batch.z.device), return_inverse=True)[1]
    return found


def positive(**numbers: float) -> None:
    """Refuses a number that is not above 0, by name."""
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} is {number}; wanted a number above 0")


def temperature(tau: float) -> None:
    """Refuses a tau whose e^{1/tau} is beyond float64."""
    positive(tau=tau)
    if 1 / tau > DOUBLE:
        least = math.ceil(1e4 / DOUBLE) / 1e4
        raise ValueError(f"tau is {tau}; wanted at least {least}: e^(1/tau) must fit in float64")


def spread(t: float) -> None:
    """Refuses a t whose e^{2t} is beyond float64."""
    positive(t=t)
    if 2 * t > DOUBLE:
        raise ValueError(f"t is {t}; wanted at most {DOUBLE / 2:g}: e^(2t) must fit in float64")


def choice(name: str, found: str, *valid: str) -> None:
    """Refuses a word that is not one of the valid ones."""
    if found not in valid:
        raise ValueError(f"{name} is {found!r}; wanted {' or '.join(valid)}")
