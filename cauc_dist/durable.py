"""What must be on the disk before a rename may say that it is."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """fsync of one file, or of a folder's list of names; OSError where the disk refuses."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """fsync of every file and folder below, and of the folder itself."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
