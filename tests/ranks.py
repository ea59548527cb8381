"""Run a function, or a training, on ranks that are forked: real processes, real collectives, a fraction of a second.

What is claimed of processes themselves (how they are started, told and ended) wants `cauc_dist.spawn` instead.
"""

import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# What DeepSpeed imports when an engine is made costs 3 s; a fork of a process that has it costs nothing.
PRELOADED = ["torch._dynamo", "cauc_dist.train"]


def preload() -> None:
    """Start the server that ranks are forked from, before other code of the process starts one that has nothing."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def _rank_main(conn: Connection, rank: int, world: int, store: str, fn: Callable[..., Any], args: bytes) -> None:
    import torch
    import torch.distributed as dist

    try:
        torch.set_num_threads(1)  # two cores: more threads than that only fight
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        # Bytes, not tensors by file descriptor: the rank may exit before the reader maps them.
        conn.send_bytes(pickle.dumps((True, fn(*pickle.loads(args)))))
    except BaseException:
        conn.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """`[fn(*args) on rank 0, ..., on rank world-1]`; a rank that raises fails the caller with its traceback."""
    preload()
    context = mp.get_context("forkserver")
    processes, pipes = [], []
    with tempfile.TemporaryDirectory() as folder:
        store, payload = str(Path(folder) / "store"), pickle.dumps(args)
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(theirs, rank, world, store, fn, payload), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            results = [_receive(pipe, rank, timeout) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(5.0)
                if process.is_alive():
                    process.kill()
    failed = [f"rank {rank} of {world} failed:\n{value}" for rank, (done, value) in enumerate(results) if not done]
    if failed:  # all of them: the first in order is often only the one whose connection was closed
        raise AssertionError("\n".join(failed))
    return [value for _, value in results]


def train(folder: Path, ranks: int) -> list[int]:
    """`cauc_dist.train.main(folder)` on so many ranks, which meet as those of `cauc train --ranks` do; their exit codes.

    What they say goes to FOLDER.rank-R.log.
    """
    from torch.distributed import TCPStore

    from cauc_dist import spawn

    preload()
    context = mp.get_context("forkserver")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = [spawn.environment(rank, ranks, store.port, 1) for rank in range(ranks)]
    processes = [context.Process(target=_train, args=(str(folder), place), daemon=True) for place in places]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()  # one that has ended is not there
    return [process.exitcode for process in processes if process.join() is None]  # type: ignore[func-returns-value]


def _train(folder: str, place: dict[str, str]) -> None:
    from cauc_dist.train import main

    os.environ.clear()
    os.environ.update(place)
    log = os.open(f"{folder}.rank-{place['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    code = main(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as cauc_dist.train does


def _receive(pipe: Connection, rank: int, timeout: float) -> tuple[bool, Any]:
    """(whether it succeeded, its result or what went wrong)."""
    if not pipe.poll(timeout):
        return False, f"it gave nothing in {timeout} s"
    done, value = pickle.loads(pipe.recv_bytes())
    return done, value
