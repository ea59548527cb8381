"""Run a function on every rank of a fresh gloo world: real processes, real collectives, a fraction of a second."""

import multiprocessing as mp
import pickle
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


def _receive(pipe: Connection, rank: int, timeout: float) -> tuple[bool, Any]:
    """(whether it succeeded, its result or what went wrong)."""
    if not pipe.poll(timeout):
        return False, f"it gave nothing in {timeout} s"
    done, value = pickle.loads(pipe.recv_bytes())
    return done, value
