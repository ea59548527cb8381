"""Will cauc-dist run here? Versions, GPUs, network, a real handshake of ranks, memory, disk, SLURM, a store.

Each line stands for itself: what breaks one check, or makes it hang, is that check's own line. Nothing is changed on
the machine, and nothing is left behind.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from cauc_dist.doctor import disk, handshake, machine, network, slurm, software, stores
from cauc_dist.doctor.finding import Finding, Look

__all__ = ["Finding", "doctor"]

GPUS = Path("/dev/nvidiactl")


def doctor(store: str | None, folder: Path, ranks: int = 2, say: Callable[[str], None] = print) -> list[Finding]:
    """Every finding, each said as soon as it is known; those of state "fail" keep a run from working here.

    `store`: folder or URL of one to look at too. `folder`: where runs would be written; 256 MiB are, and removed.
    `ranks`: processes that greet each other on this machine.
    """
    quick = [
        Look("python", software.python, 5),
        Look("versions", software.versions, 10),
        Look("name", network.name, 10),
        Look("interfaces", network.interfaces, 5),
        Look("variables", network.variables, 5),
        Look("threads", lambda: machine.threads(ranks), 5),
        Look("shm", machine.shared_memory, 5),
        Look("files", machine.open_files, 5),
        Look("disk", lambda: disk.kind(folder), 20),
        Look("mpi", software.mpi, 25),
        Look("slurm", slurm.reach, 25),
    ]
    torch = Look("torch", software.imports, 120)
    meet = Look("handshake", lambda: handshake.handshake(ranks), 120)
    # They import torch in processes of their own while the quick ones are told.
    stages = [[*quick, torch, meet]]
    if GPUS.exists():  # which may be for one process at a time
        stages = [[*quick, torch], [meet]]
    # Measured when all is quiet again.
    stages.append([Look("speed", lambda: disk.speed(folder), 120)])
    if store is not None:
        stages.append([Look("store", lambda: stores.health(store), 120)])
    found = [each for looks in stages for each in _told(looks, say)]
    say(", ".join(f"{sum(f.state == state for f in found)} {state}" for state in ("ok", "warn", "fail")))
    return found


def _told(looks: list[Look], say: Callable[[str], None]) -> Iterator[Finding]:
    """All of them, begun at once, told in their order."""
    for look in looks:
        look.begin()
    for look in looks:
        for found in look.findings():
            say(str(found))
            yield found
