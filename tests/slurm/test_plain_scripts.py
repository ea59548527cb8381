"""The batch scripts for sites without submitit, as a user would start them, on the real cluster."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

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


def queued(cluster: Cluster, script: str, run: Path, nodes: int, ranks: int, **env: str) -> str:
    """The job's id. Its options are given by hand: with those of the script no node would do."""
    asked = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", "--cpus-per-task=1", "--mem=900", "--time=10"]
    log = f"--output={run}/batch.log"
    return cluster.run("sbatch", "--parsable", *asked, log, f"slurm/{script}.sbatch", run, **SHELL | env).strip()


def verdicts(run: Path) -> list[str]:
    return [path.read_text().strip() for path in sorted(run.glob("attempts/*/end"))]


def told(run: Path) -> str:
    paths = [run / "batch.log", *sorted(run.glob("attempts/*/rank*.log"))]
    return "\n".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in paths if path.exists())


def begun(run: Path) -> bool:
    return any(event["event"] == "step" for event in journal.read(run))


def has_open(path: Path) -> bool:
    """Whether a process, not this one, does."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.parts[2] != str(os.getpid()) and link.readlink() == path:
                return True
        except OSError:
            continue
    return False


def test_the_plain_scripts_train_as_local_ranks_and_go_on_when_their_time_is_over(
    cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    """By srun as a new job, there being no scontrol, by mpirun as the same one, once the lock of its run is free."""
    by_srun, by_mpirun = prepared(cluster, "by srun", 4), prepared(cluster, "by mpirun", 4)
    path = f"{sys.prefix}/bin:{cluster.without_scontrol()}"
    cluster.slow()  # 60 steps are to last longer than it takes both to begin
    first_job = queued(cluster, "train-srun", by_srun, nodes=2, ranks=2, PATH=path)
    job = queued(cluster, "train-mpirun", by_mpirun, nodes=2, ranks=2)
    for run in (by_srun, by_mpirun):
        wait_for(lambda run=run: begun(run), 120, lambda run=run: told(run))
    cluster.run("scancel", "--signal=USR2", first_job)  # as SLURM does 120 s before the end: --signal=USR2@120
    cluster.run("scancel", "--batch", "--signal=USR2", job)  # ... --signal=B:USR2@120
    wait_for(lambda: verdicts(by_mpirun), 60, lambda: told(by_mpirun))
    cluster.slow("none")
    with (by_mpirun / "lock").open() as lock:  # as a rank 0 would that lives on, on a node that was cut off
        fcntl.flock(lock, fcntl.LOCK_EX)
        wait_for(lambda: has_open(by_mpirun / "lock"), 60, lambda: told(by_mpirun))
        time.sleep(1)  # a first start gives up after half a second
        free = time.time()
    for run in (by_srun, by_mpirun):
        wait_for(lambda run=run: verdicts(run)[-1:] == ["done"], 120, lambda run=run: told(run))
    again = (by_srun / "resubmitted").read_text().strip()
    assert [text.partition("\n")[2] for text in verdicts(by_srun)] == [f"resubmitted as {again}", ""]
    assert (by_srun / "attempts" / "002" / "job").read_text().startswith(f"id={again}\n")
    first, last = verdicts(by_mpirun)
    assert first.startswith("again stopped step-")
    assert first.endswith("\nrequeued")
    assert last == "done"
    (resumed,) = [event for event in journal.read(by_mpirun) if event["event"] == "resume"]
    assert first.split()[2] == f"step-{resumed['step']:08d}"
    assert (resumed["launcher"], resumed["ranks"]) == ("mpi", 4)
    assert resumed["time"] > free
    assert losses(by_mpirun) == undisturbed
    assert losses(by_srun) == undisturbed
    assert "stopped by SIGUSR2" in (by_mpirun / "attempts" / "001" / "ranks.log").read_text()
    assert [path.read_text() for path in sorted(by_srun.glob("attempts/002/rank-*.exit"))] == ["0\n"] * 4


def test_a_plain_script_without_a_run_says_how_it_is_called(cluster: Cluster) -> None:
    for name in ("train-srun", "train-mpirun"):
        log = cluster.folder / f"{name}.log"
        job = cluster.run("sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=100",
                          f"--output={log}", f"slurm/{name}.sbatch").strip()  # fmt: skip
        wait_for(lambda job=job: job not in cluster.run("squeue", "-h", "-o", "%i").split(), 30, "the end of the job")
        assert f"usage: sbatch slurm/{name}.sbatch RUN" in log.read_text()
