"""Run a function, or a training, on ranks that are forked: real processes, real collectives, a fraction of a second.

What is claimed of processes themselves (how they are started, told and ended) wants `cauc_dist.spawn` instead.
"""

import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# What DeepSpeed imports when an engine is made costs 3 s; a fork of a process that has it costs nothing.
PRELOADED = ["torch._dynamo", "deepspeed", "torch.utils.tensorboard", "cauc_dist.train"]


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
        dist.barrier()  # else who has nothing to send may be gone before the others have found it
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


def fork(fn: Callable[..., int], *args: Any, log: Path, env: Mapping[str, str]) -> BaseProcess:
    """A process that ends with the code that `fn(*args)` returns, in that environment; it writes to LOG and LOG.err."""
    preload()
    process = mp.get_context("forkserver").Process(target=_forked, args=(fn, args, str(log), dict(env)), daemon=True)
    process.start()
    return process


def _forked(fn: Callable[..., int], args: tuple[Any, ...], log: str, env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    for stream, path in ((1, log), (2, f"{log}.err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    code = 1
    try:
        code = fn(*args)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as cauc_dist.train does


def codes(processes: Sequence[BaseProcess], seconds: float = 120.0) -> list[int | None]:
    """How they end; one that has not by then is killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def train(folder: Path, ranks: int) -> list[int | None]:
    """`cauc_dist.train.main(folder)` on so many ranks, which meet as those of `cauc train --ranks`; their exit codes.

    What they say goes to FOLDER.rank-R.log and FOLDER.rank-R.log.err.
    """
    from torch.distributed import TCPStore

    from cauc_dist import spawn
    from cauc_dist.train import main

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = [spawn.environment(rank, ranks, store.port, 1) for rank in range(ranks)]
    logs = [Path(f"{folder}.rank-{rank}.log") for rank in range(ranks)]
    return codes([fork(main, str(folder), log=log, env=env) for log, env in zip(logs, places, strict=True)])


def _receive(pipe: Connection, rank: int, timeout: float) -> tuple[bool, Any]:
    """(whether it succeeded, its result or what went wrong)."""
    if not pipe.poll(timeout):
        return False, f"it gave nothing in {timeout} s"
    done, value = pickle.loads(pipe.recv_bytes())
    return done, value
