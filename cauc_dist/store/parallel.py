"""A function over units of work in several processes, which end with their parent however it ends."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from cauc_dist.errors import BadInput

Unit = TypeVar("Unit")
Result = TypeVar("Result")


def run(function: Callable[[Unit], Result], units: Sequence[Unit], workers: int) -> Iterator[Result]:
    """Results as they come; function and units must pickle. One worker: here, in order, in this process.

    BadInput where a worker is killed (as the kernel does where memory runs out); other errors as they are.
    """
    if min(workers, len(units)) <= 1:
        yield from map(function, units)
        return
    context = multiprocessing.get_context("forkserver")  # this process may have threads; a fork of it could hang
    context.set_forkserver_preload([function.__module__])
    pool = ProcessPoolExecutor(min(workers, len(units)), context, _end_with_parent)
    try:
        for future in as_completed([pool.submit(function, unit) for unit in units]):
            yield future.result()
    except BrokenProcessPool as error:
        do = "If memory ran out, ask for fewer workers (a script of yours needs `if __name__ == '__main__'`). "
        do += "What is done is kept: give the same command again"
        raise BadInput("a worker process was killed", wanted="all of them to the end", do=do) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """An orphan would go on writing beside the run that takes its work over."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
