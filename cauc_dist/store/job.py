"""Which parts of an ingest are left, done in processes and told to the journal, and what they add up to."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput
from cauc_dist.store import layout
from cauc_dist.store.parallel import run
from cauc_dist.store.parts import Part, Shard, Survey, Told, do
from cauc_dist.store.planned import Plan, refuse_nothing
from cauc_dist.store.shards import Form
from cauc_dist.store.sources import Refused
from cauc_dist.store.workplace import Workplace
from cauc_dist.world import cores

Progress = Callable[[str, int, int], None]
"""(what, scans done, of how many), in the calling thread."""

P = TypeVar("P", bound=Part)

SURVEYED = 32  # scans a part of the survey
WORTH_A_WORKER = 256 * 2**20  # bytes of voxels: a process takes about two seconds to start


@dataclass(frozen=True)
class Ended:
    """The journal of all shards, put together: N rows in the order of the plan."""

    rows: dict[str, NDArray[Any]]
    """Row arrays by their path in the store."""
    errors: NDArray[np.float64]
    """(N, 3): max_abs, max_of_range, psnr_db."""
    set_aside: tuple[Refused, ...]


def ended(plan: Plan, told: Sequence[Told], known: Mapping[bytes, str] | None = None) -> Ended:
    """The records of all shards, joined; scans whose voxels another one has are set aside here, where all are known."""
    joined = {name: np.concatenate([part[name] for part in told]) for name in told[0] if name != "size"}
    reasons, valid, seen = joined["reasons"].tolist(), joined["valid"], dict[bytes, str]()
    for i, item in enumerate(plan.items):
        if reasons[i] or item.index is not None:  # rows of one file are what they are
            continue
        first = seen.setdefault(joined["contents"][i].tobytes(), item.id)
        if first == item.id:
            first = (known or {}).get(joined["checksums"][i].tobytes(), item.id)
        if first != item.id:
            reasons[i], valid[i] = f"the same voxels as {first}", layout.SET_ASIDE
    bad = [(item.id, reason) for item, reason in zip(plan.items, reasons, strict=True) if reason]
    refuse_nothing(len(reasons) - len(bad), [*plan.set_aside, *bad])
    rows = {
        "ids": layout.encode_text([item.id for item in plan.items]),
        "subjects": layout.encode_text([item.subject for item in plan.items]),
        "valid": valid,
        "checksums": joined["checksums"],
        **{f"stats/{name}": joined["stats"][:, k] for k, name in enumerate(layout.STATS)},
    }
    return Ended(rows, joined["errors"], (*plan.set_aside, *bad))


@dataclass(frozen=True)
class Job:
    """The parts of a plan that go into shards of `array`, from shard `first` on."""

    plan: Plan
    place: Workplace
    array: Path
    workers: int | None = None
    task: tuple[int, int] = (0, 1)
    """(i, n): of every n parts this job does the i-th."""
    progress: Progress | None = None
    first: int = 0
    per: int = 0
    """Rows a shard of a store that grows; 0: from the form."""
    known: Mapping[bytes, str] = field(default_factory=dict)
    """Scans of a store that grows, by the checksum of their source."""

    def form(self, wait_minutes: float) -> Form:
        """How rows are kept: known from the plan, or after a look at every scan."""
        if self.plan.layout == "dense":
            return self.plan.form(None)
        parts = [
            Survey(name, items, self.plan.shape, self.plan.resample) for name, items in self._shared("survey", SURVEYED)
        ]
        self._do("survey", parts, lambda part: self.place.done(part.name))
        self._wait(parts, wait_minutes)
        return self.plan.form_of(np.bitwise_or.reduce([self._told(part)["union"] for part in parts]))

    def rows_a_shard(self, form: Form) -> int:
        return self.per or layout.rows_per_shard(len(self.plan.items), form.row_bytes)

    def shards(self, form: Form) -> list[Shard]:
        per = self.rows_a_shard(form)
        return [
            Shard(name, items, self.plan.shape, self.plan.resample, self.array, self.first + k, per, form)
            for k, (name, items) in enumerate(self._shared("records", per))
        ]

    def write(self, form: Form) -> None:
        """The shards of this task that are not yet done."""
        self._do("write", self.shards(form), self._whole)

    def complete(self, form: Form) -> bool:
        return all(self.place.done(shard.name) for shard in self.shards(form))

    def end(self, form: Form) -> Ended:
        """Where all shards are done: what their records add up to. BadInput where that is nothing."""
        told = [self._told(shard) for shard in self.shards(form)]
        try:
            return ended(self.plan, told, self.known)
        except BadInput:
            self.place.remove()  # nothing to go on with, and it would stand in the way of the mended files
            raise

    def _shared(self, kind: str, size: int) -> Iterator[tuple[str, Any]]:
        items = self.plan.items
        return ((f"{kind}/{k}.npz", items[start : start + size]) for k, start in enumerate(range(0, len(items), size)))

    def _do(self, what: str, parts: Sequence[P], is_done: Callable[[P], bool]) -> None:
        i, n = self.task
        mine = parts[i::n]
        left = [part for part in mine if not is_done(part)]
        total = sum(len(part.items) for part in mine)
        done = total - sum(len(part.items) for part in left)
        for name, scans, told in run(do, left, workers_for(self.plan, self.workers)):
            self.place.put(name, told)
            done += scans
            if self.progress:
                self.progress(what, done, total)

    def _whole(self, shard: Shard) -> bool:
        """Its record is there, and so is the file it tells of."""
        told = self.place.get(shard.name)
        return told is not None and shard.path.exists() and shard.path.stat().st_size == int(told["size"])

    def _told(self, part: Part) -> Told:
        told = self.place.get(part.name)
        assert told is not None, part.name
        return told

    def _wait(self, parts: Sequence[Part], minutes: float) -> None:
        """Until the other tasks have done their parts of the survey: the mask is that of all scans."""
        until = time.monotonic() + 60 * minutes
        while missing := [part for part in parts if not self.place.done(part.name)]:
            if time.monotonic() > until:
                found = f"{len(missing)} of {len(parts)} parts of the survey are not done"
                do_ = "Start the other tasks, then this one again; what is done is kept"
                raise BadInput(found, wanted=f"all of them within {minutes:g} minutes", do=do_)
            time.sleep(0.5)


def workers_for(plan: Plan, asked: int | None) -> int:
    """Processes: what was asked for, or the cores, fewer where there is too little to do."""
    voxels = len(plan.items) * math.prod(plan.shape) * 4
    return asked or max(1, min(cores(), voxels // WORTH_A_WORKER))
