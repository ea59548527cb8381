"""Is a store what ingest wrote? Every row is read, its values held against its statistics, and all faults are told.

Where it is not, the rest is still read: one run names everything.
Shapes: N usable scans of n rows, c channels, V stored values a channel.
"""

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput
from cauc_dist.store import layout
from cauc_dist.store.chunks import rows_a_file, shard_name, whole
from cauc_dist.store.files import Files, is_remote, open_files
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import AGAIN, ROW_ARRAYS, Damaged, Store
from cauc_dist.store.sources import Cohort, Item, checksum, open_cohort, some

SHOWN = 40  # faults that `print(verdict)` lists before it counts
SLACK = 1e-9  # of the largest |value|: sums in another order

Fault = tuple[str, str]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Verdict:
    """Of n scans read: `faults` (scan or file, what is wrong with it), and `notes` worth knowing; `print` it."""

    where: str
    n: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.faults:
            sound = f"{self.where}: sound. {self.n} scans read: their bytes and values are those that were written"
            return "\n".join([sound, *self.notes])
        lines = [f"{self.where}: {len(self.faults)} faults, {self.n} scans read"]
        lines += [f"  {name}: {what}" for name, what in self.faults[:SHOWN]]
        if len(self.faults) > SHOWN:
            lines.append(f"  and {len(self.faults) - SHOWN} more")
        return "\n".join([*lines, *self.notes, f"{AGAIN}."])


def check(
    where: str,
    *,
    sources: Path | None = None,
    table: Path | None = None,
    features: Path | None = None,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Read all of the store at `where`, folder or URL, and with `sources` the files that it was ingested from.

    `table`, `features`: as they were given to ingest.
    Damage is a fault in the Verdict; what is not a store at all, and a network that fails, are errors as for any
    command. Memory: one row in float64 a thread.
    """
    if threads < 1:
        raise BadInput(f"threads {threads}", wanted="1 or more", do="Leave it out")
    files = open_files(where.rstrip("/"))
    try:
        store = Store.open(where)
    except Damaged as error:
        return Verdict(where, 0, _arrays(files, error), ("the volumes were not read: mend these, then verify again",))
    cohort = None
    if sources is not None:
        suffix = store.attributes["settings"]["suffix"]
        cohort = open_cohort(sources, suffix=suffix, table=table, features=features)
    steps = itertools.count(1)
    total = len(store) + (len(cohort.items) if cohort else 0)

    def told(results: Iterable[R]) -> Iterator[R]:
        for result in results:
            if progress is not None:
                progress(next(steps), total)
            yield result

    rows = told(_each(partial(_row, store), range(len(store)), threads))
    faults, notes = [*_small(store, files), *_rows(store, files, rows)], list[str]()
    if cohort is not None:
        tables = any(item.index is not None for item in cohort.items)  # read into a cache that is not for threads
        changed, notes = _against(store, cohort, told(_each(_digest, cohort.items, 1 if tables else threads)))
        faults += changed
    return Verdict(where, len(store), tuple(faults), tuple(notes))


def _arrays(files: Files, error: Damaged) -> tuple[Fault, ...]:
    """Which of the arrays that opening reads are broken; where none is by itself, what `Store.open` said."""
    attributes, faults = json.loads(files.read("zarr.json"))["attributes"], []
    columns = [Column(name, "number").array for name in attributes.get("columns", ())]
    sizes = dict.fromkeys([*ROW_ARRAYS, *columns], attributes.get("n", 0))
    for name, n in [*sizes.items(), *([("mask", attributes["shape"][0])] if attributes["layout"] == "packed" else ())]:
        try:
            whole(files, name, n)
        except FileNotFoundError:
            faults.append((name, "a file of it is not there"))
        except (ValueError, KeyError, TypeError, RuntimeError) as fault:
            faults.append((name, str(fault)))
    return tuple(faults) or ((files.where, error.found),)


def _small(store: Store, files: Files) -> Iterator[Fault]:
    """What can be wrong with small files and arrays whose bytes are sound."""
    for name in ("meta/zarr.json", "stats/zarr.json", "participants.tsv"):
        try:
            text = files.read(name).decode()
        except FileNotFoundError:
            yield name, "is not there"
            continue
        if name == "participants.tsv" and [line.split("\t")[0] for line in text.split("\n")[1:-1]] != list(store.ids):
            yield name, "does not list the store's scans in their order"
    for scan, times in Counter(store.ids).items():
        if times > 1:
            yield scan, f"is there {times} times"
    for column, codes in zip(store.columns, store.metadata([c.name for c in store.columns]).T, strict=True):
        known = np.isnan(codes) | np.isin(codes, np.arange(len(column.levels)))
        if column.kind == "category" and not known.all():
            yield column.array, f"has codes without a level ({some([store.ids[i] for i in np.flatnonzero(~known)])})"


def _rows(store: Store, files: Files, results: Iterable[tuple[str, bool] | None]) -> Iterator[Fault]:
    """Faults of rows in their order; what befalls a shard is said once for all its scans."""
    at = np.flatnonzero(whole(files, "valid", int(store.attributes["n"]))[0] == layout.OK)
    per = rows_a_file(files, "volumes")
    kept: dict[tuple[str, str], list[str]] = defaultdict(list)
    for i, found in enumerate(results):
        if found is not None:
            what, shared = found
            shard = shard_name("volumes", int(at[i]) // per, 1 + len(store.row_shape))
            kept[shard if shared else store.ids[i], what].append(store.ids[i])
    for (name, what), scans in kept.items():
        many = f"{len(scans)} scans" if len(scans) > 1 else "scan"
        yield name, what if name in scans else f"{what} ({many} {some(scans)})"


def _row(store: Store, i: int) -> tuple[str, bool] | None:
    """What is wrong with row i, and whether that may be so for all of its shard."""
    row = np.empty(store.row_shape, store.dtype)
    try:
        store.read_into(i, row)
    except Damaged as error:
        cause = error.__cause__
        return ("is not there", True) if isinstance(cause, FileNotFoundError) else (str(cause), "shard" in str(cause))
    except OSError as error:
        if is_remote(store.where):
            raise
        return f"cannot be read ({error.strerror})", True
    if bad := np.count_nonzero(~np.isfinite(row) if store.dtype.kind == "f" else row == layout.empty(store.dtype)):
        return f"{bad} stored values are no numbers", False
    return None if (odd := _odd(store, i, row)) is None else (odd, False)


def _odd(store: Store, i: int, row: NDArray[Any]) -> str | None:
    """Where the stored values have other statistics than their source had, beyond the precision that they have."""
    scale, offset = store.stats["scale"][i], store.stats["offset"][i]
    if store.mask is None:
        found = _summary(row.reshape(len(scale), -1) * scale[:, None] + offset[:, None], 0)
    else:
        masks = store.mask.reshape(len(scale), -1)
        parts = np.split(row, np.cumsum(masks.sum(1))[:-1])
        each = zip(parts, masks, scale, offset, strict=True)
        found = np.concatenate([_summary(p[None] * s + o, int((~mask).sum())) for p, mask, s, o in each], axis=1)
    peak = np.fmax(np.abs(store.stats["min"][i]), np.abs(store.stats["max"][i]))
    # Rounding: f32's is relative; f16 has steps of 1 up to its largest stored value, 2048, and i16 everywhere.
    bound = peak * SLACK + (peak * 2.0**-24 if store.dtype == np.float32 else scale / 2)
    for name, values in zip(("mean", "std", "min", "max"), found, strict=True):
        told = store.stats[name][i]
        for c in np.flatnonzero(~(np.abs(values - told) <= bound)):  # so written that NaN is a fault
            return f"{name} of channel {c} is {values[c]:.6g}, its source's was {told[c]:.6g}: not this scan's values"
    return None


def _summary(values: NDArray[np.float64], zeros: int) -> NDArray[np.float64]:
    """(4, c): mean, std, min, max of values (c, V) and as many zeros more in each channel."""
    n = values.shape[1] + zeros
    mean = values.sum(1) / n
    std = np.sqrt((np.square(values - mean[:, None]).sum(1) + zeros * mean**2) / n)
    beside = 0.0 if zeros else math.nan  # fmin and fmax pass NaN over
    low = np.fmin(values.min(1, initial=math.inf), beside)
    high = np.fmax(values.max(1, initial=-math.inf), beside)
    return np.stack([mean, std, low, high])


def _against(store: Store, cohort: Cohort, digests: Iterable[bytes | str]) -> tuple[list[Fault], list[str]]:
    """Scans whose source files are not those that were ingested, or are gone; notes: what is not in the store."""
    gone = dict(zip(store.ids, store.checksums, strict=True))
    known, refused = {*gone, *(name for name, _ in store.set_aside)}, dict(cohort.set_aside)
    faults, new = [], [item.id for item in cohort.items if item.id not in known]
    for item, digest in zip(cohort.items, digests, strict=True):
        told = gone.pop(item.id, None)
        if told is not None and isinstance(digest, str):
            faults.append((item.id, digest))
        elif told is not None and digest != told.tobytes():
            faults.append((item.id, "its source has changed since it was ingested"))
    notes = [f"{len(new)} scans of the source are not in the store: {some(new)}"] if new else []
    if gone and len(store.attributes["sources"]) > 1:  # which scan came from which source is not recorded
        return faults, [*notes, f"{len(gone)} scans are not of this source: {some(list(gone))}"]
    return [*faults, *((scan, f"cannot be had from the source: {refused.get(scan, 'gone')}") for scan in gone)], notes


def _digest(item: Item) -> bytes | str:
    try:
        return checksum(item)
    except OSError as error:
        return f"its source cannot be read ({error.strerror})"


def _each(function: Callable[[T], R], units: Sequence[T], threads: int) -> Iterator[R]:
    """Results in order; an error or Ctrl-C does not wait for those that have not begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, units)
    finally:
        pool.shutdown(cancel_futures=True)
