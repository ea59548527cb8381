import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from cauc_dist.errors import BadInput
from cauc_dist.store import layout, stage
from cauc_dist.store.reader import Damaged, Store

ROOT = Path(__file__).parents[2]


def write(folder: Path, n: int = 8, side: int = 8, age: float = 30.0, seed: int = 0) -> Path:
    """A dense f32 store of n noise volumes, four a shard, as docs/format.md says and zarr-python writes."""
    rng = np.random.default_rng(seed)
    ids = layout.encode_text([f"sub-{i}" for i in range(n)])
    arrays: dict[str, Any] = {"ids": ids, "subjects": ids, "valid": np.full(n, layout.OK, np.uint8)}
    arrays["checksums"] = rng.integers(0, 256, (n, 32)).astype(np.uint8)
    arrays |= {f"stats/{name}": np.ones((n, 1)) for name in layout.STATS} | {"meta/age": np.arange(n) + age}
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    for name in ("stats", "meta"):
        group.require_group(name)
    for name, values in arrays.items():
        told = {"name": "age", "kind": "number", "levels": []} if name == "meta/age" else None
        chain = {"chunks": (65536, *values.shape[1:]), "compressors": [ZstdCodec(), Crc32cCodec()]}
        config = {"write_empty_chunks": True}
        array = group.create_array(
            name, shape=values.shape, dtype=values.dtype, attributes=told, config=config, **chain
        )
        array[:] = values
    shape, noise = (1, side, side, side), rng.normal(size=(n, 1, side, side, side)).astype(np.float32)
    chain = {"chunks": (1, *shape), "shards": (4, *shape), "compressors": [Crc32cCodec()], "fill_value": np.nan}
    group.create_array("volumes", shape=noise.shape, dtype=noise.dtype, **chain)[:] = noise
    (folder / "participants.tsv").write_text("scan_id\tage\n")
    facts = {"format": layout.FORMAT, "version": layout.VERSION, "n": n, "shape": list(shape), "layout": "dense"}
    group.attrs.put(facts | {"columns": ["age"], "settings": {}, "set_aside": []})
    return folder


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write(tmp_path / "scans.zarr")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder on the node's own disk."""
    (tmp_path / "node").mkdir()
    return tmp_path / "node"


def test_a_copy_has_the_same_files_and_reads_the_same(store: Path, node: Path) -> None:
    said: list[str] = []
    copy = stage.stage(str(store), node, say=said.append)
    assert files_of(copy) == files_of(store)
    theirs, ours = Store.open(store), Store.open(copy)
    assert (ours.ids, ours.fingerprint) == (theirs.ids, theirs.fingerprint)
    assert all(np.array_equal(ours.volume(i), theirs.volume(i)) for i in range(8))
    assert Path(copy).name.startswith(f"scans.zarr-{theirs.fingerprint[:16]}-")
    assert len(said) == 2
    assert said[0].startswith(f"copying {store}, 0.00 GB, to {copy}")
    assert said[1].startswith("copied in ")
    assert stage.stage(str(store), node, say=said.append) == copy
    assert len(said) == 2  # nothing was copied again
    assert sorted(p.name for p in node.iterdir()) == [Path(copy).name, f"{Path(copy).name}.lock"]


def test_files_larger_than_a_piece_and_of_odd_sizes_are_copied_whole(
    store: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "PIECE", 1000)
    assert files_of(stage.stage(store, node, say=print)) == files_of(store)


def test_another_version_is_another_copy_be_it_of_scans_or_of_metadata_only(tmp_path: Path, node: Path) -> None:
    made = [{}, {"seed": 1}, {"n": 7}, {"age": 31.0}]
    copies = []
    for k, change in enumerate(made):
        source = write(tmp_path / str(k) / "scans.zarr", **change)  # type: ignore[arg-type]
        copies.append(stage.stage(source, node, say=print))
        assert files_of(copies[k]) == files_of(source)
    assert len(set(copies)) == 4
    prints = [Store.open(copy).fingerprint for copy in copies]
    assert prints[0] == prints[3]  # which is why a name holds a digest of the metadata too


class Ranges(BaseHTTPRequestHandler):
    """Whole files and byte ranges of one folder, as object stores serve them."""

    folder: Path

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data, wanted = path.read_bytes(), self.headers.get("Range")
        self.send_response(206 if wanted else 200)
        size = len(data)
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_store_behind_a_url_is_copied_once(store: Path, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore", reason="SKIPPED FOR LACK OF obstore: stores behind URLs cannot be read")
    monkeypatch.setattr(stage, "PIECE", 5000)  # shards in several ranges
    handler = type("Handler", (Ranges,), {"folder": store.parent})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/scans.zarr"
        copy = stage.stage(url, node, say=print)
        assert files_of(copy) == files_of(store)
        assert Path(copy).name == f"scans.zarr-{stage.version(Store.open(store))}"
        assert stage.stage(f"{url}/", node, say=pytest.fail) == copy
        server.shutdown()


# ---- several processes ----------------------------------------------------------------------------------------------

SCRIPT = r"""
import sys, time
from pathlib import Path
from cauc_dist.store import stage
copy, slow = stage._copy_file, float(sys.argv[3])
def slowly(files, folder, name):
    copy(files, folder, name)
    sys.stdout.write(f"copied {name}\n")  # one call: threads do not mix
    sys.stdout.flush()
    time.sleep(slow)
stage._copy_file = slowly
print("at", stage.stage(sys.argv[1], Path(sys.argv[2]), say=lambda line: print("said", line, flush=True)), flush=True)
"""


def start(store: Path, node: Path, slow: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(store), str(node), str(slow)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_of_four_processes_at_once_one_copies_and_the_others_find_it(store: Path, node: Path) -> None:
    racing = [start(store, node, slow=0.2) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0] for process in racing]
    assert [process.returncode for process in racing] == [0] * 4, outputs
    copied = [line for output in outputs for line in output.splitlines() if line.startswith("copied ")]
    assert len(copied) == len(set(copied)) == len(files_of(store))
    (at,) = {output.splitlines()[-1].removeprefix("at ") for output in outputs}
    assert files_of(at) == files_of(store)


def test_a_process_that_waits_says_so_and_for_whom(store: Path, node: Path) -> None:
    target = node / f"scans.zarr-{stage.version(Store.open(store))}"
    with (node / f"{target.name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = start(store, node)
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == f"said waiting for the process that copies to {target}\n"
        time.sleep(0.2)
        assert not target.exists()
    assert waiting.communicate(timeout=60)[0].splitlines()[-1] == f"at {target}"
    assert files_of(target) == files_of(store)


@pytest.mark.parametrize("after", [1, 10, 19])
def test_what_a_killed_process_leaves_is_not_taken_for_a_copy_and_is_cleared_away(
    store: Path, node: Path, after: int
) -> None:
    killed = start(store, node, slow=0.1)
    assert killed.stdout is not None
    seen = 0
    for line in killed.stdout:
        seen += line.startswith("copied ")
        if seen == after:
            os.kill(killed.pid, signal.SIGKILL)
            break
    assert killed.wait(30) == -signal.SIGKILL
    killed.stdout.close()
    left = [p.name for p in node.iterdir() if not p.name.endswith(".lock")]
    assert len(left) == 1  # half a copy
    assert left[0].startswith(".")
    copy = stage.stage(store, node, say=print)
    assert files_of(copy) == files_of(store)
    assert [p.name for p in node.iterdir() if not p.name.endswith(".lock")] == [Path(copy).name]


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_copy_that_lost_a_file_or_part_of_one_is_made_again(store: Path, node: Path) -> None:
    copy = Path(stage.stage(store, node, say=print))
    for harm in (lambda: (copy / "volumes/c/1/0/0/0/0").unlink(), lambda: os.truncate(copy / "zarr.json", 5)):
        harm()
        said: list[str] = []
        assert stage.stage(store, node, say=said.append) == str(copy)
        assert said[0] == f"{copy} has lost files since it was copied; copying it again"
        assert files_of(copy) == files_of(store)


def test_a_shard_that_is_missing_is_missing_in_the_copy_and_said(store: Path, node: Path) -> None:
    (store / "volumes/c/1/0/0/0/0").unlink()
    said: list[str] = []
    copy = Store.open(stage.stage(store, node, say=said.append))
    assert said[0] == f"{store} lacks volumes/c/1/0/0/0/0; the copy lacks it too"
    assert np.isfinite(copy.volume(3)).all()
    with pytest.raises(Damaged, match="scan sub-4"):
        copy.volume(4)


@pytest.mark.parametrize("change", ["longer", "shorter", "metadata"])
def test_a_store_that_changes_while_it_is_copied_is_refused(
    store: Path, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    copy_file, shard = stage._copy_file, store / "volumes/c/0/0/0/0/0"
    other = write(tmp_path / "other.zarr", age=55.0)
    monkeypatch.setattr(stage, "THREADS", 1)

    def meddling(files: Any, folder: Path, name: str) -> None:
        if name == "participants.tsv" and change == "metadata":
            shutil.copytree(other / "meta", store / "meta", dirs_exist_ok=True)
        elif name == "participants.tsv":
            os.truncate(shard, shard.stat().st_size + (7 if change == "longer" else -7))
        copy_file(files, folder, name)

    monkeypatch.setattr(stage, "_copy_file", meddling)
    with pytest.raises(
        BadInput, match=r"scans.zarr changed while it was copied; wanted one that nobody writes to. Sta"
    ):
        stage.stage(store, node, say=print)
    assert [p.suffix for p in node.iterdir()] == [".lock"]


def test_a_folder_that_is_not_there_is_refused_and_none_is_made(store: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no folder .*/absent to copy the store to; wanted a folder on the node's own"):
        stage.stage(store, tmp_path / "absent", say=print)
    assert not (tmp_path / "absent").exists()


def test_a_file_system_without_locks_is_refused(store: Path, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(
        BadInput, match=rf"no locks in {node} \(No locks available\); wanted a folder on the node's own"
    ):
        stage.stage(store, node, say=print)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("SKIPPED FOR LACK OF ROOT: a small file system must be mounted to fill it")
    (tmp_path / "tiny").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path / "tiny"], check=True)
    try:
        yield tmp_path / "tiny"
    finally:
        subprocess.run(["umount", tmp_path / "tiny"], check=True)


def test_too_little_room_is_refused_before_a_byte_is_copied(tmp_path: Path, tiny: Path) -> None:
    large = write(tmp_path / "large.zarr", side=24)  # 8 x 55 kB
    size = sum(map(len, files_of(large).values()))
    with pytest.raises(
        BadInput, match=rf"0.000 GB free in {tiny}; wanted {size / 1e9:.3f} GB, the size of {large}. Free some, choose"
    ):
        stage.stage(large, tiny, say=pytest.fail)
    assert [p.suffix for p in tiny.iterdir()] == [".lock"]


def test_a_disk_that_fills_up_while_copying_is_refused_and_left_as_it_was(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = write(tmp_path / "large.zarr", side=24)
    usage = shutil.disk_usage(tiny)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))  # others take it meanwhile
    with pytest.raises(BadInput, match=r"GB free in .*/tiny; wanted 0.000 GB, the size of .*large.zarr"):
        stage.stage(large, tiny, say=print)
    assert [p.suffix for p in tiny.iterdir()] == [".lock"]
