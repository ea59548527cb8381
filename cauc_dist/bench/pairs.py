"""The objective of a recipe at its batch, against the bare products of matrices that it is made of.

V views, n subjects, D width of z, N = V n embeddings, k metadata columns.
One process computes the whole batch; on W ranks each has 1 / W of the pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cauc_dist import memory
from cauc_dist.bench import rates
from cauc_dist.bench.record import keep
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.objective import Objective
from cauc_dist.store.reader import Store
from cauc_dist.world import World

Say = Callable[[str], None]
ROWS = 1024
"""Rows of the products at a time: no N x N matrix is kept, as in our losses."""
MOST = {"cpu": 16384, "cuda": 262144}
"""Subjects of the largest batch that is tried."""


@dataclass(frozen=True)
class Size:
    """Forward and backward of one batch, the best of some calls."""

    n: int
    loss_s: float
    products_s: float
    """Of Z Z^T and (Z Z^T) Z: cosines of all pairs, and a gradient through them."""
    grown_bytes: int
    """How much the loss raised the process's peak of memory: it is never lowered, so of sizes in ascending order."""

    @property
    def ratio(self) -> float:
        return self.loss_s / self.products_s


@dataclass(frozen=True)
class Losses:
    objective: str
    views: int
    width: int
    batch: int
    """Of the recipe."""
    device: str
    sizes: tuple[Size, ...]

    @property
    def pair_s(self) -> float:
        """Seconds of one more pair of subjects, from the two largest batches; 0 where they tell nothing."""
        return slope([(size.n, size.loss_s) for size in self.sizes])


def loss(run: RunConfig, *, quick: bool, out: Path | None, say: Say) -> Losses:
    """Measure the run's loss at its batch and at larger ones and say what it costs; the last line says what limits it.

    Metadata are those of the run's store, its scans again and again where there are too few.
    """
    store = Store.open(run.data.store)
    store.require(run.objective.columns)
    found = measured(run, store, [run.batch_size * k for k in ((1, 4) if quick else (1, 4, 16))], 0.5 if quick else 2.0)
    say(f"{run.name}: {found.objective}, {found.views} views, embeddings of {found.width}, {found.device}")
    say(f"  {'subjects':>10}{'loss, s':>12}{'products, s':>13}{'ratio':>8}{'memory, MiB':>13}")
    for size in found.sizes:
        grown = size.grown_bytes / 2**20
        say(f"  {size.n:>10,}{size.loss_s:>12.5f}{size.products_s:>13.5f}{size.ratio:>8.2f}{grown:>13,.1f}")
    verdict = limits(found)
    say(verdict)
    keep(found, verdict, out)
    return found


def measured(run: RunConfig, store: Store, batches: Sequence[int], seconds: float) -> Losses:
    """The loss of each batch up to what this device is asked for at most."""
    device = World().device(run.engine.device)
    if run.batch_size > MOST[device.type]:
        wanted = f"{MOST[device.type]:,} or less in one process on {device.type}"
        do = "set --batch-size lower: time grows with its square"
        raise BadInput(f"batch_size {run.batch_size:,}", wanted=wanted, do=do)
    y = torch.from_numpy(store.metadata(run.objective.columns))
    objective = Objective(run.objective, y)
    if run.batch_size < 2:
        raise BadInput(f"batch_size {run.batch_size}", wanted="2 or more", do="set --batch-size to that")
    sizes = [n for n in sorted(batches) if n <= MOST[device.type]]
    return Losses(
        objective=run.objective.name,
        views=run.augment.views,
        width=run.projector.out,
        batch=run.batch_size,
        device=str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        sizes=_sizes(run, objective, y, sizes, device, seconds / 2),
    )


def _sizes(
    run: RunConfig, objective: Objective, y: Tensor, batches: Sequence[int], device: torch.device, seconds: float
) -> tuple[Size, ...]:
    """The losses in ascending order of batch, then the products: the memory of these is not taken for the losses'."""
    losses = [_loss(run, objective, y, n, device, seconds) for n in batches]
    bare = [rates.best(partial(products, _embeddings(run, n, device).flatten(0, 1)), seconds, device) for n in batches]
    return tuple(Size(n, took, alone, grown) for n, (took, grown), alone in zip(batches, losses, bare, strict=True))


def _loss(
    run: RunConfig, objective: Objective, y: Tensor, n: int, device: torch.device, seconds: float
) -> tuple[float, int]:
    """(seconds of forward and backward, bytes by which the peak grew)."""
    z, before = _embeddings(run, n, device).requires_grad_(), memory.peak(device)
    draw = torch.Generator().manual_seed(n)
    rows = y[torch.randperm(len(y), generator=draw).repeat(-(-n // len(y)))[:n]].to(device)
    took = rates.best(lambda: torch.autograd.grad(objective.loss(z, rows), z), seconds, device)
    return took, max(0, memory.peak(device) - before)


def _embeddings(run: RunConfig, n: int, device: torch.device) -> Tensor:
    """(V, n, D) of unit rows, drawn."""
    z = torch.randn(run.augment.views, n, run.projector.out, generator=torch.Generator().manual_seed(n))
    return torch.nn.functional.normalize(z, dim=-1).to(device)


def products(z: Tensor) -> Tensor:
    """(Z Z^T) Z (N, D), ROWS rows at a time."""
    found = torch.empty_like(z)
    for start in range(0, len(z), ROWS):
        torch.mm(z[start : start + ROWS] @ z.T, z, out=found[start : start + ROWS])
    return found


def slope(times: Sequence[tuple[int, float]]) -> float:
    """Seconds a pair, of the two largest (n, seconds); 0 where there is one, or where more takes no longer."""
    if len(times) < 2:
        return 0.0
    (n, few), (m, many) = sorted(times)[-2:]
    return max(0.0, (many - few) / (m * m - n * n))


def limits(found: Losses) -> str:
    """What the loss is limited by and what to change, in plain words."""
    first, last = found.sizes[0], found.sizes[-1]
    begin = f"What limits this loss: at the recipe's {first.n:,} subjects "
    if first.ratio > 4 and first.loss_s < 0.05:
        begin += (
            f"it takes {1000 * first.loss_s:.2g} ms, {first.ratio:.0f} times its bare products: calls, not arithmetic, "
            "and a larger batch costs little more. "
        )
    else:
        begin += f"it takes {first.ratio:.1f} times its bare products of matrices, {1000 * first.loss_s:.3g} ms. "
    if last.n > first.n:
        begin += f"At {last.n:,} it is {1000 * last.loss_s:.3g} ms, {last.ratio:.1f} times, and grows with the square. "
    return begin + (
        "More ranks share the pairs; hold it against a whole step by `cauc bench step` before changing anything: where "
        "it is a few per cent of a step, the encoder or the data is what to look at."
    )
