"""The batch scripts for sites without submitit, as a user would start them, on the real cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cauc_dist import journal
from tests.slurm.conftest import ENVIRONMENT, ROOT, TRAINING, Cluster, losses, wait_for

# Nodes of this cluster share a kernel: UCX, in MPICH, takes them for one host, and finds no shared memory there.
SHELL = {**ENVIRONMENT, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "UCX_TLS": "tcp,self"}


def prepared(cluster: Cluster, name: str, ranks: int) -> Path:
    """A run folder by `cauc train --no-start`."""
    run = cluster.folder / "runs" / name
    words = ["demo_cauc", "--data.store", str(cluster.store), "--run", str(run), *TRAINING, "--engine.device", "cpu"]
    start = [sys.executable, "-m", "cauc_dist", "train", *words, "--ranks", str(ranks), "--no-start"]
    done = subprocess.run(start, env={**os.environ, **ENVIRONMENT}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run


def queued(cluster: Cluster, script: str, run: Path, nodes: int, ranks: int) -> str:
    """The job's id."""
    asked = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", "--cpus-per-task=1", "--mem=900", "--time=10"]
    log = f"--output={run}/batch.log"
    return cluster.run("sbatch", "--parsable", *asked, log, f"slurm/{script}.sbatch", run, **SHELL).strip()


def verdicts(run: Path) -> list[str]:
    return [path.read_text().strip() for path in sorted(run.glob("attempts/*/end"))]


def told(run: Path) -> str:
    paths = [run / "batch.log", *sorted(run.glob("attempts/*/rank*.log"))]
    return "\n".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in paths if path.exists())


@pytest.mark.long
def test_the_plain_scripts_train_as_local_ranks_and_mpirun_s_saves_and_goes_on_when_its_time_is_over(
    cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    by_srun, by_mpirun = prepared(cluster, "by srun", 4), prepared(cluster, "by mpirun", 4)
    queued(cluster, "train-srun", by_srun, nodes=2, ranks=2)
    job = queued(cluster, "train-mpirun", by_mpirun, nodes=2, ranks=2)
    wait_for(lambda: any(e["event"] == "step" for e in journal.read(by_mpirun)), 120, lambda: told(by_mpirun))
    cluster.run("scancel", "--batch", "--signal=USR2", job)  # as SLURM does 120 s before the end: --signal=B:USR2@120
    for run in (by_srun, by_mpirun):
        wait_for(lambda run=run: verdicts(run)[-1:] == ["done"], 120, lambda run=run: told(run))
    assert verdicts(by_srun) == ["done"]
    first, last = verdicts(by_mpirun)
    assert first.startswith("again stopped step-")
    assert first.endswith("\nrequeued")
    assert last == "done"
    (resumed,) = [event for event in journal.read(by_mpirun) if event["event"] == "resume"]
    assert first.split()[2] == f"step-{resumed['step']:08d}"
    assert (resumed["launcher"], resumed["ranks"]) == ("mpi", 4)
    assert losses(by_mpirun) == undisturbed
    assert losses(by_srun) == undisturbed
    assert "stopped by SIGUSR2" in (by_mpirun / "attempts" / "001" / "ranks.log").read_text()
    assert [path.read_text() for path in sorted(by_srun.glob("attempts/001/rank-*.exit"))] == ["0\n"] * 4


def test_a_plain_script_without_a_run_says_how_it_is_called(cluster: Cluster) -> None:
    for name in ("train-srun", "train-mpirun"):
        log = cluster.folder / f"{name}.log"
        job = cluster.run("sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=100",
                          f"--output={log}", f"slurm/{name}.sbatch").strip()  # fmt: skip
        wait_for(lambda job=job: job not in cluster.run("squeue", "-h", "-o", "%i").split(), 30, "the end of the job")
        assert f"usage: sbatch slurm/{name}.sbatch RUN" in log.read_text()
