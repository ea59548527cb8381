"""Where the bytes of a store lie: a folder, or an object store behind http(s):// or s3://. No Zarr is known here.

Both ways give the same two things: a small file whole, and byte ranges of a large one into buffers that exist already.
Safe in many threads. A missing file is FileNotFoundError, a short one EOFError, a failing network OSError.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput

Bytes = NDArray[np.uint8]
REMOTE = ("http://", "https://", "s3://")


class File(Protocol):
    """An opened file of `size` bytes."""

    size: int

    def read_into(self, buffers: Sequence[Bytes], start: int) -> None: ...


class Files(Protocol):
    """The files of one store, by their names in it ("volumes/c/0/0")."""

    where: str

    def read(self, name: str) -> bytes: ...
    def open(self, name: str) -> File: ...


def is_remote(where: str | Path) -> bool:
    return str(where).startswith(REMOTE)


def open_files(where: str | Path) -> Files:
    """The files at a folder or URL; nothing is read yet. BadInput for a URL of another kind."""
    if is_remote(where):
        return RemoteFiles(str(where))
    if "://" in str(where):
        raise BadInput(f"store {where}", wanted=f"a folder, {', '.join(REMOTE)}", do="Copy the store to one of these")
    return LocalFiles(Path(where))


class LocalFile:
    """A descriptor that closes with its last reader, so that a cache may drop it while it is read."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read_into(self, buffers: Sequence[Bytes], start: int) -> None:
        views = [memoryview(buffer.data) for buffer in buffers]
        got, wanted = os.preadv(self._fd, views, start), sum(map(len, views))
        if got == wanted:
            return
        for view in views:  # cut short by the file's end, or by a file system that gives less than it was asked for
            done = 0
            while done < len(view):
                got = os.preadv(self._fd, [view[done:]], start + done)
                _all_of(got and len(view), len(view))
                done += got
            start += len(view)


class LocalFiles:
    def __init__(self, folder: Path) -> None:
        self._folder, self.where = folder, str(folder)

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def open(self, name: str) -> LocalFile:
        return LocalFile(self._folder / name)


class RemoteFile:
    def __init__(self, files: "RemoteFiles", name: str) -> None:
        self._files, self._name = files, name
        self.size: int = files.ask("head", name)["size"]

    def read_into(self, buffers: Sequence[Bytes], start: int) -> None:
        wanted = sum(len(b) for b in buffers)
        got = np.frombuffer(self._files.ask("get_range", self._name, start=start, length=wanted), np.uint8)
        _all_of(len(got), wanted)
        for buffer in buffers:
            buffer[...], got = got[: len(buffer)], got[len(buffer) :]


class RemoteFiles:
    """Whole and ranged GETs by obstore, which retries; credentials and endpoint as AWS_* in the environment.

    Public buckets: AWS_SKIP_SIGNATURE=true. Another S3 server: AWS_ENDPOINT_URL.
    """

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError as error:
            do = "Install it (pip install 'cauc-dist[remote]'), or copy the store here"
            raise BadInput(f"store {url} without the package obstore", wanted="obstore", do=do) from error
        plain = url.startswith("http://") or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        options: dict[str, Any] = {"client_options": {"allow_http": True}} if plain else {}
        self.where, self._obstore, self._store = url, obstore, from_url(url, **options)

    def ask(self, method: str, name: str, **options: Any) -> Any:
        try:
            return getattr(self._obstore, method)(self._store, name, **options)
        except self._obstore.exceptions.BaseError as error:  # OSError for what is not there comes through as it is
            raise OSError(f"{self.where}/{name}: {str(error).splitlines()[0]}") from error

    def read(self, name: str) -> bytes:
        return bytes(self.ask("get", name).bytes())

    def open(self, name: str) -> RemoteFile:
        return RemoteFile(self, name)

    def for_zarr(self) -> Any:
        """The same store as zarr-python wants it."""
        from zarr.storage import ObjectStore

        return ObjectStore(self._store, read_only=True)


def _all_of(got: int, wanted: int) -> None:
    if got != wanted:
        raise EOFError(f"the file ends after {got} of {wanted} bytes")
