"""What a job asks SLURM for, and what a cluster needs to be told: one TOML file a site.

Imports no torch.
"""

import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cauc_dist.config import typed
from cauc_dist.errors import BadInput

SITES = Path(__file__).parent / "sites"
TIMES = (
    (r"(?P<m>\d+)", "MM"),
    (r"(?P<m>\d+):(?P<s>\d+)", "MM:SS"),
    (r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)", "HH:MM:SS"),
    (r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?", "D-HH[:MM[:SS]]"),
)


@dataclass(frozen=True)
class Resources:
    """What a job asks SLURM for."""

    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    """Default: a rank a GPU; without GPUs one a node."""
    cpus_per_rank: int = 1
    mem_gb: float | None = None
    """A node; default: what the partition gives."""
    time: str = "1:00:00"
    """As SLURM has it: MM, HH:MM:SS, D-HH. Before it is over the run saves, and the job is requeued."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """Nodes to leave out, e.g. n[3-4]."""
    nodelist: str | None = None
    signal_seconds: int = 120
    """Before the end of `time` the ranks are asked to save and stop: the time of a step and of a checkpoint."""
    max_tries: int = 3
    """Starts without a new checkpoint between, after which a job that was stopped or has crashed is given up."""
    requeue_on: tuple[int, ...] = (5, 6, 134, 135, 137, 139)
    """Exit codes of a rank after which the job is tried again: stopped, a peer gone, ended by a signal."""

    @property
    def ranks_a_node(self) -> int:
        """Tasks that srun starts on a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """The world size."""
        return self.nodes * self.ranks_a_node

    @property
    def minutes(self) -> int:
        """`time` in minutes, rounded up; BadInput where it is none."""
        found = next((found for pattern, _ in TIMES if (found := re.fullmatch(pattern, self.time))), None)
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        seconds = sum(int(n) * units[unit] for unit, n in found.groupdict().items() if n) if found else 0
        if seconds == 0:
            forms = ", ".join(form for _, form in TIMES)
            raise BadInput(f"--time {self.time}", wanted=forms, do="e.g. --time 20:00:00 for twenty hours")
        return math.ceil(seconds / 60)


@dataclass(frozen=True)
class Container:
    """An image in which the ranks run; the batch script stays outside it."""

    kind: Literal["apptainer", "pyxis"]
    image: str
    mounts: tuple[str, ...] = ()
    """HOST:INSIDE; the run folder and the store must be seen at the paths that they have outside."""
    options: tuple[str, ...] = ()
    """Further words for `apptainer exec`, or for srun (pyxis)."""


@dataclass(frozen=True)
class Site:
    """A cluster."""

    resources: Resources = field(default_factory=Resources)
    """Defaults of the command line."""
    shared: tuple[str, ...] = ()
    """Folders that every node sees; run folders and stores must lie in one of them. (): not checked."""
    python: str | None = None
    """Interpreter of the jobs, with the dependencies; default: the one that submits; in a container, `python`."""
    modules: tuple[str, ...] = ()
    """`module load` each, after `module purge`."""
    setup: tuple[str, ...] = ()
    """Lines of bash before the ranks are started."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, e.g. NCCL_SOCKET_IFNAME."""
    keep: tuple[str, ...] = ()
    """Names (or globs) of variables of the submitting shell that the job has too; most are left behind."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, by their long names: hint = "nomultithread"."""
    srun: tuple[str, ...] = ()
    """Further words for srun."""
    container: Container | None = None


def read(name: str | None) -> Site:
    """The site of a TOML file, or of launch/sites/NAME.toml; without a name: a cluster that needs no telling."""
    if name is None:
        return Site()
    path = Path(name) if name.endswith(".toml") else SITES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SITES.glob("*.toml")))
        raise BadInput(
            f"no site file {path}", wanted=f"a TOML file, or one of {known}", do="see launch/sites/example.toml"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML ({error})", wanted="a site file", do="mend it") from None
    return typed(values, Site, str(path))
