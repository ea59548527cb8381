"""`cauc`: ingest, train, resume, probe, report, verify, demo. No torch or zarr before a command needs them."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro
from tyro.conf import Positional

from cauc_dist import config
from cauc_dist.config import RunConfig
from cauc_dist.errors import BAD_INPUT, BadInput, nearest

COMMANDS = {
    "demo": "the whole chain on a synthetic cohort: data, store, three trainings, probes, report",
    "ingest": "a BIDS folder of NIfTI scans with participants.tsv -> a Zarr store",
    "train": "pre-train an encoder: a recipe (or a run's config.json), any field overridden, on --ranks processes",
    "resume": "go on with a run from its newest sound checkpoint",
    "probe": "linear probes of frozen features on held-out subjects, beside an untrained encoder",
    "report": "one HTML page: the probe table and the curves of one or several runs",
    "verify": "on this machine, every objective on --ranks processes against one: value and gradient",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    0 done, 1 a fault that `verify` found, 2 bad input, 3 non-finite loss, 130 interrupted, else a dead rank's.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        from cauc_dist import __version__

        print(f"cauc-dist {__version__}")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise BadInput(f"no command {arguments[0]!r}", wanted="a command", do=nearest(arguments[0], COMMANDS))
        command: Callable[[Sequence[str]], int] = globals()[f"_{arguments[0]}"]
        return command(arguments[1:])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"error: {error}. Check the path, its permissions and the disk.", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        do = "" if arguments[0] == "verify" else "; `cauc resume RUN` goes on from the last checkpoint"
        print(f"interrupted{do}", file=sys.stderr)
        return 130


def _help() -> str:
    from cauc_dist.recipes import recipes

    width = max(map(len, COMMANDS))
    lines = ["usage: cauc COMMAND ... (cauc COMMAND --help says more)", ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    lines += ["", "recipes: " + " ".join(recipes()), ""]
    lines += [
        "example:",
        "  cauc ingest my_bids_folder stores/mine.zarr --shape 121 145 121",
        "  cauc train demo_cauc --data.store stores/mine.zarr --run runs/mine --ranks 2",
        "  cauc probe runs/mine && cauc report runs/mine --out mine.html",
    ]
    return "\n".join(lines)


T = TypeVar("T")


def _parse(kind: type[T], command: str, arguments: Sequence[str], default: T | None = None) -> T:
    options = {} if default is None else {"default": default}
    return tyro.cli(kind, args=arguments, prog=f"cauc {command}", description=COMMANDS[command], **options)  # type: ignore[no-any-return, call-overload]


@dataclass(frozen=True)
class Ingest:
    source: Annotated[Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """BIDS folder: participants.tsv and sub-*/[ses-*/]anat/sub-*_SUFFIX.nii[.gz]."""
    store: Annotated[Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Zarr store to make."""
    shape: tuple[int, int, int] | None = None
    """Central window of every scan, voxels; needed where scans differ in shape."""
    pad: bool = False
    """Let scans smaller than the window be padded with zeros."""
    dtype: Literal["f16", "f32"] = "f16"
    """f16 (scaled by a power of two, about 70 dB) or exact f32."""
    suffix: str = "T1w"
    """Which BIDS images: sub-*_SUFFIX.nii.gz."""
    partial: bool = False
    """Keep participants that have both a scan and a row; list the others."""


def _ingest(arguments: Sequence[str]) -> int:
    options = dataclasses.asdict(_parse(Ingest, "ingest", arguments))
    from cauc_dist.progress import Counter
    from cauc_dist.store.ingest import ingest

    with Counter("ingest") as progress:
        summary = ingest(options.pop("source"), options.pop("store"), **options, progress=progress)
    print(summary)
    return 0


@dataclass(frozen=True)
class Train:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    ranks: int = 1
    """Processes on this machine."""
    start: bool = True
    """--no-start: only check, and write the run folder; start its ranks yourself (docs/running.md)."""


def _train(arguments: Sequence[str]) -> int:
    from cauc_dist import recipes

    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise BadInput(
                "`cauc train` without a recipe", wanted=" or ".join(recipes.recipes()), do="name one of them"
            )
        arguments = ["demo_cauc", "--help"]  # every recipe has the same fields; these are the values of one
    base = _from_file(Path(arguments[0])) if arguments[0].endswith(".json") else recipes.get(arguments[0])
    options = _parse(Train, "train", arguments[1:], default=Train(base))
    _at_least_one(options.ranks)
    from cauc_dist.prepare import prepare

    folder = prepare(options.config, options.ranks)
    _say(f"run folder {folder}")
    if not options.start:
        return 0
    return _start(folder, options.ranks, options.config.engine.threads)


def _from_file(path: Path) -> RunConfig:
    """The run of a config.json, to be trained anew: the folder that it came from is taken."""
    if not path.exists():
        raise BadInput(f"no file {path}", wanted="the config.json of a run", do="check the path, or name a recipe")
    return dataclasses.replace(config.read(path), run=None)


@dataclass(frozen=True)
class Resume:
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    ranks: int = 1
    """Processes on this machine; any number that divides the batch, whatever the run began with."""


def _resume(arguments: Sequence[str]) -> int:
    options = _parse(Resume, "resume", arguments)
    _at_least_one(options.ranks)
    from cauc_dist import checkpoint
    from cauc_dist.prepare import check, check_store, load
    from cauc_dist.train import card

    run = load(options.run)
    store = check(run, options.ranks)
    check_store(options.run, store)
    checkpoint.latest(options.run, card(run, store))  # refuse here, once, not on every rank
    return _start(options.run, options.ranks, run.engine.threads)


def _at_least_one(ranks: int) -> None:
    if ranks < 1:
        raise BadInput(f"--ranks {ranks}", wanted="1 or more processes", do="e.g. --ranks 2")


def _start(folder: Path, ranks: int, threads: int) -> int:
    from cauc_dist import elastic

    return elastic.start(ranks, str(folder), threads=threads)


@dataclass(frozen=True)
class Probe:
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Run folders of one store and one split."""
    columns: tuple[str, ...] = ()
    """Metadata columns; default: all that vary."""
    voxels: bool = True
    """Probe raw voxels too, where they fit in 4 GiB."""
    out: Path | None = None
    """Write the table as JSON; default: probe.json in the first run folder."""


def _probe(arguments: Sequence[str]) -> int:
    options = _parse(Probe, "probe", arguments)
    runs = _some(options.runs)
    _writable(options.out)
    from cauc_dist.probe import probe

    table = probe(runs, options.columns, voxels=options.voxels, say=_say)
    (options.out or runs[0] / "probe.json").write_text(table.to_json(), encoding="utf-8")
    print(table)
    return 0


@dataclass(frozen=True)
class Report:
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Run folders, compared on one page."""
    out: Path = Path("report.html")
    """The page to write."""
    table: Path | None = None
    """A table of `cauc probe --out`; default: probe.json of the first run, where it exists."""


def _report(arguments: Sequence[str]) -> int:
    options = _parse(Report, "report", arguments)
    _writable(options.out)
    from cauc_dist.report import report

    report(_some(options.runs), options.out, options.table)
    print(f"wrote {options.out}")
    return 0


def _writable(out: Path | None) -> None:
    """Refuse a place that does not exist before the work, not after it."""
    if out is not None and not out.absolute().parent.is_dir():
        raise BadInput(f"no folder {out.absolute().parent}", wanted="a folder to write into", do="make it first")


def _some(runs: tuple[Path, ...]) -> tuple[Path, ...]:
    if not runs:
        raise BadInput("no run folder", wanted="one or several", do="give those that `cauc train` printed")
    return runs


@dataclass(frozen=True)
class Verify:
    ranks: int = 2
    """Processes on this machine; for several machines see docs/running.md."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: one GPU a rank where there is CUDA, else the CPU."""
    exchange: Literal["all_gather", "ring"] = "all_gather"
    """How embeddings meet, as engine.exchange in training."""


def _verify(arguments: Sequence[str]) -> int:
    options = _parse(Verify, "verify", arguments)
    _at_least_one(options.ranks)
    from cauc_dist import elastic
    from cauc_dist.verify import check

    check(options.device, options.ranks)
    chosen = ("--device", options.device, "--exchange", options.exchange)
    return elastic.start(options.ranks, *chosen, module="cauc_dist.verify")


@dataclass(frozen=True)
class Demo:
    folder: Path = Path("demo")
    """Everything goes here: cohort, store, runs, report.html."""
    subjects: int = 240
    size: int = 48
    """Voxels a side."""
    ranks: int = 2
    """Processes a training."""
    seed: int = 0


def _demo(arguments: Sequence[str]) -> int:
    options = _parse(Demo, "demo", arguments)
    _at_least_one(options.ranks)
    from cauc_dist.demo import demo

    return demo(**dataclasses.asdict(options), say=_say)


def _say(line: str) -> None:
    print(line, flush=True)
