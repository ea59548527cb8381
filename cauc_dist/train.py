"""The training loop: `python -m cauc_dist.train RUN` on every rank, whatever started it.

W ranks, N scans of the store, k metadata columns.
"""

import dataclasses
import fcntl
import hashlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cauc_dist import checkpoint, encoders, memory, optimisers
from cauc_dist.config import RunConfig
from cauc_dist.engine import Engine, zero_stage
from cauc_dist.errors import BAD_INPUT, LOST, NON_FINITE, STOPPED, BadInput
from cauc_dist.journal import Journal, begun
from cauc_dist.objective import Objective
from cauc_dist.prepare import check_store, load, plan_of, stage_folder
from cauc_dist.progress import Progress, say
from cauc_dist.spawn import leave
from cauc_dist.store.reader import Store
from cauc_dist.store.stage import stage
from cauc_dist.stream.loader import Loader
from cauc_dist.stream.plan import Plan, per_rank, shares
from cauc_dist.trackers import Trackers
from cauc_dist.trainer import Feed, NonFinite, Step, Trainer
from cauc_dist.watch import Watch
from cauc_dist.world import World, cores

SKIPPED_IN_A_ROW = 10
"""Steps that are not finite, one after the other, after which `on_non_finite` skip ends the run all the same."""
LOCK_WAIT = 0.5
"""Seconds: who asks whether a run is at work holds its lock for an instant."""

ASKING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Elsewhere(BadInput):
    """What rank 0 found, and says."""


class Stopped(RuntimeError):
    """A signal asked for the end of the run; its checkpoint is written."""


@dataclass
class Stop:
    """Whether a signal has asked this rank to stop; all ranks stop at the same step, at its end."""

    signal: int = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM, SIGUSR2 and SIGINT ask; again, they change nothing: who started the ranks may send them twice."""
        before = {number: signal.signal(number, self._asked) for number in ASKING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def train(run: RunConfig, world: World, stop: Stop | None = None, wait: float = LOCK_WAIT) -> None:
    """Train, or go on from the newest sound checkpoint of the run folder. Call it on every rank, in a process group.

    `wait`: seconds that another training in the folder is given to end. Raises NonFinite, and Stopped where `stop` has
    asked, after a checkpoint.
    """
    stop = stop or Stop()
    if world.rank == 0:
        own(run.folder, wait)
    store = open_store(run, quiet=world.rank != 0)
    check_store(run.folder, store)
    plan = plan_of(run, store)
    y = torch.from_numpy(store.metadata(run.objective.columns))  # (N, k) float64: every rank knows all of it
    objective = Objective(run.objective, y[torch.from_numpy(plan.rows)])
    belongs = card(run, store)
    opened = open_engine(run, world, store, belongs)
    engine, start = opened.engine, opened.start
    total = run.epochs * plan.steps_per_epoch
    reads = Loader(
        store,
        plan,
        rank=world.rank,
        world_size=world.world_size,
        start=start,
        stop=total,
        chunks=opened.chunks,
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
        Trackers(run, journal, progress.say, quiet=quiet) as trackers,
        Saves(run, world, belongs) as saves,
        reads as batches,
    ):
        for line in opened.complaints:
            progress.say(line)
            journal.write("damaged", message=line)
        facts = derived(run, world, plan, store, opened)
        journal.write("resume" if start else "start", **facts)
        progress.start(facts)
        trackers.start(start)
        trainer = Trainer(engine, objective, run, world, Feed(batches), store.keys, opened.chunks)
        watch = Watch(world.names)
        peak = optimisers.peak_lr(run.optim, run.batch_size)
        left_out = in_a_row = skips = 0
        shared = 0.0
        for number in range(start, total):
            scans = plan.batch(number)
            step = Step(
                number=number,
                epoch=plan.epoch(number),
                lr=optimisers.learning_rate(run.optim, peak, number, plan.steps_per_epoch, run.epochs),
                ids=tuple(store.ids[i] for i in scans),
                y=y[torch.from_numpy(scans)].to(engine.device),
            )
            try:
                record = trainer.step(step, stop.signal)
            except NonFinite as error:
                left_out, in_a_row = left_out + 1, in_a_row + 1
                journal.write("non_finite", step=number, message=str(error), left_out=left_out)
                if run.engine.on_non_finite == "stop" or in_a_row == SKIPPED_IN_A_ROW:
                    raise
                progress.say(f"{error}. Step left out ({left_out} so far)")
            else:
                in_a_row = 0
                if shared:
                    record["communication_share"] = min(1.0, shared / record["step_s"])
                if trainer.skipped:
                    skips += len(trainer.skipped)
                    journal.write("skip", step=number, scans=list(trainer.skipped), skipped=skips)
                    progress.say(f"step {number}: {', '.join(trainer.skipped)} damaged, skipped")
                journal.write("step", step=number, epoch=step.epoch, **record)
                trackers.step(number, step.epoch, record)
                progress.step(number + 1, step.epoch, record)
                saves.losses.append(record["loss"])
                for event, fields, line in watch.add(*trainer.seconds, record["step_s"]):
                    journal.write(event, step=number, **fields)
                    progress.say(f"step {number}: {line}")
            if number == start:
                world.shorten(run.engine.timeout_minutes)
                if world.world_size > 1:
                    shared = communication(engine)
            due = _due(number + 1, plan.steps_per_epoch, run.checkpoint.every_epochs, total)
            if trainer.asked or due:
                saves.save(engine, number + 1, due=due)
                journal.write("checkpoint", step=number + 1)
            if trainer.asked and number + 1 < total:
                saves.close()
                journal.write("stopped", step=number + 1, signal=trainer.asked)
                trackers.close("stopped")
                name = signal.Signals(trainer.asked).name
                raise Stopped(f"stopped by {name} after step {number}, checkpoint written")
        saves.close()
        trackers.close("finished")
        journal.write("end", step=total)
        progress.finish(run.folder)


class Saves:
    """Checkpoints of a run, written by rank 0 and agreed on by all: what fails there ends every rank, in words."""

    def __init__(self, run: RunConfig, world: World, belongs: dict[str, Any]) -> None:
        c = run.checkpoint
        self.losses: list[float] = []
        """Of the steps since the last one."""
        self._writer = None
        if world.rank == 0:
            self._writer = checkpoint.Writer(run.folder, belongs, keep=c.keep, best=c.best, background=c.background)

    def save(self, engine: Engine, step: int, *, due: bool) -> None:
        """A collective: call it on every rank. One that is not `due` has no mean loss to be the best by."""
        tensors = engine.state()
        loss = float(np.mean(self.losses)) if self.losses and due else float("nan")
        self.losses = []
        self._agreed(lambda writer: writer.save(step, tensors, loss))

    def close(self) -> None:
        """Wait for what is being written. A collective."""
        self._agreed(lambda writer: writer.close())

    def _agreed(self, act: Callable[[checkpoint.Writer], object]) -> None:
        told: list[Any] = [None]
        if self._writer is not None:
            try:
                act(self._writer)
            except BadInput as error:
                told = [(error.found, error.wanted, error.do)]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            found, wanted, do = told[0]
            raise (BadInput if self._writer else Elsewhere)(found, wanted=wanted, do=do)

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *raised: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*raised)


def communication(engine: Engine) -> float:
    """Seconds that the gradient of the whole model takes over the ranks, nothing else going on: the best of three."""
    gradient, best = torch.zeros(engine.parameters, device=engine.device), float("inf")
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(gradient)
        float(gradient[0])  # a GPU is waited for
        best = min(best, time.perf_counter() - began)
    return best


def own(folder: Path, wait: float = LOCK_WAIT) -> None:
    """Refuse a run folder in which another training is at work, still after `wait` s; held until this process ends."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BadInput(
                    f"another training is at work in {folder}",
                    wanted="one at a time",
                    do="wait for it, or end it first (look for `python -m cauc_dist.train`)",
                ) from None
            time.sleep(0.05)
        except OSError:
            return  # a file system without locks: nothing can be told


@dataclass(frozen=True)
class Opened:
    """A model under DeepSpeed, and where it goes on."""

    engine: Engine
    start: int
    """Step to go on from; 0: from scratch."""
    complaints: list[str]
    """A line for each damaged checkpoint."""
    chunks: int
    """Into which a rank's share is cut."""
    need: memory.Need
    budget: float


def open_engine(run: RunConfig, world: World, store: Store, belongs: dict[str, Any]) -> Opened:
    """The model under DeepSpeed, with the newest sound checkpoint in it where there is one. A collective."""
    model = build_model(run, store.shape)
    saved, complaints = checkpoint.latest(run.folder, belongs)
    start = agree(saved.step if saved else 0)
    if saved:
        checkpoint.load_module(model, saved.tensors)
    if run.engine.recompute:
        encoders.recompute(model)
    device = world.device(run.engine.device)
    model.to(device, torch.float64 if run.engine.precision == "fp64" else None)
    need, budget = memory.need(model, run, store.shape, world.world_size, device), memory.budget(run, world, device)
    chunks = cut(run, world, need, budget, start)
    if run.engine.compile:
        model.encoder.compile()
    engine = Engine(model, run, world, device)
    world.shorten(run.engine.start_minutes)  # of DeepSpeed's own groups too
    if saved:
        engine.load(saved.tensors)
    return Opened(engine, start, complaints, chunks, need, budget)


def cut(run: RunConfig, world: World, need: memory.Need, budget: float, start: int) -> int:
    """How many chunks each rank encodes its share in: the same number on all. A collective where it is measured.

    At most the smallest share: none is empty, and where shares are uneven a chunk of 1 may hold 2.
    """
    sizes = per_rank(run.batch_size, world.world_size)
    chunk = run.engine.encode_chunk
    if chunk == "auto":
        fits = torch.tensor(memory.chunk(budget, need, sizes[0]), device=world.device(run.engine.device))
        dist.all_reduce(fits, dist.ReduceOp.MIN)
        told = [measured_before(run, world) if world.rank == 0 and start else None]
        dist.broadcast_object_list(told, src=0)
        if told[0]:
            return told[0]
        chunk = int(fits)
    return 1 if chunk is None else min(-(-sizes[0] // chunk), sizes[-1])


def measured_before(run: RunConfig, world: World) -> int | None:
    """The chunks of an earlier life of the run on as many ranks: a run that goes on ends with the same bits."""
    before = begun(run.folder)
    return before["chunks"] if before and before["ranks"] == world.world_size else None


def open_store(run: RunConfig, *, quiet: bool) -> Store:
    """The run's store, or its copy on this node's disk; the first rank there makes it, the others wait."""
    if run.data.stage is None:
        return Store.open(run.data.store)
    return Store.open(stage(run.data.store, stage_folder(run), say=_nothing if quiet else say))


def _nothing(line: str) -> None:
    pass


def build_model(run: RunConfig, shape: tuple[int, ...]) -> encoders.Model:
    """Encoder and projector with the run's seed: the same weights on every rank, and in a probe's untrained twin."""
    torch.manual_seed(run.seed)
    encoder = encoders.build(run.encoder, shape)
    return encoders.Model(
        encoder,
        encoders.Projector(encoder.width, run.projector.hidden, run.projector.out),
        normalise=run.objective.on_sphere,
        bf16=run.engine.precision == "bf16",
        channels_last=run.engine.channels_last,
    )


def card(run: RunConfig, store: Store) -> dict[str, Any]:
    """What a checkpoint belongs to: the network of its tensors, and the plan that its step counts in."""
    network = {"encoder": dataclasses.asdict(run.encoder), "projector": dataclasses.asdict(run.projector)}
    plan = plan_of(run, store)
    y = hashlib.sha256(store.metadata(run.objective.columns)[plan.rows].tobytes()).hexdigest()
    order = {"order": plan.fingerprint, "metadata": y, "data": store.fingerprint, "normalise": run.data.normalise}
    return {"architecture": {**network, "shape": list(store.shape)}, "plan": order}


def derived(run: RunConfig, world: World, plan: Plan, store: Store, opened: Opened) -> dict[str, Any]:
    """The numbers that follow from run, world and store; printed and kept in the journal."""
    sizes = per_rank(run.batch_size, world.world_size)
    at_once = shares(sizes[0], opened.chunks)[0]
    return {
        "step": opened.start,
        "ranks": world.world_size,
        "launcher": world.source,
        "device": str(opened.engine.device),
        "batch_size": run.batch_size,
        "per_rank": sizes[0],
        "encode_chunk": at_once,
        "chunks": opened.chunks,
        "scans": len(plan.rows),
        "held_out": len(store.ids) - len(plan.rows),
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": run.epochs,
        "lr": optimisers.peak_lr(run.optim, run.batch_size),
        "optimiser": run.optim.name,
        "precision": run.engine.precision,
        "parameters": opened.engine.parameters,
        "zero_stage": zero_stage(run, world),
        "shape": list(store.shape),
        "estimated_gib": round(opened.need.of(at_once) / memory.GIB, 3),
        "budget_gib": round(opened.budget / memory.GIB, 3),
        "deepspeed": opened.engine.config,
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


def main(
    folder: str, asked: int = 0, *, again: bool = False, gone: Callable[[Sequence[int]], object] = lambda ranks: None
) -> int:
    """Run folder in, exit code out: 0 done, 2 bad input, 3 non-finite loss, 5 stopped by a signal, 6 a rank is gone.

    `asked`: a signal that came before. `again`: an earlier start of the same job may not be over. On a node that was
    cut off its rank 0 lives, and holds the run's lock, until a collective has waited `engine.timeout_minutes`.
    `gone` is called on every rank that misses others, with their numbers.
    """
    stop = Stop(asked)
    with stop.listening():
        return _main(folder, stop, again, gone)


def _main(folder: str, stop: Stop, again: bool, gone: Callable[[Sequence[int]], object]) -> int:
    try:
        run = load(Path(folder))
        world = World.from_env()
        device = world.device(run.engine.device)
        torch.set_num_threads(run.engine.threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or _threads(world))
        with world.process_group(device, run.engine.start_minutes):
            try:
                train(run, world, stop, 60 * run.engine.timeout_minutes + 60 if again else LOCK_WAIT)
            except RuntimeError as error:
                if not _of_communication(error):
                    raise
                missing = world.missing()
                if missing:
                    gone(missing)
                if not missing and not world.failed:
                    if world.world_size == 1:
                        raise
                    traceback.print_exc()
                    print(
                        f"error: every rank is there, and they do not reach each other. {_goes_on(folder)}",
                        file=sys.stderr,
                    )
                if missing and world.rank == min(set(range(world.world_size)) - {*missing, *world.failed}):
                    print(f"error: {_gone(world, missing, folder)}", file=sys.stderr)
                return LOST  # of one that has failed, there is nothing to add to its own words
    except Elsewhere:
        return BAD_INPUT
    except BadInput as error:
        _say(f"error: {error}", error)
        return BAD_INPUT
    except OSError as error:
        _say(f"error: {error}. Check the path, its permissions and the disk. {_goes_on(folder)}", error)
        return BAD_INPUT
    except NonFinite as error:
        if world.rank == 0:  # it is the same on every rank
            _say(f"error: {error}", error)
        return NON_FINITE
    except Stopped as error:
        if world.rank == 0:
            _say(f"{error}: {_goes_on(folder)}", error)
        return STOPPED
    return 0


def _say(line: str, error: Exception) -> None:
    """The line, and what was added to the error on its way (a checkpoint that could not be written)."""
    print("\n".join([line, *getattr(error, "__notes__", [])]), file=sys.stderr)


def _threads(world: World) -> int:
    """The share of a rank of the host's cores; srun may have bound it to them already."""
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    bound = world.source == "slurm" and cores() < (os.cpu_count() or 1)
    return cores() if bound else max(1, cores() // world.local_size)


def _of_communication(error: RuntimeError) -> bool:
    """Whether a peer may be at fault: torch raises a plain RuntimeError where gloo's sockets fail."""
    text = r"gloo|nccl|connection (closed|reset)|broken pipe|timed out"
    return isinstance(error, dist.DistError) or bool(re.search(text, str(error), re.IGNORECASE))


def _gone(world: World, missing: Sequence[int], folder: str) -> str:
    names = ", ".join(world.name(rank) for rank in missing)
    verb = "is" if len(missing) == 1 else "are"
    return f"{names} {verb} gone, or frozen; the others end too. {_goes_on(folder)}"


def _goes_on(folder: str) -> str:
    return f"`cauc resume {folder}` goes on from the newest checkpoint"


if __name__ == "__main__":
    leave(main(sys.argv[1]))
