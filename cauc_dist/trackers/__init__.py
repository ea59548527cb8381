"""Where a run's curves go besides its journal: TensorBoard, Weights & Biases, MLflow. Rank 0 writes, none ends a run.

They are told the numbers of each step, its epoch and the run's settings; no subject, no image, nothing of the
environment. docs/trackers.md has the formats, and what a resumed run looks like in each.
"""

import dataclasses
import importlib.util
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from textwrap import shorten
from typing import Any

from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.journal import Journal
from cauc_dist.provenance import without_secrets
from cauc_dist.trackers.tracker import End, Point, Setting, Tracker

BEHIND = 10_000
"""Steps that a tracker may be behind its run before it is dropped."""
PATIENCE = 30.0
"""Seconds that the end of a run waits for a tracker to write what it was told."""
EXTRAS = {"wandb": "wandb", "mlflow": "mlflow"}
"""Package of a tracker -> the extra of cauc-dist that brings it."""


def check(run: RunConfig) -> None:
    """BadInput where a run asks for a tracker whose package is not here."""
    for package, extra in EXTRAS.items():
        if getattr(run.trackers, package) and importlib.util.find_spec(package) is None:
            raise BadInput(
                f"trackers.{package} is asked for and the package {package} is not installed",
                wanted="the package",
                do=f"install it by `pip install 'cauc-dist[{extra}]'`, or leave --trackers.{package} out",
            )


def settings(run: RunConfig) -> dict[str, Setting]:
    """The run's config, flat: `optim.lr` -> .001. Lists are JSON text, None is `none`; URLs lose user and query."""
    return dict(_flat("", dataclasses.asdict(run)))


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Setting]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, _setting(value)


def _setting(value: object) -> Setting:
    if value is None:
        return "none"
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return json.dumps([_setting(item) for item in value])
    return without_secrets(str(value))


def numbers(record: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers of a journal's record; a NaN is a gap, as it is in the journal."""
    plain = {k: float(v) for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {k: v for k, v in plain.items() if math.isfinite(v)}


class Trackers:
    """The trackers of a run. One that fails or falls behind is told of once, as event and line, and dropped.

    `start` opens them, before the first step. `quiet`: this rank tells none.
    """

    def __init__(self, run: RunConfig, journal: Journal, say: Callable[[str], None], *, quiet: bool) -> None:
        self._run, self._journal, self._say, self._quiet = run, journal, say, quiet
        self._working: dict[str, Behind] = {}

    def start(self, step: int) -> None:
        """Open each that the run asks for; it goes on in what an earlier life of the run has left, from `step` on."""
        for name, open_tracker in _openers().items():
            if getattr(self._run.trackers, name) and not self._quiet:
                with self._guarded(name):
                    tracker, line = open_tracker(self._run, settings(self._run), step)
                    self._working[name] = Behind(name, tracker)
                    if line:
                        self._say(line)

    def step(self, number: int, epoch: int, record: Mapping[str, object]) -> None:
        """Tell all of a step; returns at once."""
        if self._working:
            point = Point(number, time.time(), {"epoch": float(epoch), **numbers(record)})
            for name, working in list(self._working.items()):
                with self._guarded(name):
                    working.put(point)

    def close(self, end: End) -> None:
        """Wait until all is written, `PATIENCE` s in all. Again, it does nothing; left open, a run has failed."""
        deadline = time.monotonic() + PATIENCE
        last, self._working = self._working, {}
        for working in last.values():
            working.end(end)
        for name, working in last.items():
            with self._guarded(name):
                working.join(deadline)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """An exception of a tracker is its own end, not the run's."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self._working.pop(name, None)
            self._lost(name, error)

    def _lost(self, name: str, error: BaseException) -> None:
        message = shorten(f"{type(error).__name__}: {error}", 300)
        with suppress(BadInput):  # a journal without room says so in its own next line, not instead of another error
            self._journal.write("tracker_lost", tracker=name, message=message)
        self._say(f"{name} is told no more, the run goes on without ({message})")

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close("failed")


class Behind:
    """A tracker at work in a thread of its own: a slow disk or a server that hangs costs the training nothing."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._tracker = tracker
        self._queue: queue.Queue[Point | End] = queue.Queue(BEHIND)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"cauc-{name}", daemon=True)
        self._thread.start()

    def put(self, point: Point) -> None:
        """Raises what the tracker has raised since, or BlockingIOError where it is `BEHIND` steps late."""
        if self._error is not None:
            raise self._error
        try:
            self._queue.put_nowait(point)
        except queue.Full:
            raise BlockingIOError(f"{BEHIND:,} steps late") from None

    def end(self, end: End) -> None:
        try:
            self._queue.put_nowait(end)
        except queue.Full:
            self._error = BlockingIOError(f"{BEHIND:,} steps late")

    def join(self, deadline: float) -> None:
        """Wait for the end until `deadline` (monotonic s). Raises as `put`, and TimeoutError."""
        if self._error is None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(f"not done {PATIENCE:.0f} s after the end")

    def _work(self) -> None:
        try:
            while True:
                taken = [self._queue.get()]
                while not self._queue.empty():
                    taken.append(self._queue.get())
                points = [item for item in taken if isinstance(item, Point)]
                if points:
                    self._tracker.log(points)
                if not isinstance(taken[-1], Point):
                    self._tracker.close(taken[-1])
                    return
        except BaseException as error:  # raised again where the run's own thread tells of it
            self._error = error


def _openers() -> dict[str, Callable[[RunConfig, dict[str, Setting], int], tuple[Tracker, str]]]:
    """Tracker by the name of its setting: what opens it, and returns a line to say (or nothing) with it."""
    from cauc_dist.trackers import mlflow, tensorboard, wandb

    return {"tensorboard": tensorboard.open_tracker, "wandb": wandb.open_tracker, "mlflow": mlflow.open_tracker}
