"""A copy of a store on the node's own disk: made once a node, whole or not there.

The first process of a node copies, those beside it wait for its lock and find the copy. Nothing but a rename gives the
copy its name, so that what a killed process leaves is never taken for one; the next process clears it away.
"""

import errno
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from cauc_dist.durable import sync, sync_tree
from cauc_dist.errors import BadInput
from cauc_dist.store.files import Files, open_files
from cauc_dist.store.reader import Store

THREADS = 8  # files on their way at once: one request at a time to an object store would wait for most of its life
PIECE = 16 * 2**20  # bytes of a file that are in memory

Say = Callable[[str], None]


def stage(where: str | Path, folder: Path, *, say: Say) -> str:
    """The path of a whole copy of the store `where` (a folder or URL) in `folder`, copied now if nobody did before.

    Call it in every process: of those on a node one copies. The copy's name holds the store's fingerprint and a digest
    of its metadata, so that another version of the store is another copy. BadInput where `folder` does not exist or
    has too little room, and where the store changes while it is copied.
    """
    if not folder.is_dir():
        do = "Make it, or check what the variable in the setting says on this node"
        raise BadInput(f"no folder {folder} to copy the store to", wanted="a folder on the node's own disk", do=do)
    store = Store.open(where)
    target = folder / f"{store.name}-{version(store)}"
    with _alone(folder / f"{target.name}.lock", say), ThreadPoolExecutor(THREADS) as pool:
        files = open_files(store.where)
        sizes = _sizes(files, store.files(), pool, say)
        if target.exists() and not _whole(target, sizes):
            say(f"{target} has lost files since it was copied; copying it again")
            shutil.rmtree(target)
        if not target.exists():
            _copy(store, files, sizes, target, pool, say)
    return str(target)


def version(store: Store) -> str:
    """Of the scans, 16 digits, and of the metadata, 8: a column that is added leaves the fingerprint as it was."""
    columns = json.dumps([asdict(column) for column in store.columns]).encode()
    values = np.ascontiguousarray(store.metadata([column.name for column in store.columns])).tobytes()
    return f"{store.fingerprint[:16]}-{hashlib.sha256(columns + values).hexdigest()[:8]}"


@contextmanager
def _alone(path: Path, say: Say) -> Iterator[None]:
    """One process at a time; the system gives the lock back when its holder ends, however it ends."""
    with path.open("w") as lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for the process that copies to {path.with_suffix('')}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            found = f"no locks in {path.parent} ({error.strerror})"
            raise BadInput(found, wanted="a folder on the node's own disk", do="Choose another folder") from error
        yield


def _sizes(files: Files, names: Sequence[str], pool: Executor, say: Say) -> dict[str, int]:
    """Bytes of each file that is there. A missing shard stays one: the reader tells which scans it held."""

    def size(name: str) -> int | None:
        try:
            return files.open(name).size
        except FileNotFoundError:
            return None

    found = dict(zip(names, pool.map(size, names), strict=True))
    missing = [name for name, size in found.items() if size is None]
    if missing:
        say(f"{files.where} lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; the copy lacks it too")
    return {name: size for name, size in found.items() if size is not None}


def _whole(target: Path, sizes: Mapping[str, int]) -> bool:
    """Whether every file is there in its size: cleaners of temporary folders take files one by one."""
    paths = {target / name: size for name, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _copy(store: Store, files: Files, sizes: Mapping[str, int], target: Path, pool: Executor, say: Say) -> None:
    temporary, wanted = target.with_name(f".{target.name}.partial"), sum(sizes.values())
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
    free = shutil.disk_usage(target.parent).free
    if free < wanted:
        raise _no_room(store, wanted, target.parent, free)
    say(f"copying {store.where}, {wanted / 1e9:.2f} GB, to {target}")
    began = time.perf_counter()
    try:
        for parent in {(temporary / name).parent for name in sizes}:
            parent.mkdir(parents=True, exist_ok=True)
        for _ in pool.map(partial(_copy_file, files, temporary), sizes):
            pass
        if not _whole(temporary, sizes) or version(Store.open(temporary)) != version(store):
            raise EOFError
        sync_tree(temporary)
        temporary.rename(target)
        sync(target.parent)
    except (EOFError, FileNotFoundError) as error:
        found, do = f"the store {store.where} changed while it was copied", "Start again when its writer has ended"
        raise BadInput(found, wanted="one that nobody writes to", do=do) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_room(store, wanted, target.parent, shutil.disk_usage(target.parent).free) from error
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.perf_counter() - began
    say(f"copied in {seconds:.1f} s, {wanted / 1e6 / seconds:.0f} MB/s")


def _copy_file(files: Files, folder: Path, name: str) -> None:
    file, buffer = files.open(name), np.empty(PIECE, np.uint8)
    with (folder / name).open("wb", buffering=0) as out:
        for start in range(0, file.size, PIECE):
            piece = buffer[: min(PIECE, file.size - start)]
            file.read_into([piece], start)
            left = piece.data
            while left:  # a raw write may take less than it is given
                left = left[out.write(left) :]


def _no_room(store: Store, wanted: int, folder: Path, free: int) -> BadInput:
    return BadInput(
        f"{free / 1e9:.3f} GB free in {folder}",
        wanted=f"{wanted / 1e9:.3f} GB, the size of {store.where}",
        do="Free some, choose another folder, or train without a copy",
    )
