"""Folders of scans: BIDS, OpenBHB, and <id>.npy. Names and tables only; no voxel is touched here.

`ending` is what ends a scan's name before `.nii`, `.nii.gz` or `.npy`: a BIDS suffix (`T1w`), or more of the name
(`space-MNI152_desc-preproc_T1w`). What is before it names the scan: its id.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cauc_dist.errors import BadInput
from cauc_dist.store.sources.cohort import Cohort, Item, Refused, some
from cauc_dist.store.sources.tables import (
    PARTICIPANT,
    SESSION,
    Key,
    Row,
    Rules,
    bare,
    columns_of,
    leftovers,
    match,
    participants,
    read_table,
    sha256,
)

SCANS = (".nii.gz", ".nii", ".npy")
OPENBHB = {  # the names its papers and code use, and how its files end
    "vbm": "preproc-cat12vbm_desc-gm_T1w",
    "quasiraw": "preproc-quasiraw_T1w",
    "vbm_roi": "preproc-cat12vbm_desc-gm_ROI",
    "desikan_roi": "preproc-freesurfer_desc-desikan_ROI",
    "destrieux_roi": "preproc-freesurfer_desc-destrieux_ROI",
}
DERIVED = ("space", "res", "desc", "label", "preproc")  # entities of a name that tell how a scan was made
OPENBHB |= {f"fs_{name}": OPENBHB[name] for name in ("desikan_roi", "destrieux_roi")}


def bids(source: Path, endings: Sequence[str], table: Path | None, rules: Rules) -> Cohort:
    """sub-*/[ses-*/]<datatype>/sub-*_<ending>.nii[.gz] or .npy, with participants.tsv and sessions.tsv."""
    return _cohort("BIDS", source, list(_walk(source, "sub-*")), endings, table, rules)


def openbhb(source: Path, names: Sequence[str], table: Path | None, rules: Rules) -> Cohort:
    """sub-*_<ending>.npy anywhere below, as OpenBHB is downloaded; `names` are vbm, quasiraw, ... or endings."""
    files = list(_walk(source, "*"))
    if tuple(names) == ("T1w",):  # the default, and the end of two of its names
        names = [name for name in ("vbm", "quasiraw") if any(_ends(path, OPENBHB[name]) for path in files)]
        if len(names) != 1:
            found = f"{' and '.join(names) or 'neither vbm nor quasiraw'} in {source}"
            do = f"Name one as suffix: {', '.join(sorted(OPENBHB))}"
            raise BadInput(found, wanted="one kind of scan to choose", do=do)
    endings = [OPENBHB.get(name, name) for name in names]
    cohort = _cohort("OpenBHB", source, files, endings, table, rules)
    if all("cat12vbm" in e or "quasiraw" in e for e in endings):
        cohort.described["space"] = "MNI152"  # docs of OpenBHB; the files themselves carry no affine
    return cohort


def _cohort(
    kind: str, source: Path, files: Sequence[Path], endings: Sequence[str], table: Path | None, rules: Rules
) -> Cohort:
    path = participants(source, table)
    rows = read_table(path).keyed()
    found, refused = _scans(source, files, endings)
    keys, left = match([(bare(subject_of(id)), session_of(id)) for id in found], rows, path.name)
    refused += [(id, key) for id, key in zip(found, keys, strict=True) if isinstance(key, str)]
    pairs = {id: key for id, key in zip(found, keys, strict=True) if not isinstance(key, str)}
    known = {name for id, _ in refused for name in (id, subject_of(id))}
    refused += [pair for pair in leftovers(left, "no scan") if pair[0] not in known]
    extra, tables = _sessions(source, pairs)
    items = tuple(Item(id, subject_of(id), found[id]) for id in sorted(pairs))
    merged = [rows[pairs[item.id]] | extra.get(item.id, {}) for item in items]
    described = {"kind": kind, **describe(source), "endings": list(endings), **_space(found, endings)}
    return whole(Cohort(kind, items, (), (), tuple(refused), described, {}, (path, *tables)), merged, rules)


def whole(cohort: Cohort, rows: Sequence[Row], rules: Rules) -> Cohort:
    """The cohort with its columns; refused where no scan is left."""
    if not cohort.items:
        told = some([f"{name}: {reason}" for name, reason in cohort.set_aside], "; ")
        found = f"not one scan with a row of metadata ({told})"
        raise BadInput(found, wanted="names that agree", do="Check the names on both sides")
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns, values, counted = columns_of(names, rows, [item.id for item in cohort.items], rules)
    described = {**cohort.described, "tables_sha256": sha256(cohort.tables)}
    return Cohort(cohort.kind, cohort.items, columns, values, cohort.set_aside, described, counted, cohort.tables)


# ---- files -> scans -------------------------------------------------------------------------------------------


def _walk(source: Path, top: str) -> Iterator[Path]:
    """Files that may be scans, through links too; a folder that is met twice is entered once."""
    seen: set[str] = set()
    tops = [p for p in sorted(source.glob(top)) if p.is_dir() and not p.name.startswith(".")]
    if top == "*":
        yield from (p for p in source.glob("sub-*") if p.name.endswith(SCANS))
    for start in tops:
        for folder, folders, names in os.walk(start, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            yield from (Path(folder, name) for name in names if name.startswith("sub-") and name.endswith(SCANS))


def _scans(
    source: Path, files: Sequence[Path], endings: Sequence[str]
) -> tuple[dict[str, tuple[Path, ...]], list[Refused]]:
    """id -> one file an ending, in their order; what is incomplete or double is refused with its reason."""
    named = [(stem_of(path), path) for path in files]
    groups: dict[str, dict[str, list[Path]]] = {}
    for stem, path in named:
        for ending in endings:
            if _ends(path, ending):
                groups.setdefault(_id(path, stem, ending), {}).setdefault(ending, []).append(path)
    if not groups:
        others = sorted({stem.rsplit("_", 1)[-1] for stem, _ in named})
        do = f"Name one of the suffixes found: {some(others)}" if others else "Check the folder"
        wanted = " and ".join(f"sub-*_{ending}.nii[.gz] or .npy" for ending in endings)
        raise BadInput(f"no scan in {source}", wanted=wanted, do=do)
    good: dict[str, tuple[Path, ...]] = {}
    refused: list[Refused] = []
    for id, group in sorted(groups.items()):
        if double := next((paths for paths in group.values() if len(paths) > 1), None):
            refused.append((id, f"{len(double)} files of one scan: {some(sorted(p.name for p in double))}"))
        elif lacking := [ending for ending in endings if ending not in group]:
            refused.append((id, f"no {' and no '.join(lacking)}"))
        else:
            good[id] = tuple(group[ending][0] for ending in endings)
    return good, refused


def _ends(path: Path, ending: str) -> bool:
    return stem_of(path).endswith(f"_{ending}")


def stem_of(path: Path) -> str:
    ending = next(e for e in SCANS if path.name.endswith(e))
    return path.name.removesuffix(ending)


def _id(path: Path, stem: str, ending: str) -> str:
    """The name before the ending; a session that only the folder names is put where BIDS has it."""
    id = stem.removesuffix(f"_{ending}")
    folder = next((part for part in reversed(path.parts[:-1]) if part.startswith("ses-")), "")
    if folder and not session_of(id):
        subject, _, rest = id.partition("_")
        id = "_".join(filter(None, [subject, folder, rest]))
    return id


def subject_of(id: str) -> str:
    return id.split("_")[0]


def session_of(id: str) -> str:
    return _entity(id, "ses")


def _space(found: dict[str, tuple[Path, ...]], endings: Sequence[str]) -> dict[str, str]:
    """The space that the names tell. Ids that differ in how a scan was made are one brain twice, not two scans."""
    for entity in DERIVED:
        seen: dict[str, str] = {}
        for id, paths in found.items():
            seen.setdefault(_entity(id, entity), paths[0].name)
        if len(seen) > 1:
            names = some([name for _, name in sorted(seen.items())])
            do = f"Name more of the ending, e.g. suffix {entity}-{max(seen)}_{endings[0]}"
            raise BadInput(f"scans that differ in {entity}- ({names})", wanted=f"one {entity}", do=do)
    spaces = {_entity(stem_of(paths[0]), "space") for paths in found.values()} - {""}
    return {"space": spaces.pop()} if spaces else {}


def _entity(name: str, entity: str) -> str:
    found = re.search(f"_{entity}-([^_]+)", name)
    return found[1] if found else ""


# ---- sessions -------------------------------------------------------------------------------------------------


def _sessions(source: Path, pairs: dict[str, Key]) -> tuple[dict[str, Row], list[Path]]:
    """What sessions.tsv and sub-*_sessions.tsv say of each scan that has a session; these columns replace the
    participant's, missing entries too: an age at the first session is not the age at the second.
    """
    told: dict[str, Row] = {}
    tables: list[Path] = []
    if (path := source / "sessions.tsv").is_file():
        table = read_table(path)
        if not any(name in table.names for name in SESSION):
            do = "Name the column of sessions session_id"
            raise BadInput(f"{path} has columns {', '.join(table.names)}", wanted="a column session_id", do=do)
        rows = table.keyed()
        tables.append(path)
        ids = [id for id in pairs if session_of(id)]
        keys, _ = match([(bare(subject_of(id)), session_of(id)) for id in ids], rows, path.name)
        told |= {id: rows[key] for id, key in zip(ids, keys, strict=True) if not isinstance(key, str)}
    by_subject: dict[str, list[str]] = {}
    for id in pairs:
        if session_of(id):
            by_subject.setdefault(subject_of(id), []).append(id)
    for subject, ids in by_subject.items():
        path = source / subject / f"{subject}_sessions.tsv"
        if path.is_file():
            table = read_table(path, "session_id")
            at = table.names.index("session_id")
            own = {(bare(cells[at]), ""): dict(zip(table.names, cells, strict=True)) for cells in table.cells}
            if len(own) < len(table.cells):
                raise BadInput(f"{path} repeats a session", wanted="one row a session", do="Keep one of them")
            keys, _ = match([(session_of(id), "") for id in ids], own, path.name)
            for id, key in zip(ids, keys, strict=True):
                if not isinstance(key, str):
                    row = {k: v for k, v in own[key].items() if k not in (PARTICIPANT, "session_id")}
                    told[id] = told.get(id, {}) | row
    return told, tables


def _owner(id: str, whole_names: dict[str, str]) -> str:
    """The subject of <id>.npy: the id itself where that is a participant's name."""
    return id if id in whole_names and not id.startswith("sub-") else subject_of(id)


# ---- <id>.npy -------------------------------------------------------------------------------------------------


def npy(source: Path, table: Path | None, rules: Rules) -> Cohort:
    """<id>.npy in one folder, an array a row; the table's participant_id is the id, or the subject in it."""
    path = participants(source, table)
    rows = read_table(path).keyed()
    files = {p.stem: p for p in sorted(source.glob("*.npy"))}
    whole_names = same_ids(files, rows)
    ids = list(files)
    scans = [(whole_names.get(id, bare(subject_of(id))), session_of(id)) for id in ids]
    keys, left = match(scans, rows, path.name)
    refused = [(id, key) for id, key in zip(ids, keys, strict=True) if isinstance(key, str)]
    pairs = {id: key for id, key in zip(ids, keys, strict=True) if not isinstance(key, str)}
    items = tuple(Item(id, _owner(id, whole_names), (files[id],)) for id in sorted(pairs))
    refused += [(key[0], "no scan") for key in left]
    described = {"kind": "npy", **describe(source)}
    cohort = Cohort("npy", items, (), (), tuple(refused), described, {}, (path,))
    return whole(cohort, [rows[pairs[item.id]] for item in items], rules)


def same_ids(files: dict[str, Path], rows: dict[Key, Row]) -> dict[str, str]:
    """Files whose whole name is a participant of the table."""
    people = {participant for participant, _ in rows}
    return {id: name for id in files for name in (id, bare(id)) if name in people}


def describe(source: Path) -> dict[str, Any]:
    """Where the data is and what its dataset_description.json says."""
    path = source / "dataset_description.json"
    try:
        told = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError:
        told = {}
    told = told if isinstance(told, dict) else {}
    return {"folder": str(source.resolve()), "name": told.get("Name"), "license": told.get("License")}
