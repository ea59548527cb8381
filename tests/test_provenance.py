"""A number can be traced: versions, code, machine."""

import subprocess
from pathlib import Path

from cauc_dist.provenance import git_state, provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_commit_and_changes_of_a_checkout_are_seen(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "one")
    assert git_state(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    state = git_state(tmp_path)
    assert state is not None
    assert state["dirty"] is True


def test_outside_a_checkout_there_is_no_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None


def test_versions_are_those_that_are_installed() -> None:
    import numpy
    import torch

    versions = provenance()["versions"]
    assert (versions["numpy"], versions["torch"]) == (numpy.__version__, torch.__version__)
