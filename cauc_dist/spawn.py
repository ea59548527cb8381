"""Several ranks on this machine: started together, told together, ended together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from cauc_dist.errors import BAD_INPUT, LOST, NON_FINITE, STOPPED
from cauc_dist.world import cores, loopback_interface

# Seconds that the peers of a failed rank have to say what they miss; from SIGTERM to SIGKILL; after a second signal.
LAST_WORDS, TO_KILL, AT_ONCE = 3.0, 5.0, 2.0
# What the ranks are told of what this process hears; a terminal's ctrl-C does not reach them (a session each).
PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGUSR2,
}
# Asks the kernel for SIGKILL when its parent dies (PR_SET_PDEATHSIG is 1), which outlives exec, and becomes the rank.
# A preexec_fn would run Python between fork and exec, in a process that had threads.
TIED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)


def start(ranks: int, *arguments: str, module: str = "cauc_dist.train", threads: int = 0) -> int:
    """Run `python -m MODULE ARGUMENTS` on `ranks` local processes; 0, or the exit code that says most of a failure.

    128 + n for signal n, as a shell would say. A rank that fails takes the others with it. SIGTERM, SIGINT and SIGHUP
    reach the ranks as SIGTERM, SIGUSR2 as it is, and their end is waited for: they save. The second of the first three
    ends them at once. Raises KeyboardInterrupt at the end where SIGINT was heard. `threads` a rank; 0: the cores are
    shared out.
    """
    store = None  # a world of one has nobody to meet
    if ranks > 1:
        from torch._C._distributed_c10d import TCPStore

        # Left to itself it listens on every interface.
        listening = socket.create_server(("127.0.0.1", 0))
        host, port = listening.getsockname()
        store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    command = [sys.executable, "-m", module, *arguments]
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", TIED, str(os.getpid()), *command]
    processes: list[subprocess.Popen[bytes]] = []
    with _hearing() as heard:
        try:
            for rank in range(ranks):
                env = environment(rank, ranks, store.port if store else 0, threads or max(1, cores() // ranks))
                processes.append(subprocess.Popen(command, env=env, start_new_session=True))
            told = _watch(processes, heard)
        finally:
            _tell(processes, signal.SIGKILL)
    if signal.SIGINT in heard:
        raise KeyboardInterrupt
    codes = [process.wait() for process in processes]
    rank = min(range(ranks), key=lambda rank: _says_least(codes[rank], (rank, codes[rank]) in told))
    if codes[rank] < 0 and (rank, codes[rank]) not in told:
        how = f"signal {-codes[rank]} ({signal.Signals(-codes[rank]).name})"
        others = "; the other ranks were stopped" * (ranks > 1)
        print(f"rank {rank} (pid {processes[rank].pid}) was ended by {how}{others}.", file=sys.stderr)
        if codes[rank] == -signal.SIGKILL:
            print("Often the memory is full: fewer subjects a rank, or --engine.encode_chunk auto.", file=sys.stderr)
        if module == "cauc_dist.train":
            print(f"`cauc resume {arguments[0]}` goes on.", file=sys.stderr)
    return codes[rank] if codes[rank] >= 0 else 128 - codes[rank]


def leave(code: int) -> NoReturn:
    """End this process past the interpreter's teardown, in which torch has ended with std::terminate, rarely.

    Seen at the end of ranks whose work was done (docs/log.md, 2026-11-24 and 2026-11-27).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def environment(rank: int, ranks: int, port: int, threads: int) -> dict[str, str]:
    """What a rank inherits: its place, threads, the loopback (the run stays on this machine), and malloc's habits.

    By default glibc maps and unmaps every activation anew and the kernel zeroes its pages each time: a third of the
    time of a step on CPUs (docs/log.md, 2026-11-24). What the user has set stays.
    """
    habits = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": loopback_interface(),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    # With the agent's store, no rank opens the port: this process has.
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(ranks > 1)}
    return {**habits, **os.environ, **place, **meet}


@contextmanager
def _hearing() -> Iterator[list[int]]:
    """Collect signals; one that is ignored (SIGHUP under nohup) stays so."""
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in PASSED_ON}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: heard.append(number))
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: list[subprocess.Popen[bytes]], heard: list[int]) -> set[tuple[int, int]]:
    """Until all ranks have ended; (rank, exit code) of those that a signal from here may have led to."""
    told: set[tuple[int, int]] = set()
    due: list[tuple[float, signal.Signals]] = []
    known, failed = 0, False
    while None in [process.poll() for process in processes]:
        now = time.monotonic()
        # STOPPED is no failure: others may be saving still.
        if not failed and any(process.returncode not in (None, 0, STOPPED) for process in processes):
            failed = True
            due += [(now + LAST_WORDS, signal.SIGTERM), (now + LAST_WORDS + TO_KILL, signal.SIGKILL)]
        for number in heard[known:]:
            known += 1
            due.append((now, PASSED_ON[signal.Signals(number)]))
            if number != signal.SIGUSR2 and sum(n != signal.SIGUSR2 for n in heard[:known]) == 2:
                due.append((now + AT_ONCE, signal.SIGKILL))
            elif known == 1:
                name = signal.Signals(number).name
                print(f"{name}: waiting for the ranks to save and end; SIGTERM now ends them at once", file=sys.stderr)
        told = told.union(*(_tell(processes, number) for when, number in due if when <= now))
        due = [(when, number) for when, number in due if when > now]
        time.sleep(0.05)
    return told


def _tell(processes: list[subprocess.Popen[bytes]], number: signal.Signals) -> set[tuple[int, int]]:
    """Send a signal to the ranks that run, SIGKILL to what they have started too."""
    running = {rank: process.pid for rank, process in enumerate(processes) if process.poll() is None}
    for pid in running.values():
        (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)
    return {(rank, -number) for rank in running}


def _says_least(code: int, told: bool) -> int:
    """One rank's end is soon the end of all: peers miss it, or are ended from here. 0 says nothing of it."""
    if code < 0:
        return 4 if told else 1
    return {BAD_INPUT: 0, NON_FINITE: 0, STOPPED: 0, LOST: 3, 0: 5}.get(code, 2)
