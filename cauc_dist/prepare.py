"""A run folder, checked and written before any rank starts: what is wrong is said once, and nothing is left behind."""

import dataclasses
import json
import math
import operator
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from cauc_dist import augment, config, encoders, kernels, optimisers, trackers
from cauc_dist.config import RunConfig
from cauc_dist.engine import deepspeed_config
from cauc_dist.errors import BadInput
from cauc_dist.objective import Objective
from cauc_dist.provenance import provenance
from cauc_dist.store.files import is_remote
from cauc_dist.store.reader import Store
from cauc_dist.stream.plan import Plan, Rows, balanced, split
from cauc_dist.stream.values import values
from cauc_dist.world import World

CONFIG, PROVENANCE = "config.json", "provenance.json"
TRAIN = "train"


def prepare(run: RunConfig, ranks: int, local: int | None = None) -> Path:
    """Check the run against its store, then write its folder (config.json, provenance.json); returns the folder.

    `local`: how many of the ranks are on this host; default: all. 0: they will be on others.
    Raises BadInput for a store, column, batch size or folder that cannot serve; the folder then does not exist.
    """
    folder = run.folder
    if folder.exists():
        raise BadInput(
            f"run folder {folder} exists already",
            wanted="a new one",
            do=f"go on with it by `cauc resume {folder}`, or choose another with --run",
        )
    store = check(run, ranks, local)
    engine = run.engine
    if engine.deepspeed is not None:
        engine = dataclasses.replace(engine, deepspeed=str(Path(engine.deepspeed).absolute()))
    data = dataclasses.replace(run.data, store=absolute(run.data.store))
    run = dataclasses.replace(run, run=folder, data=data, engine=engine)
    record = {
        **provenance(),
        "seed": run.seed,
        "ranks": ranks,
        "store": store.where,
        "fingerprint": store.fingerprint,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (temporary / CONFIG).write_text(config.to_json(run), encoding="utf-8")
        (temporary / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def check(run: RunConfig, ranks: int, local: int | None = None) -> Store:
    """Everything that can be known to be wrong before training: settings, store, columns, split, batch size."""
    _check_numbers(run)
    _check_engine(run, ranks)
    _check_devices(run, ranks, local)
    trackers.check(run)
    store = Store.open(run.data.store)
    train, _ = parts(run, store)
    store.require(run.objective.columns, train)
    _check_kernel(run, store)
    plan_of(run, store).rank_batch(0, 0, ranks)
    values(store, run.data.normalise, train)
    if run.data.stage is not None:
        stage_folder(run)
    y = torch.from_numpy(store.metadata(run.objective.columns)[train])
    incomplete_first = y.isnan().any(1).int().argsort(descending=True, stable=True)
    Objective(run.objective, y).try_out(y[incomplete_first[: min(run.batch_size, 64)]], run.projector.out)
    with torch.device("meta"):  # no memory, no time: only whether it fits
        encoders.build(run.encoder, store.shape)
    augment.check(run.augment, store.shape)
    if run.augment.p_colour > 0 and run.data.normalise != "none":
        found = f"augment.p_colour {run.augment.p_colour} with data.normalise {run.data.normalise}"
        do = "Set --data.normalise none and --augment.white to the largest value (255 for bytes), or p_colour to 0"
        raise BadInput(found, wanted="values from 0 to augment.white", do=do)
    return store


def absolute(store: str) -> str:
    """A store's folder from anywhere; a URL as it is."""
    return store if is_remote(store) else str(Path(store).absolute())


def parts(run: RunConfig, store: Store) -> tuple[Rows, Rows]:
    """(train rows, held-out rows) of the run, ascending; no subject is on both sides."""
    name = run.data.split
    if name is None:
        return split(store.subjects, run.data.folds, run.data.fold)
    column, codes = store.column(name), store.metadata([name])[:, 0]
    if TRAIN not in column.levels:
        found = f"column {name} of {store.where} has {', '.join(column.levels[:5]) or 'numbers'}"
        do = "Name a column of splits, or make one by `cauc store split`"
        raise BadInput(found, wanted=f"an entry {TRAIN!r}", do=do)
    train = codes == column.levels.index(TRAIN)
    held = ~train & ~np.isnan(codes)
    trained, kept = ({store.subjects[i] for i in np.flatnonzero(side)} for side in (train, held))
    both = sorted(trained & kept)
    if both:
        found = f"{len(both)} subjects are on both sides of {name} ({', '.join(both[:5])})"
        raise BadInput(found, wanted="each subject on one side", do="Make a split by subject with `cauc store split`")
    return np.flatnonzero(train), np.flatnonzero(held)


def plan_of(run: RunConfig, store: Store) -> Plan:
    """The order in which the run sees its training scans."""
    train, _ = parts(run, store)
    subjects = [store.subjects[i] for i in train]
    weights = None
    if (name := run.data.weights) is not None:
        if store.column(name).kind != "number":
            raise BadInput(f"column {name} of texts as weights", wanted="a column of numbers", do="Name another one")
        weights = store.metadata([name])[train, 0]
    if run.data.balance is not None:
        weights = balanced(weights, store.metadata([run.data.balance])[train, 0], subjects)
    return Plan(train, subjects, run.batch_size, run.seed, weights)


def stage_folder(run: RunConfig) -> Path:
    """data.stage with its variables filled in; BadInput where one of them is not set."""
    folder = os.path.expandvars(run.data.stage or "")
    if "$" in folder:
        raise BadInput(f"data.stage {folder}", wanted="variables that are set", do="set them, or name a folder")
    return Path(folder)


WIDEST = 2**16
"""Units of a layer: more is a slip of the hand."""


def _check_numbers(run: RunConfig) -> None:
    """Refuse what would fail, or delete its own checkpoints, only after hours."""
    least: dict[str, float] = {
        "seed": 0,
        "epochs": 1,
        "batch_size": 2,
        "augment.views": 2,
        "data.threads": 1,
        "data.prefetch": 1,
        "projector.hidden": 1,
        "projector.out": 1,
        "objective.tau": 1e-6,
        "objective.t": 1e-6,
        "objective.alpha": 1e-6,
        "objective.lambda_unif": 0,
        "optim.lr": 0,
        "optim.weight_decay": 0,
        "optim.warmup_epochs": 0,
        "optim.step_epochs": 1,
        "optim.step_factor": 0,
        "optim.clip_norm": 0,
        "engine.threads": 0,
        "engine.start_minutes": 0.1,
        "engine.timeout_minutes": 0.1,
        "optim.momentum": 0,
        "optim.ema": 0,
        "checkpoint.every_epochs": 1,
        "checkpoint.keep": 1,
    }
    given = {"objective.lambda_align": 0, "engine.memory_gib": 0.0001, "optim.reference_batch": 1}
    if run.engine.encode_chunk != "auto":
        given["engine.encode_chunk"] = 1
    least |= {name: bound for name, bound in given.items() if operator.attrgetter(name)(run) is not None}
    for name, bound in least.items():
        value = operator.attrgetter(name)(run)
        if not bound <= value < math.inf:  # NaN too
            option = name.replace("_", "-")
            raise BadInput(f"{name} {value}", wanted=f"{bound:g} or more", do=f"set --{option} to that")
    for name in ("encoder.width", "projector.hidden", "projector.out"):
        if (operator.attrgetter(name)(run) or 0) > WIDEST:
            raise BadInput(f"{name} {operator.attrgetter(name)(run)}", wanted=f"{WIDEST:,} or less", do="set it lower")
    for name in ("betas", "momentum", "ema"):
        value = getattr(run.optim, name)
        if not all(0 <= x < 1 for x in (value if name == "betas" else (value,))):
            raise BadInput(f"optim.{name} {value}", wanted="in [0, 1)", do="set it to e.g. .9")
    if run.optim.warmup_epochs > run.epochs:
        raise BadInput(
            f"optim.warmup_epochs {run.optim.warmup_epochs} of {run.epochs} epochs",
            wanted="a warm-up that ends",
            do="set --optim.warmup-epochs to less, or --epochs to more",
        )


def _check_engine(run: RunConfig, ranks: int) -> None:
    """Combinations that would be wrong in silence."""
    stage = run.engine.zero_stage
    for found, wrong, wanted, why in (
        ("optim.name lars", run.optim.name == "lars" and stage > 0, 0, "ZeRO cuts its layers to pieces"),
        ("engine.precision fp64", run.engine.precision == "fp64" and stage > 0, 0, "ZeRO adds gradients in fp32"),
        ("optim.ema", run.optim.ema > 0 and stage == 3, 2, "no rank holds all weights"),
    ):
        if wrong:
            raise BadInput(
                f"{found} with engine.zero_stage {stage}, where {why}",
                wanted=f"a stage up to {wanted}",
                do=f"set --engine.zero-stage {wanted}",
            )
    optimisers.peak_lr(run.optim, run.batch_size)
    deepspeed_config(run, World(0, 0, ranks))


def _check_devices(run: RunConfig, ranks: int, local: int | None) -> None:
    if local == 0 or (local is not None and torch.cuda.device_count() == 1):
        return  # a launcher that shows each rank a GPU of its own; NCCL refuses one that ranks share
    ranks = ranks if local is None else local
    if World().device(run.engine.device).type == "cuda" and ranks > torch.cuda.device_count():
        raise BadInput(
            f"{ranks} ranks on {torch.cuda.device_count()} GPUs",
            wanted="a GPU a rank",
            do=f"use --ranks {torch.cuda.device_count()}, or --engine.device cpu",
        )


def _check_kernel(run: RunConfig, store: Store) -> None:
    """A distance between category codes means nothing: M is not one more than F."""
    if not run.objective.kernel:
        return
    columns = {column.name: column for column in store.columns}
    kernel = kernels.parse(run.objective.kernel, run.objective.combine)
    for spec, name, factor in zip(run.objective.kernel, kernel.columns, kernel.factors, strict=True):
        of_texts, by_distance = columns[name].kind == "category", factor.kind != "delta"
        if of_texts and (by_distance or run.objective.name == "rank_n_contrast"):
            raise BadInput(
                f"kernel {spec} on {name}, a column of texts ({', '.join(columns[name].levels[:5])})",
                wanted="a column of numbers, or the delta kernel and a loss that compares by it",
                do=f"use {name}:delta, with another objective than rank_n_contrast",
            )


def load(folder: Path) -> RunConfig:
    """The configuration of a run folder."""
    path = folder / CONFIG
    if not path.exists():
        raise BadInput(
            f"no {CONFIG} in {folder}", wanted="a run folder", do="give the folder that `cauc train` printed"
        )
    return dataclasses.replace(config.read(path), run=folder)


def check_store(folder: Path, store: Store) -> None:
    """Refuse to go on with a run on other data than it began with."""
    path = folder / PROVENANCE
    if not path.exists():
        raise BadInput(f"no {PROVENANCE} in {folder}", wanted="a whole run folder", do="restore it, or start a new run")
    try:
        began = json.loads(path.read_bytes())["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error!r})", wanted="what `cauc train` wrote", do="restore it") from None
    if store.fingerprint != began:
        raise BadInput(
            f"store {store.where} has the fingerprint {store.fingerprint[:12]}",
            wanted=f"{began[:12]}, with which {folder} began",
            do="restore that store, or start a new run",
        )
