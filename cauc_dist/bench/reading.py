"""How many scans a second a store gives on this machine, beside what its disk and its memory could give at most.

Scans are read in random order in batches, as a training reads them: by reader threads, expanded to float32 and
normalised. `cold`: after the system was asked to forget the store's files. Rates are medians over rounds in which the
ways take turns, so that a busy machine slows all of them.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cauc_dist.bench import peers, rates
from cauc_dist.bench.record import keep
from cauc_dist.errors import BadInput
from cauc_dist.store.files import is_remote
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import Loader
from cauc_dist.stream.plan import Plan
from cauc_dist.world import cores

Say = Callable[[str], None]
BATCH = 8
LEAD = 3
"""Batches before the clock: what is read ahead of it is used up."""
MOST = 512 * 2**20
"""Bytes of files that are read to know the disk's rate."""


@dataclass(frozen=True)
class Reading:
    """Scans a second by way, and what they are to be held against."""

    store: str
    scans: int
    shape: tuple[int, ...]
    layout: str
    stored_bytes: int | None
    """Of a scan, on the disk; None of a store by URL."""
    threads: int
    """Readers, where a way does not say."""
    memcpy: float
    """float32 scans copied in memory by as many threads: nothing that hands out float32 is faster."""
    disk: float | None
    """Scans whose bytes the disk gives, read cold and in order, not decoded."""
    rounds: dict[str, list[float]] = field(default_factory=dict)
    """By way: scans a second of each round."""

    def rate(self, way: str) -> float:
        return median(self.rounds[way])

    @property
    def cold(self) -> float | None:
        return self.rate("cold") if "cold" in self.rounds else None


def data(store: str | None, made: bool, *, threads: int = 2, quick: bool, out: Path | None, say: Say) -> int:
    """`cauc bench data STORE`, or `--made`: our stream beside other libraries on made scans. The exit code."""
    if (store is None) != made:
        raise BadInput(
            "neither a store nor --made" if store is None else f"--made and the store {store}",
            wanted="one of them",
            do="give your own store, or --made for made scans beside other libraries",
        )
    if store is None:
        return peers.data(quick, out, say)
    read(store, threads=threads, quick=quick, out=out, say=say)
    return 0


def read(where: str, *, threads: int = 2, quick: bool, out: Path | None, say: Say) -> Reading:
    """Measure a store's stream and say its rates; the last line says what limits it."""
    found = measured(Store.open(where), threads, rounds=3 if quick else 7, seconds=0.4 if quick else 2.0, say=say)
    for line in table(found):
        say(line)
    verdict = limits(found)
    say(verdict)
    keep(found, verdict, out)
    return found


def measured(store: Store, threads: int, *, rounds: int, seconds: float, say: Say) -> Reading:
    """Every way, in turn, so many rounds of at least so many seconds each."""
    if threads < 1:
        raise BadInput(f"--threads {threads}", wanted="1 or more", do="leave it out for 2")
    if len(store) < 2:
        raise BadInput(f"{len(store)} scan in {store.where}", wanted="two at least", do="ingest more")
    size = 4 * math.prod(store.shape)
    files = [] if is_remote(store.where) else _volume_files(Path(store.where))
    stored = sum(file.stat().st_size for file in files) // len(store) if files else None
    ways = _ways(store, threads, files)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for k in range(rounds):
        for name, way in ways.items():
            found[name].append(way(k, seconds))
        say(f"round {k + 1} of {rounds} is done")
    speed = median(rates.disk(_some(files, k), threads, MOST) for k in range(rounds)) if files else None
    return Reading(
        store=store.where,
        scans=len(store),
        shape=store.shape,
        layout=store.layout,
        stored_bytes=stored,
        threads=threads,
        memcpy=rates.copies(threads, size, seconds),
        disk=speed / stored if speed and stored else None,
        rounds=found,
    )


Way = Callable[[int, float], float]
"""(round, seconds) -> scans a second."""


def _ways(store: Store, threads: int, files: Sequence[Path]) -> dict[str, Way]:
    counts = sorted({1, threads, *(n for n in (2, 4, 8) if n <= cores())})
    ways: dict[str, Way] = {_name(n): _stream(store, n) for n in counts}
    ways["as stored"] = _stream(store, threads, expand=False)
    if files:
        ways["cold"] = _stream(store, threads, forget=files)
    return ways


def _name(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _stream(store: Store, threads: int, *, expand: bool = True, forget: Sequence[Path] = ()) -> Way:
    rows = np.arange(len(store))

    def rate(k: int, seconds: float) -> float:
        batch = min(BATCH, len(store))
        plan = Plan(rows, store.subjects, batch, seed=k)
        span: dict[str, Any] = {"rank": 0, "world_size": 1, "start": 0, "stop": 10**9}
        rates.forget(forget)
        with Loader(store, plan, threads=threads, expand=expand, **span) as batches:
            # A store that is small is cold for one pass only.
            return _counted((len(b.rows) for b in batches), seconds, len(store) // batch if forget else 10**9)

    return rate


def _counted(sizes: Iterator[int], seconds: float, most: int) -> float:
    """Scans a second of batches, for so many seconds, at most so many batches."""
    lead = min(LEAD, most - 1)
    for _ in range(lead):
        next(sizes)
    began, scans = time.perf_counter(), 0
    for k, size in enumerate(sizes, start=lead + 1):
        scans += size
        if time.perf_counter() - began >= seconds or k >= most:
            break
    return scans / (time.perf_counter() - began)


def _volume_files(store: Path) -> list[Path]:
    """The files that hold scans, in order."""
    return sorted(file for file in (store / "volumes").rglob("*") if file.is_file() and file.name != "zarr.json")


def _some(files: Sequence[Path], k: int) -> list[Path]:
    """All files, begun at another one each round: what a disk has read before, it may hold itself."""
    start = k * len(files) // 8
    return [*files[start:], *files[:start]]


def table(found: Reading) -> list[str]:
    """The rates, for people."""
    held = "by URL" if found.stored_bytes is None else f"{found.stored_bytes / 2**20:.2f} MiB each on the disk"
    head = f"{found.store}: {found.scans:,} scans of {'x'.join(map(str, found.shape))}, {found.layout}, {held}"
    lines = [("copied in memory, float32 (limit)", found.memcpy)]
    lines += [("bytes from the disk, cold (limit)", found.disk)] if found.disk else []
    for name in found.rounds:
        what = {"cold": "ours, cold", "as stored": "ours, left for a GPU to expand"}.get(name, f"ours, {name}")
        lines.append((what, found.rate(name)))
    return [head, *(f"  {what:<36}{rate:>12,.1f} scans/s" for what, rate in lines)]


def limits(found: Reading) -> str:
    """What limits the stream and what to change, in plain words."""
    warm, most = found.rate(_name(found.threads)), max(map(_threads_of, found.rounds))
    begin = f"What limits reading here: {found.threads} reader threads give {warm:,.0f} scans/s, "
    if found.cold is not None and found.cold < 0.7 * warm:
        return f"{begin}from cold files {found.cold:,.0f}: it is {_disk(found, warm)}"
    if warm >= 0.5 * found.memcpy:
        return begin + (
            f"memory copies {found.memcpy:,.0f}: it is this machine's memory. Faster is only what a GPU expands itself."
        )
    fastest, arrive = found.rate(_name(most)), f"{found.rate('as stored'):,.0f}"
    if most > found.threads and fastest > 1.3 * warm:
        return begin + f"{most} give {fastest:,.0f}: it is their number. Set --data.threads {most}, if cores are free."
    more = f"{most} no more than {fastest:,.0f}" if most > found.threads else f"as stored they come at {arrive}"
    packed = "" if found.layout == "packed" else "Ingest it packed, by a mask: fewer voxels are decoded. "
    return begin + (
        f"{more}: it is decoding, expanding and normalising on {cores()} cores. {packed}A GPU expands scans itself; "
        "whether a training waits for scans at all, `cauc bench step` says."
    )


def _disk(found: Reading, warm: float) -> str:
    """Its rate, or the time that each reading takes; and what to do."""
    later = "Later epochs come from memory where the store fits in it."
    if found.disk is not None and found.disk > 2 * warm:
        return (
            f"the time that a random read takes, not the disk's rate ({found.disk:,.0f}/s in order). Raise "
            f"--data.threads above {found.threads}, or copy the store to the node's own disk by --data.stage. {later}"
        )
    rate = "whose rate is not known" if found.disk is None else f"whose bytes come at {found.disk:,.0f}/s"
    do = "Copy the store to the node's own disk by --data.stage; a packed store has fewer bytes."
    return f"the disk, {rate}. {do} {later}"


def _threads_of(way: str) -> int:
    return int(way.split()[0]) if way.split()[0].isdigit() else 0
