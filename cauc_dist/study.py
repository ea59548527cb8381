"""The typed description of a study: methods x seeds x splits on one store, and what is asked of their features.

An arm is a RunConfig. A column is a `proxy` for an arm whose loss read its values, else a `held-out target`: the claim
(conditional alignment + conditional uniformity against conditional alignment + global uniformity) rests on the latter.
Imports no torch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cauc_dist.config import Objective, RunConfig
from cauc_dist.errors import BadInput, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cauc_dist.store.reader import Store

Metric = Literal["mae", "auc", "balanced_accuracy"]
Tag = Literal["proxy", "held-out target"]
LABEL_FREE = ("simclr", "align_uniform")
"""Objectives whose gradient reads no metadata; a kernel serves them to watch the geometry by."""


@dataclass(frozen=True)
class Source:
    """Where a study's scans come from, and how they become a store."""

    folder: str
    """Below $CAUC_DATA."""
    about: str
    """What it is, its licence."""
    shape: tuple[int, ...] | None = None
    missing: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()
    columns: "Callable[[Store], Mapping[str, Sequence[str] | NDArray[np.float64]]] | None" = None
    """Columns made from the store itself: splits, hidden labels."""
    person: Callable[[str], str] | None = None
    """Whose a scan is, by its id, where the store's subjects are not people: intervals draw people."""


@dataclass(frozen=True)
class Evaluation:
    """One way of holding subjects out, repeated over seeds.

    `split` is a column whose entry `train` is trained on, its other entries held out, and a missing one neither;
    {seed} and {fold} are filled in.
    """

    name: str
    split: str
    seeds: int
    folds: int = 1
    only: tuple[str, ...] = ()
    """Arms that it is run for; default: all."""

    def column(self, seed: int, fold: int) -> str:
        """The split column of that seed and fold."""
        return self.split.format(seed=seed, fold=fold)


@dataclass(frozen=True)
class Target:
    """What a probe of frozen features is to tell: mean absolute error of a number, or AUC or balanced accuracy."""

    column: str
    metric: Metric
    within: str | None = None
    """A number, with `bins`: the AUC is also had inside them (sex inside bins of age). Without: a column of groups; a
    second probe (`linear-within`) chooses among those classes alone that the subject's own group has."""
    bins: tuple[float, ...] = ()
    """Inner edges of those bins."""

    @property
    def of_classes(self) -> bool:
        return self.metric != "mae"


@dataclass(frozen=True)
class Contrast:
    """`arm` less `other` on one target, by one probe, in one evaluation; positive: `arm` is better."""

    arm: str
    other: str
    target: str
    evaluation: str
    probe: str = "linear"

    def __str__(self) -> str:
        return f"{self.arm} - {self.other}: {self.target}, {self.probe}, {self.evaluation}"


@dataclass(frozen=True)
class Study:
    """Everything that `cauc reproduce NAME` needs to know."""

    name: str
    about: str
    source: Source
    arms: dict[str, RunConfig]
    evaluations: tuple[Evaluation, ...]
    targets: tuple[Target, ...]
    primary: Contrast
    """The one endpoint, written down in docs/reproduce.md before the runs."""
    endpoint: str
    """The same in words."""
    contrasts: tuple[Contrast, ...] = ()
    """Further comparisons; Holm's correction is over these and the primary one."""
    baselines: tuple[str, ...] = ("raw", "untrained")
    """`raw` features or voxels; `untrained`: the first arm's encoder before training; `feature:NAME`: that one alone;
    `column:NAME`: that metadata alone."""
    confound: str | None = None
    """A raw feature that probes are also fitted without: regressed out of the features, on training subjects."""
    stands_for: Mapping[str, str] = field(default_factory=dict)
    """Columns that tell another one (hidden ages: age; a fine class: its coarse one): both are read where one is."""
    visible: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By arm and target: the column whose known values a second probe (`linear:COLUMN`) is fitted on, as pre-training
    was. Methods that are not named here have one such probe for each of these columns."""
    budgets: tuple[int, ...] = ()
    """Labels of few-label probes."""

    def evaluation(self, name: str) -> Evaluation:
        return next(e for e in self.evaluations if e.name == name)

    def target(self, column: str) -> Target:
        return next(t for t in self.targets if t.column == column)

    def visible_to(self, method: str, target: str) -> list[str]:
        """The columns of labels, some of them hidden, that probes of a method are fitted on beside the whole one."""
        own = self.visible.get(method)
        told = [own] if own is not None else list(self.visible.values())
        return list(dict.fromkeys(columns[target] for columns in told if target in columns))

    def tag(self, arm: str, column: str) -> Tag:
        """`proxy` where the loss of the arm read this column, or one made from it. A baseline read none."""
        if arm not in self.arms:
            return "held-out target"
        read = labels_of(self.arms[arm].objective)
        told = {*read, *(self.stands_for[name] for name in read if name in self.stands_for)}
        return "proxy" if column in told else "held-out target"

    def check(self) -> "Study":
        """The study itself; BadInput where a comparison names what the study has not, or claims on a proxy."""
        for contrast in (self.primary, *self.contrasts):
            self._check(contrast)
        return self

    def _check(self, contrast: Contrast) -> None:
        known: dict[str, Sequence[str]] = {
            "arm": [*self.arms, *self.baselines],
            "other": [*self.arms, *self.baselines],
            "target": [t.column for t in self.targets],
            "evaluation": [e.name for e in self.evaluations],
        }
        for name, names in known.items():
            if (value := getattr(contrast, name)) not in names:
                raise BadInput(
                    f"study {self.name} compares the {name} {value!r}",
                    wanted="one that it has",
                    do=nearest(value, names),
                )


def labels_of(objective: Objective) -> tuple[str, ...]:
    """The columns whose values the gradient depends on."""
    return () if objective.name in LABEL_FREE else objective.columns


@dataclass(frozen=True)
class Member:
    """One run of a study, or one baseline on its split."""

    arm: str
    evaluation: str
    seed: int
    fold: int

    @property
    def name(self) -> str:
        """Of its folder: letters, digits and `_ = . -`."""
        arm = self.arm.replace(":", "_")
        return f"{arm}-{self.evaluation}-s{self.seed}-f{self.fold}"


def members(study: Study, arms: Sequence[str], seeds: int | None = None) -> Iterator[Member]:
    """The members of those arms (or baselines) of the study, seed by seed: a stopped study has whole seeds."""
    most = max(e.seeds for e in study.evaluations)
    for seed in range(most if seeds is None else min(seeds, most)):
        for evaluation in study.evaluations:
            for fold in range(evaluation.folds if seed < evaluation.seeds else 0):
                for arm in arms:
                    if not evaluation.only or arm in evaluation.only or arm not in study.arms:
                        yield Member(arm, evaluation.name, seed, fold)


def chosen(study: Study, methods: Sequence[str]) -> list[str]:
    """Arms and baselines by name; default: all. BadInput with the nearest for one that the study has not."""
    known = [*study.arms, *study.baselines]
    for name in methods:
        if name not in known:
            raise BadInput(
                f"no method {name!r} in study {study.name}", wanted="one of its own", do=nearest(name, known)
            )
    return [name for name in known if not methods or name in methods]


def run_of(study: Study, member: Member, store: str) -> RunConfig:
    """The configuration of a member; a baseline's is the first arm's, of which it has store, split and seed."""
    base = study.arms.get(member.arm) or next(iter(study.arms.values()))
    split = base.data.split or study.evaluation(member.evaluation).column(member.seed, member.fold)
    return dataclasses.replace(base, seed=member.seed, data=dataclasses.replace(base.data, store=store, split=split))


def under(base: RunConfig, **changes: object) -> RunConfig:
    """The same run with other settings of its objective."""
    return dataclasses.replace(base, objective=dataclasses.replace(base.objective, **changes))  # type: ignore[arg-type]


def two_by_two(base: RunConfig, prefix: str = "") -> dict[str, RunConfig]:
    """{plain, conditional} alignment x {global, conditional} uniformity with one t and one lambda_align, both explicit.

    With them the fourth under both other normalisers, each beside its own control, and the pair at t = lambda_align =
    1 / (2 tau): the constants of y-Aware InfoNCE at that temperature (docs/losses.md, exact fact 1).
    """
    if base.objective.lambda_align is None:
        raise BadInput(
            "a 2x2 whose base has no lambda_align", wanted="one number for all four", do="set it in the base"
        )
    matched = {"t": 0.5 / base.objective.tau, "lambda_align": 0.5 / base.objective.tau}
    arms = {
        "calign_unif": under(base, name="calign_unif"),
        "align_cunif": under(base, name="align_cunif"),
        "cauc": under(base, name="cauc"),
        "cauc_row": under(base, name="cauc", normalise_unif="row"),
        "calign_unif_global": under(base, name="calign_unif", normalise_align="global"),
        "cauc_global": under(base, name="cauc", normalise_align="global"),
        "calign_unif_matched": under(base, name="calign_unif", **matched),
        "cauc_matched": under(base, name="cauc", **matched),
    }
    return {prefix + name: run for name, run in arms.items()}


def label_free(base: RunConfig) -> dict[str, RunConfig]:
    """The arms whose loss reads no label: one for all kernels of a study."""
    return {"simclr": under(base, name="simclr"), "align_uniform": under(base, name="align_uniform")}
