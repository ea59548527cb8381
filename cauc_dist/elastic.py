"""Several ranks on this machine, through torch's elastic agent."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cauc_dist.errors import BAD_INPUT, NON_FINITE
from cauc_dist.world import cores, loopback_interface

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def start(ranks: int, *arguments: str, module: str = "cauc_dist.train", threads: int = 0) -> int:
    """Run `python -m MODULE ARGUMENTS` on `ranks` local processes; the exit code of the first to fail, or 0.

    The agent ends all ranks when one of them dies, and passes SIGTERM and SIGINT on. `threads` a rank; 0: the cores
    are shared out.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What the agent has to say of a failure is its own machinery; the rank that failed has said why.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
    )
    with _environment(threads or max(1, cores() // ranks)), _signal_handlers():
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            return _exit_code(error)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            return 128 + error.sigval
    return 0


def _exit_code(error: "ChildFailedError") -> int:
    """The code of the rank that brought the others down; 128 + signal where a signal ended it, as a shell would say.

    One rank's end is soon the end of all: peers fail on closed sockets with code 1, or the agent ends them by SIGTERM.
    So the code that says most counts: one of ours, then a signal of another's, then any other, then SIGTERM.
    """
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    rank, code = min(codes.items(), key=lambda item: _says_least(item[1]))
    if code > 0:
        return code
    print(f"rank {rank} was ended by signal {-code}; the other ranks were stopped", file=sys.stderr)
    return 128 - code


def _says_least(code: int) -> int:
    if code in (BAD_INPUT, NON_FINITE):
        return 0
    if code < 0:
        return 3 if code == -signal.SIGTERM else 1
    return 2


@contextmanager
def _signal_handlers() -> Iterator[None]:
    """The agent replaces them and leaves its own: a later ctrl-C would end in its exception."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Variables that the ranks inherit: threads, the loopback (the run stays on this machine), and malloc's habits.

    By default glibc maps and unmaps every activation anew and the kernel zeroes its pages each time: a third of the
    time of a step on CPUs (docs/log.md, 2026-11-24). What the user has set stays.
    """
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": loopback_interface(),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
