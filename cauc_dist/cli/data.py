"""`cauc ingest`, `cauc store ...`, `cauc augment-preview`: scans on their way into a store, and what is in it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from cauc_dist import config
from cauc_dist.cli import voice
from cauc_dist.cli.runs import preset_of, recipe_of
from cauc_dist.cli.words import STORE, parse
from cauc_dist.errors import SET_ASIDE, BadInput


@dataclass(frozen=True)
class Metadata:
    """What `ingest` and `store append` read beside the scans (docs/sources.md)."""

    table: Path | None = None
    """Table of participants; default: participants.tsv (or .csv) of the source."""
    features: Path | None = None
    """Table of features, a row a participant: the samples are its rows, there are no volumes."""
    missing: tuple[str, ...] = ()
    """Codes that mean missing, COLUMN=CODE; *=CODE for every column. E.g. height=0 *=-9999."""
    ranges: tuple[str, ...] = ()
    """Values outside become missing, COLUMN=LOW:HIGH. E.g. height=100:230."""


@dataclass(frozen=True)
class Ingest:
    source: Annotated[Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder (BIDS, OpenBHB, .npy files, CIFAR-100) or table of features."""
    store: Annotated[Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Zarr store to make."""
    metadata: Annotated[Metadata, tyro.conf.arg(name="")] = Metadata()
    shape: tuple[int, ...] | None = None
    """Central window of every scan, voxels; needed where scans differ in shape."""
    pad: bool = False
    """Let scans smaller than the window be padded with zeros."""
    layout: Literal["auto", "packed", "dense"] = "auto"
    """packed keeps only the voxels that some scan has; auto: where those are at most 70 %."""
    dtype: Literal["auto", "f16", "f32", "i16"] = "auto"
    """f16 (scaled by a power of two, about 70 dB), exact f32, or i16 (scaled, about 95 dB). auto: f16, tables f32."""
    codec: Literal["auto", "lz4", "zstd", "none"] = "auto"
    """auto: none for packed, lz4 for dense. zstd: smallest, slowest."""
    suffix: tuple[str, ...] = ("T1w",)
    """Which images: sub-*_SUFFIX.nii.gz. Several become channels. OpenBHB: vbm, quasiraw, vbm_roi ..."""
    resample: tuple[float, float, float] | None = None
    """Voxel size in mm that every scan is resampled to (linear)."""
    dry_run: bool = False
    """Say what would be done, with an estimate of disk and time; write nothing."""
    workers: int | None = None
    """Processes; default: the cores, fewer for a small cohort."""
    task: str = "0/1"
    """I/N: do the I-th of N shares, in a job array whose tasks see one disk; the last to finish makes the store."""
    wait_minutes: float = 60.0
    """How long a task waits for the others' part of the survey (packed stores)."""
    fresh: bool = False
    """Throw away what an unfinished ingest of other data or settings left."""


def ingest(arguments: Sequence[str]) -> int:
    options = parse(Ingest, "ingest", arguments)
    voice.say(f"ingest: {options.source} -> {options.store}")
    from cauc_dist.progress import Counters
    from cauc_dist.store.ingest import estimate, ingest
    from cauc_dist.store.planned import Settings

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    metadata = dataclasses.asdict(options.metadata)
    if options.dry_run:
        found = estimate(options.source, settings, workers=options.workers, **metadata)
        voice.tell(found, found)
        return 0
    task = _task(options.task)
    with Counters() as progress:
        summary = ingest(
            options.source,
            options.store,
            settings,
            workers=options.workers,
            task=task,
            wait_minutes=options.wait_minutes,
            fresh=options.fresh,
            progress=progress,
            **metadata,
        )
    if summary is None:
        share = f"task {options.task} has done its share; the last one to finish makes {options.store}"
        voice.tell(share, {"store": options.store, "task": options.task, "made": False})
        return 0
    voice.tell(summary, summary)
    return SET_ASIDE if summary.set_aside else 0


def _task(text: str) -> tuple[int, int]:
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        raise BadInput(f"--task {text}", wanted="I/N", do="e.g. --task 0/8 to --task 7/8") from None
    return i, n


@dataclass(frozen=True)
class Info:
    store: Annotated[Positional[str], tyro.conf.arg(metavar="STORE")]
    """Folder or URL."""
    out: Path | None = None
    """Write a page (HTML) too."""
    montage: bool = False
    """With --out: a picture of the middle slices of some scans. Heads that are not defaced can be recognised."""


def store(arguments: Sequence[str]) -> int:
    commands = {"info": _info, "verify": _verify, "append": _append, "split": _split}
    return voice.inner("store", STORE, commands, arguments)


def _info(arguments: Sequence[str]) -> int:
    options = parse(Info, "store info", arguments)
    if options.montage and options.out is None:
        raise BadInput("--montage without --out", wanted="a page to put it on", do="e.g. --out info.html")
    voice.writable(options.out)
    voice.say(f"store info: {options.store}")
    from cauc_dist.info import facts, page, text
    from cauc_dist.store.reader import Store

    store = Store.open(options.store)
    if options.out is not None:
        page(store, options.out, montage=options.montage, say=voice.say)
        voice.say(f"wrote {options.out}")
    voice.tell(text(store), facts(store))
    return 0


@dataclass(frozen=True)
class VerifyStore:
    store: Annotated[Positional[str], tyro.conf.arg(metavar="STORE")]
    """Folder or URL."""
    sources: Path | None = None
    """The source that it was ingested from: compare its files with the checksums in the store."""
    table: Path | None = None
    """As it was given to ingest."""
    features: Path | None = None
    """As it was given to ingest."""
    threads: int = 4


def _verify(arguments: Sequence[str]) -> int:
    options = parse(VerifyStore, "store verify", arguments)
    from cauc_dist.progress import Counter
    from cauc_dist.store.check import check

    with Counter("verify") as progress:
        asked = dataclasses.asdict(options)
        verdict = check(asked.pop("store"), **asked, progress=progress)
    voice.tell(verdict, verdict)
    return int(bool(verdict.faults))


@dataclass(frozen=True)
class Append:
    source: Annotated[Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """As for ingest."""
    store: Annotated[Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Store to add to."""
    metadata: Annotated[Metadata, tyro.conf.arg(name="")] = Metadata()
    workers: int | None = None
    """Processes; default: the cores, fewer for a small cohort."""
    fresh: bool = False
    """Throw away what an unfinished append of other data left."""


def _append(arguments: Sequence[str]) -> int:
    options = parse(Append, "store append", arguments)
    from cauc_dist.progress import Counters
    from cauc_dist.store.append import append

    with Counters() as progress:
        summary = append(
            options.source,
            options.store,
            workers=options.workers,
            fresh=options.fresh,
            progress=progress,
            **dataclasses.asdict(options.metadata),
        )
    voice.tell(summary, summary)
    return SET_ASIDE if summary.set_aside else 0


@dataclass(frozen=True)
class Split:
    store: Annotated[Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Store that gets the column."""
    name: str = "split"
    """Column to make."""
    parts: tuple[str, ...] = ("train=.8", "validation=.1", "test=.1")
    """PART=SHARE, adding up to 1; `train` is what --data.split trains on."""
    by: tuple[str, ...] = ()
    """Columns whose values (numbers: fifths of them) each part has its share of."""
    seed: int = 0


def _split(arguments: Sequence[str]) -> int:
    options = parse(Split, "store split", arguments)
    from cauc_dist.store.append import split_store

    counts = split_store(options.store, options.name, _shares(options.parts), options.by, options.seed)
    lines = [f"{part}: {subjects} subjects, {scans} scans" for part, (subjects, scans) in counts.items()]
    told = {part: {"subjects": subjects, "scans": scans} for part, (subjects, scans) in counts.items()}
    voice.tell("\n".join([*lines, f"train on it with --data.split {options.name}"]), told)
    return 0


def _shares(parts: Sequence[str]) -> dict[str, float]:
    try:
        return {name: float(share) for name, share in (part.split("=") for part in parts)}
    except ValueError:
        do = "e.g. --parts train=.8 test=.2"
        raise BadInput(f"--parts {' '.join(parts)}", wanted="PART=SHARE, several", do=do) from None


@dataclass(frozen=True)
class Preview:
    store: Annotated[Positional[str], tyro.conf.arg(metavar="STORE")]
    """Folder or URL."""
    recipe: str | None = None
    """A recipe or a run's config.json, for its augmentation."""
    preset: str | None = None
    """A published set of transforms: all_tf, cutout, crop, simclr_2d."""
    augment: config.Augment = dataclasses.field(default_factory=config.Augment)
    """Any field, over what recipe or preset say."""
    normalise: Literal["volume", "none"] = "volume"
    scans: int = 4
    """Scans, evenly spread over the store."""
    seed: int = 0
    epoch: int = 0
    out: Path = Path("views.png")


def augment_preview(arguments: Sequence[str]) -> int:
    options = parse(Preview, "augment-preview", arguments)
    base = recipe_of(options.recipe).augment if options.recipe else options.augment
    if options.preset:
        base = preset_of(options.preset)
    if options.recipe or options.preset:
        options = parse(Preview, "augment-preview", arguments, default=dataclasses.replace(options, augment=base))
    voice.writable(options.out)
    voice.at_least_one(scans=options.scans)
    from cauc_dist.sheet import contact_sheet
    from cauc_dist.store.reader import Store

    store = Store.open(options.store)
    n = min(options.scans, len(store))
    rows = [i * len(store) // n for i in range(n)]
    contact_sheet(
        store,
        options.augment,
        rows=rows,
        seed=options.seed,
        epoch=options.epoch,
        normalise=options.normalise,
        out=options.out,
    )
    voice.tell(f"wrote {options.out}", {"wrote": options.out})
    return 0
