"""Slow ranks and slow data, found from what every rank tells of its last step.

W ranks.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

EVERY = 20
"""Steps that are judged together."""
SLOW_RANK = 1.5
"""Times the median of the others."""
SLOW_DATA = 0.1
"""Of the time of a step."""


class Watch:
    """`add` the seconds of each step; what it returns is news, told once where it begins.

    `names`: what each rank is called in a message.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._encode: list[NDArray[np.float64]] = []
        self._wait: list[NDArray[np.float64]] = []
        self._steps: list[float] = []
        self._known: set[str] = set()

    def add(
        self, encode: NDArray[np.float64], wait: NDArray[np.float64], seconds: float
    ) -> list[tuple[str, dict[str, Any], str]]:
        """encode, wait (W,): seconds that each rank took to encode, and waited for scans; `seconds` of the whole step.

        Returns (event, its fields, a line for people) of each finding.
        """
        self._encode.append(encode)
        self._wait.append(wait)
        self._steps.append(seconds)
        if len(self._steps) < EVERY:
            return []
        found = [*self._slow_ranks(np.median(self._encode, axis=0)), *self._slow_data(np.mean(self._wait, axis=0))]
        news = [finding for finding in found if finding[0] + str(finding[1]["rank"]) not in self._known]
        self._known = {event + str(fields["rank"]) for event, fields, _ in found}
        for kept in (self._encode, self._wait, self._steps):
            kept.clear()
        return news

    def _slow_ranks(self, encode: NDArray[np.float64]) -> list[tuple[str, dict[str, Any], str]]:
        found = []
        for rank, seconds in enumerate(encode.tolist()):
            others = [s for r, s in enumerate(encode.tolist()) if r != rank]
            usual = median(others) if others else seconds
            if usual > 0 and seconds > SLOW_RANK * usual:
                fields = {"rank": rank, "encode_s": seconds, "others_s": usual}
                line = (
                    f"{self._names[rank]} is slow: it encodes in {seconds:.3g} s, the others in {usual:.3g} s. "
                    "Every step waits for it: look at its node"
                )
                found.append(("straggler", fields, line))
        return found

    def _slow_data(self, wait: NDArray[np.float64]) -> list[tuple[str, dict[str, Any], str]]:
        share, rank = float(wait.max()) / float(np.mean(self._steps)), int(wait.argmax())
        if share <= SLOW_DATA:
            return []
        line = (
            f"{self._names[rank]} waits for scans {100 * share:.0f} % of a step. "
            "Raise --data.threads, copy the store to the node by --data.stage, or pack it"
        )
        return [("slow_data", {"rank": rank, "share": share}, line)]
