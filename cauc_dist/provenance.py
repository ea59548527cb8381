"""What made a run: versions, code state, machine, command."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

PACKAGES = ("cauc-dist", "torch", "deepspeed", "zarr", "numcodecs", "numpy", "nibabel", "scikit-learn")


def provenance() -> dict[str, Any]:
    """Versions, git state of the code, machine, command line and UTC time: all a reader needs to judge a number."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": git_state(Path(__file__).parent),
        "machine": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "command": sys.argv,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None where git does not keep that folder's files (a wheel)."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not _git(folder, "ls-files", "."):
        return None  # a venv inside somebody's own project is not its code
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The CPU's model name; Linux keeps it in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")


def without_secrets(text: str) -> str:
    """The text, its URLs cut to scheme, host and path: a signed one, or one with a password, opens a store."""
    return URL.sub(lambda found: _bare(found[0]), text)


def _bare(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
