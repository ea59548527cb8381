"""IXI: 447 tables of regional volumes with age and sex (real), their sensitivity, and 50 heads."""

import dataclasses
from typing import TYPE_CHECKING

from cauc_dist.config import Checkpoint, Engine, RunConfig
from cauc_dist.recipes import brain
from cauc_dist.studies.splits import cross_validation
from cauc_dist.study import Contrast, Evaluation, Source, Study, Target, label_free, two_by_two, under

if TYPE_CHECKING:
    from cauc_dist.store.reader import Store

REPEATS, FOLDS = 5, 5
TEST = Evaluation("test", "split", seeds=10)
CV = Evaluation("cv", "cv{seed}f{fold}", seeds=REPEATS, folds=FOLDS)
AGE = Target("age", "mae")
SEX = Target("sex", "auc", within="age", bins=(40.0, 60.0))


def base(kernel: str = "age:gaussian:5") -> RunConfig:
    """The recipe: an MLP on the 288 standardised features of a subject, 60 epochs; tuned on nothing."""
    return under(brain.ixi_roi(), kernel=(kernel,))


def open_base(kernel: str = "age:gaussian:5") -> RunConfig:
    """The same with the split left to the evaluation."""
    run = base(kernel)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, split=None))


def _columns(store: "Store") -> dict[str, list[str]]:
    return cross_validation(store, CV.split, REPEATS, FOLDS, by=sexes(store))


def sexes(store: "Store") -> list[object]:
    """Sex of each scan, as its table has it."""
    return list(store.metadata(["sex"])[:, 0])


ROI = Source(
    folder="ixi_roi",
    about="IXI, CAT12 grey-matter and CSF volumes of 284 regions and 4 globals (CC BY 4.0, IXI via pystatsml)",
    missing=("height=0", "weight=0"),
    ranges=("height=100:230", "weight=35:200"),
    columns=_columns,
)


def _others(run: RunConfig, prefix: str, supervised: str) -> dict[str, RunConfig]:
    names = {"yaware": "y_aware", "expw": "expw", "supervised": supervised}
    return {prefix + name: under(run, name=objective, lambda_align=None) for name, objective in names.items()}


def ixi_roi() -> Study:
    """The 2x2 on regional volumes: sex under an age kernel, age under a sex kernel."""
    age, sex = open_base(), open_base("sex:delta")
    arms = {
        **label_free(age),
        **two_by_two(age, "age_"),
        **_others(age, "age_", "squared_error"),
        **two_by_two(sex, "sex_"),
        **_others(sex, "sex_", "cross_entropy"),
    }
    pairs = [
        ("age_cauc_row", "age_calign_unif", "sex"),
        ("age_cauc_global", "age_calign_unif_global", "sex"),
        ("age_cauc_matched", "age_calign_unif_matched", "sex"),
        ("age_cauc_matched", "age_yaware", "sex"),
        ("age_cauc", "simclr", "sex"),
        ("sex_cauc", "sex_calign_unif", "age"),
        ("sex_cauc_row", "sex_calign_unif", "age"),
        ("sex_cauc_matched", "sex_calign_unif_matched", "age"),
        ("sex_cauc_matched", "sex_yaware", "age"),
        ("sex_cauc", "simclr", "age"),
    ]
    return Study(
        name="ixi_roi",
        about="Regional volumes of 447 healthy adults: what metadata-aware objectives do for labels they never saw.",
        source=ROI,
        arms=arms,
        evaluations=(TEST, CV),
        targets=(AGE, SEX),
        primary=Contrast("age_cauc", "age_calign_unif", "sex", "cv"),
        endpoint=(
            "AUC of sex (held-out target) by a logistic probe of h, kernel on age, sigma 5 years: conditional "
            "alignment with conditional uniformity less conditional alignment with global uniformity, mean over "
            "5 repeats of 5-fold cross-validation over all 447 subjects, two-sided, corrected for overlapping training "
            "sets."
        ),
        contrasts=tuple(
            Contrast(arm, other, target, evaluation)
            for evaluation in ("cv", "test")
            for arm, other, target in (*pairs, *([("age_cauc", "age_calign_unif", "sex")] * (evaluation == "test")))
        ),
        baselines=("raw", "untrained", "feature:tiv"),
        confound="tiv",
        budgets=(100, 300),
    )


SIGMAS, SHARPNESSES, BATCHES = (1.0, 2.5, 5.0, 10.0, 20.0), (0.5, 1.0, 2.0, 5.0, 10.0), (16, 32, 64, 128)


def ixi_roi_sensitivity() -> Study:
    """How both losses of the claim answer to sigma, t (with lambda_align = .75 t) and batch size, inside training."""
    arms = {}
    for method in ("cauc", "calign_unif"):
        run = under(open_base(), name=method)
        for sigma in SIGMAS:
            arms[f"{method}_sigma={sigma:g}"] = under(run, kernel=(f"age:gaussian:{sigma:g}",))
        for t in SHARPNESSES:
            arms[f"{method}_t={t:g}"] = under(run, t=t, lambda_align=0.75 * t)
        for n in BATCHES:
            arms[f"{method}_batch_size={n}"] = dataclasses.replace(run, batch_size=n)
    return Study(
        name="ixi_roi_sensitivity",
        about="One setting at a time, 5-fold inside the 357 training subjects: the 90 of the test part are not opened.",
        source=dataclasses.replace(ROI, columns=_inner),
        arms=arms,
        evaluations=(Evaluation("inner", "inner{seed}f{fold}", seeds=2, folds=FOLDS),),
        targets=(AGE, SEX),
        primary=Contrast("cauc_sigma=5", "calign_unif_sigma=5", "sex", "inner"),
        endpoint="The curves; no test is made of them. The settings of all other studies were not chosen by them.",
        baselines=("raw", "untrained"),
    )


def _inner(store: "Store") -> dict[str, list[str]]:
    """Folds of the training part only."""
    column = store.column("split")
    train = store.metadata(["split"])[:, 0] == column.levels.index("train")
    by = [sex if inside else None for sex, inside in zip(sexes(store), train, strict=True)]
    return {**_columns(store), **cross_validation(store, "inner{seed}f{fold}", 2, FOLDS, by=by)}


def ixi50() -> Study:
    """50 heads: a proof of the pipeline on real volumes, with its interval. No claim from n = 50."""
    run = brain.ixi50()
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, folds=4),
        engine=Engine(threads=1),
        checkpoint=Checkpoint(every_epochs=20, keep=1),
    )
    kept = ("calign_unif", "align_cunif", "cauc")
    arms = {
        **label_free(run),
        **{name: arm for name, arm in two_by_two(run).items() if name in kept},
        "yaware": under(run, name="y_aware", lambda_align=None),
    }
    return Study(
        name="ixi50",
        about="50 skull-stripped heads: shows that the chain takes real volumes; 40 of them train, so no claim.",
        source=Source(
            folder="ixi50",
            about="IXI T1w, 80x96x80 of 2 mm (CC BY-SA 3.0, brain-development.org, via CBICA NiChart)",
            columns=lambda store: cross_validation(store, "cv{seed}f{fold}", 3, FOLDS, by=sexes(store)),
        ),
        arms=arms,
        evaluations=(Evaluation("cv", "cv{seed}f{fold}", seeds=3, folds=FOLDS),),
        targets=(AGE, Target("sex", "auc")),
        primary=Contrast("cauc", "calign_unif", "sex", "cv"),
        endpoint="AUC of sex under a kernel on age, conditional less global uniformity, with its interval; no claim.",
        contrasts=(Contrast("cauc", "simclr", "sex", "cv"), Contrast("cauc", "yaware", "sex", "cv")),
    )
