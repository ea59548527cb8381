"""results.json as text: one table a target, the comparisons, what was not had. Also between two marks of a document."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cauc_dist import durable
from cauc_dist.errors import BadInput

UNITS = {"mae": "mean absolute error", "auc": "AUC", "balanced_accuracy": "balanced accuracy"}


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [
        f"### {results['study']}\n\n{results['about']}\n\nData: {results['source']}.",
        f"Primary endpoint: {results['endpoint']}",
        *(_table(results, *key) for key in _tables(results)),
        _comparisons(results["contrasts"]),
        _within(results.get("within", [])),
        _few(results["few"]),
        _features(results["features"]),
        _notes(results),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def into(document: Path, results: Mapping[str, Any]) -> None:
    """The page between `<!-- results NAME -->` and `<!-- end NAME -->` of a document, instead of what is there.

    Raises BadInput where the document has no such marks.
    """
    text, name = document.read_text(encoding="utf-8"), results["study"]
    begin, end = f"<!-- results {name} -->\n", f"<!-- end {name} -->"
    if text.count(begin) != 1 or end not in text.partition(begin)[2]:
        raise BadInput(f"no marks of {name} in {document}", wanted=f"{begin.strip()} and {end}", do="put them there")
    before, _, rest = text.partition(begin)
    durable.replace(document, (before + begin + markdown(results) + end + rest.partition(end)[2]).encode())


def _tables(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["target"], row["evaluation"]) for row in results["rows"]))


def _table(results: Mapping[str, Any], target: str, evaluation: str) -> str:
    """Methods x probes of one target."""
    rows = [row for row in results["rows"] if (row["target"], row["evaluation"]) == (target, evaluation)]
    probes = list(dict.fromkeys(row["probe"] for row in rows))
    cell = {(row["method"], row["probe"]): f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in rows}
    first = {row["method"]: row for row in reversed(rows)}
    lines = [
        [method, first[method]["tag"], _n(first[method]), *(cell.get((method, probe), "") for probe in probes)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    title = f"**{target}**, {UNITS[rows[0]['metric']]}, {evaluation}, {rows[0]['subjects']} subjects"
    return f"{title}\n\n{_grid(['method', 'label', 'n', *probes], lines)}"


def _n(row: Mapping[str, Any]) -> str:
    folds = f" x {row['folds']} folds" if row["folds"] > 1 else ""
    return f"{row['seeds']} seeds{folds}"


def _comparisons(contrasts: Sequence[Mapping[str, Any]]) -> str:
    if not contrasts:
        return ""
    lines = [
        [
            f"**{c['arm']} - {c['other']}**" if c["primary"] else f"{c['arm']} - {c['other']}",
            f"{c['target']} ({c['tag']}), {c['probe']}, {c['evaluation']}",
            f"{c['value']:+.4f} [{c['low']:+.4f}, {c['high']:+.4f}]",
            f"{c['p']:.3g}",
            f"{c['p_holm']:.3g}",
            f"{c['smallest_detectable']:.4f}",
            f"{c['seeds']}",
        ]
        for c in contrasts
    ]
    head = ["comparison", "of", "gain", "p", "p (Holm)", "smallest detectable", "seeds"]
    note = "Gain: positive where the first is better, in the target's own unit; bold: the primary endpoint."
    return f"**Comparisons**\n\n{_grid(head, lines)}\n\n{note}"


def _few(few: Sequence[Mapping[str, Any]]) -> str:
    if not few:
        return ""
    labels = sorted({row["labels"] for row in few})
    cell = {(r["method"], r["target"], r["evaluation"], r["labels"]): _pm(r["value"], r["sd"]) for r in few}
    keys = dict.fromkeys(key[:3] for key in cell)
    lines = [[*key, *(cell.get((*key, n), "") for n in labels)] for key in keys]
    head = ["method", "target", "evaluation", *(f"{n} labels" for n in labels)]
    return f"**Few labels** of held-out targets (mean +- sd over seeds and folds)\n\n{_grid(head, lines)}"


def _within(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    edges, by = rows[0]["edges"], rows[0]["by"]
    names = [f"{by} below {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges))]
    head = ["method", "target", "label", "evaluation", *names, f"from {edges[-1]:g}"]
    lines = [
        [r["method"], r["target"], r["tag"], r["evaluation"], *(_pm(b["value"], b["sd"]) for b in r["bins"])]
        for r in rows
    ]
    return f"**AUC within bins of {by}**, linear probe (mean +- sd over seeds and folds)\n\n{_grid(head, lines)}"


def _features(features: Sequence[Mapping[str, Any]]) -> str:
    names = ["effective_rank_train", "effective_rank_held_out", "alignment", "uniformity", "conditional_uniformity"]
    names += [n for n in (f"{name}_held_out" for name in names[2:]) if any(n in f for f in features)]
    lines = [[f["method"], f["evaluation"], *(_number(f.get(name)) for name in names)] for f in features]
    head = ["method", "evaluation", *(name.replace("_", " ") for name in names)]
    title = (
        "**Features** (effective rank of h; geometry of z on training batches of the last epoch, held-out in eval mode)"
    )
    return f"{title}\n\n{_grid(head, lines)}"


def _notes(results: Mapping[str, Any]) -> str:
    made = results["provenance"]
    failed = f" Failed: {', '.join(results['failed'])}." if results["failed"] else ""
    begun = [name for name in results["unfinished"] if name not in results["failed"]]
    lacking = f" Begun, not done: {', '.join(begun)}." if begun else ""
    trained = "".join(f"; {n} trained by {commit}" for commit, n in results["commits"].items())
    return (
        "[95 % intervals, subjects and seeds resampled; comparisons across folds by Nadeau and Bengio's corrected t.] "
        "`proxy`: the loss read this label. Figures of arXiv 2111.05643: paper value unavailable. "
        f"{results['members']} members of {results['folder']}{trained}; tables by {state(made['git'])}, {made['utc']}."
        f"{failed}{lacking}"
    )


def state(git: Mapping[str, Any] | None) -> str:
    """A state of the code, in words."""
    if git is None:
        return "unknown commit"
    return f"commit {git['commit'][:12]}{' and changes' if git['dirty'] else ''}"


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]])


def _pm(value: float, sd: float | None) -> str:
    return f"{value:.3f}" if sd is None else f"{value:.3f} +- {sd:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
