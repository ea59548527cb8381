"""Where a trained encoder puts subjects on the sphere, those that it saw and those that it did not.

V views, n subjects, D width of z.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cauc_dist import checkpoint
from cauc_dist.augment import views
from cauc_dist.checkpoint import Saved
from cauc_dist.config import RunConfig
from cauc_dist.objective import Objective
from cauc_dist.prepare import parts
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import chunks
from cauc_dist.stream.values import values
from cauc_dist.train import build_model

Rows = NDArray[np.int64]
MOST = 2048
"""Subjects of each part: pairs are counted."""


def geometry(run: RunConfig, store: Store, saved: Saved | None) -> dict[str, dict[str, float]]:
    """Alignment, uniformity, their conditional forms, effective rank of z: `train` and `held-out` subjects.

    Of the run's own views, as training draws them but never did (those of the epoch after its last), by the kernel, t
    and alpha of its objective; a kernel is fitted to the training part. Of as many subjects of both parts, evenly
    spread over the store's order, MOST at the most: an effective rank grows with their number. In eval mode. `saved`
    None: the weights that the run began from. What is no number is left out (a conditional uniformity where all are
    alike).
    """
    train, held = parts(run, store)
    y = torch.from_numpy(store.metadata(run.objective.columns))
    objective = Objective(run.objective, y[torch.from_numpy(train)])
    n = min(len(train), len(held), MOST)
    found = {}
    for name, rows in (("train", train), ("held-out", held)):
        some = spread(rows, n)
        z = embedded(run, store, some, saved)
        told = objective.geometry(z, y[torch.from_numpy(some)])
        found[name] = {k: float(v) for k, v in told.items() if math.isfinite(v) and k != "labelled"}
    return found


def spread(rows: Rows, n: int) -> Rows:
    """n of them, evenly over their order."""
    return rows[np.arange(n) * len(rows) // n]


@torch.no_grad()
def embedded(run: RunConfig, store: Store, rows: Rows, saved: Saved | None, chunk: int = 32) -> Tensor:
    """z (V, n, D) of views of those scans, on the CPU."""
    model, given = build_model(run, store.shape), values(store, run.data.normalise, parts(run, store)[0])
    if saved is not None:
        checkpoint.load_module(model, saved.tensors, ema=True)
    device = torch.device("cuda" if run.engine.device != "cpu" and torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    found, start = [], 0
    for x in chunks(store, rows, chunk, given):
        keys = store.keys[rows[start : start + len(x)]]
        drawn = views(x.to(device), keys, seed=run.seed, epoch=run.epochs, augment=run.augment)
        found.append(model(drawn).view(run.augment.views, len(x), -1).cpu())
        start += len(x)
    return torch.cat(found, 1)
