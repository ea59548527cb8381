"""What befell a run beside its steps: restarts, signals, slow ranks, damage; on the step axis and with wall times."""

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from cauc_dist.report.hidden import Hidden
from cauc_dist.report.tags import note, table

Events = list[dict[str, Any]]
QUIET = ("step", "checkpoint")
"""Too many to be told one by one."""
MOST = 300
"""Rows of the table, and marks of a run."""


def incidents(events: Events, hidden: Hidden) -> list[dict[str, Any]]:
    """In the order of the journal: kind, step, time (s), words. Ids of scans are hidden; words of others are left out.

    The message of `non_finite` names scans, and a store that is gone cannot say which words in it are ids.
    """
    found, step, before = [], 0, None
    for event in events:
        step = event.get("step", step)
        if event["event"] not in QUIET:
            words = _words(event, before, hidden)
            found.append({"kind": event["event"], "step": step, "time": event.get("time"), "words": words})
        before = event
    return found


def marks(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Those that charts show: where a run began and ended well is no news."""
    return [
        {"run": k, "step": each["step"], "kind": each["kind"], "words": each["words"]}
        for k, of in enumerate(runs)
        for each in [i for i in of if i["kind"] not in ("start", "end")][:MOST]
    ]


def incident_table(names: Sequence[str], runs: Sequence[list[dict[str, Any]]], saved: Sequence[int]) -> str:
    """All runs, run by run; `saved`: how many checkpoints each wrote."""
    rows = []
    for name, of in zip(names, runs, strict=True):
        began = next((each["time"] for each in of if each["time"] is not None), None)
        for each in of[:MOST]:
            wall = "" if each["time"] is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(each["time"]))
            after = "" if each["time"] is None or began is None else _span(each["time"] - began)
            rows.append([name, each["kind"].replace("_", " "), each["step"], wall, after, each["words"]])
    told = table(["run", "event", "step", "UTC", "after", ""], rows)
    left = sum(max(0, len(of) - MOST) for of in runs)
    more = note(f"{left} more are in the journals.") if left else ""
    return (
        told + more + note("Checkpoints written: " + ", ".join(f"{n} {k}" for n, k in zip(names, saved, strict=True)))
    )


def checkpoints(events: Events) -> int:
    return sum(event["event"] == "checkpoint" for event in events)


def _words(event: dict[str, Any], before: dict[str, Any] | None, hidden: Hidden) -> str:
    teller = TELLERS.get(event["event"])
    if teller is not None:
        try:
            return teller(event, before, hidden)
        except (KeyError, TypeError, ValueError):
            pass  # a journal of another version: its numbers are told as they are
    numbers = {k: v for k, v in event.items() if isinstance(v, (int, float)) and k not in ("time", "step")}
    return ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in numbers.items())


def _resumed(event: dict[str, Any], before: dict[str, Any] | None, hidden: Hidden) -> str:
    asked = before is not None and before["event"] == "stopped"
    gap = f" {_span(event['time'] - before['time'])} later" if before is not None else ""
    how = "after it was stopped" if asked else "after it broke off without a word"
    return f"went on from step {event['step']} on {_ranks(event['ranks'])}, {how}{gap}"


def _skipped(event: dict[str, Any], before: dict[str, Any] | None, hidden: Hidden) -> str:
    scans = [hidden(scan) for scan in event["scans"]]
    more = f" and {len(scans) - 5} more" if len(scans) > 5 else ""
    return f"damaged, left out: {', '.join(scans[:5])}{more} ({event['skipped']} so far)"


def _non_finite(event: dict[str, Any], before: dict[str, Any] | None, hidden: Hidden) -> str:
    return (
        event["message"] if hidden.show_ids else f"the loss was no number; step left out ({event['left_out']} so far)"
    )


TELLERS: dict[str, Callable[[dict[str, Any], dict[str, Any] | None, Hidden], str]] = {
    "start": lambda e, b, h: f"{_ranks(e['ranks'])}, {e['device']}",
    "resume": _resumed,
    "stopped": lambda e, b, h: f"asked to by {signal.Signals(e['signal']).name}; checkpoint written",
    "end": lambda e, b, h: "all steps done",
    "straggler": lambda e, b, h: (
        f"rank {e['rank']} encodes in {e['encode_s']:.3g} s, the others in {e['others_s']:.3g} s"
    ),
    "slow_data": lambda e, b, h: f"rank {e['rank']} waits for scans {100 * e['share']:.0f} % of a step",
    "skip": _skipped,
    "non_finite": _non_finite,
    "damaged": lambda e, b, h: h.scrub(e["message"]),
    "tracker_lost": lambda e, b, h: f"{e['tracker']} is written no more",
}


def _ranks(n: int) -> str:
    return f"{n} rank{'s' * (n != 1)}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
