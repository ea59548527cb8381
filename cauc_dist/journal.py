"""The record of a run: one JSON object a line, one line an event, appended by rank 0."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cauc_dist.errors import BadInput

FILE = "journal.jsonl"
BEGINNINGS = ("start", "resume")  # events


class Journal:
    """Appends events to RUN/journal.jsonl. A line is written whole and flushed: a killed run loses at most one.

    A resumed run appends; the steps of its former life past the checkpoint that it went on from no longer count.
    """

    def __init__(self, run: Path, *, quiet: bool = False) -> None:
        self._file: TextIO | None = None
        if not quiet:
            torn = _ends_torn(run / FILE)
            self._file = (run / FILE).open("a", encoding="utf-8")
            self._file.write("\n" if torn else "")

    def write(self, event: str, **fields: Any) -> None:
        """One event with the wall time in seconds; non-finite numbers are written as null, as JSON has none."""
        if self._file is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **_finite(fields)}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise BadInput(
                f"{self._file.name} could not be written: {error.strerror}",
                wanted="room for the journal",
                do="free space, then `cauc resume` goes on from the newest checkpoint",
            ) from None

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been told
                self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def read(run: Path) -> list[dict[str, Any]]:
    """All events of a run in order, torn lines left out; a resume at step s takes back the steps from s on."""
    events: list[dict[str, Any]] = []
    for event in _lines(run / FILE):
        if event["event"] in BEGINNINGS:
            events = [e for e in events if e["event"] != "step" or e["step"] < event["step"]]
        events.append(event)
    return events


def begun(run: Path) -> dict[str, Any] | None:
    """How the latest life of a run began: its `start` or `resume` event; None where it has not."""
    return next((event for event in reversed(read(run)) if event["event"] in BEGINNINGS), None)


def _ends_torn(path: Path) -> bool:
    """Whether the last line was cut: what is appended to it would be lost with it."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    yield event
