"""Whether SLURM is to be reached from this machine, by its own commands."""

import shutil
import subprocess
from collections.abc import Iterator

from cauc_dist.doctor.finding import Finding

NEEDED = ("sbatch", "srun", "squeue", "scontrol")
SECONDS = 10.0
DO = "go to a login node, or see whether SLURM_CONF names this cluster's slurm.conf; runs on this machine need no SLURM"


def reach() -> Iterator[Finding]:
    """Its version, and whether its controller answers."""
    there = [name for name in NEEDED if shutil.which(name)]
    absent = [name for name in NEEDED if name not in there]
    if not there:
        yield Finding("slurm", "ok", "not on this machine: no sbatch, no srun")
        return
    if absent:
        do = f"load the module that brings all of SLURM; {', '.join(there)} alone submits nothing"
        yield Finding("slurm", "fail", f"{', '.join(absent)} not on PATH", do)
        return
    code, version = _ask("squeue", "--version")
    if code:
        yield Finding("slurm", "fail", f"squeue --version: {version}", DO)
        return
    code, said = _ask("scontrol", "ping")
    if code or "UP" not in said.split():
        yield Finding("slurm", "fail", f"{version}; scontrol ping: {said}", DO)
        return
    yield Finding("slurm", "ok", f"{version}; {said}")


def _ask(*command: str) -> tuple[int, str]:
    """Exit code and words, on one line; 124 where no answer comes, as `timeout` has it."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {SECONDS:g} s"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return done.returncode, "; ".join(lines[-2:]) or f"exit code {done.returncode} without a word"
