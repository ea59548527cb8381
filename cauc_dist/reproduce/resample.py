"""A metric as a function of how often each subject was drawn: intervals over subjects AND seeds.

B draws, N subjects of a study, S seeds, F folds, m subjects held out of one fold. A draw is counts (B, N): what a
resample with replacement of the N subjects holds of each; all scans of a subject come together. The same draws serve
all methods: differences are paired.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cauc_dist.study import Metric

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
DRAWS = 2000
SIGN = {"mae": -1.0, "auc": 1.0, "balanced_accuracy": 1.0}
"""Of better."""


@dataclass(frozen=True)
class Fold:
    """What one trained encoder said of its m held-out subjects: their places among the N, truth, answers."""

    at: Rows
    truth: Floats
    answers: Floats


@dataclass(frozen=True, eq=False)
class Answers:
    """One method on one target by one probe: folds by (seed, fold)."""

    metric: Metric
    n: int
    """Subjects of the study."""
    folds: Mapping[tuple[int, int], Fold]

    @property
    def seeds(self) -> list[int]:
        """Those of which every fold is there."""
        all_folds = {fold for _, fold in self.folds}
        found = sorted({seed for seed, _ in self.folds})
        return [s for s in found if all((s, f) in self.folds for f in all_folds)]

    @cached_property
    def values(self) -> Floats:
        """(S, F): the metric as it is."""
        whole: Floats = self.resampled(np.ones((1, self.n)))[0]
        return whole

    @cached_property
    def draws(self) -> Floats:
        """(B, S, F): the metric of resampled subjects."""
        return self.resampled(subject_counts(self.n))

    def resampled(self, counts: Floats) -> Floats:
        """counts (B, N) -> (B, S, F); NaN where a draw leaves nothing to judge by."""
        numbers = sorted({fold for _, fold in self.folds})
        by_seed = [[_METRICS[self.metric](counts, self.folds[s, f]) for f in numbers] for s in self.seeds]
        return np.moveaxis(np.array(by_seed), -1, 0)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    se: float


def estimate(answers: Answers) -> Estimate:
    """The mean over folds and seeds; subjects and seeds resampled."""
    return _estimate(answers.values, answers.draws)


def difference(a: Answers, b: Answers) -> tuple[Estimate, float, Floats]:
    """By how much a is better than b, paired by subject and seed: (estimate, two-sided p, the seeds' folds (S, F)).

    p: twice the smaller share of draws on one side of 0, one added to each count. Seeds that one side lacks are left
    out.
    """
    both = [s for s in a.seeds if s in b.seeds]
    sign = SIGN[a.metric]
    mine, theirs = [a.seeds.index(s) for s in both], [b.seeds.index(s) for s in both]
    values = sign * (a.values[mine] - b.values[theirs])
    draws = sign * (a.draws[:, mine] - b.draws[:, theirs])
    means = _means(draws)
    low, high = np.sum(means <= 0), np.sum(means >= 0)
    p = min(1.0, 2 * (min(low, high) + 1) / (len(means) + 1))
    return _estimate(values, draws), float(p), values


def subject_counts(n: int, draws: int = DRAWS) -> Floats:
    """(B, n): how often each of n subjects is drawn; of n alone, so that methods are paired."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)


def _estimate(values: Floats, draws: Floats) -> Estimate:
    means = _means(draws)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), float(means.std(ddof=1)))


def _means(draws: Floats) -> Floats:
    """(B, S, F) -> (at most B,): of the seeds of each draw, resampled too; a draw that says nothing is left out."""
    b, s, _ = draws.shape
    weights = np.random.default_rng(1).multinomial(s, np.full(s, 1 / s), b)[..., None] * ~np.isnan(draws)
    total = weights.sum((1, 2))
    means: Floats = (np.nan_to_num(draws) * weights).sum((1, 2))[total > 0] / total[total > 0]
    return means


def _mae(counts: Floats, fold: Fold) -> Floats:
    c = counts[:, fold.at]
    mean: Floats = c @ np.abs(fold.answers - fold.truth) / _some(c.sum(1))
    return mean


def _auc(counts: Floats, fold: Fold) -> Floats:
    """P(answer of the second class > of the first), ties half."""
    second = fold.truth == fold.truth.max()
    p, q = fold.answers[second][:, None], fold.answers[~second][None]
    c, d = counts[:, fold.at[second]], counts[:, fold.at[~second]]
    wins = (p > q) + 0.5 * (p == q)
    share: Floats = ((c @ wins) * d).sum(1) / _some(c.sum(1) * d.sum(1))
    return share


def _balanced_accuracy(counts: Floats, fold: Fold) -> Floats:
    right = (fold.answers == fold.truth).astype(np.float64)
    shares = np.zeros(len(counts))
    present = np.zeros(len(counts))
    for label in np.unique(fold.truth):
        of = fold.truth == label
        c = counts[:, fold.at[of]]
        drawn = c.sum(1)
        shares += c @ right[of] / np.maximum(drawn, 1)
        present += drawn > 0
    return shares / _some(present)


def _some(total: Floats) -> Floats:
    """NaN for 0: a division that means nothing."""
    some: Floats = np.where(total > 0, total, np.nan)
    return some


_METRICS = {"mae": _mae, "auc": _auc, "balanced_accuracy": _balanced_accuracy}
