"""`cauc train`, `cauc resume`: a run begins, or goes on, on ranks that are started here or by a launcher."""

import dataclasses
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from cauc_dist import config
from cauc_dist.cli import voice
from cauc_dist.cli.words import parse
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput, nearest

if TYPE_CHECKING:
    from cauc_dist.world import World


@dataclass(frozen=True)
class Train:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    preset: str | None = None
    """A published set of transforms instead of the recipe's: all_tf, cutout, crop, simclr_2d."""
    ranks: int | None = None
    """Processes on this machine; default: 1, or those that srun, mpiexec or torchrun started."""
    start: bool = True
    """--no-start: only check, and write the run folder; start its ranks yourself (docs/running.md)."""


def train(arguments: Sequence[str]) -> int:
    return _start(lambda world: _new(arguments, world))


def _new(arguments: Sequence[str], world: "World") -> tuple[Path, int, int] | None:
    base, rest = recipe_first("cauc train", arguments)
    options = parse(Train, "train", rest, default=Train(base))
    if options.preset is not None:
        base = dataclasses.replace(base, augment=preset_of(options.preset))
        options = parse(Train, "train", rest, default=Train(base))
    ranks = ranks_of(options.ranks, world)
    voice.say(f"{options.config.name}: checking {options.config.data.store or 'its store'}")
    from cauc_dist.prepare import prepare

    folder = prepare(options.config, ranks, _here(world))
    news = f"run folder {folder}"
    if not options.start:
        voice.tell(news, {"run": folder.absolute()})
    elif options.config.run is None:  # whose name nobody gave
        voice.result(news)
    else:
        voice.say(news)
    return (folder, ranks, options.config.engine.threads) if options.start else None


def recipe_first(
    command: str, arguments: Sequence[str], *, wanted: str | None = None, do: str = "name one of them"
) -> tuple[RunConfig, Sequence[str]]:
    """The recipe (or config.json) that comes first, and what comes after it; BadInput where there is none.

    --help alone is that of one recipe: all have the same fields, and these are its values.
    """
    from cauc_dist import recipes

    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            found = f"`{command}` without a recipe"
            raise BadInput(found, wanted=wanted or " or ".join(recipes.recipes()), do=do)
        arguments = ["demo_cauc", "--help"]
    return recipe_of(arguments[0]), arguments[1:]


def recipe_of(name: str) -> RunConfig:
    from cauc_dist import recipes

    return _from_file(Path(name)) if name.endswith(".json") else recipes.get(name)


def preset_of(name: str) -> config.Augment:
    if name not in config.PRESETS:
        raise BadInput(f"no preset {name!r}", wanted="a published set", do=nearest(name, config.PRESETS))
    return config.PRESETS[name]


def _from_file(path: Path) -> RunConfig:
    """The run of a config.json, to be trained anew: the folder that it came from is taken."""
    if not path.exists():
        raise BadInput(f"no file {path}", wanted="the config.json of a run", do="check the path, or name a recipe")
    return dataclasses.replace(config.read(path), run=None)


@dataclass(frozen=True)
class Resume:
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    ranks: int | None = None
    """Processes on this machine; default: as many as it had, or those that srun, mpiexec or torchrun started."""


def resume(arguments: Sequence[str]) -> int:
    return _start(lambda world: _old(arguments, world))


def _old(arguments: Sequence[str], world: "World") -> tuple[Path, int, int]:
    options = parse(Resume, "resume", arguments)
    asked = options.ranks
    if asked is None and world.world_size == 1:
        asked = _ranks_before(options.run)
    ranks = ranks_of(asked, world)
    voice.say(f"resume: {options.run}")
    from cauc_dist import checkpoint
    from cauc_dist.prepare import check, check_store, load
    from cauc_dist.train import card

    run = load(options.run)
    store = check(run, ranks, _here(world))
    check_store(options.run, store)
    checkpoint.latest(options.run, card(run, store))  # refuse here, once, not on every rank
    return options.run, ranks, run.engine.threads


def ranks_of(asked: int | None, world: "World") -> int:
    """How many processes train: those that were asked for, or that a launcher has started."""
    if asked is not None and world.world_size > 1 and asked != world.world_size:
        raise BadInput(
            f"--ranks {asked} on each of {world.world_size} processes that are ranks already ({world.source})",
            wanted="ranks that are started once",
            do="leave --ranks out, or start one process (srun -n 1, no mpiexec, no torchrun)",
        )
    ranks = world.world_size if asked is None else asked
    voice.at_least_one(ranks=ranks)
    return ranks


def _ranks_before(run: Path) -> int | None:
    """How many ranks an earlier life of the run had, where they were started on one machine."""
    from cauc_dist import journal

    before = journal.begun(run)
    return before["ranks"] if before and before.get("launcher") in ("single", "environment") else None


def _here(world: "World") -> int | None:
    """How many of a launcher's ranks are on this host; None: there is no launcher."""
    return world.local_size if world.world_size > 1 else None


Ready = Callable[["World"], tuple[Path, int, int] | None]
"""Check and write a run folder: the folder, its ranks, their threads; None where it is not to be started."""


def _start(ready: Ready) -> int:
    """Start the ranks of what is ready, or be one of them, where a launcher has started this process as a rank."""
    from cauc_dist.world import World

    world = World.from_env()
    if world.world_size > 1:
        return _be_a_rank(world, ready)
    job = ready(world)
    if job is None:  # --no-start: the folder is the result, and has been told
        return 0
    from cauc_dist import spawn

    folder, ranks, threads = job
    code = spawn.start(ranks, str(folder), threads=threads)
    voice.tell(None, _told(folder, code))
    return code


def _told(folder: Path, code: int) -> dict[str, Any]:
    """What a run came to: its folder, exit code, and the last step in its journal."""
    from cauc_dist import journal

    steps = [event for event in journal.read(folder) if event["event"] == "step"]
    return {"run": folder.absolute(), "code": code, "steps": len(steps), "last": steps[-1] if steps else None}


def _be_a_rank(world: "World", ready: Ready) -> int:
    """Rank 0 alone checks, writes and prints; the others hear its exit code, and the folder where there is one."""
    code = 1
    try:
        told, folder = json.loads(world.tell(lambda: json.dumps(_checked(world, ready))))
        code = _train_here(folder) if folder else told
    finally:
        world.end(code)
    return code


def _train_here(folder: str) -> int:
    from cauc_dist.job import again
    from cauc_dist.train import main

    return main(folder, again=again())


def _checked(world: "World", ready: Ready) -> tuple[int, str]:
    """(exit code, run folder or nothing). Whatever happens, the other ranks wait for it."""
    try:
        job = ready(world)
    except (BadInput, OSError) as error:
        return voice.explain(error), ""
    except SystemExit as end:  # --help, or options that are none
        return int(end.code or 0), ""
    except Exception:
        traceback.print_exc()
        return 1, ""
    return 0, str(job[0].absolute()) if job else ""
