"""`launch submit`: what is refused leaves nothing behind, and what is queued is what was shown."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cauc_dist import journal, recipes
from cauc_dist.errors import BadInput
from launch import submit as submits
from launch.site import Site
from tests.launch.conftest import Folder, Launch, Slurm


def test_a_dry_run_shows_the_very_script_that_is_then_queued(slurm: Slurm, submit: Launch, tmp_path: Path) -> None:
    words = [
        "--run",
        tmp_path / "it's a run",
        "--nodes",
        "2",
        "--ranks-per-node",
        "2",
        "--time",
        "40",
        "--mem-gb",
        "1.5",
    ]
    dry = submit(*words, "--dry-run")
    assert not (tmp_path / "it's a run").exists()
    assert not slurm.calls("sbatch")
    wet = submit(*words)
    assert wet.code == 0, wet.err
    script = slurm.queue["41"]["script"]
    plan = "2 nodes x 2 ranks = 4 ranks; global batch 6, 1 or 2 subjects a rank, 2 views each; 1 epochs"
    assert dry.out == f"{script}\n{plan}\n"
    assert (tmp_path / "it's a run" / "slurm" / "41_submission.sh").read_text() == script
    assert plan in wet.out
    assert "SLURM would start it at 2026-11-24T23:46:08" in wet.out


def test_the_signal_is_the_one_that_the_ranks_listen_to_whatever_submitit_is_told_by_the_shell(
    slurm: Slurm, submit: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit takes another one from SUBMITIT_PREEMPT_SIGNAL, in the script and in the job."""
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    done = submit("--run", tmp_path / "run", "--signal-seconds", "30")
    assert done.code == 0, done.err
    job = slurm.queue["41"]
    assert [line for line in job["script"].splitlines() if "--signal" in line] == ["#SBATCH --signal=USR2@30"]
    assert "SUBMITIT_PREEMPT_SIGNAL" not in job["env"]


@pytest.mark.parametrize("never", [False, True])
def test_test_only_asks_slurm_queues_nothing_and_leaves_nothing(
    slurm: Slurm, submit: Launch, tmp_path: Path, never: bool
) -> None:
    """The year 3047 is SLURM's word for a job that it cannot place, though it would take it."""
    if never:
        slurm.has("never")
    done = submit("--run", tmp_path / "run", "--test-only")
    assert done.code == 0, done.err
    when = "a time that it does not know yet" if never else "2026-11-24T23:46:08"
    assert f"SLURM would start it at {when}; the first step" in done.out
    assert "job" not in done.out.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert "41" not in slurm.queue
    refused = submit("--run", tmp_path / "run", "--test-only", "--partition", "mian")
    assert refused.code == 2
    assert not (tmp_path / "run").exists()


def test_a_run_folder_says_what_was_asked_for(slurm: Slurm, submit: Launch, store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = submit("--run", run, "--name", "mine", "--nodes", "3", "--signal-seconds", "60")
    (line,) = [json.loads(line) for line in (run / "jobs.jsonl").read_text().splitlines()]
    assert line["id"] == "41"
    assert line["name"] == slurm.queue["41"]["name"]
    assert re.fullmatch(r"mine-[0-9a-f]{8}", line["name"])
    assert f"job 41 ({line['name']}), run folder {run}" in done.out
    told = json.loads((run / "launch.json").read_text())
    assert (told["resources"]["nodes"], told["resources"]["signal_seconds"]) == (3, 60)
    assert told["site"]["shared"] == [str(tmp_path), str(store.parent)]
    assert json.loads((run / "provenance.json").read_text())["ranks"] == 3
    assert (run / "slurm" / "41_submitted.pkl").exists()
    assert slurm.queue["41"]["cwd"] == str(run)


def test_a_dry_run_needs_no_slurm_and_no_store(no_slurm: None, launch: Launch) -> None:
    done = launch("submit", "demo_cauc", "--data.store", "nowhere.zarr", "--run", "mine", "--dry-run")
    assert done.code == 0, done.err
    assert "#SBATCH --job-name=demo_cauc-" in done.out
    assert not Path("mine").exists()


def test_the_environment_of_the_shell_stays_behind(
    slurm: Slurm, submit: Launch, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "RANK", "SLURM_JOB_ID", "SLURM_NTASKS", "OMP_NUM_THREADS", "PYTHONPATH", "SECRET"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CAUC_KEPT", "1")
    (tmp_path / "site.toml").write_text(f'shared = ["{tmp_path}", "{store.parent}"]\nkeep = ["SEC*"]\n')
    assert submit("--run", tmp_path / "run").code == 0
    calls = slurm.calls("sbatch")
    assert len(calls) == 2  # --test-only, and the job
    for call in calls:
        mine = {name for name, value in call["env"].items() if value == "1" and name != "SHLVL"}
        assert mine == {"CAUC_KEPT", "SECRET"}
        assert call["env"]["PATH"] == os.environ["PATH"]
    assert os.environ["MASTER_ADDR"] == "1"


REFUSED: dict[str, tuple[list[str], str]] = {
    "an unknown partition": (
        ["--partition", "mian"],
        "sbatch: invalid partition specified: mian; allocation failure: Invalid partition name specified; "
        "wanted a partition. Did you mean main?",
    ),
    "more nodes than there are": (
        ["--nodes", "5"],
        "sbatch: allocation failure: More processors requested than permitted; wanted nodes that the partition has. "
        "It has main: 4 nodes of 2 cores, no GPU; urgent: 2 nodes of 2 cores, no GPU.",
    ),
    "more time than the partition gives": (
        ["--time", "2-00"],
        "sbatch: allocation failure: Requested time limit is invalid (missing or exceeds some limit); "
        "wanted what the partition allows. `scontrol show partition` says it.",
    ),
    "an account that one has not": (
        ["--account", "yours"],
        "sbatch: allocation failure: Invalid account or account/partition combination specified; "
        "wanted an account that you may use. `sacctmgr show associations user=$USER`.",
    ),
    "a time in no form": (
        ["--time", "2h"],
        "--time 2h; wanted MM, MM:SS, HH:MM:SS, D-HH[:MM[:SS]]. E.g. --time 20:00:00 for twenty hours.",
    ),
    "a notice that is half of the time": (
        ["--time", "3", "--signal-seconds", "91"],
        "--signal-seconds 91 of --time 3; wanted half of the time at most. "
        "Ask for more time, or set --signal-seconds to less.",
    ),
    "a start that outlasts the job": (
        ["--time", "20", "--engine.start-minutes", "30"],
        "engine.start_minutes 30 in a job of 20 minutes; wanted less than the job's time. "
        "Set --engine.start-minutes to less: a rank that does not come ends the others after it.",
    ),
    "a checkpoint that the notice is too short for": (
        ["--signal-seconds", "1"],
        "--signal-seconds 1 for a checkpoint of 0 MiB: 1 s; wanted 2 or more. "
        "Set --signal-seconds 2 (and leave time for a step), or choose a faster disk.",
    ),
    "a folder with a character that SLURM reads": (
        ["--run", "RUN%j"],
        "run folder RUN%j has '%' in its path; wanted none of % : \\ (SLURM and PYTHONPATH read them otherwise). "
        "Choose another with --run.",
    ),
    "fewer subjects than ranks": (["--nodes", "4", "--ranks-per-node", "2"], "batch_size 6"),
    "no nodes": (["--nodes", "0"], "--nodes 0; wanted 1 or more. Set it to that, or leave it out."),
    "no ranks": (["--ranks-per-node", "0"], "--ranks-per-node 0; wanted 1 or more. Set it to that, or leave it out."),
    "a negative number": (
        ["--gpus-per-node", "-1"],
        "--gpus-per-node -1; wanted 0 or more. Set it to that, or leave it out.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_no_run_folder(slurm: Slurm, submit: Launch, tmp_path: Path, case: str) -> None:
    words, wanted = REFUSED[case]
    run = tmp_path / "runs" / "mine"
    done = submit("--run", run, *(word.replace("RUN", str(run)) for word in words))
    assert done.code == 2
    assert done.err.startswith(f"error: {wanted.replace('RUN', str(run))}")
    assert not run.parent.exists() or not list(run.parent.iterdir())
    assert not slurm.queue


def test_what_only_the_real_sbatch_refuses_leaves_no_run_folder(slurm: Slurm, submit: Launch, tmp_path: Path) -> None:
    slurm.has("full")
    done = submit("--run", tmp_path / "run")
    assert done.code == 2
    assert done.err == (
        "error: sbatch: QOSMaxSubmitJobPerUserLimit; Batch job submission failed: Job violates accounting/QOS policy "
        "(job submit limit, user's size and/or time limits); wanted what the partition allows. "
        "`scontrol show partition` says it.\n"
    )
    assert not (tmp_path / "run").exists()


TEST_ONLY = 'case " $* " in *" --test-only "*) exec "$SLURM" "$@" ;; esac'
UNCLEAR: dict[str, tuple[str, int, str]] = {
    "sbatch says what has no id in it": ("echo hello", 2, 'Could not make sense of sbatch output "hello"'),
    "its socket timed out": (
        "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1",
        2,
        "sbatch: Socket timed out on send/recv operation",
    ),
    "sbatch is killed": ("kill -KILL $$", 2, "sbatch was ended by signal 9"),
    "the id cannot be noted": ("mkdir jobs.jsonl; echo 'Submitted batch job 41'", 2, "[Errno 21] Is a directory: '"),
    "ctrl-C": ("kill -INT $PPID", 130, ""),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_the_folder_of_a_job_that_may_be_queued_stays(slurm: Slurm, submit: Launch, tmp_path: Path, case: str) -> None:
    line, code, words = UNCLEAR[case]
    slurm.instead("sbatch", TEST_ONLY, '"$SLURM" "$@" > /dev/null', line)
    run = tmp_path / "run"
    done = submit("--run", run)
    name = slurm.queue["41"]["name"]
    assert done.code == code
    assert (run / "config.json").exists()
    look = f"he job may be queued: `squeue --name {name}` (its folder stays)"
    if code == 2:
        assert done.err.startswith(f"error: sbatch was given {name}, then: {words}")
        assert done.err.endswith(f"; wanted an id that could be noted. T{look}.\n")
    assert look in done.out + done.err


def test_a_name_with_blanks_is_quoted_where_it_is_to_be_looked_for(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"`squeue --name 'a b'`"), submits.handed("a b", print, lambda: None):
        raise OSError


def test_a_store_that_a_site_s_nodes_do_not_see_is_refused(
    slurm: Slurm, submit: Launch, store: Path, site: Path, tmp_path: Path
) -> None:
    site.write_text(f'shared = ["{tmp_path}"]\n')
    done = submit("--run", tmp_path / "run")
    assert done.code == 2
    assert done.err == (
        f"error: store {store}; wanted a place that all nodes see: {tmp_path.resolve()}. "
        "Copy it there and set --data.store, or mend `shared` in the site file.\n"
    )
    assert not (tmp_path / "run").exists()
    site.write_text("")
    assert submit("--run", tmp_path / "run").code == 0


def test_a_store_behind_a_url_is_seen_from_everywhere(tmp_path: Path) -> None:
    run = recipes.get("demo_cauc")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, store="s3://bucket/store.zarr"))
    submits.check_place(run, Site(shared=(str(tmp_path),)))


def test_without_sbatch_the_local_run_is_offered(no_slurm: None, submit: Launch, tmp_path: Path) -> None:
    done = submit("--run", tmp_path / "run")
    assert (done.code, done.err) == (
        2,
        "error: no sbatch on this machine; wanted a login node of a SLURM cluster. Go there, or train here: "
        "`cauc train RECIPE --ranks N`; --dry-run shows the script anywhere.\n",
    )


def test_the_run_folder_of_a_live_job_is_taken(slurm: Slurm, submit: Launch, folder: Callable[..., Folder]) -> None:
    run = folder().job("41")
    slurm.set("41", name=run.name, state="RUNNING", nodes="n[1-2]")
    done = submit("--run", run.path)
    assert done.code == 2
    assert done.err == (
        f"error: run folder {run.path} is taken: job 41 is RUNNING on n[1-2]; wanted a new one. "
        "Choose another with --run.\n"
    )
    run.attempt("41", "failed 3")
    slurm.ends("41", "FAILED")
    done = submit("--run", run.path)
    assert done.err == (
        f"error: run folder {run.path} exists already, its job 41 is FAILED; wanted a new one. "
        f"Go on with it by `python -m launch resume {run.path}`, or choose another with --run.\n"
    )


def test_a_run_folder_that_a_site_s_nodes_do_not_see_is_refused(
    slurm: Slurm, submit: Launch, store: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    done = submit("--run", elsewhere / "run")
    assert done.code == 2
    assert done.err == (
        f"error: run folder {elsewhere}/run; wanted a place that all nodes see: {tmp_path.resolve()}, {store.parent}. "
        "Choose another with --run, or mend `shared` in the site file.\n"
    )


def test_a_run_folder_in_memory_is_refused_without_a_site_too(slurm: Slurm, launch: Launch) -> None:
    assert submits.file_system(Path("/dev/shm")) == "tmpfs"
    done = launch("submit", "demo_cauc", "--run", "/dev/shm/of-this-machine/run")
    assert done.code == 2
    assert done.err == (
        "error: run folder /dev/shm/of-this-machine/run on a file system of this machine alone (tmpfs); "
        "wanted one that all nodes see. Choose another with --run, or name it in `shared` of the site file.\n"
    )


def test_a_place_that_is_not_to_be_written_is_refused(
    slurm: Slurm, submit: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access  # root may write everywhere
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK and access(path, mode))
    done = submit("--run", tmp_path / "run")
    assert done.err == f"error: {tmp_path} is not to be written; wanted a folder of yours. Choose another with --run.\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["submti"], "no command 'submti'; wanted a command. Did you mean submit or resume?"),
        (["submit"], "`launch submit` without a recipe; wanted "),
        (["submit", "demo_cuac"], "no recipe"),
    ],
)
def test_a_mistyped_command_is_answered(launch: Launch, words: list[str], wanted: str) -> None:
    done = launch(*words)
    assert done.code == 2
    assert wanted in done.err


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = (
        "import sys; from launch.cli import COMMANDS, main; main([]);"
        "sys.exit(bool({'torch', 'zarr', 'submitit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("submit", "status", "logs", "cancel", "resume", "sweep", "ingest"):
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("command", ["submit", "status", "logs", "cancel", "resume"])
def test_every_command_explains_its_options(launch: Launch, command: str) -> None:
    done = launch(command, "--help")
    assert done.code == 0
    assert f"usage: python -m launch {command}" in done.out


def test_a_job_trains_the_snapshot_saves_when_asked_and_goes_on_when_started_again(
    slurm: Slurm, submit: Launch, launch: Launch, tmp_path: Path
) -> None:
    run = tmp_path / "it's a run"
    assert submit("--run", run, "--engine.start-minutes", "1").code == 0
    code = run / "snapshot" / "cauc_dist" / "job.py"
    code.write_text(
        code.read_text().replace("def work(run: str) -> int:", 'print("from", __file__)\n\n\ndef work(run):')
    )
    slurm.has("asks")
    slurm.start("41", MASTER_ADDR="elsewhere", RANK="5")
    first = run / "attempts" / "001"
    assert (first / "end").read_text() == "again stopped step-00000001\nrequeued\n"
    assert f"from {code}" in (first / "rank-0.log").read_text()
    (now,) = json.loads(launch("status", run, "--json").out)
    assert (now["state"], now["step"], now["steps"], now["restarts"]) == ("REQUEUED", 1, 3, 0)
    assert slurm.start("41").returncode == 0
    assert slurm.queue["41"]["state"] == "RUNNING"
    slurm.ends("41", "COMPLETED")
    (now,) = json.loads(launch("status", run, "--json").out)
    assert (now["state"], now["step"], now["restarts"], now["source"]) == ("COMPLETED", 3, 1, "attempts")
    assert [e["event"] for e in journal.read(run) if e["event"] != "step"] == (
        ["start", "checkpoint", "stopped", "resume", "checkpoint", "end"]
    )
    assert "step-00000003" in str(sorted((run / "checkpoints").iterdir())[-1])
    assert "from" in launch("logs", run).out
    refused = launch("resume", run)
    assert refused.err == (
        f"error: {run} is complete: 3 of 3 steps; wanted a run with steps left. "
        f"Train it anew by `python -m launch submit {run}/config.json --run ANOTHER`.\n"
    )
