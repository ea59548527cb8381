"""The disk that runs are written to: space, what kind it is, whether it locks and renames, how fast it is."""

import atexit
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cauc_dist import durable
from cauc_dist.doctor.finding import Finding

MIB, GIB = 2**20, 2**30
SIZE, BLOCK = 256 * MIB, 16 * MIB
SPACE, INODES, SLOW = 10 * GIB, 10_000, 20.0
"""Bytes and files that should be free, and MB/s below which checkpoints are waited for. Ours."""
MEMORY = ("tmpfs", "ramfs")
ELSEWHERE = "remove something, or write elsewhere: --folder"


def kind(folder: Path) -> Iterator[Finding]:
    """Space, and what the file system can do; a lock and a rename are tried."""
    if not folder.is_dir():
        yield Finding("disk", "fail", f"no folder {folder.absolute()}", "make it first, or name another: --folder")
        return
    yield _space(folder)
    try:
        with _scratch(folder) as mine:
            yield _locks(mine)
            yield _renames(mine)
    except OSError as error:
        do = "see its permissions and the quota (`quota -s`), or write elsewhere: --folder"
        yield Finding("disk", "fail", f"{folder.absolute()} cannot be written to: {error.strerror}", do)


def _space(folder: Path) -> Finding:
    told, form = os.statvfs(folder), file_system(folder)
    free = told.f_bavail * told.f_frsize
    found = f"{folder.absolute()} on {form}: {free / GIB:.3g} GiB free"
    if told.f_files:  # btrfs and the like count none
        found += f", {told.f_favail:,} files"
    if not free or (told.f_files and not told.f_favail):
        return Finding("disk", "fail", found, ELSEWHERE)
    if free < SPACE or (told.f_files and told.f_favail < INODES):
        return Finding("disk", "warn", found, "make room: stores and checkpoints are written here")
    if form in MEMORY:
        return Finding("disk", "warn", found, "it is this machine's memory: gone when it restarts; write to a disk")
    return Finding("disk", "ok", found)


def _locks(mine: Path) -> Finding:
    """flock, which keeps two trainings out of one run folder."""
    do = "mount it with locks (Lustre: -o flock; NFS: a lock service), or never start two trainings in one folder"
    with (mine / "lock").open("w") as one, (mine / "lock").open("w") as two:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("locks", "fail", f"this file system does not lock ({error.strerror})", do)
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("locks", "ok", "a locked file is refused to a second one")
    return Finding("locks", "fail", "a locked file was locked a second time", do)


def _renames(mine: Path) -> Finding:
    """A file replaced by another, which is how checkpoints come to be whole."""
    path = mine / "file"
    path.write_text("before")
    durable.replace(path, b"after")
    if path.read_bytes() == b"after" and sorted(p.name for p in mine.iterdir()) == ["file", "lock"]:
        return Finding("rename", "ok", "a file is replaced whole, and its folder synced")
    return Finding("rename", "fail", "a replaced file is not what was written", "write elsewhere: --folder")


def speed(folder: Path, size: int = SIZE) -> Iterator[Finding]:
    """MB/s of `size` bytes written and synced, then read with the page cache dropped."""
    if not folder.is_dir():
        return  # said already
    try:
        with _scratch(folder) as mine:
            write, read = _write(mine / "bytes", size), _read(mine / "bytes")
    except OSError as error:
        what = f"{size // MIB} MiB could not be written and read here: {error.strerror}"
        yield Finding("speed", "fail", what, ELSEWHERE)
        return
    cached = "" if hasattr(os, "posix_fadvise") and file_system(folder) not in MEMORY else ", from memory"
    found = f"{size // MIB} MiB: written and synced at {write:,.0f} MB/s, read at {read:,.0f} MB/s{cached}"
    do = "save less often, and read stores from a local disk: --data.stage; `cauc bench data` measures reading"
    slow = min(write, read) < SLOW
    yield Finding("speed", "warn" if slow else "ok", found, do if slow else "")


def _write(path: Path, size: int) -> float:
    """MB/s. Random bytes: a file system may compress."""
    block, began = os.urandom(min(BLOCK, size)), time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            if file.write(block) != len(block):  # the last of the space was taken
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    return size / 1e6 / (time.perf_counter() - began)


def _read(path: Path) -> float:
    """MB/s."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, into = time.perf_counter(), bytearray(BLOCK)
        while file.readinto(into):
            pass
        return path.stat().st_size / 1e6 / (time.perf_counter() - began)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder of our own, which is gone afterwards; after ctrl-C too, which leaves a check's thread where it is."""
    mine = Path(tempfile.mkdtemp(prefix=".cauc-doctor-", dir=folder))
    remove = partial(shutil.rmtree, mine, ignore_errors=True)
    atexit.register(remove)
    try:
        yield mine
    finally:
        remove()
        atexit.unregister(remove)


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind that holds a path, in the kernel's words: ext4, nfs4, tmpfs."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return "an unknown file system"
    real = path.resolve()
    inside = [(len(at), form) for _, at, form, *_ in lines if real.is_relative_to(at.replace("\\040", " "))]
    return max(reversed(inside), key=lambda known: known[0], default=(0, "an unknown file system"))[1]
