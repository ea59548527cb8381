"""A run's job once more: the same folder and code, from the newest sound checkpoint, on any number of ranks."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cauc_dist import config
from cauc_dist.errors import BadInput
from launch import script, slurm, state, submit
from launch import site as sites
from launch.site import Resources, Site
from launch.state import CANCELLED, RUNS, UNKNOWN
from launch.submit import LAUNCH, Say, alone


@dataclass(frozen=True)
class Before:
    """What a run was last queued with; `folder` holds its launch.json and snapshot: its own, or its sweep's."""

    folder: Path
    resources: Resources
    site: Site

    def at(self, site: str | None) -> "Before":
        """The same elsewhere: what the other site's file sets wins."""
        if site is None:
            return self
        there, usual = sites.read(site), Resources()
        sets = {f.name: getattr(there.resources, f.name) for f in dataclasses.fields(Resources)}
        sets = {name: value for name, value in sets.items() if value != getattr(usual, name)}
        return Before(self.folder, dataclasses.replace(self.resources, **sets), there)


def before(run: Path) -> Before:
    """From launch.json; a run that `cauc train` made has none, and begins with what a job asks for by default."""
    member = (run.parent / RUNS).is_file()
    home = next((folder for folder in (run, *[run.parent] * member) if (folder / LAUNCH).exists()), run)
    if not (home / LAUNCH).exists():
        return Before(run, Resources(), Site())
    path = home / LAUNCH
    try:
        said = json.loads(path.read_bytes())
        return Before(
            home,
            config.typed(said["resources"], Resources, f"{path}: resources"),
            config.typed(said["site"], Site, f"{path}: site"),
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{path} is damaged ({error!r})", wanted="what `launch submit` wrote", do="restore it, or remove it"
        ) from None


def resume(run: Path, resources: Resources, site: Site, *, say: Say) -> str:
    """Check, queue; the job's id. BadInput for a run that is live or complete, and what `cauc resume` refuses.

    One at a time a run, and none while its sweep is run again: another could queue it between check and record.
    """
    folder = run.absolute()
    slurm.required()
    with contextlib.ExitStack() as stack:
        if (folder.parent / RUNS).is_file():
            stack.enter_context(alone(folder.parent, shared=True))
        stack.enter_context(alone(folder))
        _refuse(run)
        return _resume(folder, resources, site, say)


def _resume(folder: Path, resources: Resources, site: Site, say: Say) -> str:
    submit.check_folder(folder, site)
    began = time.monotonic()
    from cauc_dist import checkpoint
    from cauc_dist.prepare import check, check_store, load
    from cauc_dist.train import card

    training = load(folder)
    name = script.name_of(training.name, folder)
    refuse_unnoted({name: ""} | _task(folder), state.jobs(folder).ids)
    submit.check_place(training, site)
    submit.check_times(training, resources)
    store = check(training, resources.ranks, 0)
    check_store(folder, store)
    saved, complaints = checkpoint.latest(folder, card(training, store))
    came_up = time.monotonic() - began
    submit.check_checkpoint(training, resources)
    origin = before(folder).folder
    snapshot(folder, origin)
    (folder / script.SLURM).mkdir(exist_ok=True)
    made = script.executor(folder, resources, site, name)
    answer = submit.asked(script.text(made), folder, site, came_up)
    for line in (*complaints, submit.plan(training, resources), answer):
        say(line)
    with not_cancelled([folder], name, say):
        (id,) = submit.queue(made, folder, site, [folder])
        submit.record(folder, id=id, name=name)
        submit.note(folder, resources, site)
    say(f"job {id} ({name}) goes on from {saved.path.name if saved else 'the beginning: there is no checkpoint'}")
    return id


def _refuse(run: Path) -> None:
    """A run folder is never two jobs', and a complete run has nothing to go on with."""
    (now,) = state.status([run])
    if now.state == UNKNOWN:
        raise BadInput(
            f"whether {run} is at work is not known ({now.reason})",
            wanted="a run that has left the queue",
            do="ask again when SLURM answers, or look where its job was queued",
        )
    if now.live:
        raise BadInput(
            f"{run} is live: {now.where}",
            wanted="a run that has left the queue",
            do=f"wait for it, or end it first by `python -m launch cancel {run}`",
        )
    if now.state == "COMPLETED":
        raise BadInput(
            f"{run} is complete: {now.step} of {now.steps} steps",
            wanted="a run with steps left",
            do=f"train it anew by `python -m launch submit {run / state.CONFIG} --run ANOTHER`",
        )


def refuse_unnoted(names: Mapping[str, str], known: Collection[str]) -> None:
    """Refuse where the queue has a job of one of these names whose id was never noted: submit.handed says why.

    `names`: how the id of such a job ends: _K for task K of an array.
    """
    for job in slurm.queue():
        if job.id not in known and job.name in names and job.id.endswith(names[job.name]):
            raise BadInput(
                f"job {job.id} ({job.name}) is {job.state}, and its launch was cut off before it noted that",
                wanted="a run folder that no job has",
                do=f"wait for it, or end it first: scancel {job.id}",
            )


def _task(run: Path) -> dict[str, str]:
    """Of a sweep's member the name of the array, and how its own task's id ends."""
    path = run.parent / RUNS
    members = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    name = script.name_of(run.parent.name, run.parent)
    return {name: f"_{members.index(run.name)}"} if run.name in members else {}


def snapshot(run: Path, origin: Path) -> None:
    """The code that the run began with, whole: its own, its sweep's, or, of a run that had no job yet, today's."""
    if (run / script.SNAPSHOT).exists():
        return
    temporary = Path(tempfile.mkdtemp(prefix=".snapshot.", dir=run))
    try:
        if (origin / script.SNAPSHOT).exists():
            shutil.copytree(origin / script.SNAPSHOT, temporary / script.SNAPSHOT)
        else:
            script.snapshot(temporary)
        (temporary / script.SNAPSHOT).rename(run / script.SNAPSHOT)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def not_cancelled(runs: Sequence[Path], name: str, say: Say) -> Iterator[None]:
    """Around sbatch: the script must not find RUN/cancelled. Where the job is refused it is there again."""
    marks = {mark: mark.read_bytes() for mark in (run / CANCELLED for run in runs) if mark.exists()}

    def restore() -> None:
        for mark, ids in marks.items():
            mark.write_bytes(ids)

    for mark in marks:
        mark.unlink(missing_ok=True)
    with submit.handed(name, say, restore):
        yield
