"""From a plan to batches: threads read ahead of the step, and what they read does not depend on them.

Shapes: b scans of this rank, (c, X, Y, Z) a volume; batches are float32 and, with CUDA, in pinned memory.
Memory: prefetch + 1 batches, plus the one the consumer holds.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cauc_dist.errors import BadInput
from cauc_dist.stream.plan import Plan, Rows, per_rank

Normalise = Literal["volume", "none"]

# ATen runs an elementwise operation of up to this many elements in the calling thread. More, and each of our
# threads would start an OpenMP team of its own: 16 ms a volume of 121x145x121 instead of 1 on 2 cores.
GRAIN = 32768


class Volumes(Protocol):
    """What is read from: a store.reader.Store, or anything like it."""

    @property
    def ids(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def stats(self) -> Mapping[str, NDArray[np.float64]]: ...
    def stored(self, i: int) -> NDArray[Any]: ...
    def affine(self, i: int) -> tuple[float, float]: ...


class Batch(NamedTuple):
    step: int
    rows: Rows
    """(b,) rows of the store, this rank's."""
    volumes: Tensor
    """(b, c, X, Y, Z) float32."""
    wait: float
    """Seconds the consumer waited for it."""


class _Reading(NamedTuple):
    step: int
    rows: Rows
    out: Tensor
    scans: list[Future[None]]


class ReadAhead:
    """Batches of the rows in `jobs` ((step, rows) in order), read by `threads`, `prefetch` batches ahead.

    While the consumer works on a batch, at most `prefetch` later ones are read or waiting: that is the
    back-pressure. An error of a reader comes out at the step it belongs to, and names the scan. Leaving the
    `with` block, at any point, cancels what has not begun and waits for what has.
    """

    def __init__(
        self, store: Volumes, jobs: Iterable[tuple[int, Rows]], *, normalise: Normalise, threads: int, prefetch: int
    ) -> None:
        for name, number in (("threads", threads), ("prefetch", prefetch)):
            if number < 1:
                raise BadInput(f"{name} {number}", wanted="at least 1", do=f"Set {name} to 1 or more")
        if normalise not in ("volume", "none"):
            raise BadInput(f"normalise {normalise!r}", wanted="volume or none", do="Use one of the two")
        self._store, self._jobs, self._normalise = store, iter(jobs), normalise
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead: deque[_Reading] = deque()
        self._prefetch = prefetch

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
        self._fill(self._prefetch + 1)  # the one handed out now, and those read while it is used
        if not self._ahead:
            self.close()
            raise StopIteration
        reading = self._ahead.popleft()
        started = time.perf_counter()
        for row, scan in zip(reading.rows, reading.scans, strict=True):
            try:
                scan.result()
            except Exception as error:
                self.close()
                raise _named(error, self._store.ids[row], reading.step) from error
        return Batch(reading.step, reading.rows, reading.out, time.perf_counter() - started)

    def close(self) -> None:
        """No thread touches the store after this; calling it twice is harmless."""
        self._jobs = iter(())
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, wanted: int) -> None:
        while len(self._ahead) < wanted and (job := next(self._jobs, None)):
            step, rows = job
            out = _empty(len(rows), self._store.shape)
            scans = [
                self._pool.submit(read_into, self._store, int(row), out[j], self._normalise)
                for j, row in enumerate(rows)
            ]
            self._ahead.append(_Reading(step, rows, out, scans))


class Loader(ReadAhead):
    """The batches of steps start..stop-1 of a plan, for one rank; resuming is a matter of `start`."""

    def __init__(
        self,
        store: Volumes,
        plan: Plan,
        *,
        rank: int,
        world_size: int,
        start: int,
        stop: int,
        normalise: Normalise = "volume",
        threads: int = 2,
        prefetch: int = 2,
    ) -> None:
        per_rank(plan.batch_size, world_size)  # refuse here, not in the first step
        jobs = ((step, plan.rank_batch(step, rank, world_size)) for step in range(start, stop))
        super().__init__(store, jobs, normalise=normalise, threads=threads, prefetch=prefetch)


def chunks(
    store: Volumes, rows: ArrayLike, size: int, *, normalise: Normalise = "volume", threads: int = 2, prefetch: int = 1
) -> Iterator[Tensor]:
    """(<= size, c, X, Y, Z) float32, over `rows` in order; the last one may be shorter."""
    rows = np.asarray(rows, np.int64)
    jobs = ((k, rows[k : k + size]) for k in range(0, len(rows), size))
    with ReadAhead(store, jobs, normalise=normalise, threads=threads, prefetch=prefetch) as ahead:
        for batch in ahead:
            yield batch.volumes


def read_all(store: Volumes, rows: ArrayLike, normalise: Normalise = "volume", threads: int = 2) -> Tensor:
    """(len(rows), c, X, Y, Z) float32, all in memory: for probes on small stores."""
    rows = np.asarray(rows, np.int64)
    with ReadAhead(store, [(0, rows)], normalise=normalise, threads=threads, prefetch=1) as ahead:
        return next(ahead).volumes


def read_into(store: Volumes, row: int, out: Tensor, normalise: Normalise) -> None:
    """Read volume `row` into out (c, X, Y, Z) float32: the source's values, or those minus mean over std.

    One affine map of the stored values, its two numbers computed in float64:
    (stored * scale + offset - mean) / std = stored * a + b.
    """
    a, b = store.affine(row)
    if normalise == "volume":
        mean, std = store.stats["mean"][row], store.stats["std"][row]
        a, b = float(a / std), float((b - mean) / std)
    # torch casts f16 to f32 several times faster than numpy.
    stored, flat = torch.from_numpy(store.stored(row)).reshape(-1), out.view(-1)
    for k in range(0, len(flat), GRAIN):
        flat[k : k + GRAIN].copy_(stored[k : k + GRAIN]).mul_(a).add_(b)


def _empty(b: int, shape: tuple[int, ...]) -> Tensor:
    return torch.empty((b, *shape), dtype=torch.float32, pin_memory=torch.cuda.is_available())


def _named(error: Exception, scan: str, step: int) -> Exception:
    """The same error with the scan and the step in its words; what is the user's to mend stays BadInput."""
    if isinstance(error, BadInput):
        return BadInput(f"step {step}: {error.found}", wanted=error.wanted, do=error.do)
    return RuntimeError(f"step {step}: scan {scan} could not be read: {type(error).__name__}: {error}")
