"""Which tiles and which precision are the fastest on this NVIDIA GPU, for the kernels of `cauc_dist.losses.fused`?

    python benchmarks/tiles_gpu.py --out benchmarks/results/DATE-tiles-gpu.json      # two minutes

32,768 rows against as many columns, ages, sexes and subjects known (as in conditional uniformity), of D = 64, 128, 256:
TFLOP/s of their products, and the largest difference from the tiles of tf32x3 that spill no register. Every tile is
compiled first, in processes side by side; one that does not compile is named.
"""

import argparse
import itertools
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss import SIGMA, T
from benchmarks.loss_gpu import TERA, seconds_of
from cauc_dist.bench import peers as bench
from cauc_dist.losses import fused
from cauc_dist.losses.fused import Precision, Side, Tile
from cauc_dist.provenance import provenance

Job = tuple[str, int, Precision, tuple[int, int, int, int, int]]
"""Kernel, D, precision, and rows, columns, depth, warps, stages of its tile."""
ROWS = 32_768
OPERATIONS = {"exp_sums": 4, "pull": 2}
"""A pair of rows and a coordinate."""


def jobs() -> list[Job]:
    found: list[Job] = []
    for D, rows, columns, warps, stages in itertools.product((64, 128, 256), (32, 64, 128), (32, 64), (4, 8), (1, 2)):
        if warps == 4 or rows == 128:
            tile = (rows, columns, min(D, 128), warps, stages)
            found += [(name, D, how, tile) for name in OPERATIONS for how in ("bf16x6", "tf32x3")]  # type: ignore[misc]
    return found


def side(m: int, D: int) -> Side:
    draw = torch.Generator().manual_seed(m)
    x = torch.nn.functional.normalize(torch.randn(m, D, generator=draw), dim=1)
    u = (6 + 80 * torch.rand(m, 1, generator=draw)) * math.sqrt(0.5 / math.log(2)) / SIGMA
    number = torch.arange(m, dtype=torch.int32)
    cat = torch.randint(2, (m,), generator=draw, dtype=torch.int32)
    return Side(x.cuda(), number.cuda(), u.cuda(), cat.cuda(), number.cuda())


def launch(name: str, known: Side, precision: Precision) -> Any:
    if name == "pull":
        return fused.pull(known, known, precision)
    return fused.exp_sums(known, known, 2 * T, True, precision)


def chosen(job: Job) -> None:
    """The tile takes the place of the default, in this process."""
    name, D, precision, tile = job
    (fused.EXP_SUMS if name == "exp_sums" else fused.PULL)[precision][D] = Tile(*tile)


def build(job: Job) -> str:
    """Compiles into Triton's cache; what went wrong."""
    try:
        chosen(job)
        launch(job[0], side(256, job[1]), job[2])
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, in whatever words
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=14)
    a = parser.parse_args()
    sides = {D: side(ROWS, D) for D in (64, 128, 256)}
    exact = {(name, D): launch(name, sides[D], "tf32x3") for name in OPERATIONS for D in sides}
    with ProcessPoolExecutor(a.processes, get_context("spawn")) as pool:
        wrong = list(pool.map(build, jobs()))
    found = []
    for job, error in zip(jobs(), wrong, strict=True):
        name, D, precision, tile = job
        point: dict[str, Any] = {"kernel": name, "D": D, "precision": precision, "tile": tile}
        if error:
            found.append({**point, "not_run": error})
            continue
        chosen(job)
        pairs = zip(launch(name, sides[D], precision), exact[name, D], strict=True)
        off = max(float((ours - its).abs().max() / its.abs().max()) for ours, its in pairs)
        seconds = seconds_of(lambda name=name, D=D, how=precision: launch(name, sides[D], how), 3)  # type: ignore[misc]
        rate = OPERATIONS[name] * ROWS**2 * D / min(seconds) / TERA
        found.append({**point, "tflops": rate, "seconds": seconds, "difference": off})
    found.sort(key=lambda each: (each["kernel"], each["D"], -each.get("tflops", 0.0)))
    bench.save({**provenance(), "device": torch.cuda.get_device_name(), "rows": ROWS, "tiles": found}, a.out)
    for (name, D), group in itertools.groupby(found, key=lambda each: (each["kernel"], each["D"])):
        for each in list(group)[:5]:
            facts = f"{each['precision']} {each['tile']}: {each['tflops']:.1f} TFLOP/s, off by {each['difference']:.0e}"
            print(f"{name}, D = {D}: {facts}" if "tflops" in each else f"{name}, D = {D}: nothing ran")


if __name__ == "__main__":
    main()
