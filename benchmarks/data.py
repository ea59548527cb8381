"""How many volumes a second does each way of reading give; and does the store open, write and hide latency as promised?

    python benchmarks/data.py --out benchmarks/results/DATE-data.json      # every way, 192 volumes; on a quiet machine
    python benchmarks/data.py --quick                                      # as `cauc bench data --quick`, a minute
    python benchmarks/data.py --table benchmarks/results/DATE-data.json    # its table and verdict again

The ways are those of cauc_dist.bench. Peers, in a venv of their own that already has torch (none may replace it):

    pip install monai torchio webdataset

Beside them: `open`, a store of 100,000 rows in a fresh process, imports not counted; `ingest`, volumes in memory to a
packed store on disk, in one process, each shard synced; `latency`, 20 ms added to each read, by 1 and by 16 threads.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cauc_dist.bench import peers as bench
from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import Loader
from cauc_dist.stream.plan import Plan

ROWS = 100_000
DELAY = 0.02
SITES = tuple(f"site {i}" for i in range(60))

OPEN = """
import sys, time
from cauc_dist.store.reader import Store
began = time.perf_counter()
store = Store.open(sys.argv[1])
print(time.perf_counter() - began, len(store))
"""


def opening(folder: Path, rows: int = ROWS, repeats: int = 5) -> dict[str, Any]:
    """Seconds of Store.open on `rows` rows with three columns, each time in a new process."""
    where, draw = folder / f"rows-{rows}", np.random.default_rng(0)
    tiny = draw.random((rows, 1, 2, 2, 2), np.float32)
    told = {
        Column("age", "number"): 20 + 60 * draw.random(rows),
        Column("sex", "category", ("F", "M")): draw.integers(0, 2, rows).astype(np.float64),
        Column("site", "category", SITES): draw.integers(0, len(SITES), rows).astype(np.float64),
    }
    ids = [f"sub-{i:06}" for i in range(rows)]
    metadata = tuple(told.values())
    from_arrays(where, tiny, ids, shape=(1, 2, 2, 2), columns=tuple(told), metadata=metadata, dtype="f32")
    seconds = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", OPEN, str(where)], capture_output=True, text=True, check=True)
        took, found = done.stdout.split()
        assert int(found) == rows
        seconds.append(float(took))
    return {"rows": rows, "seconds": seconds}


def ingesting(folder: Path, n: int = 128, repeats: int = 3) -> dict[str, Any]:
    """Seconds to write n volumes that are in memory."""
    maps = bench.Maps(bench.SHAPE)
    volumes = [maps.volume(i) for i in range(64)]
    mask = np.any([v != 0 for v in volumes], axis=0)
    many = [volumes[i % len(volumes)] for i in range(n)]
    found: dict[str, Any] = {"volumes": n}
    ids = [f"{i:05}" for i in range(n)]
    for layout, inside in (("packed", mask), ("dense", None)):
        found[layout] = []
        for _ in range(repeats):
            where, began = folder / "ingested", time.perf_counter()
            from_arrays(where, many, ids, shape=bench.SHAPE, mask=inside)
            found[layout].append(time.perf_counter() - began)
            shutil.rmtree(where)
    return found


class Far:
    """A store whose reads take `DELAY` longer, as over a network."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __len__(self) -> int:
        return len(self._store)

    def read_into(self, i: int, out: Any) -> None:
        time.sleep(DELAY)
        self._store.read_into(i, out)


def latency(store: Store, batches: int = 24, threads: Sequence[int] = (1, 4, 16)) -> dict[str, Any]:
    """Volumes a second of packed rows, by threads."""
    found: dict[str, Any] = {"delay_s": DELAY}
    plan = Plan(np.arange(len(store)), store.subjects, bench.BATCH, seed=0)
    for count in threads:
        span: dict[str, Any] = {"rank": 0, "world_size": 1, "start": 0, "stop": batches, "prefetch": 4}
        with Loader(Far(store), plan, **span, threads=count, normalise="none", expand=False) as ahead:
            began = time.perf_counter()
            volumes = sum(len(batch.rows) for batch in ahead)
        found[str(count)] = volumes / (time.perf_counter() - began)
    return found


def steadiness(way: dict[str, Any]) -> float | None:
    """Largest over smallest memory at the end of three epochs; None where it was not run or there is no /proc."""
    memory = way.get("epoch_bytes", [0])
    return max(memory) / min(memory) if min(memory) else None


def verdict(record: dict[str, Any]) -> list[tuple[str, float | None, str, float]]:
    """(number to reach, found, at least or at most, wanted)."""
    ways = record["ways"]
    wanted = [
        (f"{name}: volumes/s over {bench.BASE}", bench.ratio(ways, name), ">=", times)
        for name, times in {"dense f16": 8.0, "packed raw": 35.0, "packed": 12.0}.items()
    ]
    wanted += [
        (f"{name}: memory over 3 epochs, largest / smallest", steadiness(ways.get(name, {})), "<=", 1.02)
        for name in bench.OURS
    ]
    opened, written = record["open"]["seconds"], record["ingest"]
    rate = written["volumes"] / median(written["packed"])
    return [
        *wanted,
        (f"open {record['open']['rows']:,} rows: s", median(opened), "<=", 0.2),
        ("ingest, packed, from memory: volumes/s", rate, ">=", 100.0),
        ("16 threads over 1 with 20 ms a read", record["latency"]["16"] / record["latency"]["1"], ">=", 8.0),
    ]


def summary(record: dict[str, Any]) -> str:
    lines = [bench.table(record["ways"]), "", "numbers to reach:"]
    for name, found, sign, bound in verdict(record):
        met = None if found is None else found >= bound if sign == ">=" else found <= bound
        word = {None: "not run", True: "met", False: "MISSED"}[met]
        lines.append(f"  {word:8}{name}: {'-' if found is None else f'{found:.3g}'} (wanted {sign} {bound:g})")
    return "\n".join([*lines, bench.last_line(record["ways"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="24 volumes, no peers that need another install")
    parser.add_argument("--table", type=Path, help="a result: print its table again, run nothing")
    parser.add_argument("--volumes", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep what is read here; it may serve again")
    a = parser.parse_args()
    if a.table:
        print(summary(json.loads(a.table.read_text())))
        return 0
    if a.quick:
        return bench.data(True, a.out, _say)
    with tempfile.TemporaryDirectory(prefix="cauc-bench-") as temporary:
        folder = a.folder or Path(temporary)
        how = {"n": a.volumes, "shape": bench.SHAPE, "rounds": a.rounds, "at_least": 2.0, "folder": folder}
        record = bench.measure(tuple(bench.WAYS), _say, **how)
        record["open"] = opening(Path(temporary))
        record["ingest"] = ingesting(Path(temporary))
        record["latency"] = latency(Store.open(folder / bench.PACKED))
    if a.out:
        bench.save(record, a.out)
    print(summary(record))
    return int(any("not_run" in record["ways"][name] for name in bench.OURS))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
