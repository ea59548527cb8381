"""What `launch status` says at every moment of a job's life, from the fake squeue and sacct and real run folders."""

import dataclasses
import fcntl
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cauc_dist.errors import BadInput
from cauc_dist.train import own
from launch import slurm as commands
from launch import state
from launch.state import Status
from tests.launch.conftest import Folder, Launch, Slurm

STOPPED = ("again stopped step-00000007", "requeued")
CRASHED = ("again crashed none", "requeued")
GIVEN_UP = ("again crashed none", "given up: 3 times without a new checkpoint")


def of(run: Folder) -> Status:
    (found,) = state.status([run.path])
    return found


def said(run: Folder) -> tuple[str, str, str]:
    found = of(run)
    return found.state, found.reason, found.source


QUEUED: dict[str, tuple[str, str, tuple[str, ...] | None, str, str]] = {
    "a job that has not begun is pending": ("PENDING", "Priority", None, "PENDING", "Priority"),
    "one that runs is running": ("RUNNING", "None", (), "RUNNING", ""),
    "pending after it has saved, it is requeued": (
        *("PENDING", "BeginTime", STOPPED),
        *("REQUEUED", "stopped, newest checkpoint step-00000007; BeginTime"),
    ),
    "pending after a rank crashed, it is requeued": (
        *("PENDING", "Resources", CRASHED),
        *("REQUEUED", "crashed, newest checkpoint none; Resources"),
    ),
    "pending after its node died, it is requeued": (
        *("PENDING", "BeginTime", ()),
        *("REQUEUED", "attempt 001 was cut off; BeginTime"),
    ),
    "a suspended one is not over": ("SUSPENDED", "None", (), "SUSPENDED", ""),
    "completing, and to be tried again, it is requeued": (
        *("COMPLETING", "None", STOPPED),
        *("REQUEUED", "stopped, newest checkpoint step-00000007"),
    ),
    "told of its end by SLURM it runs on": ("SIGNALING", "None", (), "RUNNING", ""),
    "completing without a verdict it is not over": ("COMPLETING", "None", (), "COMPLETING", ""),
    "completing after the last step it is not over": ("COMPLETING", "None", ("done",), "COMPLETING", ""),
    "completing and given up it is not over": ("COMPLETING", "None", GIVEN_UP, "COMPLETING", ""),
    "a dead node's job that is still listed is not over": ("NODE_FAIL", "None", (), "COMPLETING", "NODE_FAIL"),
    "running once more, what the last attempt was does not count": ("RUNNING", "None", CRASHED, "RUNNING", ""),
}


@pytest.mark.parametrize("case", QUEUED)
def test_what_squeue_lists_is_live(slurm: Slurm, folder: Callable[..., Folder], case: str) -> None:
    listed, reason, verdict, wanted, words = QUEUED[case]
    run = folder().job("41")
    slurm.set("41", name=run.name, state=listed, reason=reason)
    if verdict is not None:
        run.attempt("41", *verdict)
    assert said(run) == (wanted, words, "squeue")
    assert of(run).live


BAD = "step 3\nerror: scan s7 is damaged; wanted a sound one. Mend it.\nbye\n"
ENDED: dict[str, tuple[tuple[str, ...], dict[int, int], tuple[str, ...], str, str]] = {
    "done is completed": (("done",), {0: 0, 1: 0}, ("", ""), "COMPLETED", ""),
    "cancelled is cancelled": (("cancelled",), {0: 5}, ("",), "CANCELLED", ""),
    "bad input says which": (
        *(("failed 2",), {0: 6, 1: 2}, ("peer\n", BAD), "FAILED"),
        "bad input: scan s7 is damaged; wanted a sound one. Mend it.",
    ),
    "a loss that is not finite says where": (
        *(("failed 3",), {0: 3}, ("error: loss at step 4 is not finite\n",), "FAILED"),
        "a loss or gradient that is not finite: loss at step 4 is not finite",
    ),
    "what the others miss does not count": (
        *(("failed 2",), {0: 2, 1: 6}, (BAD, "error: rank 0 is gone\n"), "FAILED"),
        "bad input: scan s7 is damaged; wanted a sound one. Mend it.",
    ),
    "a traceback gives its last line": (
        *(("failed 1",), {0: 1}, ("Traceback\nKeyError: 'age'\n",), "FAILED"),
        "exit code 1: KeyError: 'age'",
    ),
    "given up says after what": (
        *(GIVEN_UP, {0: 6}, ("error: rank 1 is gone\n", "x\n"), "FAILED"),
        "given up: 3 times without a new checkpoint; crashed, newest checkpoint none; error: rank 1 is gone",
    ),
}


@pytest.mark.parametrize("case", ENDED)
def test_a_verdict_says_how_a_job_that_squeue_does_not_list_has_ended(
    slurm: Slurm, folder: Callable[..., Folder], case: str
) -> None:
    verdict, exits, logs, wanted, words = ENDED[case]
    run = folder().job("41")
    run.attempt("41", *STOPPED)
    run.attempt("41", *verdict, exits=exits, logs=logs)
    assert said(run) == (wanted, words, "attempts")
    assert not of(run).live
    assert not slurm.calls("sacct")


def test_where_not_one_rank_began_the_batch_log_is_named(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = folder().job("41")
    run.attempt("41", "failed 127", logs=())
    assert said(run)[:2] == ("FAILED", "not one rank began (srun's exit code 127); `launch logs` shows why")


@pytest.mark.parametrize("word", ["NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "CANCELLED by 0"])
def test_sacct_says_how_a_job_without_a_verdict_has_ended(
    slurm: Slurm, folder: Callable[..., Folder], word: str
) -> None:
    run = folder().job("41")
    run.attempt("41")
    slurm.ends("41", word, run.name)
    assert said(run) == (word.split()[0], "attempt 001 was cut off", "sacct")


def test_sacct_says_how_a_job_that_never_began_has_ended(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = folder().job("41")
    slurm.ends("41", "CANCELLED by 0", run.name)
    assert said(run) == ("CANCELLED", "not one rank began", "sacct")


def test_a_requeued_job_that_was_cancelled_while_it_waited_is_cancelled(
    slurm: Slurm, folder: Callable[..., Folder]
) -> None:
    run = folder().job("41")
    run.attempt("41", *CRASHED)
    slurm.ends("41", "CANCELLED by 0", run.name)
    assert said(run) == ("CANCELLED", "crashed, newest checkpoint none", "sacct")


def test_a_job_that_nobody_knows_is_gone(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = folder().job("41")
    assert said(run) == ("GONE", "squeue does not list job 41, and sacct knows nothing", "attempts")
    run.attempt("41", *CRASHED)
    assert said(run)[1].endswith("; crashed, newest checkpoint none")


@pytest.mark.parametrize("word", ["PENDING", "RUNNING", "REQUEUED", "SUSPENDED"])
def test_where_squeue_and_sacct_contradict_each_other_nothing_is_known(
    slurm: Slurm, folder: Callable[..., Folder], word: str
) -> None:
    run = folder().job("41")
    run.attempt("41", *STOPPED)
    slurm.ends("41", word, run.name)
    assert said(run) == ("UNKNOWN", f"squeue does not list job 41, and sacct still has it {word}", "sacct")


def test_a_finished_journal_is_believed_where_nobody_else_says_anything(
    slurm: Slurm, folder: Callable[..., Folder]
) -> None:
    run = folder().job("41").steps(98, 99).journal(("end", {"step": 100}))
    assert said(run) == ("COMPLETED", "", "journal")


@pytest.mark.parametrize("verdict", [("failed 3",), GIVEN_UP, ("cancelled",), STOPPED, ()])
def test_a_run_that_was_finished_elsewhere_is_completed_whatever_its_job_came_to(
    slurm: Slurm, folder: Callable[..., Folder], verdict: tuple[str, ...]
) -> None:
    run = folder().job("41").steps(8)
    run.attempt("41", *verdict)
    slurm.ends("41", "FAILED", run.name)
    assert said(run)[0] != "COMPLETED"
    run.steps(9, event="resume", at=9).journal(("end", {"step": 10}))
    assert said(run) == ("COMPLETED", "", "journal")


def test_a_run_that_was_finished_elsewhere_is_completed_where_squeue_is_silent(
    no_slurm: None, folder: Callable[..., Folder]
) -> None:
    run = folder().job("41").steps(9).journal(("end", {"step": 10}))
    assert said(run) == ("COMPLETED", "", "journal")


def test_a_job_that_was_cancelled_before_it_began_is_cancelled_without_accounting(
    slurm: Slurm, folder: Callable[..., Folder]
) -> None:
    slurm.has("no-accounting")
    run = folder().job("41")
    assert said(run)[0] == "GONE"
    (run.path / "cancelled").write_text("40\n")  # of an earlier launch
    assert said(run)[0] == "GONE"
    (run.path / "cancelled").write_text("41\n")
    assert said(run)[0] == "CANCELLED"


@pytest.mark.parametrize("listed", [True, False])
def test_another_run_s_job_of_the_same_id_does_not_count(
    slurm: Slurm, folder: Callable[..., Folder], listed: bool
) -> None:
    run = folder().job("41")
    if listed:
        slurm.set("41", name=folder("other").name, state="RUNNING")
    else:
        slurm.ends("41", "COMPLETED", "other-0badcafe")
    assert said(run)[0] == "GONE"


def test_a_resubmitted_job_is_its_own_successor(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = folder().job("41")
    (run.path / "resubmitted").write_text("42\n")
    slurm.set("41", name=run.name, state="COMPLETING")
    slurm.set("42", name=run.name, state="PENDING", reason="Dependency")
    run.attempt("41")  # the new job is queued, the verdict not yet written
    assert said(run)[0] == "REQUEUED"
    (run.path / "attempts" / "001" / "end").write_text("again crashed none\nresubmitted as 42 without n1\n")
    slurm.ends("41", "FAILED")
    assert said(run) == ("REQUEUED", "crashed, newest checkpoint none; Dependency", "squeue")
    assert of(run).id == "42"
    slurm.ends("42")
    assert said(run)[:2] == (
        "GONE",
        "squeue does not list job 42, and sacct knows nothing; crashed, newest checkpoint none",
    )
    run.attempt("42", "done")
    assert said(run)[0] == "COMPLETED"
    run.job("50")  # `launch resume`: an older successor is not it
    assert of(run).id == "50"


@pytest.mark.parametrize("verdict", [("failed 2",), GIVEN_UP, ("done",), ("cancelled",)])
def test_an_earlier_job_s_verdict_says_nothing_of_a_resumed_run(
    slurm: Slurm, folder: Callable[..., Folder], verdict: tuple[str, ...]
) -> None:
    run = folder().job("41")
    run.attempt("41", *verdict)
    run.job("57")
    slurm.set("57", name=run.name, state="PENDING", reason="Resources")
    assert said(run) == ("PENDING", "Resources", "squeue")
    slurm.ends("57")
    assert said(run)[0] == "GONE"


def test_one_squeue_serves_all_runs_and_one_sacct_those_that_it_does_not_list(
    slurm: Slurm, folder: Callable[..., Folder]
) -> None:
    runs = [folder(name).job(id) for name, id in (("a", "41"), ("b", "42_3"), ("c", "43"), ("d", "44"))]
    runs[0].attempt("41", "done")
    slurm.set("42_3", name=runs[1].name, state="RUNNING", nodes="n[1-2]")
    slurm.ends("43", "TIMEOUT", runs[2].name)
    found = state.status([run.path for run in runs])
    assert [one.state for one in found] == ["COMPLETED", "RUNNING", "TIMEOUT", "GONE"]
    assert found[1].nodes == "n[1-2]"
    assert len(slurm.calls("squeue")) == 1
    (asked,) = slurm.calls("sacct")
    assert asked["arguments"][asked["arguments"].index("-j") + 1] == "43,44"


def test_squeue_is_asked_for_the_owners_of_the_runs(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = folder().job("41")
    another = 65534 if os.getuid() == 0 else os.getuid()  # only root gives folders away
    os.chown(run.path, another, -1)
    state.status([run.path])
    (asked,) = slurm.calls("squeue")
    assert asked["arguments"][asked["arguments"].index("-u") + 1] == ",".join(map(str, sorted({os.getuid(), another})))


def test_without_squeue_a_verdict_is_still_a_fact_and_the_rest_is_unknown(
    slurm: Slurm, folder: Callable[..., Folder]
) -> None:
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    slurm.breaks("squeue", words)
    done, open_ = folder("done").job("41"), folder("open").job("42").steps(0, 1)
    done.attempt("41", "done")
    open_.attempt("42")
    slurm.ends("42", "NODE_FAIL", open_.name)  # final for sacct, while SLURM may start it again
    assert said(done)[0] == "COMPLETED"
    assert said(open_) == ("UNKNOWN", f"squeue: {words}", "journal")
    assert of(open_).step == 2


def test_on_a_machine_without_slurm_the_state_is_unknown(no_slurm: None, folder: Callable[..., Folder]) -> None:
    assert said(folder().job("41")) == ("UNKNOWN", "squeue: [Errno 2] No such file or directory: 'squeue'", "journal")


def test_a_job_that_is_queued_while_squeue_answers_is_asked_for_again(
    slurm: Slurm, folder: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder().job("41")
    run.attempt("41", *GIVEN_UP)
    answer = commands.queue

    def meanwhile(users: Any) -> list[commands.Job]:
        found = answer(users)
        if len(slurm.calls("squeue")) == 1:
            slurm.set("57", name=run.name, state="PENDING")
            run.job("57")
        return found

    monkeypatch.setattr(commands, "queue", meanwhile)
    assert of(run).state == "PENDING"


def test_steps_that_a_resume_took_back_do_not_count(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = folder().job("41").steps(*range(25))
    run.attempt("41", *STOPPED)
    slurm.set("41", name=run.name, state="PENDING")
    found = of(run)
    assert (found.step, found.steps, found.loss, found.samples_per_s, found.eta_s) == (25, 100, 2.4, 3.0, None)
    run.steps(20, event="resume", at=20)
    run.attempt("41", nodes="n[3-4]")
    slurm.set("41", state="RUNNING", nodes="n[3-4]")
    found = of(run)
    assert (found.step, found.loss, found.restarts, found.nodes) == (21, 2.0, 1, "n[3-4]")
    assert found.eta_s == 79 * 2.0


def test_the_speed_is_that_of_the_last_steps(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = folder().job("41").steps(*range(30), seconds=60.0)
    run.steps(*range(30, 50), event="resume", at=30, seconds=0.5)
    run.attempt("41")
    slurm.set("41", name=run.name, state="RUNNING")
    assert (of(run).samples_per_s, of(run).eta_s) == (12.0, 25.0)


def test_lines_that_were_cut_off_are_left_out(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = folder().job("41").steps(0)
    with (run.path / "jobs.jsonl").open("a") as file:
        file.write('{"time": 17')
    (run.path / "attempts" / "001").mkdir(parents=True)  # in the moment before its file `job` is written
    slurm.set("41", name=run.name, state="RUNNING")
    assert said(run)[0] == "RUNNING"


def test_a_damaged_configuration_hides_no_state(slurm: Slurm, folder: Callable[..., Folder]) -> None:
    run = folder().job("41")
    (run.path / "config.json").write_text("{")
    slurm.set("41", name=run.name, state="RUNNING")
    assert (of(run).state, of(run).name) == ("RUNNING", "mine")


LOCAL: dict[str, tuple[list[tuple[str, dict[str, Any]]], tuple[str, str]]] = {
    "one that was never started is new": ([], ("NEW", "no rank has begun")),
    "one at its end is completed": ([("end", {"step": 100})], ("COMPLETED", "")),
    "one that saved is stopped": ([("stopped", {"step": 5})], ("STOPPED", "by a signal, after a checkpoint")),
    "one without a number has failed": (
        [("non_finite", {"step": 5})],
        ("FAILED", "a loss or gradient that is not finite"),
    ),
    "one that was killed is gone": ([("checkpoint", {"step": 5})], ("GONE", "ended without a word")),
}


@pytest.mark.parametrize("case", LOCAL)
def test_a_run_outside_of_slurm_has_the_state_of_its_journal(
    no_slurm: None, folder: Callable[..., Folder], case: str
) -> None:
    events, wanted = LOCAL[case]
    run = folder()
    if events:
        run.steps(3, 4).journal(*events)
    assert said(run) == (*wanted, "journal")
    assert of(run).id == ""


def test_a_run_whose_lock_is_held_is_running(no_slurm: None, folder: Callable[..., Folder]) -> None:
    run = folder().steps(0, 1)
    own(run.path)  # until this process ends
    assert said(run) == ("RUNNING", "", "journal")
    run.job("41")  # launch queued it once; that squeue is not there does not hide who has the lock
    assert said(run) == ("RUNNING", "by no job of its own that squeue lists", "journal")


def test_to_ask_whether_a_run_is_at_work_refuses_no_training(
    folder: Callable[..., Folder],
) -> None:
    run = folder()
    (run.path / "lock").touch()
    with (run.path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        own(run.path)  # it would raise where it did not wait for who asks
    assert state.held(run.path)


def test_a_job_of_a_script_of_the_user_s_own_is_asked_for_by_its_attempt_s_id(
    slurm: Slurm, folder: Callable[..., Folder]
) -> None:
    run = folder()
    run.attempt("77")
    slurm.set("77", name="train.sbatch", state="RUNNING", nodes="n1")
    assert (*said(run), of(run).id) == ("RUNNING", "", "squeue", "77")
    (run.path / "attempts" / "001" / "end").write_text("again crashed none\nresubmitted as 78\n")
    slurm.ends("77", "FAILED")
    slurm.set("78", name="train.sbatch", state="PENDING", reason="Dependency")
    assert (*said(run)[::2], of(run).id) == ("REQUEUED", "squeue", "78")
    slurm.ends("78", "TIMEOUT")
    assert said(run) == ("TIMEOUT", "crashed, newest checkpoint none", "sacct")
    run.attempt("78", "done")
    assert said(run) == ("COMPLETED", "", "attempts")


@pytest.mark.parametrize("verdict", [("failed 3",), GIVEN_UP, ("done",), ("cancelled",)])
def test_a_job_of_a_script_of_the_user_s_own_that_runs_again_is_live(
    slurm: Slurm, folder: Callable[..., Folder], verdict: tuple[str, ...]
) -> None:
    run = folder()
    run.attempt("77", *verdict)
    assert not of(run).live
    slurm.set("77", name="train.sbatch", state="RUNNING")
    assert (said(run)[0], of(run).live) == ("RUNNING", True)


def test_a_job_of_a_script_of_the_user_s_own_is_unknown_only_while_squeue_is_silent(
    no_slurm: None, folder: Callable[..., Folder]
) -> None:
    run = folder()
    attempt = run.attempt("77")
    assert said(run) == ("UNKNOWN", "squeue: [Errno 2] No such file or directory: 'squeue'", "journal")
    (attempt / "job").unlink()
    assert said(run) == ("UNKNOWN", "attempt 001 does not say yet which job it is of", "attempts")


def test_a_sweep_is_its_members(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    runs = [folder(f"sweep/00{i}-x") for i in range(2)]
    sweep = runs[0].path.parent
    (sweep / "runs").write_text("000-x\n001-x\n")
    assert state.expand([sweep]) == [run.path for run in runs]
    done = launch("status", sweep, "--json")
    assert [one["folder"] for one in json.loads(done.out)] == [str(run.path) for run in runs]


def test_status_shows_all_of_runs_by_default(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    Path("runs").symlink_to(folder("b").path.parent)
    folder("a").job("41").steps(0, 1).attempt("41")
    slurm.set("41", name=Folder(Path("runs/a").resolve()).name, state="RUNNING", nodes="n[1-2]")
    lines = launch("status").out.splitlines()
    assert [line.split()[0] for line in lines] == ["RUN", "runs/a", "runs/b"]
    assert lines[0].split() == ["RUN", "JOB", "STATE", "STEP", "LOSS", "SCANS/S", "RESTARTS", "NODES", "LEFT", "REASON"]
    assert lines[1].split() == ["runs/a", "41", "RUNNING", "2/100", "0.1000", "3.0", "0", "n[1-2]", "0:03:16"]
    assert "no rank has begun" in lines[2]


def test_json_has_the_documented_keys(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    run = folder().job("41")
    (found,) = json.loads(launch("status", run.path, "--json").out)
    assert list(found) == [field.name for field in dataclasses.fields(Status)]
    assert found["loss"] is None
    assert found["state"] == "GONE"


def test_watch_goes_on_until_no_run_is_live(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder().job("41")
    slurm.set("41", name=run.name, state="RUNNING")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            run.attempt("41", "done")
            slurm.ends("41")

    monkeypatch.setattr("launch.cli.time", SimpleNamespace(sleep=sleep))
    done = launch("status", run.path, "--watch", "7", "--json")
    assert [json.loads(line)[0]["state"] for line in done.out.splitlines()] == ["RUNNING", "RUNNING", "COMPLETED"]
    assert waits == [7.0, 7.0]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "no run folder in "),
        (
            ["nowhere"],
            "no config.json in nowhere; wanted a run folder, or a sweep's. Give what `launch submit` printed.",
        ),
        (["nowhere", "--watch", "0.1"], "--watch 0.1; wanted 1 second or more. Be kind to SLURM: e.g. --watch 30."),
    ],
)
def test_what_is_no_run_is_refused(launch: Launch, words: list[str], wanted: str) -> None:
    done = launch("status", *words)
    assert done.code == 2
    assert f"error: {wanted}" in done.err


def test_attempts_sort_by_number(folder: Callable[..., Folder]) -> None:
    run = folder()
    for name in ("999", "1000", "002", "notes"):
        (run.path / "attempts" / name).mkdir(parents=True)
    assert [attempt.number for attempt in state.attempts(run.path)] == [2, 999, 1000]


def test_no_runs_no_error(slurm: Slurm) -> None:
    assert state.status([]) == []
    with pytest.raises(BadInput, match="no run folder in"):
        state.expand([])
