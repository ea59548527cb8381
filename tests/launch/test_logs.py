"""`launch logs`: which file, and what is added to it while a run goes from attempt to attempt."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import logs
from tests.launch.conftest import Folder, Launch, Slurm


def test_the_latest_attempt_s_rank_0_is_shown(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    run = folder().job("41")
    run.attempt("41", "again crashed none", "requeued", logs=("old 0\n", "old 1\n"))
    run.attempt("41", logs=("new 0\n", "new 1\n"))
    assert launch("logs", run.path).out == "new 0\n"
    assert launch("logs", run.path, "--rank", "1").out == "new 1\n"
    done = launch("logs", run.path, "--attempt", "1", "--rank", "1")
    assert (done.code, done.out) == (0, "old 1\n")
    assert done.err == f"==> {run.path}/attempts/001/rank-1.log <==\n"


def test_bytes_are_shown_as_they_are(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    run = folder().job("41")
    cut = "3 Größ".encode()[:-1]  # by a kill
    (run.attempt("41") / "rank-0.log").write_bytes(cut)
    assert launch("logs", run.path).out == cut.decode(errors="replace")


@pytest.mark.parametrize("where", ["mine/slurm", "slurm"])
def test_where_no_rank_has_begun_the_batch_log_is_shown(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch, where: str
) -> None:
    run = folder().job("41").job("42_3")
    place = run.path.parent / where
    place.mkdir()
    (place / "42_3.log").write_text("module: command not found\n")
    (place / "43.log").write_text("another run's\n")
    assert launch("logs", run.path).out == "module: command not found\n"
    run.attempt("42_3", "failed 127", logs=())
    assert launch("logs", run.path).out == "module: command not found\n"


MESSAGES: dict[str, tuple[list[str], str]] = {
    "a rank that is none": (["--rank", "7"], "--rank 7 of 2 ranks; wanted 0 to 1. E.g. --rank 1."),
    "an attempt that is none": (
        ["--attempt", "9"],
        "no attempt 9 of RUN; wanted one of those there (1). See --attempt.",
    ),
    "a rank that is none, followed": (["-f", "--rank", "7"], "--rank 7 of 2 ranks; wanted 0 to 1. E.g. --rank 1."),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_is_not_there_is_refused_with_what_is(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch, case: str
) -> None:
    words, wanted = MESSAGES[case]
    run = folder().job("41")
    run.attempt("41", "done", logs=("a", "b"))
    done = launch("logs", run.path, *words)
    assert (done.code, done.err) == (2, f"error: {wanted}\n".replace("RUN", str(run.path)))


def test_a_run_that_waits_has_no_log_yet(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    run = folder().job("41")
    done = launch("logs", run.path)
    wanted = f"error: {run.path} has no log yet; wanted a job that has started. `launch status {run.path}` says more.\n"
    assert (done.code, done.err) == (2, wanted)


def test_of_a_sweep_one_member_must_be_named(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    run = folder("sweep/000-x")
    sweep = run.path.parent
    (sweep / "runs").write_text("000-x\n")
    done = launch("logs", sweep)
    assert (done.code, done.err) == (2, f"error: {sweep} is a sweep of 1 runs; wanted one of them. E.g. {run.path}.\n")


class Following:
    """`launch logs -f` in a thread, and what it has said so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path, rank: int = 0, attempt: int | None = None) -> None:
        self.said: list[str] = []
        monkeypatch.setattr(logs, "ASK", 0.05)
        monkeypatch.setattr(logs, "_out", lambda data: self.said.append(data.decode()))
        self._thread = threading.Thread(
            target=logs.logs, args=(run, rank, attempt), kwargs={"follow": True, "every": 0.02}
        )
        self._thread.start()

    def says(self, *wanted: str) -> bool:
        """Whether that is all it says within a while."""
        deadline = time.monotonic() + 10
        while "".join(self.said) != "".join(wanted) and time.monotonic() < deadline:
            time.sleep(0.01)
        return "".join(self.said) == "".join(wanted)

    def ends(self, seconds: float = 10) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


def test_following_goes_from_attempt_to_attempt_until_the_run_is_over(
    slurm: Slurm, folder: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder().job("41")
    slurm.set("41", name=run.name, state="RUNNING")
    (run.path / "slurm").mkdir()
    (run.path / "slurm" / "41.log").write_text("batch\n")
    follow = Following(monkeypatch, run.path)
    assert follow.says("batch\n")
    first = run.attempt("41", logs=("one\n",))
    assert follow.says("batch\n", "one\n")
    (first / "end").write_text("again stopped none\nrequeued\n")
    slurm.set("41", state="PENDING", reason="BeginTime")
    with (first / "rank-0.log").open("a") as file:
        file.write("late\n")
    assert follow.says("batch\n", "one\n", "late\n")
    assert not follow.ends(0.5)  # it waits in the queue: that is not the end
    slurm.breaks("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert not follow.ends(0.5)  # nor is a squeue that does not answer
    (slurm.state / "broken-squeue").unlink()
    slurm.set("41", state="RUNNING")
    second = run.attempt("41", logs=("two\n",))
    assert follow.says("batch\n", "one\n", "late\n", "two\n")
    with (first / "rank-0.log").open("a") as file:  # a node that was cut off writes again
        file.write("later\n")
    assert follow.says("batch\n", "one\n", "late\n", "two\n", "later\n")
    (second / "end").write_text("done\n")
    slurm.ends("41", "COMPLETED")
    assert follow.ends()


def test_what_an_ended_run_said_is_followed_to_its_end_at_once(
    slurm: Slurm, folder: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder().job("41")
    run.attempt("41", "again stopped none", "requeued", logs=("old\n",))
    run.attempt("41", "done", logs=("new\n",))
    follow = Following(monkeypatch, run.path)
    assert follow.ends()
    assert follow.said == ["new\n"]


def test_following_one_attempt_ends_with_it(
    slurm: Slurm, folder: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder().job("41")
    slurm.set("41", name=run.name, state="PENDING")
    run.attempt("41", "again stopped none", "requeued", logs=("", "old\n"))
    follow = Following(monkeypatch, run.path, rank=1, attempt=1)
    assert follow.ends()
    assert follow.said == ["old\n"]


def test_following_an_attempt_that_was_cut_off_ends_when_another_has_begun(
    slurm: Slurm, folder: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no verdict, and its job goes on for days."""
    run = folder().job("41")
    slurm.set("41", name=run.name, state="RUNNING")
    run.attempt("41", logs=("old\n",))
    run.attempt("41", logs=("new\n",))
    follow = Following(monkeypatch, run.path, attempt=1)
    assert follow.ends()
    assert follow.said == ["old\n"]
