"""One rank of a SLURM job: what submitit runs, or `srun python -m cauc_dist.job RUN` without it.

Imports no torch before a signal can be kept: SLURM may send one as soon as the job has begun.
"""

import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cauc_dist.spawn import leave

ATTEMPT = "CAUC_ATTEMPT"
"""The folder of this start of the job's ranks, where slurm/attempt.sh has made one."""
FIRST = "001"
ASKING = (signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class Job:
    """A training as a callable that submitit pickles: it goes on from the run folder's newest sound checkpoint.

    It holds a path, no state: SLURM hands a requeued job the pickle that it began with. Within an attempt of
    slurm/attempt.sh the process ends with the exit code of `cauc train`; else a code that is not 0 is raised.
    """

    run: str

    def __call__(self) -> None:
        code = work(self.run)
        if ATTEMPT in os.environ:
            leave(code)
        if code:
            raise RuntimeError(f"the training of {self.run} ended with exit code {code} (docs/running.md)")

    def checkpoint(self) -> Any:
        """What submitit would run after a signal that comes before the training listens to it: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def work(run: str) -> int:
    """Train as one rank of the SLURM step; its exit code, which the attempt's folder keeps too."""
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    for number in ASKING:
        signal.signal(number, hear)
    _note("host", os.environ.get("SLURMD_NODENAME") or socket.gethostname())  # the name that --exclude takes
    code = 1
    try:
        from cauc_dist.train import main

        code = main(run, heard[-1] if heard else 0, again=again(), gone=_missed)
    except Exception:
        traceback.print_exc()
    _note("exit", str(code))
    return code


def again() -> bool:
    """Whether this is a later start of a job: an earlier one may live on, on a node that was cut off."""
    return Path(os.environ.get(ATTEMPT, FIRST)).name != FIRST


def _missed(ranks: Sequence[int]) -> None:
    """For slurm/attempt.sh: which of the ranks without an exit code was the first to be gone."""
    _note("missing", "\n".join(map(str, ranks)))


def _note(what: str, text: str) -> None:
    if ATTEMPT in os.environ:
        path = Path(os.environ[ATTEMPT]) / f"rank-{os.environ['SLURM_PROCID']}.{what}"
        with contextlib.suppress(OSError):  # a full disk: the exit code stays what it is, and attempt.sh sees no text
            path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    leave(work(sys.argv[1]))
