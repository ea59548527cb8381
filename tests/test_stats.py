"""Intervals cover what they promise; tests are those of their papers, and of simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cauc_dist.errors import BadInput
from cauc_dist.reproduce.resample import Answers, Fold, difference, estimate
from cauc_dist.stats import holm, interval, nadeau_bengio, smallest_detectable


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    errors = np.random.default_rng(0).normal(10, 3, 400)
    low, high = interval(400, lambda rows: errors[rows].mean(-1))
    half = 1.96 * errors.std() / 20
    assert low == pytest.approx(errors.mean() - half, abs=0.05)
    assert high == pytest.approx(errors.mean() + half, abs=0.05)


def test_resamples_are_the_same_for_all_methods() -> None:
    seen: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = []
    for _ in range(2):
        interval(7, lambda rows: (seen.append(rows), rows.mean(-1))[1])
    assert (seen[0] == seen[1]).all()


def test_the_interval_over_subjects_covers_the_mean_in_most_repetitions() -> None:
    """93 % of 300 in truth (a percentile bootstrap of 40 skewed errors); a wrong tail or scale is far off."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        e = draw.exponential(size=40)
        low, high = interval(40, lambda rows, e=e: e[rows].mean(-1))  # type: ignore[misc]
        covered += low <= 1 <= high
    assert 0.88 < covered / 300 < 0.98


# ---- Nadeau and Bengio


@pytest.mark.parametrize(("n_train", "n_test"), [(90, 10), (80, 20), (1, 1)])
def test_the_corrected_t_is_the_formula_of_the_paper(n_train: float, n_test: float) -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 25)
    t = d.mean() / math.sqrt((1 / 25 + n_test / n_train) * sum((v - d.mean()) ** 2 for v in d) / 24)
    found = nadeau_bengio(d, n_train, n_test)
    assert found.p == pytest.approx(2 * (1 - scipy_stats.t.cdf(abs(t), 24)))
    assert (found.low + found.high) / 2 == pytest.approx(found.mean)
    assert found.mean / found.se == pytest.approx(t)


def test_without_a_test_part_it_is_the_plain_paired_t_test() -> None:
    d = np.random.default_rng(1).normal(0.2, 1, 12)
    found, plain = nadeau_bengio(d, 1.0, 0.0), scipy_stats.ttest_1samp(d, 0)
    assert found.p == pytest.approx(plain.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(plain.confidence_interval()))


def test_the_interval_leaves_out_zero_where_p_is_below_a_twentieth() -> None:
    for shift in np.linspace(0, 1.5, 16):
        found = nadeau_bengio(np.random.default_rng(2).normal(shift, 1, 20), 80, 20)
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_repeated_cross_validation_of_equal_methods_is_seldom_called_a_difference() -> None:
    """Two ridges that are equally good in truth: the plain t-test is wrong several times too often."""
    plain = corrected = 0
    runs = 120
    for run in range(runs):
        draw = np.random.default_rng([3, run])
        x = draw.normal(size=(40, 2))
        y = x.sum(1) + draw.normal(size=40)
        d = []
        for _ in range(5):
            order = draw.permutation(40)
            for test in np.split(order, 5):
                train = np.setdiff1d(order, test)
                slopes = [x[train, k] @ y[train] / (x[train, k] @ x[train, k]) for k in (0, 1)]
                e = [np.abs(y[test] - x[test, k] * slopes[k]).mean() for k in (0, 1)]
                d.append(e[0] - e[1])
        corrected += nadeau_bengio(d, 32, 8).p < 0.05
        plain += float(scipy_stats.ttest_1samp(d, 0).pvalue) < 0.05
    assert corrected / runs < 0.12
    assert plain > 3 * corrected


def test_differences_that_are_all_the_same_have_no_spread() -> None:
    assert nadeau_bengio([0.0, 0.0, 0.0], 80, 20).p == 1
    assert nadeau_bengio([2.0, 2.0, 2.0], 80, 20).p == 0


def test_one_difference_and_one_that_is_no_number_are_refused() -> None:
    with pytest.raises(BadInput, match="1 differences"):
        nadeau_bengio([1.0], 80, 20)
    with pytest.raises(BadInput, match="a difference that is no number"):
        nadeau_bengio([1.0, math.nan, 2.0], 80, 20)


# ---- Holm


def rejected_by_steps(p: list[float], alpha: float) -> set[int]:
    """Holm's own words: the smallest against alpha / m, the next against alpha / (m - 1), until one is not rejected."""
    found: set[int] = set()
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] > alpha / (len(p) - k):
            break
        found.add(i)
    return found


def test_holm_rejects_what_his_steps_reject() -> None:
    draw = np.random.default_rng(0)
    for m, alpha in itertools.product((1, 2, 7), (0.01, 0.05, 0.3)):
        for _ in range(20):
            p = (draw.random(m) ** 3).tolist()
            assert set(np.flatnonzero(holm(p) <= alpha)) == rejected_by_steps(p, alpha)


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([0.02]).tolist() == [0.02]


# ---- the smallest difference that can be found


def test_the_smallest_detectable_difference_is_found_in_four_of_five_repetitions() -> None:
    power = scipy_stats.norm.cdf(smallest_detectable(1.0) - 1.96)
    assert power == pytest.approx(0.80, abs=0.005)


# ---- over subjects and seeds


def crossed(draw: np.random.Generator, shift: float = 0.0, subjects: int = 40, seeds: int = 6) -> Answers:
    """Errors of one method: a seed's own luck, a subject's own difficulty, and noise, about 5 + shift."""
    difficulty, luck = draw.exponential(2, subjects), draw.normal(0, 0.5, seeds)
    noise = draw.exponential(0.5, (seeds, subjects))
    at, truth = np.arange(subjects), np.zeros(subjects)
    errors = 10 + shift + luck[:, None] + difficulty + noise
    return Answers("mae", subjects, {(s, 0): Fold(at, truth, errors[s]) for s in range(seeds)})


def test_the_interval_over_subjects_and_seeds_covers_the_mean_in_most_repetitions() -> None:
    """An interval of subjects alone, or of seeds alone, does not: each leaves the other's luck out."""
    draw = np.random.default_rng(4)
    found = [estimate(crossed(draw)) for _ in range(120)]
    assert 0.86 < np.mean([f.low <= 12.5 <= f.high for f in found]) < 0.99


def test_the_spread_over_subjects_and_seeds_is_at_least_that_of_both() -> None:
    draw = np.random.default_rng(5)
    values = np.array([estimate(crossed(draw)).value for _ in range(300)])
    told = np.array([estimate(crossed(draw)).se for _ in range(60)])
    assert told.mean() == pytest.approx(values.std(ddof=1), rel=0.25)


def test_a_difference_is_paired_by_subject_and_seed() -> None:
    """A method that is a tenth better for every subject and seed: far below the spread of either."""
    one = crossed(np.random.default_rng(6))
    better = Answers("mae", one.n, {k: Fold(f.at, f.truth, f.answers - 0.1) for k, f in one.folds.items()})
    gain, p, by_fold = difference(better, one)
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    assert p < 0.01
    assert by_fold == pytest.approx(np.full((6, 1), 0.1))


def test_methods_that_are_equal_are_seldom_called_different() -> None:
    draw = np.random.default_rng(7)
    found = []
    for _ in range(100):
        one = crossed(draw)
        noise = {k: Fold(f.at, f.truth, f.answers + draw.normal(0, 0.5, one.n)) for k, f in one.folds.items()}
        found.append(difference(Answers("mae", one.n, noise), one)[1])
    assert np.mean(np.array(found) < 0.05) < 0.12
