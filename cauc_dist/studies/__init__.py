"""The studies of `cauc reproduce`, by name. Each says its primary endpoint, written down before the runs."""

import dataclasses
from collections.abc import Callable

from cauc_dist.errors import BadInput, nearest
from cauc_dist.studies import cifar100, hippocampus, ixi, ixi_hidden
from cauc_dist.study import Study


def studies() -> dict[str, Callable[[], Study]]:
    """All studies by name."""
    found = [
        *(ixi.ixi_roi, ixi_hidden.ixi_roi_hidden, ixi.ixi_roi_sensitivity, hippocampus.hippocampus, ixi.ixi50),
        *(cifar100.cifar100, cifar100.cifar100_small, cifar100.batch),
    ]
    return {study.__name__: study for study in found}


def get(name: str, epochs: int | None = None) -> Study:
    """The study of that name, checked; BadInput with the nearest names where there is none.

    `epochs`: so many for every arm in place of its own, which the study then says of itself.
    """
    known = studies()
    if name not in known:
        raise BadInput(f"no study {name!r}", wanted="a study's name", do=nearest(name, known))
    study = known[name]().check()
    if epochs is None:
        return study
    arms = {arm: dataclasses.replace(run, epochs=epochs) for arm, run in study.arms.items()}
    return dataclasses.replace(study, arms=arms, about=f"{study.about} Every arm at {epochs} epochs, not at its own.")
