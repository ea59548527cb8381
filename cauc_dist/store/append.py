"""A store that grows: more scans, or one more column of metadata. It is whole for its readers at any moment."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput
from cauc_dist.store import layout, rows, sources
from cauc_dist.store.chunks import rows_a_file, whole
from cauc_dist.store.files import open_files
from cauc_dist.store.ingest import Summary, attributes_of, request, room, summary_of
from cauc_dist.store.job import Job, Progress
from cauc_dist.store.layout import Column
from cauc_dist.store.planned import Plan, Settings, make_plan
from cauc_dist.store.reader import ROW_ARRAYS, Store
from cauc_dist.store.shards import Form
from cauc_dist.store.sources import Cohort, by
from cauc_dist.store.workplace import Workplace
from cauc_dist.stream.plan import parts

Floats = NDArray[np.float64]


def append(
    source: Path,
    store: Path,
    *,
    table: Path | None = None,
    features: Path | None = None,
    missing: Sequence[str] = (),
    ranges: Sequence[str] = (),
    workers: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Add the scans of `source` to `store` in the form that it has; scans that it has already are set aside.

    New shards first, then longer rows, last the attributes: whoever reads meanwhile sees the store as it was. A column
    that one side lacks is missing there. In a packed store, a scan with voxels outside the mask is set aside.
    """
    began = time.perf_counter()
    with Workplace.open(store, (0, 1), grows=True) as place, room(store):
        old = Old.read(store)
        if (begun := place.begun()) is not None and begun["rows"] != old.n:
            place.clear()  # it was killed when all was done
        settings = Settings.of(old.attributes["settings"])
        cohort = sources.open_cohort(
            source, suffix=settings.suffix, table=table, features=features, missing=missing, ranges=ranges
        )
        cohort = _without(cohort, old.ids, store)
        old.refuse(cohort)
        asked = {**request(settings, cohort), "rows": old.n}
        plan = Plan.of(place.plan(asked, lambda: asdict(old.plan(cohort, settings)), fresh=fresh), cohort)
        first = math.ceil(old.n / old.per)
        shards = store / "volumes"
        job = Job(plan, place, shards, workers=workers, progress=progress, first=first, per=old.per, known=old.known)
        job.write(old.form)
        ended = job.end(old.form)
        columns, metadata = old.joined(cohort.columns, [v[list(plan.at)] for v in cohort.values], first * old.per)
        rows.write(store, old.longer(ended.rows, first * old.per), columns, metadata)
        told = _grown(old.attributes, attributes_of(cohort, settings, plan, old.form, ended), first * old.per)
        rows.commit(store, told)
        place.remove()
    return summary_of(store, told, plan, ended, time.perf_counter() - began)


def add_column(store: Path, name: str, labels: Sequence[str]) -> None:
    """A column of texts, one for each usable scan in the order of `Store.ids`; readers see it when it is whole."""
    add_columns(store, {name: labels})


def add_columns(store: Path, columns: Mapping[str, Sequence[str] | Floats]) -> None:
    """Columns of texts ("": missing) or of numbers (NaN: missing), as `add_column`: all of them, or none."""
    with Workplace.open(store, (0, 1), grows=True) as place, room(store):
        old = Old.read(store)
        if (begun := place.begun()) is not None and begun["rows"] == old.n:
            do = "Give the command of that append again first"
            raise BadInput(f"{store} has an unfinished append", wanted="a store at rest", do=do)
        for name in columns:
            if name in old.attributes["columns"]:
                do = "Choose another name; what a run was trained on must not change"
                raise BadInput(f"{store} has a column {name}", wanted="a new one", do=do)
        all_columns, metadata = list(old.columns), list(old.metadata)
        for name, entries in columns.items():
            column, known = _column(name, entries)
            values = np.full(old.n, np.nan)
            values[old.used] = known
            all_columns.append(column)
            metadata.append(values)
        rows.write(store, old.rows, all_columns, metadata)
        rows.commit(store, {**old.attributes, "columns": [column.name for column in all_columns]})
        place.remove()


def _column(name: str, entries: Sequence[str] | Floats) -> tuple[Column, Floats]:
    """The column with its values or codes."""
    if isinstance(entries, np.ndarray):
        return Column(name, "number"), entries
    levels, codes = np.unique(entries, return_inverse=True)
    known = levels != ""
    return Column(name, "category", tuple(levels[known].tolist())), np.where(known, np.cumsum(known) - 1.0, np.nan)[
        codes
    ]


FIFTHS = 5  # of a column of numbers, where a split is to have its share of each


def split_store(
    store: Path, name: str, shares: Mapping[str, float], by: Sequence[str], seed: int
) -> dict[str, tuple[int, int]]:
    """Deal the subjects into parts, kept as column `name`; (subjects, scans) of each part.

    Each part has its share of every value of the columns `by` (of every fifth, of numbers; missing is a value).
    """
    opened = Store.open(store)
    strata = [str(tuple(labels)) for labels in zip(*(_strata(opened, column) for column in by), strict=True)]
    labels = parts(opened.subjects, shares, seed, strata or None)
    add_column(store, name, labels)
    pairs = list(zip(labels, opened.subjects, strict=True))
    return {part: (len({s for p, s in pairs if p == part}), labels.count(part)) for part in shares}


def _strata(store: Store, name: str) -> list[int]:
    """The label of each scan: of the median value of its subject, so that a subject's scans agree."""
    values = store.metadata([name])[:, 0]
    subjects, of = np.unique(store.subjects, return_inverse=True)
    of_subject = np.array([np.nanmedian(v) if len(v) else np.nan for v in _grouped(values, of, len(subjects))])
    if store.column(name).kind == "category":
        return np.nan_to_num(np.floor(of_subject), nan=-1)[of].astype(int).tolist()  # type: ignore[no-any-return]
    edges = np.nanquantile(of_subject, np.arange(1, FIFTHS) / FIFTHS)
    labels = np.where(np.isnan(of_subject), -1, np.searchsorted(edges, of_subject))
    return labels[of].tolist()  # type: ignore[no-any-return]


def _grouped(values: Floats, of: NDArray[np.int64], n: int) -> list[Floats]:
    """The values of each group that are not missing."""
    present = np.flatnonzero(~np.isnan(values))
    present = present[np.argsort(of[present], kind="stable")]
    return np.split(values[present], np.searchsorted(of[present], np.arange(1, n)))


@dataclass(frozen=True)
class Old:
    """What is small in a store as it is, holes and all: n rows."""

    attributes: dict[str, Any]
    rows: dict[str, NDArray[Any]]
    columns: tuple[Column, ...]
    metadata: tuple[Floats, ...]
    form: Form
    per: int

    @property
    def n(self) -> int:
        return int(self.attributes["n"])

    @property
    def used(self) -> NDArray[np.bool_]:
        used: NDArray[np.bool_] = self.rows["valid"] == layout.OK
        return used

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the usable scans: one that was set aside may come again, mended."""
        return layout.decode_text(self.rows["ids"][self.used])

    @property
    def known(self) -> dict[bytes, str]:
        """The usable scans by the checksum of their source."""
        return dict(zip(map(bytes, self.rows["checksums"][self.used]), self.ids, strict=True))

    @staticmethod
    def read(store: Path) -> "Old":
        opened, files = Store.open(store), open_files(store)
        told = opened.attributes
        settings = told["settings"]
        return Old(
            attributes=told,
            rows={name: whole(files, name, told["n"])[0] for name in ROW_ARRAYS},
            columns=opened.columns,
            metadata=tuple(whole(files, column.array, told["n"])[0] for column in opened.columns),
            form=Form(opened.shape, settings["dtype"], settings["codec"], opened.mask),
            per=rows_a_file(files, "volumes"),
        )

    def refuse(self, cohort: Cohort) -> None:
        """What cannot become rows of this store: longer names, a column of another kind."""
        for width, names in (
            (self.rows["ids"].shape[1], [item.id for item in cohort.items]),
            (self.rows["subjects"].shape[1], [item.subject for item in cohort.items]),
        ):
            if max(len(name.encode()) for name in names) > width:
                do = "Ingest into a new store, or shorten the names"
                raise BadInput(f"names of more than {width} bytes", wanted="no longer ones", do=do)
        # A column without a value has no kind yet: tables call it numbers.
        pairs = zip(self.columns, self.metadata, strict=True)
        kinds = {column.name: column.kind for column, values in pairs if not np.isnan(values).all()}
        for column, values in zip(cohort.columns, cohort.values, strict=True):
            if np.isnan(values).all():
                continue
            if (kind := kinds.get(column.name, column.kind)) != column.kind:
                found, do = f"column {column.name} of {column.kind} values", "Mend the table, or rename the column"
                raise BadInput(found, wanted=f"{kind} values, as in the store", do=do)

    def plan(self, cohort: Cohort, settings: Settings) -> Plan:
        plan = make_plan(cohort, settings)
        if plan.shape != self.form.shape:
            do = "Ingest them into a store of their own"
            raise BadInput(f"scans of {by(plan.shape)}", wanted=f"{by(self.form.shape)}, as in the store", do=do)
        voxel = self.attributes["voxel_mm"]
        if voxel and plan.voxel and not np.allclose(plan.voxel, voxel, rtol=0.01, atol=0):
            do = "Resample them, or ingest them into a store of their own"
            raise BadInput(f"voxels of {by(plan.voxel)} mm", wanted=f"{by(voxel)} mm, as in the store", do=do)
        return plan

    def longer(self, new: Mapping[str, NDArray[Any]], start: int) -> dict[str, NDArray[Any]]:
        """Row arrays with `new` from row `start` on, holes before it."""
        longer = {}
        for name, values in new.items():
            old = self.rows[name]
            longer[name] = np.zeros((start + len(values), *old.shape[1:]), old.dtype)
            longer[name][: self.n] = old
            longer[name][(slice(start, None), *(slice(side) for side in values.shape[1:]))] = values
        return longer

    def joined(
        self, columns: Sequence[Column], metadata: Sequence[Floats], start: int
    ) -> tuple[list[Column], list[Floats]]:
        """Columns of both sides: the store's first, their levels first; NaN where a side has no such column."""
        n = start + len(metadata[0]) if metadata else start
        known = dict(zip([column.name for column in columns], zip(columns, metadata, strict=True), strict=True))
        out_columns, out_values = [], []
        for column, old in zip(self.columns, self.metadata, strict=True):
            values = np.full(n, np.nan)
            values[: self.n] = old
            if column.name in known:
                other, new = known.pop(column.name)
                if np.isnan(old).all():
                    column = replace(other, levels=column.levels)
                if not np.isnan(new).all():
                    column, new = _same_codes(column, other, new)
                values[start:] = new
            out_columns.append(column)
            out_values.append(values)
        for column, new in known.values():
            out_columns.append(column)
            out_values.append(np.concatenate([np.full(start, np.nan), new]))
        return out_columns, out_values


def _same_codes(column: Column, other: Column, values: Floats) -> tuple[Column, Floats]:
    """The store's column with the levels that `other` adds, and the values of `other` in its codes."""
    code = {level: k for k, level in enumerate(dict.fromkeys([*column.levels, *other.levels]))}
    codes = np.array([code[level] for level in other.levels], np.float64)
    if column.kind == "category":
        present = ~np.isnan(values)
        values = values.copy()
        values[present] = codes[values[present].astype(int)]
    return replace(column, levels=tuple(code)), values


def _without(cohort: Cohort, ids: Sequence[str], store: Path) -> Cohort:
    """The cohort without the scans that are there already."""
    there = set(ids)
    new = [i for i, item in enumerate(cohort.items) if item.id not in there]
    if not new:
        do = "Nothing is to be done, or the new scans need other names"
        raise BadInput(f"all {len(cohort.items)} scans are in {store} already", wanted="new ones", do=do)
    known = [(item.id, f"already in {store.name}") for item in cohort.items if item.id in there]
    return replace(
        cohort,
        items=tuple(cohort.items[i] for i in new),
        values=tuple(values[new] for values in cohort.values),
        set_aside=(*cohort.set_aside, *known),
    )


def _grown(old: Mapping[str, Any], new: Mapping[str, Any], start: int) -> dict[str, Any]:
    """Attributes of the store with the new scans, from row `start` on."""
    errors = [old["error"], new["error"]]
    worst = min(errors, key=lambda error: math.inf if error["psnr_db"] is None else error["psnr_db"])
    largest = {name: max(error[name] for error in errors) for name in ("max_abs", "max_of_range")}
    counted = {
        name: {
            reason: old["counted"].get(name, {}).get(reason, 0) + new["counted"].get(name, {}).get(reason, 0)
            for reason in [*old["counted"].get(name, {}), *new["counted"].get(name, {})]
        }
        for name in [*old["counted"], *new["counted"]]
    }
    return {
        **old,
        "n": start + new["n"],
        "columns": [*old["columns"], *(name for name in new["columns"] if name not in old["columns"])],
        "sources": [*old["sources"], *new["sources"]],
        "error": {**worst, **largest},
        "set_aside": [*old["set_aside"], *new["set_aside"]],
        "counted": counted,
        "cauc_dist": new["cauc_dist"],
    }
