"""IXI with hidden ages: what each way of treating a missing label makes of the subjects that lack one."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cauc_dist.config import RunConfig
from cauc_dist.studies.ixi import AGE, ROI, SEX, TEST, open_base
from cauc_dist.study import Contrast, Study, under

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cauc_dist.store.reader import Store

    Entries = list[str] | NDArray[np.float64]

SHARES = (25, 50, 75)
"""Per cent of the training ages that are hidden."""
MECHANISMS = ("random", "old")
"""Hidden without regard to age, or the older the likelier."""
POLICIES = ("marginal", "distinct")
"""`ignore` is `distinct` for a kernel of one column: a pair of which nothing is known has w = 0."""


def ixi_roi_hidden() -> Study:
    """Hidden ages at 0, 25, 50, 75 %, at random and by age; nested masks, the same for all methods."""
    run = open_base()
    arms = {
        "simclr": under(run, name="simclr"),
        "cauc_0": under(run, name="cauc"),
        "calign_unif_0": under(run, name="calign_unif"),
        "supervised_0": under(run, name="squared_error", lambda_align=None),
    }
    stands_for: dict[str, str] = {}
    visible: dict[str, dict[str, str]] = {}
    for mechanism in MECHANISMS:
        for share in SHARES:
            column = f"age_{mechanism}{share}"
            stands_for |= {column: "age", f"{column}_filled": "age"}
            for name, arm in _arms(run, column):
                arms[f"{name}_{mechanism}{share}"] = arm
                visible[f"{name}_{mechanism}{share}"] = {"age": column}
    masks = [f"{mechanism}{share}" for mechanism in MECHANISMS for share in SHARES]
    contrasts = [
        contrast
        for mask in masks
        for contrast in (
            Contrast(f"cauc_marginal_{mask}", f"cauc_complete_{mask}", "age", "test", f"linear:age_{mask}"),
            Contrast(f"cauc_marginal_{mask}", "simclr", "age", "test", f"linear:age_{mask}"),
            Contrast(f"cauc_marginal_{mask}", f"calign_unif_marginal_{mask}", "sex", "test"),
        )
    ]
    primary = Contrast("cauc_marginal_old50", "cauc_complete_old50", "age", "test", "linear:age_old50")
    return Study(
        name="ixi_roi_hidden",
        about="Ages of training subjects hidden from pre-training: complete cases, filled with the mean, or a policy.",
        source=dataclasses.replace(ROI, columns=hidden),
        arms=arms,
        evaluations=(TEST,),
        targets=(AGE, SEX),
        primary=primary,
        endpoint=(
            "Mean absolute error of age (a proxy, hidden from pre-training and probe alike) on the 90 test subjects, "
            "half of the training ages hidden, the older the likelier, ridge probe fitted on the visible ages: cauc on "
            "all subjects with policy marginal less cauc on complete cases."
        ),
        contrasts=tuple(contrast for contrast in contrasts if contrast != primary),
        stands_for=stands_for,
        visible=visible,
    )


def _arms(run: RunConfig, column: str) -> Iterator[tuple[str, RunConfig]]:
    for policy in POLICIES:
        yield f"cauc_{policy}", under(run, name="cauc", kernel=(f"{column}:gaussian:5:{policy}",))
    yield "calign_unif_marginal", under(run, name="calign_unif", kernel=(f"{column}:gaussian:5",))
    yield "cauc_filled", under(run, name="cauc", kernel=(f"{column}_filled:gaussian:5",))
    complete = dataclasses.replace(run.data, split=f"complete_{column}")
    yield "cauc_complete", dataclasses.replace(under(run, name="cauc"), data=complete)
    yield "supervised", under(run, name="squared_error", lambda_align=None, kernel=(f"{column}:gaussian:5",))


def hidden(store: "Store") -> "dict[str, Entries]":
    """age_MECHANISMshare (NaN: hidden), the same filled with the mean of what is visible, and complete-case splits.

    A subject has one place in a mechanism's order, and the first so many are hidden: masks are nested. `old`: the place
    of u^(1/w), w = e^(2 z) for z the standardised age (weighted sampling without replacement, Efraimidis and
    Spirakis 2006), u uniform.
    """
    import numpy as np

    age = store.metadata(["age"])[:, 0]
    part = store.metadata(["split"])[:, 0]
    train = part == store.column("split").levels.index("train")
    z = (age - age[train].mean()) / age[train].std()
    u = np.random.default_rng(0).random((2, len(store)))
    order = {"random": u[0], "old": -(u[1] ** np.exp(-2 * z))}
    columns: dict[str, Entries] = {}
    for mechanism, place in order.items():
        for share in SHARES:
            name = f"age_{mechanism}{share}"
            gone = train & (place <= np.quantile(place[train], share / 100))
            columns[name] = np.where(gone, np.nan, age)
            columns[f"{name}_filled"] = np.where(gone, age[train & ~gone].mean(), age)
            kept = np.where(train, "train", "validation")
            columns[f"complete_{name}"] = np.where(gone, "", kept).tolist()
    return columns
