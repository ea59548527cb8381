"""`cauc demo, doctor, verify, bench`: this machine, and the whole chain on it."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import Positional

from cauc_dist import progress
from cauc_dist.bench.projection import Site
from cauc_dist.cli import voice
from cauc_dist.cli.runs import recipe_first
from cauc_dist.cli.words import BENCH, parse
from cauc_dist.config import RunConfig


@dataclass(frozen=True)
class Measuring:
    quick: bool = False
    """Under a minute."""
    out: Path | None = None
    """Write all raw numbers as JSON."""


@dataclass(frozen=True)
class BenchData(Measuring):
    store: Annotated[Positional[str | None], tyro.conf.arg(metavar="STORE")] = None
    """Your store: folder or URL."""
    made: bool = False
    """Made scans instead, beside other libraries."""
    threads: int = 2
    """Readers, as data.threads in training."""


@dataclass(frozen=True, kw_only=True)
class BenchLoss(Measuring):
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class BenchStep(Measuring):
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    ranks: int = 1
    """Processes on this machine."""


@dataclass(frozen=True, kw_only=True)
class BenchScale(Measuring):
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    ranks: tuple[int, ...] = ()
    """Local ranks to measure on; default: 1, 2 and 4, as cores or GPUs allow."""
    site: Annotated[Site, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Site)


def bench(arguments: Sequence[str]) -> int:
    commands = {"data": _data, "loss": _loss, "step": _step, "scale": _scale}
    return voice.inner("bench", BENCH, commands, arguments)


def _data(arguments: Sequence[str]) -> int:
    options = parse(BenchData, "bench data", arguments)
    voice.at_least_one(threads=options.threads)
    voice.writable(options.out)
    from cauc_dist.bench import reading

    how: Measured = {"threads": options.threads, "quick": options.quick, "out": options.out, "say": voice.result}
    if options.store is None or options.made:
        return reading.data(options.store, options.made, **how)
    voice.tell(None, reading.read(options.store, **how))
    return 0


def _loss(arguments: Sequence[str]) -> int:
    options = _of_recipe(BenchLoss, "loss", arguments)
    from cauc_dist.bench.pairs import loss

    voice.tell(None, loss(options.config, quick=options.quick, out=options.out, say=voice.result))
    return 0


def _step(arguments: Sequence[str]) -> int:
    options = _of_recipe(BenchStep, "step", arguments)
    voice.at_least_one(ranks=options.ranks)
    from cauc_dist.bench.step import step

    voice.tell(None, step(options.config, options.ranks, quick=options.quick, out=options.out, say=voice.result))
    return 0


def _scale(arguments: Sequence[str]) -> int:
    options = _of_recipe(BenchScale, "scale", arguments)
    from cauc_dist.bench.scale import scale

    how: Measured = {"quick": options.quick, "out": options.out, "say": voice.result}
    voice.tell(None, scale(options.config, ranks=options.ranks, site=options.site, **how))
    return 0


Measured = dict[str, Any]
T = TypeVar("T", BenchLoss, BenchStep, BenchScale)


def _of_recipe(kind: type[T], name: str, arguments: Sequence[str]) -> T:
    """Options after a recipe's name (or a config.json), with its fields."""
    do = f"e.g. cauc bench {name} demo_cauc --data.store STORE"
    recipe, rest = recipe_first(f"cauc bench {name}", arguments, wanted="a recipe or a config.json", do=do)
    options = parse(kind, f"bench {name}", rest, default=kind(config=recipe))
    voice.writable(options.out)
    return options


@dataclass(frozen=True)
class Doctor:
    store: str | None = None
    """A store to look at too: folder or URL."""
    folder: Path = Path()
    """Where runs are to be written: its disk is measured, with a file of 256 MiB that is removed again."""
    ranks: int = 2
    """Processes that greet each other."""


def doctor(arguments: Sequence[str]) -> int:
    options = parse(Doctor, "doctor", arguments)
    voice.at_least_one(ranks=options.ranks)
    from cauc_dist.doctor import doctor

    findings = doctor(options.store, options.folder, options.ranks, say=voice.say)
    bad = "\n".join(str(finding) for finding in findings if finding.state != "ok")
    voice.tell(bad or None if progress.voice() == "quiet" else None, findings)
    return int(any(finding.state == "fail" for finding in findings))


@dataclass(frozen=True)
class Verify:
    ranks: int = 2
    """Processes on this machine; for several machines see docs/running.md."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: one GPU a rank where there is CUDA, else the CPU."""
    exchange: Literal["all_gather", "ring"] = "all_gather"
    """How embeddings meet, as engine.exchange in training."""


def verify(arguments: Sequence[str]) -> int:
    options = parse(Verify, "verify", arguments)
    voice.at_least_one(ranks=options.ranks)
    from cauc_dist import spawn
    from cauc_dist.verify import check

    check(options.device, options.ranks)
    chosen = ("--device", options.device, "--exchange", options.exchange)
    return spawn.start(options.ranks, *chosen, module="cauc_dist.verify")


@dataclass(frozen=True)
class Demo:
    folder: Path = Path("demo")
    """Everything goes here: cohort, store, runs, report.html."""
    quick: bool = False
    """The same chain in less than a minute: it shows that it works, and nothing of the methods."""
    subjects: int | None = None
    """Default: 240; with --quick 48."""
    size: int | None = None
    """Voxels a side; default: 48, with --quick 24."""
    ranks: int = 2
    """Processes a training."""
    seed: int = 0


def demo(arguments: Sequence[str]) -> int:
    options = parse(Demo, "demo", arguments)
    voice.at_least_one(ranks=options.ranks)
    from cauc_dist.demo import demo

    code = demo(**dataclasses.asdict(options), say=voice.say)
    if code == 0:
        voice.tell(None, json.loads((options.folder / "table.json").read_text(encoding="utf-8")))
    return code
