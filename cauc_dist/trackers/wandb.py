"""Weights & Biases: RUN/wandb, offline unless WANDB_MODE says otherwise."""

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cauc_dist.config import RunConfig
from cauc_dist.trackers import tracker as kept
from cauc_dist.trackers.tracker import End, Point, Setting

DEFAULTS = {
    "WANDB_ERROR_REPORTING": "false",  # crash reports to its makers
    "WANDB_SILENT": "true",  # or it asks for a key on a terminal, and the ranks wait for the answer
}
"""Of the environment, where it has none of its own."""

FLUSH = 1.0
"""Seconds of a run that W&B's own process has in memory, and that end with a run that is killed (W&B's default: 15)."""


class Wandb:
    """A run of W&B with our numbers alone: no console, code, git state, machine, command line or package list."""

    def __init__(self, run: RunConfig, settings: Mapping[str, Setting], name: str, mode: Any) -> None:
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        import wandb

        quiet = wandb.Settings(
            silent=True,
            console="off",
            host="",
            program="cauc",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=FLUSH,
        )
        self._run = wandb.init(
            project=run.trackers.project,
            name=run.name,
            id=name,
            resume="allow",
            dir=str(run.folder),
            mode=mode,  # a wrong one is refused by W&B
            config=dict(settings),
            reinit="create_new",
            settings=quiet,
        )

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, "_timestamp": point.time}, step=point.step)

    def close(self, end: End) -> None:
        """W&B's own process writes on after `finish`, so its end is waited for, unless the caller has a run in it."""
        import wandb

        self._run.finish(exit_code=1 if end == "failed" else 0)
        if wandb.run is None:
            wandb.teardown()


def open_tracker(run: RunConfig, settings: Mapping[str, Setting], start: int) -> tuple[Wandb, str]:
    """With the line that says how what is kept here gets there. `start` is not asked for: see docs/trackers.md."""
    name = kept.ids(run.folder).get("wandb") or secrets.token_hex(4)
    kept.keep(run.folder, "wandb", name)  # before: a run killed at once goes on in it all the same
    mode = os.environ.get("WANDB_MODE") or "offline"
    tracker = Wandb(run, settings, name, mode)
    where = run.folder / "wandb"
    line = f"wandb: offline, upload with `wandb sync {where}/offline-run-*-{name}`" if mode == "offline" else ""
    return tracker, line
