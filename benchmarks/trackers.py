"""What does a step cost that is told to a tracker: the training's own thread, and the tracker's behind it?

    python benchmarks/trackers.py --out benchmarks/results/DATE-trackers.json       # a minute

A record of 14 numbers, as a step has, and an epoch. All are files on the local disk: no server's network is in it.

tell    wall time of `Trackers.step`, which puts the step into a queue, between pauses of 5 ms
work    CPU time of the tracker's own thread for it: the training's may wait for that, as Python runs one at a time
wall    how long the tracker takes; where steps come faster, it writes them in batches
open    seconds before the first step, imports but torch's included
journal the line that the training's own thread writes

On a busy machine (`load` is in the file) the CPU times are the ones to read.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cauc_dist import trackers
from cauc_dist.config import RunConfig, Trackers
from cauc_dist.journal import Journal
from cauc_dist.provenance import provenance
from cauc_dist.trackers import mlflow, tensorboard, wandb
from cauc_dist.trackers.tracker import Point

RECORD = {f"field_{i}": 0.1234567 * i for i in range(14)}
STEPS = 500
MODULES = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
MICRO = 1e6


def journal(folder: Path) -> float:
    with Journal(folder) as events:
        return (
            median(timed(lambda i=i: events.write("step", step=i, epoch=0, **RECORD))[0] for i in range(STEPS)) * MICRO
        )


def timed(act: Any) -> tuple[float, float]:
    """Wall and CPU seconds of this thread."""
    began, cpu = time.perf_counter(), time.thread_time()
    act()
    return time.perf_counter() - began, time.thread_time() - cpu


def work(name: str, folder: Path) -> dict[str, float]:
    run = RunConfig(name="n", run=folder)
    began = time.perf_counter()
    tracker, _ = MODULES[name].open_tracker(run, trackers.settings(run), 0)
    opened = time.perf_counter() - began
    points = [Point(i, time.time(), {"epoch": 0.0, **RECORD}) for i in range(STEPS)]
    took = [timed(lambda point=point: tracker.log([point])) for point in points]
    tracker.close("finished")
    wall, cpu = (median(t[i] for t in took) * MICRO for i in (0, 1))
    return {"open_s": opened, "wall_us": wall, "work_us": cpu}


def tell(name: str, folder: Path) -> float:
    which = {n: n == name for n in MODULES}
    took = []
    with (
        Journal(folder) as events,
        trackers.Trackers(
            RunConfig(name="n", run=folder, trackers=Trackers(**which)), events, print, quiet=False
        ) as live,
    ):
        live.start(0)
        for i in range(STEPS):
            took.append(timed(lambda i=i: live.step(i, 0, RECORD))[0])
            time.sleep(0.005)
        live.close("finished")
    return median(took) * MICRO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    result: dict[str, Any] = {"provenance": provenance(), "load_before": os.getloadavg(), "steps": STEPS}
    with tempfile.TemporaryDirectory() as root:
        result["journal_us"] = journal(Path(root))
        for name in MODULES:
            folders = [Path(root) / f"{name}-{part}" for part in ("work", "tell")]
            for folder in folders:
                folder.mkdir()
            result[name] = {**work(name, folders[0]), "tell_us": tell(name, folders[1])}
    text = json.dumps({**result, "load_after": os.getloadavg()}, indent=1) + "\n"
    print(text)
    if out:
        out.write_text(text)


if __name__ == "__main__":
    main()
