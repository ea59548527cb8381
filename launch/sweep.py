"""A recipe over a grid of overrides, or a list of runs, as one array.

SWEEP/manifest.json says which member is what; line K + 1 of SWEEP/runs is the run folder of task K, in the first array
and in every later one: a member keeps its number, and a requeued task finds its own folder.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cauc_dist import config
from cauc_dist.cli.runs import recipe_of
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput, nearest
from launch import resume, script, slurm, state, submit
from launch.site import Resources, Site
from launch.state import RUNS, UNKNOWN
from launch.submit import LAUNCH, Say

MANIFEST = "manifest.json"
LONGEST = 100
"""Characters of a member's name."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep: a recipe and what is different in it; an entry of the manifest."""

    name: str
    recipe: str
    """A recipe's name, or a config.json."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values by dotted fields of RunConfig: {"optim.lr": 0.001}."""
    index: int = 0
    """Number of its task in the array."""
    run: str = ""
    """Its folder in the sweep's."""


def grid(recipe: str, base: RunConfig, axes: Sequence[str], seeds: Sequence[int]) -> list[Member]:
    """The product of the axes (`optim.lr=1e-3,1e-4`) and the seeds, of which the last changes first.

    `base`: the recipe with what all members have different from it.
    """
    values: dict[str, list[Any]] = {}
    for name, those in [*map(_axis, axes), *([("seed", list(seeds))] if seeds else [])]:
        if name in values:
            raise BadInput(f"{name} twice in a grid", wanted="an axis a field", do="put its values together")
        values[name] = those
    if not values:
        raise BadInput("a sweep without --grid and --seeds", wanted="one of them", do="e.g. --grid optim.lr=1e-3,1e-4")
    shared = _differences(recipe_of(recipe), base)
    chosen = [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]
    return numbered([Member(_name(one), recipe, shared | one) for one in chosen])


def listed(path: Path) -> list[Member]:
    """The members that a file names: a JSON list of {name, recipe, overrides}; a sweep's manifest.json is one."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error})", wanted="a list of runs", do="mend it") from None
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{path} holds no list of runs", wanted="[{name, recipe, overrides}, ...]", do="mend it")
    return numbered([config.typed(entry, Member, f"{path}[{i}]") for i, entry in enumerate(entries)])


def numbered(members: Sequence[Member]) -> list[Member]:
    """The same with their numbers and folders."""
    width = max(3, len(str(len(members) - 1)))
    return [
        dataclasses.replace(member, index=i, run=f"{i:0{width}d}-{_plain(member.name)}")
        for i, member in enumerate(members)
    ]


def sweep(
    members: Sequence[Member],
    folder: Path,
    resources: Resources,
    site: Site,
    *,
    throttle: int | None = None,
    say: Say,
    dry_run: bool = False,
) -> Path:
    """Check all members, write the sweep's folder and theirs, queue them as one array; the folder.

    `throttle`: how many run at a time. `dry_run` says the script and the members, and writes nothing. Raises BadInput
    for the first member that cannot be a run, by its name; the folder then does not exist. Where sbatch gives no clear
    answer it stays: the array may be in the queue.
    """
    folder = folder.absolute()
    runs = [run_of(member, folder) for member in members]
    made = _executor(folder, resources, site, members, throttle)
    text = script.text(made, _padded(members))
    if dry_run:
        say(text)
        say("\n".join(f"{run.folder.name}: {submit.plan(run, resources)}" for run in runs))
        return folder
    slurm.required()
    submit.check_folder(folder, site)
    _claim(folder)
    with submit.alone(folder):
        with submit.whole(folder):
            came_up = _prepare(members, runs, resources, site)
            submit.write(folder, resources, site)
            _write(folder, members)
            say("\n".join(dict.fromkeys(submit.plan(run, resources) for run in runs)))
            say(submit.asked(text, folder, site, came_up))
        with submit.handed(made.parameters["job_name"], say, lambda: submit.remove(folder)):
            queued = _queue(made, folder, site, members, members)
    say(queued)
    return folder


def _claim(folder: Path) -> None:
    """Make the sweep's folder: of two that begin at a time, it is one's."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        do = f"run what failed there again by `launch sweep --rerun {folder}`, or choose another with --run"
        raise BadInput(f"sweep folder {folder} exists already", wanted="a new one", do=do) from None


def rerun(
    folder: Path, resources: Resources, site: Site, *, throttle: int | None = None, say: Say, dry_run: bool = False
) -> list[Member]:
    """Queue those members of a sweep again that are neither done nor live, from their newest checkpoints; them."""
    folder = folder.absolute()
    members = read(folder)
    if dry_run:
        again = _undone(folder, members, say)
        if again:
            say(script.text(_executor(folder, resources, site, members, throttle, again), _padded(members)))
        say("\n".join(member.run for member in again) or f"nothing to run again in {folder}")
        return again
    slurm.required()
    with submit.alone(folder):
        again = _undone(folder, members, say)
        if not again:
            say(f"nothing to run again in {folder}")
            return []
        made = _executor(folder, resources, site, members, throttle, again)
        known = [id for member in members for id in state.jobs(folder / member.run).ids]
        resume.refuse_unnoted({made.parameters["job_name"]: ""}, known)
        came_up = _check_again(folder, again, resources, site)
        say(submit.asked(script.text(made, _padded(members)), folder, site, came_up))
        runs = [folder / member.run for member in again]
        with resume.not_cancelled(runs, made.parameters["job_name"], say):
            queued = _queue(made, folder, site, members, again)
            for home in (folder, *(run for run in runs if (run / LAUNCH).exists())):  # a member's own comes before it
                submit.note(home, resources, site)
    say(queued)
    return again


def _check_again(folder: Path, again: Sequence[Member], resources: Resources, site: Site) -> float:
    """What `sweep` checks of its members, on these resources; seconds that it took to come up."""
    submit.check_folder(folder, site)
    began = time.monotonic()
    from cauc_dist.prepare import check, check_store, load

    runs = []
    seconds = 0.0
    for member in again:
        with _named(member):
            run = load(folder / member.run)
            submit.check_place(run, site)
            submit.check_times(run, resources)
            check_store(run.folder, check(run, resources.ranks, 0))
        runs.append(run)
        seconds = seconds or time.monotonic() - began
    submit.check_checkpoint(max(runs, key=submit.checkpoint_bytes), resources)
    return seconds


def read(folder: Path) -> list[Member]:
    """The members of a sweep's folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BadInput(f"no {MANIFEST} in {folder}", wanted="a sweep's folder", do="give the one that `sweep` printed")
    return listed(path)


def run_of(member: Member, sweep: Path) -> RunConfig:
    """The whole configuration of a member; BadInput names it."""
    with _named(member):
        values = dataclasses.asdict(recipe_of(member.recipe))
        for name, value in member.overrides.items():
            _kind(name)
            *above, last = name.split(".")
            inner = values
            for part in above:
                inner = inner[part]
            inner[last] = value
        run = config.typed(values, RunConfig, "its overrides")
    return dataclasses.replace(run, run=sweep / member.run)


@contextlib.contextmanager
def _named(member: Member) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        raise BadInput(f"member {member.run}: {error.found}", wanted=error.wanted, do=error.do) from None


def _prepare(members: Sequence[Member], runs: Sequence[RunConfig], resources: Resources, site: Site) -> float:
    """Check every run and write its folder; seconds that the first took to come up."""
    began = time.monotonic()
    from cauc_dist.prepare import prepare

    seconds = 0.0
    for member, run in zip(members, runs, strict=True):
        with _named(member):
            submit.check_place(run, site)
            submit.check_times(run, resources)
            prepare(run, resources.ranks, 0)
        seconds = seconds or time.monotonic() - began
    submit.check_checkpoint(max(runs, key=submit.checkpoint_bytes), resources)
    return seconds


def _write(folder: Path, members: Sequence[Member]) -> None:
    """What a later array, and `launch status` and `resume`, read."""
    told = json.dumps([dataclasses.asdict(member) for member in members], indent=1)
    (folder / MANIFEST).write_text(told + "\n", encoding="utf-8")
    (folder / RUNS).write_text("".join(f"{member.run}\n" for member in members), encoding="utf-8")


def _executor(
    folder: Path,
    resources: Resources,
    site: Site,
    members: Sequence[Member],
    throttle: int | None,
    chosen: Sequence[Member] = (),
) -> script.Executor:
    """Of the array of all members, or of those chosen."""
    which = ",".join(str(member.index) for member in chosen) or f"0-{len(members) - 1}"
    name = script.name_of(folder.name, folder)
    return script.executor(folder, resources, site, name, members=_padded(members), array=script.array(which, throttle))


def _padded(members: Sequence[Member]) -> int:
    """How many jobs submitit is given: it would make a plain job of one."""
    return max(2, len(members))


def _queue(made: script.Executor, folder: Path, site: Site, members: Sequence[Member], chosen: Sequence[Member]) -> str:
    """One array of those chosen; what to say of it. submitit pickles all, so that each has its own number."""
    runs = [folder / member.run for member in members]
    ids = submit.queue(made, folder, site, runs * 2 if len(runs) == 1 else runs)
    name = made.parameters["job_name"]
    for member in chosen:
        submit.record(folder / member.run, id=ids[member.index], name=name)
    array = ids[0].partition("_")[0]
    return "\n".join(
        [
            f"array {array} ({name}), {len(chosen)} of {len(members)} runs, sweep folder {folder}",
            *(f"  {ids[member.index]}  {member.run}" for member in chosen),
            f"when they are done: cauc report {folder}/[0-9]*-* --out sweep.html",
        ]
    )


def _undone(folder: Path, members: Sequence[Member], say: Say) -> list[Member]:
    """Members that failed, were cancelled, or never began; says of the others why not."""
    again = []
    for member, status in zip(members, state.status([folder / member.run for member in members]), strict=True):
        if status.state == UNKNOWN:
            raise BadInput(
                f"what {member.run} is doing cannot be known ({status.reason})",
                wanted="an answer of SLURM: what is live must not be queued twice",
                do="try again later, on a login node",
            )
        keep = status.live or status.state == "COMPLETED"
        reason = f" ({status.reason})" * bool(status.reason)
        say(f"{member.run}: {status.state}{reason}{'' if keep else ', again'}")
        again += [] if keep else [member]
    return again


def _axis(text: str) -> tuple[str, list[Any]]:
    """(field, its values) of `optim.lr=1e-3,1e-4`."""
    name, equals, values = text.partition("=")
    if not equals or not values:
        do = "e.g. --grid optim.lr=1e-3,1e-4 objective.t=1,2"
        raise BadInput(f"--grid {text}", wanted="FIELD=VALUE,VALUE", do=do)
    kind = _kind(name)
    return name, [_value(name, kind, value) for value in values.split(",")]


def _value(name: str, kind: Any, text: str) -> Any:
    """What a text means for a field: its words where several values belong there."""
    import pydantic

    candidates: list[Any] = [None] if text in ("None", "null") else []
    with contextlib.suppress(ValueError):
        candidates.append(json.loads(text))
    adapter = pydantic.TypeAdapter(kind)
    for candidate in [*candidates, text, text.split()]:
        with contextlib.suppress(pydantic.ValidationError):
            return adapter.validate_python(candidate)
    try:
        adapter.validate_python(text)
    except pydantic.ValidationError as error:
        wanted = error.errors()[0]["msg"].lower()
    raise BadInput(f"--grid {name}={text}", wanted=wanted, do="mend it (commas part values, blanks their words)")


def _kind(name: str) -> Any:
    """The type of a field of RunConfig by its dotted name; BadInput with the nearest names."""
    if name == "run":
        raise BadInput("an override of `run`", wanted="a folder a member", do="leave it out: the sweep names them")
    kinds = _kinds(RunConfig)
    if name not in kinds:
        raise BadInput(f"no field {name!r}", wanted="one of a run's", do=nearest(name, kinds))
    return kinds[name]


def _kinds(kind: Any, above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, of in typing.get_type_hints(kind).items():
        found |= _kinds(of, f"{above}{name}.") if dataclasses.is_dataclass(of) else {above + name: of}
    return found


def _differences(base: RunConfig, run: RunConfig) -> dict[str, Any]:
    """What `run` has other than `base`, by dotted field."""
    before, now = _flat(dataclasses.asdict(base)), _flat(dataclasses.asdict(run))
    return {name: value for name, value in now.items() if value != before[name] and name != "run"}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return found


def _name(chosen: Mapping[str, Any]) -> str:
    """lr=0.001,t=2,seed=0: the last word of a field, where it is no other's."""
    short = [name.rpartition(".")[2] for name in chosen]
    names = [last if short.count(last) == 1 else name for name, last in zip(chosen, short, strict=True)]
    return ",".join(f"{name}={_text(value)}" for name, value in zip(names, chosen.values(), strict=True))


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _plain(name: str) -> str:
    """What a path, a shell and SLURM take without quotes."""
    return re.sub(r"[^\w.=,+-]+", "-", name)[:LONGEST]
