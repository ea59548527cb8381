"""From a plan to batches: threads read ahead of the step, and what they read does not depend on them.

b scans of this rank, row_shape a scan as stored, (c, *spatial) a volume. Memory: a ring of prefetch + 1 batches, made
once; with CUDA of rows as stored, in pinned memory, which are expanded on the GPU. Images and table rows of a store
that is small stay in memory as they come: a batch of them is then one copy.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cauc_dist.errors import BadInput
from cauc_dist.store.reader import Damaged
from cauc_dist.stream.plan import Plan, Rows, per_rank, shares
from cauc_dist.stream.values import Expand, Normalise, Values, Volumes, values

OnDamage = Literal["raise", "skip"]
RUN = 256 * 1024
"""Bytes of rows that a thread reads at a time: handing it each image or row of a table would cost more than reading."""
SMALL_ROW, SMALL_STORE = 64 * 1024, 1 << 30
"""Bytes up to which the rows of a store are kept once they were read."""


class Batch(NamedTuple):
    """One rank's part of a step. Read it only; its memory is used again when the next batch is asked for."""

    step: int
    rows: Rows
    """(b,) rows of the store."""
    volumes: Tensor
    """(b, c, *spatial) float32, normalised; (b, *row_shape) as stored where expansion is off."""
    sound: NDArray[np.bool_]
    """(b,) False: the scan is damaged and skipped; finite numbers stand in for it."""
    damaged: tuple[str, ...]
    """What is wrong with those, one line each."""
    wait: float
    """Seconds the consumer waited for it."""


@dataclass
class _Slot:
    """One batch's worth of the ring."""

    memory: Tensor
    backgrounds: NDArray[np.float64]
    """(b, c) what lies outside the mask in each volume, from the scan before; NaN: nothing yet."""
    uploaded: Any = None
    """CUDA event after which the memory may be written again."""


@dataclass
class _Reading:
    step: int
    rows: Rows
    slot: _Slot
    runs: list[Future[list[Exception | None]]]
    """What went wrong with each of its rows, in order."""


class ReadAhead:
    """Batches of the rows in `jobs` ((step, rows) in order), read by `threads`, `prefetch` batches ahead.

    While the consumer works on a batch, at most `prefetch` later ones are read or waiting: that is the back-pressure.
    An error of a reader comes out at the step it belongs to, and names the scan; on_damage "skip" hands a damaged scan
    on as not `sound`. Leaving the `with` block, at any point, cancels what has not begun and waits for what has.
    """

    def __init__(
        self,
        store: Volumes,
        jobs: Iterable[tuple[int, Rows]],
        size: int,
        *,
        values: Values,
        threads: int,
        prefetch: int,
        expand: bool = True,
        on_damage: OnDamage = "raise",
        device: torch.device | None = None,
    ) -> None:
        for name, number in (("threads", threads), ("prefetch", prefetch)):
            if number < 1:
                raise BadInput(f"{name} {number}", wanted="at least 1", do=f"Set {name} to 1 or more")
        if on_damage not in ("raise", "skip"):
            raise BadInput(f"on_damage {on_damage!r}", wanted="raise or skip", do="Use one of the two")
        self._store, self._jobs, self._size, self._on_damage = store, iter(jobs), size, on_damage
        row_bytes = max(1, int(np.prod(store.row_shape)) * store.dtype.itemsize)
        self._run = max(1, min(-(-size // threads), RUN // row_bytes))
        n = len(store.ids) if row_bytes <= SMALL_ROW and row_bytes * len(store.ids) <= SMALL_STORE else 0
        # Of pages that nobody has written to yet, none takes memory.
        self._kept = np.empty((n, *store.row_shape), store.dtype) if n else None
        self._has = np.zeros(n, bool)
        self._device = device or torch.device("cpu")
        self._on_gpu = self._device.type == "cuda"
        self._expand = Expand(store, values, self._device)
        self._as_stored = self._on_gpu or not expand
        self._upload = self._on_gpu and expand
        self._ahead: deque[_Reading] = deque()
        self._free: list[_Slot] = []
        self._used: _Slot | None = None
        self._prefetch = prefetch
        self._scratch = threading.local()
        self._pool = readers(threads)

    def __enter__(self) -> Self:
        self._fill(self._prefetch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._used is not None:
            self._free.append(self._used)
            self._used = None
        self._fill(self._prefetch + 1)  # the one handed out now, and those read while it is used
        if not self._ahead:
            self.close()
            raise StopIteration
        reading = self._ahead.popleft()
        started = time.perf_counter()
        sound, damaged = np.ones(len(reading.rows), bool), []
        errors = [error for run in reading.runs for error in run.result()]
        for j, error in enumerate(errors):
            if error is None:
                continue
            if self._on_damage == "skip" and isinstance(error, Damaged):
                sound[j] = False
                # It still goes through the encoder, and 0 times NaN is NaN in a gradient.
                reading.slot.memory[j].zero_()
                reading.slot.backgrounds[j] = np.nan
                damaged.append(error.found)
                continue
            self.close()
            raise _named(error, self._store.ids[reading.rows[j]], reading.step) from error
        wait = time.perf_counter() - started
        self._used = reading.slot
        out = self._out(reading)
        return Batch(reading.step, reading.rows, out, sound, tuple(damaged), wait)

    def close(self) -> None:
        """No thread touches the store after this; calling it twice is harmless."""
        self._jobs = iter(())
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _out(self, reading: _Reading) -> Tensor:
        memory = reading.slot.memory[: len(reading.rows)]
        if not self._upload:
            return memory
        raw = memory.to(self._device, non_blocking=True)
        reading.slot.uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
        reading.slot.uploaded.record()
        return self._expand.batch(raw, reading.rows)

    def _fill(self, wanted: int) -> None:
        while len(self._ahead) < wanted and (job := next(self._jobs, None)):
            step, rows = job
            slot = self._free.pop() if self._free else self._new_slot()
            if slot.uploaded is not None:
                slot.uploaded.synchronize()
            starts = range(0, len(rows), self._run)
            runs = [self._pool.submit(self._read, rows[j : j + self._run], j, slot) for j in starts]
            self._ahead.append(_Reading(step, rows, slot, runs))

    def _new_slot(self) -> _Slot:
        shape = self._store.row_shape if self._as_stored else self._store.shape
        kind = torch.from_numpy(np.empty(0, self._store.dtype)).dtype if self._as_stored else torch.float32
        memory = torch.empty((self._size, *shape), dtype=kind, pin_memory=self._on_gpu)
        return _Slot(memory, np.full((self._size, self._store.shape[0]), np.nan))

    def _read(self, rows: Rows, start: int, slot: _Slot) -> list[Exception | None]:
        """Rows into the places from `start` on; an error belongs to its row, and the others are read all the same."""
        if self._kept is not None and self._as_stored and self._has[rows].all():
            np.take(self._kept, rows, axis=0, out=slot.memory[start : start + len(rows)].numpy(), mode="clip")
            return [None] * len(rows)
        read = self._read_stored if self._as_stored else self._read_expanded
        errors: list[Exception | None] = []
        for j, row in enumerate(rows.tolist(), start):
            try:
                read(row, j, slot)
                errors.append(None)
            except Exception as error:  # it comes out at the step that it belongs to
                errors.append(error)
        return errors

    def _read_stored(self, row: int, j: int, slot: _Slot) -> None:
        out = slot.memory[j].numpy()
        raw = self._stored(row, out)
        if raw is not out:
            out[...] = raw

    def _stored(self, row: int, out: NDArray[Any]) -> NDArray[Any]:
        """A row as stored: read into `out`, or where it is kept."""
        if self._kept is None:
            self._store.read_into(row, out)
            return out
        if not self._has[row]:
            self._store.read_into(row, self._kept[row])
            self._has[row] = True  # two threads may both have read it, which harms nobody
        return self._kept[row]  # type: ignore[no-any-return]

    def _read_expanded(self, row: int, j: int, slot: _Slot) -> None:
        raw, values = self._buffers()
        raw = self._stored(row, raw)
        out = slot.memory[j]
        if self._store.mask is not None:
            background = self._expand.values.background[row]
            if not np.array_equal(slot.backgrounds[j], background):
                self._expand.background(row, out.numpy())
                slot.backgrounds[j] = background
        self._expand.row(raw, row, out, values)

    def _buffers(self) -> tuple[NDArray[Any], Tensor]:
        """A thread's own memory for one row as stored, and for its values where they are scattered."""
        kept: tuple[NDArray[Any], Tensor] | None = getattr(self._scratch, "kept", None)
        if kept is None:
            packed = 0 if self._store.mask is None else self._store.row_shape[0]
            kept = np.empty(self._store.row_shape, self._store.dtype), torch.empty(packed)
            self._scratch.kept = kept
        return kept


class Loader(ReadAhead):
    """The batches of steps start..stop-1 of a plan, for one rank; resuming is a matter of `start`.

    `dataset` normalises by the scans of the plan. Expanded batches are on `device`; to CUDA they cross as stored (a
    packed volume is 6.5 times smaller than its float32). With `chunks` above 1 a step's scans come in so many parts,
    and then once more: for an encoder that works in two passes.
    """

    def __init__(
        self,
        store: Volumes,
        plan: Plan,
        *,
        rank: int,
        world_size: int,
        start: int,
        stop: int,
        chunks: int = 1,
        normalise: Normalise = "volume",
        threads: int = 2,
        prefetch: int = 2,
        expand: bool = True,
        on_damage: OnDamage = "raise",
        device: torch.device | None = None,
    ) -> None:
        b = per_rank(plan.batch_size, world_size)[rank]  # refuse here, not in the first step
        sizes = shares(b, chunks)
        super().__init__(
            store,
            (
                (step, rows)
                for step in range(start, stop)
                for _ in range(1 if chunks == 1 else 2)
                for rows in np.split(plan.rank_batch(step, rank, world_size), np.cumsum(sizes)[:-1])
            ),
            sizes[0],
            values=values(store, normalise, plan.rows),
            threads=threads,
            prefetch=prefetch,
            expand=expand,
            on_damage=on_damage,
            device=device,
        )


def chunks(store: Volumes, rows: ArrayLike, size: int, values: Values, *, threads: int = 2) -> Iterator[Tensor]:
    """(<= size, c, *spatial) float32, over `rows` in order; the last one may be shorter. They are the caller's."""
    rows = np.asarray(rows, np.int64)
    jobs = ((k, rows[k : k + size]) for k in range(0, len(rows), size))
    with ReadAhead(store, jobs, min(size, len(rows)), values=values, threads=threads, prefetch=1) as ahead:
        for batch in ahead:
            yield batch.volumes.clone()


def read_all(store: Volumes, rows: ArrayLike, values: Values, *, threads: int = 2) -> Tensor:
    """(len(rows), c, *spatial) float32, all in memory: for probes on small stores."""
    rows = np.asarray(rows, np.int64)
    with ReadAhead(store, [(0, rows)], len(rows), values=values, threads=threads, prefetch=1) as ahead:
        return next(ahead).volumes


def readers(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch starts no threads of its own: 16 ms a volume of 121x145x121 instead of 1 on 2 cores.

    torch keeps the number in the thread that sets it, and as the value that threads begun later start from; so it is
    set in each of ours, and then again here.
    """
    ours, ready = torch.get_num_threads(), threading.Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # pins it: torch sets a thread up when it first asks
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader", initializer=begin)
    for _ in range(threads):
        pool.submit(int)  # a thread starts with its first task
    ready.wait()
    torch.set_num_threads(ours)
    return pool


def _named(error: Exception, scan: str, step: int) -> Exception:
    """The same error with the scan and the step in its words; what is the user's to mend stays BadInput."""
    if isinstance(error, BadInput):
        return BadInput(f"step {step}: {error.found}", wanted=error.wanted, do=error.do)
    return RuntimeError(f"step {step}: scan {scan} could not be read: {type(error).__name__}: {error}")
