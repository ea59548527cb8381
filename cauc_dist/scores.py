"""Probes of frozen features: fitted on training subjects alone, asked about others. numpy and scikit-learn, no torch.

x (n, H) and y (n,) of the training part, x_test (m, H) and y_test (m,) of the held-out one; y float64, NaN = not known,
of categories their codes. A subject whose y is not known takes part on neither side, and is counted. Features are
standardised, and what a probe can choose is chosen, on the training part.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
PENALTIES = np.logspace(-3, 6, 28)
"""Of ridge."""
STRENGTHS, FEW_STRENGTHS = np.logspace(-4, 2, 7), np.logspace(-4, -1, 4)
"""C of the logistic probe, and where there are MANY subjects (C stands before a sum over them)."""
NEIGHBOURS, FEW_NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200), (10, 50, 200)
MANY = 5000
"""Training subjects from which on a choice is made on a tenth of them, among fewer, in fp32."""
FOLDS = 5


@dataclass(frozen=True)
class Predicted:
    """What a probe said of m held-out subjects whose value is known."""

    truth: Array
    """(m,)"""
    predicted: Array
    """(m,) a number, or the code of the likeliest class."""
    probability: Array | None = None
    """(m, k) of each class."""
    classes: Array | None = None
    """(k,) codes, of which probability has the columns."""
    left_out: tuple[int, int] = (0, 0)
    """Training and held-out subjects whose value is not known."""


Probe = Callable[[Array, Array, Array, Array], Predicted]
"""Each of the four below. `as_is`: features that are not to be standardised, since their lengths mean something (voxels
on their principal axes: of unit variance each, the last would weigh as much as the first)."""


def ridge(x: Array, y: Array, x_test: Array, y_test: Array, *, as_is: bool = False) -> Predicted:
    """Linear regression, its penalty by leave-one-out error."""
    from sklearn.linear_model import RidgeCV

    x, y, x_test, y_test, left_out = _ready(x, y, x_test, y_test, classes=False, as_is=as_is)
    return Predicted(y_test, RidgeCV(PENALTIES).fit(x, y).predict(x_test), left_out=left_out)


def knn_regress(x: Array, y: Array, x_test: Array, y_test: Array, *, as_is: bool = False) -> Predicted:
    """Mean of the nearest training subjects, their number by cross-validated error."""
    from sklearn.neighbors import KNeighborsRegressor

    x, y, x_test, y_test, left_out = _ready(x, y, x_test, y_test, classes=False, as_is=as_is)
    grid = {"n_neighbors": _neighbours(len(x))}
    search = _search(KNeighborsRegressor(), grid, "neg_mean_absolute_error", y, classes=False)
    return Predicted(y_test, search.fit(x, y).predict(x_test), left_out=left_out)


def logistic(x: Array, y: Array, x_test: Array, y_test: Array, *, as_is: bool = False) -> Predicted:
    """Logistic regression, its penalty by cross-validated log loss: accuracies of tens of subjects tie."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, y, x_test, y_test, left_out = _ready(x, y, x_test, y_test, classes=True, as_is=as_is)
    many = len(x) > MANY
    model = LogisticRegression(max_iter=100 if many else 2000, tol=1e-3 if many else 1e-4)
    with warnings.catch_warnings():
        if many:  # the last digits of a fit to thousands of images decide nothing
            warnings.simplefilter("ignore", ConvergenceWarning)
        model.set_params(C=_strength(x, y, model)).fit(x, y)
    return _classes(model, x_test, y_test, left_out)


def _strength(x: Array, y: Array, model: Any) -> float:
    """The C of least log loss over the splits, as GridSearchCV finds it, in a third of its time.

    Each fit of a split begins where the one before, of a smaller C, ended.
    """
    from sklearn.base import clone

    strengths = FEW_STRENGTHS if len(x) > MANY else STRENGTHS
    losses = np.zeros(len(strengths))
    for fit, held in _splits(y, classes=True).split(x, y):
        going = clone(model).set_params(warm_start=True)
        for k, C in enumerate(strengths):
            p = going.set_params(C=C).fit(x[fit], y[fit]).predict_proba(x[held])
            of_truth = p[np.arange(len(held)), np.searchsorted(going.classes_, y[held])]
            losses[k] -= np.log(np.maximum(of_truth, np.finfo(p.dtype).eps)).mean()
    return float(strengths[losses.argmin()])


def knn_classify(x: Array, y: Array, x_test: Array, y_test: Array, *, as_is: bool = False) -> Predicted:
    """The commonest class among the nearest training subjects, their number by cross-validated accuracy."""
    from sklearn.neighbors import KNeighborsClassifier

    x, y, x_test, y_test, left_out = _ready(x, y, x_test, y_test, classes=True, as_is=as_is)
    grid = {"n_neighbors": _neighbours(len(x))}
    search = _search(KNeighborsClassifier(), grid, "balanced_accuracy", y, classes=True)
    return _classes(search.fit(x, y), x_test, y_test, left_out)


def _classes(fitted: Any, x_test: Array, y_test: Array, left_out: tuple[int, int]) -> Predicted:
    probability = fitted.predict_proba(x_test).astype(np.float64)
    return Predicted(y_test, fitted.predict(x_test).astype(np.float64), probability, fitted.classes_, left_out)


def _search(model: Any, grid: dict[str, Any], scoring: str, y: Array, *, classes: bool) -> Any:
    """The choice among a grid, on the training part."""
    from sklearn.model_selection import GridSearchCV

    return GridSearchCV(model, grid, scoring=scoring, cv=_splits(y, classes=classes))


def _splits(y: Array, *, classes: bool) -> Any:
    """FOLDS of the training part, or of MANY subjects a tenth."""
    from sklearn.model_selection import KFold, ShuffleSplit, StratifiedKFold, StratifiedShuffleSplit

    if len(y) > MANY:
        return (StratifiedShuffleSplit if classes else ShuffleSplit)(1, test_size=0.1, random_state=0)
    if classes:
        return StratifiedKFold(min(FOLDS, int(np.unique(y, return_counts=True)[1].min())))
    return KFold(min(FOLDS, len(y)), shuffle=True, random_state=0)


def _neighbours(n: int) -> list[int]:
    """Numbers that every part of a split has."""
    return [k for k in (FEW_NEIGHBOURS if n > MANY else NEIGHBOURS) if k <= n // 2] or [1]


def _ready(
    x: Array, y: Array, x_test: Array, y_test: Array, *, classes: bool, as_is: bool
) -> tuple[Array, Array, Array, Array, tuple[int, int]]:
    """Subjects whose value is known, features standardised by the training ones; BadInput where nothing can be told."""
    known, told = ~np.isnan(y), ~np.isnan(y_test)
    left_out = (int((~known).sum()), int((~told).sum()))
    x, y, x_test, y_test = x[known], y[known], x_test[told], y_test[told]
    if len(y_test) == 0:
        raise BadInput("no held-out subject has a value", wanted="one at least", do="probe another column")
    values, counts = np.unique(y, return_counts=True)
    if len(values) < 2:
        what = "one class" if classes else "one value"
        found = f"{len(y)} training subjects with a value, of {what}" if len(y) else "no training subject with a value"
        raise BadInput(found, wanted="two different ones at least", do="probe another column, or another split")
    if classes and counts.min() < 2:
        raise BadInput(
            f"a class with {counts.min()} training subject",
            wanted="two of each: one to fit, one to choose by",
            do="leave that class out, or probe another column",
        )
    if not as_is:
        x, x_test = standardised(x, x_test)
    return x, y, x_test, y_test, left_out


def standardised(x: Array, x_test: Array) -> tuple[Array, Array]:
    """Both with the mean and deviation of the first; a constant feature becomes 0. fp32 of MANY subjects."""
    mean, std = x.mean(0), x.std(0)
    scale = np.where(std > 1e-12, std, np.inf)
    dtype: Any = np.float32 if len(x) > MANY else np.float64
    return ((x - mean) / scale).astype(dtype), ((x_test - mean) / scale).astype(dtype)


def residualise(x: Array, x_test: Array, c: Array, c_test: Array) -> tuple[Array, Array]:
    """Features less what a linear fit on confounds c (n, k), made on the training subjects, says of them."""
    if np.isnan(c).any() or np.isnan(c_test).any():
        raise BadInput("a confound that is not known", wanted="numbers for all subjects", do="fill it in, or drop them")
    one, one_test = (np.concatenate([np.ones((len(part), 1)), part], 1) for part in (c, c_test))
    slopes = np.linalg.lstsq(one, x, rcond=None)[0]
    return x - one @ slopes, x_test - one_test @ slopes


# ---- metrics ----------------------------------------------------------------------------------------------------


def mae(p: Predicted) -> float:
    """Mean absolute error."""
    return float(np.abs(p.predicted - p.truth).mean())


def r2(p: Predicted) -> float:
    """1 - squared error over that of the held-out mean; NaN where they are all the same."""
    spread = float(np.var(p.truth))
    return 1 - float(np.mean((p.predicted - p.truth) ** 2)) / spread if spread > 0 else float("nan")


def pearson(p: Predicted) -> float:
    """Correlation of what was said and what is; NaN where either is constant."""
    if np.std(p.predicted) == 0 or np.std(p.truth) == 0:
        return float("nan")
    return float(np.corrcoef(p.predicted, p.truth)[0, 1])


def accuracy(p: Predicted) -> float:
    """Share of right answers."""
    return float((p.predicted == p.truth).mean())


def balanced_accuracy(p: Predicted) -> float:
    """Mean over the classes present of the share of right answers."""
    return float(balanced(p.truth, p.predicted == p.truth))


def balanced(truth: Array, right: NDArray[Any]) -> Array:
    """Mean over the classes present in each row of truth (..., n) of the share that is right (..., n): (...,)."""
    hits = []
    for label in np.unique(truth):
        members = truth == label
        count = members.sum(-1)
        hits.append(np.where(count > 0, (members * right).sum(-1) / np.maximum(count, 1), np.nan))
    return np.nanmean(hits, axis=0)  # type: ignore[no-any-return]


def auc(p: Predicted) -> float:
    """P(score of one inside a class > of one outside), mean over classes that some have and not all; else NaN."""
    from sklearn.metrics import roc_auc_score

    if p.probability is None or p.classes is None:
        raise ValueError("these answers have no probabilities")
    told = [k for k, label in enumerate(p.classes) if 0 < (p.truth == label).sum() < len(p.truth)]
    each = [roc_auc_score(p.truth == p.classes[k], p.probability[:, k]) for k in told]
    return float(np.mean(each)) if each else float("nan")


def auc_within(p: Predicted, column: Array, edges: Sequence[float]) -> list[float]:
    """AUC inside the bins of another column (m,), e.g. of sex inside bins of age; NaN where a bin has one class."""
    bins = np.digitize(column, edges)
    found = []
    for b in range(len(edges) + 1):
        inside = (bins == b) & ~np.isnan(column)
        probability = None if p.probability is None else p.probability[inside]
        part = Predicted(p.truth[inside], p.predicted[inside], probability, p.classes)
        found.append(auc(part) if inside.any() else float("nan"))
    return found


# ---- fewer labels, other splits --------------------------------------------------------------


def few_labels(
    x: Array,
    y: Array,
    x_test: Array,
    y_test: Array,
    *,
    budgets: Sequence[int] = (100, 300, 500),
    draws: int = 5,
    seed: int = 0,
    probe: Probe | None = None,
    classes: bool | None = None,
) -> dict[int, list[Predicted]]:
    """By budget, the answers of probes that were fitted on so many labels: nested random subsets, `draws` of them.

    The subsets depend on y, classes and seed alone, so that methods are paired. Of `classes` each comes in turn, so
    that none is missing as long as the budget holds two of each. Say whether y is of classes: where that is not said,
    whole numbers of at most 100 values are taken for codes, and so are ages in whole years. `probe`: by default
    logistic of classes, else ridge.
    """
    known = np.flatnonzero(~np.isnan(y))
    if max(budgets) > len(known):
        found = f"{len(known)} training subjects with a value for a budget of {max(budgets)}"
        raise BadInput(found, wanted="as many as the largest budget", do="choose smaller budgets")
    if classes is None:
        values = np.unique(y[known])
        classes = len(values) <= 100 and bool((values == np.round(values)).all()) and len(values) < len(known) / 2
    fit = probe or (logistic if classes else ridge)
    found_of: dict[int, list[Predicted]] = {budget: [] for budget in budgets}
    for draw in range(draws):
        order = _in_turn(known, y, np.random.default_rng([seed, draw]), classes=classes)
        for budget in budgets:
            some = np.sort(order[:budget])
            found_of[budget].append(fit(x[some], y[some], x_test, y_test))
    return found_of


def _in_turn(known: Rows, y: Array, draw: np.random.Generator, *, classes: bool) -> Rows:
    """A random order; of categories one of each class after the other, as long as they last."""
    order = draw.permutation(known)
    if not classes:
        return order
    turn = np.empty(len(order), np.int64)
    for label in np.unique(y[known]):
        of = y[order] == label
        turn[of] = np.arange(of.sum())
    return order[np.argsort(turn, kind="stable")]


def leave_one_group_out(groups: Sequence[str]) -> Iterator[tuple[str, Rows, Rows]]:
    """(group, rows of the others, its rows) for each group, e.g. each site; BadInput where there is but one."""
    names = np.asarray(groups)
    if len(np.unique(names)) < 2:
        raise BadInput(f"the one group {str(names[0])!r}", wanted="two groups at least", do="probe without groups")
    for name in np.unique(names):
        yield str(name), np.flatnonzero(names != name), np.flatnonzero(names == name)
