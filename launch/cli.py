"""`python -m launch`: jobs on SLURM. One voice with `cauc`: the same recipes, overrides, errors and exit codes."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import tyro

from cauc_dist import cli as cauc
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput, nearest
from launch import site as sites
from launch.site import Resources

COMMANDS = {
    "submit": "check a recipe, write its run folder, queue its job",
    "status": "what each run is doing: squeue first, the accounting second, its own journal third",
    "logs": "what a rank said, attempt by attempt",
    "cancel": "end a run's job; its ranks save first",
    "resume": "a run's job once more, from its newest sound checkpoint",
    "sweep": "a recipe over a grid of overrides, as one array",
    "ingest": "make a store by the tasks of an array",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise BadInput(f"no command {arguments[0]!r}", wanted="a command", do=nearest(arguments[0], COMMANDS))
        command: Callable[[Sequence[str]], int] = globals()[f"_{arguments[0]}"]
        return command(arguments[1:])
    except (BadInput, OSError) as error:
        return cauc._explain(error)
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: python -m launch COMMAND ... (COMMAND --help says more)", ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "example:",
        "  python -m launch submit demo_cauc --data.store /work/me/mine.zarr --run /work/me/runs/mine \\",
        "      --site jean-zay --nodes 2 --gpus-per-node 4 --time 10:00:00 --dry-run",
        "  python -m launch status /work/me/runs/mine",
    ]
    return "\n".join(lines)


T = TypeVar("T")


def _parse(kind: type[T], command: str, arguments: Sequence[str], default: T | None = None) -> T:
    options = {} if default is None else {"default": default}
    return tyro.cli(  # type: ignore[no-any-return, call-overload]
        kind, args=arguments, prog=f"python -m launch {command}", description=COMMANDS[command], **options
    )


@dataclass(frozen=True)
class Submit:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    resources: Annotated[Resources, tyro.conf.arg(name="")] = field(default_factory=Resources)
    site: str | None = None
    """A TOML file, or the name of one in launch/sites."""
    dry_run: bool = False
    """Print the batch script, byte for byte, and how the batch falls on the ranks; write nothing."""


def _submit(arguments: Sequence[str]) -> int:
    recipe, options = _recipe("submit", arguments)
    default = Submit(recipe, sites.read(_named("site", options)).resources)
    asked = _parse(Submit, "submit", options, default)
    from launch.submit import submit

    submit(asked.config, asked.resources, sites.read(asked.site), say=cauc._say, dry_run=asked.dry_run)
    return 0


def _recipe(command: str, arguments: Sequence[str]) -> tuple[RunConfig, Sequence[str]]:
    """The recipe that comes first, and what comes after it."""
    from cauc_dist import recipes

    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise BadInput(
                f"`launch {command}` without a recipe", wanted=" or ".join(recipes.recipes()), do="name one of them"
            )
        arguments = ["demo_cauc", "--help"]
    return cauc._recipe(arguments[0]), arguments[1:]


def _named(name: str, options: Sequence[str]) -> str | None:
    """The value of --NAME, before all options are read: it gives others their defaults."""
    for i, word in enumerate(options):
        if word == f"--{name}" and i + 1 < len(options):
            return options[i + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None
