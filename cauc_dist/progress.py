"""What a person sees while a run goes on: a bar on a terminal, a line an epoch or 50 steps in a log file."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY = 50
"""Steps from one line to the next, in a log file, where an epoch is longer."""
VOICE = "CAUC_VOICE"
"""What was asked of the command line, for ranks too: json (news go to stderr), quiet (no news), or nothing."""


def voice() -> str:
    return os.environ.get(VOICE, "")


def console() -> Console:
    """Where news on the way go."""
    file = sys.stderr if voice() == "json" else sys.stdout
    return Console(file=file, quiet=voice() == "quiet", highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """News on the way."""
    console().print(line, markup=False)


def as_json(data: Any) -> str:
    """A result for scripts: dataclasses as objects, paths as texts, a number that is none as null."""
    return json.dumps(_plain(data), allow_nan=False)


def _plain(data: Any) -> Any:
    """What JSON has: dataclasses as objects, a number that is none as null."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return {field.name: _plain(getattr(data, field.name)) for field in dataclasses.fields(data)}
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [_plain(each) for each in data]
    if hasattr(data, "item") and hasattr(data, "dtype"):  # numpy's
        data = data.item()
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return str(data) if isinstance(data, Path) else data


class Progress:
    """Console output of rank 0; `quiet` (the other ranks) prints nothing."""

    def __init__(self, name: str, total: int, *, quiet: bool) -> None:
        self._name, self._total = name, total
        self._console = console()
        self._console.quiet |= quiet
        self._bar: Bar | None = None
        self._said, self._began = (-1, -EVERY), time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False)

    def start(self, facts: Mapping[str, Any]) -> None:
        """The derived values of the run, one line; then the bar, where there is a terminal."""
        chunked = f" in {facts['chunks']} chunks" if facts["chunks"] > 1 else ""
        begin = f"from step {facts['step']}" if facts["step"] else "from scratch"
        self.say(
            f"{self._name}: batch {facts['batch_size']} = {facts['ranks']} ranks x {facts['per_rank']}"
            f"{chunked}, {facts['epochs']} epochs x {facts['steps_per_epoch']} steps, {facts['scans']} scans "
            f"({facts['held_out']} held out) of {'x'.join(map(str, facts['shape']))}, "
            f"{facts['parameters']:,} parameters, {facts['optimiser']} at {facts['lr']:.3g}, {facts['precision']}, "
            f"ZeRO-{facts['zero_stage']}, {facts['device']}, about {facts['estimated_gib']:.2g} GiB a rank, {begin}"
        )
        self.say(f"{self._name}: DeepSpeed is told {json.dumps(facts['deepspeed'])}")
        if self._console.is_terminal and not self._console.quiet:
            text = TextColumn("{task.fields[text]}")
            self._bar = Bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text, console=self._console)
            self._task = self._bar.add_task(self._name, total=self._total, completed=facts["step"], text="")
            self._bar.start()

    def step(self, done: int, epoch: int, record: Mapping[str, float]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=_text(record))
        elif epoch != self._said[0] or done >= self._said[1] + EVERY or done == self._total:
            self._said = (epoch, done)
            self.say(f"{self._name}: step {done}/{self._total} epoch {epoch} {_text(record)}")

    def finish(self, folder: Path) -> None:
        self.say(f"{self._name}: done in {time.perf_counter() - self._began:.0f} s -> {folder}")


def _text(record: Mapping[str, float]) -> str:
    return f"loss {record['loss']:.4f} uniformity {record['uniformity']:.3f} {record['samples_per_s']:.0f} scans/s"


class Counter:
    """Counts done of total, called as `counter(done, total)`: a bar on a terminal, else a line every quarter."""

    def __init__(self, what: str) -> None:
        self._what, self._quarter = what, 0
        self._console = console()
        text = TextColumn("{task.description}")
        self._bar = Bar(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task(what, total=None)
        self._terminal = self._console.is_terminal and not self._console.quiet

    def __enter__(self) -> "Counter":
        if self._terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._terminal:
            self._bar.update(self._task, completed=done, total=total)
        elif 4 * done // total > self._quarter:
            self._quarter = 4 * done // total
            self._console.print(f"{self._what}: {done} of {total}", markup=False)


class Counters:
    """A counter for each stage of a work, made when it begins: `counters(stage, done, total)`."""

    def __init__(self) -> None:
        self._open, self._what = contextlib.ExitStack(), ""
        self._counter: Counter | None = None

    def __enter__(self) -> "Counters":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._counter is None or what != self._what:
            self._open.close()
            self._what, self._counter = what, self._open.enter_context(Counter(what))
        self._counter(done, total)
