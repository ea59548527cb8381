"""One base, many arms: recipes of a data set that differ in their objective alone."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cauc_dist.config import Objectives, RunConfig

Recipe = Callable[[], RunConfig]
TWO_TERMS = ("cauc", "calign_unif", "align_cunif", "align_uniform")
"""Objectives that read lambda_align."""


@dataclass(frozen=True)
class Arm:
    """An objective, in words."""

    name: Objectives
    about: str


ARMS = {
    "simclr": Arm("simclr", "SimCLR (NT-Xent, arXiv 2002.05709): metadata has no part in the loss"),
    "align_uniform": Arm("align_uniform", "Alignment and uniformity (arXiv 2005.10242): no metadata in the loss"),
    "yaware": Arm("y_aware", "y-Aware InfoNCE (arXiv 2106.08808)"),
    "supcon": Arm("supcon", "SupCon (arXiv 2004.11362), which y-Aware InfoNCE with a delta kernel is"),
    "expw": Arm("expw", "Exponential weights in the denominator (arXiv 2211.08326)"),
    "calign_unif": Arm("calign_unif", "Conditional alignment, global uniformity: the control of cauc"),
    "align_cunif": Arm("align_cunif", "Plain alignment, conditional uniformity"),
    "cauc": Arm("cauc", "Conditional alignment and conditional uniformity"),
    "ce": Arm("cross_entropy", "Supervised by classes, through the same projector"),
    "supervised": Arm("squared_error", "Supervised by numbers, through the same projector"),
}


def family(base: Recipe, *arms: str, suffix: str = "", **changes: Any) -> dict[str, Recipe]:
    """A recipe BASE_ARMsuffix of each arm, by name; its docstring is the arm's line, then the base's.

    `changes`: further settings of the objective that differ from the base's.
    """
    made = [_recipe(base, arm, suffix, changes) for arm in arms]
    return {recipe.__name__: recipe for recipe in made}


def _recipe(base: Recipe, arm: str, suffix: str, changes: dict[str, Any]) -> Recipe:
    name = f"{base().name}_{arm}{suffix}"

    def recipe() -> RunConfig:
        return dataclasses.replace(under(base(), arm, **changes), name=name)

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = f"{ARMS[arm].about}.\n\n{inspect.getdoc(base)}"
    return recipe


def under(run: RunConfig, arm: str, **changes: Any) -> RunConfig:
    """The same run under another loss; where that reads no kernel, its journal's geometry is judged by the base's."""
    objective = dataclasses.replace(run.objective, name=ARMS[arm].name, **changes)
    if objective.name not in TWO_TERMS:
        objective = dataclasses.replace(objective, lambda_align=None)
    return dataclasses.replace(run, objective=objective)
