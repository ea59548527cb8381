"""To end a run's job for good."""

import time
from collections.abc import Sequence
from pathlib import Path

from cauc_dist.errors import BadInput
from launch import slurm, state
from launch.state import CANCELLED, UNKNOWN, Status
from launch.submit import Say


def cancel(runs: Sequence[Path], *, say: Say, wait: float = 60.0, every: float = 1.0) -> None:
    """scancel the runs' jobs, wait until they have left the queue, say what is left of each.

    SLURM gives the ranks KillWait seconds (its default: 30) for the step that they are in and a checkpoint. The job's
    id in RUN/cancelled keeps its batch script from queueing the run again; `launch resume` takes that file away.
    """
    found = state.status(runs)
    _refuse(found)
    for one in found:
        if not one.live:
            say(f"{one.folder}: nothing to cancel, it is {one.state}")
    live = [one for one in found if one.live]
    _scancel(live)
    for one in _until_over(live, time.monotonic() + wait, every):
        say(f"{one.folder}: {one.state}; {newest(one.folder)}")


def _refuse(found: Sequence[Status]) -> None:
    """What scancel could not end."""
    for one in found:
        if one.state == UNKNOWN:
            raise BadInput(
                f"whether {one.folder} is at work is not known ({one.reason})",
                wanted="a SLURM that answers",
                do="try again later, or where its commands are",
            )
        if one.live and one.source != "squeue":
            raise BadInput(
                f"{one.folder} is trained by no job that squeue lists",
                wanted="a run that SLURM has",
                do="ctrl-C where `cauc` was started, or kill -TERM of that process: it saves",
            )


def _scancel(live: Sequence[Status]) -> None:
    """A job that is over by now is as good as cancelled."""
    if not live:
        return
    for one in live:
        _mark(one)
    try:
        slurm.call("scancel", *(one.id for one in live))
    except BadInput:
        if any(one.live for one in state.status([one.folder for one in live])):
            for one in live:
                (one.folder / CANCELLED).unlink(missing_ok=True)
            raise


def _mark(one: Status) -> None:
    """For the batch script: this job is not to be queued again."""
    mark = one.folder / CANCELLED
    known = mark.read_text(encoding="utf-8").split() if mark.exists() else []
    if one.id not in known:
        mark.write_text("".join(f"{id}\n" for id in (*known, one.id)), encoding="utf-8")


def _until_over(live: Sequence[Status], deadline: float, every: float) -> list[Status]:
    """Their states when they have left the queue.

    One that was just being queued again is cancelled again: requeued, it has its id and waits or runs; resubmitted,
    it has another.
    """
    while live:
        now = state.status([one.folder for one in live])
        if not any(one.live for one in now):
            return now
        if time.monotonic() > deadline:
            late = next(one for one in now if one.live)
            raise BadInput(
                f"job {late.id} of {late.folder} is still {late.state}, a minute after scancel",
                wanted="a job that leaves the queue",
                do=f"look at `squeue -j {late.id}`: a node that does not answer holds it",
            )
        time.sleep(every)
        _scancel([one for one in now if one.state in ("PENDING", "REQUEUED", "RUNNING", "CONFIGURING")])
    return []


def newest(run: Path) -> str:
    """Its newest sound checkpoint, in words."""
    from cauc_dist import checkpoint

    try:
        saved, _ = checkpoint.latest(run)
    except BadInput as error:
        return str(error)
    if saved is None:
        return "no checkpoint yet"
    return f"newest checkpoint {saved.path.name}; `python -m launch resume {run}` goes on"
