"""What a step needs is what torch really keeps for it; a chunk is the most that fits."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cauc_dist import memory
from cauc_dist.config import Augment, Engine, Optim, RunConfig
from cauc_dist.world import World

CPU = torch.device("cpu")


def test_what_is_kept_is_the_input_and_each_layers_own_and_no_parameter() -> None:
    """Linear keeps its input, ReLU its output, each once, whoever else holds it."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    x = torch.zeros(8, 10)
    assert memory.kept(model, x) == 4 * 8 * (10 + 20)


def test_needs_are_a_fixed_part_and_one_for_each_subject() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    run = RunConfig(name="test", augment=Augment(views=2), engine=Engine(zero_stage=1))
    weights = 4 * sum(p.numel() for p in model.parameters())
    found = memory.need(model, run, (10,), 2, CPU)
    assert found.fixed == weights * (2 + 3 / 2)  # weights, gradients; half of a copy and of two moments
    ring = 4 * 10 * (run.data.prefetch + 1)
    assert found.each == pytest.approx(memory.OVERHEAD * 4 * 2 * (10 + 20) + ring)
    whole = replace(run, engine=Engine(zero_stage=0), optim=Optim(name="sgd", ema=0.9))
    assert memory.need(model, whole, (10,), 2, CPU).fixed == weights * (2 + 2 + 1)
    assert found.of(3) == found.fixed + 3 * found.each


def test_measuring_leaves_random_numbers_and_running_statistics_alone() -> None:
    from cauc_dist.encoders import BatchNorm

    model = nn.Sequential(nn.Linear(10, 20), BatchNorm(20), nn.Dropout(0.5))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    memory.need(model, RunConfig(name="test"), (10,), 1, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(model.state_dict()["1.running_mean"], torch.zeros(20))


@pytest.mark.parametrize(("budget", "share", "chunk"), [(1000, 64, 9), (1000, 5, 5), (100, 64, 1), (0, 64, 1)])
def test_a_chunk_is_the_most_that_fits_and_one_at_least(budget: float, share: int, chunk: int) -> None:
    assert memory.chunk(budget, memory.Need(100, 100), share) == chunk


def test_the_budget_is_what_the_run_says_or_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(name="test", engine=Engine(memory_gib=1.5))
    assert memory.budget(run, World(), CPU) == 1.5 * 2**30
    free = replace(run, engine=Engine())
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    assert 0 < memory.budget(free, World(), CPU) < 2**50
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "64")
    assert memory.budget(free, World(local_size=4), CPU) == 64 * 2**20 / 2 / 4


def test_the_peak_of_a_process_does_not_fall() -> None:
    before = memory.peak(CPU)
    torch.zeros(30_000_000).fill_(1)
    assert memory.peak(CPU) >= max(before, 100_000_000)
