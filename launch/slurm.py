"""SLURM's own commands, and what they say."""

import contextlib
import fnmatch
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cauc_dist.errors import BadInput, nearest

KEPT = (
    "HOME", "USER", "LOGNAME", "SHELL", "PATH", "LD_LIBRARY_PATH", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM", "TMPDIR",
    "SLURM_CONF", "MODULE*", "LMOD_*", "__LMOD*", "BASH_ENV", "BASH_FUNC_*", "VIRTUAL_ENV", "CONDA_*", "SSL_CERT_*",
    "REQUESTS_CA_BUNDLE", "AWS_*", "S3_*", "CAUC_*",
)  # fmt: skip
"""Variables of the submitting shell that a job has, too. MASTER_ADDR, SLURM_* of a job that one submits from, thread
counts and the like stay behind."""
FIELDS = "%i|%T|%r|%N|%S|%j"
"""Of squeue; the name comes last, since it may hold anything."""
ACCESS = ("SLURM_CONF_SERVER", "SLURM_JWT")
"""What else SLURM's own commands may need, to reach it and to say who asks."""
PATIENCE = 60.0
"""Seconds that a command has to answer."""
LIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "STOPPED",
    "SIGNALING",
)


class Refused(BadInput):
    """SLURM has surely not taken what it was given."""


@dataclass(frozen=True)
class Job:
    """A line of squeue or sacct."""

    id: str
    """N, or N_K of an array."""
    name: str
    state: str
    reason: str = ""
    nodes: str = ""
    start: str = ""


def environment(keep: Sequence[str] = (), env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What of `env` a job is handed: KEPT, and what a site keeps."""
    names = (*KEPT, *keep)
    return {k: v for k, v in env.items() if any(fnmatch.fnmatchcase(k, name) for name in names)}


@contextlib.contextmanager
def only(env: Mapping[str, str]) -> Iterator[None]:
    """os.environ is `env`, and nothing else: submitit calls sbatch with what it finds there."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(env)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def required() -> None:
    """Refuse a machine without sbatch."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise BadInput(
            "no sbatch on this machine",
            wanted="a login node of a SLURM cluster",
            do="go there, or train here: `cauc train RECIPE --ranks N`; --dry-run shows the script anywhere",
        )


def call(*command: str, cwd: str | os.PathLike[str] | None = None, env: Mapping[str, str] | None = None) -> str:
    """What a command of SLURM prints, both its streams; BadInput with its words where it fails.

    `env`: default what a job gets, without the shell's SQUEUE_*, SACCT_*, SLURM_CLUSTERS: they hide jobs.
    """
    env = environment(ACCESS) if env is None else env
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
        )
    except OSError as error:
        raise Refused(f"{command[0]}: {error}", wanted="SLURM's commands", do="go to a login node") from None
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"{command[0]} gave no answer in a minute", wanted="a SLURM that answers", do="try again later"
        ) from None
    if done.returncode < 0:
        raise cut_off(command[0], -done.returncode)
    if done.returncode:
        raise refused(command[0], done.stdout)
    return done.stdout


def cut_off(command: str, signal: int) -> BadInput:
    """It may have done its work all the same."""
    return BadInput(f"{command} was ended by signal {signal}", wanted="its answer", do="try again later")


def refused(command: str, words: str) -> BadInput:
    """Why SLURM does not take a job, and what it would take: Refused, unless it may have taken it all the same."""
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in words.strip().splitlines()]
    found = f"{command}: {'; '.join(dict.fromkeys(lines)) or 'it failed without a word'}"
    text = words.lower()
    if "timed out" in text:  # of its socket: slurmctld may be at work on it
        return BadInput(found, wanted="a SLURM that answers", do="try again later")
    if "invalid partition" in text or "partition specified" in text:
        named = re.search(r"partition specified: (\S+)", words)
        return Refused(found, wanted="a partition", do=nearest(named[1] if named else "", partitions()))
    if "node count" in text or "node configuration" in text or "more processors" in text:
        return Refused(found, wanted="nodes that the partition has", do=f"it has {has()}")
    if "invalid account" in text:
        return Refused(found, wanted="an account that you may use", do="`sacctmgr show associations user=$USER`")
    if "qos" in text or "time limit" in text:
        return Refused(found, wanted="what the partition allows", do="`scontrol show partition` says it")
    return Refused(found, wanted="a job that SLURM takes", do="--dry-run shows the script")


def partitions() -> list[str]:
    """Names, those that sinfo lists."""
    return sorted({line.strip() for line in _lines("sinfo", "-h", "-o", "%R")})


def has() -> str:
    """What nodes there are, in sinfo's words: `main: 4 nodes of 2 cores, gpu:2`."""
    found = [line.split("|") for line in _lines("sinfo", "-h", "-o", "%R|%D|%c|%G")]
    return "; ".join(f"{p}: {n} nodes of {c} cores, {'no GPU' if g == '(null)' else g}" for p, n, c, g in found)


def queue(users: Iterable[int] = ()) -> list[Job]:
    """Jobs of these users, and of this one, that are not over; BadInput where squeue does not answer.

    -a: those in hidden partitions too.
    """
    said = call("squeue", "-h", "-a", "-r", "-u", ",".join(map(str, sorted({os.getuid(), *users}))), "-o", FIELDS)
    rows = [line.split("|", FIELDS.count("|")) for line in said.splitlines()]
    found = [row for row in rows if len(row) > FIELDS.count("|")]  # the others are warnings
    return [Job(id, name, state, reason, nodes, start) for id, state, reason, nodes, start, name in found]


def accounted(ids: Sequence[str]) -> list[Job]:
    """What the accounting remembers of some jobs; [] where there is none, or it does not answer."""
    lines = _lines("sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", "JobID,State%40,NodeList%200,JobName%200")
    found = [row for row in (line.split("|", 3) for line in lines) if len(row) == 4]
    return [Job(id, name, state.split()[0], nodes=nodes) for id, state, nodes, name in found if state]


def _lines(*command: str) -> list[str]:
    with contextlib.suppress(BadInput):
        return call(*command).splitlines()
    return []
