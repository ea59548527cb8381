"""The rates of a user's store are of what was read, and the verdict follows from them."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cauc_dist.bench import rates, reading
from cauc_dist.bench.reading import Reading
from cauc_dist.errors import BadInput
from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.reader import Store
from cauc_dist.world import cores

SHAPE, N = (1, 12, 14, 10), 40


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> str:
    draw, where = np.random.default_rng(0), tmp_path_factory.mktemp("store") / "s.zarr"
    volumes = list(draw.standard_normal((N, *SHAPE)).astype(np.float32))
    from_arrays(where, volumes, [f"sub-{i:02}" for i in range(N)], shape=SHAPE)
    return str(where)


def test_every_way_reads_the_users_store_and_the_last_line_says_what_limits(where: str, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "data.json"
    assert reading.data(where, False, quick=True, out=out, say=said.append) == 0
    record = json.loads(out.read_text())
    found = record["found"]
    threads = [f"{n} thread{'s' * (n > 1)}" for n in (1, 2, 4, 8) if n <= max(2, cores())]
    assert sorted(found["rounds"]) == sorted([*threads, "as stored", "cold"])
    assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in found["rounds"].values())
    assert (found["scans"], found["shape"], found["layout"]) == (N, list(SHAPE), "dense")
    assert found["memcpy"] > 0
    assert found["disk"] > 0
    least = 2 * 12 * 14 * 10 / 2  # f16 noise: no codec halves it
    assert least < found["stored_bytes"] < 3 * 12 * 14 * 10
    assert said[-1] == record["verdict"]
    assert said[-1].startswith("What limits reading here: 2 reader threads give ")


def test_a_store_by_url_has_no_disk(where: str) -> None:
    found = replace(made({"2 threads": 100.0, "as stored": 200.0}), stored_bytes=None, disk=None)
    assert "by URL" in reading.table(found)[0]
    assert not any("disk, cold" in line for line in reading.table(found))
    assert "decoding" in reading.limits(found)


def test_made_scans_are_read_beside_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(reading.peers, "data", lambda quick, out, say: asked.append(quick) or 3)
    assert reading.data(None, True, quick=True, out=None, say=print) == 3
    assert asked == [True]


@pytest.mark.parametrize(
    ("store", "made", "says"),
    [
        (None, False, r"neither a store nor --made; wanted one of them"),
        ("s.zarr", True, r"--made and the store s\.zarr; wanted one of them"),
        ("gone.zarr", False, r"gone\.zarr"),
    ],
)
def test_one_of_store_and_made_is_read(store: str | None, made: bool, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        reading.data(store, made, quick=True, out=None, say=print)


def test_threads_and_scans_are_some(where: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--threads 0; wanted 1 or more"):
        reading.read(where, threads=0, quick=True, out=None, say=print)
    from_arrays(tmp_path / "one.zarr", [np.arange(1680, dtype=np.float32).reshape(SHAPE)], ["sub-1"], shape=SHAPE)
    with pytest.raises(BadInput, match=r"1 scan in .*one\.zarr; wanted two at least"):
        reading.read(str(tmp_path / "one.zarr"), quick=True, out=None, say=print)


def test_scans_are_counted_after_the_first_batches() -> None:
    def batches():  # type: ignore[no-untyped-def]
        for _ in range(20):
            time.sleep(0.01)
            yield 8

    rate = reading._counted(batches(), 0.05, 10**9)
    assert 8 / 0.013 / 2 < rate < 8 / 0.0099
    once = reading._counted(batches(), 10.0, 5)  # a cold store is read once, however long it may take
    assert once < 8 / 0.0099


def made(ways: dict[str, float], **facts: object) -> Reading:
    found = Reading("s.zarr", N, SHAPE, "dense", 1000, 2, 1e6, 5000.0, {way: [rate] for way, rate in ways.items()})
    return replace(found, **facts)  # type: ignore[arg-type]


WARM = {"1 thread": 100.0, "2 threads": 200.0, "as stored": 900.0, "cold": 190.0}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (made(WARM | {"cold": 50.0}, disk=60.0), "from cold files 50: it is the disk, whose bytes come at 60/s"),
        (made(WARM | {"cold": 50.0}, disk=None), "from cold files 50: it is the disk, whose rate is not known"),
        (
            made(WARM | {"cold": 50.0}),
            "the time that a random read takes, not the disk's rate (5,000/s in order)",
        ),
        (made(WARM, memcpy=300.0), "memory copies 300: it is this machine's memory"),
        (made(WARM | {"4 threads": 390.0}), "4 give 390: it is their number. Set --data.threads 4"),
        (made(WARM | {"4 threads": 210.0}), "4 no more than 210: it is decoding"),
        (made(WARM), "as stored they come at 900: it is decoding, expanding and normalising"),
    ],
)
def test_what_limits_follows_from_the_rates(found: Reading, says: str) -> None:
    assert says in reading.limits(found)
    assert ("Ingest it packed" in reading.limits(found)) == ("it is decoding" in says)
    assert "Ingest it packed" not in reading.limits(replace(found, layout="packed"))


def test_a_disk_reads_all_bytes_of_the_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file, size in zip(files, (rates.PIECE + 5, 7), strict=True):
        file.write_bytes(bytes(size))
    assert [rates._read(piece) for piece in rates._pieces(files, 10**9)] == [rates.PIECE, 5, 7]
    assert len(rates._pieces(files, rates.PIECE)) == 1
    assert rates.disk(files, 2, 10**9) > 0


def test_files_hold_the_scans_and_nothing_else(where: str) -> None:
    files = reading._volume_files(Path(where))
    assert files
    assert all(file.name != "zarr.json" for file in files)
    assert len(Store.open(where)) == N
