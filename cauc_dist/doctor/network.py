"""A machine among others: its name, its interfaces, and what a shell still says of ranks that are gone."""

import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping

import psutil

from cauc_dist.doctor.finding import Finding
from cauc_dist.errors import BadInput
from cauc_dist.world import EXPLICIT, MPI_SIZE, World

LAUNCHED = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE")
"""torchrun and `--ranks` set one of them for every rank."""


def addresses() -> dict[str, list[str]]:
    """IPv4 and IPv6 addresses of each interface that is up; link-local ones aside."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = {
        name: [a.address for a in has if a.family in (socket.AF_INET, socket.AF_INET6) and "%" not in a.address]
        for name, has in psutil.net_if_addrs().items()
        if name in up
    }
    return {name: has for name, has in found.items() if has}


def name() -> Iterator[Finding]:
    """Debian gives a machine's own name 127.0.1.1, which no other machine can reach."""
    own = socket.gethostname()
    outer = _outer()
    mend = f"put `{outer[0][1]} {own}` into /etc/hosts, instead of a line with 127" if outer else ""
    try:
        told = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(own, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        found = f"{own} has no address here ({error.strerror or error})"
        yield Finding("name", "warn", found, mend or f"put `127.0.0.1 {own}` into /etc/hosts")
        return
    if outer and all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in told):
        found = f"{own} is {', '.join(told)} to itself, and {outer[0][1]} on {outer[0][0]}: "
        found += "gloo, left alone, would offer other machines an address that leads to themselves"
        do = "`cauc train` tells gloo and NCCL the interface, and needs nothing; for other programs "
        yield Finding("name", "warn", found, f"{do}{mend}, or export GLOO_SOCKET_IFNAME={outer[0][0]}")
        return
    yield Finding("name", "ok", f"{own} is {', '.join(told)}")


def _outer() -> list[tuple[str, str]]:
    """(interface, address) of those that others may reach; IPv4 first."""
    found = [(name, a) for name, has in addresses().items() for a in has if not ipaddress.ip_address(a).is_loopback]
    return sorted(found, key=lambda entry: ":" in entry[1])


def interfaces(env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Those that are up; and whether GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name one of them."""
    up, stats = addresses(), psutil.net_if_stats()
    shown = [
        f"{name} {has[0]}" + f" ({stats[name].speed} Mbit/s)" * (stats[name].speed > 0) for name, has in up.items()
    ]
    yield Finding("interfaces", "ok", ", ".join(shown))
    gloo = [name.strip() for name in env.get("GLOO_SOCKET_IFNAME", "").split(",") if name.strip()]
    nccl = env.get("NCCL_SOCKET_IFNAME", "")
    lost = [name for name in gloo if name not in up]
    do = f"or one of: {', '.join(up)}"
    if lost:
        found = f"GLOO_SOCKET_IFNAME names {', '.join(lost)}, which is not up on this machine"
        yield Finding("interfaces", "fail", found, f"unset GLOO_SOCKET_IFNAME: `cauc train` finds it itself; {do}")
    if nccl and not _chosen(nccl, list(up)):
        found = f"NCCL_SOCKET_IFNAME={nccl} fits no interface that is up on this machine"
        yield Finding("interfaces", "fail", found, f"unset NCCL_SOCKET_IFNAME: `cauc train` finds it itself; {do}")


def _chosen(pattern: str, names: list[str]) -> list[str]:
    """NCCL's rule: beginnings of names, `=` for whole names, `^` for all but these."""
    without, exact = pattern.startswith("^"), pattern.lstrip("^").startswith("=")
    words = [word.strip() for word in pattern.lstrip("^=").split(",")]
    return [n for n in names if any(n == w if exact else n.startswith(w) for w in words) != without]


def variables(env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether the shell says that this is one of several ranks; a new run would wait for the others."""
    there = [name for name in EXPLICIT if name in env]
    if "RANK" in env or "WORLD_SIZE" in env:
        yield _explicit(env, there)
    elif "SLURM_STEP_ID" in env or any(name in env for name in MPI_SIZE):
        yield _launched(env)
    elif there:
        found = f"{', '.join(there)} set, RANK and WORLD_SIZE not: nothing reads them but, under SLURM, MASTER_PORT"
        yield Finding("variables", "warn", found, f"unset {' '.join(there)}")
    else:
        yield Finding("variables", "ok", "no launcher's variables (RANK, MASTER_ADDR, ...) in this shell")


def _launched(env: Mapping[str, str]) -> Finding:
    how = "SLURM's step" if "SLURM_STEP_ID" in env else "MPI"
    sizes = [env[name] for name in (*MPI_SIZE, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if env.get(name, "").isdigit()]
    if sizes and int(sizes[0]) > 1:
        found = f"{how} started this process as one of {sizes[0]}: a run from a shell here waits for the others"
        return Finding("variables", "warn", found, "start runs by srun or mpiexec themselves, or with --ntasks 1")
    return Finding("variables", "ok", f"{how} started this process: runs take their ranks from there")


def _explicit(env: Mapping[str, str], there: list[str]) -> Finding:
    do = f"unset {' '.join(there)}"
    try:
        world = World.from_env({name: env[name] for name in there})
    except BadInput as error:
        return Finding("variables", "fail", error.found, do)
    found = f"rank {world.rank} of {world.world_size} at {world.master}:{world.port}"
    if world.world_size == 1 or any(variable in env for variable in LAUNCHED):
        return Finding("variables", "ok", f"{found}, as a launcher has it")
    return Finding("variables", "warn", f"{found}: a run from this shell would wait for the others", do)
