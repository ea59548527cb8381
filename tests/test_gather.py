"""W ranks with different rows equal one process: value and every parameter gradient."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cauc_dist.stream.plan import shares
from tests.ranks import run_ranks

N, D, VIEWS = 12, 6, 2


def problem(n: int = N) -> tuple[nn.Module, Tensor, Tensor]:
    """A small float64 model, views (V, n, 5) and metadata (n, 2): unlike for every subject."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, D)).double()
    x = torch.randn(VIEWS, n, 5, dtype=torch.float64)
    y = torch.stack([torch.rand(n, dtype=torch.float64) * 60 + 20, torch.randint(0, 2, (n,)).double()], 1)
    return model, x, y


def losses_by_name() -> dict[str, Any]:
    """loss(z of this rank, y of all, exchange) of each objective."""
    from cauc_dist import kernels, losses

    kernel = kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta())
    return {
        "simclr": lambda z, y, e: losses.ntxent(z, 0.1, exchange=e),
        "y_aware": lambda z, y, e: losses.y_aware_infonce(z, y, kernel, 0.1, exchange=e),
        "y_aware as published": lambda z, y, e: losses.y_aware_infonce(z, y, kernel, 0.1, "column", exchange=e),
        "y_aware, tau .02": lambda z, y, e: losses.y_aware_infonce(z, y, kernel, 0.02, exchange=e),
        "cauc": lambda z, y, e: losses.cauc(z, y, kernel, exchange=e),
        "cauc pooled": lambda z, y, e: losses.cauc(z, y, kernel, views="pooled", exchange=e),
        "cauc by rows": lambda z, y, e: losses.cauc(z, y, kernel, normalise_unif="row", exchange=e),
        "cauc global": lambda z, y, e: losses.cauc(z, y, kernel, normalise_align="global", exchange=e),
        "cauc within sex": lambda z, y, e: losses.cauc(z, y, kernel, within=y[:, 1], exchange=e),
        "cauc, alpha 1": lambda z, y, e: losses.cauc(z, y, kernel, alpha=1.0, exchange=e),
        "align_uniform": lambda z, y, e: losses.align_uniform(z, exchange=e),
        "uniformity pooled": lambda z, y, e: losses.uniformity(z, views="pooled", exchange=e),
        "supcon": lambda z, y, e: losses.supcon(z, y[:, 1], 0.1, exchange=e),
        "decoupled": lambda z, y, e: losses.decoupled_uniformity(z, exchange=e),
        "kernel decoupled": lambda z, y, e: losses.decoupled_uniformity(z, y, kernel, exchange=e),
        "threshold": lambda z, y, e: losses.threshold(z, y, kernel, 0.1, exchange=e),
        "expw": lambda z, y, e: losses.expw(z, y, kernel, 0.1, exchange=e),
        "rank_n_contrast": lambda z, y, e: losses.rank_n_contrast(z, y, 2.0, exchange=e),
    }


def one_process(name: str, n: int = N) -> tuple[float, list[Tensor]]:
    from cauc_dist.losses.batch import Batch

    model, x, y = problem(n)
    z = nn.functional.normalize(model(x), dim=-1)
    loss = losses_by_name()[name](z, y, Batch)
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def on_this_rank(names: list[str], exchange: str, n: int, rows: int) -> dict[str, tuple[float, list[Tensor]]]:
    """The same through an exchange, parameter gradients averaged over ranks as DeepSpeed does; tiles of `rows` rows."""
    import torch.distributed as dist

    from cauc_dist import gather
    from cauc_dist.losses import similar, tiled

    tiled.ROWS["cpu"] = rows
    similar.SMALL = 0 if rows < n else 512  # small tiles: W in tiles too
    rank, world = dist.get_rank(), dist.get_world_size()
    starts = [sum(shares(n, world)[:r]) for r in range(world + 1)]
    found = {}
    for name in names:
        model, x, y = problem(n)
        z = nn.functional.normalize(model(x[:, starts[rank] : starts[rank + 1]]), dim=-1)
        loss = losses_by_name()[name](z, y, getattr(gather, exchange)(n))
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for g in grads:
            dist.all_reduce(g)
        found[name] = (loss.item(), [g / world for g in grads])
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("exchange", ["AllGather", "Ring"])
@pytest.mark.parametrize(("n", "rows"), [(12, 512), (13, 4)], ids=["even", "uneven, small tiles"])
def test_every_objective_on_w_ranks_equals_one_process(world: int, exchange: str, n: int, rows: int) -> None:
    names = list(losses_by_name())
    wanted = {name: one_process(name, n) for name in names}
    for found in run_ranks(world, on_this_rank, names, exchange, n, rows):
        for name in names:
            value, grads = wanted[name]
            assert found[name][0] == pytest.approx(value, rel=1e-12), name
            for ours, theirs in zip(found[name][1], grads, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("exchange", ["AllGather", "Ring"])
def test_a_rank_without_a_single_subject_takes_part(exchange: str) -> None:
    names = [name for name in losses_by_name() if name not in ("threshold", "expw", "rank_n_contrast")]
    wanted = {name: one_process(name, 3) for name in names}
    for found in run_ranks(4, on_this_rank, names, exchange, 3, 512):
        for name in names:
            assert found[name][0] == pytest.approx(wanted[name][0], rel=1e-12, abs=1e-12), name
            for ours, theirs in zip(found[name][1], wanted[name][1], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


def without_damaged(names: list[str], exchange: str, sound: list[bool], rows: int) -> dict[str, Any]:
    """As on_this_rank, with the rows that are not sound left out; equal slices of the batch before that."""
    import torch.distributed as dist

    from cauc_dist import gather
    from cauc_dist.losses import similar, tiled

    tiled.ROWS["cpu"] = rows
    similar.SMALL = 0 if rows < 100 else 512
    rank, world, n = dist.get_rank(), dist.get_world_size(), len(sound)
    own = slice(rank * n // world, (rank + 1) * n // world)
    everyones, _ = gather.tell(np.array(sound)[own], [], [n // world] * world)
    whole = torch.from_numpy(np.concatenate(everyones))
    assert whole.tolist() == sound
    e = gather.EXCHANGES[exchange](sum(sound), sizes=[int(rows.sum()) for rows in everyones])
    found = {}
    for name in names:
        model, x, y = problem(n)
        z = nn.functional.normalize(model(x[:, own][:, whole[own]]), dim=-1)
        loss = losses_by_name()[name](z, y[whole], e)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for g in grads:
            dist.all_reduce(g)
        found[name] = (loss.item(), [g / world for g in grads])
    return found


# Of four scans a rank: which could be read, a word a rank.
DAMAGED = [
    "1011",
    "0111 1101",
    "1111 0000",
    "0000 1111 0110",
    "1111 0111 0001",
    "1101 0000 1111 1000",
    "0000 1111 0000",
    "0 1 1 0 1 1 1",
]


@pytest.mark.parametrize("damaged", DAMAGED)
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("rows", [512, 4], ids=["one tile", "small tiles"])
def test_ranks_that_left_out_damaged_scans_equal_one_process_on_the_others(
    damaged: str, exchange: str, rows: int
) -> None:
    from cauc_dist.losses.batch import Batch

    names, sound = list(losses_by_name()), [digit == "1" for digit in damaged.replace(" ", "")]
    if sum(sound) < 4:  # too few for some
        names = [name for name in names if name not in ("threshold", "expw", "rank_n_contrast")]
    model, x, y = problem(len(sound))
    z, kept = nn.functional.normalize(model(x[:, sound]), dim=-1), y[sound]
    wanted = {}
    for name in names:
        loss = losses_by_name()[name](z, kept, Batch)
        wanted[name] = (loss.item(), torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
    for found in run_ranks(len(damaged.split()), without_damaged, names, exchange, sound, rows):
        for name in names:
            assert found[name][0] == pytest.approx(wanted[name][0], rel=1e-12, abs=1e-12), name
            for ours, theirs in zip(found[name][1], wanted[name][1], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


def wrong_sizes(sizes: list[int], held: list[int]) -> str:
    import torch.distributed as dist

    from cauc_dist import losses
    from cauc_dist.gather import AllGather

    z = torch.nn.functional.normalize(torch.randn(VIEWS, held[dist.get_rank()], D), dim=-1)
    try:
        losses.align_uniform(z, exchange=AllGather(4, sizes=sizes))
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_sizes_that_are_not_those_of_the_ranks_are_refused_on_every_rank() -> None:
    for sizes in ([4], [3, 0], [1, 1, 2]):
        found = run_ranks(2, wrong_sizes, sizes, [3, 1])
        assert found == [f"sizes {sizes} for 4 rows over 2 ranks; wanted one size for each rank, 4 in sum"] * 2
    for message in run_ranks(2, wrong_sizes, [1, 3], [3, 1]):
        assert message.startswith("z has shapes (2, 3, 6), (2, 1, 6) on ranks 0 to 1; wanted (V, b, D)")
        assert message.endswith("with 4 subjects shared as b = 1, 3")


def log_of_own_sum() -> tuple[float, float]:
    """Uniformity of the gathered batch, and the mean over ranks of the uniformity of each rank's own rows."""
    import torch.distributed as dist

    from cauc_dist import losses
    from cauc_dist.gather import AllGather

    rank, b = dist.get_rank(), N // dist.get_world_size()
    model, x, _ = problem()
    z = nn.functional.normalize(model(x[:, rank * b : (rank + 1) * b]), dim=-1).detach()
    own = losses.uniformity(z).clone()
    dist.all_reduce(own)
    return losses.uniformity(z, exchange=AllGather(N)).item(), (own / dist.get_world_size()).item()


def test_the_log_is_taken_after_the_global_sum() -> None:
    from cauc_dist import losses

    model, x, _ = problem()
    whole = losses.uniformity(nn.functional.normalize(model(x), dim=-1)).item()
    gathered, averaged = run_ranks(2, log_of_own_sum)[0]
    assert gathered == pytest.approx(whole, rel=1e-12)
    assert abs(averaged - whole) > 1e-3


def through_the_engine(stage: int) -> tuple[list[float], list[Tensor]]:
    import torch.distributed as dist

    from cauc_dist import config, kernels, losses
    from cauc_dist.engine import Engine
    from cauc_dist.gather import AllGather
    from cauc_dist.world import World

    rank, world_size = dist.get_rank(), dist.get_world_size()
    b = N // world_size
    kernel = kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta())
    model, x, y = problem()
    run = config.RunConfig(
        name="test",
        batch_size=N,
        engine=config.Engine(zero_stage=stage),
        optim=config.Optim(weight_decay=0.1),  # type: ignore[arg-type]
    )
    engine = Engine(model.float(), run, World(rank, rank, world_size), torch.device("cpu"))
    norms = []
    for step in range(3):
        z = engine((x * (step + 1))[:, rank * b : (rank + 1) * b].float())
        loss = losses.cauc(nn.functional.normalize(z, dim=-1), y.float(), kernel, exchange=AllGather(N))
        engine.backward([loss], 1)
        norms.append(engine.update(lr=1e-2))
    state = engine.state()
    return norms, [state[f"parameter/{name}"] for name, _ in model.named_parameters()]


def plain_adamw() -> tuple[list[float], list[Tensor]]:
    """The same three steps by torch alone, one process, float64."""
    from cauc_dist import kernels, losses

    kernel = kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta())
    model, x, y = problem()
    model = copy.deepcopy(model)
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=1e-2
    )
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        losses.cauc(nn.functional.normalize(model(x * (step + 1)), dim=-1), y, kernel).backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())
        optimizer.step()
    return norms, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("world", "stage"),
    [(1, 0), *((world, stage) for world in (2, 3) for stage in range(4)), (4, 1)],  # one rank has no stages
)
def test_three_steps_under_deepspeed_equal_three_steps_of_one_process(world: int, stage: int) -> None:
    norms, parameters = plain_adamw()
    for found_norms, found in run_ranks(world, through_the_engine, stage):
        assert found_norms == pytest.approx(norms, rel=1e-5)
        for ours, theirs in zip(found, parameters, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
