"""W ranks with different rows equal one process: value and every parameter gradient."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks

N, D, VIEWS = 12, 6, 2


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A small float64 model, views (V, N, 5) and metadata (N, 2): unlike for every subject."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, D)).double()
    x = torch.randn(VIEWS, N, 5, dtype=torch.float64)
    y = torch.stack([torch.rand(N, dtype=torch.float64) * 60 + 20, torch.randint(0, 2, (N,)).double()], 1)
    return model, x, y


def losses_by_name() -> dict[str, Any]:
    from cauc_dist import kernels, losses

    kernel = kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta())
    return {
        "simclr": lambda z, y: losses.ntxent(z, 0.1),
        "y_aware": lambda z, y: losses.y_aware_infonce(z, y, kernel, 0.1),
        "y_aware as published": lambda z, y: losses.y_aware_infonce(z, y, kernel, 0.1, normalise="column"),
        "cauc": lambda z, y: losses.cauc(z, y, kernel),
        "cauc pooled": lambda z, y: losses.cauc(z, y, kernel, views="pooled"),
        "conditional uniformity by rows": lambda z, y: losses.conditional_uniformity(z, y, kernel, normalise="row"),
        "align_uniform": lambda z, y: losses.align_uniform(z),
        "supcon": lambda z, y: losses.supcon(z, y[:, 1], 0.1),
        "decoupled": lambda z, y: losses.decoupled_uniformity(z),
        "kernel decoupled": lambda z, y: losses.decoupled_uniformity(z, y, kernel),
        "threshold": lambda z, y: losses.threshold(z, y, kernel, 0.1),
        "expw": lambda z, y: losses.expw(z, y, kernel, 0.1),
        "rank_n_contrast": lambda z, y: losses.rank_n_contrast(z, y, 2.0),
    }


def one_process(name: str) -> tuple[float, list[Tensor]]:
    model, x, y = problem()
    z = nn.functional.normalize(model(x), dim=-1)
    loss = losses_by_name()[name](z, y)
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def on_this_rank(names: list[str], fault: str) -> dict[str, tuple[float, list[Tensor]]]:
    """The same through the gather, parameter gradients averaged over ranks as DeepSpeed does."""
    import torch.distributed as dist

    from cauc_dist.gather import gather

    rank, world = dist.get_rank(), dist.get_world_size()
    b = N // world
    found = {}
    for name in names:
        model, x, y = problem()
        z = nn.functional.normalize(model(x[:, rank * b : (rank + 1) * b]), dim=-1)
        z_all = gather(z)
        if fault == "no gradient through the gather":
            z_all = z_all.detach().clone()
            z_all[:, rank * b : (rank + 1) * b] = z
        loss = losses_by_name()[name](z_all, y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for g in grads:
            dist.all_reduce(g)
        found[name] = (loss.item(), [g / world for g in grads])
    return found


def ratio_and_cosine(found: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    a, b = torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in wanted])
    return (a.norm() / b.norm()).item(), nn.functional.cosine_similarity(a, b, 0).item()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_objective_on_w_ranks_equals_one_process(world: int) -> None:
    names = list(losses_by_name())
    for found in run_ranks(world, on_this_rank, names, ""):
        for name in names:
            value, grads = one_process(name)
            assert found[name][0] == pytest.approx(value, rel=1e-12), name
            for ours, theirs in zip(found[name][1], grads, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


def test_a_gather_without_gradient_is_caught_by_the_same_comparison() -> None:
    """Own rows re-inserted without the factor W give 1/W of the gradient: the test above can fail."""
    found = run_ranks(2, on_this_rank, ["cauc"], "no gradient through the gather")[0]["cauc"]
    ratio, cosine = ratio_and_cosine(found[1], one_process("cauc")[1])
    assert ratio == pytest.approx(0.5, rel=1e-12)
    assert cosine == pytest.approx(1.0, abs=1e-12)


def log_of_own_sum() -> tuple[float, float]:
    """Uniformity of the gathered batch, and the mean over ranks of the uniformity of each rank's own rows."""
    import torch.distributed as dist

    from cauc_dist import losses
    from cauc_dist.gather import gather

    rank, b = dist.get_rank(), N // dist.get_world_size()
    model, x, _ = problem()
    z = nn.functional.normalize(model(x[:, rank * b : (rank + 1) * b]), dim=-1).detach()
    own = losses.uniformity(z).clone()
    dist.all_reduce(own)
    return losses.uniformity(gather(z)).item(), (own / dist.get_world_size()).item()


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
    from cauc_dist.gather import gather
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
        loss = losses.cauc(gather(nn.functional.normalize(z, dim=-1)), y.float(), kernel)
        norms.append(engine.step(loss, lr=1e-2))
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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_three_steps_under_deepspeed_equal_three_steps_of_one_process(stage: int, world: int) -> None:
    norms, parameters = plain_adamw()
    for found_norms, found in run_ranks(world, through_the_engine, stage):
        assert found_norms == pytest.approx(norms, rel=1e-5)
        for ours, theirs in zip(found, parameters, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
