"""The table of `cauc probe` as HTML: headline and interval in each cell, few labels and geometry below."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cauc_dist.errors import BadInput
from cauc_dist.report.tags import note, table, text

GEOMETRY = ("alignment", "uniformity", "conditional_alignment", "conditional_uniformity", "effective_rank")


def scores(path: Path, scrub: Callable[[str], str] = str) -> str:
    """All that the file holds, its methods (names of runs) by `scrub`; BadInput where it is no table."""
    try:
        found = json.loads(path.read_bytes())
        for part in ("scores", "few", "geometry"):
            if part in found:
                found[part] = {scrub(method): of for method, of in found[part].items()}
        return _headlines(found) + _few(found) + _geometry(found)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise BadInput(f"{path} is no table ({error})", wanted="what `cauc probe` wrote", do="probe again") from None


def _metrics(found: dict[str, Any]) -> dict[str, str]:
    return {c: next(iter(found["scores"].values()))[c]["metric"] for c in found["columns"]}


def _headlines(found: dict[str, Any]) -> str:
    columns, metric = found["columns"], _metrics(found)
    head = "".join(f"<th scope=col>{text(c)} ({text(metric[c])})</th>" for c in columns)
    chance = "".join(f"<td>{found['chance'][c]:.3g}</td>" for c in columns)
    rows = [f"<tr><th scope=row>chance</th>{chance}</tr>"]
    for method, of in found["scores"].items():
        rows.append(f"<tr><th scope=row>{text(method)}</th>{''.join(_cell(of[c]) for c in columns)}</tr>")
    told = (
        f"{found['n_train']} scans to fit the probes, {found['n_test']} held out from training and probes; "
        "[95 % bootstrap interval over held-out scans]. Chance: the training median, or one over the classes. "
        "MAE: lower is better; balanced acc.: higher is."
    )
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class=wide tabindex=0><table>{body}</table></div>{note(told)}"


def _cell(score: dict[str, Any]) -> str:
    detail = ", ".join(f"{name} {value:.3g}" for name, value in score["detail"].items())
    return f'<td title="{text(detail)}">{score["value"]:.3g} [{score["low"]:.3g}, {score["high"]:.3g}]</td>'


def _few(found: dict[str, Any]) -> str:
    told, metric = "", _metrics(found)
    for column in found["columns"]:
        of = {method: row[column] for method, row in found.get("few", {}).items() if column in row}
        budgets = list(next(iter(of.values()), {}))
        rows = [[m, *(f"{each[n][0]:.3g} ± {each[n][1]:.2g}" for n in budgets)] for m, each in of.items()]
        told += table([f"{column} ({metric[column]})", *(f"{n} labels" for n in budgets)], rows)
    after = note("Mean and standard deviation over draws of the labels, the same for all methods.")
    return f"<h3>With few labels</h3>{told}{after}" if told else ""


def _geometry(found: dict[str, Any]) -> str:
    parts = [(f"{m}, {p}", g) for m, of in found.get("geometry", {}).items() for p, g in of.items()]
    names = [name for name in GEOMETRY if any(name in g for _, g in parts)]
    rows = [[name, *(f"{g[n]:.3g}" if n in g else "" for n in names)] for name, g in parts]
    told = table(["", *(name.replace("_", " ") for name in names)], rows)
    after = note("Of z: two views of as many subjects of both parts, by the kernel, t and alpha of the run.")
    return f"<h3>Geometry of the embeddings</h3>{told}{after}" if told else ""
