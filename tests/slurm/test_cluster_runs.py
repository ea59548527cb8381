"""Runs on the real cluster: how they begin, where from, and how a time limit, a crash and scancel end an attempt."""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cauc_dist import checkpoint
from cauc_dist.config import from_json
from cauc_dist.store.reader import Store
from cauc_dist.train import card
from tests.slurm.conftest import ROOT, SCRIPT, STEPS, Cluster, Run, requeued, states, wait_for, watched

OTHER_LAUNCHERS = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7"}


def test_two_nodes_of_two_ranks_train_as_four_local_ranks_whatever_the_shell_and_the_path(
    cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    before = cluster.traffic()
    run = cluster.submit("it's a run", env=OTHER_LAUNCHERS)
    run.wait(120)
    after = cluster.traffic()
    assert run.verdicts() == ["done"]
    assert run.hosts() == ["n1", "n1", "n2", "n2"]
    assert len(undisturbed) == STEPS
    assert run.steps() == undisturbed  # to the last bit: gloo's order does not depend on where the ranks are
    (began,) = run.events("start")
    assert (began["ranks"], began["launcher"]) == (4, "slurm")
    # Gradient and embeddings cross once a step at least, both ways; nodes without ranks hear of nothing.
    crossed = {node: min(after[node][way] - before[node][way] for way in (0, 1)) for node in after}
    assert min(crossed["n1"], crossed["n2"]) > STEPS * 4 * began["parameters"]
    assert max(crossed["n3"], crossed["n4"]) < 1e5


def limit(cluster: Cluster, run: Run, rate: str) -> None:
    """The links of a run's nodes."""
    for node in run.nodes():
        cluster.rate(node, rate)


def near_its_limit(cluster: Cluster, run: Run) -> None:
    """Set a time limit that is over in 50 to 110 s. SLURM looks every 30 s, and then sends a signal that is due."""
    began = int(re.search(r"began=(\d+)", (run.attempts()[-1] / "job").read_text())[1])  # type: ignore[index]
    minutes = math.ceil((time.time() - began + 50) / 60)
    cluster.run("scontrol", "update", f"JobId={run.id}", f"TimeLimit={minutes}")


def far_from_it(cluster: Cluster, run: Run) -> None:
    """A requeued job keeps its limit, of which it would be told again: as soon as SLURM takes another one."""
    longer = ("scontrol", "update", f"JobId={run.id}", "TimeLimit=10")
    wait_for(lambda: cluster.run(*longer, check=False) == "", 60, run.told)


def stopped_for_the(time: int, run: Run) -> None:
    """Return when its ranks have saved and say so, before the job ends: the next attempt has not begun."""
    wait_for(lambda: len(run.events("stopped")) == time, 90, run.told)


@dataclass
class Late:
    """Two runs at the same time whose time is over: SLURM looks every 30 s only, and that is waited for once."""

    told: Run
    """Twice, well before the end."""
    deaf: Run
    """Once, at the end: its ranks do not hear the notice."""
    looks: dict[Path, list[dict[str, Any]]]


def deaf_site(cluster: Cluster) -> Path:
    """Ranks in which SIGUSR2 is blocked, as in a library's thread that waits."""
    folder = cluster.folder / "deaf"
    folder.mkdir()
    block = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\n"
    (folder / "sitecustomize.py").write_text(block)
    return cluster.site("deaf", setup=[f'export PYTHONPATH="$PYTHONPATH:{folder}"'])


@pytest.fixture(scope="module")
def late(slurm_cluster: Cluster) -> Late:
    cluster = slurm_cluster
    try:
        run = cluster.submit("limit", signal_seconds=115)  # due at once, when the limit is set
        wait_for(run.nodes, 60, run.told)
        limit(cluster, run, "2mbit")  # it is not to be over before the other one has begun
        deaf = cluster.submit("deaf", "--epochs", "120", site=deaf_site(cluster), nodes=2, ranks=1)
        wait_for(deaf.nodes, 60, deaf.told)
        limit(cluster, deaf, "4mbit")
        for one in (run, deaf):
            one.at_step(0)
        limit(cluster, run, "4mbit")  # 60 steps last longer than it takes SLURM to look twice
        limit(cluster, deaf, "12mbit")  # 360 last two minutes, and two of them less than KillWait, 5 s here
        with watched(run, deaf) as looks:
            for one in (run, deaf):
                near_its_limit(cluster, one)
            stopped_for_the(1, run)
            far_from_it(cluster, run)
            run.at_step(0, life=1)
            near_its_limit(cluster, run)
            stopped_for_the(2, run)
            far_from_it(cluster, run)
            wait_for(lambda: deaf.verdicts()[0], 150, deaf.told)
            far_from_it(cluster, deaf)
            cluster.slow("none")
            for one in (run, deaf):
                one.wait(120)
        return Late(run, deaf, looks)
    finally:
        cluster.mend()


def test_ranks_that_do_not_hear_the_notice_hear_the_end_itself_save_and_are_no_cancelled_run(late: Late) -> None:
    """squeue knows no time that is left then: %L is 0:00, or INVALID."""
    run = late.deaf
    (stopped,) = run.events("stopped")
    assert stopped["signal"] == signal.SIGTERM
    assert run.verdicts() == [f"again stopped {checkpoint.name_of(stopped['step'])}\nrequeued", "done"]
    assert "DUE TO TIME LIMIT" in run.batch_log()
    assert re.fullmatch(requeued(1), states(late.looks[run.folder])), states(late.looks[run.folder])
    assert [event["step"] for event in run.events("resume")] == [stopped["step"]]
    assert list(run.steps()) == list(range(360))


def test_a_run_whose_time_is_over_twice_is_requeued_twice_and_ends_as_if_it_had_never_been(
    late: Late, undisturbed: dict[int, float]
) -> None:
    run = late.told
    assert re.fullmatch(requeued(2), states(late.looks[run.folder])), states(late.looks[run.folder])
    first, second, last = run.verdicts()
    stopped = [event["step"] for event in run.events("stopped")]
    assert first == f"again stopped step-{stopped[0]:08d}\nrequeued"
    assert second == f"again stopped step-{stopped[1]:08d}\nrequeued"
    assert last == "done"
    assert 0 < stopped[0] < stopped[1] < STEPS
    assert [event["step"] for event in run.events("resume")] == stopped  # not one step was trained twice
    assert run.steps() == undisturbed
    assert len(run.ids) == 1
    assert [re.search(r"restarts=(\d)", (path / "job").read_text())[1] for path in run.attempts()] == ["0", "1", "2"]  # type: ignore[index]


def test_a_killed_rank_is_a_crash_from_which_the_run_goes_on_at_its_newest_checkpoint(
    cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    run = cluster.submit("crash", "--checkpoint.every-epochs", "2")
    run.at_step(0)
    cluster.slow()
    run.at_step(7)
    (host,) = set(run.hosts()[2:])
    with watched(run) as looks:
        cluster.run("kill", "-9", str(_inside(cluster, run, 3)))
        wait_for(lambda: run.verdicts()[0], 60, run.told)
        cluster.slow("none")  # no sooner: what waits in a slow link's queue is lost with it, a connection's end too
        run.wait(150)
    assert re.fullmatch(requeued(1), states(looks[run.folder])), states(looks[run.folder])
    assert run.verdicts() == ["again crashed step-00000006\nrequeued", "done"]
    assert [(path / "suspects").read_text().split() for path in run.attempts()[:1]] == [[host]]
    codes = {path.name: path.read_text().strip() for path in run.attempts()[0].glob("rank-*.exit")}
    assert codes == {"rank-0.exit": "6", "rank-1.exit": "6", "rank-2.exit": "6"}
    missed = [path.read_text().split() for path in run.attempts()[0].glob("rank-*.missing")]
    assert ["3"] in missed
    assert all(one in (["3"], ["0"]) for one in missed)  # of who comes late, rank 0's store is gone
    assert f"rank 3 (host {host}" in run.log(0, attempt=0)
    assert [event["step"] for event in run.events("resume")] == [6]
    assert run.steps() == undisturbed


def _inside(cluster: Cluster, run: Run, rank: int) -> int:
    """The pid of a rank as the login node sees it."""
    pid = run.pids()[rank]
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid"))
    return int(line.split()[2])


def test_scancel_leaves_a_checkpoint_of_the_last_step_and_the_run_is_not_begun_again(cluster: Cluster) -> None:
    run = cluster.submit("cancelled")
    run.at_step(0)
    cluster.slow("20mbit")  # SLURM waits 5 s here: for the step at hand, the next one and a checkpoint
    run.at_step(4)
    with watched(run) as looks:
        wait_for(lambda: Path(f"{run.folder}.status").read_text(), 30, "a first look")
        cluster.run("scancel", run.id)
        run.wait(60)
    assert re.fullmatch("RUNNING (COMPLETING )?CANCELLED", states(looks[run.folder])), states(looks[run.folder])
    assert run.verdicts() == ["cancelled"]
    (stopped,) = run.events("stopped")
    assert max(run.steps()) == stopped["step"] - 1 < STEPS - 1
    config = from_json((run.folder / "config.json").read_text())
    saved, complaints = checkpoint.latest(run.folder, card(config, Store.open(config.data.store)))
    assert complaints == []
    assert saved is not None
    assert saved.step == stopped["step"]
    said = cluster.run("sacct", "-n", "-P", "-X", "--duplicates", "-j", run.id, "-o", "State").split()
    assert said[0] == "CANCELLED"
    assert len([line for line in said if line.isupper()]) == 1  # a requeue would be a second one


def test_another_user_submits_from_inside_a_job_and_trains(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    folder = cluster.folder / "runs" / "inside"
    words = shlex.join(cluster.submission(folder, nodes=2, ranks=1))
    log = cluster.folder / "runs" / "outer.log"
    options = ["--parsable", "--wait", f"--output={log}", "--mem=500", "--cpus-per-task=2", "--time=5"]
    cluster.run("sbatch", *options, f"--wrap={words}", user="guest", check=False)
    assert (folder / "jobs.jsonl").exists(), log.read_text()
    run = Run(cluster, folder)
    run.wait(90)
    assert run.verdicts() == ["done"]
    assert len(run.steps()) == STEPS
    first = dict(list(undisturbed.items())[:12])  # 2 ranks add in another order than 4, and later steps amplify it
    assert dict(list(run.steps().items())[:12]) == pytest.approx(first, rel=1e-5)
    assert {path.stat().st_uid for path in folder.rglob("*")} == {int(cluster.run("id", "-u", user="guest"))}
    assert "guest" in cluster.run("sacct", "-n", "-P", "-X", "-j", run.id, "-o", "User")


def test_a_run_folder_that_only_one_node_sees_is_refused_and_nothing_is_queued(cluster: Cluster) -> None:
    untold = cluster.folder / "untold.toml"
    untold.write_text("")
    for folder, site, why in (
        (Path("/var/tmp/cauc-run"), cluster.folder / "tests.toml", "a place that all nodes see"),
        (Path("/dev/shm/cauc-run"), untold, "a file system of this machine alone (tmpfs)"),
    ):
        said = cluster.run(*cluster.submission(folder, site=site), check=False)
        assert why in said
        assert "Traceback" not in said
        assert not folder.exists()
    assert cluster.run("squeue", "-h") == ""


PROGRAMS = ("bash", "cat", "dirname", "env", "grep", "id", "ls", "readlink", "sed", "tr")


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (["start"], {"PATH": "few"}, "not installed: sbatch unshare nsenter setpriv"),
        (["start"], {"SITE": "a folder"}, "letters, digits and / . _ - only"),
        (["start"], {"SITE": "mine"}, "it would be removed"),
        (["start"], {"PRIVATE_TMP": "1", "SITE": "/tmp/cauc-none"}, "needs SITE and the work outside /tmp"),
        (["stop"], {}, "not started"),
        (["exec", "true"], {}, "not started"),
        (["begin"], {}, "no verb begin"),
    ],
)
def test_the_cluster_script_says_what_is_wrong_and_touches_nothing(
    words: list[str], env: dict[str, str], said: str, tmp_path: Path
) -> None:
    if os.getuid() or shutil.which("sinfo") is None:
        pytest.skip("it says first that it is not root, or what is not installed")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / "few").mkdir()
    for name in PROGRAMS:
        (tmp_path / "few" / name).symlink_to(shutil.which(name) or name)
    given = {key: str(tmp_path / value) if key in ("SITE", "PATH") else value for key, value in env.items()}
    done = _script(words, {"SITE": str(tmp_path / "new"), **given})
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr
    assert done.stderr.startswith("cluster.sh: ")
    assert (tmp_path / "mine" / "letter").read_text() == "dear"
    assert not (tmp_path / "new").exists()


def test_off_root_the_cluster_script_asks_for_root(tmp_path: Path) -> None:
    if os.getuid() or shutil.which("sinfo") is None:
        pytest.skip("it says first what is not installed; off root this is what every start says")
    done = _script(["start"], {"SITE": "/tmp/cauc-none"}, "setpriv", "--reuid=nobody", "--clear-groups")
    assert done.returncode == 1
    assert "it needs root" in done.stderr


def test_a_cluster_that_runs_is_not_started_again_and_knows_its_users(cluster: Cluster) -> None:
    assert "it runs already" in cluster.verb("start", check=False)
    for verb in ("kill", "cut", "heal", "on"):
        assert "no node n9" in cluster.verb(verb, "n9", check=False)
    assert "no user nobody-here" in cluster.verb("as", "nobody-here", "true", check=False)
    assert cluster.run("srun", "-N4", "hostname", user="guest").split().count("n3") == 1


def test_the_shell_scripts_are_clean_to_shellcheck() -> None:
    if shutil.which("shellcheck") is None and not os.environ.get("CI"):
        pytest.skip("no shellcheck")
    scripts = [SCRIPT, ROOT / "slurm" / "attempt.sh", ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *scripts], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout


def _script(words: list[str], env: dict[str, str], *before: str) -> subprocess.CompletedProcess[str]:
    command = [*before, "bash", str(SCRIPT), *words]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
