"""The score of the OpenBHB challenge: how well features tell age at other sites, and how badly they tell the site."""

import warnings

import numpy as np

from cauc_dist.errors import BadInput
from cauc_dist.scores import Array, Predicted, balanced_accuracy, mae

GRID = 10.0 ** np.arange(-2, 3)
"""Ridge's alpha, and the logistic C."""
FOLDS, MOST_FEATURES = 5, 10_000


def openbhb(
    x: Array, age: Array, site: Array, internal: tuple[Array, Array], external: tuple[Array, Array]
) -> dict[str, float]:
    """Balanced accuracy of site ^ .3 x MAE of age, lower is better (Dufumier et al., OpenBHB, NeuroImage 263, 2022).

    x (n, H), age and site (n,) to fit on; `internal` (features, sites) of the test subjects from sites that were seen
    (one of another site is left out), `external` (features, ages) of those from others. Estimators as in problem.py of
    the challenge (github.com/ramp-kits/brain_age_with_site_removal): features as they are, Ridge by R2, logistic
    regression by balanced accuracy (saga, 150 iterations; here with a seed), 5 folds, at most 10,000 features. The
    formula is the paper's; the versions of that file that we could read have an older one. The official test sets are
    private: of public data this is no challenge score.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV

    _check(x, age, site)
    of_age = GridSearchCV(Ridge(), {"alpha": GRID}, cv=FOLDS, scoring="r2")
    saga = LogisticRegression(solver="saga", max_iter=150, random_state=0)
    of_site = GridSearchCV(saga, {"C": GRID}, cv=FOLDS, scoring="balanced_accuracy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so few iterations are the challenge's
        of_site.fit(x, site)
    error = mae(Predicted(external[1], of_age.fit(x, age).predict(external[0])))
    seen = np.isin(internal[1], site)
    told = balanced_accuracy(Predicted(internal[1][seen], of_site.predict(internal[0][seen])))
    return {"score": told**0.3 * error, "age_mae": error, "site_balanced_accuracy": told}


def _check(x: Array, age: Array, site: Array) -> None:
    if np.isnan(age).any() or np.isnan(site).any():
        raise BadInput("an age or a site that is not known", wanted="both of all to fit on", do="leave that scan out")
    sites, counts = np.unique(site, return_counts=True)
    if len(sites) < 2 or counts.min() < FOLDS:
        found = f"{len(sites)} sites, of the smallest {counts.min()} subjects to fit on"
        raise BadInput(found, wanted=f"two, and {FOLDS} of each: one a fold", do="leave small sites out")
    if x.shape[1] > MOST_FEATURES:
        raise BadInput(f"{x.shape[1]} features", wanted="10,000, the challenge's most", do="embed into fewer")
