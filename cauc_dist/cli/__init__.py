"""`cauc`: from scans to a store, a trained encoder and its probes. No torch or zarr before a command needs them."""

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro
from tyro.conf import Positional

from cauc_dist import config
from cauc_dist.config import RunConfig
from cauc_dist.errors import BAD_INPUT, SET_ASIDE, BadInput, nearest

if TYPE_CHECKING:
    from cauc_dist.world import World

COMMANDS = {
    "demo": "the whole chain on a synthetic cohort: data, store, three trainings, probes, report",
    "ingest": "scans and their metadata (BIDS, OpenBHB, .npy, tables, CIFAR-100) -> a Zarr store",
    "store": "info, verify, append, split: what is in a store, whether it is sound, more scans, a split by subject",
    "augment-preview": "a contact sheet of random views of a store's scans, as PNG",
    "train": "pre-train an encoder: a recipe (or a run's config.json), any field overridden, on --ranks processes",
    "resume": "go on with a run from its newest sound checkpoint",
    "probe": "linear probes of frozen features on held-out subjects, beside an untrained encoder",
    "finetune": "a run's encoder trained further, end to end, to tell one column; beside its frozen probe",
    "embed": "the representations of every scan of a store, by a run or an exported encoder, as npz and tsv",
    "export": "the encoder of a run's newest sound checkpoint, alone, for cauc_dist.load_encoder",
    "report": "one HTML page: the probe table and the curves of one or several runs",
    "reproduce": "a study: methods x seeds x splits, each run once, then one table with intervals, tests and figures",
    "verify": "on this machine, every objective on --ranks processes against one: value and gradient",
    "bench": "bench data: how fast scans are read, beside other ways of reading them",
}
STORE = {
    "info": "what a store holds: its form, sources, metadata with histograms; --out PAGE.html for a page",
    "verify": "read every byte: checksums of chunks, statistics, and with --sources the files that it was made from",
    "append": "add the scans of another source to a store, in the store's own form",
    "split": "deal the subjects into train, validation, test ..., kept as a column of the store",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    0 done, 1 a fault that `verify` found, 2 bad input, 3 non-finite loss, 4 done with scans set aside, 5 stopped by a
    signal after a checkpoint, 6 a rank is gone, 130 interrupted, else a dead rank's.
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
        command: Callable[[Sequence[str]], int] = globals()[f"_{arguments[0].replace('-', '_')}"]
        return command(arguments[1:])
    except (BadInput, OSError) as error:
        return _explain(error)
    except KeyboardInterrupt:
        do = "" if arguments[0] == "verify" else "; `cauc resume RUN` goes on from the last checkpoint"
        print(f"interrupted{do}", file=sys.stderr)
        return 130


def _explain(error: BadInput | OSError) -> int:
    """Say what is wrong; the exit code."""
    do = "" if isinstance(error, BadInput) else ". Check the path, its permissions and the disk."
    print(f"error: {error}{do}", file=sys.stderr)
    return BAD_INPUT


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
    description = STORE[command.removeprefix("store ")] if command.startswith("store ") else COMMANDS[command]
    return _options(kind, f"cauc {command}", description, arguments, default)


def _options(kind: type[T], program: str, description: str, arguments: Sequence[str], default: T | None) -> T:
    options = {} if default is None else {"default": default}
    return tyro.cli(kind, args=arguments, prog=program, description=description, **options)  # type: ignore[no-any-return, call-overload]


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


def _ingest(arguments: Sequence[str]) -> int:
    options = _parse(Ingest, "ingest", arguments)
    from cauc_dist.progress import Counters
    from cauc_dist.store.ingest import estimate, ingest
    from cauc_dist.store.planned import Settings

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    metadata = dataclasses.asdict(options.metadata)
    if options.dry_run:
        print(estimate(options.source, settings, workers=options.workers, **metadata))
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
        print(f"task {options.task} has done its share; the last one to finish makes {options.store}")
        return 0
    print(summary)
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


def _store(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, STORE))
        print("usage: cauc store COMMAND ... (cauc store COMMAND --help says more)\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in STORE.items()))
        return 0
    name = arguments[0]
    if name not in STORE:
        raise BadInput(f"no command {'store ' + name!r}", wanted="a command", do=nearest(name, STORE))
    command: Callable[[Sequence[str]], int] = globals()[f"_store_{name}"]
    return command(arguments[1:])


def _store_info(arguments: Sequence[str]) -> int:
    options = _parse(Info, "store info", arguments)
    if options.montage and options.out is None:
        raise BadInput("--montage without --out", wanted="a page to put it on", do="e.g. --out info.html")
    _writable(options.out)
    from cauc_dist.info import page, text
    from cauc_dist.store.reader import Store

    store = Store.open(options.store)
    print(text(store))
    if options.out is not None:
        page(store, options.out, montage=options.montage, say=_say)
        print(f"wrote {options.out}")
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


def _store_verify(arguments: Sequence[str]) -> int:
    options = _parse(VerifyStore, "store verify", arguments)
    from cauc_dist.progress import Counter
    from cauc_dist.store.check import check

    with Counter("verify") as progress:
        asked = dataclasses.asdict(options)
        verdict = check(asked.pop("store"), **asked, progress=progress)
    print(verdict)
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


def _store_append(arguments: Sequence[str]) -> int:
    options = _parse(Append, "store append", arguments)
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
    print(summary)
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


def _store_split(arguments: Sequence[str]) -> int:
    options = _parse(Split, "store split", arguments)
    from cauc_dist.store.append import split_store

    counts = split_store(options.store, options.name, _shares(options.parts), options.by, options.seed)
    for part, (subjects, scans) in counts.items():
        print(f"{part}: {subjects} subjects, {scans} scans")
    print(f"train on it with --data.split {options.name}")
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


def _augment_preview(arguments: Sequence[str]) -> int:
    options = _parse(Preview, "augment-preview", arguments)
    base = _recipe(options.recipe).augment if options.recipe else options.augment
    if options.preset:
        base = _preset(options.preset)
    if options.recipe or options.preset:
        options = _parse(Preview, "augment-preview", arguments, default=dataclasses.replace(options, augment=base))
    _writable(options.out)
    from cauc_dist.sheet import contact_sheet
    from cauc_dist.store.reader import Store

    store = Store.open(options.store)
    if options.scans < 1:
        raise BadInput(f"--scans {options.scans}", wanted="1 or more", do="e.g. --scans 4")
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
    print(f"wrote {options.out}")
    return 0


def _preset(name: str) -> config.Augment:
    if name not in config.PRESETS:
        raise BadInput(f"no preset {name!r}", wanted="a published set", do=nearest(name, config.PRESETS))
    return config.PRESETS[name]


@dataclass(frozen=True)
class Bench:
    what: Annotated[Positional[Literal["data"]], tyro.conf.arg(metavar="data")]
    quick: bool = False
    """Under a minute."""
    out: Path | None = None
    """Write all raw numbers as JSON."""


def _bench(arguments: Sequence[str]) -> int:
    options = _parse(Bench, "bench", arguments)
    _writable(options.out)
    from cauc_dist.bench import data

    return data(quick=options.quick, out=options.out, say=_say)


@dataclass(frozen=True)
class Train:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    preset: str | None = None
    """A published set of transforms instead of the recipe's: all_tf, cutout, crop, simclr_2d."""
    ranks: int | None = None
    """Processes on this machine; default: 1, or those that srun, mpiexec or torchrun started."""
    start: bool = True
    """--no-start: only check, and write the run folder; start its ranks yourself (docs/running.md)."""


def _train(arguments: Sequence[str]) -> int:
    return _start(lambda world: _new(arguments, world))


def _new(arguments: Sequence[str], world: "World") -> tuple[Path, int, int] | None:
    from cauc_dist import recipes

    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise BadInput(
                "`cauc train` without a recipe", wanted=" or ".join(recipes.recipes()), do="name one of them"
            )
        arguments = ["demo_cauc", "--help"]  # every recipe has the same fields; these are the values of one
    base = _recipe(arguments[0])
    options = _parse(Train, "train", arguments[1:], default=Train(base))
    if options.preset is not None:
        base = dataclasses.replace(base, augment=_preset(options.preset))
        options = _parse(Train, "train", arguments[1:], default=Train(base))
    ranks = _ranks(options.ranks, world)
    from cauc_dist.prepare import prepare

    folder = prepare(options.config, ranks, _here(world))
    _say(f"run folder {folder}")
    return (folder, ranks, options.config.engine.threads) if options.start else None


def _recipe(name: str) -> RunConfig:
    from cauc_dist import recipes

    return _from_file(Path(name)) if name.endswith(".json") else recipes.get(name)


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


def _resume(arguments: Sequence[str]) -> int:
    return _start(lambda world: _old(arguments, world))


def _old(arguments: Sequence[str], world: "World") -> tuple[Path, int, int]:
    options = _parse(Resume, "resume", arguments)
    asked = options.ranks
    if asked is None and world.world_size == 1:
        asked = _ranks_before(options.run)
    ranks = _ranks(asked, world)
    from cauc_dist import checkpoint
    from cauc_dist.prepare import check, check_store, load
    from cauc_dist.train import card

    run = load(options.run)
    store = check(run, ranks, _here(world))
    check_store(options.run, store)
    checkpoint.latest(options.run, card(run, store))  # refuse here, once, not on every rank
    return options.run, ranks, run.engine.threads


def _ranks(asked: int | None, world: "World") -> int:
    """How many processes train: those that were asked for, or that a launcher has started."""
    if asked is not None and world.world_size > 1 and asked != world.world_size:
        raise BadInput(
            f"--ranks {asked} on each of {world.world_size} processes that are ranks already ({world.source})",
            wanted="ranks that are started once",
            do="leave --ranks out, or start one process (srun -n 1, no mpiexec, no torchrun)",
        )
    ranks = world.world_size if asked is None else asked
    _at_least_one(ranks)
    return ranks


def _ranks_before(run: Path) -> int | None:
    """How many ranks an earlier life of the run had, where they were started on one machine."""
    from cauc_dist import journal

    before = journal.begun(run)
    return before["ranks"] if before and before.get("launcher") in ("single", "environment") else None


def _here(world: "World") -> int | None:
    """How many of a launcher's ranks are on this host; None: there is no launcher."""
    return world.local_size if world.world_size > 1 else None


def _at_least_one(ranks: int) -> None:
    if ranks < 1:
        raise BadInput(f"--ranks {ranks}", wanted="1 or more processes", do="e.g. --ranks 2")


Ready = Callable[["World"], tuple[Path, int, int] | None]
"""Check and write a run folder: the folder, its ranks, their threads; None where it is not to be started."""


def _start(ready: Ready) -> int:
    """Start the ranks of what is ready, or be one of them, where a launcher has started this process as a rank."""
    from cauc_dist.world import World

    world = World.from_env()
    if world.world_size > 1:
        return _be_a_rank(world, ready)
    job = ready(world)
    if job is None:
        return 0
    from cauc_dist import spawn

    folder, ranks, threads = job
    return spawn.start(ranks, str(folder), threads=threads)


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
        return _explain(error), ""
    except SystemExit as end:  # --help, or options that are none
        return int(end.code or 0), ""
    except Exception:
        traceback.print_exc()
        return 1, ""
    return 0, str(job[0].absolute()) if job else ""


@dataclass(frozen=True)
class Probe:
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Run folders of one store and one split."""
    columns: tuple[str, ...] = ()
    """Metadata columns; default: all that vary."""
    voxels: bool = True
    """Probe raw voxels too, where they fit in 4 GiB."""
    knn: bool = False
    """Nearest neighbours beside the linear probes."""
    after_projector: bool = False
    """The representation after the projector too."""
    geometry: bool = False
    """Alignment, uniformity, their conditional forms and effective rank, of training and of held-out subjects."""
    few_labels: tuple[int, ...] = ()
    """Linear probes that are fitted on so many labels, e.g. 100 300 500: five draws of them."""
    out: Path | None = None
    """Write the table as JSON; default: probe.json in the first run folder."""


def _probe(arguments: Sequence[str]) -> int:
    options = _parse(Probe, "probe", arguments)
    runs = _some(options.runs)
    _writable(options.out)
    from cauc_dist.probe import probe

    table = probe(
        runs,
        options.columns,
        voxels=options.voxels,
        knn=options.knn,
        after_projector=options.after_projector,
        geometries=options.geometry,
        few_labels=options.few_labels,
        say=_say,
    )
    (options.out or runs[0] / "probe.json").write_text(table.to_json(), encoding="utf-8")
    print(table)
    return 0


@dataclass(frozen=True)
class Finetune:
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    target: str
    """Metadata column."""
    scratch: bool = False
    """Also from the weights that the run began from."""
    epochs: int = 30
    """The most; a fifth of the training subjects chooses how many."""
    batch_size: int = 32
    lr: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0
    out: Path | None = None
    """Write the table as JSON; default: finetune-TARGET.json in the run folder."""


def _finetune(arguments: Sequence[str]) -> int:
    options = _parse(Finetune, "finetune", arguments)
    _writable(options.out)
    from cauc_dist.finetune import Settings, finetune

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    table = finetune(options.run, options.target, settings, scratch=options.scratch, say=_say)
    (options.out or options.run / f"finetune-{options.target}.json").write_text(table.to_json(), encoding="utf-8")
    print(table)
    return 0


@dataclass(frozen=True)
class Export:
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to make: encoder.safetensors and config.json."""


def _export(arguments: Sequence[str]) -> int:
    options = _parse(Export, "export", arguments)
    from cauc_dist.export import export

    print(f"wrote {export(options.run, options.out, say=_say)}: cauc_dist.load_encoder opens it")
    return 0


@dataclass(frozen=True)
class Embed:
    source: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder, or one of `cauc export`."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to make: embeddings.npz and embeddings.tsv."""
    store: str | None = None
    """For an exported encoder: the store to embed."""
    ranks: int | None = None
    """Processes on this machine; default: 1, or those that srun, mpiexec or torchrun started."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: as the run was trained; one GPU a rank where there is CUDA, else the CPU."""


def _embed(arguments: Sequence[str]) -> int:
    options = _parse(Embed, "embed", arguments)
    from cauc_dist.world import World

    world = World.from_env()
    ranks = _ranks(options.ranks, world)
    chosen = [str(options.source), str(options.out), "--device", options.device]
    chosen += ["--store", options.store] if options.store else []
    from cauc_dist import embed, spawn

    if world.world_size > 1:
        return embed.main(chosen)
    embed.check(options.source, options.out, options.store, options.device, ranks)
    return spawn.start(ranks, *chosen, module="cauc_dist.embed")


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


@dataclass(frozen=True)
class Reproduce:
    study: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]
    """A study: docs/reproduce.md lists them with their endpoints."""
    seeds: int | None = None
    """Run the first so many; default: all of the study's."""
    methods: tuple[str, ...] = ()
    """Run only these; default: all."""
    epochs: int | None = None
    """So many in place of each arm's own: for a try, or a lent GPU. Give such runs a --folder of their own."""
    folder: Path | None = None
    """Runs, logs and results; default: runs/NAME. What is done there is not done again."""
    store: Path | None = None
    """The study's store; default: FOLDER/store.zarr. One that is missing is made from the data."""
    data: Path | None = None
    """Folder of the real data; default: $CAUC_DATA."""
    jobs: int | None = None
    """Members at a time, a process each; default: the cores."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Default: as the study says. Members share the GPU."""
    only: Literal["all", "check", "tables"] = "all"
    """check: the store, and manifest.json for `python -m launch reproduce`; tables: results of what is done."""


def _reproduce(arguments: Sequence[str]) -> int:
    options = _parse(Reproduce, "reproduce", arguments)
    for name in ("seeds", "jobs", "epochs"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise BadInput(f"--{name} {value}", wanted="1 or more", do=f"e.g. --{name} 1")
    from cauc_dist import studies

    study = studies.get(options.study, options.epochs)
    from cauc_dist.reproduce import page, reproduce

    asked = {**vars(options), "study": study, "folder": options.folder or Path("runs") / study.name}
    del asked["epochs"]
    found = reproduce(**asked, say=_say)
    if found:
        print(page.markdown(found))
    return int(bool(found and found["failed"]))


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
    from cauc_dist import spawn
    from cauc_dist.verify import check

    check(options.device, options.ranks)
    chosen = ("--device", options.device, "--exchange", options.exchange)
    return spawn.start(options.ranks, *chosen, module="cauc_dist.verify")


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
