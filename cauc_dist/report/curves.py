"""The steps of a journal as lines: every number that they hold, and the plane of Wang & Isola (arXiv 2005.10242)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cauc_dist.report.tags import note, table

Events = list[dict[str, Any]]
TITLES = {
    "loss": "loss (its own scale for each objective)",
    "alignment": "alignment of two views (lower: closer)",
    "uniformity": "uniformity (lower: more spread)",
    "conditional_alignment": "conditional alignment (lower: similar metadata closer)",
    "conditional_uniformity": "conditional uniformity (lower: dissimilar metadata further apart)",
    "effective_rank": "effective rank of a batch's embeddings",
    "labelled": "values that the loss learns from in a batch",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "samples_per_s": "scans a second, all ranks",
    "step_s": "seconds a step",
    "data_wait_share": "share of a step that waits for scans",
    "communication_share": "share of a step that the gradient's exchange would take alone",
    "memory_gib": "peak memory of rank 0, GiB",
}
"""First those that are known, in this order, then whatever else a step holds."""
NOT_DRAWN = ("event", "time", "step", "epoch", "data_wait_s")
POINTS, PATH = 1200, 60


def curves(runs: Sequence[Events]) -> list[dict[str, Any]]:
    """One chart a field of the `step` events: name, title and, a run, its points [step, value], at most 1,200."""
    steps = [_steps(events) for events in runs]
    names = list(dict.fromkeys(name for of in steps for step in of for name in step if name not in NOT_DRAWN))
    ordered = [name for name in TITLES if name in names] + [name for name in names if name not in TITLES]
    found = []
    for name in ordered:
        lines = [_thinned([(s["step"], s[name]) for s in of if _number(s.get(name))]) for of in steps]
        if any(lines):
            title = TITLES.get(name, name.replace("_", " "))
            found.append({"name": name, "title": title, "lines": lines})
    return found


def planes(runs: Sequence[Events]) -> list[dict[str, Any]]:
    """Paths [uniformity, alignment, step] over training, each point a mean of neighbouring steps, at most 60 a run."""
    found = []
    for before, words in (("", ""), ("conditional_", "conditional ")):
        x, y = f"{before}uniformity", f"{before}alignment"
        lines = [_path([s for s in _steps(events) if _number(s.get(x)) and _number(s.get(y))], x, y) for events in runs]
        if any(lines):
            found.append({"x": f"{words}uniformity", "y": f"{words}alignment", "lines": lines})
    return found


def latest(names: Sequence[str], runs: Sequence[Events]) -> str:
    """The numbers of each run's last step as a table, which needs no script."""
    drawn = curves(runs)
    rows = [[c["title"], *(f"{line[-1][1]:.4g}" if line else "" for line in c["lines"])] for c in drawn]
    done = [["step", *(str(of[-1]["step"]) if (of := _steps(events)) else "none yet" for events in runs)]]
    return table(["at the last step", *names], done + rows) + note("Of the global batch; the lines are under Curves.")


def _steps(events: Events) -> Events:
    found = []
    for event in events:
        if event["event"] == "step":
            step = dict(event)
            if _number(step.get("data_wait_s")) and step.get("step_s"):
                step["data_wait_share"] = step["data_wait_s"] / step["step_s"]
            found.append(step)
    return found


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    """As they are, or the smallest and the largest of each run of neighbours: a spike stays."""
    if len(points) > POINTS:
        parts = np.array_split(np.arange(len(points)), POINTS // 2)
        ends = [{min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])} for part in parts]
        last = len(points) - 1
        points = [points[i] for i in sorted(set().union(*ends) | {0, last})]
    return [[step, _short(value)] for step, value in points]


def _path(steps: Events, x: str, y: str) -> list[list[float]]:
    if not steps:
        return []
    parts = np.array_split(np.arange(len(steps)), min(PATH, len(steps)))
    values = np.array([[step[x], step[y]] for step in steps])
    return [[*(_short(v) for v in values[part].mean(0)), steps[part[-1]]["step"]] for part in parts]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
