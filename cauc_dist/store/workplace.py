"""Where a store is made: a hidden sibling folder with the plan, a journal of the parts that are done, and locks.

A part is done when its file is there: files appear by rename, after what they tell of is on the disk. Locks belong to
the process that holds them, so a kill leaves none. On a shared file system the tasks of a job array meet here.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cauc_dist.durable import replace, sync, sync_tree
from cauc_dist.errors import BadInput

Arrays = Mapping[str, NDArray[Any]]


class Workplace:
    """`.NAME.partial` beside the store NAME. Use `open`."""

    def __init__(self, store: Path, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.building = folder / "store"
        """What becomes the store."""

    @staticmethod
    @contextlib.contextmanager
    def open(store: Path, task: tuple[int, int], *, grows: bool = False) -> Iterator["Workplace"]:
        """The work on `store`, locked: for this process alone, or (task) for this task of an array.

        What was begun stays there when an error ends the work, to be gone on with; what was not, goes. `grows`: the
        store is there and is written into.
        """
        folder = store.absolute().with_name(f".{store.name}.partial")
        _refuse_taken(store, grows)
        made = [parent for parent in folder.parents if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        place = Workplace(store, folder)
        with contextlib.ExitStack() as locks:
            place._locked(locks, "lock", shared=task[1] > 1)
            place._locked(locks, f"lock.{task[0]}", shared=False)
            try:
                _refuse_taken(store, grows)
                yield place
            except BaseException:
                if not place._file("plan.json").exists() and task[1] == 1:
                    place.remove()
                    for parent in made:  # the deepest first; one that somebody else has filled meanwhile stays
                        with contextlib.suppress(OSError):
                            parent.rmdir()
                raise

    def _file(self, name: str) -> Path:
        return self.folder / name

    def _locked(self, locks: contextlib.ExitStack, name: str, *, shared: bool) -> None:
        refused = BadInput(
            f"another ingest is writing {self.store}", wanted="one at a time", do="Wait for it, or name another store"
        )
        try:
            handle = os.open(self._file(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            locks.callback(os.close, handle)
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            same = self._file(name).stat().st_ino == os.fstat(handle).st_ino
        except (BlockingIOError, FileNotFoundError) as error:
            raise refused from error
        except OSError as error:
            do = "Mount it with locks (Lustre: -o flock), or ingest on another disk and copy the store"
            raise BadInput(f"{self.folder}: {error.strerror}", wanted="a disk with file locks", do=do) from error
        if not same:  # its owner has just finished and removed it
            raise refused

    def plan(self, request: Mapping[str, Any], make: Callable[[], Any], *, fresh: bool) -> Any:
        """The plan (JSON's types) that was made for this request, by this run or an earlier one or another task."""
        wanted = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        path = self._file("plan.json")
        with self._exclusive("plan.lock"):
            told = self.begun()
            if told is not None and fresh and told["request"] != wanted:
                told = None
            if told is None:
                self.clear()
                told = {"request": wanted, "rows": request.get("rows", 0), "plan": make()}
                replace(path, json.dumps(told).encode())
        if told["request"] != wanted:
            found = f"{self.folder} holds an unfinished ingest of other data or settings"
            do = "Give the command that began it, or --fresh to throw its work away"
            raise BadInput(found, wanted="the same source and settings", do=do)
        return told["plan"]

    def begun(self) -> Any:
        """What plan.json holds of work that was begun: request, rows of the store that grows, plan; None: nothing."""
        try:
            return json.loads(self._file("plan.json").read_bytes())
        except FileNotFoundError:
            return None

    def put(self, name: str, arrays: Arrays) -> None:
        """The journal: part `name` is done, with this to tell."""
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, **arrays)
        self._file(name).parent.mkdir(exist_ok=True)
        replace(self._file(name), data.getvalue())

    def get(self, name: str) -> dict[str, NDArray[Any]] | None:
        """What part `name` told; None where it is not done."""
        try:
            with np.load(self._file(name), allow_pickle=False) as told:
                return dict(told)
        except FileNotFoundError:
            return None

    def done(self, name: str) -> bool:
        return self._file(name).exists()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        """True for one at a time, which may commit if all is done; False where another task has committed."""
        with contextlib.ExitStack() as lock:
            try:
                lock.enter_context(self._exclusive("finish.lock"))
            except FileNotFoundError:
                yield False
            else:
                yield self.folder.exists()

    @contextlib.contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        handle = os.open(self._file(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def publish(self) -> None:
        """The finished store gets its name, and the workplace goes."""
        sync_tree(self.building)
        _refuse_taken(self.store, grows=False)
        self.building.rename(self.store)
        sync(self.store.absolute().parent)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """Nothing is left but locks."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif "lock" not in entry.name:
                entry.unlink()


def _refuse_taken(store: Path, grows: bool) -> None:
    if store.exists() and not grows:
        raise BadInput(
            f"{store} exists already", wanted="a new path", do="Name another store, or remove this one first"
        )


def disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
