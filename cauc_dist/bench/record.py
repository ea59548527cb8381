"""The raw numbers of a benchmark as one JSON file, with what a reader needs to judge them."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cauc_dist.provenance import provenance


def save(record: dict[str, Any], out: Path) -> None:
    """Write a record as it is; its folder is made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def keep(found: Any, verdict: str, out: Path | None) -> None:
    """A result (a dataclass) with its verdict, versions, code, machine and command, where an `out` is named."""
    if out is not None:
        save({**provenance(), "found": _plain(asdict(found)), "verdict": verdict}, out)


def _plain(x: Any) -> Any:
    """JSON has no infinity: the bandwidth of one rank, which sends nothing, is null."""
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
