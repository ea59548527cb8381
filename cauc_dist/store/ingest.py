"""From a source of scans to a store: a plan, parts that any process may do, one commit. Whole or not at all.

The way: cohort -> headers -> one window for all -> (survey: the voxels that any scan has) -> shards -> rows -> commit.
Work lies in a hidden sibling folder, `.NAME.partial`: plan.json, survey/ and records/ (a file for each part that is
done: the journal), store/, which becomes the store by one rename. Killed or interrupted, an ingest goes on where it was
when the same command is given again, and ends with the same bytes.

Shapes: a scan is (c, *spatial), N rows.
"""

import contextlib
import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cauc_dist import __version__
from cauc_dist.errors import BadInput
from cauc_dist.store import layout, rows, sources
from cauc_dist.store.job import Ended, Job, Progress, ended, workers_for
from cauc_dist.store.layout import Codec, Column, DType, Layout
from cauc_dist.store.parts import Shard, Survey, write_shard
from cauc_dist.store.planned import Plan, Settings, default_codec, make_plan, refuse_settings, sample
from cauc_dist.store.shards import Form, shard_path
from cauc_dist.store.sources import NAMED, Cohort, Item, Refused, Unusable, by, some
from cauc_dist.store.workplace import Workplace, disk_full

TIMED = 4  # scans that tell how long one takes


@dataclass(frozen=True)
class Error:
    """How far the stored values are from the source, over all scans; zeros and None where all are exact."""

    max_abs: float
    max_of_range: float
    """Largest |error| of a scan over the scan's own range (max - min)."""
    psnr_db: float | None
    """Lowest PSNR of a scan, peak = its range; None: every scan is exact."""
    worst: str | None
    """The scan with the lowest PSNR."""

    @staticmethod
    def of(ids: Sequence[str], errors: NDArray[np.float64]) -> "Error":
        """`errors` (N, 3): max_abs, max_of_range, psnr_db of each scan."""
        low = int(errors[:, 2].argmin())
        exact = math.isinf(errors[low, 2])
        worst = (None, None) if exact else (float(errors[low, 2]), ids[low])
        return Error(float(errors[:, 0].max()), float(errors[:, 1].max()), *worst)


@dataclass(frozen=True)
class Summary:
    """What an ingest did; `print(summary)` says it in a few lines."""

    store: Path
    n: int
    """Scans that can be used."""
    shape: tuple[int, ...]
    layout: Layout
    coverage: float
    """Part of the voxels that is kept: that of the mask, 1 where dense."""
    shapes: int
    """Different shapes found among the scans."""
    error: Error
    seconds: float
    bytes_in: int
    bytes_out: int
    set_aside: tuple[Refused, ...]
    counted: dict[str, dict[str, int]]
    """Metadata that became missing: by column, by reason."""

    def __str__(self) -> str:
        many = f" (from {self.shapes} shapes)" if self.shapes > 1 else ""
        kept = f", {self.coverage:.0%} of the voxels kept, the others 0 in all" if self.layout == "packed" else ""
        lines = [
            f"{self.n} scans of {_each(self.shape)}{many} in {self.store}: {self.layout}{kept}",
            f"{self.bytes_in / 1e6:.1f} MB read, {self.bytes_out / 1e6:.1f} MB written, {self.seconds:.1f} s",
        ]
        if self.error.psnr_db is None:
            lines.append("stored values equal the source exactly")
        else:
            share = f"{self.error.max_of_range:.2g} of the range"
            lines.append(
                f"error against the source: at most {share}, PSNR {self.error.psnr_db:.1f} dB ({self.error.worst})"
            )
        return "\n".join([*lines, *_missing(self.counted), *_aside(self.set_aside)])


@dataclass(frozen=True)
class Estimate:
    """What an ingest would do, from names, tables, headers and a few scans; `print` it."""

    source: str
    kind: str
    n: int
    subjects: int
    shape: tuple[int, ...]
    form: str
    shards: int
    bytes_out: int
    """Before compression."""
    seconds: float
    """From reading and encoding a few scans."""
    workers: int
    columns: tuple[str, ...]
    set_aside: tuple[Refused, ...]
    counted: dict[str, dict[str, int]]

    def __str__(self) -> str:
        lines = [
            f"{self.kind} {self.source}: {self.n} scans of {self.subjects} subjects",
            f"would be stored as {self.form}, {_each(self.shape)} each, in {self.shards} shards",
            f"disk: at most {self.bytes_out / 1e6:.0f} MB; time: about {self.seconds:.0f} s, workers: {self.workers}",
            f"metadata: {', '.join(self.columns) or '(none)'}",
        ]
        return "\n".join([*lines, *_missing(self.counted), *_aside(self.set_aside)])


def ingest(
    source: Path,
    store: Path,
    settings: Settings | None = None,
    *,
    table: Path | None = None,
    features: Path | None = None,
    missing: Sequence[str] = (),
    ranges: Sequence[str] = (),
    workers: int | None = None,
    task: tuple[int, int] = (0, 1),
    wait_minutes: float = 60.0,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Summary | None:
    """Make `store` from `source`; nothing is at `store` unless this returns a Summary.

    Scans are turned to RAS, and never stretched unless resampling is asked for (Settings). What cannot be used is set
    aside with a reason, the rest is kept. `table`, `features`, `missing`, `ranges`: docs/sources.md.

    `workers` processes (default: the cores, fewer for a small cohort). `task` (i, n): this call does every n-th part,
    so that a job array shares the work; the last one to finish commits, the others return None. `fresh` throws away
    what an ingest of other data or settings left behind. Memory: a few scans a worker.
    """
    began = time.perf_counter()
    settings = settings or Settings()
    refuse_settings(settings, task)
    with Workplace.open(store, task) as place, room(store):
        cohort = sources.open_cohort(
            source, suffix=settings.suffix, table=table, features=features, missing=missing, ranges=ranges
        )
        plan = Plan.of(
            place.plan(request(settings, cohort), lambda: asdict(make_plan(cohort, settings)), fresh=fresh), cohort
        )
        job = Job(plan, place, place.building / "volumes", workers=workers, task=task, progress=progress)
        form = job.form(wait_minutes)
        job.write(form)
        with place.finishing() as mine:
            if not mine or not job.complete(form):
                return None
            ended = job.end(form)
            told = _publish(place, cohort, settings, plan, form, ended, job.rows_a_shard(form))
    return summary_of(store, told, plan, ended, time.perf_counter() - began)


def from_arrays(
    store: Path,
    volumes: Iterable[NDArray[Any]],
    ids: Sequence[str],
    *,
    shape: tuple[int, ...],
    subjects: Sequence[str] | None = None,
    columns: Sequence[Column] = (),
    metadata: Sequence[NDArray[np.float64]] = (),
    mask: NDArray[np.bool_] | None = None,
    dtype: DType | None = None,
    codec: Codec | None = None,
) -> Summary:
    """Make `store` from arrays in memory, `volumes` one at a time: (c, *spatial) each, as many as `ids`.

    dtype: f16 by default, and f32 for rows of a table, which have no other.

    mask (c, *spatial) bool: packed, where every volume is 0 outside. Without: dense. As `ingest` otherwise; the
    checksum of a source that is no file is that of its row as stored.
    """
    began = time.perf_counter()
    if len(shape) == 1 and dtype not in (None, "f32"):
        raise BadInput(f"dtype {dtype} for rows of a table", wanted="f32", do="Leave the dtype out")
    dtype = dtype or ("f32" if len(shape) == 1 else "f16")
    form = Form(shape, dtype, codec or default_codec(mask, shape), mask)
    items = tuple(Item(name, subject, (), 0) for name, subject in zip(ids, subjects or ids, strict=True))
    cohort = Cohort("arrays", items, tuple(columns), tuple(metadata), (), {"kind": "arrays"})
    plan = Plan(items, tuple(range(len(items))), shape, form.layout, dtype, form.codec, None, None, 1, ())
    given = iter(volumes)
    if twice := sorted({name for name, times in Counter(ids).items() if times > 1}):
        raise BadInput(f"{len(twice)} ids twice ({some(twice)})", wanted="one scan an id", do="Give each its own")

    def take() -> tuple[NDArray[Any], bytes | None]:
        x = next(given)
        if x.shape != shape:
            raise Unusable(f"shape {by(x.shape)}, not {by(shape)}")
        return x, None

    with Workplace.open(store, (0, 1)) as place, room(store):
        place.clear()
        per = layout.rows_per_shard(len(items), form.row_bytes)
        told = []
        for k, start in enumerate(range(0, len(items), per)):
            path = shard_path(place.building / "volumes", k, form)
            told.append(write_shard(path, per, form, [take] * len(items[start : start + per])))
        result = ended(plan, told)
        attributes = _publish(place, cohort, Settings(), plan, form, result, per)
    return summary_of(store, attributes, plan, result, time.perf_counter() - began)


def _publish(
    place: Workplace, cohort: Cohort, settings: Settings, plan: Plan, form: Form, ended: Ended, per: int
) -> dict[str, Any]:
    """The shards become a store of their rows and metadata, and get its name; its attributes."""
    told = attributes_of(cohort, settings, plan, form, ended)
    rows.create(place.building, form, len(plan.items), per)
    rows.write(place.building, ended.rows, cohort.columns, [values[list(plan.at)] for values in cohort.values])
    rows.commit(place.building, told)
    place.publish()
    return told


def estimate(source: Path, settings: Settings | None = None, *, workers: int | None = None, **options: Any) -> Estimate:
    """What `ingest` would do with the same arguments; writes nothing. Reads a few scans to tell layout and time."""
    settings = settings or Settings()
    refuse_settings(settings, (0, 1))
    cohort = sources.open_cohort(source, suffix=settings.suffix, **options)
    plan = Plan.of(asdict(make_plan(cohort, settings)), cohort)
    few = sample(plan.items, TIMED)
    Survey("", few[:1], plan.shape, plan.resample).do()  # a file of many rows is unpacked once, not for each
    began = time.perf_counter()
    form = plan.form(None)
    if plan.layout != "dense":
        form = plan.form_of(Survey("", few, plan.shape, plan.resample).do()["union"])
    with tempfile.TemporaryDirectory() as folder:
        Shard("", few, plan.shape, plan.resample, Path(folder, "volumes"), 0, len(few), form).do()
    seconds = (time.perf_counter() - began) / len(few) * len(plan.items)
    many = workers_for(plan, workers)
    return Estimate(
        source=str(source),
        kind=cohort.kind,
        n=len(plan.items),
        subjects=len({item.subject for item in plan.items}),
        shape=plan.shape,
        form=f"{form.layout} {form.dtype}, codec {form.codec}",
        shards=math.ceil(len(plan.items) / layout.rows_per_shard(len(plan.items), form.row_bytes)),
        bytes_out=form.row_bytes * len(plan.items),
        seconds=seconds / many,
        workers=many,
        columns=tuple(f"{column.name} ({column.kind})" for column in cohort.columns),
        set_aside=plan.set_aside,
        counted=cohort.counted,
    )


def request(settings: Settings, cohort: Cohort) -> dict[str, Any]:
    """What must be the same for work that was begun to be gone on with: JSON's types."""
    files = {str(path): _state(path) for item in cohort.items for path in item.paths}
    columns = [[asdict(c), values.tobytes().hex()] for c, values in zip(cohort.columns, cohort.values, strict=True)]
    return {
        "settings": asdict(settings),
        "ids": [item.id for item in cohort.items],
        "files": files,
        "columns": columns,
    }


def _state(path: Path) -> list[int] | None:
    """Size and time of change; None where there is no such file: its header will say so."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


@contextlib.contextmanager
def room(store: Path) -> Iterator[None]:
    """A full disk, in words: what is done stays."""
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        free = shutil.disk_usage(store.absolute().parent).free
        do = "Free some space, then give the same command again: it goes on where it was"
        raise BadInput(f"the disk of {store} is full ({free / 1e6:.0f} MB free)", wanted="more room", do=do) from error


def attributes_of(cohort: Cohort, settings: Settings, plan: Plan, form: Form, ended: Ended) -> dict[str, Any]:
    used = ended.rows["valid"] == layout.OK
    ids = [item.id for item, ok in zip(plan.items, used, strict=True) if ok]
    kept = {"layout": form.layout, "dtype": form.dtype, "codec": form.codec}
    told = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "n": len(plan.items),
        "shape": plan.shape,
        "layout": form.layout,
        "coverage": 1.0 if form.mask is None else float(form.mask.mean()),
        "axes": layout.axes(len(plan.shape)),
        "orientation": "RAS" if len(plan.shape) == 4 else None,
        "voxel_mm": plan.voxel,
        "intensity": "as in the source",
        "columns": [column.name for column in cohort.columns],
        "sources": [{**cohort.described, "shapes": plan.shapes, "bytes": _bytes_in(plan)}],
        "cauc_dist": __version__,
        "settings": {**asdict(settings), **kept},  # the shape as asked for: None wants scans of one shape
        "error": asdict(Error.of(ids, ended.errors[used])),
        "set_aside": ended.set_aside,
        "counted": cohort.counted,
    }
    return dict(json.loads(json.dumps(told)))


def _each(shape: tuple[int, ...]) -> str:
    """80x96x80, or with several channels 2 x 80x96x80."""
    channels = "" if shape[0] == 1 else f"{shape[0]} features" if len(shape) == 1 else f"{shape[0]} x "
    return channels + by(shape[1:])


def _bytes_in(plan: Plan) -> int:
    states = [_state(path) for path in {path for item in plan.items for path in item.paths}]
    return sum(state[0] for state in states if state)


def summary_of(store: Path, told: Mapping[str, Any], plan: Plan, ended: Ended, seconds: float) -> Summary:
    """`told`: attributes of the store."""
    return Summary(
        store=store,
        n=int((ended.rows["valid"] == layout.OK).sum()),
        shape=plan.shape,
        layout=told["layout"],
        coverage=told["coverage"],
        shapes=plan.shapes,
        error=Error(**told["error"]),
        seconds=seconds,
        bytes_in=told["sources"][-1]["bytes"],
        bytes_out=sum(f.stat().st_size for f in store.rglob("*") if f.is_file()),
        set_aside=ended.set_aside,
        counted=told["counted"],
    )


def _missing(counted: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"missing: {column}: {', '.join(f'{count} {reason}' for reason, count in reasons.items())}"
        for column, reasons in counted.items()
        if reasons
    ]


def _aside(set_aside: Sequence[Refused]) -> list[str]:
    lines = [f"set aside: {name}: {reason}" for name, reason in set_aside[:NAMED]]
    if len(set_aside) > NAMED:
        lines.append(f"set aside: {len(set_aside) - NAMED} more, all on the page of `cauc store info --out`")
    return lines
