"""`cauc probe, finetune, export, embed, report, reproduce`: what a trained encoder knows, and where it goes."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from cauc_dist import progress
from cauc_dist.cli import voice
from cauc_dist.cli.runs import ranks_of
from cauc_dist.cli.words import parse


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


def probe(arguments: Sequence[str]) -> int:
    options = parse(Probe, "probe", arguments)
    runs = voice.some(options.runs)
    voice.writable(options.out)
    voice.say(f"probe: {', '.join(map(str, runs))}")
    from cauc_dist.probe import probe

    table = probe(
        runs,
        options.columns,
        voxels=options.voxels,
        knn=options.knn,
        after_projector=options.after_projector,
        geometries=options.geometry,
        few_labels=options.few_labels,
        say=voice.say,
    )
    (options.out or runs[0] / "probe.json").write_text(table.to_json(), encoding="utf-8")
    voice.tell(table, json.loads(table.to_json()))
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


def finetune(arguments: Sequence[str]) -> int:
    options = parse(Finetune, "finetune", arguments)
    voice.writable(options.out)
    voice.say(f"finetune: {options.run} to tell {options.target}")
    from cauc_dist.finetune import Settings, finetune

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    table = finetune(options.run, options.target, settings, scratch=options.scratch, say=voice.say)
    (options.out or options.run / f"finetune-{options.target}.json").write_text(table.to_json(), encoding="utf-8")
    voice.tell(table, json.loads(table.to_json()))
    return 0


@dataclass(frozen=True)
class Export:
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to make: encoder.safetensors and config.json."""


def export(arguments: Sequence[str]) -> int:
    options = parse(Export, "export", arguments)
    voice.say(f"export: {options.run} -> {options.out}")
    from cauc_dist.export import export

    wrote = export(options.run, options.out, say=voice.say)
    voice.tell(f"wrote {wrote}: cauc_dist.load_encoder opens it", {"wrote": wrote})
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


def embed(arguments: Sequence[str]) -> int:
    options = parse(Embed, "embed", arguments)
    from cauc_dist.world import World

    world = World.from_env()
    ranks = ranks_of(options.ranks, world)
    if world.rank == 0:
        voice.say(f"embed: {options.source} -> {options.out}")
    chosen = [str(options.source), str(options.out), "--device", options.device]
    chosen += ["--store", options.store] if options.store else []
    from cauc_dist import embed, spawn

    if world.world_size > 1:
        code = embed.main(chosen)
        if world.rank == 0:
            voice.tell(None, {"wrote": options.out if code == 0 else None, "code": code})
        return code
    embed.check(options.source, options.out, options.store, options.device, ranks)
    code = spawn.start(ranks, *chosen, module="cauc_dist.embed")
    voice.tell(None, {"wrote": options.out if code == 0 else None, "code": code})
    return code


@dataclass(frozen=True)
class Report:
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Run folders, compared on one page."""
    out: Path = Path("report.html")
    """The page to write."""
    table: Path | None = None
    """A table of `cauc probe --out`; default: probe.json of each run that has one."""
    maps: bool = True
    """Maps, weights and similarities, which need the encoder and the store."""
    show_ids: bool = False
    """Name subjects by their ids, not by salted hashes: such a page is as private as the data."""
    serve: bool = False
    """Serve the page, live, until ctrl-C."""
    host: str = "127.0.0.1"
    """Of --serve: another address opens the page to whoever reaches it."""
    port: int = 0
    """Of --serve; 0: a free one."""


def report(arguments: Sequence[str]) -> int:
    options = parse(Report, "report", arguments)
    runs = voice.some(options.runs)
    voice.writable(options.out)
    voice.say(f"report: {', '.join(map(str, runs))}")
    from cauc_dist.report import report, serve

    table, maps, ids = options.table, options.maps, options.show_ids
    if options.serve:
        serve(runs, options.host, options.port, _always, table=table, maps=maps, show_ids=ids)
        return 0
    report(runs, options.out, table, maps=maps, show_ids=ids, say=voice.say)
    voice.tell(f"wrote {options.out}", {"wrote": options.out})
    return 0


def _always(line: str) -> None:
    """Where a page is served, and to whom, is to be known however quiet it is."""
    print(line, file=sys.stderr if progress.voice() else sys.stdout, flush=True)


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


def reproduce(arguments: Sequence[str]) -> int:
    options = parse(Reproduce, "reproduce", arguments)
    voice.at_least_one(seeds=options.seeds, jobs=options.jobs, epochs=options.epochs)
    from cauc_dist import studies

    study = studies.get(options.study, options.epochs)
    from cauc_dist.reproduce import page, reproduce

    asked = {**vars(options), "study": study, "folder": options.folder or Path("runs") / study.name}
    del asked["epochs"]
    found = reproduce(**asked, say=voice.say)
    if found:
        voice.tell(page.markdown(found), found)
    else:
        voice.tell(None, {"manifest": asked["folder"] / "manifest.json"})
    return int(bool(found and found["failed"]))
