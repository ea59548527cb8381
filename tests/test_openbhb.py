"""The challenge's score is that of its own estimators, whatever else our probes do."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, mean_absolute_error
from sklearn.model_selection import KFold, StratifiedKFold

from cauc_dist.errors import BadInput
from cauc_dist.openbhb import openbhb
from cauc_dist.scores import Array

Cohort = tuple[Array, Array, Array]


def cohort(n: int, seed: int, strength: float = 1.0) -> Cohort:
    """Features of unlike scale that tell age, and site by `strength`."""
    draw = np.random.default_rng(seed)
    age, site = draw.uniform(6, 80, n), (np.arange(n) % 4).astype(float)
    x = draw.normal(size=(n, 8))
    x[:, 0] += age / 10
    x[:, 1] += strength * site
    return x * np.logspace(-1, 1, 8), age, site


def by_hand(fit: Cohort, internal: tuple[Array, Array], external: tuple[Array, Array]) -> float:
    x, age, site = fit
    grid = [0.01, 0.1, 1.0, 10.0, 100.0]
    parts, by_site = list(KFold(5).split(x)), list(StratifiedKFold(5).split(x, site))

    def logistic(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, solver="saga", max_iter=150, random_state=0)

    def r2(alpha: float) -> float:
        return float(np.mean([Ridge(alpha).fit(x[a], age[a]).score(x[b], age[b]) for a, b in parts]))

    def told(c: float) -> float:
        each = (balanced_accuracy_score(site[b], logistic(c).fit(x[a], site[a]).predict(x[b])) for a, b in by_site)
        return float(np.mean(list(each)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        of_site = logistic(max(grid, key=told)).fit(x, site)
    of_age = Ridge(max(grid, key=r2)).fit(x, age)
    accuracy = balanced_accuracy_score(internal[1], of_site.predict(internal[0]))
    return float(accuracy**0.3 * mean_absolute_error(external[1], of_age.predict(external[0])))


def test_the_score_is_that_of_the_challenges_own_estimators() -> None:
    fit, inside, outside = cohort(120, 0), cohort(60, 1), cohort(50, 2)
    internal, external = (inside[0], inside[2]), (outside[0], outside[1])
    found = openbhb(*fit, internal, external)
    assert found["score"] == pytest.approx(by_hand(fit, internal, external), rel=1e-9)
    assert found["score"] == found["site_balanced_accuracy"] ** 0.3 * found["age_mae"]


def test_internal_scans_of_a_site_that_was_not_seen_are_left_out() -> None:
    fit, inside, outside = cohort(120, 0), cohort(60, 1), cohort(50, 2)
    strange = inside[2].copy()
    strange[:9] = 77.0
    external = (outside[0], outside[1])
    found = openbhb(*fit, (inside[0], strange), external)
    assert found == openbhb(*fit, (inside[0][9:], inside[2][9:]), external)


def test_features_that_tell_the_site_score_worse() -> None:
    def score(strength: float) -> float:
        fit, inside, outside = (cohort(n, s, strength) for n, s in ((120, 0), (60, 1), (50, 2)))
        return openbhb(*fit, (inside[0], inside[2]), (outside[0], outside[1]))["score"]

    assert score(10.0) > score(0.0)


def test_what_the_challenge_does_not_allow_is_refused() -> None:
    x, age, site = cohort(40, 0)
    other = ((x, site), (x, age))
    with pytest.raises(BadInput, match="an age or a site that is not known"):
        openbhb(x, np.where(age < 10, np.nan, age), site, *other)
    with pytest.raises(BadInput, match="4 sites, of the smallest 2 subjects"):
        openbhb(x[:11], age[:11], site[:11], *other)
    with pytest.raises(BadInput, match="10001 features"):
        openbhb(np.zeros((40, 10_001)), age, site, *other)
