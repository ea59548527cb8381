"""SLURM's commands: what they say is read, and what they refuse comes with what would be right."""

import os
import subprocess
from pathlib import Path

import pytest

from cauc_dist.errors import BadInput
from launch import slurm as commands
from tests.launch.conftest import Slurm

SAID: dict[str, tuple[str, str]] = {
    # What SLURM 22.05 printed, with --test-only and without (2026-11-24).
    "a partition": (
        "sbatch: error: invalid partition specified: urgnt\nallocation failure: Invalid partition name specified\n",
        "sbatch: invalid partition specified: urgnt; allocation failure: Invalid partition name specified; "
        "wanted a partition. Did you mean urgent?",
    ),
    "nodes": (
        "sbatch: error: Batch job submission failed: More processors requested than permitted\n",
        "sbatch: Batch job submission failed: More processors requested than permitted; "
        "wanted nodes that the partition has. "
        "It has main: 4 nodes of 2 cores, no GPU; urgent: 2 nodes of 2 cores, no GPU.",
    ),
    "GPUs or memory": (
        "allocation failure: Requested node configuration is not available\n",
        "sbatch: allocation failure: Requested node configuration is not available; wanted nodes that the partition "
        "has. It has main: 4 nodes of 2 cores, no GPU; urgent: 2 nodes of 2 cores, no GPU.",
    ),
    "time": (
        "allocation failure: Requested time limit is invalid (missing or exceeds some limit)\n",
        "sbatch: allocation failure: Requested time limit is invalid (missing or exceeds some limit); "
        "wanted what the partition allows. `scontrol show partition` says it.",
    ),
    "a quality of service": (
        "allocation failure: Invalid qos specification\n",
        "sbatch: allocation failure: Invalid qos specification; wanted what the partition allows. "
        "`scontrol show partition` says it.",
    ),
    "anything else": (
        "allocation failure: Invalid feature specification\n",
        "sbatch: allocation failure: Invalid feature specification; wanted a job that SLURM takes. "
        "--dry-run shows the script.",
    ),
    "nothing": ("", "sbatch: it failed without a word; wanted a job that SLURM takes. --dry-run shows the script."),
}


@pytest.mark.parametrize("case", SAID)
def test_a_refusal_says_what_slurm_would_take(slurm: Slurm, case: str) -> None:
    words, wanted = SAID[case]
    assert str(commands.refused("sbatch", words)) == wanted


def test_a_refusal_is_told_where_sinfo_does_not_answer_either(no_slurm: None) -> None:
    assert "Valid: (none)" in str(commands.refused("sbatch", SAID["a partition"][0]))


def test_a_queue_is_read_whatever_a_name_holds(slurm: Slurm) -> None:
    slurm.set("41", name="a|b c", state="RUNNING", nodes="n[1-2]", reason="None")
    slurm.set("42_7", name="d", state="PENDING", reason="Priority")
    assert commands.queue() == [
        commands.Job("41", "a|b c", "RUNNING", "None", "n[1-2]", "N/A"),
        commands.Job("42_7", "d", "PENDING", "Priority", "", "N/A"),
    ]


def test_no_variable_of_the_shell_hides_a_job_nor_a_hidden_partition(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SQUEUE_STATES", "SQUEUE_PARTITION", "SQUEUE_USERS", "SLURM_CLUSTERS", "SACCT_FORMAT", "SINFO_ALL"):
        monkeypatch.setenv(name, "RUNNING")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    commands.queue()
    commands.accounted(["41"])
    commands.partitions()
    calls = slurm.calls("squeue", "sacct", "sinfo")
    assert len(calls) == 3
    for call in calls:
        assert "RUNNING" not in call["env"].values()
        assert call["env"]["SLURM_CONF"] == "/etc/slurm.conf"
    assert "-a" in calls[0]["arguments"]


def test_a_refusal_is_sure_unless_slurm_s_own_socket_timed_out() -> None:
    sure = commands.refused("sbatch", "sbatch: error: Batch job submission failed: Invalid feature specification")
    assert isinstance(sure, commands.Refused)
    words = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    perhaps = commands.refused("sbatch", words)
    assert not isinstance(perhaps, commands.Refused)
    assert str(perhaps) == (
        "sbatch: Batch job submission failed: Socket timed out on send/recv operation; "
        "wanted a SLURM that answers. Try again later."
    )


def test_the_accounting_gives_a_state_without_who_did_it(slurm: Slurm) -> None:
    slurm.ends("41", "CANCELLED by 1000", "a|b")
    slurm.ends("42", "TIMEOUT", "c")
    assert commands.accounted(["41", "40"]) == [commands.Job("41", "a|b", "CANCELLED")]
    slurm.has("no-accounting")
    assert commands.accounted(["41"]) == []


def test_a_command_that_is_missing_or_silent_is_named(no_slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"squeue: .*No such file.*; wanted SLURM's commands. Go to a login node."):
        commands.queue()

    def silent(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(subprocess, "run", silent)
    with pytest.raises(
        BadInput, match=r"squeue gave no answer in a minute; wanted a SLURM that answers\. Try again later\."
    ):
        commands.queue()


def test_jobs_get_what_a_login_shell_needs_and_nothing_of_another_job() -> None:
    env = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "MODULEPATH": "/m",
        "CAUC_DATA": "/d",
        "SLURM_CONF": "/s",
        "NCCL_DEBUG": "INFO",
    }
    away = {
        "SLURM_JOB_ID": "1",
        "MASTER_ADDR": "x",
        "RANK": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "/p",
        "SECRET": "s",
    }
    kept = {name: env[name] for name in env if name != "NCCL_DEBUG"}
    assert commands.environment((), env | away) == kept
    assert commands.environment(["NCCL_*"], env | away) == env


def test_the_environment_comes_back_whatever_happens(tmp_path: Path) -> None:
    before = dict(os.environ)
    seen = {}

    def fail() -> None:
        seen.update(os.environ)
        raise KeyError

    with pytest.raises(KeyError), commands.only({"PATH": "/bin"}):
        fail()
    assert seen == {"PATH": "/bin"}
    assert dict(os.environ) == before
