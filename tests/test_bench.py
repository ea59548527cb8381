"""The data benchmark reads what it says it reads, and its verdict follows from the raw numbers."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import data as full
from cauc_dist.bench import peers as bench
from cauc_dist.bench.peers import WAYS, Contestant, Data, Maps
from cauc_dist.errors import BadInput
from cauc_dist.store.reader import Store

SHAPE = (1, 16, 18, 14)
HERE = [name for name, way in WAYS.items() if bench.installed(way.needs)]
ABSENT = [name for name in WAYS if name not in HERE]


def ignore(line: str) -> None: ...


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    data = Data(tmp_path_factory.mktemp("formats"), 16, SHAPE)
    bench.write(data, [way.format for way in WAYS.values()], ignore)
    return data


def test_maps_are_mostly_zero_and_depend_on_seed_and_number_alone() -> None:
    shape = (1, 61, 73, 61)
    one, other = Maps(shape), Maps(shape)
    first = one.volume(0)
    third = other.volume(3)
    assert first.dtype == np.float32
    assert 0.70 < (first == 0).mean() < 0.78
    assert first.min() == 0
    np.testing.assert_array_equal(one.volume(3), third)
    assert (first != third).mean() > 0.2
    assert (first != Maps(shape, seed=1).volume(0)).mean() > 0.2


def test_a_run_reads_every_way_and_says_the_ratios_last(data: Data, tmp_path: Path) -> None:
    said: list[str] = []
    how = {"n": data.n, "shape": SHAPE, "rounds": 2, "at_least": 0.01, "folder": data.folder}
    assert bench.data(False, tmp_path / "new" / "out.json", said.append, **how) == 0
    record = json.loads((tmp_path / "new" / "out.json").read_text())
    ways = record["ways"]
    assert list(ways) == list(WAYS)
    assert {name: ways[name]["not_run"] for name in ABSENT} == {
        name: f"{WAYS[name].needs} is not installed" for name in ABSENT
    }
    for name in HERE:
        assert "not_run" not in ways[name], ways[name].get("traceback")
        assert ways[name]["difference"] <= (0 if WAYS[name].gives == "source" else 2**-11)
        assert len(ways[name]["rounds"]) == 2
        assert len(ways[name]["epoch_bytes"]) == 3
        assert ways[name]["peak_bytes"] >= max(ways[name]["epoch_bytes"]) > 2**20
        assert all(r["volumes"] >= data.n and r["seconds"] > 0 and r["cpu_seconds"] > 0 for r in ways[name]["rounds"])
    assert record["bytes"]["npy"] > data.n * 4 * np.prod(SHAPE)
    assert record["git"] is None or len(record["git"]["commit"]) == 40
    assert said[-1].startswith("volumes/s, as multiples of zarr-python's default with a DataLoader: memcpy ")
    assert all(f"{name} " in said[-1] for name in HERE if name != bench.BASE)


def test_npy_files_the_source_of_every_check_are_the_maps(data: Data) -> None:
    maps = Maps(SHAPE)
    for i in (0, 7, 15):
        np.testing.assert_array_equal(data[i], maps.volume(i))


def test_the_stores_hold_the_maps(data: Data) -> None:
    maps = Maps(SHAPE)
    for name in (bench.PACKED, bench.F16, bench.I16):
        store = Store.open(data.folder / name)
        assert store.layout == name.partition("-")[0]
        for i in (0, 7, 15):
            source = maps.volume(i).astype(np.float64)
            np.testing.assert_allclose(store.volume(store.ids.index(f"{i:05}")), source, atol=2**-11 * source.max())


Batches = list[tuple[Any, torch.Tensor]]


def another_scan(batches: Batches) -> Batches:
    return [(rows, batch.roll(1, 0)) for rows, batch in batches]


def one_voxel(batches: Batches) -> Batches:
    batches[1][1][0, 0, 8, 9, 7] += 0.01
    return batches


def left_right(batches: Batches) -> Batches:
    return [(rows, batch.flip(2)) for rows, batch in batches]


def one_twice(batches: Batches) -> Batches:
    return [batches[0], batches[0]]


def one_missing(batches: Batches) -> Batches:
    return batches[:1]


def half_precision(batches: Batches) -> Batches:
    return [(rows, batch.half()) for rows, batch in batches]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (another_scan, "voxels differ"),
        (one_voxel, "voxels differ"),
        (left_right, "voxels differ"),
        (one_twice, "16 scans were read, 8 different ones, of 16"),
        (one_missing, "8 scans were read"),
        (half_precision, "batches are torch.float16"),
    ],
)
@pytest.mark.parametrize("name", ["preadv", "packed", "packed volume", "dense i16"])
def test_a_way_that_reads_something_else_is_refused(
    data: Data, name: str, wrong: Callable[[Batches], Batches], complaint: str
) -> None:
    way = WAYS[name]
    read = way.open(data)

    def kept(order: list[Any]) -> Batches:
        return [(rows, batch.clone()) for rows, batch in read(order)]

    assert bench.check(data, way, lambda order: iter(kept(order))) <= 2**-11
    with pytest.raises(ValueError, match=complaint):
        bench.check(data, way, lambda order: iter(wrong(kept(order))))


def test_a_way_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    data = Data(tmp_path, 16, SHAPE)
    bench.write(data, ["npy"], ignore)
    ways = bench.contest(data, ["packed", "memcpy"], 1, 0.01, ignore)
    assert bench.PACKED in ways["packed"]["not_run"]
    assert len(ways["memcpy"]["rounds"]) == 1
    assert f"packed        left out: {ways['packed']['not_run']}" in bench.table(ways)
    assert bench.ratio(ways, "packed", "memcpy") is None


def test_a_killed_way_is_left_out(data: Data) -> None:
    with Contestant("preadv", data, 0.01) as one:
        assert one.round(1)["volumes"] >= data.n
        os.kill(one._process.pid or 0, signal.SIGKILL)
        one._process.join()
        assert one.round(2) == {"not_run": "its process ended"}


def test_a_silent_way_is_given_up(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LIMIT", 0.0)
    with Contestant("preadv", data, 0.01) as one:
        assert one.told == {"not_run": "it said nothing for 0 s"}


def test_quick_leaves_out_what_needs_another_install(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def measure(names: list[str], say: bench.Say, **how: Any) -> dict[str, Any]:
        asked.update(how, names=names)
        return {"ways": {}}

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.data(True, None, ignore) == 0
    assert not {WAYS[name].needs for name in asked["names"]} - {""}
    assert (asked["n"], asked["shape"]) == (24, (1, 121, 145, 121))


def test_input_that_cannot_be_used_is_refused(data: Data) -> None:
    how: dict[str, Any] = {"shape": SHAPE, "rounds": 1, "at_least": 0.01, "folder": data.folder}
    with pytest.raises(BadInput, match=r"12 volumes; wanted whole batches of 8\. Use 16"):
        bench.measure(["npy"], ignore, n=12, **how)
    with pytest.raises(BadInput, match=r"\[16, .*wanted \[24, .*Name another folder, or delete this one"):
        bench.measure(["npy"], ignore, n=24, **how)


def rounds(*rates: float) -> dict[str, Any]:
    told = [{"volumes": 8, "seconds": 8 / rate, "cpu_seconds": 0.004} for rate in rates]
    return {"what": "", "peak_bytes": 2**20, "epoch_bytes": [2**20] * 3, "rounds": told}


def test_a_ratio_is_the_median_of_those_within_rounds() -> None:
    ways = {bench.BASE: rounds(100, 10, 50), "npy": rounds(200, 30, 50)}
    assert bench.ratio(ways, "npy") == pytest.approx(2.0)  # of 2, 3 and 1; the medians' ratio is 1
    assert bench.last_line(ways).endswith(": npy 2.00")
    assert bench.last_line({"npy": rounds(1)}).endswith(": none was run")
    row = bench.table(ways).splitlines()[2].split()
    assert row == ["npy", "50", "2.00", "0.50", "1"]


def test_the_verdict_follows_from_the_raw_numbers() -> None:
    ways = {bench.BASE: rounds(100, 100), "dense f16": rounds(900, 810), "packed raw": rounds(3000, 3100)}
    ways["dense f16"]["epoch_bytes"][2] *= 2
    opened, ingested = {"rows": 100_000, "seconds": [0.1, 0.3, 0.15]}, {"volumes": 100, "packed": [2.0, 0.9, 0.8]}
    record = {"ways": ways, "rounds": 2, "open": opened, "ingest": ingested, "latency": {"1": 45.0, "16": 474.0}}
    lines = full.summary(record).splitlines()
    verdict = [line for line in lines if line.startswith("  ")]
    assert [line.split()[0] for line in verdict if "volumes/s over" in line] == ["met", "MISSED", "not"]
    assert any(line.split()[0] == "MISSED" and "dense f16: memory" in line and ": 2 " in line for line in verdict)
    assert any(line.split()[0] == "met" and "packed raw: memory" in line for line in verdict)
    assert any(line.split()[0] == "met" and "open 100,000 rows: s: 0.15 " in line for line in verdict)
    assert any(line.split()[0] == "met" and "ingest, packed, from memory: volumes/s: 111 " in line for line in verdict)
    assert any(line.split()[0] == "met" and "16 threads over 1 with 20 ms a read: 10.5 " in line for line in verdict)
    assert lines[-1] == bench.last_line(ways)


def test_a_far_store_is_a_store_that_answers_later(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "DELAY", 0.05)
    found = full.latency(Store.open(data.folder / bench.PACKED), batches=2, threads=(1, 16))
    assert found["1"] < 1 / 0.05
    assert found["16"] > 2 * found["1"]


def test_opening_counts_the_rows_it_opened(tmp_path: Path) -> None:
    found = full.opening(tmp_path, rows=50, repeats=1)
    assert found["rows"] == 50
    assert 0 < found["seconds"][0] < 5
