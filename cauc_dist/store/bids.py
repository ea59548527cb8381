"""A BIDS folder, read: participants.tsv and the scans that belong to its rows. No voxel is touched here.

Everything that names and tables can be refused for is refused here, with the participants by name.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput
from cauc_dist.store.layout import Column

Refused = tuple[str, str]  # (scan or participant, reason)

MISSING = ("", "n/a", "nan")  # compared in lower case
NAMED = 5  # offenders an error lists before it counts


# ---- the table: participants.tsv -> columns -------------------------------------------------------------------


def read_table(source: Path) -> dict[str, dict[str, str]]:
    """Rows of participants.tsv by subject (`sub-` put in front where it lacks), in the file's order."""
    path = source / "participants.tsv"
    if not source.is_dir():
        raise BadInput(f"no folder {source}", wanted="a BIDS folder", do="Check the path")
    if not path.is_file():
        raise BadInput(
            f"no participants.tsv in {source}", wanted="a BIDS folder", do="Check the path, or write the table"
        )
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: {error}", wanted="a UTF-8 text", do="Save the table as UTF-8") from error
    lines = [[cell.strip() for cell in line.split("\t")] for line in text.split("\n")]
    names = lines[0]
    if "participant_id" not in names:
        do = "Name the column of subjects participant_id, and separate columns by tabs"
        raise BadInput(f"{path} has columns {', '.join(names)!r}", wanted="a column participant_id", do=do)
    if len(set(names)) < len(names) or "" in names:
        raise BadInput(f"{path} has columns {', '.join(names)}", wanted="a different name for each", do="Rename them")
    return _by_subject(path, names, lines)


def _by_subject(path: Path, names: list[str], lines: list[list[str]]) -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cells):
            continue
        if len(cells) != len(names):
            found = f"{path} line {number} has {len(cells)} fields"
            raise BadInput(found, wanted=f"{len(names)}, as in its first line", do="Mend the line (n/a where unknown)")
        row = dict(zip(names, cells, strict=True))
        subject = "sub-" + row.pop("participant_id").removeprefix("sub-")
        if subject in rows:
            raise BadInput(
                f"{path} line {number} repeats {subject}", wanted="one row a participant", do="Keep one of them"
            )
        rows[subject] = row
    return rows


def read_columns(rows: dict[str, dict[str, str]]) -> tuple[list[Column], list[NDArray[np.float64]]]:
    """Columns and their values (N,), NaN missing: `number` if every entry parses as one, else `category`."""
    names = list(next(iter(rows.values())))
    pairs = [_column(name, {subject: row[name] for subject, row in rows.items()}) for name in names]
    return [column for column, _ in pairs], [values for _, values in pairs]


def _column(name: str, cells: dict[str, str]) -> tuple[Column, NDArray[np.float64]]:
    present = {subject: cell for subject, cell in cells.items() if cell.lower() not in MISSING}
    numbers = {subject: number for subject, cell in present.items() if (number := _number(cell)) is not None}
    if len(numbers) == len(present):
        return Column(name, "number"), np.array([numbers.get(subject, np.nan) for subject in cells])
    if 2 * len(numbers) >= len(present):
        odd = [f"{subject}: {cell!r}" for subject, cell in present.items() if subject not in numbers]
        found = f"column {name} of participants.tsv is numbers but for {len(odd)} ({some(odd)})"
        raise BadInput(found, wanted="a number or n/a in each row", do="Correct these entries, or write n/a")
    levels = tuple(sorted(set(present.values())))
    codes = {level: float(code) for code, level in enumerate(levels)}
    return Column(name, "category", levels), np.array([codes.get(c, np.nan) for c in cells.values()])


def _number(cell: str) -> float | None:
    """A finite number, or None. Python also reads 1_000 as one; no table means that."""
    try:
        value = math.nan if "_" in cell else float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ---- the scans: files -> pairs with their rows ----------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    id: str
    subject: str
    path: Path


def find(source: Path, suffix: str) -> list[Scan]:
    """All scans of the suffix, by id; the id is the file's name without suffix and ending."""
    paths = [p for way in ("sub-*/anat", "sub-*/ses-*/anat") for p in source.glob(f"{way}/sub-*.nii*")]
    paths = [p for p in paths if p.name.endswith((".nii", ".nii.gz"))]
    found = [
        Scan(p.name.removesuffix(f"_{suffix}{end}"), p.name.split("_")[0], p)
        for p in paths
        for end in (".nii", ".nii.gz")
        if p.name.endswith(f"_{suffix}{end}")
    ]
    if not found:
        others = {p.name.split(".nii")[0].rsplit("_", 1)[-1] for p in paths}
        do = f"Name one of the suffixes found: {', '.join(sorted(others))}" if others else "Check the folder"
        raise BadInput(f"no scan in {source}", wanted=f"sub-*/[ses-*/]anat/sub-*_{suffix}.nii[.gz]", do=do)
    return sorted(found, key=lambda scan: (scan.id, scan.path))


def pair(
    rows: dict[str, dict[str, str]], scans: list[Scan], suffix: str, *, keep_pairs: bool
) -> tuple[list[Scan], list[Refused]]:
    """The scans that have a row, and what is left over on either side with the reason."""
    by_subject: dict[str, list[Scan]] = {}
    for scan in scans:
        by_subject.setdefault(scan.subject, []).append(scan)
    if several := [
        f"{s}: {', '.join(x.path.name for x in group)}" for s, group in by_subject.items() if len(group) > 1
    ]:
        found = f"several {suffix} scans of {len(several)} participants ({some(several, '; ')})"
        raise BadInput(
            found, wanted="one scan a participant", do="Leave one; a row of participants.tsv cannot tell sessions apart"
        )
    alone = [(subject, f"no {suffix} scan") for subject in rows if subject not in by_subject]
    alone += [(scan.id, "no row in participants.tsv") for scan in scans if scan.subject not in rows]
    kept = [scan for scan in scans if scan.subject in rows]
    if alone and not (keep_pairs and kept):
        found = f"{len(alone)} without a partner ({some([f'{name}: {reason}' for name, reason in alone])})"
        do = (
            f"Add what is missing, or ask for partial to keep the {len(kept)} pairs"
            if kept
            else "Check the names on both sides"
        )
        raise BadInput(found, wanted="a scan for each participant and a row for each scan", do=do)
    return kept, alone


def some(texts: Sequence[str], separator: str = ", ") -> str:
    rest = f"{separator}and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return separator.join(texts[:NAMED]) + rest
