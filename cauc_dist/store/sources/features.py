"""Tables of features: one row a scan, joined with the participants' table by participant (and session)."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput
from cauc_dist.store.sources.cohort import Cohort, Header, Item, Refused, some
from cauc_dist.store.sources.folders import OPENBHB, describe, whole
from cauc_dist.store.sources.tables import (
    PARTICIPANT,
    SESSION,
    TABLES,
    Key,
    Row,
    Rules,
    called,
    leftovers,
    match,
    number,
    participants,
    read_table,
)

PARTS = ("_rois", "_participants")  # train_rois.csv goes with train_participants.csv
OPENBHB_TABLES = {  # as OpenBHB is now published: one table a split
    OPENBHB["vbm_roi"]: "cat12vbm_roi_features.csv",
    OPENBHB["desikan_roi"]: "desikan_roi_features.csv",
    OPENBHB["destrieux_roi"]: "destrieux_roi_features.csv",
}


def is_source(source: Path) -> bool:
    return (source.is_file() and source.suffix in TABLES) or (source.is_dir() and bool(_parts(source)))


def cohort(source: Path, table: Path | None, rois: Path | None, rules: Rules) -> Cohort:
    """`rois` (or `source` where it is a table) with its participants; or all <part>_rois with <part>_participants."""
    if rois is None and source.is_file():
        rois, source = source, source.parent
    if rois is not None:
        return join(source, [rois], [participants(source, table)], rules, "table")
    parts = _parts(source)
    if table is not None:
        return join(source, list(parts.values()), [table] * len(parts), rules, "table", list(parts))
    tables = []
    for name, path in parts.items():
        beside = path.with_name(f"{name}{PARTS[1]}{path.suffix}")
        if not beside.is_file():
            raise BadInput(f"{path} without {beside.name}", wanted="a table of participants for it", do="Add it")
        tables.append(beside)
    return join(source, list(parts.values()), tables, rules, "table", list(parts))


def of_openbhb(source: Path, names: Sequence[str]) -> list[Path]:
    """The tables of a feature set of OpenBHB, where it is there as tables and not as a file a scan."""
    wanted = [OPENBHB_TABLES.get(OPENBHB.get(name, name), "") for name in names]
    found = sorted(path for name in wanted if name for path in source.rglob(name))
    if found and len(names) > 1:
        raise BadInput(f"{len(names)} feature sets ({', '.join(names)})", wanted="one", do="Name one of them")
    return found


def join(
    source: Path, rois: Sequence[Path], tables: Sequence[Path], rules: Rules, kind: str, parts: Sequence[str] = ()
) -> Cohort:
    """Rows of all the feature tables with their metadata; `parts` become the column split where none is there."""
    items: dict[str, Item] = {}
    merged: dict[str, Row] = {}
    refused: list[Refused] = []
    seen: set[str] = set()
    spare: dict[Path, set[Key]] = {}
    first: tuple[str, ...] = ()
    for j, (path, table) in enumerate(zip(rois, tables, strict=True)):
        names, keys, values, _ = _decoded(path)
        first = first or names
        if names != first:
            do = "Give tables of the same columns in the same order"
            raise BadInput(f"{path.name} and {rois[0].name} differ in columns", wanted="one set of features", do=do)
        rows = read_table(table).keyed()
        found, left = match(keys, rows, table.name)
        spare[table] = spare.get(table, set(left)) & set(left)
        for i, (key, row) in enumerate(zip(keys, found, strict=True)):
            id = called(key)
            if id in seen:
                raise BadInput(f"{path} repeats {id}", wanted="one row of features a scan", do="Keep one of them")
            seen.add(id)
            if isinstance(row, str):
                refused.append((id, row))
            elif len(bad := [n for n, ok in zip(names, np.isfinite(values[i]), strict=True) if not ok]):
                refused.append((id, f"no number in {some(bad)}"))
            else:
                items[id] = Item(id, f"sub-{key[0]}", (path,), i)
                merged[id] = ({"split": parts[j]} if parts else {}) | rows[row]
    for left_over in spare.values():
        refused += [pair for pair in leftovers(sorted(left_over), "no row of features") if pair[0] not in seen]
    described = {"kind": kind, **describe(source), "features": list(first)}
    used = tuple(dict.fromkeys([*tables, *rois]))
    order = sorted(items)
    made = Cohort(kind, tuple(items[id] for id in order), (), (), tuple(refused), described, {}, used)
    return whole(made, [merged[id] for id in order], rules)


def _parts(source: Path) -> dict[str, Path]:
    found = [path for ending in TABLES for path in sorted(source.glob(f"*{PARTS[0]}{ending}"))]
    return {path.stem.removesuffix(PARTS[0]): path for path in found}


Decoded = tuple[tuple[str, ...], list[Key], NDArray[np.float64], tuple[bytes, ...]]


def _decoded(path: Path) -> Decoded:
    """(names of the features, key of each row, (N, c) values with NaN where no number is, each row's bytes)."""
    stat = path.stat()
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)  # once a process; a table that was written anew is read anew
def _parsed(path: Path, mtime: int, size: int) -> Decoded:
    table = read_table(path)
    names = tuple(name for name in table.names if name not in (PARTICIPANT, *SESSION))
    if not names:
        raise BadInput(f"{path} has no features", wanted="columns beside the participant's", do="Check the table")
    at = [table.names.index(name) for name in names]
    numbers = [[number(cells[k]) for k in at] for cells in table.cells]
    return names, [key for key, _ in table.rows()], np.array(numbers, np.float64), table.lines


def header(item: Item) -> Header:
    return Header((len(_decoded(item.paths[0])[0]),))


def read(item: Item) -> NDArray[np.float64]:
    """(c,): the numbers of the row."""
    values = _decoded(item.paths[0])[2]
    return np.array(values[item.index or 0])


def row_bytes(item: Item) -> bytes:
    """The row's line without its end."""
    return _decoded(item.paths[0])[3][item.index or 0]
