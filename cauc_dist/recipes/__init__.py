"""A recipe is a function that returns a whole RunConfig; `cauc train NAME` runs one.

Imports no torch. Its docstring says where its numbers come from, how to make its store, what it costs, what it gave.
"""

from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput, nearest
from cauc_dist.recipes import bhb, brain, cifar100
from cauc_dist.recipes.family import Recipe


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    return {**brain.recipes(), **bhb.recipes(), **cifar100.recipes()}


def get(name: str) -> RunConfig:
    """The recipe of that name; BadInput with the nearest names where there is none."""
    known = recipes()
    if name not in known:
        raise BadInput(f"no recipe {name!r}", wanted="a recipe's name or a config.json", do=nearest(name, known))
    return known[name]()
