"""On an NVIDIA GPU: are the objectives' kernels right, what do they cost, and how near is that to products alone?

    python benchmarks/loss_gpu.py --out benchmarks/results/DATE-loss-gpu.json       # five minutes
    python benchmarks/loss_gpu.py --tune --out /tmp/tune.json                       # other tiles than the defaults
    python benchmarks/loss_gpu.py --table benchmarks/results/DATE-loss-gpu.json     # its tables again

N = V n embeddings of n subjects in V = 2 views, fp32, D = 128, kernel product(age=gaussian(5), sex=delta()), real ages.

rates   TFLOP/s of torch's matrix product, fp32 and TF32, on (N, 128) x (128, N) and on squares of 8,192. A product of
        our kernels is three TF32 products, so its limit is a third of TF32's rate.
right   value and gradient against dense autograd in float64 on the same embeddings.
cost    forward and backward, median of CUDA events; peak memory beyond the embeddings; beside dense autograd in fp32
        (where it fits) and our plain tiles (no Triton). `limit`: the least products of fp32 accuracy at a third of
        the TF32 rate. For cauc 2 of N^2/V pairs (a view at a time) and 1 of n^2 (alignment, by subject); for y-Aware 3
        of N^2 (row sums, sums with gradient) and the same 1; for NT-Xent 3 of N^2.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss import SIGMA, TAU, Inputs, T, V, dense_cauc, dense_ntxent, dense_y_aware, inputs, kernel, tangent
from cauc_dist import bench, losses
from cauc_dist.losses import gpu
from cauc_dist.provenance import provenance

D = 128
GIB, TERA = 2**30, 1e12
DENSE = 32_768
"""Largest N of dense autograd: ten N x N matrices."""
TILES = 65_536
"""Largest N of the plain tiles."""
Loss = Callable[[Inputs], Tensor]

OURS: dict[str, Loss] = {
    "cauc": lambda a: losses.cauc(a.z, a.y, kernel(), t=T),
    "cauc pooled": lambda a: losses.cauc(a.z, a.y, kernel(), t=T, views="pooled"),
    "y_aware": lambda a: losses.y_aware_infonce(a.z, a.y, kernel(), tau=TAU),
    "ntxent": lambda a: losses.ntxent(a.z, tau=TAU),
}
DENSE_OF: dict[str, Loss] = {"cauc pooled": dense_cauc, "y_aware": dense_y_aware, "ntxent": dense_ntxent}


def products(objective: str, N: int) -> float:
    """Floating-point operations of the matrix products that it cannot do without, each in fp32."""
    one = 2.0 * N * N * D
    pull = one / V**2
    return {"cauc": 2 * one / V + pull, "cauc pooled": 2 * one + pull, "y_aware": 3 * one + pull, "ntxent": 3 * one}[
        objective
    ]


def on_gpu(N: int, dtype: torch.dtype = torch.float32) -> Inputs:
    a = inputs(N, D)
    return Inputs(a.z.detach().to("cuda", dtype).requires_grad_(), a.y.cuda(), a.labels.cuda())


@contextmanager
def without_triton() -> Iterator[None]:
    usable, gpu.usable = gpu.usable, lambda *a, **k: False
    try:
        yield
    finally:
        gpu.usable = usable


# ---- rates ------------------------------------------------------------------------------------------------------


def seconds_of(act: Callable[[], Any], repeats: int) -> list[float]:
    """Of CUDA events, after one more that warms up."""
    act()
    found = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        act()
        ended.record()
        torch.cuda.synchronize()
        found.append(began.elapsed_time(ended) / 1000)
    return found


def rates() -> dict[str, float]:
    """TFLOP/s, and of a copy bytes/s read and written."""
    found = {}
    for precision, tf32 in (("fp32", False), ("tf32", True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for name, (m, k) in {"thin": (16_384, D), "square": (8_192, 8_192)}.items():
            a, b = torch.randn(m, k, device="cuda"), torch.randn(k, m, device="cuda")
            out = torch.empty(m, m, device="cuda")
            took = median(seconds_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 10))  # type: ignore[misc]
            found[f"{precision} {name}"] = 2.0 * m * m * k / took / TERA
    torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    found["copy bytes/s"] = 2 * 4 * len(x) / median(seconds_of(lambda: y.copy_(x), 10))
    return found


# ---- right ------------------------------------------------------------------------------------------------------


def value_and_gradient(loss: Loss, a: Inputs) -> tuple[float, Tensor]:
    value = loss(a)
    (gradient,) = torch.autograd.grad(value, a.z)
    return value.item(), tangent(gradient, a.z.detach()).double()


def right(N: int) -> dict[str, dict[str, float]]:
    """Errors against float64: of the value (relative above 1), of the gradient (largest over largest, and in norm)."""
    found = {}
    for objective, dense in DENSE_OF.items():
        value, gradient = value_and_gradient(OURS[objective], on_gpu(N))
        exact, slope = value_and_gradient(dense, on_gpu(N, torch.float64))
        single, rough = value_and_gradient(dense, on_gpu(N))
        found[objective] = {
            "value": abs(value - exact) / max(1.0, abs(exact)),
            "gradient": float((gradient - slope).abs().max() / slope.abs().max()),
            "gradient_norm": float((gradient - slope).norm() / slope.norm()),
            "dense_fp32_value": abs(single - exact) / max(1.0, abs(exact)),
            "dense_fp32_gradient": float((rough - slope).abs().max() / slope.abs().max()),
        }
    return found


# ---- cost -------------------------------------------------------------------------------------------------------


def cost(loss: Loss, N: int) -> dict[str, Any]:
    """Seconds of forward and backward, bytes at their peak beyond the embeddings and their gradient."""
    a = on_gpu(N)
    act = lambda: torch.autograd.grad(loss(a), a.z)  # noqa: E731
    act()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = seconds_of(act, 9 if N <= 32_768 else 3 if N <= 262_144 else 1)
    peak = torch.cuda.max_memory_allocated() - before - a.z.numel() * 4
    return {"seconds": seconds, "peak_bytes": peak}


def costs(sizes: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for N, (objective, loss) in itertools.product(sizes, OURS.items()):
        point: dict[str, Any] = {"objective": objective, "N": N, "ours": cost(loss, N)}
        if objective in DENSE_OF and N <= DENSE:
            point["dense"] = cost(DENSE_OF[objective], N)
        if N <= TILES:
            with without_triton():
                point["tiles"] = cost(loss, N)
        found.append(point)
        torch.cuda.empty_cache()
        print(f"{objective}, N = {N:,}: {median(point['ours']['seconds']) * 1e3:.2f} ms", flush=True)
    return found


# ---- other tiles ------------------------------------------------------------------------------------------------

CANDIDATES = [
    (rows, columns, depth, warps, stages)
    for rows, columns, depth, warps, stages in itertools.product(
        (32, 64, 128), (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
    )
    if rows * columns <= 128 * 64 and (warps == 8 or rows * columns <= 64 * 64)
]


def one_side(m: int) -> Any:
    """A side as conditional uniformity has it: ages, sexes, subjects."""
    from cauc_dist.losses.fused import Side

    draw = torch.Generator().manual_seed(m)
    x = torch.nn.functional.normalize(torch.randn(m, D, generator=draw), dim=1)
    u = (6 + 80 * torch.rand(m, 1, generator=draw)) * math.sqrt(0.5 / math.log(2)) / SIGMA
    number = torch.arange(m, dtype=torch.int32)
    cat = torch.randint(2, (m,), generator=draw, dtype=torch.int32)
    known = {"x": x, "id": number, "u": u, "cat": cat, "subject": number}
    return Side(**{name: value.cuda() for name, value in known.items()})


KERNELS: dict[str, float] = {"exp_sums": 4.0, "pull": 2.0}
"""Operations a pair and coordinate."""


def launch(name: str, tile: Sequence[int], side: Any) -> Any:
    from cauc_dist.losses import fused

    {"exp_sums": fused.EXP_SUMS, "pull": fused.PULL}[name][D] = fused.Tile(*tile)
    return fused.exp_sums(side, side, 2 * T, True) if name == "exp_sums" else fused.pull(side, side)


def build(job: tuple[str, Sequence[int]]) -> str:
    """Compiles into Triton's cache, in a process beside others; says what went wrong."""
    try:
        launch(*job, one_side(256))
        torch.cuda.synchronize()
    except Exception as error:  # a tile that needs too much shared memory, in whatever words
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def tune(m: int, seconds: float) -> list[dict[str, Any]]:
    """TFLOP/s of every tile that compiles in time; every one gives the same sums as the default."""
    jobs = [(name, tile) for name in KERNELS for tile in CANDIDATES]
    pool = ProcessPoolExecutor(12, get_context("spawn"))
    waiting = {pool.submit(build, job): job for job in jobs}
    done, late = wait(waiting, timeout=seconds)
    for process in list((pool._processes or {}).values()) if late else []:
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    side, found = one_side(m), []
    exact = {name: launch(name, (16, 32, 32, 4, 1), side) for name in KERNELS}
    for future in done:
        name, tile = waiting[future]
        if future.exception() or future.result():
            found.append({"kernel": name, "tile": tile, "not_run": str(future.exception() or future.result())})
            continue
        sums = launch(name, tile, side)
        off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(sums, exact[name], strict=True))
        took = median(seconds_of(lambda name=name, tile=tile: launch(name, tile, side), 3))  # type: ignore[misc]
        rate = KERNELS[name] * m * m * D / took / TERA
        found.append({"kernel": name, "tile": tile, "tflops": rate, "difference": off})
    return sorted(found, key=lambda each: -each.get("tflops", 0.0))


def choose(tuned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest tile of each kernel, which is used from here on in this process."""
    from cauc_dist.losses import fused

    best = {}
    for name, tiles in (("exp_sums", fused.EXP_SUMS), ("pull", fused.PULL)):
        found = [each for each in tuned if each["kernel"] == name and each.get("difference", 1.0) < 1e-5]
        best[name] = found[0]["tile"] if found else asdict(tiles[D])
        if found:
            tiles[D] = fused.Tile(*best[name])
    return best


# ---- what came out ----------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    rate = record["rates"]
    peak = max(rate["tf32 thin"], rate["tf32 square"]) / 3
    lines = ["TFLOP/s: " + ", ".join(f"{name} {value:.4g}" for name, value in rate.items())]
    for objective, errors in record["right"].items():
        lines.append(f"{objective}: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()))
    lines.append("| objective | N | ms | of the limit | TFLOP/s | MiB | dense: times, MiB | tiles: times, MiB |")
    lines.append("|" + "---|" * 8)
    for p in record["cost"]:
        took, work = median(p["ours"]["seconds"]), products(p["objective"], p["N"])
        others = [
            f"{median(p[who]['seconds']) / took:.2f}, {p[who]['peak_bytes'] / 2**20:,.0f}" if who in p else ""
            for who in ("dense", "tiles")
        ]
        lines.append(
            f"| {p['objective']} | {p['N']:,} | {took * 1e3:.2f} | {work / took / TERA / peak:.2f} "
            f"| {work / took / TERA:.1f} | {p['ours']['peak_bytes'] / 2**20:,.0f} | {' | '.join(others)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--tune", action="store_true", help="try tiles first, and go on with the fastest")
    parser.add_argument("--largest", type=int, default=1_048_576)
    a = parser.parse_args()
    if a.table:
        print(table(json.loads(a.table.read_text())))
        return
    record = {**provenance(), "device": torch.cuda.get_device_name(), "D": D, "V": V, "began": time.time()}
    if a.tune:
        record["tuned"] = tune(32_768, 75.0)
        record["tiles"] = choose(record["tuned"])
        for name in KERNELS:
            top = [each for each in record["tuned"] if each["kernel"] == name and "tflops" in each][:6]
            lines = [f"{each['tile']}: {each['tflops']:.1f} ({each['difference']:.0e})" for each in top]
            print(name, *lines, sep="\n  ")
    record["rates"] = rates()
    record["right"] = right(4096)
    sizes = [n for n in (1024, 4096, 16_384, 32_768, 65_536, 262_144, 1_048_576) if n <= a.largest]
    record["cost"] = costs(sizes)
    if a.out:
        bench.save(record, a.out)
    print(table(record))


if __name__ == "__main__":
    main()
