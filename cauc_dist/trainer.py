"""One step of the global batch on one rank.

V views, b subjects of this rank, W ranks, n subjects in the global batch, D embedding width, k metadata columns.

A step encodes its subjects at once, or (GradCache: Gao et al., arXiv 2101.06983) in m chunks and two passes: embeddings
without a graph, the loss and its gradient dz by them, then each chunk once more, back-propagating <z, dz>. Scans are
read and augmented anew in the second pass, by their addresses, so that memory does not grow with the batch.
"""

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cauc_dist import encoders, memory
from cauc_dist.augment import views
from cauc_dist.config import RunConfig
from cauc_dist.engine import Engine
from cauc_dist.errors import BadInput
from cauc_dist.gather import EXCHANGES, Once, tell
from cauc_dist.losses.batch import Exchange
from cauc_dist.losses.batch import NonFinite as NonFiniteEmbeddings
from cauc_dist.objective import Objective
from cauc_dist.stream.loader import Batch
from cauc_dist.stream.plan import per_rank
from cauc_dist.world import World

Seconds = NDArray[np.float64]


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


@dataclass
class Feed:
    """The chunks of one rank in the order of its steps; what a step has left unread is passed over."""

    batches: Iterator[Batch]
    wait: float = 0.0
    """Seconds that were waited for scans since it was last set to 0."""

    def next(self, step: int) -> Batch:
        batch = next(self.batches)
        while batch.step < step:
            batch = next(self.batches)
        self.wait += batch.wait
        return batch


@dataclass
class Trainer:
    """What the steps of a run share. `keys` (N,): addresses of the store's scans for random draws."""

    engine: Engine
    objective: Objective
    run: RunConfig
    world: World
    feed: Feed
    keys: NDArray[np.uint64]
    chunks: int = 1
    asked: int = 0
    """The signal by which a rank was asked to stop before the last step; the same on every rank."""
    seconds: tuple[Seconds, Seconds] = field(default_factory=lambda: (np.zeros(1), np.zeros(1)))
    """(W,) what each rank took to encode, and waited for scans, in the step before the last."""
    skipped: tuple[str, ...] = ()
    """Scans of the last step that were damaged, and left out."""

    def __post_init__(self) -> None:
        self._sizes = per_rank(self.run.batch_size, self.world.world_size)
        self._exchange = open_exchange(self.run, self.run.batch_size)
        self._took = (0.0, 0.0)  # seconds of this rank's last step, for the others
        self._moments: list[encoders.Kept] = []  # of BatchNorm, in the first pass over the chunks of a step
        self._buffers = list(self.engine.module.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    def step(self, step: Step, signal: int = 0) -> dict[str, float]:
        """One update; returns the terms of the loss on the GLOBAL batch, the same numbers on every rank.

        `signal`: that by which this rank was asked to stop; every rank then has it in `asked`. NonFinite leaves
        parameters and BatchNorm's running statistics as they were, on every rank.
        """
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)
        try:
            return self._step(step, signal)
        except NonFinite:
            if self._buffers:
                torch._foreach_copy_(self._buffers, self._before)
            raise

    def _step(self, step: Step, signal: int) -> dict[str, float]:
        began, self.feed.wait = time.perf_counter(), 0.0
        z, sound = self._encode(step) if self.chunks == 1 else self._embed(step)  # (V, b, D), (b,)
        if z.is_cuda:
            torch.cuda.synchronize()  # what follows waits for it all the same
        encoded = time.perf_counter() - began - self.feed.wait
        exchange, kept = self._meet(sound, signal)
        self.skipped = tuple(itertools.compress(step.ids, ~kept))
        step = replace(step, ids=tuple(itertools.compress(step.ids, kept)), y=step.y[torch.from_numpy(kept)])
        rows = z if sound.all() else z[:, torch.from_numpy(sound)]
        # Every rank holds the same number, so every rank stops at the same step, before any parameter is touched.
        try:
            loss = self.objective.loss(rows, step.y, exchange)
        except NonFiniteEmbeddings as error:
            raise NonFinite(non_finite(step, error.subjects)) from None
        watching = Beside(z.device)
        if self.chunks == 1:
            self.engine.backward([loss], 1)
        else:
            (dz,) = torch.autograd.grad(loss, z)
            self.engine.backward(self._surrogates(step, dz, sound), self.chunks)
        try:
            with watching:
                geometry = self.objective.geometry(rows.detach(), step.y, exchange)
        except (NonFiniteEmbeddings, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            geometry = {"uniformity": float("nan")}  # it is only watched, and alike on every rank
        exchange.close()
        try:
            norm = self.engine.update(step.lr)
        except FloatingPointError as error:
            raise NonFinite(f"at step {step.number} the loss is finite and {error}. Lower the learning rate") from None
        value = loss.item()
        self._took = (encoded, self.feed.wait)
        seconds = time.perf_counter() - began
        return {
            "loss": value,
            **geometry,
            "grad_norm": norm,
            "lr": step.lr,
            "step_s": seconds,
            "samples_per_s": len(step.ids) / seconds,
            "data_wait_s": self.feed.wait,
            "memory_gib": memory.peak(self.engine.device) / memory.GIB,
        }

    def _encode(self, step: Step) -> tuple[Tensor, NDArray[np.bool_]]:
        batch = self.feed.next(step.number)
        return self._forward(batch, step, 0), batch.sound

    def _embed(self, step: Step) -> tuple[Tensor, NDArray[np.bool_]]:
        """The first pass: z is a leaf, and no graph of it is kept."""
        parts, sound = [], []
        self._moments = [encoders.Kept() for _ in range(self.chunks)]
        for k, moments in enumerate(self._moments):
            batch = self.feed.next(step.number)
            with torch.no_grad(), encoders.frozen(keep=moments):
                parts.append(self._forward(batch, step, k))
            sound.append(batch.sound)
        return torch.cat(parts, 1).requires_grad_(), np.concatenate(sound)

    def _surrogates(self, step: Step, dz: Tensor, sound: NDArray[np.bool_]) -> Iterator[Tensor]:
        """The second pass: scalars whose gradients by the parameters add up to that of the loss."""
        start = 0
        for k in range(self.chunks):
            batch = self.feed.next(step.number)
            stop = start + len(batch.rows)
            if (batch.sound != sound[start:stop]).any():
                found = f"step {step.number}: {'; '.join(batch.damaged) or 'a scan'} changed between two readings"
                raise BadInput(found, wanted="bytes that stay", do="run `cauc store verify`, and look at the disk")
            with encoders.frozen(tracks=True, use=self._moments[k]):
                z = self._forward(batch, step, k)
            yield (z * dz[:, start:stop]).sum()
            start = stop

    def _forward(self, batch: Batch, step: Step, k: int) -> Tensor:
        """(V, m, D) of chunk k. Layers that draw (dropout) draw the same in both passes, and after a resume."""
        x = views(
            batch.volumes, self.keys[batch.rows], seed=self.run.seed, epoch=step.epoch, augment=self.run.augment
        )  # (V*m, c, X, Y, Z)
        address = f"{self.run.seed} {step.number} {self.world.rank} {k}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(address).digest()[:8], "big") >> 1)
        return self.engine(x).view(self.run.augment.views, len(batch.rows), -1)

    def _meet(self, sound: NDArray[np.bool_], signal: int) -> tuple[Once, NDArray[np.bool_]]:
        """How the sound rows of all ranks meet, and (n,) which of the batch they are; learns `asked` and `seconds`."""
        everyones, facts = tell(sound, (signal, *self._took), self._sizes, self.engine.device)
        self.asked, self.seconds = int(facts[:, 0].max()), (facts[:, 1], facts[:, 2])
        kept = np.concatenate(everyones)
        if kept.all():
            return Once(self._exchange), kept
        if kept.sum() < 2:
            raise BadInput(
                f"{len(kept) - kept.sum()} of the {len(kept)} scans of a step are damaged",
                wanted="two sound ones at least",
                do="run `cauc store verify`, and restore the store",
            )
        return Once(open_exchange(self.run, int(kept.sum()), [int(rows.sum()) for rows in everyones])), kept


class Beside:
    """What is done within needs what the device had to do when this was made, and no more: no backward pass after it.

    Numbers are waited for within, so that what memory it used is free to others afterwards.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def __enter__(self) -> None:
        self._on = torch.cuda.stream(self._stream)
        self._on.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: object) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._on.__exit__(*raised)


def non_finite(step: Step, bad: Sequence[int]) -> str:
    """Which subjects' embeddings are not finite at which step, and what to do; `bad`: their places in the batch."""
    where = f"embeddings of {', '.join(step.ids[i] for i in bad)} are not finite"
    if len(bad) in (0, len(step.ids)):
        where = "all embeddings are finite, the loss is not" if not bad else "not one embedding is"
    do = "Nothing was updated. Lower the learning rate, or look at these scans"
    return f"the loss at step {step.number} is not finite: {where}. {do}"


def open_exchange(run: RunConfig, n: int, sizes: Sequence[int] | None = None) -> Exchange:
    """How the embeddings of n subjects meet, as the run says; `sizes`: of each rank, where scans were skipped."""
    wire = torch.float16 if run.engine.wire == "fp16" else None
    return EXCHANGES[run.engine.exchange](n, wire, sizes)
