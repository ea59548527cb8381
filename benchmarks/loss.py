"""What do the objectives cost at N embeddings of width D: time and peak memory, forward and backward, one CPU thread?

    python benchmarks/loss.py --out benchmarks/results/DATE-loss.json      # and DATE-loss.svg; on a quiet machine
    python benchmarks/loss.py --quick --out /tmp/loss.json                 # N up to 4,096, a minute
    python benchmarks/loss.py --plot benchmarks/results/DATE-loss.json     # its table, verdict and plot again

N = V n embeddings of n subjects in V = 2 views; kernel product(age=gaussian(5), sex=delta()), ages U[6, 86] in float64
(real numbers; --whole-years: rounded); views pooled; fp32. Contestants:

ours    cauc_dist.losses
dense   the equation in plain autograd, N x N matrices; same views, same normaliser
flash   rows x columns in blocks, nothing kept, all recomputed in backward, as flash attention does
nidl    nidl.losses.YAwareInfoNCE        pip install --no-deps nidl
pml     pytorch_metric_learning.losses   pip install --no-deps pytorch-metric-learning tqdm
gemm    the matrix products of our tiles, nothing else: their floor

A `pair` runs ours and one other in turn in one process, A B A B ...: times are compared there, by the median of the
ratios of neighbours. Peak memory is that of a process that runs one contestant at one N. Pairs have the machine to
themselves; processes of one contestant run two at a time, which memory does not mind (`beside_another` in the result).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from cauc_dist import kernels, losses
from cauc_dist.losses import tiled
from cauc_dist.provenance import provenance
from cauc_dist.report import need_matplotlib

V, SIGMA, TAU, T = 2, 5.0, 0.1, 2.0
LOG2E = 1.0 / math.log(2.0)
MIB, GIB = 2**20, 2**30
LONG = 60.0
"""Seconds of a run from which on it is not repeated."""
LIMIT = 1200.0
"""Seconds after which a point is given up."""
SHARE = 0.8
"""Of the memory that is free: no point is started that needs more, and none gets more."""
PEERS = {"nidl": ("nidl", "nidl"), "pml": ("pytorch_metric_learning", "pytorch-metric-learning")}
"""Contestant: module and distribution."""


@dataclass(frozen=True)
class Inputs:
    z: Tensor
    """(V, n, D) of unit rows, fp32, a leaf; the views of a subject are near each other."""
    y: Tensor
    """(n, 2) float64: age, sex."""
    labels: Tensor
    """(n,) one of ten classes, for supcon."""

    @property
    def x(self) -> Tensor:
        """(N, D), view-major."""
        return self.z.flatten(0, 1)


def inputs(N: int, D: int, whole_years: bool = False) -> Inputs:
    draw, n = torch.Generator().manual_seed(0), N // V
    z = torch.randn(V, n, D, generator=draw).mul_(0.5).add_(torch.randn(1, n, D, generator=draw))
    age = 6 + 80 * torch.rand(n, generator=draw, dtype=torch.float64)
    sex = torch.randint(2, (n,), generator=draw).double()
    z /= z.norm(dim=-1, keepdim=True)
    y = torch.stack([age.round() if whole_years else age, sex], 1)
    return Inputs(z.requires_grad_(), y, torch.randint(10, (n,), generator=draw))


# ---- dense: the equations ---------------------------------------------------------------------------------------


def dense_weights(a: Inputs) -> Tensor:
    """w (N, N): those of n subjects, repeated over views."""
    age, sex = a.y.to(a.z.dtype).T
    w: Tensor = torch.exp(-((age[:, None] - age) ** 2) / (2 * SIGMA**2)) * (sex[:, None] == sex)
    return w.repeat(V, V)


def dense_cauc(a: Inputs) -> Tensor:
    eye = torch.eye(len(a.x), dtype=torch.bool, device=a.z.device)
    w = dense_weights(a)
    d = 2 - 2 * a.x @ a.x.T
    p = w.masked_fill(eye, 0)
    p = p / p.sum(1, keepdim=True)
    c = (1 - w).masked_fill(eye, 0)
    alignment = (p * d).sum() / len(d)
    uniformity: Tensor = ((c * torch.exp(-T * d)).sum() / c.sum()).log()
    return T * alignment + uniformity


def dense_info_nce(x: Tensor, w: Tensor) -> Tensor:
    eye = torch.eye(len(x), dtype=torch.bool, device=x.device)
    s = (x @ x.T / TAU).masked_fill(eye, -math.inf)
    p = w.masked_fill(eye, 0)
    p = p / p.sum(1, keepdim=True)
    return -(p * s.log_softmax(1).masked_fill(eye, 0)).sum() / len(x)


def dense_y_aware(a: Inputs) -> Tensor:
    return dense_info_nce(a.x, dense_weights(a))


def dense_supcon(a: Inputs) -> Tensor:
    return dense_info_nce(a.x, (a.labels[:, None] == a.labels).to(a.z.dtype).repeat(V, V))


def dense_ntxent(a: Inputs) -> Tensor:
    s = (a.x @ a.x.T / TAU).fill_diagonal_(-math.inf)
    other = torch.arange(len(s), device=s.device).roll(len(s) // 2)  # the own other view, V = 2
    return torch.nn.functional.cross_entropy(s, other)


# ---- flash: row blocks x column blocks, two passes, 4 units of one N x N x D product ----------------------------

ROWS, COLUMNS = 256, 512
Block = tuple[slice, slice, int, Tensor, Tensor]


def exponents(y: Tensor) -> tuple[Tensor, Tensor]:
    """u, v (N, 4) with w_ij = 2^(u_i.v_j): the kernel as one small product; unlike sexes have w = e^-50."""
    h = (y - y.mean(0)) / torch.tensor([SIGMA, 0.1], dtype=torch.float64)
    square, one = h.square().sum(1, keepdim=True), torch.ones(len(h), 1, dtype=torch.float64)
    u = torch.cat([h * LOG2E, square * (-0.5 * LOG2E), one * (-0.5 * LOG2E)], 1)
    v = torch.cat([h, one, square], 1)
    return u.float().repeat(V, 1), v.float().repeat(V, 1)


def blocks(x: Tensor, y: Tensor, kappa: float) -> Iterator[Block]:
    """(rows, columns, offset of the diagonal, kappa log2(e) cos, w with diagonal 0) of each block, in one scratch."""
    u, v = exponents(y)
    scratch = x.new_empty(2, ROWS * COLUMNS)
    for i in range(0, len(x), ROWS):
        rows = slice(i, min(i + ROWS, len(x)))
        q = x[rows] * (kappa * LOG2E)
        for j in range(0, len(x), COLUMNS):
            cols = slice(j, min(j + COLUMNS, len(x)))
            r, c = rows.stop - i, cols.stop - j
            s, w = (flat[: r * c].view(r, c) for flat in scratch)
            torch.mm(q, x[cols].T, out=s)
            torch.mm(u[rows], v[cols].T, out=w).exp2_().diagonal(i - j).zero_()
            yield rows, cols, i - j, s, w


class FlashYAware(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        total, mass, pulled = x.new_zeros(3, len(x))
        for rows, _, diagonal, s, w in blocks(x, y, 1 / TAU):
            mass[rows] += w.sum(1)
            pulled[rows] += w.mul_(s).sum(1)
            s.exp2_().diagonal(diagonal).zero_()
            total[rows] += s.sum(1)
        ctx.save_for_backward(x, y, total, mass)
        value: Tensor = (total.log() - pulled / (mass * LOG2E)).mean()
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        x, y, total, mass = ctx.saved_tensors
        dx, total, mass = torch.zeros_like(x), total.reciprocal(), mass.reciprocal()
        for rows, cols, diagonal, s, w in blocks(x, y, 1 / TAU):
            s.exp2_().mul_(total[rows, None]).diagonal(diagonal).zero_()
            s.sub_(w.mul_(mass[rows, None]))
            dx[rows].addmm_(s, x[cols])
            dx[cols].addmm_(s.T, x[rows])
        return dx.mul_(upstream[0] / (TAU * len(x))), None


class FlashCauc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        mass, pulled = x.new_zeros(2, len(x))
        S, C = torch.zeros(2, dtype=torch.float64)
        for rows, _, diagonal, s, w in blocks(x, y, 2 * T):
            mass[rows] += w.sum(1)
            pulled[rows] += (w * s).sum(1)
            w.neg_().add_(1).diagonal(diagonal).zero_()
            C += w.sum()
            S += s.exp2_().mul_(w).sum()
        ctx.save_for_backward(x, y, mass, S)
        alignment = 2 - (pulled / mass).mean() / (T * LOG2E)
        value: Tensor = T * alignment + (S / C).log() - 2 * T
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        x, y, mass, S = ctx.saved_tensors
        dx, pull, push = torch.zeros_like(x), 2 * T / len(x) / mass, float(2 * T / S)
        for rows, cols, diagonal, s, w in blocks(x, y, 2 * T):
            s.exp2_().mul_(push).diagonal(diagonal).zero_()
            s.addcmul_(s, w, value=-1).sub_(w.mul_(pull[rows, None]))
            dx[rows].addmm_(s, x[cols])
            dx[cols].addmm_(s.T, x[rows])
        return dx.mul_(upstream[0]), None


# ---- gemm: the products that cauc_dist.losses.tiled does --------------------------------------------------------


def tile_products(a: Inputs, kappa: float, passes: int) -> Tensor:
    """The upper triangle of tiles: cosines in each pass (.5 units), sums to both sides in the last one (1 unit)."""
    z, subjects = a.z.detach(), tiled.ROWS["cpu"] // V
    x = [piece.reshape(1, -1, z.shape[-1]) for piece in torch.split(z, subjects, dim=1)]
    G = [torch.zeros_like(piece) for piece in x]
    scratch = z.new_zeros(x[0].shape[1] ** 2)
    for k in range(passes):
        for i in range(len(x)):
            for j in range(i, len(x)):
                s = scratch[: x[i].shape[1] * x[j].shape[1]].view(1, x[i].shape[1], x[j].shape[1])
                torch.baddbmm(s, x[i], x[j].mT, beta=0, alpha=kappa * LOG2E, out=s)
                if k == passes - 1:
                    G[i].baddbmm_(s, x[j])
                    if i != j:
                        G[j].baddbmm_(s.mT, x[i])
    return G[0].sum()


# ---- ours and the peers -----------------------------------------------------------------------------------------


def kernel() -> kernels.Kernel:
    return kernels.product(age=kernels.gaussian(SIGMA), sex=kernels.delta())


def nidl_y_aware(a: Inputs) -> Tensor:
    """As published: columns normalised, summed over views; `bandwidth` is a variance, the tiny one makes a delta."""
    from nidl.losses import YAwareInfoNCE

    loss: Tensor = YAwareInfoNCE(bandwidth=[SIGMA**2, 1e-6], temperature=TAU)(a.z[0], a.z[1], labels=a.y)
    return loss


def pml_supcon(a: Inputs) -> Tensor:
    from pytorch_metric_learning.losses import SupConLoss

    loss: Tensor = SupConLoss(temperature=TAU)(a.x, a.labels.repeat(V))
    return loss


def pml_ntxent(a: Inputs) -> Tensor:
    from pytorch_metric_learning.losses import NTXentLoss

    loss: Tensor = NTXentLoss(temperature=TAU)(a.x, torch.arange(len(a.y)).repeat(V))
    return loss


Loss = Callable[[Inputs], Tensor]
"""A scalar to call backward on; without a graph (gemm) there is no backward."""

OBJECTIVES: dict[str, dict[str, Loss]] = {
    "cauc": {
        "ours": lambda a: losses.cauc(a.z, a.y, kernel(), t=T, views="pooled"),
        "dense": dense_cauc,
        "flash": lambda a: FlashCauc.apply(a.x, a.y),  # type: ignore[no-untyped-call]
        "gemm": lambda a: tile_products(a, 2 * T, passes=1),
    },
    "y_aware": {
        "ours": lambda a: losses.y_aware_infonce(a.z, a.y, kernel(), tau=TAU),
        "dense": dense_y_aware,
        "flash": lambda a: FlashYAware.apply(a.x, a.y),  # type: ignore[no-untyped-call]
        "gemm": lambda a: tile_products(a, 1 / TAU, passes=2),
    },
    "y_aware_column": {
        "ours": lambda a: losses.y_aware_infonce(a.z, a.y, kernel(), tau=TAU, normalise="column"),
        "nidl": nidl_y_aware,
    },
    "supcon": {
        "ours": lambda a: losses.supcon(a.z, a.labels, tau=TAU),
        "dense": dense_supcon,
        "pml": pml_supcon,
    },
    "ntxent": {"ours": lambda a: losses.ntxent(a.z, tau=TAU), "dense": dense_ntxent, "pml": pml_ntxent},
}
NOTES = {
    "y_aware_column": "nidl normalises columns and adds the two views; ours with normalise='column' is the same number",
    "ntxent": "pml holds a matrix of all positive pairs by all negative ones, N^2 (N - 2) numbers",
    "gemm": "the products alone, triangle of tiles of tiled.ROWS rows: 1.5 (cauc) and 2 (y_aware) units of N x N x D",
    "flash": f"blocks of {ROWS} x {COLUMNS}, in place, weights as a product of 4 columns, no running maximum: 4 units",
}


def needed(objective: str, contestant: str, N: int) -> float:
    """Bytes, about, measured where they fit: to know what not to start."""
    if contestant == "pml":
        return 4.0 * N**2 * (5 * N if objective == "ntxent" else 13)
    return 4.0 * N**2 * {"dense": 10, "nidl": 13}.get(contestant, 0)


# ---- one point, in a process of its own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    objective: str
    contestants: tuple[str, ...]
    """One: its memory and time. Two: a pair, ours first."""
    N: int
    D: int = 128
    repeats: int = 1
    """A pair of one repetition is warmed up at N = 64, any other at its own size."""
    whole_years: bool = False

    @property
    def name(self) -> str:
        return f"{self.objective} {' / '.join(self.contestants)}, N = {self.N:,}, D = {self.D}"


def run(loss: Loss, a: Inputs) -> tuple[float, float]:
    """Seconds of one forward and backward, and the value; the gradient is in a.z.grad."""
    a.z.grad = None
    start = time.perf_counter()
    value = loss(a)
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start, value.item()


def measure(point: Point) -> dict[str, Any]:
    """The raw numbers of a point, in this process."""
    contest = [OBJECTIVES[point.objective][name] for name in point.contestants]
    tiny = inputs(64, point.D, point.whole_years)
    a = inputs(point.N, point.D, point.whole_years)
    for loss in contest:
        run(loss, tiny)
        run(loss, tiny)
    del tiny
    return _pair(point, contest, a) if len(contest) > 1 else _alone(point, contest[0], a)


def _alone(point: Point, loss: Loss, a: Inputs) -> dict[str, Any]:
    peak = Peak()
    seconds, value = zip(*(run(loss, a) for _ in range(point.repeats)), strict=True)
    return {
        "seconds": list(seconds),
        "peak_bytes": peak.growth(),
        "baseline_bytes": peak.baseline,
        "value": value[0],
        "how": peak.how,
    }


def _pair(point: Point, contest: Sequence[Loss], a: Inputs) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in point.contestants}
    found: list[tuple[float, Tensor | None]] = []
    for k in range(-1 if point.repeats > 1 else 0, point.repeats):  # -1: the warm-up
        for name, loss in zip(point.contestants, contest, strict=True):
            duration, value = run(loss, a)
            if len(found) < len(contest):
                found.append((value, a.z.grad))
            if k >= 0:
                seconds[name].append(duration)
        if k >= 0 and max(s[-1] for s in seconds.values()) > LONG:
            break
    ratios = [other / ours for ours, other in zip(*seconds.values(), strict=True)]
    (value, gradient), (others, slope) = found
    difference = None
    if gradient is not None and slope is not None:  # gemm has neither value nor gradient
        # Relative to 1 where the value is less: cauc passes through 0. The radial part of a gradient is arbitrary.
        error = tangent(gradient - slope, a.z).abs().max() / tangent(slope, a.z).abs().max()
        difference = {"value": abs(value - others) / max(1.0, abs(others)), "gradient": error.item()}
    return {"seconds": seconds, "ratios": ratios, "ratio": median(ratios), "difference": difference}


@torch.no_grad()
def tangent(dz: Tensor, z: Tensor) -> Tensor:
    return dz - (dz * z).sum(-1, keepdim=True) * z


class Peak:
    """Growth of the largest resident memory above what the process has now."""

    def __init__(self) -> None:
        self.how = "VmHWM, reset by clear_refs, minus VmRSS before"
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.baseline = self._status("VmRSS")
        except OSError:
            self.how = "ru_maxrss minus ru_maxrss before"
            self.baseline = self._largest()

    def growth(self) -> int:
        return (self._status("VmHWM") if self.how.startswith("VmHWM") else self._largest()) - self.baseline

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    @staticmethod
    def _largest() -> int:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


# ---- all points -------------------------------------------------------------------------------------------------


def plan(quick: bool) -> tuple[list[Point], list[Point]]:
    """(pairs, contestants alone): what is worth its time."""
    pairs, alone = [], []
    for objective in ("cauc", "y_aware"):
        for N, repeats in {256: 51, 1024: 51, 4096: 5, 16384: 5}.items():
            pairs.append(Point(objective, ("ours", "dense"), N, repeats=repeats))
        for N, repeats in {256: 51, 1024: 21, 4096: 5}.items():
            pairs.append(Point(objective, ("ours", "flash"), N, repeats=repeats))
        for N in (4096, 16384):
            pairs.append(Point(objective, ("ours", "gemm"), N, repeats=5 if N == 4096 else 3))
        pairs += [Point(objective, ("ours", who), 4096, 512, repeats=3) for who in ("dense", "gemm")]
        for N, repeats in {1024: 3, 4096: 3, 16384: 1, 32768: 1}.items():
            alone += [Point(objective, (who,), N, repeats=repeats) for who in ("ours", "dense", "flash")]
        alone.append(Point(objective, ("ours",), 131072))
    pairs += [Point("cauc", ("ours", who), 4096, 2048, repeats=3) for who in ("dense", "gemm")]
    for D in (512, 2048):
        pairs.append(Point("cauc", ("ours", "dense"), 16384, D))
        alone.append(Point("cauc", ("ours",), 16384, D))
    alone.append(Point("y_aware", ("flash",), 131072))
    for objective, peer, sizes in [
        ("y_aware_column", "nidl", {256: 51, 1024: 21, 4096: 5}),
        ("supcon", "pml", {256: 51, 1024: 21, 4096: 5}),
        ("ntxent", "pml", {256: 5, 512: 3, 1024: 1}),
    ]:
        for N, repeats in sizes.items():
            pairs.append(Point(objective, ("ours", peer), N, repeats=repeats))
            alone += [Point(objective, (who,), N) for who in ("ours", peer)]
    for objective in ("supcon", "ntxent"):
        pairs.append(Point(objective, ("ours", "dense"), 4096, repeats=5))
        alone.append(Point(objective, ("dense",), 4096, repeats=3))
    if quick:
        at = [256, 1024, 4096]
        pairs = [p for p in pairs if p.objective in ("cauc", "y_aware") and p.D == 128 and p.N in at]
        pairs = [p for p in pairs if "dense" in p.contestants or (p.N == 4096 and "gemm" in p.contestants)]
        pairs.append(Point("y_aware_column", ("ours", "nidl"), 4096, repeats=3))
        alone = [p for p in alone if p.N == 4096 and p.objective in ("cauc", "y_aware")]
    return pairs, sorted(alone, key=lambda p: (-p.N, p.contestants != ("flash",)))  # the longest first


def child(point: Point) -> dict[str, Any]:
    """A point in a process of its own, or why it was not run."""
    record = asdict(point)
    for who in point.contestants:
        if who in PEERS and importlib.util.find_spec(PEERS[who][0]) is None:
            return {**record, "not_run": f"{PEERS[who][1]} is not installed"}
    need = max(needed(point.objective, who, point.N) for who in point.contestants)
    if need > SHARE * (free := available()):
        return {**record, "not_run": f"needs {need / GIB:.0f} GiB; {free / GIB:.0f} GiB are free"}
    command = [sys.executable, str(Path(__file__).resolve()), "--point", json.dumps(record)]
    try:
        done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {**record, "not_run": f"was stopped after {LIMIT:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {**record, "not_run": f"ended with {done.returncode}: {last}"}
    return {**record, **json.loads(done.stdout.splitlines()[-1])}


ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def available() -> float:
    """Bytes that a new process can have; unknown where there is no /proc."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024


def benchmark(quick: bool, whole_years: bool, out: Path) -> dict[str, Any]:
    """Run every point, saving after each."""
    record = provenance()
    record["versions"] |= {name: _version(name) for _, name in PEERS.values()}
    record |= {"question": (__doc__ or "").splitlines()[0], "threads": 1, "notes": NOTES, "points": []}
    pairs, alone = ([Point(**{**asdict(p), "whole_years": whole_years}) for p in points] for points in plan(quick))
    began, saving = time.monotonic(), Lock()

    def work(point: Point, beside: bool) -> None:
        result = {**child(point), "beside_another": beside}
        with saving:
            record["points"].append(result)
            record["minutes"] = (time.monotonic() - began) / 60
            out.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{record['minutes']:5.1f} min  {point.name}: {_short(result)}", flush=True)

    def lane(points: Iterable[Point]) -> None:
        for point in points:
            work(point, True)

    for point in pairs:
        work(point, False)
    # No two that hold N x N matrices at a time: they compete for memory, and slow down what runs beside them.
    hungry = [p for p in alone if needed(p.objective, p.contestants[0], p.N)]
    frugal = [p for p in alone if p not in hungry]
    long = iter([p for p in frugal if p.N > 16384])
    # `long` is one iterator in two lanes: whoever is free takes the next.
    for lanes in ([hungry, [p for p in frugal if p.N <= 16384]], [long, long]):
        with ThreadPoolExecutor(len(lanes)) as threads:
            for done in [threads.submit(lane, points) for points in lanes]:
                done.result()
    return record


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _short(result: dict[str, Any]) -> str:
    if "not_run" in result:
        return f"not run: {result['not_run']}"
    if "ratio" in result:
        return f"{result['ratio']:.2f} times the time of ours"
    return f"{median(result['seconds']):.3g} s, {result['peak_bytes'] / MIB:.1f} MiB"


# ---- what came out ----------------------------------------------------------------------------------------------

Key = tuple[str, str, int, int]


class Results:
    """Points by (objective, contestant, N, D); those that did not run are absent."""

    def __init__(self, points: Sequence[dict[str, Any]]) -> None:
        ran = [p for p in points if "not_run" not in p]
        self.pairs = {self._key(p): p for p in ran if len(p["contestants"]) > 1}
        self.alone = {self._key(p): p for p in ran if len(p["contestants"]) == 1}

    @staticmethod
    def _key(p: dict[str, Any]) -> Key:
        return p["objective"], p["contestants"][-1], p["N"], p["D"]

    def ratio(self, objective: str, contestant: str, N: int, D: int = 128) -> float | None:
        """Its time over ours."""
        pair = self.pairs.get((objective, contestant, N, D))
        return None if pair is None else float(pair["ratio"])

    def memory(self, objective: str, contestant: str, N: int, D: int = 128) -> float | None:
        point = self.alone.get((objective, contestant, N, D))
        return None if point is None else float(point["peak_bytes"])

    def seconds(self, objective: str, contestant: str, N: int, D: int = 128) -> float | None:
        """Median; of a pair where there is one, which had the machine to itself."""
        of_ours = [p for (o, _, n, d), p in self.pairs.items() if (o, n, d) == (objective, N, D)]
        pair = of_ours[0] if contestant == "ours" and of_ours else self.pairs.get((objective, contestant, N, D))
        if pair is not None:
            return float(median(pair["seconds"][contestant]))
        point = self.alone.get((objective, contestant, N, D))
        return None if point is None else float(median(point["seconds"]))

    def memory_ratio(self, objective: str, contestant: str, N: int, D: int = 128) -> float | None:
        ours, other = self.memory(objective, "ours", N, D), self.memory(objective, contestant, N, D)
        return None if not ours or other is None else other / ours

    def difference(self, contestant: str) -> float | None:
        """The largest of the values of any pair."""
        found = [p["difference"]["value"] for (_, who, _, _), p in self.pairs.items() if who == contestant]
        return max(found, default=None)


def verdict(results: Results) -> list[tuple[str, float | None, str, float, bool | None]]:
    """(number to reach, found, at least or at most, wanted, whether it is); None: not run."""
    wanted: list[tuple[str, float | None, str, float]] = []
    for objective, times in (("cauc", 10.0), ("y_aware", 8.0)):
        wanted += [
            (f"{objective}, N = 16,384: time of dense", results.ratio(objective, "dense", 16384), ">=", times),
            (f"{objective}, N = 16,384: memory of dense", results.memory_ratio(objective, "dense", 16384), ">=", 60.0),
            (f"{objective}, N = 16,384: over gemm", _inverse(results.ratio(objective, "gemm", 16384)), "<=", 1.35),
            (f"{objective}, N = 131,072: GiB", _gib(results.memory(objective, "ours", 131072)), "<=", 1.0),
            (f"{objective}, N = 256: time of dense", results.ratio(objective, "dense", 256), ">=", 1.0),
        ]
    wanted.append(("y_aware, N = 4,096: time of nidl", results.ratio("y_aware_column", "nidl", 4096), ">=", 20.0))
    wanted += [(f"difference of values, ours and {w}", results.difference(w), "<=", 1e-5) for w in ("dense", "flash")]
    wanted += [(f"difference of values, ours and {w}", results.difference(w), "<=", 1e-5) for w in PEERS]
    return [
        (name, found, sign, bound, None if found is None else found >= bound if sign == ">=" else found <= bound)
        for name, found, sign, bound in wanted
    ]


def _inverse(x: float | None) -> float | None:
    return None if x is None else 1 / x


def _gib(x: float | None) -> float | None:
    return None if x is None else x / GIB


def table(results: Results) -> str:
    """Markdown: ours in seconds and MiB, the others as multiples of ours (gemm: ours as a multiple of it)."""
    others = ("dense", "flash", "nidl", "pml")
    head = ["objective", "N", "D", "ours, s", *(f"{w}: time" for w in others), "ours / gemm", "ours, MiB"]
    lines = [head + [f"{w}: memory" for w in others]]
    points = {(o, n, d) for o, _, n, d in [*results.pairs, *results.alone]}
    for o, n, d in sorted(points, key=lambda p: (list(OBJECTIVES).index(p[0]), p[2], p[1])):
        ours = results.memory(o, "ours", n, d)
        row = [o, f"{n:,}", str(d), _cell(results.seconds(o, "ours", n, d))]
        for who in others:
            ratio, seconds = results.ratio(o, who, n, d), results.seconds(o, who, n, d)
            row.append(f"{_cell(seconds)} s" if ratio is None and seconds is not None else _cell(ratio, "x"))
        row += [_cell(_inverse(results.ratio(o, "gemm", n, d)), "x"), _cell(None if ours is None else ours / MIB)]
        lines.append(row + [_cell(results.memory_ratio(o, who, n, d), "x") for who in others])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(x: float | None, unit: str = "") -> str:
    return "" if x is None else (f"{x:,.0f}" if x >= 100 else f"{x:.3g}") + unit


def summary(record: dict[str, Any]) -> str:
    results = Results(record["points"])
    lines = [table(results), "", "numbers to reach (D = 128):"]
    for name, found, sign, bound, met in verdict(results):
        word = "not run" if met is None else "met" if met else "MISSED"
        lines.append(f"  {word:8}{name}: {'-' if found is None else f'{found:.3g}'} (wanted {sign} {bound:g})")
    lines += [f"  not run  {Point(**_plain(p)).name}: {p['not_run']}" for p in record["points"] if "not_run" in p]
    return "\n".join(lines)


def _plain(p: dict[str, Any]) -> dict[str, Any]:
    fields = {name: p[name] for name in Point.__dataclass_fields__}
    return {**fields, "contestants": tuple(fields["contestants"])}


COLOURS = {"ours": "#0b5fa5", "dense": "#b5482a", "flash": "#6d6d6d", "nidl": "#8a5aa8", "pml": "#3f8f5f"}
PANELS = {"cauc": ("cauc",), "y-Aware InfoNCE": ("y_aware", "y_aware_column"), "SupCon": ("supcon",)}


def plot(record: dict[str, Any], to: Path) -> None:
    """Time and peak memory over N, D = 128, both axes logarithmic."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    results = Results(record["points"])
    with rc_context({"font.size": 9, "svg.hashsalt": "loss", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.6, 5.8), layout="constrained")
        axes = figure.subplots(2, len(PANELS), sharex=True, sharey="row")
        for column, (title, objectives) in enumerate(PANELS.items()):
            axes[0, column].set_title(title)
            axes[1, column].set_xlabel("N, embeddings")
            axes[1, column].axhline(1024, color="#bbbbbb", linewidth=0.8, zorder=0)
            for axis, of in zip(axes[:, column], (results.seconds, _mib(results)), strict=True):
                for who in COLOURS:
                    _line(axis, results, objectives, who, of)
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                axis.grid(color="#eeeeee", linewidth=0.6)
        sizes = [2**k for k in (8, 10, 12, 14, 17)]
        axes[1, 0].set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes[1, 0].text(256, 1100, "1 GiB", color="#888888", fontsize=8, va="bottom")
        axes[0, 0].set_ylabel("forward + backward, s")
        axes[1, 0].set_ylabel("peak memory above inputs, MiB")
        lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(lines), frameon=False)
        cpu, torch_version = record["machine"]["processor"], record["versions"]["torch"]
        figure.supxlabel(f"one thread of {cpu}, fp32, D = 128, torch {torch_version}", fontsize=8, color="#555555")
        figure.savefig(to, metadata={"Date": None})


def _line(axis: Any, results: Results, objectives: Sequence[str], who: str, of: Callable[..., float | None]) -> None:
    """Of the first objective that has this contestant: nidl's is the column-normalised one."""
    own = next((o for o in objectives if who in OBJECTIVES[o]), None)
    sizes = sorted({n for o, _, n, d in [*results.pairs, *results.alone] if o == own and d == 128})
    points = [(n, found) for n in sizes if (found := of(own, who, n)) is not None]
    if points:
        x, y = zip(*points, strict=True)
        axis.plot(
            x, y, label=who, color=COLOURS[who], marker="o", markersize=3.5, linewidth=2 if who == "ours" else 1.2
        )


def _mib(results: Results) -> Callable[[str, str, int], float | None]:
    def of(objective: str, contestant: str, N: int) -> float | None:
        peak = results.memory(objective, contestant, N)
        return None if peak is None else max(peak, 4096.0) / MIB  # a page: 0 has no logarithm

    return of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="where the JSON goes; the plot goes beside it as .svg")
    task.add_argument("--plot", type=Path, help="a result: print its table and draw its plot again, run nothing")
    task.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="N up to 4,096, D = 128")
    parser.add_argument("--whole-years", action="store_true", help="ages in whole years: few distinct rows of metadata")
    a = parser.parse_args()
    if a.point is not None:
        torch.set_num_threads(1)
        if (free := available()) < math.inf:  # an error that is recorded, not a machine that swaps or kills
            resource.setrlimit(resource.RLIMIT_DATA, (int(SHARE * free), int(SHARE * free)))
        print(json.dumps(measure(Point(**_plain(a.point)))))
        return
    need_matplotlib()
    if a.out is not None:
        a.out.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(a.plot.read_text()) if a.plot else benchmark(a.quick, a.whole_years, a.out)
    path = a.plot or a.out
    print(summary(record))
    plot(record, path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
