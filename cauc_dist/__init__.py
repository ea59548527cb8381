"""Contrastive pre-training on 3-D brain MRI with metadata, exact on any number of ranks. docs/api-python.md

Importing it costs nothing: what `__all__` names brings torch and the like when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cauc_dist import kernels as kernels
    from cauc_dist import losses as losses
    from cauc_dist import recipes as recipes
    from cauc_dist.config import RunConfig as RunConfig
    from cauc_dist.estimator import ContrastiveEncoder as ContrastiveEncoder
    from cauc_dist.export import load_encoder as load_encoder
    from cauc_dist.gather import AllGather as AllGather
    from cauc_dist.store.reader import Store as Store

__version__ = "0.1.0"
__all__ = ["AllGather", "ContrastiveEncoder", "RunConfig", "Store", "kernels", "load_encoder", "losses", "recipes"]

_MODULES = {
    "AllGather": "gather",
    "ContrastiveEncoder": "estimator",
    "RunConfig": "config",
    "Store": "store.reader",
    "load_encoder": "export",
}
"""Where a name is; one that is not among them is a module itself."""


if not TYPE_CHECKING:  # it would tell a type checker that there is any name

    def __getattr__(name: str) -> Any:
        """A name of `__all__`, from its module."""
        if name not in __all__:
            raise AttributeError(f"module 'cauc_dist' has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f"cauc_dist.{_MODULES.get(name, name)}")
        return getattr(module, name) if name in _MODULES else module


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
