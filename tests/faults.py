"""Faults that are done for real: how many, what each one did, and what was found."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cauc_dist.provenance import provenance

ROOT = Path(__file__).parents[1]
FULL = os.environ.get("CAUC_FAULTS") == "full"


def seeds(full: int, few: int = 3) -> range:
    return range(full if FULL else few)


class Ledger:
    """What was done and what was found, one entry a fault."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    @contextmanager
    def fault(self, name: str, seed: int, **done: Any) -> Iterator[dict[str, Any]]:
        """The test adds to the entry what it found; `held`: every assertion inside was true."""
        entry: dict[str, Any] = {"fault": name, "seed": seed, **done, "held": False}
        self.entries.append(entry)
        began = time.perf_counter()
        try:
            yield entry
            entry["held"] = True
        finally:
            entry["seconds"] = round(time.perf_counter() - began, 3)


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    found = Ledger()
    yield found
    if FULL:
        default = ROOT / f"benchmarks/results/{time.strftime('%Y-%m-%d', time.gmtime())}-faults.json"
        path = Path(os.environ.get("CAUC_FAULTS_OUT") or default)
        path.parent.mkdir(parents=True, exist_ok=True)
        counts: dict[str, dict[str, int]] = {}
        for entry in found.entries:
            count = counts.setdefault(entry["fault"], {"done": 0, "held": 0})
            count["done"] += 1
            count["held"] += entry["held"]
        rows = ",\n  ".join(json.dumps(entry) for entry in found.entries)
        head = json.dumps({**provenance(), "counts": counts}, indent=1)[:-2]
        path.write_text(f'{head},\n "faults": [\n  {rows}\n ]\n}}\n')


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a full disk could not be tried: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
