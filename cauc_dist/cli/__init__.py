"""`cauc`: from scans to a store, a trained encoder and its probes. No torch or zarr before a command needs them."""

import os
import select
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence

from cauc_dist import progress
from cauc_dist.cli import completion, data, machine, results, runs, voice
from cauc_dist.cli.words import BENCH, CODES, COMMANDS, STORE
from cauc_dist.errors import BadInput, nearest

__all__ = ["BENCH", "COMMANDS", "STORE", "main"]

RUN: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": machine.demo,
    "doctor": machine.doctor,
    "ingest": data.ingest,
    "store": data.store,
    "augment-preview": data.augment_preview,
    "train": runs.train,
    "resume": runs.resume,
    "probe": results.probe,
    "finetune": results.finetune,
    "embed": results.embed,
    "export": results.export,
    "report": results.report,
    "reproduce": results.reproduce,
    "verify": machine.verify,
    "bench": machine.bench,
    "completion": completion.completion,
}
AGAIN = {
    **dict.fromkeys(["ingest", "store", "reproduce"], "The same command goes on where it stopped"),
    **dict.fromkeys(["train", "resume", "demo"], "`cauc resume RUN` goes on from the last checkpoint"),
}
"""What to do after ctrl-C; else the same command begins anew."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code (cauc_dist.cli.words.CODES), else a dead rank's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        with voice.speaking(arguments) as rest:
            return _run(rest)
    except KeyboardInterrupt:
        command = next((word for word in arguments if not word.startswith("-")), "")
        again = AGAIN.get(command, "The same command begins anew")
        print(f"interrupted. {again}.", file=sys.stderr)
        return 130
    except BrokenPipeError as error:
        if not _read_enough():
            return voice.explain(error, debug)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        return voice.explain(error, debug)


def _read_enough() -> bool:
    """Whether it is stdout that nobody reads any more: `head`, for one, had what it wanted."""
    try:
        os.write(sys.stdout.fileno(), b"")
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _help()
        return 0
    if arguments[0] in ("-V", "--version"):
        from cauc_dist import __version__

        print(f"cauc-dist {__version__}")
        return 0
    if arguments[0] not in RUN:
        raise BadInput(f"no command {arguments[0]!r}", wanted="a command", do=nearest(arguments[0], RUN))
    return RUN[arguments[0]](arguments[1:])


def _help() -> None:
    from cauc_dist.recipes import recipes

    def rows(table: dict[str, str]) -> list[str]:
        return [f"  {name:<15}  {text}" for name, text in table.items()]

    console = progress.console()
    console.quiet = False  # it is what was asked for
    for title, lines in (
        ("usage: cauc COMMAND ...", ["  cauc COMMAND --help says more, with examples", ""]),
        ("commands", [*rows(COMMANDS), ""]),
        ("everywhere", [*rows(voice.FLAGS), ""]),
        ("recipes", [*textwrap.wrap("  ".join(recipes()), 110, initial_indent="  ", subsequent_indent="  "), ""]),
        ("exit codes", [*rows({str(code): text for code, text in CODES.items()}), ""]),
        (
            "example",
            [
                "  cauc ingest my_bids_folder stores/mine.zarr --shape 121 145 121",
                "  cauc train demo_cauc --data.store stores/mine.zarr --run runs/mine --ranks 2",
                "  cauc probe runs/mine && cauc report runs/mine --out mine.html",
            ],
        ),
    ):
        console.print(title, style="bold", markup=False)
        console.print("\n".join(lines), markup=False)
