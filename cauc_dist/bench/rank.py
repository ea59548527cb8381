"""Real steps of a recipe on one of W ranks, under a clock: `python -m cauc_dist.bench.rank FOLDER` on each of them.

V views, W ranks, n subjects a step over all ranks, b of them on this rank (the largest share), D width of z.
Ranks are started by cauc_dist.bench.step, or by srun, mpiexec or torchrun; they read the store, augment, encode and
update as a training does, and write no run folder.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from cauc_dist import encoders, memory, optimisers, prepare
from cauc_dist.bench import rates
from cauc_dist.bench.clock import PARTS, Clock
from cauc_dist.bench.projection import Link
from cauc_dist.config import RunConfig
from cauc_dist.errors import BAD_INPUT, BadInput
from cauc_dist.objective import Objective
from cauc_dist.spawn import leave
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import Loader
from cauc_dist.stream.plan import per_rank
from cauc_dist.train import Opened, card, cut, open_engine, open_store
from cauc_dist.trainer import Feed, Step, Trainer
from cauc_dist.world import World

ASKED, FOUND = "asked.json", "found.json"
"""In the folder of the ranks, beside config.json."""
WARM = 2
"""Steps before the clock counts: buffers are made, kernels chosen."""
TOLD = 3
"""Collectives of a step in which ranks tell each other facts: what is sound, the norm of the gradient, a barrier."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Measured:
    """Steps of one batch size on W ranks. Seconds of a part: the median over steps, of the mean over ranks."""

    run: str
    ranks: int
    batch: int
    share: int
    """b."""
    chunks: int
    device: str
    precision: str
    zero_stage: int
    step_s: tuple[float, ...]
    """Of each step, of the slowest rank."""
    seconds: dict[str, float]
    """By PARTS."""
    parameters: int
    gradient_bytes: int
    """Of one rank's whole gradient on the wire."""
    z_bytes: int
    """Of one subject's embeddings on the wire: V D numbers."""
    flop: float
    """Of a rank's step, as torch counts products and convolutions."""
    gemm: float
    """FLOP/s of a bare matrix product on a rank, all ranks at work."""
    peak_bytes: int
    """Of the rank that took most, since its start."""
    small: int
    """Collectives that send next to nothing."""
    link: Link
    """Of an all-reduce of the gradient's size; without limit on one rank."""
    sent_bytes: float | None
    """A step, by rank 0's host over all its interfaces, others' traffic included; None where nobody counts."""

    @property
    def median_s(self) -> float:
        return median(self.step_s)

    @property
    def samples_per_s(self) -> float:
        return self.batch / self.median_s

    @property
    def shares(self) -> dict[str, float]:
        """Of the step, by PARTS; they add up to 1."""
        whole = sum(self.seconds.values())
        return {part: seconds / whole for part, seconds in self.seconds.items()}

    @property
    def efficiency(self) -> float:
        """The time that bare products of as many FLOP would take, over that of the step."""
        return self.flop / self.gemm / self.median_s


def steps(run: RunConfig, world: World, batches: Sequence[int], count: int) -> list[Measured]:
    """`count` steps of each batch size, after two more; a collective, in a process group. Weights move on."""
    store = open_store(run, quiet=world.rank != 0)
    opened = open_engine(run, world, store, card(run, store))
    device = opened.engine.device
    gemm = _mean(rates.products(device, DTYPES[run.engine.precision]))
    link = rates.link(opened.engine.parameters, device)
    found = []
    for batch in batches:
        one = replace(run, batch_size=batch)
        found.append(_of_batch(one, world, store, opened, count, gemm, link))
    return found


def _of_batch(
    run: RunConfig, world: World, store: Store, opened: Opened, count: int, gemm: float, link: Link
) -> Measured:
    engine, chunks = opened.engine, cut(run, world, opened.need, opened.budget, 0)
    clock = Clock(engine.device)
    took, parts = list[float](), list[dict[str, float]]()
    with training(run, world, store, opened, chunks, clock) as step:
        with FlopCounterMode(display=False) as counter:
            step(0)
        step(1)
        sent = sent_bytes()
        for number in range(WARM, WARM + count):
            dist.barrier()
            clock.restart()
            began = time.perf_counter()
            step(number)
            rates.wait(engine.device)
            took.append(time.perf_counter() - began)
            parts.append(clock.restart())
        dist.barrier()
        after = sent_bytes()
    share = per_rank(run.batch_size, world.world_size)[0]
    width = 2 if run.engine.wire == "fp16" else 4
    z_bytes = run.augment.views * run.projector.out * width
    return Measured(
        run=run.name,
        ranks=world.world_size,
        batch=run.batch_size,
        share=share,
        chunks=chunks,
        device=str(engine.device) if engine.device.type == "cpu" else torch.cuda.get_device_name(engine.device),
        precision=run.engine.precision,
        zero_stage=engine.config["zero_optimization"]["stage"],
        step_s=tuple(_largest(took)),
        seconds=_moved(_means(parts), share * z_bytes, chunks, opened),
        parameters=engine.parameters,
        gradient_bytes=engine.parameters * gradient_width(run, engine.config),
        z_bytes=z_bytes,
        flop=float(counter.get_total_flops()),
        gemm=gemm,
        peak_bytes=int(_largest([memory.peak(engine.device)])[0]),
        small=2 * chunks * norms(engine.module) + TOLD,
        link=link,
        sent_bytes=None if sent is None or after is None else (after - sent) / count,
    )


@contextmanager
def training(
    run: RunConfig, world: World, store: Store, opened: Opened, chunks: int, clock: Clock
) -> Iterator[Callable[[int], object]]:
    """Steps by their numbers, in order, as `cauc_dist.train` makes them, under the clock."""
    engine, plan = opened.engine, prepare.plan_of(run, store)
    y = torch.from_numpy(store.metadata(run.objective.columns))
    objective = Objective(run.objective, y[torch.from_numpy(plan.rows)])
    lr = optimisers.peak_lr(run.optim, run.batch_size)
    span: dict[str, Any] = {"rank": world.rank, "world_size": world.world_size, "start": 0, "stop": 10**6}
    how: dict[str, Any] = {"threads": run.data.threads, "prefetch": run.data.prefetch, "normalise": run.data.normalise}
    how |= {"on_damage": run.data.on_damage, "device": engine.device}
    with Loader(store, plan, chunks=chunks, **span, **how) as batches, clock.forward(engine.module):
        feed = Feed(batches)
        trainer = Trainer(engine, objective, run, world, feed, store.keys, chunks)
        backward, update = engine.backward, engine.update
        clock.watch(feed, next="data")
        clock.watch(trainer, _forward="augment")
        clock.watch(objective, loss="loss", geometry="loss")
        clock.watch(engine, backward="backward", update="update")

        def step(number: int) -> object:
            rows = plan.batch(number)
            ids = tuple(store.ids[i] for i in rows)
            return trainer.step(Step(number, plan.epoch(number), lr, ids, y[torch.from_numpy(rows)].to(engine.device)))

        try:
            yield step
        finally:
            engine.backward, engine.update = backward, update  # type: ignore[method-assign]


def _moved(parts: dict[str, float], z: int, chunks: int, opened: Opened) -> dict[str, float]:
    """What of each part is communication: as long as it takes with nothing else going on. A collective.

    z: bytes that a rank sends of its embeddings. An upper bound where a GPU sends while it computes.
    """
    engine, world = opened.engine, dist.get_world_size()
    sharded, synchronised = engine.config["zero_optimization"]["stage"] > 0, chunks * norms(engine.module)
    small = synchronised * rates.reduced(1, engine.device) if synchronised else 0.0
    alone = {
        "encode": small,
        "loss": rates.gathered(z // 4, engine.device),
        "backward": small + rates.reduced(engine.parameters, engine.device),
        "update": rates.gathered(engine.parameters // world, engine.device) if sharded else 0.0,
    }
    for part, seconds in alone.items() if world > 1 else ():
        moved = min(parts[part], _mean(seconds))
        parts[part] -= moved
        parts["communication"] += moved
    return parts


def norms(module: torch.nn.Module) -> int:
    """Layers whose statistics the ranks add up, forward and backward."""
    return sum(isinstance(each, encoders.BatchNorm) for each in module.modules())


def gradient_width(run: RunConfig, deepspeed: dict[str, Any]) -> int:
    """Bytes of a number of the gradient on the wire: 4 under bf16 too, whose weights and gradients stay fp32."""
    told = {"fp16": 2, "bf16": 2, "bfp16": 2}.get(str(deepspeed.get("communication_data_type")), 4)
    return 8 if run.engine.precision == "fp64" else told


def sent_bytes() -> int | None:
    """Bytes that this host (its network namespace) has sent on all interfaces; None where there is no /proc."""
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    except OSError:
        return None
    return sum(int(line.rpartition(":")[2].split()[8]) for line in lines)


def _mean(x: float) -> float:
    """Of all ranks. A collective."""
    return float(np.mean(_everyones([x])))


def _largest(x: Sequence[float]) -> list[float]:
    """Of all ranks, number by number. A collective."""
    return [float(each) for each in np.max(_everyones(x), axis=0)]


def _means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median over steps of the mean over ranks. A collective."""
    table = [[step[part] for part in PARTS] for step in parts]
    found = np.median(np.mean(_everyones(table), axis=0), axis=0)
    return dict(zip(PARTS, map(float, found), strict=True))


def _everyones(x: Any) -> Any:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return np.asarray(found, np.float64)


def main(folder: str) -> int:
    """One rank: FOLDER holds config.json and what is asked; rank 0 writes what was found there. The exit code."""
    try:
        run = prepare.load(Path(folder))
        asked = json.loads((Path(folder) / ASKED).read_text())
        world = World.from_env()
        device = world.device(run.engine.device)
        torch.set_num_threads(asked["threads"])
        with world.process_group(device, run.engine.start_minutes):
            found = steps(run, world, asked["batches"], asked["steps"])
        if world.rank == 0:
            (Path(folder) / FOUND).write_text(json.dumps([asdict(one) for one in found]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1]))
