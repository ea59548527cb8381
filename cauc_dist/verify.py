"""W ranks against one process: `python -m cauc_dist.verify` on every rank, whatever started it.

V views, b subjects on this rank, W ranks, n subjects in the global batch, c columns of x, D width of z, P parameters.

A faulty gather trains, too: no curve shows a gradient of 1/W, or one whose direction is a little off. So each
objective is computed twice from the same weights: on W ranks as in training (fp32, parameter gradients averaged over
ranks, as DeepSpeed and DDP do), and by rank 0 alone on the whole batch, in float64 on the CPU.
"""

import argparse
import copy
import math
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cauc_dist import kernels, losses, progress
from cauc_dist.errors import BAD_INPUT, BadInput
from cauc_dist.gather import EXCHANGES
from cauc_dist.kernels import Kernel
from cauc_dist.losses.batch import Batch, Exchange
from cauc_dist.stream.plan import shares
from cauc_dist.world import World

TOLERANCE = 1e-5  # of the value and of the norm ratio, relative, and of 1 - cosine
VIEWS, COLUMNS = 2, 12
AGE, SEX, SITE, SCORE = range(4)

Objective = Callable[[Tensor, Tensor, Exchange], Tensor]
"""(z (V, b, D) of this rank, y (n, 4) of all, exchange) -> loss; with the exchange `Batch` b is n: one process."""


class Row(NamedTuple):
    """One objective on W ranks against one process."""

    name: str
    n: int
    found: float
    """Its value on W ranks: their mean."""
    wanted: float
    """Its value in one process."""
    ratio: float
    """Norm of the gradient on W ranks over that of one process."""
    apart: float
    """1 - cosine of the two gradients."""

    @property
    def same_value(self) -> bool:
        return abs(self.found - self.wanted) <= TOLERANCE * abs(self.wanted)

    @property
    def ok(self) -> bool:
        """Not a number is not ok."""
        return self.same_value and abs(self.ratio - 1) <= TOLERANCE and self.apart <= TOLERANCE


def compare(objectives: Mapping[str, Objective], n: int, exchange: Exchange, device: torch.device) -> list[Row]:
    """Each objective through `exchange`, e.g. AllGather(n), against one process; a collective, for every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    held = shares(n, world_size)
    own = slice(sum(held[:rank]), sum(held[: rank + 1]))
    model, x, y = problem(n)
    ours, alone = copy.deepcopy(model).to(device), copy.deepcopy(model).double()
    rows = []
    for name, objective in objectives.items():
        try:
            found = value_and_gradient(objective, ours, x[:, own].to(device), y.to(device), exchange)
            dist.all_reduce(found)
            if rank == 0:
                wanted = value_and_gradient(objective, alone, x.double(), y, Batch)
                rows.append(_row(name, n, found.cpu().double() / world_size, wanted))
        except Exception as error:
            error.add_note(f"on rank {rank} of {world_size}, in {name} of {n} subjects")
            raise
    told: list[Any] = [rows]
    dist.broadcast_object_list(told, src=0)
    return told[0]  # type: ignore[no-any-return]


def value_and_gradient(objective: Objective, model: nn.Module, x: Tensor, y: Tensor, exchange: Exchange) -> Tensor:
    """(1 + P,): the loss of x (V, b, c), and its gradient by every parameter."""
    z = nn.functional.normalize(model(x), dim=-1)  # (V, b, D)
    loss = objective(z, y, exchange)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)])


def _row(name: str, n: int, found: Tensor, wanted: Tensor) -> Row:
    ours, theirs = found[1:], wanted[1:]
    # 1 - cosine, which as a difference would lose half of its digits.
    apart = (ours / ours.norm() - theirs / theirs.norm()).square().sum() / 2
    return Row(name, n, found[0].item(), wanted[0].item(), (ours.norm() / theirs.norm()).item(), apart.item())


def diagnosis(row: Row, world_size: int) -> str:
    """What is at fault, as far as value, norm ratio and cosine tell."""
    if row.ratio == 0 or not math.isfinite(row.ratio):
        return "no gradient, or one that is not a number"
    if not row.same_value:
        return "a different loss, e.g. the log of each rank's own sum averaged over ranks, or rows in another order"
    if row.apart > TOLERANCE:
        return "right value, wrong direction: pairs with other ranks lost or misplaced, as by a gather without gradient"
    factors = {
        f"ratio 1/{world_size}, cosine 1: a plain all_reduce before the log, or a factor W left out": 1 / world_size,
        "ratio 1/2, cosine 1: a gather without gradient": 1 / 2,
        f"ratio {world_size}, cosine 1: gradients summed over ranks, or multiplied by W twice": world_size,
    }
    causes = [text for text, factor in factors.items() if abs(row.ratio - factor) <= TOLERANCE * factor]
    if not causes:
        return f"ratio {row.ratio:.6g}, cosine 1: a loss or gradient scaled on its way"
    # On two ranks 1/W is 1/2.
    return "; or ".join(causes) + ("; three ranks tell them apart" if len(causes) > 1 else "")


# ---- what is compared -----------------------------------------------------------------------------------------


def problem(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """An fp32 encoder, views x (V, n, c) and metadata y (n, 4) float64, on the CPU: the same on every rank.

    Columns of y: age in whole years and sex, both with missing values; site and a real score, complete.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(COLUMNS, 32), nn.Tanh(), nn.Linear(32, 16))
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, COLUMNS, generator=generator) + 0.5 * torch.randn(VIEWS, n, COLUMNS, generator=generator)
    age, sex, site = (torch.randint(*bounds, (n,), generator=generator) for bounds in ((30, 70), (0, 2), (0, 5)))
    score = 30 * torch.rand(n, generator=generator, dtype=torch.float64)
    y = torch.stack([age.double(), sex.double(), site.double(), score], 1)
    y[::9, AGE] = math.nan
    y[4::11, SEX] = math.nan
    return model, x, y


def sizes(world_size: int) -> tuple[int, int]:
    """n of a small batch and of one of several tiles and factored weights; neither divides over 2 ranks or more."""
    return max(67, 2 * world_size + 3), max(1103, 2 * world_size + 3)  # primes; and 3 divides over no more than 3


def aged(y: Tensor) -> tuple[Tensor, Kernel]:
    """Age and sex, values missing; in a large batch few distinct ones."""
    y = y[:, [AGE, SEX]]
    return y, kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta()).fit(y)


def scored(y: Tensor) -> tuple[Tensor, Kernel]:
    """Score and site, complete; in a large batch a low rank, on a GPU what the Triton kernels take."""
    return y[:, [SCORE, SITE]], kernels.product(score=kernels.gaussian(5.0), site=kernels.delta())


def known(y: Tensor) -> tuple[Tensor, Kernel]:
    """Age and sex, judged on the columns that both have: neither distinct values nor a low rank will do."""
    kernel = kernels.product(age=kernels.gaussian(5.0, "ignore"), score=kernels.cauchy(0.04))
    return y[:, [AGE, SCORE]], kernel


def every_objective() -> dict[str, Objective]:
    """Each objective of `cauc_dist.losses` in each of its forms, for a small batch."""
    return {
        "y_aware": lambda z, y, e: losses.y_aware_infonce(z, *aged(y), exchange=e),
        "y_aware, by column": lambda z, y, e: losses.y_aware_infonce(z, *aged(y), normalise="column", exchange=e),
        "cauc": lambda z, y, e: losses.cauc(z, *aged(y), exchange=e),
        "cauc, views pooled": lambda z, y, e: losses.cauc(z, *aged(y), views="pooled", exchange=e),
        "cauc, uniformity by row": lambda z, y, e: losses.cauc(z, *aged(y), normalise_unif="row", exchange=e),
        "cauc, alignment global": lambda z, y, e: losses.cauc(z, *aged(y), normalise_align="global", exchange=e),
        "cauc, within site": lambda z, y, e: losses.cauc(z, *aged(y), within=y[:, SITE], exchange=e),
        "cauc, alpha 1": lambda z, y, e: losses.cauc(z, *aged(y), alpha=1.0, lambda_align=1.0, exchange=e),
        "calign_unif": lambda z, y, e: losses.calign_unif(z, *aged(y), exchange=e),
        "calign_unif, alignment global, pooled": lambda z, y, e: losses.calign_unif(
            z, *aged(y), normalise_align="global", views="pooled", exchange=e
        ),
        "align_cunif": lambda z, y, e: losses.align_cunif(z, *aged(y), exchange=e),
        "align_cunif, by row, within site": lambda z, y, e: losses.align_cunif(
            z, *aged(y), normalise_unif="row", within=y[:, SITE], exchange=e
        ),
        "conditional alignment": lambda z, y, e: losses.conditional_alignment(z, *aged(y), exchange=e),
        "conditional alignment, global": lambda z, y, e: losses.conditional_alignment(
            z, *aged(y), normalise="global", exchange=e
        ),
        "conditional uniformity": lambda z, y, e: losses.conditional_uniformity(z, *aged(y), exchange=e),
        "conditional uniformity, by row": lambda z, y, e: losses.conditional_uniformity(
            z, *aged(y), normalise="row", exchange=e
        ),
        "uniformity": lambda z, y, e: losses.uniformity(z, exchange=e),
        "uniformity, views pooled": lambda z, y, e: losses.uniformity(z, views="pooled", exchange=e),
        "align_uniform": lambda z, y, e: losses.align_uniform(z, exchange=e),
        "align_uniform, views pooled": lambda z, y, e: losses.align_uniform(z, views="pooled", exchange=e),
        "ntxent": lambda z, y, e: losses.ntxent(z, exchange=e),
        "supcon": lambda z, y, e: losses.supcon(z, y[:, SITE], exchange=e),
        "decoupled": lambda z, y, e: losses.decoupled_uniformity(z, exchange=e),
        "decoupled, kernel": lambda z, y, e: losses.decoupled_uniformity(z, *aged(y), exchange=e),
        "threshold": lambda z, y, e: losses.threshold(z, *aged(y), exchange=e),
        "expw": lambda z, y, e: losses.expw(z, *aged(y), exchange=e),
        "expw, shifted": lambda z, y, e: losses.expw(z, *aged(y), shifted=True, exchange=e),
        "rank_n_contrast": lambda z, y, e: losses.rank_n_contrast(z, y[:, [SCORE]], exchange=e),
        "cross_entropy": lambda z, y, e: losses.cross_entropy(z, y[:, SEX], exchange=e),
        "squared_error": lambda z, y, e: losses.squared_error(z, (y[:, [AGE, SCORE]] - 40) / 20, exchange=e),
    }


def tiled_objectives() -> dict[str, Objective]:
    """Those that need no M x M matrix, each way to the weights (`cauc_dist.losses.similar`), for a large batch."""
    return {
        "y_aware": lambda z, y, e: losses.y_aware_infonce(z, *aged(y), exchange=e),
        "y_aware, complete": lambda z, y, e: losses.y_aware_infonce(z, *scored(y), exchange=e),
        "cauc": lambda z, y, e: losses.cauc(z, *aged(y), exchange=e),
        "cauc, complete": lambda z, y, e: losses.cauc(z, *scored(y), exchange=e),
        "cauc, complete, pooled, by row": lambda z, y, e: losses.cauc(
            z, *scored(y), views="pooled", normalise_unif="row", exchange=e
        ),
        "cauc, tiles of weights": lambda z, y, e: losses.cauc(z, *known(y), exchange=e),
        "supcon": lambda z, y, e: losses.supcon(z, y[:, SITE], exchange=e),
    }


# ---- what is printed ------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], world_size: int) -> str:
    """One aligned line an objective."""
    heads = ("objective", "n", _ranks(world_size), "1 process", "norm ratio", "1 - cosine", "")
    cells = [
        (
            row.name,
            f"{row.n:,}",
            f"{row.found:#.7g}",
            f"{row.wanted:#.7g}",
            f"{row.ratio:.7f}",
            f"{row.apart:.0e}",
            "ok" if row.ok else "FAULT",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in (0, 6) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (heads, *cells)
    )


def faults(rows: Sequence[Row], world_size: int) -> list[str]:
    """A line for each diagnosis, with the objectives that it is of."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if not row.ok:
            names.setdefault(diagnosis(row, world_size), []).append(f"{row.name} ({row.n:,})")
    return [f"FAULT {cause}: in {'; '.join(where)}" for cause, where in names.items()]


def summary(rows: Sequence[Row], exchange: str, device: torch.device, hosts: int) -> str:
    """What was compared, on what."""
    world_size, wrong = dist.get_world_size(), sum(not row.ok for row in rows)
    verdict = f"all equal to {TOLERANCE:g}" if not wrong else f"{wrong} of them differ by more than {TOLERANCE:g}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = f"{_ranks(world_size)} on {hosts} host{'s' * (hosts > 1)}"
    how = f"{name} fp32, {dist.get_backend()}, exchange {exchange}, torch {torch.__version__}"
    return f"{len(rows)} objectives, {where} ({how}) against 1 process (CPU float64): {verdict}"


def _ranks(world_size: int) -> str:
    return f"{world_size} rank{'s' * (world_size > 1)}"


# ---- a process of its own -------------------------------------------------------------------------------------


def check(device: str, ranks: int) -> None:
    """BadInput where `device` is not to be had for as many ranks on this machine."""
    gpus = torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise BadInput(
            "no CUDA device",
            wanted="a GPU, since --device is cuda",
            do="use --device cpu, or install a CUDA build of torch",
        )
    if device != "cpu" and 0 < gpus < ranks:
        raise BadInput(
            f"{_ranks(ranks)} for {gpus} GPU{'s' * (gpus > 1)} on this machine",
            wanted="a GPU a rank",
            do=f"use --device cpu, or {_ranks(gpus)}",
        )


def verify(exchange: str, device: torch.device) -> bool:
    """Compare all, print from rank 0; whether all are ok, the same on every rank. Call it in a process group."""
    world_size = dist.get_world_size()
    small, large = sizes(world_size)
    rows = compare(every_objective(), small, EXCHANGES[exchange](small), device)
    rows += compare(tiled_objectives(), large, EXCHANGES[exchange](large), device)
    hosts: list[Any] = [None] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    if dist.get_rank() == 0:
        told = summary(rows, exchange, device, len(set(hosts)))
        lines = [table(rows, world_size), told, *faults(rows, world_size)]
        if progress.voice() == "json":
            objectives = [{**row._asdict(), "ok": row.ok} for row in rows]
            lines = [progress.as_json({"summary": told, "objectives": objectives, "faults": faults(rows, world_size)})]
        print("\n".join(lines), flush=True)  # the agent may end this rank as soon as another has left
    return all(row.ok for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 all equal, 1 a fault, 2 bad input; the same on every rank."""
    parser = argparse.ArgumentParser(prog="python -m cauc_dist.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--exchange", choices=tuple(EXCHANGES), default="all_gather")
    options = parser.parse_args(arguments)
    try:
        world = World.from_env()
        check(options.device, world.local_size)
        device = world.device(options.device)
        with world.process_group(device):
            fine = verify(options.exchange, device)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0 if fine else 1


if __name__ == "__main__":
    # The agent passes ctrl-C on to every rank: end at once, not in W tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
