"""The gradient of a whole step: any number of ranks, chunks and ZeRO stages against plain autograd in one process."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cauc_dist import config, encoders
from cauc_dist.augment import views
from cauc_dist.config import Augment, Encoder, Engine, Objective, Optim, Projector, RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.objective import Objective as Loss
from cauc_dist.stream.loader import Batch
from cauc_dist.stream.plan import per_rank, shares
from cauc_dist.world import World
from tests.ranks import run_ranks

N, SIDE = 13, 9
SHAPE = (1, SIDE, SIDE, SIDE)
KEYS = np.arange(100, 100 + N, dtype=np.uint64)
RUN = RunConfig(
    name="test",
    batch_size=N,
    augment=Augment(p_flip=0.5, p_intensity=1.0, p_noise=1.0),
    encoder=Encoder(width=2),
    projector=Projector(16, 8),
    objective=Objective(kernel=("age:gaussian:5", "sex:delta"), lambda_align=1.0),
    optim=Optim(name="sgd", weight_decay=0.0),  # whose buffer is the gradient, after a first step
    engine=Engine(zero_stage=0, precision="fp64"),
)


def of(name: str) -> RunConfig:
    """The run with that objective, and a kernel that it takes."""
    classes, number = ("sex:delta",), ("age:gaussian:5",)
    own = {"supcon": classes, "cross_entropy": classes, "rank_n_contrast": number, "squared_error": number}
    kernel = own.get(name, RUN.objective.kernel)
    return replace(RUN, objective=Objective(name=name, kernel=kernel, lambda_align=1.0, tau=0.5))  # type: ignore[arg-type]


def scans(sound: tuple[bool, ...] = (True,) * N) -> tuple[Tensor, Tensor]:
    """Volumes (n, c, X, Y, Z) and metadata (n, 2); what stands in for a damaged scan is zeros."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(N, *SHAPE, generator=draw)
    y = torch.stack([torch.randint(30, 60, (N,), generator=draw), torch.randint(0, 2, (N,), generator=draw)], 1)
    x[~torch.tensor(sound)] = 0
    return x, y.double()


def columns(run: RunConfig, y: Tensor) -> Tensor:
    return y[:, [("age", "sex").index(name) for name in run.objective.columns]]


def alone(run: RunConfig, sound: tuple[bool, ...] = (True,) * N) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient by plain autograd on the whole batch: no engine, no gather, no chunks."""
    from cauc_dist.train import build_model

    x, y = scans()
    kept = torch.tensor(sound)
    model = build_model(run, SHAPE).double()
    v = views(x[kept], KEYS[kept.numpy()], seed=run.seed, epoch=0, augment=run.augment)
    z = model(v).view(2, int(kept.sum()), -1)
    y = columns(run, y)
    loss = Loss(run.objective, y).loss(z, y[kept])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(
    run: RunConfig, chunks: int, sound: tuple[bool, ...] = (True,) * N, again: tuple[bool, ...] | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """On a rank: one step of the trainer; what it reports, and the gradient that the engine came to."""
    from cauc_dist.engine import Engine as DeepSpeed
    from cauc_dist.train import build_model
    from cauc_dist.trainer import Feed, Step, Trainer

    rank, world_size = dist.get_rank(), dist.get_world_size()
    world = World(rank, rank, world_size)
    x, y = scans(sound)
    y = columns(run, y)
    model = build_model(run, SHAPE)
    if run.engine.recompute:
        encoders.recompute(model)
    engine = DeepSpeed(model, run, world, torch.device("cpu"))
    sizes = per_rank(N, world_size)
    start = sum(sizes[:rank])

    def batches() -> Iterator[Batch]:
        for turn in range(1 if chunks == 1 else 2):
            at = start
            for size in shares(sizes[rank], chunks):
                rows = np.arange(at, at + size)
                read = np.array(again if turn and again else sound)[rows]
                told = tuple(f"scan {row}" for row in rows[~read])
                yield Batch(0, rows, x[rows], read, told, 0.0)
                at += size

    objective = Loss(run.objective, y)
    trainer = Trainer(engine, objective, run, world, Feed(batches()), KEYS, chunks)
    record = trainer.step(Step(0, 0, 0.1, tuple(f"sub-{i}" for i in range(N)), y))
    state = engine.state()
    prefix = "momentum_buffer/"
    return record, {name.removeprefix(prefix): g for name, g in state.items() if name.startswith(prefix)}


def every(runs: list[RunConfig], chunks: list[int]) -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    return [step(run, m) for run in runs for m in chunks]


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is wanted, of the whole gradient."""
    assert found.keys() == wanted.keys()
    a, b = (torch.cat([g[name].double().flatten() for name in wanted]) for g in (found, wanted))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_objective_has_the_gradient_of_one_process_whole_or_in_chunks(world: int) -> None:
    """13 subjects divide over no world, and their shares over no number of chunks."""
    names = get_args(config.Objectives)
    chunks = [1, 2, 3]
    results = run_ranks(world, every, [of(name) for name in names], chunks)
    for i, name in enumerate(names):
        loss, wanted = alone(of(name))
        for j, m in enumerate(chunks):
            for rank in range(world):
                record, found = results[rank][i * len(chunks) + j]
                assert record["loss"] == pytest.approx(loss, rel=1e-12), (name, m)
                assert off(found, wanted) < 1e-12, (name, m, rank)


def test_eight_ranks_of_one_or_two_subjects() -> None:
    run = of("cauc")
    loss, wanted = alone(run)
    for record, found in (result[0] for result in run_ranks(8, every, [run], [1])):
        assert record["loss"] == pytest.approx(loss, rel=1e-12)
        assert off(found, wanted) < 1e-12


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_has_it_in_single_precision(stage: int) -> None:
    run = replace(of("cauc"), engine=Engine(zero_stage=stage, precision="fp32"))  # type: ignore[arg-type]
    _, wanted = alone(run)
    for results in run_ranks(3, every, [run], [1, 3]):
        assert all(off(found, wanted) < 1e-5 for _, found in results)


@pytest.mark.parametrize("changes", [{"recompute": True}, {"channels_last": True}, {"exchange": "ring"}])
def test_what_saves_time_or_memory_changes_no_gradient(changes: dict[str, object]) -> None:
    run = replace(of("cauc"), engine=replace(RUN.engine, **changes))  # type: ignore[arg-type]
    _, wanted = alone(run)
    for results in run_ranks(2, every, [run], [1, 2]):
        assert all(off(found, wanted) < 1e-12 for _, found in results)


def test_bf16_keeps_embeddings_and_loss_in_single_precision_and_the_gradients_direction() -> None:
    run = replace(of("cauc"), engine=Engine(zero_stage=1, precision="bf16"))
    loss, wanted = alone(of("cauc"))
    record, found = run_ranks(2, every, [run], [1])[0][0]
    assert record["loss"] != torch.tensor(record["loss"]).bfloat16().item()
    assert record["loss"] == pytest.approx(loss, rel=0.05)
    assert 1e-6 < off(found, wanted) < 0.1  # rounded, and no more


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_damaged_scan_is_left_out_of_the_gradient(chunks: int) -> None:
    sound = tuple(i != 4 for i in range(N))
    loss, wanted = alone(of("cauc"), sound)
    for record, found in run_ranks(3, step, of("cauc"), chunks, sound):
        assert record["loss"] == pytest.approx(loss, rel=1e-12)
        assert off(found, wanted) < 1e-12


def test_a_scan_that_changes_between_the_two_passes_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"step 0: scan 4 changed between two readings; wanted bytes that stay"):
        run_ranks(1, step, of("cauc"), 2, (True,) * N, tuple(i != 4 for i in range(N)))


def test_a_step_with_less_than_two_sound_scans_is_refused() -> None:
    with pytest.raises(AssertionError, match="12 of the 13 scans of a step are damaged; wanted two sound ones"):
        run_ranks(2, step, of("cauc"), 1, (True, *(False,) * (N - 1)))


def left_out(chunks: int) -> tuple[bool, bool]:
    """Whether a step that is not finite leaves weights and running statistics alone; whether a sound one moves both."""
    from cauc_dist.engine import Engine as DeepSpeed
    from cauc_dist.train import build_model
    from cauc_dist.trainer import Feed, NonFinite, Step, Trainer

    rank, world_size = dist.get_rank(), dist.get_world_size()
    run = replace(RUN, encoder=Encoder(width=2, norm="batch"))
    x, y = scans()
    bad = x.clone()
    bad[N - 1, 0, 0, 0, 0] = torch.inf  # on the last rank, in its last chunk
    start = sum(per_rank(N, world_size)[:rank])
    cuts = np.cumsum([start, *shares(per_rank(N, world_size)[rank], chunks)])

    def batches() -> Iterator[Batch]:
        for number in (0, 1) if chunks == 1 else (0, 0, 1, 1):
            for a, b in itertools.pairwise(cuts):
                rows = np.arange(a, b)
                yield Batch(number, rows, (x, bad)[number][rows], np.ones(b - a, bool), (), 0.0)

    engine = DeepSpeed(build_model(run, SHAPE), run, World(rank, rank, world_size), torch.device("cpu"))
    trainer = Trainer(engine, Loss(run.objective, y), run, engine._world, Feed(batches()), KEYS, chunks)
    ids = tuple(f"sub-{i}" for i in range(N))
    states = [engine.state()]
    trainer.step(Step(0, 0, 0.1, ids, y))
    states.append(engine.state())
    with pytest.raises(NonFinite):
        trainer.step(Step(1, 0, 0.1, ids, y))
    states.append(engine.state())
    names = [name for name in states[0] if name.startswith(("parameter/", "buffer/"))]
    assert any(name.endswith("running_var") for name in names)
    moved = all(not torch.equal(states[0][name], states[1][name]) for name in names if name.endswith("running_var"))
    return all(torch.equal(states[1][name], states[2][name]) for name in names), moved


@pytest.mark.parametrize(("world", "chunks"), [(1, 1), (2, 1), (2, 2)])
def test_a_step_that_is_not_finite_leaves_weights_and_running_statistics_alone(world: int, chunks: int) -> None:
    assert run_ranks(world, left_out, chunks) == [(True, True)] * world


def test_a_batch_smaller_than_the_world_is_refused() -> None:
    with pytest.raises(BadInput, match="batch_size 3 over 4 ranks; wanted a subject a rank"):
        per_rank(3, 4)
