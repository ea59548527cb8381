"""What clusters do to runs, done on a real one: preemption, lost nodes, slow links, a bad node, a missing scontrol.

Each run must end with the losses of one that nothing happened to, and `launch status` must be right all the while.
"""

import json
import os
import re
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cauc_dist import checkpoint, journal
from tests.faults import FULL
from tests.slurm.conftest import FIRST_START, Cluster, Run, requeued, states, wait_for, watched

LONG = ("--epochs", "40", "--checkpoint.every-epochs", "10")
"""120 steps, a checkpoint each 30: time for something to happen between two of them."""
TWO = {"nodes": 2, "ranks": 1}
END = "(COMPLETING )?COMPLETED"


@pytest.fixture(scope="session")
def whole(slurm_cluster: Cluster) -> dict[int, float]:
    """Loss by step of a run that nothing happens to, on 2 local ranks."""
    curve = slurm_cluster.local(2, *LONG)
    assert list(curve) == list(range(120))
    return curve


def rank_on(run: Run, node: str) -> int:
    """The pid, as the host sees it, of the rank that runs on a node."""
    wait_for(lambda: len(run.hosts()) == len(run.pids()) == 2, 30, run.told)
    return run.pids()[run.hosts().index(node)]


def shares(run: Run) -> list[float]:
    """Of each life of a run, the median share of a step that communication takes."""
    lives: list[list[float]] = []
    for event in map(json.loads, (run.folder / journal.FILE).read_text().splitlines()):
        if event["event"] in journal.BEGINNINGS:
            lives.append([])
        elif "communication_share" in event:
            lives[-1].append(event["communication_share"])
    return [statistics.median(life) for life in lives]


def test_a_preempted_run_saves_waits_and_goes_on_within_the_grace_time_and_without_one(
    cluster: Cluster, whole: dict[int, float]
) -> None:
    """Its third life is on slow links: the journal says how much of a step they take."""
    run = cluster.submit("preempted", *LONG, **TWO)
    urgent = ("sbatch", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    with watched(run) as looks:
        run.at_step(35)
        cluster.run(*urgent)
        run.at_step(60, life=1)
        cluster.run("scontrol", "update", "partitionname=main", "gracetime=0")
        try:
            cluster.run(*urgent)
            wait_for(lambda: len(run.verdicts()) == 2 and run.verdicts()[1], 30, run.told)
        finally:
            cluster.run("scontrol", "update", "partitionname=main", "gracetime=15")
        rate(cluster, "100mbit")
        run.wait(90)
    first, second = [event["step"] for event in run.events("stopped")]
    assert 35 < first <= second
    assert [event["step"] for event in run.events("resume")] == [first, second]
    assert run.verdicts() == [
        f"again stopped {checkpoint.name_of(first)}\nrequeued",
        f"again stopped {checkpoint.name_of(second)}\nrequeued by SLURM itself",
        "done",
    ]
    assert run.ids == [run.id], "a requeued job keeps its id"
    assert run.steps() == whole
    full, _, slow = shares(run)
    assert slow > 2 * full, (full, slow)
    assert re.fullmatch(requeued(2), states(looks[run.folder])), states(looks[run.folder])
    waiting = next(look for look in looks[run.folder] if look["state"] == "REQUEUED")
    assert f"stopped, newest checkpoint {checkpoint.name_of(first)}" in waiting["reason"]
    assert looks[run.folder][-1]["restarts"] == 2


@dataclass
class Lost:
    """Two runs at the same time, each of which loses a node: the waiting is long, and done once."""

    cut: Run
    off: Run
    nodes: dict[str, list[str]]
    """Of the two runs, before: the batch script's node first."""
    looks: dict[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lost(slurm_cluster: Cluster) -> Lost:
    cluster = slurm_cluster
    cut = cluster.submit("cut", *LONG, **TWO)
    wait_for(cut.nodes, 30, cut.told)
    rate(cluster, "2mbit")  # so that it does not end before the other one has begun
    # What is left of the first run's nodes is taken, so that the second one is on others.
    taken = ("sbatch", "--parsable", "-w", ",".join(cut.nodes()), "-N2", "--ntasks-per-node=1", "--mem=900")
    blocker = cluster.run(*taken, "-o", "/dev/null", "--wrap", "sleep 300").strip()
    off = cluster.submit("off", *LONG, **TWO)
    try:
        with watched(cut, off) as looks:
            wait_for(off.nodes, 30, off.told)
            nodes = {"cut": cut.nodes(), "off": off.nodes()}
            cluster.run("scancel", blocker)
            off.at_step(1)
            rate(cluster, "20mbit")
            for run in (cut, off):
                run.at_step(31)
            cluster.cut(nodes["cut"][1])
            cluster.kill(nodes["off"][0])
            rate(cluster, "none")
            for run in (cut, off):
                run.wait(150)
        return Lost(cut, off, nodes, looks)
    finally:
        cluster.mend()


def rate(cluster: Cluster, limit: str) -> None:
    """Of every link."""
    for node in cluster.states():
        cluster.verb("rate", node, limit, check=False)  # one may be off


def lost_a_node(run: Run, node: str, looks: list[dict[str, Any]], whole: dict[int, float]) -> None:
    """Requeued by SLURM alone, finished on other nodes, never called failed."""
    assert len(run.attempts()) == 2, run.told()
    assert run.verdicts()[0] == "" or run.verdicts()[0].endswith("requeued by SLURM itself")
    assert run.verdicts()[1] == "done"
    assert node in run.hosts(0)
    assert node not in run.hosts(1)
    assert run.ids == [run.id]
    assert [event["step"] for event in run.events("resume")] in ([30], [60], [90])
    assert run.steps() == whole
    expected = FIRST_START + "(COMPLETING )?(REQUEUED )(COMPLETING REQUEUED )*RUNNING " + END
    assert re.fullmatch(expected, states(looks)), states(looks)
    assert looks[-1]["restarts"] == 1


def test_a_run_whose_node_loses_its_link_finishes_on_others(lost: Lost, whole: dict[int, float]) -> None:
    lost_a_node(lost.cut, lost.nodes["cut"][1], lost.looks[lost.cut.folder], whole)


def test_a_run_whose_first_node_is_powered_off_finishes_on_others(lost: Lost, whole: dict[int, float]) -> None:
    lost_a_node(lost.off, lost.nodes["off"][0], lost.looks[lost.off.folder], whole)
    assert lost.off.hosts(0)[0] == lost.nodes["off"][0], "rank 0 was not on the node that was powered off"


if FULL:  # two minutes, most of it waiting: `make faults` runs it

    def test_a_run_whose_first_node_is_cut_off_waits_for_the_rank_that_lives_on_there_with_its_lock(
        cluster: Cluster, whole: dict[int, float]
    ) -> None:
        run = cluster.submit("orphan", *LONG, "--engine.timeout-minutes", "1.2", **TWO)
        run.at_step(1)
        rate(cluster, "20mbit")
        run.at_step(35)
        cluster.cut(run.nodes()[0])
        cut = time.time()
        with watched(run) as looks:
            wait_for(lambda: len(run.attempts()) == 2, 120, run.told)
            rate(cluster, "none")
            run.wait(180)
        assert run.verdicts() == ["", "done"]
        began = int(dict(line.split("=") for line in (run.attempts()[1] / "job").read_text().split())["began"])
        (resumed,) = run.events("resume")
        assert began < cut + 72 < resumed["time"], "it had nothing to wait for"
        lost_a_node(run, run.hosts(0)[0], looks[run.folder], whole)


def test_a_node_on_which_a_rank_was_killed_twice_is_left_out_and_so_are_the_users(
    cluster: Cluster, whole: dict[int, float]
) -> None:
    run = cluster.submit("bad-node", *LONG, exclude="n4", **TWO)
    run.at_step(35)
    bad = run.hosts()[1]
    os.kill(rank_on(run, bad), signal.SIGKILL)
    run.at_step(65, life=1)
    assert bad in run.hosts(), "SLURM took another node: this test needs the same one"
    os.kill(rank_on(run, bad), signal.SIGKILL)
    wait_for((run.folder / "resubmitted").exists, 60, run.told)
    first, again = run.ids
    listed = cluster.run("scontrol", "show", "job", again)
    assert f"Dependency=afterany:{first}" in listed or "JobState=RUNNING" in listed, listed
    run.wait(90)
    assert run.verdicts() == [
        "again crashed step-00000030\nrequeued",
        f"again crashed step-00000060\nresubmitted as {again} without {bad}",
        "done",
    ]
    assert [path.read_text().split() for path in sorted(run.folder.glob("attempts/*/suspects"))] == [[bad], [bad]]
    assert not {bad, "n4"} & set(run.hosts())
    pickles = [run.folder / "slurm" / f"{id}_submitted.pkl" for id in run.ids]
    assert pickles[0].samefile(pickles[1])
    assert run.steps() == whole


def test_without_scontrol_on_the_nodes_a_run_is_resubmitted_and_given_up_where_it_makes_no_progress(
    cluster: Cluster, whole: dict[int, float]
) -> None:
    site = cluster.site("without-scontrol", environment={"PATH": str(cluster.without_scontrol())})
    run = cluster.submit("without-scontrol", *LONG, site=site, max_tries=2, **TWO)
    for life in range(2):  # in another place of the same thirty steps, on another node
        run.at_step(35 + life, life=life)
        os.kill(rank_on(run, run.hosts()[life]), signal.SIGKILL)
        wait_for(lambda life=life: run.verdicts()[life:] and run.verdicts()[life], 60, run.told)  # type: ignore[misc]
    run.wait(60)
    again = run.ids[1]
    assert run.verdicts() == [
        f"again crashed step-00000030\nresubmitted as {again}",
        "again crashed step-00000030\ngiven up: 2 times without a new checkpoint",
    ]
    assert (run.attempts()[1] / "job").read_text().startswith(f"id={again}\n")
    (now,) = json.loads(cluster.run(sys.executable, "-m", "launch", "status", run.folder, "--json"))
    assert now["state"] == "FAILED"
    assert "given up: 2 times without a new checkpoint; crashed, newest checkpoint step-00000030" in now["reason"]
    cluster.run(sys.executable, "-m", "launch", "resume", run.folder)
    run.wait(60)
    assert run.verdicts()[2:] == ["done"]
    assert len(run.ids) == 3
    assert run.steps() == whole


def test_an_id_that_a_fresh_cluster_gives_to_another_job_says_nothing_of_the_run_that_had_it(cluster: Cluster) -> None:
    """Neither while squeue lists that job nor when the accounting remembers how it ended."""
    folder = cluster.folder / "runs" / "of-old"
    id = cluster.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 60").strip()
    cluster.run(sys.executable, "-m", "cauc_dist", "train", *recipe(cluster, folder), "--no-start")
    (folder / "jobs.jsonl").write_text(json.dumps({"time": 0, "id": id, "name": "demo_cauc-00000000"}) + "\n")

    def state() -> str:
        (now,) = json.loads(cluster.run(sys.executable, "-m", "launch", "status", folder, "--json"))
        return str(now["state"])

    wait_for(lambda: cluster.run("squeue", "-h", "-j", id, "-o", "%T").strip() == "RUNNING", 30, "a running job")
    assert state() == "GONE"
    cluster.run("scancel", id)
    wait_for(lambda: "CANCELLED" in cluster.run("sacct", "-n", "-X", "-j", id, "-o", "State"), 30, "sacct's word")
    assert state() == "GONE"


def recipe(cluster: Cluster, folder: Path) -> list[str]:
    return ["demo_cauc", "--data.store", str(cluster.store), "--run", str(folder)]


def test_a_sweep_with_a_poisoned_member_names_it_finishes_the_others_and_a_rerun_runs_that_one(
    cluster: Cluster,
) -> None:
    """The last task, whose own id is the array's, loses its rank on the way: it alone is requeued."""
    poisoned = cluster.folder / "poisoned.zarr"
    shutil.copytree(cluster.store, poisoned)
    chunk = max((path for path in poisoned.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    sound = chunk.read_bytes()
    chunk.write_bytes(bytes(len(sound)))
    short = {"epochs": 20, "batch_size": 16, "data.folds": 1, "checkpoint.every_epochs": 5, "encoder.width": 4}
    members = [
        {"name": f"seed-{i}", "recipe": "demo_cauc", "overrides": {**short, "data.store": str(store), "seed": i}}
        for i, store in enumerate([cluster.store] * 2 + [poisoned] + [cluster.store] * 3)
    ]
    manifest = cluster.folder / "manifest.json"
    manifest.write_text(json.dumps(members))
    sweep = cluster.folder / "runs" / "sweep"
    asked = ["--site", str(cluster.folder / "tests.toml"), "--time", "10", "--mem-gb", "0.9", "--signal-seconds", "20"]
    cluster.run(sys.executable, "-m", "launch", "sweep", "--manifest", manifest, "--run", sweep, *asked)
    runs = [Run(cluster, sweep / f"{i:03d}-seed-{i}") for i in range(6)]
    runs[5].at_step(16)
    os.kill(rank_of(runs[5]), signal.SIGKILL)
    for run in runs:
        run.wait(120)
    assert [run.verdicts() for run in runs[:2] + runs[3:5]] == [["done"]] * 4
    assert runs[2].verdicts() == ["failed 2"]
    assert runs[5].verdicts() == ["again crashed step-00000015\nrequeued", "done"]
    found = json.loads(cluster.run(sys.executable, "-m", "launch", "status", sweep, "--json"))
    assert [look["state"] for look in found] == ["COMPLETED"] * 2 + ["FAILED"] + ["COMPLETED"] * 3
    assert found[2]["reason"].startswith("bad input: ")
    assert str(poisoned) in found[2]["reason"]
    chunk.write_bytes(sound)
    cluster.run(sys.executable, "-m", "launch", "sweep", "--rerun", sweep)
    runs[2].wait(60)
    assert runs[2].verdicts() == ["failed 2", "done"]
    assert [len(run.attempts()) for run in runs] == [1, 1, 2, 1, 1, 2]
    assert [len(run.ids) for run in runs] == [1, 1, 2, 1, 1, 1]


def rank_of(run: Run) -> int:
    """The pid of a run's one rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"cauc_dist.job" not in words and b"submitit.core._submit" not in words:
                continue
            if (path / "cwd").readlink() == run.folder and b"slurmstepd" in parent(path):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(run.told())


def parent(path: Path) -> bytes:
    above = (path / "stat").read_text().rsplit(")", 1)[1].split()[1]
    return Path(f"/proc/{above}/cmdline").read_bytes()
