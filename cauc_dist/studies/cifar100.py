"""CIFAR-100: natural images with a hierarchy of classes, the one place where a kernel's subgroups are known.

The kernel sees the 20 coarse classes, probes ask for the 100 fine ones too: does a loss that gathers the images of a
coarse class keep its five fine classes apart (the collapse test)? A coarse class follows from a fine one.
"""

import dataclasses
from typing import TYPE_CHECKING

from cauc_dist.config import Encoder, RunConfig
from cauc_dist.recipes import cifar100 as recipes
from cauc_dist.recipes import family
from cauc_dist.study import Contrast, Evaluation, Source, Study, Target, label_free, two_by_two, under

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cauc_dist.store.reader import Store

FINE = Target("fine", "balanced_accuracy", within="coarse")
COARSE = Target("coarse", "balanced_accuracy")
PER_CLASS, KEPT = 500, 450
"""Official training images of a fine class, and those of them that may train: the other 50 are for choices."""


def columns(store: "Store") -> dict[str, list[str]]:
    """Splits with the same number of every fine class; an image in none of their parts has no entry.

    final: 45,000 train, the 10,000 official test images are held out. select: the same train, the 5,000 other official
    training images held out. small: 6,000 of the 45,000, 5,000 of the test images. small_select: 4,100 of the 6,000,
    2,000 of the 5,000.
    """
    import numpy as np

    test = store.metadata(["split"])[:, 0] == store.column("split").levels.index("test")
    place = places(store.metadata(["fine"])[:, 0] + 100 * test)
    train, chosen = ~test & (place < KEPT), ~test & (place >= KEPT)

    def split(name: str, trained: "NDArray[np.bool_]", held: "NDArray[np.bool_]") -> list[str]:
        told: list[str] = np.select([trained, held], ["train", name], "").tolist()
        return told

    return {
        "final": split("test", train, test),
        "select": split("selection", train, chosen),
        "small": split("test", train & (place < 60), test & (place < 50)),
        "small_select": split("selection", train & (place < 41), chosen & (place < KEPT + 20)),
    }


def places(group: "NDArray[np.float64]") -> "NDArray[np.int64]":
    """(N,) the place of each image in a random order of its group, from 0."""
    import numpy as np

    order = np.random.default_rng(0).permutation(len(group))
    place = np.empty(len(group), np.int64)
    for one in np.unique(group):
        of = order[group[order] == one]
        place[of] = np.arange(len(of))
    return place


SOURCE = Source(
    folder="cifar-100-python",
    about="CIFAR-100 (Krizhevsky 2009; research use)",
    columns=columns,
)


def _open(run: RunConfig) -> RunConfig:
    """The same with the split left to the evaluation."""
    return dataclasses.replace(run, data=dataclasses.replace(run.data, split=None))


def _study(name: str, run: RunConfig, split: str, about: str, baselines: tuple[str, ...]) -> Study:
    run = _open(run)
    arms = {
        **label_free(run),
        **two_by_two(run),
        "supcon_coarse": family.under(run, "supcon"),
        "ce_coarse": family.under(run, "ce"),
        "supcon_fine": family.under(run, "supcon", kernel=(recipes.FINE,)),
    }
    pairs = [
        ("cauc", "calign_unif"),
        ("cauc_row", "calign_unif"),
        ("cauc_global", "calign_unif_global"),
        ("cauc_matched", "calign_unif_matched"),
        ("cauc_matched", "supcon_coarse"),
        ("cauc", "align_uniform"),
        ("cauc", "simclr"),
    ]
    contrasts = [
        Contrast(arm, other, "fine", "test", probe) for probe in ("linear", "linear-within") for arm, other in pairs
    ]
    return Study(
        name=name,
        about=about,
        source=SOURCE,
        arms=arms,
        evaluations=(Evaluation("test", split, seeds=3),),
        targets=(FINE, COARSE),
        primary=contrasts[0],
        endpoint=(
            "Accuracy of the 100 fine classes (held-out target) by a logistic probe of h on the test images, kernel on "
            "the 20 coarse classes: conditional alignment with conditional uniformity less conditional alignment with "
            "global uniformity, 3 seeds."
        ),
        contrasts=tuple(contrasts[1:]),
        baselines=baselines,
        stands_for={"fine": "coarse"},
    )


def cifar100() -> Study:
    """All arms on 45,000 images and the test set, opened once; for a GPU."""
    about = "CIFAR-100, ResNet-18: does a loss that gathers a coarse class keep its fine classes apart?"
    return _study("cifar100", recipes.cifar100(), "final", about, ("untrained",))


def cifar100_small() -> Study:
    """The same on 6,000 images, a network of 16 channels and half of the test set; for CPU cores."""
    about = "6,000 images of CIFAR-100, a ResNet-18 of a quarter of the width: the same question on two cores."
    study = _study("cifar100_small", recipes.cifar100_small(), "small", about, ("raw", "untrained"))
    return dataclasses.replace(study, budgets=(500,))


SIZES, EPOCHS, RATES = (16, 64, 256, 1024), 16, (3e-4, 1e-3, 3e-3)


def batch() -> Study:
    """The global batch, 16 to 1,024, at equal epochs and at equal updates, at three rates each; GroupNorm, chunks."""
    run = _open(recipes.cifar100_small())
    run = dataclasses.replace(
        run,
        encoder=Encoder(name="resnet18_2d", width=8, norm="group"),
        engine=dataclasses.replace(run.engine, encode_chunk=128),
    )
    arms = {}
    for method in ("cauc", "calign_unif"):
        for rate in RATES:
            for n in SIZES:
                for kind, epochs in (("epochs", EPOCHS), ("updates", EPOCHS * n // 256)):
                    optim = dataclasses.replace(run.optim, lr=rate, warmup_epochs=epochs / 16)
                    arm = dataclasses.replace(under(run, name=method), batch_size=n, epochs=epochs, optim=optim)
                    arms[f"{method}_{kind}_lr{rate:g}_n={n}"] = arm
    same = {f"{method}_updates_lr{rate:g}_n=256" for method in ("cauc", "calign_unif") for rate in RATES}
    return Study(
        name="batch",
        about="What a larger global batch is worth to conditional uniformity, with global uniformity as its control.",
        source=SOURCE,
        arms={name: arm for name, arm in arms.items() if name not in same},
        evaluations=(Evaluation("select", "small_select", seeds=2),),
        targets=(FINE,),
        primary=Contrast("cauc_epochs_lr0.001_n=1024", "calign_unif_epochs_lr0.001_n=1024", "fine", "select"),
        endpoint=(
            "The curves of the best of three rates at each batch size, on images kept for choices; the test images are "
            "not opened, and no claim is made."
        ),
        baselines=("untrained",),
    )
