"""The training loop: `python -m cauc_dist.train RUN` on every rank, whatever started it.

V views, b subjects a rank, W ranks, n = b*W subjects in the global batch, D embedding width, k metadata columns.
"""

import dataclasses
import fcntl
import hashlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cauc_dist import checkpoint, encoders
from cauc_dist.augment import views
from cauc_dist.config import RunConfig
from cauc_dist.engine import Engine, learning_rate
from cauc_dist.errors import BAD_INPUT, NON_FINITE, BadInput
from cauc_dist.gather import EXCHANGES, sound_rows
from cauc_dist.journal import Journal
from cauc_dist.losses.batch import Exchange
from cauc_dist.losses.batch import NonFinite as NonFiniteEmbeddings
from cauc_dist.objective import Objective
from cauc_dist.prepare import check_store, load, plan_of, stage_folder
from cauc_dist.progress import Progress
from cauc_dist.store.reader import Store
from cauc_dist.store.stage import stage
from cauc_dist.stream.loader import Batch, Loader
from cauc_dist.stream.plan import Plan
from cauc_dist.world import World


class NonFinite(RuntimeError):
    """A loss that is not a number: the step and the subjects are in the message; no parameter was touched."""


@dataclass(frozen=True)
class Step:
    """What one step of the global batch is made from, beside its volumes: known to every rank without asking."""

    number: int
    epoch: int
    lr: float
    ids: tuple[str, ...]
    """(n,) names of the scans, in global order."""
    y: Tensor
    """(n, k) their metadata."""
    keys: NDArray[np.uint64]
    """(b,) addresses of this rank's scans for random draws."""


def train_step(
    engine: Engine, objective: Objective, exchange: Exchange, batch: Batch, step: Step, run: RunConfig
) -> dict[str, float]:
    """One update; returns the terms of the loss on the GLOBAL batch, the same numbers on every rank."""
    x = views(batch.volumes, step.keys, seed=run.seed, epoch=step.epoch, augment=run.augment)  # (V*b, c, X, Y, Z)
    z = engine(x).view(run.augment.views, len(batch.rows), -1)  # (V, b, D)
    if not batch.sound.all():
        z = z[:, torch.from_numpy(batch.sound)]
    # Every rank holds the same number, so every rank stops at the same step, before any parameter is touched.
    try:
        loss = objective.loss(z, step.y, exchange)
    except NonFiniteEmbeddings as error:
        raise NonFinite(non_finite(step, error.subjects)) from None
    try:
        norm = engine.step(loss, step.lr)
    except FloatingPointError as error:
        raise NonFinite(f"at step {step.number} the loss is finite and {error}. Lower the learning rate") from None
    geometry = objective.geometry(z.detach(), step.y, exchange)
    return {"loss": loss.item(), **geometry, "grad_norm": norm, "lr": step.lr}


def non_finite(step: Step, bad: Sequence[int]) -> str:
    """Which subjects' embeddings are not finite at which step, and what to do; `bad`: their places in the batch."""
    where = f"embeddings of {', '.join(step.ids[i] for i in bad)} are not finite"
    if len(bad) in (0, len(step.ids)):
        where = "all embeddings are finite, the loss is not" if not bad else "not one embedding is"
    do = "Nothing was updated. Lower the learning rate, or look at these scans"
    return f"the loss at step {step.number} is not finite: {where}. {do}"


def train(run: RunConfig, world: World) -> None:
    """Train, or go on from the newest sound checkpoint of the run folder. Call it on every rank, in a process group."""
    if world.rank == 0:
        own(run.folder)
    store = open_store(run, quiet=world.rank != 0)
    check_store(run.folder, store)
    plan = plan_of(run, store)
    y = torch.from_numpy(store.metadata(run.objective.columns))  # (N, k) float64: every rank knows all of it
    objective = Objective(run.objective, y[torch.from_numpy(plan.rows)])
    belongs = card(run, store)
    engine, start, complaints = open_engine(run, world, store, belongs)
    exchange, skips = open_exchange(run, run.batch_size), 0
    total = run.epochs * plan.steps_per_epoch
    facts = derived(run, world, plan, store, engine, start)
    reads = Loader(
        store,
        plan,
        rank=world.rank,
        world_size=world.world_size,
        start=start,
        stop=total,
        normalise=run.data.normalise,
        threads=run.data.threads,
        prefetch=run.data.prefetch,
        on_damage=run.data.on_damage,
        device=engine.device,
    )
    quiet = world.rank != 0
    with (
        Journal(run.folder, quiet=quiet) as journal,
        Progress(run.name, total, quiet=quiet) as progress,
        reads as batches,
    ):
        for line in complaints:
            progress.say(line)
            journal.write("damaged", message=line)
        journal.write("resume" if start else "start", **facts)
        progress.start(facts)
        began = time.perf_counter()
        for batch in batches:
            scans, meet = plan.batch(batch.step), exchange
            if run.data.on_damage == "skip":
                sound = everyones(batch, engine)
                if not sound.all():
                    skipped = [store.ids[i] for i in scans[~sound]]
                    skips += len(skipped)
                    journal.write("skip", step=batch.step, scans=skipped, skipped=skips)
                    progress.say(f"step {batch.step}: {', '.join(skipped)} damaged, skipped")
                    meet = open_exchange(run, int(sound.sum()), sound.reshape(world.world_size, -1).sum(1).tolist())
                    scans = scans[sound]
            step = Step(
                number=batch.step,
                epoch=plan.epoch(batch.step),
                lr=learning_rate(run.optim, batch.step, plan.steps_per_epoch, run.epochs),
                ids=tuple(store.ids[i] for i in scans),
                y=y[torch.from_numpy(scans)].to(engine.device),
                keys=store.keys[batch.rows],
            )
            try:
                record = train_step(engine, objective, meet, batch, step, run)
            except NonFinite as error:
                journal.write("non_finite", step=step.number, message=str(error))
                raise
            record |= {"samples_per_s": run.batch_size / (time.perf_counter() - began), "data_wait_s": batch.wait}
            journal.write("step", step=step.number, epoch=step.epoch, **record)
            progress.step(step.number + 1, step.epoch, record)
            if _due(step.number + 1, plan.steps_per_epoch, run.checkpoint.every_epochs, total):
                _save(engine, run, world, step.number + 1, belongs)
                journal.write("checkpoint", step=step.number + 1)
            began = time.perf_counter()
        journal.write("end", step=total)
        progress.finish(run.folder)


def own(folder: Path) -> None:
    """Refuse a run folder in which another training is at work; held until this process ends."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(
            f"another training is at work in {folder}",
            wanted="one at a time",
            do="wait for it, or end it first (look for `python -m cauc_dist.train`)",
        ) from None
    except OSError:
        return  # a file system without locks: nothing can be told


def open_engine(run: RunConfig, world: World, store: Store, belongs: dict[str, Any]) -> tuple[Engine, int, list[str]]:
    """The model under DeepSpeed, the step to go on from (0: from scratch), and a line for each damaged checkpoint."""
    model = build_model(run, store.shape)
    saved, complaints = checkpoint.latest(run.folder, belongs)
    start = agree(saved.step if saved else 0)
    if saved:
        checkpoint.load_module(model, saved.tensors)
    engine = Engine(model, run, world, world.device(run.engine.device))
    if saved:
        engine.load_moments(saved.tensors)
    return engine, start, complaints


def open_store(run: RunConfig, *, quiet: bool) -> Store:
    """The run's store, or its copy on this node's disk; the first rank there makes it, the others wait."""
    if run.data.stage is None:
        return Store.open(run.data.store)
    return Store.open(stage(run.data.store, stage_folder(run), say=_nothing if quiet else print))


def _nothing(line: str) -> None:
    pass


def open_exchange(run: RunConfig, n: int, sizes: Sequence[int] | None = None) -> Exchange:
    """How the embeddings of n subjects meet, as the run says; `sizes`: of each rank, where scans were skipped."""
    wire = torch.float16 if run.engine.wire == "fp16" else None
    return EXCHANGES[run.engine.exchange](n, wire, sizes)


def everyones(batch: Batch, engine: Engine) -> NDArray[np.bool_]:
    """(n,) which scans of the global batch could be read: one byte a scan from every rank."""
    sound = sound_rows(torch.from_numpy(batch.sound).to(engine.device)).cpu().numpy()
    if sound.sum() < 2:
        raise BadInput(
            f"{len(sound) - sound.sum()} of the {len(sound)} scans of step {batch.step} are damaged",
            wanted="two sound ones at least",
            do="run `cauc store verify`, and restore the store",
        )
    return sound


def build_model(run: RunConfig, shape: tuple[int, ...]) -> encoders.Model:
    """Encoder and projector with the run's seed: the same weights on every rank, and in a probe's untrained twin."""
    torch.manual_seed(run.seed)
    encoder = encoders.build(run.encoder, shape)
    projector = encoders.Projector(encoder.width, run.projector.hidden, run.projector.out)
    return encoders.Model(encoder, projector, normalise=run.objective.name != "rank_n_contrast")


def card(run: RunConfig, store: Store) -> dict[str, Any]:
    """What a checkpoint belongs to: the network of its tensors, and the plan that its step counts in."""
    network = {"encoder": dataclasses.asdict(run.encoder), "projector": dataclasses.asdict(run.projector)}
    plan = plan_of(run, store)
    y = hashlib.sha256(store.metadata(run.objective.columns)[plan.rows].tobytes()).hexdigest()
    order = {"order": plan.fingerprint, "metadata": y, "data": store.fingerprint}
    return {"architecture": {**network, "shape": list(store.shape)}, "plan": order}


def derived(run: RunConfig, world: World, plan: Plan, store: Store, engine: Engine, start: int) -> dict[str, Any]:
    """The numbers that follow from run, world and store; printed and kept in the journal."""
    return {
        "step": start,
        "ranks": world.world_size,
        "device": str(engine.device),
        "batch_size": run.batch_size,
        "per_rank": run.batch_size // world.world_size,
        "scans": len(plan.rows),
        "held_out": len(store.ids) - len(plan.rows),
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": run.epochs,
        "parameters": engine.parameters,
        "zero_stage": run.engine.zero_stage,
        "shape": list(store.shape),
    }


def agree(step: int) -> int:
    """The step that every rank starts from; RuntimeError where they disagree (a file system that lags behind)."""
    steps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise RuntimeError(f"ranks found checkpoints of different steps {steps}; is the run folder on a shared disk?")
    return step


def _due(done: int, steps_per_epoch: int, every_epochs: int, total: int) -> bool:
    return done == total or done % (steps_per_epoch * every_epochs) == 0


def _save(engine: Engine, run: RunConfig, world: World, step: int, belongs: dict[str, Any]) -> None:
    tensors: Mapping[str, Tensor] = engine.state()  # a collective: all ranks
    if world.rank == 0:
        checkpoint.save(run.folder, step, tensors, belongs, keep=run.checkpoint.keep)
    dist.barrier()


def main(folder: str) -> int:
    """Run folder in, exit code out: 0 done, 2 bad input, 3 non-finite loss."""
    try:
        run = load(Path(folder))
        world = World.from_env()
        device = world.device(run.engine.device)
        torch.set_num_threads(
            run.engine.threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads()
        )
        with world.process_group(device, run.engine.timeout_minutes):
            train(run, world)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except NonFinite as error:
        if world.rank == 0:  # it is the same on every rank
            print(f"error: {error}", file=sys.stderr)
        return NON_FINITE
    return 0


if __name__ == "__main__":
    # The agent passes ctrl-C on to every rank: end at once, not in W tracebacks. Checkpoints are whole or absent.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1]))
