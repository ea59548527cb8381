"""Probes fit on the training part alone and choose as an exhaustive search does; metrics are scikit-learn's."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from sklearn import metrics
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, LeaveOneGroupOut, StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cauc_dist import scores
from cauc_dist.errors import BadInput
from cauc_dist.scores import Array, Predicted, Probe

NAN = float("nan")
REGRESSORS, CLASSIFIERS = [scores.ridge, scores.knn_regress], [scores.logistic, scores.knn_classify]
PROBES = REGRESSORS + CLASSIFIERS


def data(n: int = 90, seed: int = 0, classes: int = 0) -> tuple[Array, Array]:
    """Features of unlike scale, and a value that two of them tell."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, 6)) * np.array([1, 10, 100, 1, 1, 1]) + 5
    y = x[:, 0] + x[:, 1] / 10 + draw.normal(size=n) * 0.5
    return x, np.digitize(y, np.quantile(y, np.linspace(0, 1, classes + 1)[1:-1])).astype(float) if classes else y


def split(x: Array, y: Array, n: int = 60) -> tuple[Array, Array, Array, Array]:
    return x[:n], y[:n], x[n:], y[n:]


def classes_of(probe: Probe) -> int:
    return 2 if probe in CLASSIFIERS else 0


def test_ridge_is_that_of_the_least_leave_one_out_error() -> None:
    x, y, x_test, y_test = split(*data())
    scaled = StandardScaler().fit(x)
    u, v = scaled.transform(x), scaled.transform(x_test)

    def left_out(alpha: float) -> float:
        fits = (Ridge(alpha).fit(np.delete(u, i, 0), np.delete(y, i)) for i in range(60))
        return float(np.mean([(fit.predict(u[i : i + 1])[0] - y[i]) ** 2 for i, fit in enumerate(fits)]))

    best = min(scores.PENALTIES, key=left_out)
    assert scores.ridge(x, y, x_test, y_test).predicted == pytest.approx(Ridge(best).fit(u, y).predict(v), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_logistic_probe_chooses_as_a_grid_search_by_log_loss_does(classes: int) -> None:
    x, y, x_test, y_test = split(*data(classes=classes))
    scaled = StandardScaler().fit(x)
    grid = GridSearchCV(
        LogisticRegression(max_iter=5000, tol=1e-8),
        {"C": scores.STRENGTHS},
        scoring="neg_log_loss",
        cv=StratifiedKFold(5),
    )
    grid.fit(scaled.transform(x), y)
    found = scores.logistic(x, y, x_test, y_test)
    assert found.probability == pytest.approx(grid.predict_proba(scaled.transform(x_test)), abs=2e-3)
    assert found.classes is not None
    assert found.classes.tolist() == list(range(classes))


@pytest.mark.parametrize("classes", [0, 2])
def test_neighbours_are_as_many_as_cross_validation_finds_best(classes: int) -> None:
    x, y, x_test, y_test = split(*data(classes=classes))
    scaled = StandardScaler().fit(x)
    u = scaled.transform(x)
    kind, by = (
        (KNeighborsClassifier, "balanced_accuracy") if classes else (KNeighborsRegressor, "neg_mean_absolute_error")
    )
    cv = StratifiedKFold(5) if classes else KFold(5, shuffle=True, random_state=0)
    best = max([1, 3, 5, 10, 20], key=lambda k: cross_val_score(kind(k), u, y, scoring=by, cv=cv).mean())
    probe = scores.knn_classify if classes else scores.knn_regress
    expected = kind(best).fit(u, y).predict(scaled.transform(x_test))
    assert probe(x, y, x_test, y_test).predicted == pytest.approx(expected)


@pytest.mark.parametrize("probe", PROBES)
def test_the_scale_of_a_feature_does_not_matter_unless_taken_as_it_is(probe: Callable[..., Predicted]) -> None:
    x, y, x_test, y_test = split(*data(classes=classes_of(probe)))
    stretch = np.array([1, 1, 1, 1, 1, 1e4])
    plain, stretched = probe(x, y, x_test, y_test), probe(x * stretch, y, x_test * stretch, y_test)
    assert stretched.predicted == pytest.approx(plain.predicted)
    unit, unit_test = scores.standardised(x, x_test)
    assert probe(unit, y, unit_test, y_test, as_is=True).predicted == pytest.approx(plain.predicted)


def test_axes_taken_as_they_are_are_a_ridge_on_what_was_rotated() -> None:
    """Standardised, an axis of rounding errors would weigh as much as the first, and be off by far outside."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 3)) @ draw.normal(size=(3, 400)) + 0.1 * draw.normal(size=(60, 400))
    y = x @ draw.normal(size=400)
    centred = x - x[:40].mean(0)
    axes = np.linalg.svd(centred[:40], full_matrices=False)[2]
    rotated = centred @ axes.T
    whole = scores.ridge(centred[:40], y[:40], centred[40:], y[40:], as_is=True)
    turned = scores.ridge(rotated[:40], y[:40], rotated[40:], y[40:], as_is=True)
    assert turned.predicted == pytest.approx(whole.predicted, rel=1e-6)
    null = np.concatenate([1e-7 * draw.normal(size=40), 1e-3 * draw.normal(size=20)])[:, None]
    both = np.hstack([rotated, null])
    as_is = scores.ridge(both[:40], y[:40], both[40:], y[40:], as_is=True)
    assert scores.mae(as_is) == pytest.approx(scores.mae(turned), rel=1e-3)
    assert scores.mae(scores.ridge(both[:40], y[:40], both[40:], y[40:])) > 2 * scores.mae(turned)


@pytest.mark.parametrize("probe", PROBES)
def test_held_out_subjects_do_not_change_what_is_said_of_the_others(probe: Probe) -> None:
    x, y, x_test, y_test = split(*data(classes=classes_of(probe)))
    alone = probe(x, y, x_test[:5], y_test[:5])
    among = probe(x, y, np.concatenate([x_test[:5], x_test[5:] * 1e3]), np.concatenate([y_test[:5], y_test[:-5]]))
    assert among.predicted[:5] == pytest.approx(alone.predicted)


@pytest.mark.parametrize("probe", PROBES)
def test_subjects_whose_value_is_not_known_take_part_on_neither_side_and_are_counted(probe: Probe) -> None:
    x, y = data(classes=classes_of(probe))
    y[[3, 7, 70]] = NAN
    known = ~np.isnan(y)
    found = probe(*split(x, y))
    without = probe(*split(x[known], y[known], 58))
    assert found.predicted == pytest.approx(without.predicted)
    assert found.truth.tolist() == without.truth.tolist()
    assert (found.left_out, without.left_out) == ((2, 1), (0, 0))


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(
    ("y", "y_test", "message"),
    [
        ([NAN] * 4, [0.0, 1.0], "no training subject with a value"),
        ([1.0] * 4, [0.0, 1.0], "4 training subjects with a value, of one"),
        ([0.0, 0.0, 1.0, 1.0], [NAN, NAN], "no held-out subject has a value"),
    ],
)
def test_what_cannot_be_probed_is_refused(probe: Probe, y: list[float], y_test: list[float], message: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 2))
    with pytest.raises(BadInput, match=message):
        probe(x[:4], np.array(y), x[4:], np.array(y_test))


@pytest.mark.parametrize("probe", CLASSIFIERS)
def test_a_class_of_one_subject_is_refused_and_one_of_fewer_than_the_folds_is_not(probe: Probe) -> None:
    x, y, x_test, y_test = split(*data(classes=2))
    y[:] = 0
    y[:1] = 1
    with pytest.raises(BadInput, match="a class with 1 training subject"):
        probe(x, y, x_test, y_test)
    y[:3] = 1
    assert len(probe(x, y, x_test, y_test).predicted) == 30


def test_two_training_subjects_are_enough_for_a_regression() -> None:
    x = np.random.default_rng(0).normal(size=(5, 2))
    for probe in REGRESSORS:
        assert np.isfinite(probe(x[:2], np.array([0.0, 1.0]), x[2:], np.zeros(3)).predicted).all()


def test_of_many_subjects_a_linear_relation_is_found_in_fp32_too() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(scores.MANY + 400, 4))
    y = (x[:, 0] + 0.3 * draw.normal(size=len(x)) > 0).astype(float)
    n = scores.MANY + 100
    for probe in CLASSIFIERS:
        assert scores.balanced_accuracy(probe(*split(x, y, n))) > 0.85
    for probe in REGRESSORS:
        assert scores.r2(probe(*split(x, x[:, 0], n))) > 0.9


def test_features_that_never_change_become_zero() -> None:
    x = np.array([[1.0, 2.0], [1.0, 4.0], [1.0, 9.0]])
    fitted, other = scores.standardised(x[:2], x[2:])
    assert (fitted.tolist(), other.tolist()) == ([[0.0, -1.0], [0.0, 1.0]], [[0.0, 6.0]])


# ---- confounds


def test_features_free_of_a_confound_are_the_residuals_of_a_regression_on_the_training_part() -> None:
    draw = np.random.default_rng(0)
    c = draw.normal(size=(50, 2))
    x = draw.normal(size=(50, 3)) + c @ draw.normal(size=(2, 3)) + 7
    free, free_test = scores.residualise(x[:30], x[30:], c[:30], c[30:])
    line = LinearRegression().fit(c[:30], x[:30])
    assert free == pytest.approx(x[:30] - line.predict(c[:30]))
    assert free_test == pytest.approx(x[30:] - line.predict(c[30:]))
    assert c[:30].T @ free == pytest.approx(np.zeros((2, 3)), abs=1e-10)


def test_a_confound_that_is_not_known_is_refused() -> None:
    c = np.array([[0.0], [NAN]])
    with pytest.raises(BadInput, match="a confound that is not known"):
        scores.residualise(c, c, c, c)


# ---- metrics


def answers(seed: int, classes: int = 0, n: int = 40) -> Predicted:
    draw = np.random.default_rng(seed)
    if not classes:
        return Predicted(draw.normal(size=n), draw.normal(size=n))
    p = draw.dirichlet(np.ones(classes), n)
    truth = draw.integers(0, classes, n).astype(float)
    return Predicted(truth, p.argmax(1).astype(float), p, np.arange(classes, dtype=float))


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_numbers_are_scikit_learns(seed: int) -> None:
    p = answers(seed)
    assert scores.mae(p) == pytest.approx(metrics.mean_absolute_error(p.truth, p.predicted))
    assert scores.r2(p) == pytest.approx(metrics.r2_score(p.truth, p.predicted))
    assert scores.pearson(p) == pytest.approx(np.corrcoef(p.truth, p.predicted)[0, 1])


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_classes_are_scikit_learns(classes: int) -> None:
    p = answers(0, classes)
    assert scores.accuracy(p) == pytest.approx(metrics.accuracy_score(p.truth, p.predicted))
    assert scores.balanced_accuracy(p) == pytest.approx(metrics.balanced_accuracy_score(p.truth, p.predicted))
    assert p.probability is not None
    score = p.probability[:, 1] if classes == 2 else p.probability
    assert scores.auc(p) == pytest.approx(metrics.roc_auc_score(p.truth, score, multi_class="ovr"))


def test_balanced_accuracy_of_resamples_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    y, predicted, rows = draw.integers(0, 3, 50), draw.integers(0, 3, 50), draw.integers(0, 50, (20, 50))
    found = scores.balanced(y[rows].astype(float), (y == predicted)[rows])
    assert found == pytest.approx([metrics.balanced_accuracy_score(y[r], predicted[r]) for r in rows])


def test_metrics_that_nothing_tells_are_nan() -> None:
    one = Predicted(np.ones(3), np.ones(3), np.full((3, 2), 0.5), np.array([0.0, 1.0]))
    assert np.isnan([scores.r2(one), scores.pearson(one), scores.auc(one)]).all()


def test_a_class_that_no_held_out_subject_has_takes_no_part_in_the_auc() -> None:
    p = answers(0, 2)
    assert p.probability is not None
    third = Predicted(p.truth, p.predicted, np.hstack([p.probability, np.zeros((40, 1))]), np.arange(3.0))
    assert scores.auc(third) == scores.auc(p)
    with pytest.raises(ValueError, match="no probabilities"):
        scores.auc(answers(0))


def test_the_auc_inside_bins_is_the_auc_of_those_subjects() -> None:
    p, age = answers(0, 2), np.random.default_rng(1).uniform(20, 80, 40)
    age[:3] = NAN
    p.truth[(age > 60) & (age < 80)] = 1.0
    found = scores.auc_within(p, age, (40, 60))
    assert p.probability is not None
    for k, (low, high) in enumerate([(0, 40), (40, 60)]):
        of = (age >= low) & (age < high)
        assert found[k] == pytest.approx(metrics.roc_auc_score(p.truth[of], p.probability[of, 1]))
    assert np.isnan(found[2])  # one class alone
    assert len(found) == 3


def test_an_auc_that_age_alone_makes_is_gone_inside_bins_of_age() -> None:
    """One sex older than the other, and a score that is age: .85 over all, little inside five years."""
    draw = np.random.default_rng(0)
    sex = draw.integers(0, 2, 4000).astype(float)
    age = draw.normal(40 + 15 * sex, 10)
    p = Predicted(sex, sex, np.stack([-age, age], 1), np.array([0.0, 1.0]))
    assert scores.auc(p) > 0.8
    assert max(scores.auc_within(p, age, range(30, 66, 5))[1:-1]) < 0.65


# ---- fewer labels, other splits


def budgets_of(
    y: Array, budgets: tuple[int, ...], draws: int = 3, seed: int = 0, classes: bool | None = None
) -> dict[int, list[list[int]]]:
    """The rows that each probe was given: x is the row's number."""
    n = len(y)
    found: dict[int, list[list[int]]] = {b: [] for b in budgets}

    def keep(x: Array, y_some: Array, x_test: Array, y_test: Array) -> Predicted:
        assert y[x[:, 0].astype(int)].tolist() == y_some.tolist()
        found[len(x)].append(x[:, 0].astype(int).tolist())
        return Predicted(y_test, y_test)

    rows = np.arange(n, dtype=float)[:, None]
    scores.few_labels(rows, y, rows, y, budgets=budgets, draws=draws, seed=seed, probe=keep, classes=classes)
    return found


def test_subsets_of_few_labels_are_nested_distinct_and_the_same_for_all_methods() -> None:
    y = np.random.default_rng(0).normal(size=80)
    y[:10] = NAN
    one = budgets_of(y, (10, 20, 70))
    assert one == budgets_of(y, (10, 20, 70))
    assert one != budgets_of(y, (10, 20, 70), seed=1)
    for small, large, all_ in zip(*one.values(), strict=True):
        assert set(small) < set(large) < set(all_) == set(range(10, 80))
        assert len(set(small)) == 10
    assert len({tuple(rows) for rows in one[10]}) == 3


def test_few_labels_of_categories_are_balanced_as_long_as_they_last() -> None:
    y = np.array([0.0] * 60 + [1.0] * 30 + [2.0] * 4)
    for rows in budgets_of(y, (9, 30))[9]:
        assert np.unique(y[rows], return_counts=True)[1].tolist() == [3, 3, 3]
    for rows in budgets_of(y, (9, 30))[30]:
        assert np.unique(y[rows], return_counts=True)[1].tolist() == [13, 13, 4]


def test_ages_in_whole_years_are_drawn_as_numbers_where_that_is_said() -> None:
    """9 in 10 are thirty: of ten drawn at random about nine are; in turn, one of each age."""
    y = np.where(np.arange(200) < 180, 30.0, 31.0 + np.arange(200) % 10)
    numbers, in_turn = budgets_of(y, (10,), draws=20, classes=False), budgets_of(y, (10,), draws=20, classes=True)
    assert np.mean([(y[rows] == 30).sum() for rows in numbers[10]]) == pytest.approx(9, abs=0.8)
    assert {int((y[rows] == 30).sum()) for rows in in_turn[10]} <= {0, 1}
    x = np.random.default_rng(0).normal(size=(200, 2))
    part = (x[:150], np.arange(150.0) % 50, x[150:], y[150:])
    assert scores.few_labels(*part, budgets=(100,), draws=1, classes=False)[100][0].probability is None


def test_few_labels_choose_the_probe_by_what_is_asked_for() -> None:
    x, y = data(classes=2)
    assert scores.few_labels(*split(x, y), budgets=(20,), draws=1)[20][0].probability is not None
    assert scores.few_labels(*split(*data()), budgets=(20,), draws=1)[20][0].probability is None


def test_more_labels_than_there_are_is_refused() -> None:
    with pytest.raises(BadInput, match="60 training subjects with a value for a budget of 500"):
        scores.few_labels(*split(*data()))


def test_more_labels_are_better_on_average() -> None:
    x, y = data(400)
    found = scores.few_labels(*split(x, y, 300), budgets=(8, 200), draws=8)
    few, many = (np.mean([scores.mae(p) for p in of]) for of in found.values())
    assert many < 0.8 * few


def test_groups_left_out_are_scikit_learns() -> None:
    groups = ["b", "a", "c", "a", "b", "c", "c"]
    found = list(scores.leave_one_group_out(groups))
    assert [name for name, _, _ in found] == ["a", "b", "c"]
    expected = LeaveOneGroupOut().split(groups, groups=groups)
    for (_, fit, held), (train, test) in zip(found, expected, strict=True):
        assert (fit.tolist(), held.tolist()) == (train.tolist(), test.tolist())
    with pytest.raises(BadInput, match="the one group 'a'"):
        list(scores.leave_one_group_out(["a", "a"]))


def test_the_whole_of_a_pipeline_is_inside_the_training_part() -> None:
    """A probe equals a scikit-learn pipeline that is fitted on the training part."""
    x, y, x_test, y_test = split(*data())
    alphas = partial(make_pipeline, StandardScaler())
    found = scores.ridge(x, y, x_test, y_test).predicted
    each = [alphas(Ridge(a)).fit(x, y).predict(x_test) for a in scores.PENALTIES]
    assert min(float(np.abs(p - found).max()) for p in each) < 1e-8
