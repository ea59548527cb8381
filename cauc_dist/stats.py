"""Intervals over subjects, and tests between methods that share subjects, folds and seeds. numpy and scipy alone.

Over subjects AND seeds: cauc_dist.reproduce.resample.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from cauc_dist.errors import BadInput

BOOTSTRAPS = 10_000


def interval(
    n: int, statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic of n held-out subjects.

    `statistic` maps row numbers (B, n) to (B,). The resamples depend on n and seed alone, so that methods are paired.
    """
    rows = np.random.default_rng(seed).integers(0, n, (BOOTSTRAPS, n))
    low, high = np.percentile(statistic(rows), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Corrected:
    """A mean difference with its 95 % interval, standard error and two-sided p."""

    mean: float
    low: float
    high: float
    se: float
    p: float


def nadeau_bengio(d: ArrayLike, n_train: float, n_test: float) -> Corrected:
    """The corrected resampled t-test of J differences d (J,), one a fold and repeat   (Nadeau & Bengio 2003).

    t = mean(d) / sqrt((1/J + n_test/n_train) var(d)), J - 1 degrees of freedom: training sets overlap, so that plain
    1/J would promise too much. Differences that are all the same have p 1 where they are 0, else 0.
    """
    x = np.asarray(d, np.float64).ravel()
    if not np.isfinite(x).all():
        raise BadInput("a difference that is no number", wanted="numbers", do="look at the run that it came from")
    if len(x) < 2:
        raise BadInput(f"{len(x)} differences", wanted="two folds or more", do="run more folds or seeds")
    se = math.sqrt((1 / len(x) + n_test / n_train) * float(x.var(ddof=1)))
    mean, half = float(x.mean()), float(student.ppf(0.975, len(x) - 1)) * se
    p = 2 * float(student.sf(abs(mean) / se, len(x) - 1)) if se > 0 else float(mean == 0)
    return Corrected(mean, mean - half, mean + half, se, p)


def holm(p: Sequence[float]) -> NDArray[np.float64]:
    """p-values (m,) made larger so that the chance of one false finding among all m is what each says (Holm 1979)."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    found = np.empty_like(values)
    found[order] = np.minimum(stepped, 1.0)
    return found


def smallest_detectable(se: float) -> float:
    """The difference that a two-sided test at .05 finds in 80 % of repetitions: (1.96 + .84) SE."""
    return 2.8 * se
