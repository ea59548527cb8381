"""`cauc reproduce NAME`: methods x seeds x splits of a study, each once, then one table, plots and where all is from.

`cohort` makes the store, `member` trains and scores one, `workers` are their processes, `resample` and `results` are
the statistics, `page` and `figures` what is read.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cauc_dist import config, durable
from cauc_dist.config import RunConfig
from cauc_dist.errors import NON_FINITE, BadInput
from cauc_dist.prepare import PROVENANCE, check
from cauc_dist.reproduce import figures, page, workers
from cauc_dist.reproduce.chance import chance
from cauc_dist.reproduce.cohort import store_of
from cauc_dist.reproduce.member import SCORES, VERSION, Work
from cauc_dist.reproduce.results import results
from cauc_dist.store.reader import Store
from cauc_dist.study import Member, Study, chosen, members, run_of
from cauc_dist.world import World, cores

RUNS, LOGS, ARMS, MANIFEST = "runs", "logs", "arms", "manifest.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a study is kept, and on what it runs."""

    folder: Path
    store: Path
    device: Literal["auto", "cpu", "cuda"] | None = None
    """None: as each arm says."""

    def home(self, member: Member) -> Path:
        """The folder of a member: here, or that of a sweep of the same manifest (`python -m launch reproduce`)."""
        swept = [p for p in self.folder.glob(f"sweep-*/*-{member.name}") if p.name.partition("-")[2] == member.name]
        return max(swept) if swept else self.folder / RUNS / member.name


def reproduce(
    study: Study,
    folder: Path,
    *,
    methods: Sequence[str] = (),
    seeds: int | None = None,
    jobs: int | None = None,
    data: Path | None = None,
    store: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    only: Literal["all", "check", "tables"] = "all",
    say: Say = print,
) -> dict[str, Any]:
    """Run what is missing of the study in `folder`, then write results.json, results.md and figures of all of it.

    `methods`, `seeds`: a subset of what is run (not of what is told). `only`: `check` ends after the manifest,
    `tables` runs nothing. Raises BadInput before any member runs where the study cannot be run on that store.
    """
    place = Place(folder.absolute(), (store or folder / "store.zarr").absolute(), device)
    wanted = list(members(study, chosen(study, methods), seeds))
    if not wanted:
        raise BadInput("no member is asked for", wanted="one seed or more", do="e.g. --seeds 1")
    if only != "tables":
        store_of(study, place.store, data, say)
        _check(study, wanted, place)
        write_manifest(study, wanted, place)
    failed = [] if only != "all" else _run(study, wanted, place, jobs or cores(), say)
    return {} if only == "check" else tell(study, place, failed, say)


def tell(study: Study, place: Place, failed: Sequence[str], say: Say) -> dict[str, Any]:
    """results.json, results.md and figures of the members that are done."""
    records = {m: record for m in members(study, chosen(study, ())) if (record := read_scores(place.home(m)))}
    if not records:
        raise BadInput(f"no member of {study.name} is done in {place.folder}", wanted="one", do="look into its logs")
    blind = chance(study, records, Store.open(str(place.store))) if place.store.exists() else {}
    found = results(study, {**records, **blind}, failed, place.folder)
    found["members"] = len(records)
    found |= {"unfinished": unfinished(study, place), "commits": _commits(study, records, place)}
    durable.replace(place.folder / "results.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    durable.replace(place.folder / "results.md", page.markdown(found).encode())
    for path in figures.draw(found, place.folder):
        say(f"wrote {path}")
    say(f"wrote {place.folder / 'results.json'} and results.md: {len(records)} members")
    return found


def unfinished(study: Study, place: Place) -> list[str]:
    """Members that were begun, by any earlier call, and have no scores: what failed, was stopped, or is at work."""
    begun = [m for m in members(study, chosen(study, ())) if _log(place, m).exists() or place.home(m).exists()]
    return [m.name for m in begun if read_scores(place.home(m)) is None]


def _log(place: Place, member: Member) -> Path:
    return place.folder / LOGS / f"{member.name}.log"


def _commits(study: Study, records: Iterable[Member], place: Place) -> dict[str, int]:
    """How many of the trained members each state of the code trained; unknown where scores.json came alone."""
    files = [place.home(member) / PROVENANCE for member in records if member.arm in study.arms]
    states = [json.loads(file.read_text(encoding="utf-8"))["git"] if file.exists() else None for file in files]
    return dict(Counter(page.state(git) for git in states))


def read_scores(home: Path) -> dict[str, Any] | None:
    """The scores of a member that is done, of this version; else None."""
    try:
        record: dict[str, Any] = json.loads((home / SCORES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record if record["version"] == VERSION else None


def write_manifest(study: Study, wanted: Sequence[Member], place: Place) -> Path:
    """FOLDER/manifest.json: what `python -m launch sweep --manifest` takes, of the members that are trained."""
    (place.folder / ARMS).mkdir(parents=True, exist_ok=True)
    entries = []
    for member in wanted:
        if member.arm not in study.arms or read_scores(place.home(member)):
            continue
        run = _configured(study, member, place)
        recipe = place.folder / ARMS / f"{member.arm}.json"
        durable.replace(recipe, config.to_json(study.arms[member.arm]).encode())
        overrides = {"name": run.name, "seed": run.seed, "data.store": run.data.store, "data.split": run.data.split}
        entries.append({"name": member.name, "recipe": str(recipe), "overrides": overrides})
    path = place.folder / MANIFEST
    durable.replace(path, (json.dumps(entries, indent=1) + "\n").encode())
    return path


def _configured(study: Study, member: Member, place: Place) -> RunConfig:
    run = run_of(study, member, str(place.store))
    engine = run.engine if place.device is None else dataclasses.replace(run.engine, device=place.device)
    silent = dataclasses.replace(run.trackers, tensorboard=False)  # thousands of members, whose curves nobody looks at
    return dataclasses.replace(run, name=member.name, engine=engine, trackers=silent)


def _check(study: Study, wanted: Sequence[Member], place: Place) -> None:
    """BadInput, by the name of the arm, where one cannot be trained on this store: found before any is."""
    first = {member.arm: member for member in reversed(wanted) if member.arm in study.arms}
    for arm, member in first.items():
        try:
            check(_configured(study, member, place), 1)
        except BadInput as error:
            raise BadInput(f"arm {arm}: {error.found}", wanted=error.wanted, do=error.do) from None


def _run(study: Study, wanted: Sequence[Member], place: Place, jobs: int, say: Say) -> list[str]:
    """Run the members that are not done; the names of those that failed."""
    missing = [member for member in wanted if read_scores(place.home(member)) is None]
    say(f"{study.name}: {len(wanted)} members, {len(wanted) - len(missing)} are done, {jobs} at a time")
    (place.folder / LOGS).mkdir(parents=True, exist_ok=True)
    # functions stay here: some cannot be sent to a process
    sendable = dataclasses.replace(study, source=dataclasses.replace(study.source, columns=None, person=None))
    tasks = []
    for member in missing:
        work = Work(sendable, member, _configured(study, member, place), place.home(member))
        tasks.append(workers.Task(member.name, _log(place, member), work))
    failed: Counter[str] = Counter()
    for i, ended in enumerate(workers.run(tasks, jobs, threads=max(1, cores() // jobs), cuda=_cuda(tasks)), 1):
        how = "" if ended.code == 0 else f" FAILED ({_why(ended)}, see {ended.log})"
        say(f"[{i}/{len(missing)}] {ended.name} {ended.seconds:.0f} s{how}")
        failed[ended.name] += ended.code != 0
    return [name for name, times in failed.items() if times]


def _cuda(tasks: Sequence[workers.Task]) -> bool:
    devices = {task.work.run.engine.device for task in tasks if isinstance(task.work, Work)}
    return any(World().device(device).type == "cuda" for device in devices)


def _why(ended: workers.Ended) -> str:
    if ended.code == NON_FINITE:
        return "loss or gradient not finite"
    lines = ended.log.read_text(encoding="utf-8", errors="replace").splitlines() if ended.log.exists() else []
    return lines[-1] if lines else f"exit code {ended.code}"
