"""What `cauc probe` found: scores by method and column on the same held-out subjects, as text and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from cauc_dist.scores import balanced
from cauc_dist.stats import interval

Array = NDArray[np.float64]
KNN, AFTER = ", kNN", ", z"
"""After the name of a method: the other probe, and the representation after the projector (both: `, z, kNN`)."""
GEOMETRY = ("alignment", "uniformity", "conditional_alignment", "conditional_uniformity", "effective_rank")


@dataclass(frozen=True)
class Score:
    """One probe of one column: the headline `value` (MAE, or balanced accuracy) with its 95 % interval.

    `errors` are per held-out subject whose value is known (absolute error, or 1 = wrong), `truth` its value, in the
    order of the store; `detail` holds the other metrics.
    """

    metric: str
    value: float
    low: float
    high: float
    detail: dict[str, float]
    errors: list[float]
    truth: list[float]

    def compare(self, other: "Score") -> tuple[float, float, float]:
        """By how much this is better than `other` in its own metric, and the paired 95 % bootstrap interval of that."""
        ours, theirs, truth = np.array(self.errors), np.array(other.errors), np.array(self.truth)

        def gain(rows: NDArray[np.int64]) -> Array:
            if self.metric == "MAE":
                return (theirs - ours)[rows].mean(-1)  # type: ignore[no-any-return]
            return balanced(truth[rows], 1 - ours[rows]) - balanced(truth[rows], 1 - theirs[rows])

        return float(gain(np.arange(len(ours))[None])[0]), *interval(len(ours), gain)


Few = dict[str, tuple[float, float]]
"""By number of labels: mean over draws of the headline, and their standard deviation."""


@dataclass(frozen=True)
class Table:
    """Scores by method and column, all on the same held-out subjects of one store; `steps` of training by method."""

    store: str
    fingerprint: str
    n_train: int
    n_test: int
    columns: tuple[str, ...]
    chance: dict[str, float]
    scores: dict[str, dict[str, Score]]
    steps: dict[str, int]
    geometry: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By method, by `train` and `held-out`: of two views of as many subjects of each."""
    few: dict[str, dict[str, Few]] = field(default_factory=dict)
    """By method and column: few-label probes."""

    def difference(self, method: str, other: str, column: str) -> tuple[float, float, float]:
        """By how much `method` is better than `other` in the column's metric, with its paired 95 % interval."""
        return self.scores[method][column].compare(self.scores[other][column])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Table":
        values = json.loads(text)
        scores = {m: {c: Score(**s) for c, s in row.items()} for m, row in values.pop("scores").items()}
        few = {
            m: {c: {n: (mean, sd) for n, (mean, sd) in found.items()} for c, found in row.items()}
            for m, row in values.pop("few", {}).items()
        }
        return cls(**{**values, "columns": tuple(values["columns"])}, scores=scores, few=few)

    def __str__(self) -> str:
        """Plain text, one row a method; `*` marks a score better than the untrained encoder's (paired, 95 %)."""
        head = ["", *(f"{c} ({self._metric(c)})" for c in self.columns)]
        rows = [["chance", *(f"{self.chance[c]:.3g}" for c in self.columns)]]
        rows += [[m, *(self._cell(m, c) for c in self.columns)] for m in self.scores]
        notes = (
            f"{self.n_train} subjects to fit, {self.n_test} held out; [95 % bootstrap]; * better than untrained, paired"
        )
        return "\n".join([*_aligned([head, *rows]), notes, *self._few_lines(), *self._geometry_lines()])

    def _few_lines(self) -> list[str]:
        lines: list[str] = []
        for column in self.columns if self.few else ():
            of = {m: row[column] for m, row in self.few.items() if column in row}
            budgets = list(next(iter(of.values()), {}))
            head = [f"{column} ({self._metric(column)})", *(f"{n} labels" for n in budgets)]
            rows = [[m, *(f"{found[n][0]:.3g} +- {found[n][1]:.2g}" for n in budgets)] for m, found in of.items()]
            lines += ["", *_aligned([head, *rows])]
        return [*lines, "mean and SD over draws of the labels, the same for all methods"] if lines else []

    def _geometry_lines(self) -> list[str]:
        if not self.geometry:
            return []
        names = [n for n in GEOMETRY if any(n in part for of in self.geometry.values() for part in of.values())]
        rows = [[f"{m}, {part}", *(_number(found, n) for n in names)] for m, part, found in _parts(self.geometry)]
        note = "geometry of z: two views of as many subjects of both parts, by the kernel, t and alpha of the run"
        return ["", *_aligned([["", *(n.replace("_", " ") for n in names)], *rows]), note]

    def _metric(self, column: str) -> str:
        return next(iter(self.scores.values()))[column].metric

    def _cell(self, method: str, column: str) -> str:
        s, blind = self.scores[method][column], _untrained(method)
        # Below ten held-out subjects an interval is no ground for a mark.
        marked = blind in self.scores and method != blind and len(s.errors) >= 10
        star = marked and self.difference(method, blind, column)[1] > 0
        return f"{s.value:.3g} [{s.low:.3g}, {s.high:.3g}]{'*' if star else ''}"


def _untrained(method: str) -> str:
    """What a method is compared with: the untrained encoder by the same probe, before or after its projector."""
    bare = method.removesuffix(KNN)
    return "untrained" + (AFTER if bare.endswith(AFTER) else "") + (KNN if method.endswith(KNN) else "")


def _parts(geometry: Mapping[str, Mapping[str, dict[str, float]]]) -> list[tuple[str, str, dict[str, float]]]:
    return [(method, part, found) for method, of in geometry.items() for part, found in of.items()]


def _number(found: Mapping[str, float], name: str) -> str:
    return f"{found[name]:.3g}" if name in found else ""


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
