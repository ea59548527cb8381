"""What a source says of itself before a voxel is read: its scans, their metadata, and what cannot be taken."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cauc_dist.store.layout import Column

Refused = tuple[str, str]  # (scan or participant, reason)
Affine = tuple[tuple[float, ...], ...]
Spacing = tuple[float, float, float]

NAMED = 5  # offenders an error lists before it counts


class Unusable(Exception):
    """Why one scan cannot be taken; collected, so that one run names them all."""


@dataclass(frozen=True)
class Item:
    """One scan, image or row of features: small, and fit to be sent to another process."""

    id: str
    subject: str
    paths: tuple[Path, ...]
    """One file a channel (or group of channels)."""
    index: int | None = None
    """The row of the file that is meant, where a file holds many (feature tables, CIFAR-100)."""


@dataclass(frozen=True)
class Header:
    """What `read` will give, known without reading voxels."""

    shape: tuple[int, ...]
    """(c, X, Y, Z), (c, X, Y) or (c,), turned to RAS and resampled."""
    voxel: Spacing | None = None
    """Sides in mm; None where the file does not say."""
    affine: Affine | None = None
    """4x4, voxel to mm, of the scan as turned (and resampled); None where the file has none."""


@dataclass(frozen=True)
class Cohort:
    """What there is to ingest: N items by id, a row of metadata each."""

    kind: str
    items: tuple[Item, ...]
    columns: tuple[Column, ...]
    values: tuple[NDArray[np.float64], ...]
    """(N,) a column; NaN is missing."""
    set_aside: tuple[Refused, ...]
    described: dict[str, Any] = field(default_factory=dict)
    """Where the data came from, in JSON's types."""
    counted: dict[str, dict[str, int]] = field(default_factory=dict)
    """Entries of these items that are missing: by column, by reason."""
    tables: tuple[Path, ...] = ()


def some(texts: Sequence[str], separator: str = ", ") -> str:
    rest = f"{separator}and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return separator.join(texts[:NAMED]) + rest


def by(sides: Any) -> str:
    """80x96x80."""
    return "x".join(f"{side:g}" for side in sides)
