"""slurm/attempt.sh by bash: every verdict, and what becomes of the job, with the fake scontrol, squeue and sbatch."""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.script import ROOT
from tests.launch.conftest import Slurm

TOOLS = (
    *("bash", "cat", "date", "env", "find", "grep", "ln", "ls", "mkdir", "mv", "paste", "sed", "sort", "tail", "tr"),
    *("uniq", "wc"),
)
KILLED = None
TWO_NODES = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}


@dataclass
class Job:
    """A job of the fake cluster whose batch script sources slurm/attempt.sh; its run folder is `run`."""

    slurm: Slurm
    run: Path
    id: str = "40"

    @property
    def script(self) -> Path:
        return self.run.parent / "slurm_script"

    def start(
        self, exits: Sequence[int | None], rc: int | None = None, before: str = ":", lines: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        """One attempt: a rank for each exit code, on the nodes of TWO_NODES; KILLED leaves none. `before` they end.

        `lines`: more of the script's first ones.
        """
        ranks = "".join(
            f'echo {TWO_NODES[rank]} > "$CAUC_ATTEMPT/rank-{rank}.host"\n'
            + (
                f'echo -n "{code}{chr(10) * (code != "")}" > "$CAUC_ATTEMPT/rank-{rank}.exit"\n'
                if code is not KILLED
                else ""
            )
            for rank, code in enumerate(exits)
        )
        rc = max([137 if code is KILLED else code for code in exits], default=127) if rc is None else rc
        script = [
            "#!/bin/bash",
            "#SBATCH --job-name=mine",
            "#SBATCH --nodes=2",
            "#SBATCH --time=10",
            "#SBATCH --exclude='n[7-8]'",  # as submitit writes it
            lines,
            f". {ROOT}/slurm/attempt.sh",
            "export MASTER_PORT=777",
            "begin_attempt .",
            "env > seen",
            before,
            f"{ranks}end_attempt {rc}",
            "",
        ]
        self.script.write_text("\n".join(script))
        if self.id not in self.slurm.queue or self.slurm.queue[self.id]["state"] == "PENDING":
            self.slurm.set(self.id, name="mine", state="RUNNING")
        here = {
            "PATH": str(self.slurm.bin),
            "SLURM_JOB_ID": self.id,
            "SLURM_NTASKS": str(len(exits) or 4),
            "SLURM_JOB_NUM_NODES": str(len({TWO_NODES[rank] for rank in range(len(exits))}) or 2),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_SUBMIT_DIR": str(self.run),
            "CAUC_SCRIPT": str(self.script),
        }
        return subprocess.run(
            ["bash", str(self.script)], cwd=self.run, env=here | env, capture_output=True, text=True, timeout=60
        )

    def end(self) -> list[str]:
        """The latest verdict."""
        return sorted(self.run.glob("attempts/*"))[-1].joinpath("end").read_text().splitlines()

    def checkpoint(self, *steps: int) -> None:
        for step in steps:
            (self.run / "checkpoints" / f"step-{step:08}").mkdir(parents=True)


@pytest.fixture
def job(slurm: Slurm, tmp_path: Path) -> Job:
    """PATH holds the fakes and what attempt.sh uses, nothing else: a node without scontrol can be had."""
    for tool in TOOLS:
        (slurm.bin / tool).symlink_to(shutil.which(tool) or tool)
    (tmp_path / "run").mkdir()
    return Job(slurm, tmp_path / "run")


VERDICTS: dict[str, tuple[Sequence[int | None], int | None, dict[str, str], list[str]]] = {
    "every rank at its end: done": ([0, 0, 0, 0], None, {}, ["done"]),
    "stopped by a signal: again": ([5, 5, 5, 5], None, {}, ["again stopped none", "requeued"]),
    "some at their end, some stopped: again": ([0, 0, 5, 5], None, {}, ["again stopped none", "requeued"]),
    "a rank killed, the others miss it: again": ([6, 6, 6, KILLED], None, {}, ["again crashed none", "requeued"]),
    "all killed with their node: again": ([KILLED] * 4, 1, {}, ["again crashed none", "requeued"]),
    "a segmentation fault: again": ([6, 139, 6, 6], None, {}, ["again crashed none", "requeued"]),
    "bad input, the others miss it: failed": ([6, 6, 2, 6], None, {}, ["failed 2"]),
    "not finite: failed": ([3, 3, 3, 3], None, {}, ["failed 3"]),
    "an error: failed": ([6, 6, 1, KILLED], None, {}, ["failed 1"]),
    "not one rank began: failed": ([], 127, {}, ["failed 127"]),
    "told before Python listened: again": ([], 140, {}, ["again stopped none", "requeued"]),
    "told before one rank listened: again": ([6, 6, KILLED, 6], 143, {}, ["again crashed none", "requeued"]),
    "a code that was not asked for: failed": ([5, 5, 5, 5], None, {"CAUC_REQUEUE_ON": "6 137"}, ["failed 5"]),
    "killed, which was not asked for: failed": ([6, KILLED, 6, 6], None, {"CAUC_REQUEUE_ON": "5 6"}, ["failed 137"]),
    "a code of the user's own: again": (
        [9, 9, 9, 9],
        None,
        {"CAUC_REQUEUE_ON": "9"},
        ["again crashed none", "requeued"],
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_a_verdict_follows_from_the_ranks_exit_codes(job: Job, case: str) -> None:
    exits, rc, env, wanted = VERDICTS[case]
    done = job.start(exits, rc, **env)
    assert job.end() == wanted, done.stderr
    assert f"attempt 001: {' '.join(wanted)}" in done.stdout
    assert done.returncode == (0 if wanted == ["done"] else rc or max(137 if c is KILLED else c for c in exits))
    requeued = job.slurm.queue[job.id]["state"] == "PENDING"
    assert requeued == (wanted[-1] == "requeued")


def test_a_verdict_names_the_newest_checkpoint(job: Job) -> None:
    job.checkpoint(3, 20, 100)
    (job.run / "checkpoints" / ".step-00000999.tmp").mkdir()
    job.start([5, 5])
    assert job.end() == ["again stopped step-00000100", "requeued"]


def test_a_run_that_launch_cancelled_is_not_tried_again(job: Job) -> None:
    (job.run / "cancelled").write_text("39\n40\n")
    job.start([5, 5])
    assert job.end() == ["cancelled"]
    job.start([0, 0])
    assert job.end() == ["done"]


def test_a_run_that_was_cancelled_once_and_is_begun_by_hand_is_tried_again(job: Job) -> None:
    """`sbatch slurm/train-srun.sbatch RUN` after `launch cancel RUN`: that job's time limit is no second cancel."""
    (job.run / "cancelled").write_text("39\n4\n")
    job.start([5, 5])
    assert job.end() == ["again stopped none", "requeued"]


AGAIN = ["again stopped none", "requeued"]


@pytest.mark.parametrize(("left", "wanted"), [("12:00", ["cancelled"]), ("0:00", AGAIN), ("INVALID", AGAIN)])
def test_scancel_is_told_from_the_end_of_the_time(job: Job, left: str, wanted: list[str]) -> None:
    job.slurm.set("40", name="mine", state="COMPLETING", left=left)
    job.start([5, 5])
    assert job.end() == wanted


@pytest.mark.parametrize("exits", [[5, 5], [KILLED, KILLED]])
def test_a_job_that_slurm_has_requeued_itself_is_neither_cancelled_nor_queued_twice(
    job: Job, exits: list[int | None]
) -> None:
    """A preemption without grace time, a lost node: COMPLETING as after scancel, with one more restart."""
    job.slurm.set("40", name="mine", state="COMPLETING", left="12:00", restarts="1")
    for _ in range(4):  # SLURM goes on with it, however often: nothing is given up
        job.start(exits)
        assert job.end()[1] == "requeued by SLURM itself"
    assert job.slurm.calls("scontrol", "sbatch") == []
    assert not list(job.run.glob("attempts/*/suspects"))
    job.slurm.set("40", restarts="1")
    job.start([5, 5], SLURM_RESTART_COUNT="1")
    assert job.end() == ["cancelled"]
    job.slurm.set("40", state="RUNNING")
    job.start(exits, SLURM_RESTART_COUNT="1", CAUC_MAX_TRIES="2")
    assert job.end()[1] == "requeued"  # the first that counts


def test_an_attempt_that_a_later_one_has_followed_decides_nothing(job: Job) -> None:
    """Its node was cut off; heard again, it would requeue the job that runs elsewhere meanwhile."""
    later = "mkdir attempts/002; echo id=40 > attempts/002/job"
    text = f". {ROOT}/slurm/attempt.sh; begin_attempt .; {later}; end_attempt 6"
    here = {"PATH": str(job.slurm.bin), "SLURM_JOB_ID": "40", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash", "-c", text], cwd=job.run, env=here, capture_output=True, text=True, timeout=60)
    assert done.returncode == 6
    assert done.stdout == "attempt 001: SLURM has started the job elsewhere meanwhile\n"
    assert not list(job.run.glob("attempts/*/end"))
    assert job.slurm.calls("scontrol", "sbatch", "squeue") == []


def test_a_later_attempt_of_another_job_takes_nothing_from_this_one(job: Job) -> None:
    """That one was refused: the run folder is at work."""
    (job.run / "attempts" / "002").mkdir(parents=True)
    (job.run / "attempts" / "002" / "job").write_text("id=41\n")
    job.start([5, 5])
    assert (job.run / "attempts" / "001" / "end").read_text().splitlines() == ["again stopped none", "requeued"]


@pytest.mark.parametrize("where", ["attempts is a file", "nothing can be made in it"])
def test_a_folder_in_which_nothing_can_be_made_ends_the_job_at_once(job: Job, where: str) -> None:
    if where == "attempts is a file":
        (job.run / "attempts").touch()
    else:
        (job.run / "attempts").symlink_to("/proc")
    done = job.start([0, 0])
    assert done.returncode == 2
    if where != "attempts is a file":
        assert "/attempts/001 cannot be made; wanted room, and the right to write. Free space, then" in done.stderr


def test_an_exit_code_that_found_no_room_on_the_disk_is_not_a_crash(job: Job) -> None:
    job.start([6, "", 6, 6], 2)  # type: ignore[list-item]
    assert job.end() == ["failed 2"]


def test_where_ranks_have_begun_before_a_start_without_any_is_a_crash(job: Job) -> None:
    """The command is right, then: it was a node that could not start them."""
    job.start([5, 5])
    job.start([], 1)
    assert job.end() == ["again crashed none", "requeued"]


def test_the_third_time_without_a_new_checkpoint_is_the_last(job: Job) -> None:
    job.checkpoint(10)
    ends = [(job.start([6, 6]), job.end())[1] for _ in range(3)]
    assert ends[:2] == [["again crashed step-00000010", "requeued"]] * 2
    assert ends[2] == ["again crashed step-00000010", "given up: 3 times without a new checkpoint"]
    assert job.slurm.queue["40"]["state"] == "RUNNING"  # not queued again


def test_a_new_checkpoint_between_gives_new_tries(job: Job) -> None:
    for step in (10, 20, 30, 40):
        job.checkpoint(step)
        job.start([6, 6], CAUC_MAX_TRIES="2")
        assert job.end() == [f"again crashed step-{step:08}", "requeued"]
    job.start([6, 6], CAUC_MAX_TRIES="2")
    assert job.end()[1] == "given up: 2 times without a new checkpoint"


def test_a_run_that_may_try_once_goes_on_as_long_as_it_saves(job: Job) -> None:
    save = "mkdir -p checkpoints/step-00000010"
    job.start([5, 5], CAUC_MAX_TRIES="1", before=save)
    assert job.end() == ["again stopped step-00000010", "requeued"]
    job.start([5, 5], CAUC_MAX_TRIES="1", before=save)
    assert job.end()[1] == "given up: 2 times without a new checkpoint"


def test_a_resumed_run_has_its_tries_anew(job: Job) -> None:
    (job.run / "jobs.jsonl").write_text("{}\n")
    for _ in range(2):
        time.sleep(0.02)
        job.start([6, 6], CAUC_MAX_TRIES="2")
    assert job.end()[1].startswith("given up")
    time.sleep(0.02)
    (job.run / "jobs.jsonl").write_text("{}\n{}\n")  # `launch resume`
    time.sleep(0.02)
    job.start([6, 6], CAUC_MAX_TRIES="2")
    assert job.end()[1] == "requeued"


@pytest.mark.parametrize(
    ("exits", "missing", "wanted"),
    [
        ([6, 6, KILLED, 6], {}, "n2\n"),
        ([6, 6, KILLED, KILLED], {}, "n2\n"),
        ([KILLED, 6, KILLED, 6], {}, ""),
        ([KILLED, KILLED, 6, KILLED], {2: "3"}, "n2\n"),  # 0 and 1 waited for a packet that was lost, and srun for them
        ([KILLED, 6, KILLED, 6], {1: "2", 3: "0\n2"}, ""),  # both are gone
        ([6, 6, 6, KILLED], {0: "2"}, "n2\n"),  # 2 has ended by itself: 0 came late
        ([KILLED] * 4, {}, ""),
    ],
)
def test_the_host_of_a_killed_rank_is_suspected_unless_all_are(
    job: Job, exits: list[int | None], missing: dict[int, str], wanted: str
) -> None:
    notes = [f"echo -e '{text}' > $CAUC_ATTEMPT/rank-{rank}.missing" for rank, text in missing.items()]
    job.start(exits, before="; ".join([":", *notes]))
    assert (job.run / "attempts" / "001" / "suspects").read_text() == wanted


def test_a_host_that_was_suspected_twice_is_left_out_of_a_new_job(job: Job) -> None:
    (job.run / "slurm").mkdir()
    (job.run / "slurm" / "40_submitted.pkl").write_text("pickle")
    job.start([6, 6, 6, KILLED])
    assert job.end() == ["again crashed none", "requeued"]
    job.start([6, 6, KILLED, 6])
    (new,) = set(job.slurm.queue) - {"40"}
    assert job.end() == ["again crashed none", f"resubmitted as {new} without n2"]
    asked = job.slurm.queue[new]["asked"]
    assert (asked["exclude"], asked["dependency"]) == ("n2,n[7-8]", "afterany:40")
    assert job.slurm.queue[new]["script"] == job.script.read_text()
    assert job.slurm.queue[new]["cwd"] == str(job.run)
    assert (job.run / "resubmitted").read_text() == f"{new}\n"
    assert (job.run / "slurm" / f"{new}_submitted.pkl").read_text() == "pickle"


def test_where_no_other_nodes_are_left_the_bad_one_is_tried_again(job: Job) -> None:
    job.slurm.breaks(
        "sbatch", "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    )
    for _ in range(2):
        job.start([6, 6, 6, KILLED])
    assert job.end() == ["again crashed none", "requeued"]
    assert len(job.slurm.calls("sbatch")) == 1
    assert not (job.run / "resubmitted").exists()


def test_a_task_of_an_array_is_requeued_alone(job: Job) -> None:
    """SLURM_JOB_ID of one of them is the array's, which scontrol takes for all."""
    job.slurm.set("40_0", name="mine", state="RUNNING")
    job.slurm.set("40_3", name="mine", state="RUNNING")
    job.start([5, 5], SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID="3")
    assert job.end() == ["again stopped none", "requeued"]
    (call,) = job.slurm.calls("scontrol")
    assert call["arguments"] == ["requeue", "40_3"]


def test_where_scontrol_is_missing_or_fails_a_new_job_waits_for_this_one(job: Job) -> None:
    job.slurm.breaks("scontrol", "slurm_update error: Access/permission denied")
    job.start([5, 5])
    assert job.end() == ["again stopped none", "resubmitted as 41"]
    (job.slurm.bin / "scontrol").unlink()
    job.start([5, 5])
    assert job.end()[1] == "resubmitted as 42"
    assert job.slurm.queue["42"]["asked"]["dependency"] == "afterany:40"
    assert job.slurm.queue["42"]["asked"]["exclude"] == "n[7-8]"  # the user's own, of the script
    assert (job.run / "resubmitted").read_text() == "41\n42\n"


def test_a_new_job_goes_on_without_the_nodes_that_the_last_one_was_kept_from(job: Job) -> None:
    """They were left out by an option of sbatch, which the script has not."""
    for exits in ([6, 6, 6, KILLED], [6, 6, KILLED, 6]):
        job.start(exits)
    job.id = "41"
    (job.slurm.bin / "scontrol").unlink()
    job.start([5])  # on n1 alone
    assert job.end() == ["again stopped none", "resubmitted as 42 without n2"]
    assert job.slurm.queue["42"]["asked"]["exclude"].split(",")[0] == "n2"


def test_a_new_job_asks_for_what_was_given_to_sbatch_by_hand(job: Job) -> None:
    (job.slurm.bin / "scontrol").unlink()
    by_hand = {"time": "50:00", "constraint": "big", "exclude": "n5", "reservation": "mine", "output": "/here/a b.log"}
    job.slurm.set("40", name="mine", state="RUNNING", asked=by_hand)  # type: ignore[arg-type]
    given = {"PARTITION": "urgent", "ACCOUNT": "mine", "QOS": "high", "NAME": "a name"}
    env = {f"SLURM_JOB_{key}": value for key, value in given.items()}
    more = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "3", "SLURM_MEM_PER_NODE": "900"}
    job.start([5, 5, 5], **env, **more, SLURM_GPUS_PER_NODE="2")
    assert job.end()[1] == "resubmitted as 41"
    asked = job.slurm.queue["41"]["asked"]
    assert {name: asked[name] for name in by_hand} == by_hand
    assert [asked[name] for name in ("partition", "account", "qos", "job-name")] == list(given.values())
    numbers = ("nodes", "ntasks-per-node", "cpus-per-task", "mem", "gpus-per-node")
    assert [asked[name] for name in numbers] == ["2", "1", "3", "900", "2"]


def test_a_new_job_may_run_in_any_of_the_partitions_that_the_script_names(job: Job) -> None:
    (job.slurm.bin / "scontrol").unlink()
    job.start([5, 5], SLURM_JOB_PARTITION="main", lines="#SBATCH --partition=main,urgent")
    (call,) = job.slurm.calls("sbatch")
    assert not [word for word in call["arguments"] if word.startswith("--partition")]


def test_where_sbatch_fails_too_it_says_so(job: Job) -> None:
    (job.slurm.bin / "scontrol").unlink()
    job.slurm.breaks("sbatch", "sbatch: error: Access/permission denied")
    job.start([5, 5])
    assert job.end() == ["again stopped none", "given up: neither scontrol nor sbatch works here"]


def test_a_task_of_an_array_is_resubmitted_as_that_task_alone(job: Job) -> None:
    (job.slurm.bin / "scontrol").unlink()
    job.start([5, 5], SLURM_ARRAY_JOB_ID="39", SLURM_ARRAY_TASK_ID="3")
    assert (job.run / "attempts" / "001" / "job").read_text().startswith("id=39_3\n")
    (new,) = set(job.slurm.queue) - {"40"}
    assert job.slurm.queue[new]["asked"]["array"] == "3"
    assert job.slurm.queue[new]["asked"]["dependency"] == "afterany:39_3"
    assert job.end()[1] == f"resubmitted as {new}"


def test_a_new_job_inherits_nothing_of_the_old_one(job: Job) -> None:
    (job.slurm.bin / "scontrol").unlink()
    job.start([5, 5], SLURM_CONF="/etc/slurm.conf", SBATCH_PARTITION="main", PMIX_RANK="0", CAUC_KEPT="yes")
    (call,) = job.slurm.calls("sbatch")
    names = {name for name in call["env"] if name.startswith(("SLURM", "SBATCH", "PMI", "CAUC"))}
    assert names == {"SLURM_CONF", "CAUC_KEPT", "CAUC_SCRIPT"}


def test_the_variables_of_other_launchers_do_not_reach_the_ranks(job: Job) -> None:
    others = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    job.start([0, 0], **others)
    seen = dict(line.partition("=")[::2] for line in (job.run / "seen").read_text().splitlines() if "=" in line)
    assert set(others) & set(seen) == {"MASTER_PORT"}
    assert seen["MASTER_PORT"] == "777"  # of the site
    assert seen["CAUC_ATTEMPT"] == "attempts/001"
    assert seen["SLURM_JOB_ID"] == job.id


def test_a_run_folder_that_is_not_there_ends_the_job(job: Job) -> None:
    done = subprocess.run(
        ["bash", "-c", f". {ROOT}/slurm/attempt.sh; begin_attempt nowhere; echo went on"],
        cwd=job.run,
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "went on" not in done.stdout
