"""The same recipe, the same curve: on 1, 2 and 4 ranks, whole or in chunks."""

from pathlib import Path

import pytest
import torch.distributed as dist

from cauc_dist.config import Augment, Encoder, Engine, Objective, Optim, Projector
from cauc_dist.prepare import load, prepare
from tests.ranks import run_ranks
from tests.test_train import config, curve


def train_here(folder: Path) -> None:
    from cauc_dist.train import train
    from cauc_dist.world import World

    rank = dist.get_rank()
    train(load(folder), World(rank, rank, dist.get_world_size()))


def curves(store: Path, folder: Path, epochs: int, precision: str, chunk: int | None = None) -> dict[int, list[float]]:
    """The loss of each step by number of ranks, batches of 7 subjects: two steps an epoch, shares of 7 and 4 + 3."""
    found = {}
    for ranks in (1, 2, 4):
        run = config(
            store,
            folder / f"{precision}{ranks}",
            epochs=epochs,
            batch_size=7,
            augment=Augment(),
            encoder=Encoder(width=2),
            projector=Projector(16, 8),
            objective=Objective(kernel=("age:gaussian:5",), lambda_align=1.0),
            optim=Optim(lr=1e-3, warmup_epochs=1),
            engine=Engine(zero_stage=0, precision=precision, encode_chunk=chunk),  # type: ignore[arg-type]
        )
        prepare(run, ranks)
        run_ranks(ranks, train_here, run.folder)
        found[ranks] = curve(run.folder)
    return found


def test_fifty_steps_in_double_precision_are_the_same_to_nine_digits(store: Path, tmp_path: Path) -> None:
    found = curves(store, tmp_path, 25, "fp64")
    assert len(found[1]) == 50
    assert min(found[1]) < found[1][0] - 0.05  # it learns
    for ranks in (2, 4):
        assert found[ranks] == pytest.approx(found[1], rel=1e-9)


def test_ten_steps_in_single_precision_are_the_same_to_five_digits_in_chunks_too(store: Path, tmp_path: Path) -> None:
    whole = curves(store, tmp_path / "whole", 5, "fp32")
    chunked = curves(store, tmp_path / "chunked", 5, "fp32", chunk=1)
    for found in (*whole.values(), *chunked.values()):
        assert len(found) == 10
        assert found == pytest.approx(whole[1], rel=1e-5)
