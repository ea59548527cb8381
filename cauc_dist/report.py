"""One self-contained HTML page for a run or a comparison: what was run, the probe table, the curves."""

import base64
import html
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cauc_dist import journal
from cauc_dist.errors import BadInput

CURVES = {
    "loss": "loss (its own scale for each method)",
    "alignment": "alignment of two views (lower: closer)",
    "conditional_alignment": "conditional alignment (lower: similar metadata closer)",
    "uniformity": "uniformity (lower: more spread)",
    "conditional_uniformity": "conditional uniformity (lower: dissimilar metadata further apart)",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "samples_per_s": "scans a second, all ranks",
}

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
.curves img { width: 100%; background: #fff; border-radius: 4px; }
figure { margin: 0; } figcaption, .note { font-size: .875rem; opacity: .8; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def report(runs: Sequence[Path], out: Path, table: Path | None = None) -> None:
    """Write the page; `table` is the JSON of a probe, by default probe.json of the first run where it exists."""
    need_matplotlib()
    names = [run.name for run in runs]
    events = {run.name if names.count(run.name) == 1 else str(run): _events(run) for run in runs}
    if table is not None and not table.exists():
        raise BadInput(f"no table {table}", wanted="a file that `cauc probe --out` wrote", do="check the path")
    table = table or runs[0] / "probe.json"
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1"><title>cauc-dist report</title>',
        f"<style>{STYLE}</style></head><body><h1>{html.escape(', '.join(events))}</h1>",
        _scores(table) if table.exists() else "",
        "<h2>Curves</h2><div class=curves>",
        *(_curve(name, title, events) for name, title in CURVES.items()),
        "</div><h2>Runs</h2>",
        _facts(events),
        *(_description(run) for run in runs),
        "</body></html>\n",
    ]
    out.write_text("\n".join(filter(None, parts)), encoding="utf-8")


def need_matplotlib() -> None:
    """BadInput where the extra that draws the curves is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("no matplotlib", wanted="the extra `report`", do="pip install 'cauc-dist[report]'")


def _events(run: Path) -> list[dict[str, Any]]:
    events = journal.read(run)
    if not any(event["event"] == "step" for event in events):
        raise BadInput(
            f"no step in {run / journal.FILE}", wanted="a run that was trained", do="give a run folder of `cauc train`"
        )
    return events


def _scores(path: Path) -> str:
    """The probe table: methods down, columns across, headline and interval in each cell."""
    try:
        table = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path} is no table ({error})", wanted="what `cauc probe` wrote", do="probe again") from None
    columns = table["columns"]
    metric = {c: next(iter(table["scores"].values()))[c]["metric"] for c in columns}
    head = "".join(f"<th>{html.escape(c)} ({html.escape(metric[c])})</th>" for c in columns)
    rows = ["<tr><td>chance</td>" + "".join(f"<td>{table['chance'][c]:.3g}</td>" for c in columns) + "</tr>"]
    for method, scores in table["scores"].items():
        cells = "".join(_cell(scores[c]) for c in columns)
        rows.append(f"<tr><td>{html.escape(method)}</td>{cells}</tr>")
    note = (
        f"{table['n_train']} subjects to fit the probes, {table['n_test']} held out from training and probes; "
        "[95 % bootstrap interval over held-out subjects]. Chance: the training median, or one over the classes."
    )
    body = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table><p class=note>{note}</p>"
    return f"<h2>Probes of frozen features</h2>{body}"


def _cell(score: dict[str, Any]) -> str:
    detail = ", ".join(f"{name} {value:.3g}" for name, value in score["detail"].items())
    return f'<td title="{html.escape(detail)}">{score["value"]:.3g} [{score["low"]:.3g}, {score["high"]:.3g}]</td>'


def _curve(name: str, title: str, events: dict[str, list[dict[str, Any]]]) -> str:
    """One figure with a line a run; empty where no run has that field."""
    lines = {run: [(e["step"], e[name]) for e in rows if e.get(name) is not None] for run, rows in events.items()}
    if not any(lines.values()):
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for run, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=run, linewidth=1.2) if points else None
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(image.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(title)} against the step" src="data:image/svg+xml;base64,{encoded}">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def _facts(events: dict[str, list[dict[str, Any]]]) -> str:
    names = (
        "ranks",
        "device",
        "batch_size",
        "scans",
        "held_out",
        "steps_per_epoch",
        "epochs",
        "parameters",
        "zero_stage",
    )
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    rows = []
    for run, rows_of in events.items():
        facts = next(e for e in rows_of if e["event"] in journal.BEGINNINGS)
        rows.append(f"<tr><td>{html.escape(run)}</td>" + "".join(f"<td>{facts[n]}</td>" for n in names) + "</tr>")
    return f"<table><tr><th>run</th>{head}</tr>{''.join(rows)}</table>"


def _description(run: Path) -> str:
    """Configuration and provenance, folded away."""
    files = [run / name for name in ("config.json", "provenance.json") if (run / name).exists()]
    texts = "".join(f"<h4>{f.name}</h4><pre>{html.escape(f.read_text(encoding='utf-8'))}</pre>" for f in files)
    return f"<details><summary>{html.escape(run.name)}: configuration and provenance</summary>{texts}</details>"
