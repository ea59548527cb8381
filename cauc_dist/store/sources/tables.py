"""Metadata tables: text -> rows by participant and session -> columns of numbers and categories.

A key is (participant, session): `sub-` and `ses-` are left out, session is "" where the table has none.
"""

import csv
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput, nearest
from cauc_dist.store.layout import Column
from cauc_dist.store.sources.cohort import Refused, some

Key = tuple[str, str]
Row = dict[str, str]

MISSING = ("", "n/a", "nan")  # compared in lower case
PARTICIPANT = "participant_id"
SESSION = ("session_id", "session")
TABLES = (".tsv", ".csv")


# ---- one file -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of text; `cells[j]` are the fields of line `lines[j]` of the file."""

    path: Path
    names: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    lines: tuple[bytes, ...]

    def rows(self) -> list[tuple[Key, Row]]:
        """Each row with its key, without the columns that are the key."""
        session = next((name for name in SESSION if name in self.names), None)
        found = []
        for cells in self.cells:
            row = dict(zip(self.names, cells, strict=True))
            found.append(((bare(row.pop(PARTICIPANT)), bare(row.pop(session)) if session else ""), row))
        return found

    def keyed(self) -> dict[Key, Row]:
        """The rows by key; a repeated one is refused by name."""
        rows: dict[Key, Row] = {}
        for key, row in self.rows():
            if key in rows:
                wanted = f"one row a participant{' and session' if key[1] else ''}"
                raise BadInput(f"{self.path} repeats {called(key)}", wanted=wanted, do="Keep one of them")
            rows[key] = row
        return rows


def read_table(path: Path, key: str = PARTICIPANT) -> Table:
    """UTF-8; separated by tabs (.tsv), else by what the first line has most of: comma, semicolon or tab."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise BadInput(f"no table {path}", wanted="a .tsv or .csv file", do="Check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: {error}", wanted="a UTF-8 text", do="Save the table as UTF-8") from error
    lines = re.split(r"\r\n|\n|\r", text)
    separator = "\t" if path.suffix == ".tsv" else max(",;\t", key=lines[0].count)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    # A line at a time: a line then is a row, and one stray quote cannot swallow the rest of the file.
    fields = (next(csv.reader([line], delimiter=separator, quoting=quoting), []) for line in lines)
    cells = [tuple(field.strip() for field in line) for line in fields]
    names = cells[0]
    if key not in names:
        do = f"Name the column of participants {key}, and separate columns by tabs (.tsv) or commas (.csv)"
        raise BadInput(f"{path} has columns {', '.join(names)!r}", wanted=f"a column {key}", do=do)
    if len(set(names)) < len(names) or "" in names:
        raise BadInput(f"{path} has columns {', '.join(names)}", wanted="a different name for each", do="Rename them")
    kept = [j for j in range(1, len(lines)) if any(cells[j])]
    if wrong := [j for j in kept if len(cells[j]) != len(names)]:
        found = f"{path} line {wrong[0] + 1} has {len(cells[wrong[0]])} fields"
        raise BadInput(found, wanted=f"{len(names)}, as in its first line", do="Mend the line (n/a where unknown)")
    if not kept:
        raise BadInput(f"{path} has no rows", wanted="a row a participant", do="Check the table")
    raw = tuple(lines[j].encode() for j in kept)
    return Table(path, names, tuple(cells[j] for j in kept), raw)


def participants(source: Path, table: Path | None) -> Path:
    """The participants' table: the one named, else participants.tsv or .csv of the source."""
    if table is not None:
        return table
    for ending in TABLES:
        if (path := source / f"participants{ending}").is_file():
            return path
    do = "Check the path, write the table, or name one as table"
    raise BadInput(f"no participants.tsv in {source}", wanted="a table of participants", do=do)


def bare(name: str) -> str:
    return re.sub(r"^(sub|ses)-", "", name)


def called(key: Key) -> str:
    """`sub-01` or `sub-01_ses-2`: a row's name in messages, and the id of a row of features."""
    return f"sub-{key[0]}" + (f"_ses-{key[1]}" if key[1] else "")


def sha256(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# ---- rows for scans -------------------------------------------------------------------------------------------


def match(scans: Sequence[Key], rows: Mapping[Key, Row], where: str) -> tuple[list[Key | str], list[Key]]:
    """For each scan its row's key, or why it has none; and the rows that no scan has.

    Names match exactly, or else as numbers (`sub-007` and 7) where only one name on either side is that number. A
    scan without a session takes a participant's only row; a row without a session is for all the sessions.
    """
    people = same([subject for subject, _ in scans], [participant for participant, _ in rows])
    by_person: dict[str, list[str]] = {}
    for participant, session in rows:
        by_person.setdefault(participant, []).append(session)
    found: list[Key | str] = []
    for subject, session in scans:
        person = people.get(subject)
        if person is None:
            found.append(f"no row in {where}")
            continue
        sessions = by_person[person]
        if "" in sessions or (not session and len(sessions) == 1):
            found.append((person, sessions[0] if "" not in sessions else ""))
        elif not session:
            found.append(f"{len(sessions)} rows in {where}, and no session in the scan's name")
        else:
            chosen = same([session], sessions).get(session)
            found.append((person, chosen) if chosen is not None else f"no row for session {session} in {where}")
    used = {key for key in found if not isinstance(key, str)}
    return found, [key for key in rows if key not in used]


def same(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """name -> other: equal, or else the same number where that is unambiguous."""
    left, right = set(names), set(others)
    pairs = {name: name for name in left & right}
    numbers: dict[int, tuple[list[str], list[str]]] = {}
    for side, group in enumerate((left, right)):
        for name in group:
            if name.isdecimal():
                numbers.setdefault(int(name), ([], []))[side].append(name)
    for ours, theirs in numbers.values():
        if len(ours) == len(theirs) == 1:
            pairs[ours[0]] = theirs[0]
    return pairs


# ---- rows -> columns ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """What is missing beside empty, n/a and nan: codes by column (`*`: all), and numbers outside a range."""

    codes: dict[str, list[str]]
    ranges: dict[str, tuple[float, float]]

    @staticmethod
    def parse(missing: Sequence[str], ranges: Sequence[str]) -> "Rules":
        """From `height=0` and `height=100:230` (either end may be left open)."""
        codes: dict[str, list[str]] = {}
        for text in missing:
            name, equals, code = text.rpartition("=")
            if not (equals and name and code):
                raise BadInput(f"missing {text!r}", wanted="column=code", do="Write e.g. height=0, or *=-9999 for all")
            codes.setdefault(name, []).append(code)
        limits: dict[str, tuple[float, float]] = {}
        for text in ranges:
            name, _, ends = text.rpartition("=")
            low, colon, high = ends.partition(":")
            a, b = number(low) if low else -math.inf, number(high) if high else math.inf
            if not name or not colon or a is None or b is None or a > b:
                raise BadInput(f"range {text!r}", wanted="column=low:high", do="Write e.g. height=100:230 or age=0:")
            if name in limits:
                raise BadInput(f"two ranges of {name}", wanted="one a column", do="Leave one")
            limits[name] = (a, b)
        return Rules(codes, limits)


Columns = tuple[tuple[Column, ...], tuple[NDArray[np.float64], ...], dict[str, dict[str, int]]]


def columns_of(names: Sequence[str], rows: Sequence[Row], ids: Sequence[str], rules: Rules) -> Columns:
    """Columns, their values (N,) with NaN missing, and how many entries of each are missing for what reason."""
    for name in (*rules.codes, *rules.ranges):
        if name not in names and name != "*":
            raise BadInput(f"no column {name} in the table", wanted="a column for each rule", do=nearest(name, names))
    columns, values, counted = [], [], {}
    for name in names:
        codes = [*rules.codes.get(name, ()), *rules.codes.get("*", ())]
        count: dict[str, int] = {}
        cells = [_present(row.get(name, ""), codes, count) for row in rows]
        column, value = _column(name, cells, ids)
        if name in rules.ranges:
            _within(name, column, value, rules.ranges[name], count)
        columns.append(column)
        values.append(value)
        if count:
            counted[name] = count
    return tuple(columns), tuple(values), counted


def _present(cell: str, codes: Sequence[str], count: dict[str, int]) -> str:
    """The cell, or nothing where it is missing; a code equals by text or by value (0 is 0.0)."""
    if cell.lower() in MISSING:
        reason = "n/a"
    elif code := next((c for c in codes if c == cell or (number(c) is not None and number(c) == number(cell))), None):
        reason = f"code {code}"
    else:
        return cell
    count[reason] = count.get(reason, 0) + 1
    return ""


def _column(name: str, cells: Sequence[str], ids: Sequence[str]) -> tuple[Column, NDArray[np.float64]]:
    """`number` if every entry parses as one, else `category`; mostly numbers is neither, and refused."""
    numbers = [number(cell) if cell else math.nan for cell in cells]
    odd = [f"{who}: {cell!r}" for who, cell, value in zip(ids, cells, numbers, strict=True) if value is None]
    if not odd:
        return Column(name, "number"), np.array(numbers, np.float64)
    if 2 * len(odd) <= sum(map(bool, cells)):
        found = f"column {name} of the table is numbers but for {len(odd)} ({some(odd)})"
        do = "Correct these entries, write n/a, or declare the code that means missing"
        raise BadInput(found, wanted="a number or n/a in each row", do=do)
    if all(re.fullmatch(r"[+-]?\d*,\d+", cell) for cell in cells if cell):
        raise BadInput(f"column {name} has decimal commas ({some(odd)})", wanted="decimal points", do="Rewrite them")
    levels = tuple(sorted(set(filter(None, cells))))
    codes = {level: float(code) for code, level in enumerate(levels)}
    return Column(name, "category", levels), np.array([codes.get(cell, math.nan) for cell in cells])


def _within(
    name: str, column: Column, value: NDArray[np.float64], limits: tuple[float, float], count: dict[str, int]
) -> None:
    low, high = limits
    if column.kind != "number":
        found = f"column {name} holds categories ({some(column.levels)})"
        raise BadInput(found, wanted="numbers where a range is asked for", do="Leave the range out")
    if (outside := (value < low) | (value > high)).any():
        value[outside] = math.nan
        ends = (f"{end:g}" if math.isfinite(end) else "" for end in limits)
        count[f"outside {':'.join(ends)}"] = int(outside.sum())


def number(cell: str) -> float | None:
    """A finite number, or None. Python also reads 1_000 as one; no table means that."""
    try:
        value = math.nan if "_" in cell else float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def leftovers(rows: Iterable[Key], reason: str) -> list[Refused]:
    return [(called(key), reason) for key in rows]
