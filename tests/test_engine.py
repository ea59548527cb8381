"""The engine's state is whole and belongs to no world: any number of ranks, at any ZeRO stage, goes on from it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cauc_dist import checkpoint
from cauc_dist.config import Engine as Settings
from cauc_dist.config import Optim, RunConfig
from cauc_dist.encoders import BatchNorm
from cauc_dist.world import World
from tests.ranks import run_ranks

N = 12


def network() -> nn.Module:
    """Weights and biases (two groups of the optimiser), buffers that training changes, sizes that no world divides.

    No bias before BatchNorm: its gradient is rounding noise, which Adam makes steps of the size of lr from.
    """
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), BatchNorm(7), nn.Linear(7, 3))


def train(run: Path, stage: int, first: int, last: int) -> dict[str, Tensor]:
    """Steps first..last-1 from the checkpoint in `run` (or from scratch), then save; the full state."""
    import torch.distributed as dist

    from cauc_dist.engine import Engine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = RunConfig(
        name="test",
        batch_size=N,
        engine=Settings(zero_stage=stage),  # type: ignore[arg-type]
        optim=Optim(weight_decay=0.1),
    )
    model = network()
    saved, _ = checkpoint.latest(run)
    if saved:
        checkpoint.load_module(model, saved.tensors)
    engine = Engine(model, config, World(rank, rank, world_size), torch.device("cpu"))
    if saved:
        engine.load_moments(saved.tensors)
    x = torch.randn(5, N, 5, generator=torch.Generator().manual_seed(1))
    b = N // world_size
    for step in range(first, last):
        engine.step((engine(x[step, rank * b : (rank + 1) * b]) ** 2).mean(), lr=1e-2)
    state = engine.state()
    if rank == 0:
        checkpoint.save(run, last, state, {"architecture": {}}, keep=1)
    dist.barrier()
    return state


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stopped_and_resumed_equals_never_stopped_to_the_bit(tmp_path: Path, stage: int) -> None:
    whole = run_ranks(2, train, tmp_path / "whole", stage, 0, 5)
    run_ranks(2, train, tmp_path / "parts", stage, 0, 3)
    parts = run_ranks(2, train, tmp_path / "parts", stage, 3, 5)
    for rank in range(2):
        assert whole[rank].keys() == parts[rank].keys()
        assert all(torch.equal(whole[rank][name], parts[rank][name]) for name in whole[rank])


@pytest.mark.parametrize(("first", "then"), [((2, 1), (3, 3)), ((3, 3), (2, 2)), ((1, 0), (4, 1)), ((4, 2), (1, 0))])
def test_another_world_at_another_stage_goes_on(tmp_path: Path, first: tuple[int, int], then: tuple[int, int]) -> None:
    """(ranks, ZeRO stage) before and after; against one process at stage 0 all along."""
    run_ranks(first[0], train, tmp_path / "run", first[1], 0, 3)
    found = run_ranks(then[0], train, tmp_path / "run", then[1], 3, 5)[-1]
    wanted = run_ranks(1, train, tmp_path / "one", 0, 0, 5)[0]
    assert found["optimizer/step"].item() == 5
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.allclose(found["buffer/1.running_mean"], torch.zeros(7))  # a buffer that training changes


def test_the_state_is_a_copy_that_later_steps_do_not_touch(tmp_path: Path) -> None:
    before, after = run_ranks(1, state_then_step)[0]
    assert not torch.equal(before["parameter/0.weight"], after["parameter/0.weight"])


def state_then_step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from cauc_dist.engine import Engine

    config = RunConfig(name="test", batch_size=N, engine=Settings(zero_stage=0))
    engine = Engine(network().eval(), config, World(), torch.device("cpu"))
    engine.step((engine(torch.ones(N, 5)) ** 2).mean(), lr=1e-2)
    before = engine.state()
    engine.step((engine(torch.ones(N, 5)) ** 2).mean(), lr=1e-2)
    return before, engine.state()


def clipped_norm(clip: float) -> tuple[float, Tensor]:
    from cauc_dist.engine import Engine

    config = RunConfig(name="test", batch_size=N, optim=Optim(clip_norm=clip, weight_decay=0.0))
    engine = Engine(network().eval(), config, World(), torch.device("cpu"))
    norm = engine.step((engine(torch.ones(N, 5)) ** 2).sum(), lr=0.0)
    return norm, engine.state()["exp_avg/0.weight"]


def test_no_clipping_unless_asked_and_the_norm_is_the_one_before_it() -> None:
    """DeepSpeed clips to 1 where it is told nothing; Adam's first moment is a tenth of the gradient it was given."""
    model = network().eval()
    (model(torch.ones(N, 5)) ** 2).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    weight = model[0].weight.grad  # type: ignore[index]
    norm, moment = run_ranks(1, clipped_norm, 0.0)[0]
    assert gradient.norm() > 1
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-5)
    torch.testing.assert_close(moment, weight * 0.1, rtol=1e-5, atol=1e-7)
    clipped, moment = run_ranks(1, clipped_norm, 0.5)[0]
    assert clipped == pytest.approx(gradient.norm().item(), rel=1e-5)
    torch.testing.assert_close(moment, weight * 0.1 * 0.5 / gradient.norm(), rtol=1e-3, atol=1e-7)


def gradient_that_is_not_finite(stage: int) -> tuple[str, bool]:
    from cauc_dist.engine import Engine

    config = RunConfig(name="test", batch_size=N, engine=Settings(zero_stage=stage))  # type: ignore[arg-type]
    engine = Engine(network().eval(), config, World(), torch.device("cpu"))
    engine.step((engine(torch.ones(N, 5)) ** 2).mean(), lr=1e-2)
    before = engine.state()
    try:
        # The root of 0 is 0, its derivative is not finite: a loss that looks well.
        engine.step((engine(torch.ones(N, 5)) * 0).sum().sqrt(), lr=1e-2)
    except FloatingPointError as error:
        after = engine.state()
        return str(error), all(torch.equal(before[name], after[name]) for name in before if "parameter" in name)
    return "no error", False


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_an_error_and_touches_nothing(stage: int) -> None:
    message, untouched = run_ranks(1, gradient_that_is_not_finite, stage)[0]
    assert message.startswith("the gradient's norm is")
    assert untouched
