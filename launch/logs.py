"""What ranks said, attempt by attempt, and the batch script around them."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cauc_dist.errors import BadInput
from launch import state
from launch.script import SLURM
from launch.state import UNKNOWN, Attempt, Status

ASK = 5.0
"""Seconds from one squeue to the next, while a log is followed."""


def logs(run: Path, rank: int = 0, attempt: int | None = None, *, follow: bool = False, every: float = 0.5) -> None:
    """Print a rank's log of the latest attempt (or of number `attempt`); the batch log where no rank has begun.

    `follow`: go on as it grows, and in the next attempt, until the run has left the queue for good.
    """
    _one(run)
    if not follow:
        _print(latest(run, rank, attempt))
        return
    print_on = Printer()
    for path in followed(run, rank, attempt, every):
        print_on.more(path)


def _one(run: Path) -> None:
    found = state.expand([run])
    if found != [run]:
        raise BadInput(f"{run} is a sweep of {len(found)} runs", wanted="one of them", do=f"e.g. {found[0]}")


def _ranked(attempt: Attempt, rank: int) -> None:
    """Refuse a rank that the attempt has not; before its file `job` is written nobody knows."""
    tasks = int(attempt.job.get("tasks", rank + 1))
    if not 0 <= rank < tasks:
        raise BadInput(f"--rank {rank} of {tasks} ranks", wanted=f"0 to {tasks - 1}", do=f"e.g. --rank {tasks - 1}")


def latest(run: Path, rank: int, number: int | None) -> Path:
    """The log to show; BadInput where there is none, which names what there is."""
    attempts = state.attempts(run)
    if number is not None:
        attempts = [_numbered(run, attempts, number)]
    for attempt in attempts[-1:]:
        _ranked(attempt, rank)
        if attempt.log(rank).exists():
            return attempt.log(rank)
    if (log := batch_log(run)) is None:
        raise BadInput(f"{run} has no log yet", wanted="a job that has started", do=f"`launch status {run}` says more")
    return log


def _numbered(run: Path, attempts: list[Attempt], number: int) -> Attempt:
    found = [attempt for attempt in attempts if attempt.number == number]
    if not found:
        there = ", ".join(str(attempt.number) for attempt in attempts) or "none yet"
        raise BadInput(f"no attempt {number} of {run}", wanted=f"one of those there ({there})", do="see --attempt")
    return found[0]


def batch_log(run: Path) -> Path | None:
    """What the latest batch script said that has begun; of a sweep's member it lies in the sweep's folder."""
    paths = [run.parent / SLURM / f"{id}.log" for id in state.jobs(run).ids]
    paths += [run / SLURM / f"{id}.log" for id in state.jobs(run).ids]
    found = [path for path in paths if path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def followed(run: Path, rank: int, number: int | None, every: float) -> Iterator[Path]:
    """Logs that may have grown, again and again; ends when nothing will be added any more."""
    asked, over = 0.0, False
    begun: set[int] = set()
    while True:
        attempts = state.attempts(run)
        if number is not None:
            attempts = [_numbered(run, attempts, number)]
        nobody = not begun and not any(attempt.log(rank).exists() for attempt in attempts)
        if nobody and (log := batch_log(run)) is not None:
            yield log
        for attempt in attempts if begun or number is not None else attempts[-1:]:
            _ranked(attempt, rank)
            if attempt.log(rank).exists() and (attempt.number in begun or attempt.number > max(begun, default=0)):
                begun.add(attempt.number)
                yield attempt.log(rank)
        if over or (number is not None and (attempts[0].verdict or _followed(run, number))):
            return
        if time.monotonic() - asked > (ASK if asked else 0):
            asked = time.monotonic()
            (now,) = state.status([run])
            over = final(now)
        if not over:
            time.sleep(every)


def _followed(run: Path, number: int) -> bool:
    """Whether a later attempt has begun: one whose node was lost never has a verdict."""
    return state.attempts(run)[-1].number > number


def final(now: Status) -> bool:
    """Whether nothing more will come of it; not where squeue only fails to answer."""
    return not now.live and now.state != UNKNOWN


class Printer:
    """Prints what has been added to files since it last looked at them; whose it is goes to stderr."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._seen: dict[Path, int] = {}
        self._tell = tell or (lambda line: print(line, file=sys.stderr, flush=True))
        self._current: Path | None = None

    def more(self, path: Path) -> None:
        """What is new in one file."""
        with path.open("rb") as file:
            file.seek(self._seen.get(path, 0))
            new = file.read()
        if not new:
            return
        if self._current != path:
            self._tell(f"==> {path} <==")
        self._current = path
        self._seen[path] = self._seen.get(path, 0) + len(new)
        _out(new)


def _print(path: Path) -> None:
    print(f"==> {path} <==", file=sys.stderr)
    _out(path.read_bytes())


def _out(data: bytes) -> None:
    """Bytes as they are: a multi-byte letter may have been cut by the end of what there is so far."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
