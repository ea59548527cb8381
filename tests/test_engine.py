"""The engine's state is whole and belongs to no world: any number of ranks, at any ZeRO stage, goes on from it."""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cauc_dist import checkpoint
from cauc_dist.config import Encoder, Optim, RunConfig
from cauc_dist.config import Engine as Settings
from cauc_dist.encoders import BatchNorm
from cauc_dist.errors import BadInput
from cauc_dist.world import World
from tests.ranks import run_ranks

N = 12


def network() -> nn.Module:
    """Weights and biases (two groups of the optimiser), buffers that training changes, sizes that no world divides.

    No bias before BatchNorm: its gradient is rounding noise, which Adam makes steps of the size of lr from.
    """
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), BatchNorm(7), nn.Linear(7, 3))


def update(engine: Any, loss: Tensor, lr: float = 1e-2) -> float:
    engine.backward([loss], 1)
    return engine.update(lr)  # type: ignore[no-any-return]


def train(run: Path, stage: int, first: int, last: int, **optim: Any) -> dict[str, Tensor]:
    """Steps first..last-1 from the checkpoint in `run` (or from scratch), then save; the full state."""
    import torch.distributed as dist

    from cauc_dist.engine import Engine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = RunConfig(
        name="test",
        batch_size=N,
        engine=Settings(zero_stage=stage),  # type: ignore[arg-type]
        optim=Optim(**{"weight_decay": 0.1, **optim}),
    )
    model = network()
    saved, _ = checkpoint.latest(run)
    if saved:
        checkpoint.load_module(model, saved.tensors)
    engine = Engine(model, config, World(rank, rank, world_size), torch.device("cpu"))
    if saved:
        engine.load(saved.tensors)
    x = torch.randn(5, N, 5, generator=torch.Generator().manual_seed(1))
    b = N // world_size
    for step in range(first, last):
        update(engine, (engine(x[step, rank * b : (rank + 1) * b]) ** 2).mean())
    state = engine.state()
    if rank == 0:
        with checkpoint.Writer(run, {"architecture": {}}, keep=1) as writer:
            writer.save(last, state, 0.0)
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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optim", [{"name": "sgd"}, {"name": "sgd", "momentum": 0.0}, {"name": "adam"}])
def test_every_optimiser_goes_on_from_another_world(tmp_path: Path, stage: int, optim: dict[str, Any]) -> None:
    resumed(tmp_path, stage, optim)


@pytest.mark.parametrize("optim", [{"name": "lars"}, {"ema": 0.9}])
def test_lars_and_the_average_of_the_weights_go_on_from_another_world(tmp_path: Path, optim: dict[str, Any]) -> None:
    wanted = resumed(tmp_path, 0, optim)
    if "ema" in optim:
        average, now = wanted["ema/0.weight"], wanted["parameter/0.weight"]
        assert not torch.allclose(average, now)
        assert not torch.allclose(average, network()[0].weight)  # type: ignore[index]


def resumed(folder: Path, stage: int, optim: dict[str, Any]) -> dict[str, Tensor]:
    """Three steps on 2 ranks and two on 3, against five in one process, which is returned."""
    run_ranks(2, partial(train, **optim), folder / "run", stage, 0, 3)
    found = run_ranks(3, partial(train, **optim), folder / "run", stage, 3, 5)[-1]
    wanted: dict[str, Tensor] = run_ranks(1, partial(train, **optim), folder / "one", 0, 0, 5)[0]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    return wanted


def test_the_average_of_the_weights_is_that_of_the_formula() -> None:
    weights, average = run_ranks(1, averaged)[0]
    expected = network()[0].weight.detach()  # type: ignore[index]
    for t, weight in enumerate(weights, start=1):
        decay = min(0.75, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average, expected)


def averaged() -> tuple[list[Tensor], Tensor]:
    from cauc_dist.engine import Engine

    engine = Engine(
        network(), RunConfig(name="test", batch_size=N, optim=Optim(ema=0.75)), World(), torch.device("cpu")
    )
    weights = []
    for _ in range(3):
        update(engine, (engine(torch.randn(N, 5)) ** 2).mean(), lr=0.1)
        weights.append(engine.state()["parameter/0.weight"])
    return weights, engine.state()["ema/0.weight"]


def untouched(stage: int) -> dict[str, Tensor]:
    from cauc_dist.engine import Engine

    config = RunConfig(name="test", batch_size=N, engine=Settings(zero_stage=stage))  # type: ignore[arg-type]
    return Engine(network(), config, World(), torch.device("cpu")).state()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_before_the_first_update_the_state_is_that_of_a_fresh_start(stage: int) -> None:
    """A signal may ask for a checkpoint when the first step was left out."""
    state = run_ranks(1, untouched, stage)[0]
    assert torch.equal(state["parameter/0.weight"], network()[0].weight)  # type: ignore[index]
    assert all(not state[f"{key}/0.weight"].any() for key in ("exp_avg", "exp_avg_sq"))
    assert state["optimizer/step"] == 0


def test_the_state_is_a_copy_that_later_steps_do_not_touch(tmp_path: Path) -> None:
    before, after = run_ranks(1, state_then_step)[0]
    assert not torch.equal(before["parameter/0.weight"], after["parameter/0.weight"])


def state_then_step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from cauc_dist.engine import Engine

    config = RunConfig(name="test", batch_size=N, engine=Settings(zero_stage=0))
    engine = Engine(network().eval(), config, World(), torch.device("cpu"))
    update(engine, (engine(torch.ones(N, 5)) ** 2).mean())
    before = engine.state()
    update(engine, (engine(torch.ones(N, 5)) ** 2).mean())
    return before, engine.state()


def clipped_norm(clip: float) -> tuple[float, Tensor]:
    from cauc_dist.engine import Engine

    config = RunConfig(name="test", batch_size=N, optim=Optim(clip_norm=clip, weight_decay=0.0))
    engine = Engine(network().eval(), config, World(), torch.device("cpu"))
    norm = update(engine, (engine(torch.ones(N, 5)) ** 2).sum(), lr=0.0)
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
    update(engine, (engine(torch.ones(N, 5)) ** 2).mean())
    before = engine.state()
    try:
        # The root of 0 is 0, its derivative is not finite: a loss that looks well.
        update(engine, (engine(torch.ones(N, 5)) * 0).sum().sqrt())
    except FloatingPointError as error:
        after = engine.state()
        untouched = all(torch.equal(before[name], after[name]) for name in before if "parameter" in name)
        # What was left of it would be in the next gradient.
        return str(error), untouched and math.isfinite(update(engine, (engine(torch.ones(N, 5)) ** 2).mean()))
    return "no error", False


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_an_error_and_touches_nothing(stage: int) -> None:
    message, untouched = run_ranks(1, gradient_that_is_not_finite, stage)[0]
    assert message.startswith("the gradient's norm is")
    assert untouched


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "ds.json: Expecting property name"),
        ("[1]", "ds.json holds no settings; wanted a JSON object"),
        ('{"zero_optimization": 2}', "ds.json holds no settings; wanted a JSON object"),
        ('{"gradient_clipping": 1.0}', "ds.json holds gradient_clipping; wanted zero_optimization"),
        ('{"zero_optimization": {"stage": 2}}', "ds.json holds zero_optimization.stage; wanted"),
        ('{"comms_loger": {}}', "ds.json holds comms_loger; wanted"),
        ('{"zero_optimization": {"overlap_com": true}}', "ds.json: zero_optimization.overlap_com"),
    ],
)
def test_settings_of_deepspeed_that_are_derived_or_not_known_are_refused(
    tmp_path: Path, given: str, message: str
) -> None:
    """DeepSpeed ignores unknown keys in silence, and takes what it is told over what the run says."""
    from cauc_dist.engine import deepspeed_config

    (tmp_path / "ds.json").write_text(given)
    run = RunConfig(name="test", engine=Settings(deepspeed=str(tmp_path / "ds.json")))
    with pytest.raises(BadInput, match=re.escape(message)):
        deepspeed_config(run, World())


def test_other_settings_of_deepspeed_are_merged(tmp_path: Path) -> None:
    from cauc_dist.engine import deepspeed_config

    given = {"comms_logger": {"enabled": False}, "zero_optimization": {"reduce_bucket_size": 1000}}
    (tmp_path / "ds.json").write_text(json.dumps(given))
    run = RunConfig(name="test", engine=Settings(zero_stage=2, deepspeed=str(tmp_path / "ds.json")))
    told = deepspeed_config(run, World(0, 0, 2))
    assert told["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    alone = deepspeed_config(run, World())["zero_optimization"]
    assert alone == {"stage": 0, "reduce_bucket_size": 1000}  # nothing to share out
    assert told["comms_logger"] == {"enabled": False}
    assert told["gradient_clipping"] == 0.0


def compiled() -> float:
    """How far an encoder compiled by torch.compile is from itself as it was."""
    from cauc_dist.encoders import build

    torch.manual_seed(0)
    encoder = build(Encoder(width=2), (1, 9, 9, 9))
    x = torch.randn(3, 1, 9, 9, 9)
    before = encoder(x)
    encoder.compile()
    return float((encoder(x) - before).abs().max())


def test_a_compiled_encoder_computes_the_same() -> None:
    assert run_ranks(1, compiled)[0] < 1e-5


def test_a_rank_loads_no_compiler_that_it_does_not_use() -> None:
    code = (
        "import sys, torch; from cauc_dist import engine; compile = torch.compile;"
        "engine._import_deepspeed(torch.device('cpu')); from deepspeed.runtime.zero.muon import muon_optimizer;"
        "assert torch.compile is compile; print('torch._inductor.compile_fx' in sys.modules)"
    )
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.endswith("False\n"), done.stderr
