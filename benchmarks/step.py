"""What does a step of several ranks cost beside plain DDP; and GradCache, in time and memory; and z, in bytes sent?

    python benchmarks/step.py --out benchmarks/results/DATE-step.json      # thirty minutes; on a quiet machine
    python benchmarks/step.py --quick                                      # small volumes and batches, two minutes
    python benchmarks/step.py --table benchmarks/results/DATE-step.json    # its table and verdict again

Every point is a fresh world of local gloo ranks, one thread each, started as `cauc train --ranks` starts them.

engine  forward, loss, backward and update of one batch in memory, in turn in one process: DDP and FSDP2 with torch's
        AdamW, our engine at ZeRO 0 to 3. Same weights, batch and loss; times are compared by the median of the ratios
        within a round. One contestant alone: its peak memory above that of the process before it had a model.
chunks  `Trainer.step` from a store, reading and augmenting included: the batch at once, and in chunks, in turn.
memory  the same in chunks: peak memory above that after model, optimiser and a step of one subject a rank, in steps
        of 4,096 subjects together. The loss itself takes 28 MiB of it at n = 2,048 (benchmarks/loss.py).
wire    bytes over the loopback while a step computes the loss, its gradient by z and the geometry of z, beyond those
        of an equally long silence; in a network namespace of its own where the system has them (`alone`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cauc_dist import memory, optimisers
from cauc_dist.bench import peers as bench
from cauc_dist.config import Augment, Encoder, Objective, Optim, RunConfig
from cauc_dist.config import Engine as Settings
from cauc_dist.engine import Engine
from cauc_dist.losses.batch import Batch, Exchange
from cauc_dist.objective import Objective as Loss
from cauc_dist.provenance import provenance
from cauc_dist.spawn import leave, start
from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import Loader
from cauc_dist.stream.plan import Plan, shares
from cauc_dist.train import build_model
from cauc_dist.trainer import Feed, Step, Trainer, open_exchange
from cauc_dist.world import World, loopback_interface

ROOT = Path(__file__).resolve().parents[1]
CPU, MIB, LR = torch.device("cpu"), 2**20, 1e-4
ENGINES = ("ddp", "zero 0", "zero 1", "zero 2", "zero 3", "fsdp2")
QUIET = 0.1
"""Seconds until the last acknowledgement is on its way: TCP delays them by up to 40 ms."""
OWN_NETWORK = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@dataclass(frozen=True)
class Point:
    question: str
    """engine, chunks, memory or wire."""
    encoder: str = "cnn3d"
    side: int = 64
    """Voxels."""
    batch: int = 16
    """GLOBAL."""
    ranks: int = 2
    contestants: tuple[str, ...] = ()
    """engine: of ENGINES."""
    chunk: int = 0
    """chunks, memory: subjects of a rank that are encoded at once; 0: all."""
    rounds: int = 1
    """memory: worlds, of which the median is taken."""
    seen: int = 0
    """memory: subjects in all steps together. The peak of more chunks is a higher one, whatever the batch."""
    objective: str = "cauc"
    exchange: str = "all_gather"
    augment: bool = True
    """As a run does where nothing is said (intensities, blur, noise); or not at all."""
    optimiser: str = "adamw"
    store: str = ""

    @property
    def run(self) -> RunConfig:
        kernel = {"simclr": ()}.get(self.objective, ("age:gaussian:5", "sex:delta"))
        none = Augment(p_intensity=0.0, p_blur=0.0, p_noise=0.0)
        return RunConfig(
            name="step",
            batch_size=self.batch,
            augment=Augment() if self.augment else none,
            encoder=Encoder(name=cast(Any, self.encoder)),
            objective=Objective(name=cast(Any, self.objective), kernel=kernel),
            optim=Optim(name=cast(Any, self.optimiser), lr=LR),
            engine=Settings(device="cpu", exchange=cast(Any, self.exchange)),
        )

    @property
    def name(self) -> str:
        facts = [f"{self.question}: {self.encoder} {self.side}^3, n = {self.batch:,}, W = {self.ranks}"]
        facts += [*self.contestants[:1]] if len(self.contestants) == 1 else []
        facts += [f"chunks of {self.chunk}"] if self.chunk else []
        facts += [] if self.augment else ["no augmentation"]
        facts += [self.objective, self.exchange] if self.question == "wire" else []
        return ", ".join(facts)


# ---- engine -----------------------------------------------------------------------------------------------------

LossOf = Callable[[Tensor], Tensor]
Stepper = Callable[[Tensor, LossOf], Tensor]


def contestant(name: str, run: RunConfig, shape: tuple[int, ...], world: World) -> Stepper:
    """A step of (x, loss of z), which returns the loss; weights are those of the run's seed."""
    model = build_model(run, shape).train()
    if name.startswith("zero"):
        return _ours(Engine(model, replace(run, engine=replace(run.engine, zero_stage=int(name[-1]))), world, CPU))  # type: ignore[arg-type]
    return _plain(_ddp(model) if name == "ddp" else _fsdp2(model, world), run)


def _ours(engine: Engine) -> Stepper:
    def step(x: Tensor, loss_of: LossOf) -> Tensor:
        loss = loss_of(engine(x))
        engine.backward([loss], 1)
        engine.update(LR)
        return loss

    return step


def _plain(model: nn.Module, run: RunConfig) -> Stepper:
    optimizer = optimisers.make(run.optim, model, LR, fused=False)

    def step(x: Tensor, loss_of: LossOf) -> Tensor:
        loss = loss_of(model(x))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _ddp(model: nn.Module) -> nn.Module:
    """Without its broadcast of buffers: our BatchNorm keeps them alike, and it is faster."""
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def _fsdp2(model: nn.Module, world: World) -> nn.Module:
    """Each stage of the encoder, then the rest, as torch's tutorial does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world.world_size,))
    for stage in model.get_submodule("encoder.stages").children():
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def engines(point: Point, world: World) -> dict[str, Any]:
    """Seconds of every step and loss of every contestant; where there is one, how much memory it took."""
    run, shape = point.run, (1, *[point.side] * 3)
    draw = torch.Generator().manual_seed(world.rank)
    b = shares(point.batch, world.world_size)[world.rank]
    x = torch.randn(run.augment.views * b, *shape, generator=draw)
    y = _metadata(point.batch)
    objective, exchange = Loss(run.objective, y), open_exchange(run, point.batch)

    def loss_of(z: Tensor) -> Tensor:
        return objective.loss(z.view(run.augment.views, b, -1), y, exchange)

    before = psutil.Process().memory_info().rss
    steps = {name: contestant(name, run, shape, world) for name in point.contestants}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(-2, point.rounds):
        for name, step in steps.items():
            took, loss = _timed(lambda step=step: step(x, loss_of))  # type: ignore[misc]
            losses[name].append(float(loss))
            if k >= 0:
                seconds[name].append(took)
    peaks = _everyones(memory.peak(CPU) - before)
    return {"seconds": seconds, "losses": losses, **({"peak_bytes": peaks} if len(steps) == 1 else {})}


def _timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds from when all ranks begin to when all have ended."""
    dist.barrier()
    began = time.perf_counter()
    found = act()
    dist.barrier()
    return time.perf_counter() - began, found


def _everyones(x: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


# ---- chunks, memory, wire: steps of the trainer, from a store ---------------------------------------------------


def _metadata(n: int) -> Tensor:
    """(n, 2) float64: age, sex."""
    draw = np.random.default_rng(0)
    return torch.from_numpy(np.stack([draw.uniform(6, 86, n), draw.integers(0, 2, n)], 1))


def cohort(folder: Path, n: int, sides: int | tuple[int, ...]) -> Path:
    """A packed store of n subjects; 64 volumes (cubes of a side, or of three sides), no two alike, again and again."""
    sides = (sides,) * 3 if isinstance(sides, int) else sides
    where, maps = folder / f"{n}-{'x'.join(map(str, sides))}.zarr", bench.Maps((1, *sides))
    volumes = [maps.volume(i) for i in range(min(n, 64))]
    age, sex = _metadata(n).numpy().T
    from_arrays(
        where,
        (volumes[i % len(volumes)] for i in range(n)),
        [f"sub-{i:05}" for i in range(n)],
        shape=maps.shape,
        columns=(Column("age", "number"), Column("sex", "category", ("F", "M"))),
        metadata=(age.copy(), sex.copy()),
        mask=np.any([v != 0 for v in volumes], axis=0),
    )
    return where


@contextmanager
def training(
    run: RunConfig, engine: Engine, world: World, store: Store, chunk: int, objective: Loss
) -> Iterator[Callable[[int], dict[str, float]]]:
    """Steps by their numbers, in order, as `cauc_dist.train` makes them."""
    plan = Plan(np.arange(len(store)), store.subjects, run.batch_size, seed=0)
    y = torch.from_numpy(store.metadata(run.objective.columns))
    share = shares(run.batch_size, world.world_size)[0]
    chunks = -(-share // (chunk or share))
    span: dict[str, Any] = {"rank": world.rank, "world_size": world.world_size, "start": 0, "stop": 10**6}
    how = {"chunks": chunks, "threads": run.data.threads, "prefetch": run.data.prefetch, "device": engine.device}
    with Loader(store, plan, **span, **how) as batches:
        trainer = Trainer(engine, objective, run, world, Feed(batches), store.keys, chunks)

        def step(number: int) -> dict[str, float]:
            rows = plan.batch(number)
            ids = tuple(store.ids[i] for i in rows)
            metadata = y[torch.from_numpy(rows)].to(engine.device)
            return trainer.step(Step(number, plan.epoch(number), LR, ids, metadata))

        yield step


def _opened(point: Point, world: World) -> tuple[Store, Engine]:
    store = Store.open(point.store)
    return store, Engine(build_model(point.run, store.shape).train(), point.run, world, CPU)


def _objective(run: RunConfig, store: Store) -> Loss:
    return Loss(run.objective, torch.from_numpy(store.metadata(run.objective.columns)))


def chunked(point: Point, world: World) -> dict[str, Any]:
    """Seconds of the second step of a loader, which is busy with the third: at once, and in chunks."""
    store, engine = _opened(point, world)
    seconds: dict[str, list[float]] = {"whole": [], "chunks": []}
    waits: dict[str, list[float]] = {"whole": [], "chunks": []}
    for k in range(-1, point.rounds):
        for name, chunk in (("whole", 0), ("chunks", point.chunk)):
            with training(point.run, engine, world, store, chunk, _objective(point.run, store)) as step:
                step(0)
                took, record = _timed(lambda step=step: step(1))  # type: ignore[misc]
            if k >= 0:
                seconds[name].append(took)
                waits[name].append(record["data_wait_s"])
    return {"seconds": seconds, "data_wait_s": waits}


def remembered(point: Point, world: World) -> dict[str, Any]:
    """Peak memory above what the process had after a tiny step, by rank; in chunks of equally many for any batch."""
    store, engine = _opened(point, world)
    objective = _objective(point.run, store)
    with training(replace(point.run, batch_size=max(2, point.ranks)), engine, world, store, 0, objective) as step:
        step(0)
    before = psutil.Process().memory_info().rss
    steps = max(2, point.seen // point.batch)
    with training(point.run, engine, world, store, point.chunk, objective) as step:
        seconds = [_timed(lambda k=k: step(k))[0] for k in range(steps)]  # type: ignore[misc]
    return {"peak_bytes": _everyones(memory.peak(CPU) - before), "baseline_bytes": before, "step_s": seconds}


class Counted(Loss):
    """Notes the loopback's counter round what a step computes of z, while all ranks keep silent."""

    def __init__(self, settings: Objective, y: Tensor) -> None:
        super().__init__(settings, y)
        self.sent: dict[str, int] = {}

    def loss(self, z: Tensor, y: Tensor, exchange: Exchange = Batch) -> Tensor:
        self._counted("silence", lambda: None)
        loss = self._counted("loss", lambda: super(Counted, self).loss(z, y, exchange))
        self._counted("backward", lambda: torch.autograd.grad(loss, z, retain_graph=True))
        return cast(Tensor, loss)

    def geometry(self, z: Tensor, y: Tensor, exchange: Exchange = Batch) -> Any:
        return self._counted("geometry", lambda: super(Counted, self).geometry(z, y, exchange))

    def _counted(self, what: str, act: Callable[[], Any]) -> Any:
        before = self._counter()
        found = act()
        self.sent[what] = self._counter() - before
        return found

    @staticmethod
    def _counter() -> int:
        dist.barrier()
        time.sleep(QUIET)
        sent = psutil.net_io_counters(pernic=True)  # /sys tells of the network of whoever mounted it
        return int(sent[loopback_interface()].bytes_sent)


def wired(point: Point, world: World) -> dict[str, Any]:
    """Bytes of all ranks in the third step, by what they were sent for."""
    store, engine = _opened(point, world)
    counted = Counted(point.run.objective, torch.from_numpy(store.metadata(point.run.objective.columns)))
    with training(point.run, engine, world, store, 0, counted) as step:
        for k in range(3):
            step(k)
    views, width = point.run.augment.views, point.run.projector.out
    least = (world.world_size - 1) * views * point.batch * width * 4
    return {"sent_bytes": counted.sent, "least_bytes": least}


QUESTIONS = {"engine": engines, "chunks": chunked, "memory": remembered, "wire": wired}


# ---- all points -------------------------------------------------------------------------------------------------


def points(quick: bool) -> list[Point]:
    """Stores are named by side until they are made."""
    if quick:
        return [
            Point("engine", side=24, batch=8, contestants=ENGINES, rounds=5),
            *(Point("engine", side=24, batch=8, contestants=(name,)) for name in ("ddp", "zero 1")),
            Point("chunks", side=24, batch=32, chunk=4, rounds=3),
            *(Point("memory", side=24, batch=n, chunk=4) for n in (64, 256)),
            Point("wire", side=16, batch=256),
        ]
    sizes = [("cnn3d", 48, 32, 15), ("densenet121_3d", 32, 8, 9)]
    return [
        *(Point("engine", e, side, n, contestants=ENGINES, rounds=rounds) for e, side, n, rounds in sizes),
        *(Point("engine", e, side, n, contestants=(name,)) for e, side, n, _ in sizes for name in ENGINES),
        Point("chunks", "cnn3d", batch=64, chunk=8, rounds=5),
        Point("chunks", "cnn3d", batch=64, chunk=8, rounds=5, augment=False),
        Point("chunks", "densenet121_3d", batch=16, chunk=4, rounds=3),
        *(Point("memory", batch=n, chunk=8, rounds=3, seen=4096) for n in (64, 256, 1024, 2048)),
        *(Point("memory", batch=n) for n in (64, 256)),
        *(Point("wire", side=16, batch=n, ranks=w) for n, w in [(256, 2), (2048, 2), (2048, 4)]),
        Point("wire", side=16, batch=2048, ranks=4, objective="y_aware"),
        Point("wire", side=16, batch=2048, ranks=4, objective="simclr"),
        Point("wire", side=16, batch=2048, ranks=4, exchange="ring"),
    ]


def has_own_network() -> bool:
    try:
        return subprocess.run([*OWN_NETWORK, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def world_of(point: Point) -> dict[str, Any]:
    """The numbers of a point, measured in a world of its own, or why there are none."""
    apart = point.question == "wire" and has_own_network()
    with tempfile.TemporaryDirectory(prefix="cauc-step-") as folder:
        out = Path(folder) / "point.json"
        command = [sys.executable, "-m", "benchmarks.step", "--point", json.dumps(asdict(point)), "--out", str(out)]
        done = subprocess.run([*(OWN_NETWORK if apart else []), *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            return {**asdict(point), "not_run": f"ended with {done.returncode}: {last}"}
        return {**asdict(point), "alone": apart, **json.loads(out.read_text())}


def rank(point: Point, out: Path) -> None:
    """One rank of a point's world; rank 0 writes what was found."""
    torch.set_num_threads(1)
    world = World.from_env()
    with world.process_group(CPU, 30.0):
        found = QUESTIONS[point.question](point, world)
    if world.rank == 0:
        out.write_text(json.dumps(found))


def worlds_of(point: Point) -> dict[str, Any]:
    """The same, of several worlds where peak memory is asked: what malloc keeps differs from one to the next."""
    found = [world_of(point) for _ in range(point.rounds if point.question == "memory" else 1)]
    failed = next((each for each in found if "not_run" in each), None)
    return failed or {
        **found[0],
        **({"peak_bytes": [each["peak_bytes"] for each in found]} if point.question == "memory" else {}),
    }


def benchmark(quick: bool, only: str | None, out: Path | None) -> dict[str, Any]:
    """Every point, saved after each."""
    record = provenance()
    record |= {"question": (__doc__ or "").splitlines()[0], "threads": 1, "points": []}
    all_ = [point for point in points(quick) if only in (None, point.question)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cauc-step-") as folder:
        stores: dict[int, str] = {}
        for point in all_:
            if point.question != "engine":
                if point.side not in stores:
                    n = max(p.batch for p in all_ if p.question != "engine" and p.side == point.side)
                    stores[point.side] = str(cohort(Path(folder), n, point.side))
                point = replace(point, store=stores[point.side])
            record["points"].append(worlds_of(point))
            record["minutes"] = (time.monotonic() - began) / 60
            if out:
                bench.save(record, out)
            print(f"{record['minutes']:5.1f} min  {point.name}", flush=True)
    return record


# ---- what came out ----------------------------------------------------------------------------------------------


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    return median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def of_z(p: dict[str, Any]) -> float:
    """Bytes sent for z over (W - 1) M D 4, the least that all ranks together can send of M embeddings."""
    silence, sent = p["sent_bytes"]["silence"], p["sent_bytes"]
    return float(sum(sent[what] - silence for what in ("loss", "backward", "geometry")) / p["least_bytes"])


def verdict(ran: Sequence[dict[str, Any]]) -> list[tuple[str, float | None, float]]:
    """(number to reach, found, at most)."""
    found: list[tuple[str, float | None, float]] = []
    for p in ran:
        name = point_of(p).name
        if len(p["contestants"]) > 1:
            found += [(f"{name}, {z} over ddp", ratio(p["seconds"], z, "ddp"), 1.1) for z in ("zero 0", "zero 1")]
            found.append((f"{name}, losses of the others against ddp's", difference(p["losses"]), 1e-3))
        if p["question"] == "chunks":
            found.append((f"{name}, over the batch at once", ratio(p["seconds"], "chunks", "whole"), 1.45))
        if p["question"] == "wire" and p["exchange"] == "all_gather":
            found.append((f"{name}, bytes for z over the least", of_z(p), 1.05))
            extra = max(0, p["sent_bytes"]["backward"] - p["sent_bytes"]["silence"])
            found.append((f"{name}, bytes in backward over the least", extra / p["least_bytes"], 0.01))
    peaks = [peak(p) for p in ran if p["question"] == "memory" and p["chunk"]]
    off = max(abs(each / median(peaks) - 1) for each in peaks) if peaks else None
    return [*found, ("memory in chunks: largest distance from the median over batches", off, 0.1)]


def peak(p: dict[str, Any]) -> float:
    """Bytes of the rank that took most: of a world, or the median of several."""
    worlds = p["peak_bytes"] if p["question"] == "memory" else [p["peak_bytes"]]
    return float(median(map(max, worlds)))


def difference(losses: dict[str, list[float]]) -> float:
    """The largest of any step between a contestant's loss and ddp's, relative where that is above 1."""
    return max(
        abs(a - b) / max(1.0, abs(b)) for all_ in losses.values() for a, b in zip(all_, losses["ddp"], strict=True)
    )


def point_of(p: dict[str, Any]) -> Point:
    fields = {name: p[name] for name in Point.__dataclass_fields__}
    return Point(**{**fields, "contestants": tuple(fields["contestants"])})


def table(ran: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for p in ran:
        lines.append(point_of(p).name)
        for name, all_ in p.get("seconds", {}).items() if "peak_bytes" not in p else ():
            base = "ddp" if p["question"] == "engine" else "whole"
            times = ratio(p["seconds"], name, base)
            lines.append(f"  {name:<8}{median(all_):9.3f} s {times:7.2f} x {base}")
        if "peak_bytes" in p:
            lines.append(f"  {peak(p) / MIB:8,.0f} MiB" + "".join(f"  {s:.1f} s" for s in p.get("step_s", ())[:2]))
        if "sent_bytes" in p:
            silence = p["sent_bytes"]["silence"]
            sent = ", ".join(
                f"{what} {max(0, b - silence):,}" for what, b in p["sent_bytes"].items() if what != "silence"
            )
            lines.append(f"  {of_z(p):.3f} x {p['least_bytes']:,} bytes ({sent})")
    return lines


def summary(record: dict[str, Any]) -> str:
    ran = [p for p in record["points"] if "not_run" not in p]
    lines = [*table(ran), "", "numbers to reach:"]
    for name, found, bound in verdict(ran):
        word = "not run" if found is None else "met" if found <= bound else "MISSED"
        lines.append(f"  {word:8}{name}: {'-' if found is None else f'{found:.3g}'} (wanted <= {bound:g})")
    return "\n".join(
        [*lines, *(f"  not run {point_of(p).name}: {p['not_run']}" for p in record["points"] if "not_run" in p)]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="small volumes and batches")
    parser.add_argument("--only", choices=QUESTIONS, help="one question")
    parser.add_argument("--table", type=Path, help="a result: print its table again, run nothing")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.point:
        point = point_of(json.loads(a.point))
        if "RANK" in os.environ:
            rank(point, a.out)
            leave(0)
        return start(point.ranks, "--point", a.point, "--out", str(a.out), module="benchmarks.step", threads=1)
    record = json.loads(a.table.read_text()) if a.table else benchmark(a.quick, a.only, a.out)
    print(summary(record))
    return int(any("not_run" in p for p in record["points"]))


if __name__ == "__main__":
    sys.exit(main())
