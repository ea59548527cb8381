"""`launch cancel`: no job of the run is left, whatever its script was about to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cauc_dist.checkpoint import Writer
from cauc_dist.errors import BadInput
from cauc_dist.train import own
from launch import cancel
from tests.launch.conftest import Folder, Launch, Slurm


def live(slurm: Slurm, run: Folder, id: str = "41", state: str = "RUNNING") -> Folder:
    run.job(id)
    slurm.set(id, name=run.name, state=state, nodes="n1")
    return run


def test_a_cancelled_run_leaves_the_queue_and_says_its_newest_checkpoint(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch
) -> None:
    run = live(slurm, folder())
    run.attempt("41")
    with Writer(run.path, {}, keep=2) as writer:
        writer.save(7, {"parameter/w": torch.zeros(2)}, 0.5)
    done = launch("cancel", run.path)
    assert (done.code, done.err) == (0, "")
    assert done.out == (
        f"{run.path}: CANCELLED; newest checkpoint step-00000007; `python -m launch resume {run.path}` goes on\n"
    )
    assert not slurm.queue
    assert (run.path / "cancelled").read_text() == "41\n"


def test_members_of_a_sweep_are_cancelled_by_one_scancel_and_those_that_are_over_are_left(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch
) -> None:
    runs = [live(slurm, folder(f"sweep/00{i}-x"), f"41_{i}", "PENDING") for i in range(3)]
    runs[1].attempt("41_1", "failed 2")
    slurm.ends("41_1", "FAILED")
    (runs[0].path.parent / "runs").write_text("000-x\n001-x\n002-x\n")
    done = launch("cancel", runs[0].path.parent)
    assert done.out.splitlines() == [
        f"{runs[1].path}: nothing to cancel, it is FAILED",
        f"{runs[0].path}: CANCELLED; no checkpoint yet",
        f"{runs[2].path}: CANCELLED; no checkpoint yet",
    ]
    assert [call["arguments"] for call in slurm.calls("scancel")] == [["41_0", "41_2"]]
    assert not (runs[1].path / "cancelled").exists()


def test_a_job_that_was_just_being_requeued_is_cancelled_again(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = live(slurm, folder())
    run.attempt("41", "again stopped none", "requeued")
    slurm.has("returns", "41")
    said: list[str] = []
    cancel.cancel([run.path], say=said.append, every=0.01)
    assert said == [f"{run.path}: CANCELLED; no checkpoint yet"]
    assert len(slurm.calls("scancel")) == 2
    assert not slurm.queue


def test_a_job_that_was_just_being_resubmitted_is_cancelled_too(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = live(slurm, folder())
    run.attempt("41", "again crashed none", "resubmitted as 42 without n1")
    slurm.has("returns", "42")
    said: list[str] = []
    cancel.cancel([run.path], say=said.append, every=0.01)
    assert [call["arguments"] for call in slurm.calls("scancel")] == [["41"], ["42"]]
    assert (run.path / "cancelled").read_text() == "41\n42\n"
    assert said == [f"{run.path}: CANCELLED; no checkpoint yet"]


def test_a_damaged_checkpoint_is_named(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    run = live(slurm, folder())
    (run.path / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert "CANCELLED; checkpoint step-00000007 is damaged" in launch("cancel", run.path).out


def test_a_job_that_does_not_leave_the_queue_is_named(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = live(slurm, folder())
    slurm.has("stuck")
    with pytest.raises(BadInput) as error:
        cancel.cancel([run.path], say=print, wait=0.1, every=0.05)
    assert str(error.value) == (
        f"job 41 of {run.path} is still COMPLETING, a minute after scancel; wanted a job that leaves the queue. "
        "Look at `squeue -j 41`: a node that does not answer holds it."
    )


def test_where_scancel_fails_the_run_may_still_be_requeued(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch
) -> None:
    run = live(slurm, folder())
    slurm.breaks("scancel", "scancel: error: Kill job error on job id 41: Access/permission denied")
    done = launch("cancel", run.path)
    assert done.code == 2
    assert "scancel: Kill job error on job id 41: Access/permission denied" in done.err
    assert not (run.path / "cancelled").exists()


def test_where_squeue_does_not_answer_nothing_is_touched(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch
) -> None:
    run = live(slurm, folder())
    slurm.breaks("squeue", "slurm_load_jobs error: Socket timed out on send/recv operation")
    done = launch("cancel", run.path)
    assert done.code == 2
    assert done.err == (
        f"error: whether {run.path} is at work is not known (squeue: slurm_load_jobs error: Socket timed out on "
        "send/recv operation); wanted a SLURM that answers. Try again later, or where its commands are.\n"
    )
    assert not slurm.calls("scancel")


def test_a_local_training_is_none_of_slurm_s(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    run = folder().steps(0)
    own(run.path)
    done = launch("cancel", run.path)
    assert done.code == 2
    assert done.err == (
        f"error: {run.path} is trained by no job that squeue lists; wanted a run that SLURM has. "
        "Ctrl-C where `cauc` was started, or kill -TERM of that process: it saves.\n"
    )


def test_no_run_is_refused(launch: Launch) -> None:
    done = launch("cancel")
    assert (done.code, "no run folder; wanted one or several" in done.err) == (2, True)


def test_status_of_what_was_cancelled_while_it_waited(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch
) -> None:
    slurm.has("no-accounting")
    run = live(slurm, folder(), state="PENDING")
    assert launch("cancel", run.path).code == 0
    (found,) = json.loads(launch("status", Path(run.path), "--json").out)
    assert found["state"] == "CANCELLED"
