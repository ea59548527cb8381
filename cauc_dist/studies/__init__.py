"""The studies of `cauc reproduce`, by name. Each says its primary endpoint, written down before the runs."""

from collections.abc import Callable

from cauc_dist.errors import BadInput, nearest
from cauc_dist.studies import hippocampus, ixi, ixi_hidden
from cauc_dist.study import Study


def studies() -> dict[str, Callable[[], Study]]:
    """All studies by name."""
    found = [ixi.ixi_roi, ixi_hidden.ixi_roi_hidden, ixi.ixi_roi_sensitivity, hippocampus.hippocampus, ixi.ixi50]
    return {study.__name__: study for study in found}


def get(name: str) -> Study:
    """The study of that name, checked; BadInput with the nearest names where there is none."""
    known = studies()
    if name not in known:
        raise BadInput(f"no study {name!r}", wanted="a study's name", do=nearest(name, known))
    return known[name]().check()
