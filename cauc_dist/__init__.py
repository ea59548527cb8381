"""Contrastive pre-training on 3-D brain MRI with metadata, exact on any number of ranks."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`cauc_dist.load_encoder`, which brings torch: `cauc --help` need not wait for it."""
    if name != "load_encoder":
        raise AttributeError(f"module 'cauc_dist' has no attribute {name!r}")
    from importlib import import_module

    return import_module("cauc_dist.export").load_encoder
