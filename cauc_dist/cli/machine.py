"""`cauc demo, doctor, verify, bench`: this machine, and the whole chain on it."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from cauc_dist import progress
from cauc_dist.cli import voice
from cauc_dist.cli.words import parse


@dataclass(frozen=True)
class Bench:
    what: Annotated[Positional[Literal["data"]], tyro.conf.arg(metavar="data")]
    quick: bool = False
    """Under a minute."""
    out: Path | None = None
    """Write all raw numbers as JSON."""


def bench(arguments: Sequence[str]) -> int:
    options = parse(Bench, "bench", arguments)
    voice.writable(options.out)
    from cauc_dist.bench import data

    return data(quick=options.quick, out=options.out, say=voice.say)


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
