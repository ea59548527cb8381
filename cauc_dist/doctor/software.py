"""Python, the packages that cauc-dist asks for, MPI; and in a process of its own, what torch and DeepSpeed say."""

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from cauc_dist import __version__
from cauc_dist.doctor import child
from cauc_dist.doctor.finding import Finding

PACKAGE = "cauc-dist"
FAMILIES = {"Open MPI": r"open ?mpi|openrte|prrte", "MPICH": r"mpich|hydra", "Intel MPI": r"intel\(r\) mpi"}
ASK_MPI = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"


def python() -> Iterator[Finding]:
    """Which one, on what system."""
    found = f"{platform.python_version()} ({sys.executable}), cauc-dist {__version__}, {platform.platform(terse=True)}"
    yield Finding("python", "ok", f"{found}, {platform.machine()}")


def versions(package: str = PACKAGE) -> Iterator[Finding]:
    """Each package against the range that `package` asks for; of an extra, only what is installed."""
    try:
        asked = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        do = f"python -m pip install {package}, or `pip install -e .` in the checkout"
        yield Finding("versions", "warn", f"{package} is not installed: there are no ranges to hold packages to", do)
        return
    from packaging.requirements import Requirement

    fits = []
    for requirement in map(Requirement, asked):
        extra = bool(requirement.marker and not requirement.marker.evaluate({"extra": ""}))
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if not extra:
                yield _unmet(
                    f"{requirement.name} is not installed", f"{requirement.name}{requirement.specifier}", "fail"
                )
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found = f"{requirement.name} {version}, outside {requirement.specifier}"
            yield _unmet(found, f"{requirement.name}{requirement.specifier}", "warn" if extra else "fail")
        elif not extra:
            fits.append(f"{requirement.name} {version}")
    yield Finding("versions", "ok", f"{len(fits)} packages in their ranges: {', '.join(fits)}")


def _unmet(found: str, wanted: str, state: str) -> Finding:
    do = f"python -m pip install '{wanted}'"
    return Finding("versions", "fail" if state == "fail" else "warn", found, do)


def mpi() -> Iterator[Finding]:
    """mpi4py, its library, and the mpiexec that would start ranks; only mpiexec needs any of them."""
    start = shutil.which("mpiexec") or shutil.which("mpirun")
    try:
        own = f"mpi4py {metadata.version('mpi4py')}"
    except metadata.PackageNotFoundError:
        there = f"{start} is there, mpi4py is not" if start else "no mpi4py, no mpiexec"
        yield Finding("mpi", "ok", f"{there}: not needed, unless ranks are to be started by mpiexec (cauc-dist[mpi])")
        return
    starter = _family(_said([start, "--version"])[1]) if start else ""
    # As World does: mpi4py's wheels would load MPICH where it is beside them.
    env = {"MPI4PY_MPIABI": "openmpi"} if starter == "Open MPI" and "MPI4PY_LIBMPI" not in os.environ else {}
    code, said = _said([sys.executable, "-c", ASK_MPI], env)
    library = " ".join(said.split("\n")[0].split()).rstrip(",")
    if code:
        error = said.strip().splitlines()[-1] if said.strip() else f"exit code {code}"
        do = "install an MPI library (pip install mpich), or remove mpi4py: only mpiexec needs it"
        yield Finding("mpi", "warn", f"{own} does not load: {error}", do)
    elif not start:
        do = "install cauc-dist[mpi] with `pip install mpich`, or start ranks by --ranks, srun or torchrun"
        yield Finding("mpi", "warn", f"{own} with {library}, and no mpiexec on PATH", do)
    elif starter != _family(said):
        do = f"use the mpiexec of that library ({sys.prefix}/bin/mpiexec where it came by pip), or set MPI4PY_LIBMPI"
        yield Finding("mpi", "warn", f"{own} with {library}, and {start} of {starter or 'an unknown MPI'}", do)
    else:
        yield Finding("mpi", "ok", f"{own} with {library}, {start}")


def _family(said: str) -> str:
    """The MPI that names itself in a text; "" where none does."""
    return next((name for name, words in FAMILIES.items() if re.search(words, said, re.IGNORECASE)), "")


def _said(command: list[str], env: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=10,
    )
    return done.returncode, done.stdout


def imports() -> Iterator[Finding]:
    """What a process finds that imports torch and DeepSpeed, and uses each GPU."""
    do = "python -m pip install --force-reinstall of what the line names; where memory is short, free some"
    return child.findings("torch", "-m", "cauc_dist.doctor.libraries", seconds=100, do=do)
