"""2,000 volumes of 121x145x121 as one store: write, open, verify, read an epoch, on 1 to 16 ranks, copy to a node.

    python benchmarks/full_size.py --out benchmarks/results/DATE-full-size.json --folder /tmp/full   # 6 GB of disk

Volumes are synthetic grey-matter maps (cauc_dist.bench.Maps), 250 of them (2 GB of memory), each
under eight names and factors.
"""

import argparse
import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cauc_dist.bench import peers as bench
from cauc_dist.provenance import provenance
from cauc_dist.store.check import check
from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.store.stage import stage
from cauc_dist.stream.loader import Loader
from cauc_dist.stream.plan import Plan

BATCH, DISTINCT, SEED = 32, 250, 0


def volumes(made: Sequence[np.ndarray], n: int) -> Iterator[np.ndarray]:
    for i in range(n):
        yield made[i % DISTINCT] * np.float32(1 + (i // DISTINCT) / 8)


def epoch(store: Store, **how: Any) -> dict[str, float]:
    """Volumes/s of all batches of an epoch, and this process's largest memory so far."""
    plan = Plan(np.arange(len(store)), store.subjects, BATCH, SEED)
    began, n = time.perf_counter(), 0
    span: dict[str, Any] = {"rank": 0, "world_size": 1, "start": 0, "stop": plan.steps_per_epoch}
    with Loader(store, plan, normalise="none", **span, **how) as batches:
        for batch in batches:
            batch.volumes[-1].flatten()[-1].item()
            n += len(batch.rows)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"volumes": n, "volumes_per_s": n / (time.perf_counter() - began), "max_rss_mib": mib}


def digest(store: Store, ranks: int, steps: range) -> str:
    """sha256 of the batches of some steps, the slices of all ranks in their order."""
    plan, found = Plan(np.arange(len(store)), store.subjects, BATCH, SEED), hashlib.sha256()
    for step in steps:
        for rank in range(ranks):
            span: dict[str, Any] = {"rank": rank, "world_size": ranks, "start": step, "stop": step + 1}
            with Loader(store, plan, threads=1 + ranks % 2, prefetch=1, **span) as batches:
                found.update(next(batches).volumes.numpy().tobytes())
    return found.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--volumes", type=int, default=2000)
    a = parser.parse_args()
    torch.set_num_threads(1)
    a.folder.mkdir(parents=True)
    store_path, n = a.folder / "full.zarr", a.volumes
    record: dict[str, Any] = {**provenance(), "question": str(__doc__).split("\n")[0], "n": n, "batch": BATCH}
    maps = bench.Maps(bench.SHAPE)
    distinct = [maps.volume(i) for i in range(DISTINCT)]
    inside = np.zeros(bench.SHAPE, bool)
    for volume in distinct:
        inside |= volume != 0
    ids, ages = [f"sub-{i:05d}" for i in range(n)], np.linspace(6, 80, n)
    told: dict[str, Any] = {"columns": [Column("age", "number")], "metadata": [ages]}
    made = from_arrays(store_path, volumes(distinct, n), ids, shape=bench.SHAPE, mask=inside, **told)
    record["write"] = {"volumes_per_s": n / made.seconds, "bytes": made.bytes_out, "coverage": made.coverage}
    began = time.perf_counter()
    store = Store.open(store_path)
    record["open_s"] = time.perf_counter() - began
    began = time.perf_counter()
    verdict = check(str(store_path), threads=2)
    record["verify"] = {"seconds": time.perf_counter() - began, "faults": len(verdict.faults)}
    record["epoch_as_stored"] = epoch(store, expand=False)
    record["epoch_expanded"] = epoch(store)
    digests = {ranks: digest(store, ranks, range(10, 13)) for ranks in (1, 2, 4, 16)}
    record["same_on_ranks"] = {"ranks": list(digests), "equal": len(set(digests.values())) == 1}
    began = time.perf_counter()
    (a.folder / "node").mkdir()
    copy = Store.open(stage(store_path, a.folder / "node", say=print))
    record["stage"] = {"seconds": time.perf_counter() - began, "equal": digest(copy, 1, range(10, 13)) == digests[1]}
    a.out.write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(a.folder)
    print(json.dumps({k: record[k] for k in list(record)[-8:]}, indent=1))
    sound = not verdict.faults and record["same_on_ranks"]["equal"] and record["stage"]["equal"]
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
