"""One line of the doctor's, and how a check is looked at: apart from the others, and for so long."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

REPORT = "run `cauc doctor` again; where it says the same, please report it"


@dataclass(frozen=True)
class Finding:
    """What one check found; `do` is how to mend it, or "" where nothing is to be done."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    do: str = ""

    def __str__(self) -> str:
        """One line, and a second one with what to do."""
        line = f"{self.state:<4}  {self.name:<10}  {self.found}"
        return f"{line}\n{'':18}-> {self.do}" if self.do else line


class Look:
    """A check in a thread of its own: what it raises is a finding, and so is an end that does not come.

    A file system that hangs holds its thread for ever; it is left behind then.
    """

    def __init__(self, name: str, check: Callable[[], Iterable[Finding]], seconds: float) -> None:
        self._name, self._check, self._seconds = name, check, seconds
        self._told: queue.SimpleQueue[Finding | None] = queue.SimpleQueue()
        self._until = 0.0

    def begin(self) -> None:
        """Start the clock and the check; once, before `findings`."""
        self._until = time.monotonic() + self._seconds
        threading.Thread(target=self._run, daemon=True).start()

    def findings(self) -> Iterator[Finding]:
        """Each as soon as it is there."""
        try:
            while (found := self._told.get(timeout=max(0.01, self._until - time.monotonic()))) is not None:
                yield found
        except queue.Empty:
            yield Finding(
                self._name, "fail", f"no answer in {self._seconds:g} s", "see what hangs there, and try again"
            )

    def _run(self) -> None:
        try:
            for found in self._check():
                self._told.put(found)
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            self._told.put(Finding(self._name, "fail", what, REPORT))
        self._told.put(None)
