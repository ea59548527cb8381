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


def replace(path: Path, data: bytes) -> None:
    """A small file, whole or as it was: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync_tree(folder: Path) -> None:
    """fsync of every file and folder below, and of the folder itself."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
