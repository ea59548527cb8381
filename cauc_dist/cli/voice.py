"""How the command line speaks: what it will do, news on the way, one result, and what went wrong.

`--json`: the result is one JSON document on stdout, all else goes to stderr. `--quiet`: the result, and what went
wrong. `--debug`: an error with its traceback. They may stand anywhere; ranks that a command starts hear them too.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import tyro

from cauc_dist import progress
from cauc_dist.errors import BAD_INPUT, BadInput, nearest

FLAGS = {
    "--json": "the result as one JSON document on stdout, all else on stderr",
    "--quiet": "the result and errors only",
    "--debug": "an error with its traceback",
}
INTERNAL = 1
T = TypeVar("T")
say = progress.say


@contextmanager
def speaking(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Take the flags from among the arguments, for this process and those that it starts; the other arguments."""
    given = {word for word in arguments if word in FLAGS}
    if given >= {"--json", "--quiet"}:
        raise BadInput("--json and --quiet", wanted="one of them", do="--json prints the result alone on stdout")
    before = os.environ.get(progress.VOICE)
    for flag in given & {"--json", "--quiet"}:
        os.environ[progress.VOICE] = flag.removeprefix("--")
    try:
        yield [word for word in arguments if word not in FLAGS]
    finally:
        os.environ.pop(progress.VOICE, None)
        if before is not None:
            os.environ[progress.VOICE] = before


def result(line: str) -> None:
    """A line that is told however quiet it is; under --json the document alone is on stdout."""
    if progress.voice() == "json":
        say(line)
    else:
        print(line, flush=True)


def tell(text: object, data: object) -> None:
    """The result: `text` for people (None: they know), `data` (numbers, texts, dicts, dataclasses ...) for scripts."""
    if progress.voice() == "json":
        print(progress.as_json(data), flush=True)
    elif text is not None:
        print(text, flush=True)


def explain(error: BaseException, debug: bool = False) -> int:
    """Say what is wrong on stderr; the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, BadInput):
        return _wrong(str(error), BAD_INPUT)
    if isinstance(error, OSError):
        return _wrong(f"{error}. Check the path, its permissions and the disk.", BAD_INPUT)
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    again = "" if debug else "--debug shows where; "
    return _wrong(f"{what}. This is a fault of cauc-dist: {again}please report it with the command.", INTERNAL)


def _wrong(text: str, code: int) -> int:
    terminal = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[1;31merror:\033[0m {text}" if terminal else f"error: {text}", file=sys.stderr)
    return code


def options(kind: type[T], program: str, description: str, arguments: Sequence[str], default: T | None = None) -> T:
    """The options of a command, parsed; --help, and what cannot be parsed, end the process (SystemExit)."""
    chosen = {} if default is None else {"default": default}
    return tyro.cli(kind, args=arguments, prog=program, description=description, **chosen)  # type: ignore[no-any-return, call-overload]


def inner(
    name: str,
    texts: Mapping[str, str],
    commands: Mapping[str, Callable[[Sequence[str]], int]],
    arguments: Sequence[str],
) -> int:
    """One of the commands of `cauc NAME`, or what they are."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, texts))
        print(f"usage: cauc {name} COMMAND ... (cauc {name} COMMAND --help says more)\n")
        print("\n".join(f"  {word:<{width}}  {text}" for word, text in texts.items()))
        return 0
    if arguments[0] not in commands:
        found = f"no command {f'{name} {arguments[0]}'!r}"
        raise BadInput(found, wanted="a command", do=nearest(arguments[0], texts))
    return commands[arguments[0]](arguments[1:])


def writable(out: Path | None) -> None:
    """Refuse a place that does not exist before the work, not after it."""
    if out is not None and not out.absolute().parent.is_dir():
        raise BadInput(f"no folder {out.absolute().parent}", wanted="a folder to write into", do="make it first")
    if out is not None and out.is_dir():
        raise BadInput(f"{out} is a folder", wanted="a file to write", do=f"e.g. {out / 'result'}")


def some(runs: tuple[Path, ...]) -> tuple[Path, ...]:
    if not runs:
        raise BadInput("no run folder", wanted="one or several", do="give those that `cauc train` printed")
    return runs


def at_least_one(**counts: int | None) -> None:
    """Refuse counts below 1: `at_least_one(ranks=0)` says --ranks 0."""
    for name, n in counts.items():
        if n is not None and n < 1:
            what = "1 or more processes" if name == "ranks" else "1 or more"
            raise BadInput(f"--{name} {n}", wanted=what, do=f"e.g. --{name} {2 if name == 'ranks' else 1}")
