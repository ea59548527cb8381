"""`python -m launch`: jobs on SLURM. One voice with `cauc`: the same recipes, overrides, errors and exit codes."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional

from cauc_dist.cli import data, voice
from cauc_dist.cli.runs import recipe_first
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput, nearest
from launch import site as sites
from launch.site import Resources

if TYPE_CHECKING:
    from launch import state

COMMANDS = {
    "submit": "check a recipe, write its run folder, queue its job",
    "status": "what each run is doing: squeue first, the accounting second, its own journal third",
    "logs": "what a rank said, attempt by attempt",
    "cancel": "end a run's job; its ranks save first",
    "resume": "a run's job once more, from its newest sound checkpoint",
    "sweep": "a recipe over a grid of overrides, as one array",
    "reproduce": "the runs of a study that are missing, as one array",
    "ingest": "make a store by the tasks of an array",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 1 a fault of ours, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise BadInput(f"no command {arguments[0]!r}", wanted="a command", do=nearest(arguments[0], COMMANDS))
        command: Callable[[Sequence[str]], int] = globals()[f"_{arguments[0]}"]
        return command(arguments[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return voice.explain(error, debug)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: python -m launch COMMAND ... (COMMAND --help says more)", ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "  --debug shows an error's traceback",
        "",
        "example:",
        "  python -m launch submit demo_cauc --data.store /scratch/me/mine.zarr --run /scratch/me/runs/mine \\",
        "      --site jean-zay --nodes 2 --gpus-per-node 4 --time 10:00:00 --dry-run",
        "  python -m launch status /scratch/me/runs/mine",
    ]
    return "\n".join(lines)


T = TypeVar("T")


def _parse(kind: type[T], command: str, arguments: Sequence[str], default: T | None = None) -> T:
    return voice.options(kind, f"python -m launch {command}", COMMANDS[command], arguments, default)


@dataclass(frozen=True)
class Submit:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    resources: Annotated[Resources, tyro.conf.arg(name="")] = field(default_factory=Resources)
    site: str | None = None
    """A TOML file, or the name of one in launch/sites."""
    dry_run: bool = False
    """Print the batch script, byte for byte, and how the batch falls on the ranks; write nothing."""
    test_only: bool = False
    """Check everything and ask SLURM when the job would start; queue nothing, and leave nothing behind."""


def _submit(arguments: Sequence[str]) -> int:
    recipe, options = recipe_first("launch submit", arguments)
    default = Submit(recipe, sites.read(_named("site", options)).resources)
    asked = _parse(Submit, "submit", options, default)
    from launch.submit import submit

    how = {"dry_run": asked.dry_run, "test_only": asked.test_only}
    submit(asked.config, asked.resources, sites.read(asked.site), say=voice.say, **how)
    return 0


@dataclass(frozen=True, kw_only=True)
class Array:
    resources: Annotated[Resources, tyro.conf.arg(name="")] = field(default_factory=Resources)
    site: str | None = None
    """A TOML file, or the name of one in launch/sites."""
    throttle: int | None = None
    """How many tasks run at a time; default: as many as there is room for."""
    dry_run: bool = False
    """Print the batch script, byte for byte, and what its tasks would do; write nothing."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Array):
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    grid: tuple[str, ...] = ()
    """FIELD=VALUE,VALUE, several: the members are their product. E.g. optim.lr=1e-3,1e-4 objective.t=1,2"""
    seeds: tuple[int, ...] = ()
    """Every member once with each."""
    manifest: Path | None = None
    """Instead of RECIPE and --grid: a JSON list of {name, recipe, overrides}. `sweep --manifest FILE --run SWEEP`"""
    rerun: Path | None = None
    """Instead of RECIPE: the members of that sweep again that failed or never ran. `launch sweep --rerun SWEEP`"""


@dataclass(frozen=True, kw_only=True)
class Listed(Array):
    manifest: Path
    """A JSON list of {name, recipe, overrides}, as manifest.json of a sweep."""
    run: Path
    """Sweep folder to make."""


@dataclass(frozen=True, kw_only=True)
class Rerun(Array):
    rerun: Path
    """Sweep folder."""


def _sweep(arguments: Sequence[str]) -> int:
    from launch import sweep
    from launch.resume import before

    if (old := _named("rerun", arguments)) is not None:
        was = before(Path(old)).at(_named("site", arguments))
        again = _parse(Rerun, "sweep", arguments, Rerun(rerun=Path(old), resources=was.resources))
        sweep.rerun(again.rerun, again.resources, was.site, **_how(again))
        return 0
    resources = sites.read(_named("site", arguments)).resources
    asked: Listed | Sweep
    if (path := _named("manifest", arguments)) is not None:
        default = Listed(manifest=Path(path), run=Path("runs/sweep"), resources=resources)
        asked = _parse(Listed, "sweep", arguments, default)
        members, folder = sweep.listed(asked.manifest), asked.run
    else:
        recipe, options = recipe_first("launch sweep", arguments)
        asked = _parse(Sweep, "sweep", options, Sweep(config=recipe, resources=resources))
        members = sweep.grid(arguments[0], asked.config, asked.grid, asked.seeds)
        folder = asked.config.run or Path("runs") / f"{asked.config.name}-sweep"
    sweep.sweep(members, folder, asked.resources, sites.read(asked.site), **_how(asked))
    return 0


@dataclass(frozen=True, kw_only=True)
class Reproduce(Array):
    study: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]
    """As for `cauc reproduce`, and the same below."""
    seeds: int | None = None
    methods: tuple[str, ...] = ()
    folder: Path | None = None
    """On a disk that every node sees; default: runs/NAME."""
    store: Path | None = None
    data: Path | None = None


def _reproduce(arguments: Sequence[str]) -> int:
    from launch.reproduce import reproduce

    resources = sites.read(_named("site", arguments)).resources
    asked = _parse(Reproduce, "reproduce", arguments, Reproduce(study=tyro.MISSING, resources=resources))
    chosen = {name: getattr(asked, name) for name in ("seeds", "methods", "store", "data")}
    reproduce(asked.study, asked.folder, asked.resources, sites.read(asked.site), **chosen, **_how(asked))
    return 0


@dataclass(frozen=True, kw_only=True)
class Ingest(data.Ingest):
    tasks: int = 8
    """Tasks of the array. More than the store has shards (--dry-run says how many) find nothing to do."""
    resources: Annotated[Resources, tyro.conf.arg(name="")] = field(default_factory=Resources)
    site: str | None = None
    """A TOML file, or the name of one in launch/sites."""
    throttle: int | None = None
    """How many tasks run at a time; default: as many as there is room for."""


def _ingest(arguments: Sequence[str]) -> int:
    from launch.ingest import ingest

    resources = sites.read(_named("site", arguments)).resources
    asked = _parse(Ingest, "ingest", arguments, Ingest(source=tyro.MISSING, store=tyro.MISSING, resources=resources))
    options = data.Ingest(**{f.name: getattr(asked, f.name) for f in fields(data.Ingest)})
    ingest(options, asked.tasks, asked.resources, sites.read(asked.site), **_how(asked))
    return 0


def _how(asked: Array | Ingest) -> dict[str, Any]:
    return {"throttle": asked.throttle, "say": voice.say, "dry_run": asked.dry_run}


@dataclass(frozen=True)
class Status:
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")] = ()
    """Run folders, or sweeps'; default: all in ./runs."""
    json: bool = False
    """A JSON list, an object a run; of a line each with --watch."""
    watch: float | None = None
    """Again every so many seconds, until no run is live."""


def _status(arguments: Sequence[str]) -> int:
    asked = _parse(Status, "status", arguments)
    from launch import state

    if asked.watch is not None and not 1 <= asked.watch < math.inf:
        raise BadInput(f"--watch {asked.watch:g}", wanted="1 second or more", do="be kind to SLURM: e.g. --watch 30")
    runs = state.expand(asked.runs)
    while True:
        found = state.status(runs)
        _show(found, asked)
        if asked.watch is None or not any(one.live or one.state == state.UNKNOWN for one in found):
            return 0
        time.sleep(asked.watch)


def _show(found: "Sequence[state.Status]", asked: Status) -> None:
    from launch import state

    if asked.json:
        indent = None if asked.watch else 1
        print(json.dumps([asdict(one) for one in found], default=str, indent=indent), flush=True)
        return
    clear = "\x1b[H\x1b[2J" if asked.watch and sys.stdout.isatty() else ""
    print(clear + state.table(found), flush=True)


@dataclass(frozen=True)
class Logs:
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Go on as it grows, in the next attempt too, until the run has left the queue for good."""
    rank: int = 0
    attempt: int | None = None
    """Default: the latest. Where no rank has begun, the batch script's own log."""


def _logs(arguments: Sequence[str]) -> int:
    asked = _parse(Logs, "logs", arguments)
    from launch.logs import logs

    logs(asked.run, asked.rank, asked.attempt, follow=asked.follow)
    return 0


@dataclass(frozen=True)
class Cancel:
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Run folders, or sweeps'."""


def _cancel(arguments: Sequence[str]) -> int:
    asked = _parse(Cancel, "cancel", arguments)
    from launch import state
    from launch.cancel import cancel

    cancel(state.expand(voice.some(asked.runs)), say=voice.say)
    return 0


@dataclass(frozen=True)
class Resume:
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    resources: Annotated[Resources, tyro.conf.arg(name="")] = field(default_factory=Resources)
    """Default: those of its last job."""
    site: str | None = None
    """A TOML file, or the name of one in launch/sites; default: that of its last job. What it sets wins over that."""


def _resume(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise BadInput(
                "`launch resume` without a run folder", wanted="RUN first", do="give its folder, then options"
            )
        _parse(Resume, "resume", ["--help"])
    from launch import resume, state

    run = Path(arguments[0])
    if state.expand([run]) != [run]:
        raise BadInput(f"{run} is a sweep", wanted="a run folder", do=f"`python -m launch sweep --rerun {run}`")
    last = resume.before(run).at(_named("site", arguments))
    asked = _parse(Resume, "resume", arguments, Resume(run, last.resources))
    resume.resume(run, asked.resources, last.site, say=voice.say)
    return 0


def _named(name: str, options: Sequence[str]) -> str | None:
    """The value of --NAME, before all options are read: it gives others their defaults."""
    for i, word in enumerate(options):
        if word == f"--{name}" and i + 1 < len(options):
            return options[i + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None
