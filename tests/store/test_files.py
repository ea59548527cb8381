"""The same bytes from a folder, http:// and s3://, and what is said where there are none."""

import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import zarr

from cauc_dist.errors import BadInput
from cauc_dist.store.files import LocalFile, open_files
from cauc_dist.store.ingest import from_arrays, ingest
from cauc_dist.store.planned import Settings
from cauc_dist.store.reader import Damaged, Store
from tests.store.cohorts import bids, blob, noise, shard, table

N = 40  # scans, in shards of 32


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder by GET and HEAD, with byte ranges; `mood` spoils the answers to requests for volumes."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.mood, self.asked = folder, "", list[tuple[str, str, str]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, span = unquote(self.path.split("?")[0].lstrip("/")), self.headers.get("Range", "")
        server, spoilt = self.server, "/volumes/c/" in path and self.server.mood
        server.asked.append((self.command, path, span))
        file = server.folder / path
        if not file.is_file():
            return self.send_error(404)
        if spoilt == "refuses":
            return self.send_error(403)
        if spoilt == "fails once":
            server.mood = ""
            return self.send_error(503)
        data, status = file.read_bytes(), 200
        size = len(data)
        if span and spoilt != "ignores ranges":
            first, last = span.removeprefix("bytes=").split("-")
            last = str(int(last) - 5) if spoilt == "gives less" else last
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if spoilt == "hangs up" else data)
            if spoilt == "hangs up":
                self.connection.close()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """packed.zarr, dense.zarr of the same scans."""
    folder = tmp_path_factory.mktemp("files")
    source = bids(folder / "b", [blob(i) for i in range(N)])
    rows = "".join(f"sub-{i:02d}\t{i}\t{2 * i}\n" for i in range(N))
    table(source, f"participant_id\tAge (years)\ta/b% ö\n{rows}")  # names that a URL writes otherwise
    ingest(source, folder / "packed.zarr", Settings(layout="packed"))
    ingest(source, folder / "dense.zarr", Settings(layout="dense", dtype="i16"))
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def rows(store: Store) -> np.ndarray:
    out = np.empty((len(store), *store.row_shape), store.dtype)
    for i, row in enumerate(out):
        store.read_into(i, row)
    return out


def equal(a: Store, b: Store) -> bool:
    assert (a.ids, a.subjects, a.columns) == (b.ids, b.subjects, b.columns)
    assert (a.fingerprint, a.shape, a.set_aside) == (b.fingerprint, b.shape, b.set_aside)
    assert a.files() == b.files()
    names = [column.name for column in a.columns]
    assert np.array_equal(a.metadata(names), b.metadata(names))
    return np.array_equal(rows(a), rows(b)) and np.array_equal(a.volume(N - 1), b.volume(N - 1))


# ---- remote ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packed.zarr", "dense.zarr"])
def test_a_store_behind_http_is_the_store(folder: Path, server: Server, name: str) -> None:
    store = Store.open(f"{server.url}/{name}/")
    assert (store.where, store.name) == (f"{server.url}/{name}", name)
    assert equal(store, Store.open(folder / name))
    # A row is a range, and no shard came whole.
    of_volumes = [(verb, span) for verb, path, span in server.asked if "/volumes/c/" in path]
    assert {span != "" for verb, span in of_volumes if verb == "GET"} == {True}
    assert len(of_volumes) == 2 * 2 + N + 1  # size and index of two shards; a request a row


def test_a_store_in_a_bucket_is_the_store(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    server.folder = folder.parent  # the first part of a path is the bucket
    store = Store.open(f"s3://{folder.name}/dense.zarr")
    assert store.name == "dense.zarr"
    assert equal(store, Store.open(folder / "dense.zarr"))
    with pytest.raises(BadInput, match=r"no store at s3://.*/none.zarr"):
        Store.open(f"s3://{folder.name}/none.zarr")


def test_chains_of_others_are_read_remotely_by_zarr_python(tmp_path: Path, server: Server) -> None:
    volumes = [noise(i, (1, 4, 4, 4)) for i in range(3)]
    from_arrays(tmp_path / "s.zarr", volumes, ["a", "b", "c"], shape=(1, 4, 4, 4), dtype="f32")
    shutil.rmtree(tmp_path / "s.zarr/volumes")
    array = zarr.create_array(
        tmp_path / "s.zarr/volumes", shape=(3, 1, 4, 4, 4), chunks=(2, 1, 2, 4, 4), dtype="f4", fill_value=np.nan
    )
    array[...] = np.stack(volumes)
    server.folder = tmp_path
    assert np.array_equal(rows(Store.open(f"{server.url}/s.zarr")), volumes)


def test_what_is_not_there_is_told_as_with_a_folder(folder: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no store at http://.*/none.zarr; wanted .* Check the path"):
        Store.open(f"{server.url}/none.zarr")
    with pytest.raises(BadInput, match=r"no store at http://"):
        Store.open(server.url)  # a folder above: http has no folders
    server.folder = tmp_path
    shutil.copytree(folder / "packed.zarr", tmp_path / "s.zarr")
    shard(tmp_path / "s.zarr", 1).unlink()
    store = Store.open(f"{server.url}/s.zarr")
    store.volume(0)
    with pytest.raises(Damaged, match=rf"scan sub-{N - 1} .* is damaged"):
        store.volume(N - 1)


def test_a_server_that_fails_once_is_asked_again(folder: Path, server: Server) -> None:
    store = Store.open(f"{server.url}/dense.zarr")
    server.mood = "fails once"
    assert np.array_equal(store.volume(3), Store.open(folder / "dense.zarr").volume(3))


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        ("ignores ranges", "[Rr]ange"),
        ("gives less", "Requested"),
        ("refuses", "403|Forbidden|permission"),
        ("hangs up", "http://"),
    ],
)
def test_a_server_that_does_not_give_what_was_asked_is_an_error_of_the_network(
    server: Server, mood: str, words: str
) -> None:
    store = Store.open(f"{server.url}/dense.zarr")
    server.mood = mood
    with pytest.raises(OSError, match=words) as error:
        store.volume(3)
    assert not isinstance(error.value, FileNotFoundError)
    assert "dense.zarr/volumes/c/0" in str(error.value)
    server.mood = ""
    store.volume(3)  # nothing of it stays


def test_a_server_that_is_gone_is_an_error_of_the_network(server: Server) -> None:
    store = Store.open(f"{server.url}/dense.zarr")
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=r"dense.zarr/volumes/c/0"):
        store.volume(3)


def test_bytes_that_the_network_changed_are_found(folder: Path, server: Server, tmp_path: Path) -> None:
    shutil.copytree(folder / "dense.zarr", tmp_path / "s.zarr")
    server.folder = tmp_path
    data = bytearray(shard(tmp_path / "s.zarr", 0).read_bytes())
    data[10] ^= 1
    shard(tmp_path / "s.zarr", 0).write_bytes(data)
    with pytest.raises(Damaged, match=r"scan sub-00 .*crc32c does not match"):
        Store.open(f"{server.url}/s.zarr").volume(0)


def test_without_the_package_a_url_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(
        BadInput, match=r"without the package obstore.*Install it \(pip install 'cauc-dist\[remote\]'\)"
    ):
        Store.open("https://example.org/s.zarr")


# ---- local ----------------------------------------------------------------------------------------------------


def test_a_local_file_fills_several_buffers_from_a_place_or_says_it_ends(tmp_path: Path) -> None:
    data = np.arange(100, dtype=np.uint8)
    (tmp_path / "f").write_bytes(data.tobytes())
    file = LocalFile(tmp_path / "f")
    assert file.size == 100
    a, b = np.empty(7, np.uint8), np.empty(20, np.uint8)
    file.read_into([a, b], 50)
    assert np.array_equal(np.concatenate([a, b]), data[50:77])
    for start in (90, 74, 100, 1000):
        with pytest.raises(EOFError, match=r"the file ends after \d+ of \d+ bytes"):
            file.read_into([a, b], start)
    assert open_files(tmp_path).read("f") == data.tobytes()
    with pytest.raises(FileNotFoundError):
        open_files(tmp_path).open("g")


def test_a_file_system_that_gives_less_than_was_asked_for_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.arange(100, dtype=np.uint8)
    (tmp_path / "f").write_bytes(data.tobytes())
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, start: real(fd, [views[0][:3]], start))
    a, b = np.empty(7, np.uint8), np.empty(20, np.uint8)
    LocalFile(tmp_path / "f").read_into([a, b], 50)
    assert np.array_equal(np.concatenate([a, b]), data[50:77])


def test_descriptors_close_with_their_last_reader(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")

    def opened() -> int:
        return [fd.resolve() for fd in Path("/proc/self/fd").iterdir()].count((tmp_path / "f").resolve())

    files = [LocalFile(tmp_path / "f") for _ in range(20)]
    assert opened() == 20
    files.clear()
    assert opened() == 0
