"""What a process may use of this machine: cores and threads, shared memory, open files."""

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from cauc_dist.doctor.finding import Finding
from cauc_dist.world import cores

GIB = 2**30
SHM, FILES = 1 * GIB, 1024
"""Less of either is worth a warning. Ours."""


def threads(
    ranks: int, env: Mapping[str, str] = os.environ, group: Path = Path("/sys/fs/cgroup/cpu.max")
) -> Iterator[Finding]:
    """OMP_NUM_THREADS of each of `ranks`, against the cores that this process may use: a container's quota of them."""
    have, text = _quota(cores(), group), env.get("OMP_NUM_THREADS")
    share = max(1, have // ranks)
    here = f"{have} cores" if have == os.cpu_count() else f"{have} of the machine's {os.cpu_count()} cores"
    if text is None and have < cores():
        found = f"{here} by this container's quota, OMP_NUM_THREADS not set: its ranks would share {cores()}"
        yield Finding("threads", "warn", found, f"export OMP_NUM_THREADS={share}")
    elif text is None:
        yield Finding("threads", "ok", f"{here}, OMP_NUM_THREADS not set: ranks share them")
    elif not text.isdecimal() or int(text) < 1:
        do = f"unset it, or export OMP_NUM_THREADS={share}"
        yield Finding("threads", "fail", f"OMP_NUM_THREADS is {text!r}, which is no number of threads", do)
    elif int(text) > share:
        found = f"OMP_NUM_THREADS is {text} for each of {ranks} ranks, on {here}: more threads than cores only fight"
        yield Finding("threads", "warn", found, f"unset it, or export OMP_NUM_THREADS={share}")
    else:
        yield Finding("threads", "ok", f"{here}, OMP_NUM_THREADS={text} for each rank")


def _quota(have: int, group: Path) -> int:
    """Cores that the control group lets this process use; docker's --cpus is such a quota, which torch does not see."""
    try:
        quota, period = group.read_text().split()
        return max(1, min(have, int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or "max"
        return have


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """NCCL's way between the ranks of a machine; docker gives 64 MB."""
    if not folder.is_dir():
        yield Finding("shm", "ok", f"no {folder} on this system")
        return
    free = shutil.disk_usage(folder).free
    do = "start the container with --shm-size 8g or --ipc host; elsewhere remove what lies there" * (free < SHM)
    yield Finding("shm", "warn" if do else "ok", f"{free / GIB:.2g} GiB free in {folder}", do)


def open_files() -> Iterator[Finding]:
    """`ulimit -n`: rank 0 holds a connection of every rank, and a reader its files."""
    soft, hard = (n if n != resource.RLIM_INFINITY else 2**63 for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    found = f"at most {soft if soft < 2**63 else 'any number of'} open files a process"
    if soft >= FILES:
        yield Finding("files", "ok", found)
    elif hard > soft:
        yield Finding("files", "warn", found, f"ulimit -n {min(FILES, hard)}")
    else:
        yield Finding("files", "warn", found, "ask for more: limits.conf, or LimitNOFILE of the service")
