"""Does pre-training help on real scans? Recipes x seeds x folds, probed on held-out subjects, every number kept.

    python benchmarks/real_input.py hippocampus --folds 1 --out benchmarks/results/DATE-hippocampus.json
    python benchmarks/real_input.py ixi50 --folds 5 --out benchmarks/results/DATE-ixi50.json

Needs $CAUC_DATA. Works in --work, so that a study can be stopped and gone on with.
A run that was trained is not trained again, only probed. A method's error of a subject is its mean over seeds; the
subjects of all folds are pooled; intervals are bootstraps over subjects, differences paired with the untrained encoder
of the same seeds.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cauc_dist import journal, recipes, spawn
from cauc_dist.prepare import prepare
from cauc_dist.probe import Score, Table, balanced_accuracy, interval, probe
from cauc_dist.provenance import provenance
from cauc_dist.store.ingest import ingest
from cauc_dist.store.planned import Settings

STUDIES: dict[str, tuple[str, tuple[int, int, int] | None]] = {
    "hippocampus": ("hippocampus260", (31, 40, 24)),
    "ixi50": ("ixi50", None),
}
METHODS = ("simclr", "yaware", "cauc")


def one(study: str, method: str, seed: int, fold: int, work: Path, ranks: int) -> Table:
    """Train (unless done) and probe one run; raw voxels depend on the fold alone and are probed with seed 0."""
    name = f"{study}_{method}"
    folder = work / f"{name}-seed{seed}-fold{fold}"
    if not folder.exists():
        recipe = recipes.get(name)
        data = dataclasses.replace(recipe.data, store=work / f"{study}.zarr", fold=fold)
        prepare(dataclasses.replace(recipe, run=folder, seed=seed, data=data), ranks)
    ended = any(event["event"] == "end" for event in journal.read(folder))
    if not ended and spawn.start(ranks, str(folder)) != 0:
        sys.exit(f"{folder} failed")
    return probe([folder], voxels=seed == 0)


def pooled(tables: dict[tuple[str, int, int], Table], seeds: int, folds: int) -> dict[str, dict[str, Any]]:
    """By method and column: error with its interval, spread over seeds, gain over the untrained encoder."""
    first = next(iter(tables.values()))
    summary: dict[str, dict[str, Any]] = {}
    for column in first.columns:
        category = first.scores["untrained"][column].metric != "MAE"
        truth = np.concatenate([held_out(tables, "untrained", 0, f, column).truth for f in range(folds)])

        def error(e: np.ndarray, y: np.ndarray, category: bool = category) -> np.ndarray:
            """Of subjects (..., n): the mean absolute error, or one minus the balanced accuracy."""
            return 1 - balanced_accuracy(y, e) if category else e.mean(-1)

        def of(row: str, column: str = column) -> np.ndarray:
            """(seeds, subjects), the subjects of all folds one after the other."""
            by_fold = [[held_out(tables, row, s, f, column).errors for f in range(folds)] for s in range(seeds)]
            return np.stack([np.concatenate(errors) for errors in by_fold])

        base = of("untrained").mean(0)
        for row in ("raw voxels", "untrained", *METHODS):
            e = of(row)
            mean = e.mean(0)
            summary.setdefault(row, {})[column] = {
                "error": error(mean, truth),
                "interval": interval(len(mean), lambda rows, m=mean, y=truth, f=error: f(m[rows], y[rows])),
                "sd_over_seeds": error(e, truth).std(ddof=1) if seeds > 1 and row != "raw voxels" else None,
                "gain_over_untrained": error(base, truth) - error(mean, truth),
                "gain_interval": interval(
                    len(mean), lambda rows, m=mean, b=base, y=truth, f=error: f(b[rows], y[rows]) - f(m[rows], y[rows])
                ),
            }
    return summary


def held_out(tables: dict[tuple[str, int, int], Table], row: str, seed: int, fold: int, column: str) -> Score:
    """One row's score; the baselines are read from the first method's table."""
    if row in METHODS:
        table = tables[row, seed, fold]
        return table.scores[next(iter(table.scores))][column]
    return tables[METHODS[0], 0 if row == "raw voxels" else seed, fold].scores[row][column]


def markdown(summary: dict[str, dict[str, Any]], chance: dict[str, float]) -> str:
    columns = list(next(iter(summary.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines.append("| chance | " + " | ".join(f"{chance[c]:.3g}" for c in columns) + " |")
    for row, cells in summary.items():
        texts = []
        for c in columns:
            s = cells[c]
            low, high = s["gain_interval"]
            mark = "" if row == "untrained" or not (low > 0 or high < 0) else (" better" if low > 0 else " worse")
            texts.append(f"{s['error']:.3g} [{s['interval'][0]:.3g}, {s['interval'][1]:.3g}]{mark}")
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/real_input"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=1, help="how many of the recipe's folds are held out in turn")
    parser.add_argument("--ranks", type=int, default=2)
    a = parser.parse_args()
    made_by = provenance()
    for made in (a.work, a.out.parent):
        made.mkdir(parents=True, exist_ok=True)
    folder, shape = STUDIES[a.study]
    if not (a.work / f"{a.study}.zarr").exists():
        print(ingest(Path(os.environ["CAUC_DATA"]) / folder, a.work / f"{a.study}.zarr", Settings(shape=shape)))
    tables = {
        (m, s, f): one(a.study, m, s, f, a.work, a.ranks)
        for s in range(a.seeds)
        for f in range(a.folds)
        for m in METHODS
    }
    summary = pooled(tables, a.seeds, a.folds)
    per_fold = [tables[METHODS[0], 0, f].chance for f in range(a.folds)]
    metrics = {c: s.metric for c, s in tables[METHODS[0], 0, 0].scores["untrained"].items()}
    means = {c: float(np.mean([fold[c] for fold in per_fold])) for c in metrics}
    chance = {c: means[c] if metrics[c] == "MAE" else 1 - means[c] for c in metrics}
    runs = [{"method": m, "seed": s, "fold": f, "table": json.loads(t.to_json())} for (m, s, f), t in tables.items()]
    record = {**made_by, "ranks": a.ranks, "summary": summary, "chance": chance, "runs": runs}
    a.out.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(summary, chance))
    print("error: mean absolute error of numbers, 1 - balanced accuracy of categories; [95 % bootstrap over subjects];")
    print("better/worse: than the untrained encoder, paired 95 % interval")


if __name__ == "__main__":
    main()
