"""Does the projection of `cauc bench scale` hold on a cluster of several nodes whose links are limited?

    export SITE=/tmp/scale-site DBD=0
    slurm/cluster/cluster.sh with python -m benchmarks.scale_cluster --out FILE.json    # five minutes
    python -m benchmarks.scale_cluster --table FILE.json                                # its table again

As root, in the checkout. On one node a step is measured and the model is fitted; then, for each rate, on 2 and 4 nodes
of one rank each, beside the same without a limit: the nodes share this machine's cores, so that a step on more of them
computes more slowly than the model, which takes each node for a machine of its own, can know. What a limit adds to a
step is the network's alone, and is judged by itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.step import cohort
from cauc_dist import recipes
from cauc_dist.bench import record, step
from cauc_dist.bench.projection import Link, Model, Point, fit, project
from cauc_dist.bench.rank import Measured
from cauc_dist.config import Encoder, RunConfig
from cauc_dist.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = str(ROOT / "slurm/cluster/cluster.sh")
WORLDS, RATES, COUNT = (2, 4), (200, 50), 6
"""Ranks; Mbit/s of each node's link, both ways; steps, of which the median is taken."""
WITHIN = 0.2
"""Of what a limit adds to a step."""


def the_run(store: Path, batch: int) -> RunConfig:
    run = recipes.get("demo_cauc")
    data = replace(run.data, store=str(store), folds=1)
    return replace(
        run, batch_size=batch, data=data, encoder=Encoder(width=32), engine=replace(run.engine, device="cpu")
    )


def on_nodes(run: RunConfig, world: int, batches: list[int], folder: Path) -> list[Measured]:
    """Steps on one rank of each of `world` nodes, started by srun."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        step.ask(Path(place), run, batches, COUNT, 1)
        ranks = [
            "srun",
            f"-N{world}",
            f"-n{world}",
            "--ntasks-per-node=1",
            sys.executable,
            "-m",
            "cauc_dist.bench.rank",
        ]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*ranks, place], cwd=ROOT, env=env, check=True, timeout=300)
        return step.answer(Path(place))


def limit(rate: str) -> None:
    """The links of all nodes."""
    for node in range(1, max(WORLDS) + 1):
        subprocess.run([CLUSTER, "rate", f"n{node}", rate], check=True, timeout=30)


def benchmark(batch: int, out: Path | None) -> dict[str, Any]:
    """Every point; links are without a limit afterwards."""
    points: list[dict[str, Any]] = []
    found = {**provenance(), "question": (__doc__ or "").splitlines()[0], "batch": batch, "points": points}
    with tempfile.TemporaryDirectory(prefix="cauc-scale-") as temporary:
        folder = Path(temporary)
        run = the_run(cohort(folder, 64, 32), batch)
        alone = on_nodes(run, 1, [batch, batch // 2], folder)
        found["alone"] = [asdict(one) for one in alone]
        try:
            for world in WORLDS:
                limit("none")
                (free,) = on_nodes(run, world, [batch], folder)
                for rate in RATES:
                    limit(f"{rate}mbit")
                    (one,) = on_nodes(run, world, [batch], folder)
                    points.append(compared(alone, free, one, rate))
                    print(line(points[-1]), flush=True)
        finally:
            limit("none")
    if out is not None:
        record.save(json.loads(json.dumps(found).replace("Infinity", "null")), out)
    return found


def compared(alone: list[Measured], free: Measured, one: Measured, rate: int) -> dict[str, Any]:
    """A step on limited links beside its projection from one node, told the rate, and what the limit adds to it."""
    network = Link(rate * 1e6 / 8, free.link.latency)
    first = alone[0]
    bare = Model(0, 0, 0, first.gradient_bytes, first.z_bytes, one.zero_stage, first.small, True, network, network)
    model = fit(bare, [Point(1, each.batch, each.median_s) for each in alone])
    wide = replace(model, inner=free.link, network=free.link)
    row, unlimited = (project(each, one.ranks, one.batch) for each in (model, wide))
    return {
        "ranks": one.ranks,
        "mbit": rate,
        "step_s": one.step_s,
        "free_s": free.step_s,
        "projected_s": row.step_s,
        "error": row.step_s / one.median_s - 1,
        "added_s": one.median_s - free.median_s,
        "projected_added_s": row.step_s - unlimited.step_s,
        "sent_bytes": one.sent_bytes,
        "projected_sent_bytes": row.sent_bytes,
        "allreduce_mbit": one.link.bandwidth * 8e-6,
    }


def line(p: dict[str, Any]) -> str:
    added, step_s = p["projected_added_s"] / p["added_s"] - 1, median(p["step_s"])
    return (
        f"{p['ranks']} nodes, {p['mbit']:>4} Mbit/s: step {step_s:.3f} s, projected "
        f"{p['projected_s']:.3f} ({p['error']:+.0%}); the limit adds {p['added_s']:.3f} s, projected "
        f"{p['projected_added_s']:.3f} ({added:+.0%}, {'met' if abs(added) <= WITHIN else 'MISSED'}: wanted within "
        f"{WITHIN:.0%}); bytes sent over projected {p['sent_bytes'] / p['projected_sent_bytes']:.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--batch", type=int, default=16, help="subjects a step over all ranks")
    parser.add_argument("--table", type=Path, help="a result: print its table again, run nothing")
    a = parser.parse_args()
    found = json.loads(a.table.read_text()) if a.table else benchmark(a.batch, a.out)
    print("\n".join(map(line, found["points"])) if a.table else "done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
