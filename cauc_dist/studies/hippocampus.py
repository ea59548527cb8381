"""Hippocampus: 260 real T1w crops whose anterior and posterior volumes are known from an expert's segmentation."""

from cauc_dist.config import Augment, Checkpoint, Data, Encoder, Engine, Objective, Optim, RunConfig
from cauc_dist.studies.splits import cross_validation
from cauc_dist.study import Contrast, Evaluation, Source, Study, Target, label_free, two_by_two, under

REPEATS, FOLDS, SPLIT = 5, 5, "head{seed}f{fold}"
SD = {"anterior": 307, "posterior": 229}
"""Standard deviations of the volumes, mm3, over all 260: half of one is the kernel's sigma."""


def person(crop: str) -> str:
    """Whose head a crop is of: numbers 2k - 1 and 2k are its two sides.

    The data say so, no table does: total volumes correlate .91 over the 90 such pairs, .06 over the pairs 2k, 2k + 1.
    """
    return f"{(int(crop.removeprefix('sub-')) + 1) // 2}"


def base(column: str) -> RunConfig:
    """A small network on the central 31x40x24 window, no augmentation of scale: a factor would hide the volume.

    The window lies inside every scan: a crop's own shape predicts the volumes (R2 .25 / .28), and padding shows it.
    Our configuration, tuned on nothing.
    """
    return RunConfig(
        name="hippocampus",
        epochs=40,
        batch_size=32,
        data=Data(store="stores/hippocampus.zarr"),
        augment=Augment(p_intensity=0.8, p_blur=0.5, p_noise=0.5, p_shift=0.5, scale=0.3, shift=0.3, max_shift=2),
        encoder=Encoder(name="cnn3d", width=16),
        objective=Objective(kernel=(f"{column}_mm3:gaussian:{SD[column] / 2:g}",), lambda_align=1.5),
        optim=Optim(lr=1e-3, warmup_epochs=2),
        engine=Engine(threads=1),
        checkpoint=Checkpoint(every_epochs=10, keep=1),
    )


def hippocampus() -> Study:
    """The 2x2 on volumes: the posterior volume under a kernel on the anterior one, and the reverse."""
    arms = label_free(base("anterior"))
    for column in SD:
        run = base(column)
        arms |= two_by_two(run, f"{column}_")
        arms[f"{column}_yaware"] = under(run, name="y_aware", lambda_align=None)
        arms[f"{column}_supervised"] = under(run, name="squared_error", lambda_align=None)
    contrasts = [
        Contrast(f"{column}_{arm}", other.format(column), f"{target}_mm3", "cv")
        for column, target in (("anterior", "posterior"), ("posterior", "anterior"))
        for arm, other in (
            ("cauc", "{}_calign_unif"),
            ("cauc_row", "{}_calign_unif"),
            ("cauc_matched", "{}_calign_unif_matched"),
            ("cauc_matched", "{}_yaware"),
            ("cauc", "simclr"),
        )
    ]
    return Study(
        name="hippocampus",
        about="260 hippocampus crops: does a kernel on the volume of one half teach that of the other?",
        source=Source(
            folder="hippocampus260",
            about="Medical Segmentation Decathlon, Task04 (CC BY-SA 4.0)",
            shape=(31, 40, 24),
            columns=lambda store: cross_validation(store, SPLIT, REPEATS, FOLDS, person=person),
            person=person,
        ),
        arms=arms,
        evaluations=(Evaluation("cv", SPLIT, seeds=REPEATS, folds=FOLDS),),
        targets=(Target("anterior_mm3", "mae"), Target("posterior_mm3", "mae")),
        primary=contrasts[0],
        endpoint=(
            "Mean absolute error (mm3) of the posterior volume (held-out target) by a ridge probe of h, kernel on the "
            "anterior volume, sigma half its standard deviation: conditional alignment with conditional uniformity "
            "less conditional alignment with global uniformity, mean over 5 repeats of 5-fold cross-validation (both "
            "sides of a head in one fold), two-sided, corrected for overlapping training sets."
        ),
        contrasts=tuple(contrasts[1:]),
    )
