"""What is told of runs, gathered as JSON and tables, and the one HTML file that shows it without any other."""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from cauc_dist import config, journal
from cauc_dist.errors import BadInput
from cauc_dist.report.curves import curves, latest, planes
from cauc_dist.report.described import described
from cauc_dist.report.hidden import Hidden
from cauc_dist.report.incidents import checkpoints, incident_table, incidents, marks
from cauc_dist.report.probes import scores
from cauc_dist.report.tags import note, text
from cauc_dist.store.reader import Store

Maps = Callable[[Path, Hidden], dict[str, Any]]
"""A run -> what `report.maps.maps` gives; BadInput where there is none."""
SECTIONS = {
    "runs": "What was run",
    "latest": "Where it stands",
    "curves": "Curves",
    "plane": "Alignment and uniformity over time",
    "incidents": "Restarts and faults",
    "map": "Map of the representations",
    "weights": "Weights of a batch",
    "pairs": "Similarity against metadata distance",
    "probes": "Probes of frozen features",
}
DRAWN = ("curves", "plane", "map", "weights", "pairs")
"""Sections that the page's script fills."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

FAILURES = (OSError, ValueError, KeyError, RuntimeError)
"""Of maps: a training at work may just have dropped what was read, or fill the GPU."""


@dataclass(frozen=True)
class Told:
    """The runs of a page, and how their subjects are named on it."""

    runs: tuple[Path, ...]
    maps: Maps
    table: Path | None = None
    live: bool = False
    hidden: Hidden = field(default_factory=Hidden)

    def gather(self) -> dict[str, Any]:
        """All that the page shows, as JSON; `tables` are HTML, made of escaped text alone. Journals are read anew."""
        for run in self.runs:
            _learn_ids(run, self.hidden)
        names = self._names()
        events = [journal.read(run) for run in self.runs]
        befell = [incidents(of, self.hidden) for of in events]
        return {
            "live": self.live,
            "made": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "runs": names,
            "curves": curves(events),
            "planes": planes(events),
            "marks": marks(befell),
            "maps": [self._map(run) for run in self.runs],
            "ids": self.hidden.show_ids,
            "tables": {
                "runs": described(names, self.runs, events, self.hidden),
                "latest": latest(names, events),
                "incidents": incident_table(names, befell, [checkpoints(of) for of in events]),
                "probes": self._probes(names),
            },
        }

    def _names(self) -> list[str]:
        """Of their folders, or their paths where two are called alike."""
        short = [run.name or str(run.absolute().name) for run in self.runs]
        each = [name if short.count(name) == 1 else str(run) for name, run in zip(short, self.runs, strict=True)]
        return [self.hidden.scrub(name) for name in each]

    def _map(self, run: Path) -> dict[str, Any]:
        try:
            return self.maps(run, self.hidden)
        except FAILURES as error:
            return {"why": self.hidden.scrub(str(error))}

    def _probes(self, names: Sequence[str]) -> str:
        tables = {str(self.table): self.table} if self.table else {}
        tables = tables or {n: run / "probe.json" for n, run in zip(names, self.runs, strict=True)}
        there = {name: path for name, path in tables.items() if path.exists()}
        told = [
            (f"<h3>{text(name)}</h3>" if len(there) > 1 else "") + scores(path, self.hidden.scrub)
            for name, path in there.items()
        ]
        return "".join(told) or note("No probe.json in the runs: `cauc probe RUN` writes it.")


def html(told: dict[str, Any]) -> str:
    """The page: style, tables, the JSON block, the script that draws from it. Nothing is loaded from anywhere else."""
    names = ", ".join(told["runs"])
    rest = {key: value for key, value in told.items() if key != "tables"}
    policy = POLICY + ("; connect-src 'self'" if told["live"] else "")
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f'<meta http-equiv=Content-Security-Policy content="{policy}">',
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        '<meta name=color-scheme content="light dark"><link rel=icon href="data:,">',
        f"<title>{text(names)} · cauc report</title><style>{_part('page.css')}</style></head>",
        f"<body><header><h1>{text(names)}</h1><p class=note><span id=made>{text(told['made'])}</span>",
        " · cauc report</p>" + _hint(told["ids"]),
        f"<nav>{''.join(f'<a href=#{key}>{title}</a>' for key, title in SECTIONS.items())}</nav></header><main>",
        *(_section(key, title, told) for key, title in SECTIONS.items()),
        "</main><div id=tip role=status hidden></div>",
        f"<script type=application/json id=data>{_json(rest)}</script>",
        f"<script>{_part('page.js')}</script></body></html>\n",
    ]
    return "\n".join(parts)


def block(told: dict[str, Any]) -> bytes:
    """The same JSON for a page that is open, its tables with it."""
    return json.dumps(told, allow_nan=False).encode()


def _learn_ids(run: Path, hidden: Hidden) -> None:
    """Which words of a run's files are ids: its store knows. A store that is gone is told of where maps are."""
    with contextlib.suppress(BadInput, OSError):
        store = Store.open(config.read(run / "config.json").data.store)
        hidden.knows(store.fingerprint, store.ids, store.subjects)


def _section(key: str, title: str, told: dict[str, Any]) -> str:
    without = "<noscript><p class=note>Drawn by a script, which this browser does not run.</p></noscript>"
    why = ""
    if key == "map":  # the script draws it anew, once there is a map
        why = "".join(note(f"{n}: {m['why']}") for n, m in zip(told["runs"], told["maps"], strict=True) if "why" in m)
    drawn = f"{without}<div class=drawn>{why}</div>"
    inner = drawn if key in DRAWN else f"<div class=told>{told['tables'][key]}</div>"
    return f"<section id={key}><h2>{title}</h2>{inner}</section>"


def _hint(ids: bool) -> str:
    if ids:
        words = "This page names subjects by their ids. Give it to nobody who may not see them."
        return f"<p class=warning role=alert>{words}</p>"
    return note("Subjects are shown as hashes with a salt that was drawn for this page and is kept nowhere.")


def _json(values: dict[str, Any]) -> str:
    """Nothing in it can end the script element, nor begin a comment in it."""
    escaped = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return escaped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return files("cauc_dist.report").joinpath(name).read_text(encoding="utf-8")
