"""What a store holds, for people: a page for the terminal and one for the browser.

Names come from files of others: control characters are replaced in both, and markup is escaped in the second.
"""

import base64
import html
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cauc_dist import durable
from cauc_dist.errors import BadInput
from cauc_dist.report.style import STYLE, need_matplotlib
from cauc_dist.store.files import is_remote
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.store.sources import by, some

LINES, WIDTH, BINS, NAMED = 40, 120, 16, 4
PICTURES = 12
BLOCKS = " ▁▂▃▄▅▆▇█"
MARGINS = "svg { width: 100%; font-size: 11px } .warning { border: 2px solid #c00; padding: .5rem 1rem }"

HEAD_ML = (
    2500.0  # more tissue than any brain with its fluid (at most about 2,000 ml); adults' heads have 3,000 to 5,000
)
MNI_MM = 217.0  # length of the box of the MNI template, front to back: taken for files that give no voxel size


class Shown(NamedTuple):
    """A column in figures, and bars (label, scans) of its values."""

    name: str
    kind: str
    missing: int
    figures: str
    bars: list[tuple[str, int]]


def text(store: Store) -> str:
    """At most 40 lines of at most 120 characters; where more is there, a line says how much."""
    head = [f"{store.name}: {store.where}", *(f"  {label:<11} {value}" for label, value in _facts(store, 3))]
    tail = []
    for title, entries in (("set aside", _set_aside(store)), ("made missing", _counted(store))):
        tail += [f"{title}:"] * bool(entries) + _most([f"  {what}: {names}" for what, names in entries], 5)
    columns = [
        f"  {c.name:<20.20} {c.kind:<8} {c.missing:>6} missing  {_blocks(c.bars):<{BINS}}  {c.figures}"
        for c in _columns(store)
    ]
    room = LINES - len(head) - len(tail) - 1
    lines = [*head, f"metadata: {'' if columns else 'none'}".rstrip(), *_most(columns, room), *tail]
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in map(_plain, lines))


def facts(store: Store) -> dict[str, Any]:
    """The same for scripts: numbers and names, no id of a subject."""
    told = store.attributes
    return {
        "store": store.where,
        "name": store.name,
        "fingerprint": store.fingerprint,
        "scans": len(store),
        "subjects": len(np.unique(store.subjects)),
        "set_aside": len(store.set_aside),
        "layout": store.layout,
        "dtype": store.dtype.name,
        "shape": list(store.shape),
        "voxel_mm": told["voxel_mm"],
        "error": told["error"],
        "columns": [
            {"name": c.name, "kind": c.kind, "missing": c.missing, "values": [[label, n] for label, n in c.bars]}
            for c in _columns(store)
        ],
    }


def page(store: Store, out: Path, *, montage: bool, say: Callable[[str], None]) -> None:
    """The same, complete, as one HTML file. `montage`: with pictures of some scans, else nothing of any image.

    Where pictures may show faces, the page and `say` warn (see `shows_face`).
    """
    pictures, warning = _montage(store) if montage else ("", "")
    if warning:
        say(f"warning: {warning}")
    figures = (
        f"<figure>{_svg(c)}<figcaption>{_html(f'{c.name} ({c.kind}): {c.figures}; {c.missing} missing')}</figcaption>"
        "</figure>"
        for c in _columns(store)
    )
    parts = [
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{_html(store.name)}</title>",
        f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{STYLE}{MARGINS}</style></head>",
        f"<body><h1>{_html(store.name)}</h1>",
        f"<p class=warning role=alert>{_html(warning)}</p>" if warning else "",
        _table([("store", store.where), *_facts(store, len(store.attributes["sources"]))]),
        f"<h2>Metadata</h2><div class=curves>{''.join(figures)}</div>",
        f"<h2>Made missing</h2>{_table(counted)}" if (counted := _counted(store)) else "",
        f"<h2>Set aside</h2>{_table(_set_aside(store))}" if store.set_aside else "",
        f"<details><summary>all of them</summary>{_table(store.set_aside)}</details>" if store.set_aside else "",
        f"<h2>Scans</h2><div class=curves>{pictures}</div>" if pictures else "",
        "</body></html>\n",
    ]
    durable.replace(out, "\n".join(filter(None, parts)).encode())


def _facts(store: Store, most: int) -> list[tuple[str, str]]:
    told = store.attributes
    scans = np.unique(store.subjects, return_counts=True)[1]
    each = f"{scans.min()}" if scans.min() == scans.max() else f"{scans.min()} to {scans.max()}"
    form = f"{store.layout} {store.dtype.name}, codec {told['settings'].get('codec')}, {by(store.shape)}"
    form += f", voxels of {by(told['voxel_mm'])} mm" if told["voxel_mm"] else ""
    form += f", {told['orientation']}" if told["orientation"] else ""
    form += f", {told['coverage']:.0%} of the box kept" if store.mask is not None else ""
    size = f"{_bytes(math.prod(store.row_shape) * store.dtype.itemsize)} a scan before compression"
    if not is_remote(store.where):
        total = sum(file.stat().st_size for file in Path(store.where).rglob("*") if file.is_file())
        size = f"{_bytes(total)} on disk, {_bytes(total / len(store))} a scan"
    error = told["error"]
    exact = "none: stored values equal the source exactly"
    lost = (
        f"at most {error['max_of_range']:.2g} of a scan's range, PSNR {error['psnr_db'] or 0:.1f} dB ({error['worst']})"
    )
    sources = [
        ", ".join(
            [" ".join(filter(None, [s.get("kind"), s.get("name")])), f"licence {s.get('license') or 'not stated'}"]
        )
        + (f", {s['folder']}" if "folder" in s else "")
        for s in told["sources"]
    ]
    return [
        ("scans", f"{len(store)} of {len(scans)} subjects, {each} a subject; {len(store.set_aside)} set aside"),
        ("form", form),
        ("size", size),
        ("error", exact if error["psnr_db"] is None else lost),
        *(("source", source) for source in _most(sources, most)),
        ("written by", f"cauc_dist {told['cauc_dist']}"),
        ("fingerprint", store.fingerprint),
    ]


def _columns(store: Store) -> list[Shown]:
    values = store.metadata([column.name for column in store.columns]).T
    return [_shown(column, v[np.isfinite(v)], len(store)) for column, v in zip(store.columns, values, strict=True)]


def _shown(column: Column, present: NDArray[np.float64], n: int) -> Shown:
    figures, bars = "no value", list[tuple[str, int]]()
    if present.size and column.kind == "number":
        low, middle, high = np.quantile(present, [0, 0.5, 1])
        figures = f"{low:.6g} to {high:.6g}, median {middle:.6g}"
        edges = np.linspace(low, high, BINS + 1)
        counts = np.bincount(np.searchsorted(edges[1:-1], present, "right"), minlength=BINS)
        bars = [(f"{edges[k]:.4g} to {edges[k + 1]:.4g}", int(count)) for k, count in enumerate(counts)]
    elif present.size:
        counts = np.bincount(present.astype(int), minlength=len(column.levels))
        ranked = [(column.levels[k], int(counts[k])) for k in np.argsort(-counts, kind="stable")]
        figures = ", ".join(_most([f"{level} {count}" for level, count in ranked], NAMED))
        rest = ranked[BINS - 1 :] if len(ranked) > BINS else []
        bars = [*ranked[: BINS - bool(rest)], *([(f"{len(rest)} others", sum(c for _, c in rest))] if rest else [])]
    return Shown(column.name, column.kind, n - len(present), figures, bars)


def _set_aside(store: Store) -> list[tuple[str, str]]:
    """(reason, scans): reasons that differ in numbers alone are one; the most frequent first."""
    groups = defaultdict(list)
    for scan, reason in store.set_aside:
        groups[re.sub(r"\d[\d.,]*", "…", reason)].append((scan, reason))
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [
        (f"{len(g)} {g[0][1] if len({why for _, why in g}) == 1 else shape}", some([scan for scan, _ in g]))
        for shape, g in ordered
    ]


def _counted(store: Store) -> list[tuple[str, str]]:
    """(column, how many values became missing for which reason)."""
    each = store.attributes["counted"].items()
    return [(name, ", ".join(f"{n} {why}" for why, n in reasons.items())) for name, reasons in each if reasons]


def _montage(store: Store) -> tuple[str, str]:
    """Figures of some scans, evenly spread, and a warning where they may show faces."""
    from cauc_dist.sheet import draw

    if len(store.shape) == 1:
        raise BadInput(f"a montage of {store.name}, a table", wanted="volumes or images", do="Leave --montage out")
    need_matplotlib()
    figures, faces = [], []
    for i in np.unique(np.linspace(0, len(store) - 1, PICTURES).astype(int)).tolist():
        volume, scan = store.volume(i), store.ids[i]
        if volume.ndim == 4 and shows_face(volume[0], store.attributes["voxel_mm"]):
            faces.append(scan)
        image = base64.b64encode(draw([("", [volume])])).decode()
        figures.append(
            f'<figure><img alt="middle slices of {_html(scan)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{_html(scan)}</figcaption></figure>"
        )
    found = f"{len(faces)} of the {len(figures)} scans shown do not look skull-stripped or defaced ({some(faces)}): "
    found += "people can be recognised by their faces. Do not share this page, nor the store"
    return "".join(figures), found if faces else ""


def shows_face(volume: NDArray[Any], voxel: Sequence[float] | None) -> bool:
    """Whether a volume (X, Y, Z) in RAS looks like a head with its face: a hint, and no proof either way. Ours.

    Tissue: what differs from the corners by more than 15 % of the 99th percentile's difference. Less than 2,500 ml of
    it is a brain, a stripped head or a crop, and no face. Else the profile of the middle 40 mm tells: a face lies
    110 to 140 mm below the crown and comes to within 25 mm of the forehead's front; where it was cut off, it is far
    behind. Without a voxel size the box is taken for the template's, and volume alone decides. Small children's heads
    are missed.
    """
    sides = np.array(voxel or [MNI_MM / volume.shape[1]] * 3)
    air = np.median(volume[np.ix_(*([0, -1],) * 3)])
    difference = np.abs(volume - air)
    tissue = difference > 0.15 * np.percentile(difference, 99)
    if tissue.sum() * sides.prod() / 1000 < HEAD_ML:
        return False
    if voxel is None:
        return True
    middle, half = np.average(np.arange(len(volume)), weights=tissue.sum((1, 2))), 20 / sides[0]
    profile = tissue[max(0, round(middle - half)) : round(middle + half) + 1].any(0)  # (Y, Z)
    front = np.where(profile.any(0), (profile.shape[0] - 1 - profile[::-1].argmax(0)) * sides[1], -math.inf)
    crown = np.flatnonzero(tissue.sum((0, 1)) * sides[0] * sides[1] > 400).max()  # mm2: no speck of noise
    below = (crown - np.arange(len(front))) * sides[2]
    forehead, face = (front[(below >= low) & (below <= high)] for low, high in ((30, 90), (110, 140)))
    return bool(face.size and forehead.size and np.median(face) > forehead.max() - 25)


def _svg(shown: Shown) -> str:
    """Bars by hand: upright for numbers, lying with their names for categories."""
    if not shown.bars:
        return ""
    most, marks = max(count for _, count in shown.bars), []
    upright = shown.kind == "number"
    for k, (label, count) in enumerate(shown.bars):
        long = 100 * count / most
        at = f"x={20 * k} y={100 - long:.1f} width=18 height={long:.1f}"
        at = at if upright else f"x=120 y={14 * k + 2} width={1.5 * long:.1f} height=11"
        marks.append(f"<rect {at} fill=currentColor opacity=.6><title>{_html(label)}: {count}</title></rect>")
        if not upright:
            marks.append(f"<text x=0 y={14 * k + 11} fill=currentColor>{_html(label[:18])}</text>")
            marks.append(f"<text x={125 + 1.5 * long:.1f} y={14 * k + 11} fill=currentColor>{count}</text>")
    height = 102 if upright else 14 * len(shown.bars) + 4
    return f'<svg viewBox="0 0 320 {height}" role=img aria-label="{_html(shown.name)}">{"".join(marks)}</svg>'


def _blocks(bars: Sequence[tuple[str, int]]) -> str:
    most = max((count for _, count in bars), default=1)
    return "".join(BLOCKS[math.ceil(8 * count / most)] for _, count in bars)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><th scope=row>{_html(name)}</th><td>{_html(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _most(lines: Sequence[str], n: int) -> list[str]:
    """n lines at most; the last counts what is left out."""
    return list(lines) if len(lines) <= n else [*lines[: n - 1], f"  and {len(lines) - n + 1} more"]


def _plain(line: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in line)


def _html(value: str) -> str:
    return html.escape(_plain(value))


def _bytes(n: float) -> str:
    unit = int(np.searchsorted([1e3, 1e6, 1e9], n, "right"))
    return f"{n / 1000**unit:.{1 if unit else 0}f} {('bytes', 'kB', 'MB', 'GB')[unit]}"
