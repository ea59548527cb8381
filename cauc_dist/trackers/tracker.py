"""What every tracker is told, and the names by which a resumed run finds its own in each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from cauc_dist import durable

FILE = "trackers.json"

Setting = bool | int | float | str
End = Literal["finished", "stopped", "failed"]
"""How a life of a run ends; stopped: it will go on."""


class Point(NamedTuple):
    """A step."""

    step: int
    time: float
    """Seconds since 1970."""
    values: Mapping[str, float]


class Tracker(Protocol):
    """Writes points; raises what it likes."""

    def log(self, points: Sequence[Point]) -> None:
        """In the order of their steps."""

    def close(self, end: End) -> None:
        """Write all that is left; nothing is called after."""


def ids(folder: Path) -> dict[str, str]:
    """Tracker -> the run's name there, as RUN/trackers.json keeps it."""
    path = folder / FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def keep(folder: Path, tracker: str, name: str) -> None:
    durable.replace(folder / FILE, (json.dumps({**ids(folder), tracker: name}, indent=1) + "\n").encode())
