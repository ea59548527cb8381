"""`launch resume`: the same run once more, never twice at a time, and never what `cauc resume` refuses."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cauc_dist.checkpoint import Writer
from cauc_dist.cli import main as cauc
from cauc_dist.prepare import load
from cauc_dist.store.reader import Store
from cauc_dist.train import card, own
from launch import resume
from launch.site import Resources
from tests.launch.conftest import SMALL, Folder, Launch, Slurm


@pytest.fixture
def run(slurm: Slurm, submit: Launch, tmp_path: Path) -> Path:
    """Queued by launch on 2 nodes with a notice of 60 s, begun, stopped, and over, without a checkpoint yet."""
    path = tmp_path / "run"
    done = submit("--run", path, "--nodes", "2", "--signal-seconds", "60", "--name", "mine")
    assert done.code == 0, done.err
    Folder(path).attempt("41", "failed 1")
    slurm.ends("41", "FAILED")
    return path


def checkpoint(run: Path, step: int) -> None:
    """A sound one, of as many numbers as it takes to be one."""
    settings = load(run)
    with Writer(run, card(settings, Store.open(settings.data.store)), keep=2) as writer:
        writer.save(step, {"parameter/w": torch.zeros(1)}, 0.5)


def test_a_run_goes_on_with_its_own_code_and_what_it_was_queued_with(slurm: Slurm, run: Path, launch: Launch) -> None:
    checkpoint(run, 2)
    (run / "cancelled").touch()
    (run / "snapshot" / "mine").touch()
    done = launch("resume", run, "--nodes", "3", "--time", "2:00:00")
    assert (done.code, done.err) == (0, "")
    job = slurm.queue["42"]
    assert (job["asked"]["nodes"], job["asked"]["time"], job["asked"]["signal"]) == ("3", "2:00:00", "USR2@60")
    assert job["cwd"] == str(run)
    assert "3 nodes x 1 ranks = 3 ranks" in done.out
    assert f"job 42 ({job['name']}) goes on from step-00000002" in done.out
    assert not (run / "cancelled").exists()
    assert (run / "snapshot" / "mine").exists()
    lines = [json.loads(line) for line in (run / "jobs.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["41", "42"]
    assert lines[0]["name"] == lines[1]["name"] == job["name"]
    assert json.loads((run / "launch.json").read_text())["resources"]["nodes"] == 3
    (now,) = json.loads(launch("status", run, "--json").out)
    assert (now["state"], now["id"]) == ("PENDING", "42")


def test_without_a_checkpoint_it_says_that_it_begins_anew(run: Path, launch: Launch) -> None:
    assert "goes on from the beginning: there is no checkpoint" in launch("resume", run).out


def test_what_another_site_s_file_sets_wins_over_the_last_job_s(
    slurm: Slurm, run: Path, launch: Launch, store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(
        f'shared = ["{tmp_path}", "{store.parent}"]\nmodules = ["cuda/12"]\n'
        '[resources]\npartition = "urgent"\ntime = "30"\n'
    )
    done = launch("resume", run, "--site", other, "--time", "20", "--nodes", "1")
    assert (done.code, done.err) == (2, done.err)
    assert "engine.start_minutes 30 in a job of 20 minutes" in done.err
    assert launch("resume", run, "--site", other, "--nodes", "1").code == 0
    asked = slurm.queue["42"]["asked"]
    assert (asked["partition"], asked["time"], asked["nodes"], asked["signal"]) == ("urgent", "30", "1", "USR2@60")
    assert "module load cuda/12" in slurm.queue["42"]["script"]
    slurm.ends("42")
    assert resume.before(run).site.modules == ("cuda/12",)


def test_a_run_of_cauc_train_gets_a_snapshot_and_a_job(
    slurm: Slurm, launch: Launch, store: Path, site: Path, tmp_path: Path
) -> None:
    path = tmp_path / "local"
    assert cauc(["train", "demo_cauc", *SMALL, "--data.store", str(store), "--run", str(path), "--no-start"]) == 0
    done = launch("resume", path, "--site", site, "--ranks-per-node", "2")
    assert (done.code, done.err) == (0, "")
    assert (path / "snapshot" / "cauc_dist" / "train.py").exists()
    assert (path / "snapshot" / "slurm" / "attempt.sh").exists()
    assert not [p for p in path.iterdir() if p.name.startswith(".snapshot")]
    assert slurm.queue["41"]["asked"]["ntasks-per-node"] == "2"
    assert json.loads((path / "jobs.jsonl").read_text())["id"] == "41"


def test_a_member_of_a_sweep_goes_on_with_the_sweep_s_code(
    slurm: Slurm, launch: Launch, store: Path, site: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    path = sweep / "000-x"
    assert cauc(["train", "demo_cauc", *SMALL, "--data.store", str(store), "--run", str(path), "--no-start"]) == 0
    (sweep / "runs").write_text("000-x\n")
    (sweep / "snapshot" / "slurm").mkdir(parents=True)
    (sweep / "snapshot" / "of-the-sweep").touch()
    told = {"resources": dataclasses.asdict(Resources(nodes=4)), "site": {"shared": [str(tmp_path), str(store.parent)]}}
    (sweep / "launch.json").write_text(json.dumps(told))
    done = launch("resume", path)
    assert (done.code, done.err) == (0, "")
    assert (path / "snapshot" / "of-the-sweep").exists()
    assert slurm.queue["41"]["asked"]["nodes"] == "4"
    assert launch("resume", sweep).err == (
        f"error: {sweep} is a sweep; wanted a run folder. `python -m launch sweep --rerun {sweep}`.\n"
    )


def test_a_live_run_is_refused_with_where_it_is(slurm: Slurm, run: Path, launch: Launch) -> None:
    name = json.loads((run / "jobs.jsonl").read_text())["name"]
    slurm.set("41", name=name, state="RUNNING", nodes="n[1-2]")
    done = launch("resume", run)
    assert (done.code, done.err) == (
        2,
        f"error: {run} is live: job 41 is RUNNING on n[1-2]; wanted a run that has left the queue. "
        f"Wait for it, or end it first by `python -m launch cancel {run}`.\n",
    )
    slurm.ends("41")
    own(run)  # by `cauc resume`, on a machine of the user's
    assert "is live: a training holds its lock, in no job that squeue lists" in launch("resume", run).err


def test_a_run_at_work_outside_of_slurm_is_refused(slurm: Slurm, folder: Callable[..., Folder], launch: Launch) -> None:
    run = folder().steps(0)
    own(run.path)
    done = launch("resume", run.path)
    assert "is live: a training holds its lock, in no job that squeue lists; wanted a run that has left" in done.err


def test_where_squeue_does_not_answer_nothing_is_queued(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch
) -> None:
    run = folder().job("41")
    slurm.breaks("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    done = launch("resume", run.path)
    assert (done.code, done.err) == (
        2,
        f"error: whether {run.path} is at work is not known (squeue: slurm_load_jobs error: Unable to contact slurm "
        "controller (connect failure)); wanted a run that has left the queue. "
        "Ask again when SLURM answers, or look where its job was queued.\n",
    )


def test_what_slurm_refuses_leaves_the_run_as_it_was(slurm: Slurm, run: Path, launch: Launch) -> None:
    (run / "cancelled").touch()
    before = (run / "launch.json").read_bytes(), (run / "jobs.jsonl").read_bytes()
    assert launch("resume", run, "--nodes", "5").code == 2
    slurm.has("full")
    assert "QOSMaxSubmitJobPerUserLimit" in launch("resume", run).err
    assert (run / "cancelled").exists()
    assert ((run / "launch.json").read_bytes(), (run / "jobs.jsonl").read_bytes()) == before
    assert run.exists()


def test_where_sbatch_s_answer_is_lost_the_job_is_not_cancelled_and_not_queued_twice(
    slurm: Slurm, run: Path, launch: Launch
) -> None:
    (run / "cancelled").touch()
    slurm.instead(
        "sbatch", '"$SLURM" "$@"', '[[ " $* " = *" --test-only "* ]] || { mv jobs.jsonl was; mkdir jobs.jsonl; }'
    )
    done = launch("resume", run)
    name = slurm.queue["42"]["name"]
    assert done.code == 2
    assert f"The job may be queued: `squeue --name {name}` (its folder stays)." in done.err
    assert not (run / "cancelled").exists()
    (run / "jobs.jsonl").rmdir()
    (run / "was").rename(run / "jobs.jsonl")
    assert launch("resume", run).err == (
        f"error: job 42 ({name}) is PENDING, and its launch was cut off before it noted that; "
        "wanted a run folder that no job has. Wait for it, or end it first: scancel 42.\n"
    )


def test_two_resumes_at_a_time_queue_one_job(slurm: Slurm, run: Path, launch: Launch) -> None:
    told = []

    def say(line: str) -> None:
        if not told:
            told.append(launch("resume", run).err)

    was = resume.before(run)
    resume.resume(run, was.resources, was.site, say=say)
    assert told == [
        f"error: another launch is at work on {run}; wanted one at a time. Look what it has queued, then go on.\n"
    ]
    assert sorted(slurm.queue) == ["42"]


def test_a_store_that_the_nodes_do_not_see_is_refused(
    slurm: Slurm, run: Path, launch: Launch, store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(f'shared = ["{tmp_path}"]\n')
    assert f"error: store {store}; wanted a place that all nodes see: " in launch("resume", run, "--site", other).err
    assert not slurm.queue


def test_damaged_checkpoints_are_refused_before_a_job_waits_for_hours(slurm: Slurm, run: Path, launch: Launch) -> None:
    checkpoint(run, 2)
    with (run / "checkpoints" / "step-00000002" / "state.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    done = launch("resume", run)
    assert done.code == 2
    assert "error: checkpoint step-00000002 is damaged" in done.err
    assert "42" not in slurm.queue


def test_another_store_than_it_began_with_is_refused(slurm: Slurm, run: Path, launch: Launch) -> None:
    path = run / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0" * 64}))
    done = launch("resume", run)
    assert (done.code, "wanted 000000000000, with which" in done.err) == (2, True)
    assert "42" not in slurm.queue


def test_more_ranks_than_subjects_in_a_batch_are_refused(slurm: Slurm, run: Path, launch: Launch) -> None:
    done = launch("resume", run, "--nodes", "4", "--ranks-per-node", "2")
    assert (done.code, "batch_size 6" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "launch.json is damaged (JSONDecodeError("),
        (
            "{}",
            "launch.json is damaged (KeyError('resources')); wanted what `launch submit` wrote. "
            "Restore it, or remove it.",
        ),
        (
            '{"resources": {"node": 2}, "site": {}}',
            "launch.json: resources: no field 'node' in Resources; wanted known",
        ),
    ],
)
def test_a_damaged_launch_json_is_named(
    slurm: Slurm, folder: Callable[..., Folder], launch: Launch, text: str, wanted: str
) -> None:
    run = folder()
    (run.path / "launch.json").write_text(text)
    done = launch("resume", run.path)
    assert done.code == 2
    assert wanted in done.err


def test_the_run_folder_comes_first(launch: Launch) -> None:
    done = launch("resume", "--nodes", "2")
    assert done.err == "error: `launch resume` without a run folder; wanted RUN first. Give its folder, then options.\n"
    assert "no config.json in nowhere" in launch("resume", "nowhere").err
