"""On an NVIDIA GPU: are the objectives' kernels right, what do they cost, and how near is that to products alone?

    python benchmarks/loss_gpu.py --out benchmarks/results/DATE-loss-gpu.json       # five minutes
    python benchmarks/loss_gpu.py --table benchmarks/results/DATE-loss-gpu.json     # its tables again

N = V n embeddings of n subjects in V = 2 views, fp32, D = 128, kernel product(age=gaussian(5), sex=delta()), real ages.

rates   TFLOP/s of torch's matrix product on (N, 128) x (128, N) and on squares of 8,192: fp32, TF32 and bf16. A product
        of our kernels is six of bf16 or three of TF32: a sixth, or a third, of those rates is their own limit.
right   value and gradient against dense autograd in float64 on the same embeddings.
cost    forward and backward, median of CUDA events; peak memory beyond the embeddings; beside dense autograd in fp32
        (where it fits), our plain tiles (no Triton) and our kernels whatever N. `limit`: the least products, at the
        measured rate of fp32 products. For cauc 2 of N^2/V pairs (a view at a time) and 1 of n^2 (alignment, by
        subject); for y-Aware 3 of N^2 (row sums, sums with gradient) and the same 1; for NT-Xent 3 of N^2.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss import TAU, Inputs, T, V, dense_cauc, dense_ntxent, dense_y_aware, inputs, kernel, tangent
from cauc_dist import losses
from cauc_dist.bench import peers as bench
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


OTHERS = ("dense", "tiles", "kernels")


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
def usable_from(smallest: int) -> Iterator[None]:
    """Triton's kernels from so many embeddings on."""
    before, gpu.SMALLEST = gpu.SMALLEST, smallest
    try:
        yield
    finally:
        gpu.SMALLEST = before


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
    for precision in ("fp32", "tf32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for name, (m, k) in {"thin": (16_384, D), "square": (8_192, 8_192)}.items():
            a, b = (torch.randn(size, device="cuda", dtype=dtype) for size in ((m, k), (k, m)))
            out = torch.empty(m, m, device="cuda", dtype=dtype)
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
        with usable_from(0):
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


def costs(sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    for N, (objective, loss) in itertools.product(sizes, OURS.items()):
        point: dict[str, Any] = {"objective": objective, "N": N, "ours": cost(loss, N)}
        if objective in DENSE_OF and N <= DENSE:
            point["dense"] = cost(DENSE_OF[objective], N)
        if N <= TILES:
            with usable_from(0):
                point["kernels"] = cost(loss, N)
            with usable_from(10**9):
                point["tiles"] = cost(loss, N)
        torch.cuda.empty_cache()
        print(f"{objective}, N = {N:,}: {median(point['ours']['seconds']) * 1e3:.2f} ms", flush=True)
        yield point


# ---- what came out ----------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    rate = record["rates"]
    peak = max(rate["fp32 thin"], rate["fp32 square"])
    lines = ["TFLOP/s: " + ", ".join(f"{name} {value:.4g}" for name, value in rate.items())]
    for objective, errors in record["right"].items():
        lines.append(f"{objective}: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()))
    heads = " | ".join(f"{who}: times, MiB" for who in OTHERS)
    lines.append(f"| objective | N | ms | of the limit | TFLOP/s | MiB | {heads} |")
    lines.append("|" + "---|" * (6 + len(OTHERS)))
    for p in record["cost"]:
        took, work = median(p["ours"]["seconds"]), products(p["objective"], p["N"])
        others = [
            f"{median(p[who]['seconds']) / took:.2f}, {p[who]['peak_bytes'] / 2**20:,.0f}" if who in p else ""
            for who in OTHERS
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
    parser.add_argument("--largest", type=int, default=1_048_576)
    a = parser.parse_args()
    if a.table:
        print(table(json.loads(a.table.read_text())))
        return
    record = {**provenance(), "device": torch.cuda.get_device_name(), "D": D, "V": V, "began": time.time()}
    record["rates"] = rates()
    record["right"] = right(4096)
    sizes = [n for n in (1024, 4096, 16_384, 32_768, 65_536, 262_144, 1_048_576) if n <= a.largest]
    record["cost"] = []
    for point in costs(sizes):
        record["cost"].append(point)
        if a.out:
            bench.save(record, a.out)
    print(table(record))


if __name__ == "__main__":
    main()
