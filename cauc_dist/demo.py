"""`cauc demo`: from nothing to a probed model, as a user would do it, on a cohort that is made on the spot."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cauc_dist import phantoms, recipes, spawn
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.prepare import prepare
from cauc_dist.probe import probe
from cauc_dist.progress import Counter
from cauc_dist.report import report
from cauc_dist.store.ingest import ingest
from cauc_dist.stream.plan import per_rank
from cauc_dist.table import Table

METHODS = ("demo_simclr", "demo_yaware", "demo_cauc")


@dataclass(frozen=True)
class Scale:
    """How much is done of each training; `epochs` and `batch_size` None: as the recipes say."""

    subjects: int
    size: int
    epochs: int | None = None
    batch_size: int | None = None

    def of(self, run: RunConfig) -> RunConfig:
        """The run, so reduced."""
        epochs, batch_size = self.epochs or run.epochs, self.batch_size or run.batch_size
        return dataclasses.replace(run, epochs=epochs, batch_size=batch_size)


FULL, QUICK = Scale(240, 48), Scale(48, 24, epochs=3, batch_size=16)
CHAIN_ONLY = "The quick demo shows that the chain works, and nothing of the methods: leave --quick out for that."


def demo(
    folder: Path,
    *,
    subjects: int | None = None,
    size: int | None = None,
    ranks: int,
    seed: int,
    say: Callable[[str], None],
    quick: bool = False,
) -> int:
    """Cohort, store, three trainings on `ranks` processes, probes, report; the exit code of a training that fails.

    Writes `folder`, which must not exist: cohort/ (BIDS), store.zarr, METHOD/ (runs), table.json, report.html.
    `quick`: QUICK instead of FULL, the same chain and files in less than a minute; its scores say nothing of a method.
    `subjects`, `size`: default, those of either.
    """
    if folder.exists():
        raise BadInput(f"{folder} exists", wanted="a new folder", do="remove it, or choose another with --folder")
    scale = QUICK if quick else FULL
    subjects = scale.subjects if subjects is None else subjects
    size = scale.size if size is None else size
    _check(subjects, size, ranks, scale)
    began = time.perf_counter()

    def stage(number: int, text: str) -> None:
        say(f"\n[{number}/5] {text} ({time.perf_counter() - began:.0f} s)")

    stage(1, f"{subjects} synthetic heads of {size}^3 as NIfTI with participants.tsv")
    with Counter("phantoms") as counter:
        phantoms.write_cohort(folder / "cohort", n=subjects, size=size, seed=seed, progress=counter)
    stage(2, "cauc ingest: NIfTI -> Zarr store")
    with Counter("ingest") as counter:
        say(str(ingest(folder / "cohort", folder / "store.zarr", progress=lambda what, done, n: counter(done, n))))
    stage(3, f"cauc train: {', '.join(METHODS)}, {ranks} ranks each")
    runs = []
    for name in METHODS:
        recipe = scale.of(recipes.get(name))
        data = dataclasses.replace(recipe.data, store=str(folder / "store.zarr"))
        run = prepare(dataclasses.replace(recipe, run=folder / name, seed=seed, data=data), ranks)
        code = spawn.start(ranks, str(run))
        if code != 0:
            return code
        runs.append(run)
    stage(4, "cauc probe: ridge and logistic probes of frozen features on held-out subjects")
    table = probe(runs, say=say)
    (folder / "table.json").write_text(table.to_json(), encoding="utf-8")
    stage(5, "cauc report")
    report(runs, folder / "report.html", folder / "table.json", maps=not quick, say=say)
    say(f"\n{table}\n\n{CHAIN_ONLY if quick else verdict(table)}")
    say(f"{folder / 'report.html'} has the curves ({time.perf_counter() - began:.0f} s in all)")
    return 0


def _check(subjects: int, size: int, ranks: int, scale: Scale) -> None:
    """Refuse before the first minute of work what would be refused after it."""
    batch_size = scale.of(recipes.get(METHODS[0])).batch_size
    per_rank(batch_size, ranks)
    for name, value, least in (("subjects", subjects, 2 * batch_size), ("size", size, 16)):
        if value < least:
            raise BadInput(f"--{name} {value}", wanted=f"{least} or more", do=f"leave --{name} out for the default")


def verdict(table: Table) -> str:
    """Age error against the untrained encoder, one line a method, with its paired interval."""
    lines = []
    for method in METHODS:
        gain, low, high = table.difference(method, "untrained", "age")
        word = "better" if low > 0 else "not shown to be better"
        lines.append(
            f"{method}: age error {gain:+.2f} years below the untrained encoder [{low:.2f}, {high:.2f}]: {word}"
        )
    return "\n".join(lines)
