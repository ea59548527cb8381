"""Members of a study, each in a process of its own: forked from a server that has imported what training needs.

DeepSpeed and torch take four seconds of a core to import; a fork of a process that has them takes hundredths.
A process that uses CUDA cannot be forked from one that may have touched it: there it is spawned.
"""

import contextlib
import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from cauc_dist import spawn

PRELOADED = ["torch._dynamo", "cauc_dist.reproduce.member"]
PATIENCE = 120.0
"""Seconds that a member has to save after SIGTERM."""


@dataclass(frozen=True)
class Task:
    """What a process does: call `work()`, which returns an exit code, with its output in `log`."""

    name: str
    log: Path
    work: Callable[[], int]


@dataclass(frozen=True)
class Ended:
    name: str
    code: int
    """0, or what `cauc train` would have ended with; 128 + n for signal n."""
    seconds: float
    log: Path


def run(tasks: Sequence[Task], jobs: int, *, threads: int, cuda: bool) -> Iterator[Ended]:
    """Each task in a process, `jobs` at a time, in their order; what ended, as it ends.

    Closing the iterator (an exception in the loop that reads it) asks those at work to save and waits for them.
    """
    with _environment(threads):
        context = _context(cuda)
        waiting, running = list(tasks), list[tuple[Task, BaseProcess, float]]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    task = waiting.pop(0)
                    running.append((task, _started(context, task), time.monotonic()))
                connection.wait([process.sentinel for _, process, _ in running], timeout=1.0)
                for entry in [entry for entry in running if not entry[1].is_alive()]:
                    running.remove(entry)
                    yield _ended(*entry)
        finally:
            _stop([process for _, process, _ in running])


def _started(context: BaseContext, task: Task) -> BaseProcess:
    process: BaseProcess = context.Process(target=_main, args=(task,), name=task.name)  # type: ignore[attr-defined]
    process.start()
    return process


def _ended(task: Task, process: BaseProcess, began: float) -> Ended:
    process.join()
    code = process.exitcode or 0
    return Ended(task.name, code if code >= 0 else 128 - code, time.monotonic() - began, task.log)


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()


def _main(task: Task) -> None:
    """In the process: output into the log, and an end of its own if who started it is gone."""
    threading.Thread(target=_tied, daemon=True).start()
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's ctrl-C is for the parent, which tells us
        signal.signal(number, signal.SIG_IGN)
    try:
        code = task.work()
    except BaseException:
        traceback.print_exc()
        code = 1
    spawn.leave(code)


def _tied() -> None:
    """Ask this process to save and end when the study's has ended: the server that forked it lives as long as it."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _context(cuda: bool) -> BaseContext:
    if cuda:
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """What a rank of a world of one inherits, for the server and for spawned processes; put back at the end."""
    before = dict(os.environ)
    os.environ.update(spawn.environment(0, 1, 0, threads))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
