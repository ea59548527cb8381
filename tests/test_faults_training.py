"""What happens to a run's ranks, done for real: a killed one, a frozen one, one that fails. Drawn by seeds.

A killed rank is killed at a random moment of a random step; the run that goes on must end as if it had never been.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from cauc_dist import checkpoint, journal, spawn
from cauc_dist.config import Checkpoint, Engine
from cauc_dist.prepare import prepare
from cauc_dist.train import main
from tests import ranks as forked
from tests.faults import Ledger, seeds
from tests.test_train import config, curve

STEPS = 24  # 8 epochs of 3


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()  # the kernel ends its ranks
        process.communicate()


def started(folder: Path, ranks: int = 2) -> subprocess.Popen[str]:
    code = f"import sys; from cauc_dist import spawn; sys.exit(spawn.start({ranks}, {str(folder)!r}, threads=1))"
    pipe = subprocess.PIPE
    STARTED.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=pipe, text=True))
    return STARTED[-1]


def pids(parent: subprocess.Popen[str]) -> list[int]:
    """Of the ranks, in their order."""
    found = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=True)
    place = {}
    for pid in map(int, found.stdout.split()):
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        place[next(int(entry[5:]) for entry in env if entry.startswith(b"RANK="))] = pid
    return [place[rank] for rank in sorted(place)]


def after(folder: Path, parent: subprocess.Popen[str], steps: int) -> None:
    """Return when that many steps are in the journal."""
    while len(curve(folder)) < steps:
        assert parent.poll() is None, parent.communicate()[1]
        time.sleep(0.005)


def changed(kind: int) -> dict[str, Any]:
    """Settings under which a run must be killed and go on: in chunks, in the background, at another stage."""
    engines = (Engine(), Engine(encode_chunk=1), Engine(zero_stage=3), Engine(zero_stage=0, encode_chunk=2))
    save = Checkpoint(every_epochs=1, keep=2, best=kind % 2 == 1, background=kind % 2 == 1)
    return {"epochs": STEPS // 3, "engine": engines[kind % 4], "checkpoint": save}


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[list[float], Any]]:
    """(curve, tensors at the end) by kind, of runs that nothing happens to."""
    found: dict[int, tuple[list[float], Any]] = {}
    for kind in range(min(4, len(seeds(50)))):
        folder = prepare(config(store, tmp_path_factory.mktemp("whole") / "run", **changed(kind)), 2)
        assert forked.train(folder, 2) == [0, 0]
        saved, _ = checkpoint.latest(folder)
        assert saved is not None
        found[kind] = curve(folder), saved.tensors
    return found


@pytest.mark.parametrize("seed", seeds(50))
def test_a_run_whose_rank_is_killed_goes_on_and_ends_with_the_same_bits(
    store: Path, undisturbed: dict[int, tuple[list[float], Any]], tmp_path: Path, ledger: Ledger, seed: int
) -> None:
    draw, kind = random.Random(seed), seed % 4
    losses, wanted = undisturbed[kind]
    folder = prepare(config(store, tmp_path / "run", **changed(kind)), 2)
    step, rank, delay = draw.randrange(1, STEPS - 1), draw.randrange(2), draw.random() * 0.05
    facts = {"step": step, "rank": rank, "delay_s": round(delay, 4), "kind": kind}
    with ledger.fault("rank killed", seed, **facts) as entry:
        parent = started(folder)
        after(folder, parent, step)
        time.sleep(delay)
        os.kill(pids(parent)[rank], signal.SIGKILL)
        _, error = parent.communicate(timeout=60)
        entry["found"] = {"code": parent.returncode, "said": error.replace(str(tmp_path), "FOLDER").splitlines()[-3:]}
        assert parent.returncode == 128 + signal.SIGKILL
        assert f"rank {rank} (pid" in error
        assert "was ended by signal 9 (SIGKILL)" in error
        entry["steps"] = len(curve(folder))
        assert forked.train(folder, 2) == [0, 0]
        resumed = [event["step"] for event in journal.read(folder) if event["event"] == "resume"]
        entry["resumed"] = resumed
        assert curve(folder) == losses
        saved, complaints = checkpoint.latest(folder)
        assert saved is not None
        assert complaints == []
        assert all(torch.equal(saved.tensors[name], wanted[name]) for name in wanted)
        entry["bits"] = "identical"


@pytest.mark.parametrize("seed", seeds(10, few=1))
def test_a_frozen_rank_ends_the_run_within_its_timeout_and_is_named(
    store: Path, tmp_path: Path, ledger: Ledger, seed: int
) -> None:
    run = config(store, tmp_path / "run", epochs=2000, engine=Engine(timeout_minutes=0.1))
    folder, rank = prepare(run, 2), random.Random(seed).randrange(2)
    with ledger.fault("rank frozen", seed, rank=rank) as entry:
        parent = started(folder)
        after(folder, parent, 3)
        os.kill(pids(parent)[rank], signal.SIGSTOP)
        began = time.monotonic()
        _, error = parent.communicate(timeout=90)
        entry["found"] = {"code": parent.returncode, "seconds": round(time.monotonic() - began, 1)}
        assert parent.returncode == 6
        assert f"error: rank {rank} (host " in error
        assert f"is gone, or frozen; the others end too. `cauc resume {folder}` goes on from the newest" in error
        assert "Traceback" not in error


@contextmanager
def alone(folder: Path, ranks: int, fn: Callable[..., int] = main) -> Iterator[list[BaseProcess]]:
    """Ranks with no parent that would end them, or say how one ended; `said` has what they say."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    places = [
        spawn.environment(rank, ranks, port, 1) | {"TORCHELASTIC_USE_AGENT_STORE": "False"} for rank in range(ranks)
    ]
    logs = [Path(f"{folder}.rank-{rank}") for rank in range(ranks)]
    found = [forked.fork(fn, str(folder), log=log, env=env) for log, env in zip(logs, places, strict=True)]
    try:
        yield found
    finally:
        forked.codes(found, 0)


def said(folder: Path, rank: int) -> str:
    return Path(f"{folder}.rank-{rank}.err").read_text()


def at(folder: Path, steps: int, ranks: list[BaseProcess]) -> None:
    """Return when that many steps are in the journal."""
    while len(curve(folder)) < steps:
        assert ranks[0].is_alive(), said(folder, 0)
        time.sleep(0.005)


def test_where_a_rank_is_killed_without_a_parent_to_say_so_the_others_name_it(store: Path, tmp_path: Path) -> None:
    """As under srun or mpiexec: nobody but the ranks themselves."""
    folder = prepare(config(store, tmp_path / "run", epochs=2000), 3)
    with alone(folder, 3) as ranks:
        at(folder, 3, ranks)
        ranks[1].kill()
        assert forked.codes(ranks, 60) == [6, -9, 6]
    assert f"error: rank 1 (host {os.uname().nodename}, pid {ranks[1].pid}) is gone, or frozen" in said(folder, 0)
    assert "error: " not in said(folder, 2)  # one readable message, once


def slow(folder: str) -> int:
    """Rank 1 sleeps in its sixth step, as in a stalled read."""
    from cauc_dist import trainer

    forward = trainer.Trainer._forward

    def late(self: trainer.Trainer, batch: Any, step: trainer.Step, k: int) -> torch.Tensor:
        if os.environ["RANK"] == "1" and step.number == 5:
            time.sleep(9)
        return forward(self, batch, step, k)

    trainer.Trainer._forward = late  # type: ignore[method-assign]
    return main(folder)


def test_a_rank_that_is_at_work_when_another_dies_is_not_taken_for_gone(store: Path, tmp_path: Path) -> None:
    """It meets the closed sockets long after the others."""
    folder = prepare(config(store, tmp_path / "run", epochs=2000), 3)
    with alone(folder, 3, slow) as ranks:
        at(folder, 5, ranks)
        time.sleep(1)  # step 5 is on its way on all ranks, and rank 1 asleep in it
        ranks[2].kill()
        assert forked.codes(ranks, 60) == [6, 6, -9]
    assert "error: rank 2 (host" in said(folder, 0)
    assert "rank 1 (" not in said(folder, 0)


def test_ranks_that_live_and_do_not_reach_each_other_end_as_if_one_were_gone(store: Path, tmp_path: Path) -> None:
    """Rank 1 sleeps longer than the others wait, as in a stalled read: a launcher may try again."""
    folder = prepare(config(store, tmp_path / "run", epochs=2000, engine=Engine(timeout_minutes=0.1)), 2)
    with alone(folder, 2, slow) as ranks:
        assert forked.codes(ranks, 90) == [6, 6]
    assert "error: every rank is there, and they do not reach each other. `cauc resume" in said(folder, 0)


def test_a_step_that_is_not_finite_is_left_out_counted_and_the_run_goes_on(store: Path, tmp_path: Path) -> None:
    """The first scan of the second step turns to infinity on its way, on one of two ranks."""
    for chunk in (None, 1):
        engine = Engine(on_non_finite="skip", encode_chunk=chunk)
        folder = prepare(config(store, tmp_path / f"run{chunk}", engine=engine), 2)
        forked.run_ranks(2, poisoned, folder, 1)
        events = journal.read(folder)
        (left,) = [e for e in events if e["event"] == "non_finite"]
        assert (left["step"], left["left_out"]) == (1, 1)
        assert "embeddings of " in left["message"]
        assert [e["step"] for e in events if e["event"] == "step"] == [0, 2, 3, 4, 5]
        assert all(abs(loss) < 100 for loss in curve(folder))
        assert events[-1]["event"] == "end"


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run_all_the_same(store: Path, tmp_path: Path) -> None:
    run = config(store, tmp_path / "run", epochs=5, engine=Engine(on_non_finite="skip"))
    folder = prepare(run, 1)
    with pytest.raises(AssertionError, match="the loss at step 11 is not finite"):
        forked.run_ranks(1, poisoned, folder, *range(2, 15))
    assert [e["step"] for e in journal.read(folder) if e["event"] == "non_finite"] == list(range(2, 12))


def poisoned(folder: Path, *steps: int) -> None:
    """Train on this rank; on rank 0 the first view of those steps holds an infinite voxel."""
    import torch.distributed as dist

    from cauc_dist import trainer
    from cauc_dist.prepare import load
    from cauc_dist.train import train
    from cauc_dist.world import World

    rank, forward = dist.get_rank(), trainer.Trainer._forward

    def bad(self: trainer.Trainer, batch: Any, step: trainer.Step, k: int) -> torch.Tensor:
        if rank == 0 and step.number in steps and k == 0:
            volumes = batch.volumes.clone()
            volumes[0, 0, 8, 8, 8] = float("inf")
            batch = batch._replace(volumes=volumes)
        return forward(self, batch, step, k)

    trainer.Trainer._forward = bad  # type: ignore[method-assign]
    run = load(folder)
    train(
        replace(run, augment=replace(run.augment, p_crop=0.0, p_cutout=0.0)), World(rank, rank, dist.get_world_size())
    )
