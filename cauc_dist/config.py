"""The typed, frozen description of a run. Imports no torch: a login node reads it in milliseconds.

Every number that a run depends on is here or derived from here; `batch_size` is GLOBAL (subjects a step over
all ranks), lengths are voxels, times are epochs unless the name says otherwise.
"""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from cauc_dist.errors import BadInput, nearest


@dataclass(frozen=True)
class Data:
    """Which scans a run sees, and how they are read."""

    store: str = "store.zarr"
    """Zarr store made by `cauc ingest`: a folder, or an http(s):// or s3:// URL."""
    stage: str | None = None
    """Folder on each node's own disk, e.g. '$SLURM_TMPDIR': the store is copied there first, once a node."""
    split: str | None = None
    """Column of the store: scans whose entry is `train` are trained on, the others held out. Instead of folds."""
    folds: int = 4
    """Subjects are dealt into this many parts by a hash of their name; 1 trains on everybody."""
    fold: int = 0
    """The part that is held out of pre-training, for probes."""
    weights: str | None = None
    """Column of numbers: a subject is drawn as often as its weight says, not once an epoch."""
    balance: str | None = None
    """Column (e.g. site): each of its values is drawn equally often."""
    normalise: Literal["volume", "dataset", "none"] = "volume"
    """`volume`: zero mean and unit variance over the voxels of each channel of each scan. `dataset`: over those of all
    training scans (images, and tables feature by feature)."""
    on_damage: Literal["raise", "skip"] = "raise"
    """What a scan does whose bytes in the store are damaged: end the run, or stay out of its batch, and be counted."""
    threads: int = 2
    """Reader threads a rank."""
    prefetch: int = 2
    """Batches read ahead of the step."""


Transform = Literal[
    "flip",
    "affine",
    "shift",
    "crop",
    "colour",
    "grey",
    "bias",
    "gamma",
    "intensity",
    "blur",
    "noise",
    "cutout",
]


@dataclass(frozen=True)
class Augment:
    """Random views of a sample; each transform is drawn independently with its probability `p_*` (0: off).

    Defaults: intensities only. Axes are spatial ones, counted from 0; lengths are voxels. docs/augment.md has the
    formulas. Values are taken as they come: shift, noise and cutout are meant for z-normalised samples.
    """

    views: int = 2
    order: tuple[Transform, ...] = get_args(Transform)
    """Which transform comes after which. It moves no draw: a transform's numbers do not depend on its place."""
    p_flip: float = 0.0
    """Mirror along one of `flip_axes`, each as likely (0: left-right in RAS; 1: left-right in an image)."""
    flip_axes: tuple[int, ...] = (0,)
    p_affine: float = 0.0
    """Rotation by U(-rotate, rotate) degrees about each axis, a factor U(1-zoom, 1+zoom) and a move by
    U(-move, move) along each, in one linear resampling; edges repeated."""
    rotate: float = 10.0
    zoom: float = 0.1
    move: float = 0.0
    p_shift: float = 0.0
    """Translate by up to `max_shift` whole voxels on each axis, edges repeated."""
    max_shift: int = 3
    p_crop: float = 0.0
    """Random box of `crop` of each side, resized back (linear)."""
    crop: float = 0.75
    crop_area: tuple[float, float] | None = None
    """Images: a box of U(crop_area) of the area, its columns over its rows e^U(log crop_aspect), instead of `crop`."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    p_colour: float = 0.0
    """Three-channel images of values in 0...white (data.normalise none): the four changes in a random order. Factors
    U(1-a, 1+a) for a = brightness, contrast and saturation; a turn of U(-hue, hue) of the circle of hues."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    white: float = 1.0
    """The largest value of a channel; 255 for bytes."""
    p_grey: float = 0.0
    """Three-channel images: each channel becomes .2989 R + .587 G + .114 B."""
    p_bias: float = 0.0
    """What lies above a channel's least value times exp(polynomial of degree 3 with coefficients U(-bias, bias))."""
    bias: float = 0.5
    p_gamma: float = 0.0
    """Between a channel's least and greatest value, scaled to 0...1: x -> x^g, g = e^U(-gamma, gamma)."""
    gamma: float = 0.3
    p_intensity: float = 0.5
    """x -> x * U(1-scale, 1+scale) + U(-shift, shift)."""
    scale: float = 0.2
    shift: float = 0.2
    p_blur: float = 0.5
    """Gaussian blur, standard deviation U(.1, blur)."""
    blur: float = 1.0
    p_noise: float = 0.5
    """Gaussian noise, standard deviation U(noise_min, noise)."""
    noise: float = 0.2
    noise_min: float = 0.0
    p_cutout: float = 0.0
    """Random box of `cutout` of each side set to 0."""
    cutout: float = 0.25


_OFF = Augment(p_intensity=0.0, p_blur=0.0, p_noise=0.0)
PRESETS: dict[str, Augment] = {
    "all_tf": replace(
        _OFF,
        order=("flip", "blur", "noise", "cutout", "crop"),
        p_flip=0.5,
        flip_axes=(0, 1, 2),
        p_blur=0.5,
        p_noise=0.5,
        noise=1.0,
        noise_min=0.1,
        p_cutout=0.5,
        p_crop=0.5,
    ),
    "cutout": replace(_OFF, p_cutout=1.0),
    "crop": replace(_OFF, p_crop=1.0),
    "simclr_2d": replace(
        _OFF,
        order=("crop", "flip", "colour", "grey"),
        p_crop=1.0,
        crop_area=(0.08, 1.0),
        p_flip=0.5,
        flip_axes=(1,),
        p_colour=0.8,
        p_grey=0.2,
    ),
}
"""Published sets. `all_tf`, `cutout`, `crop`: the names and numbers of the code of y-Aware contrastive learning
(arXiv 2106.08808), for z-normalised volumes. `simclr_2d`: SimCLR on CIFAR-10 (arXiv 2002.05709, B.9: colour jitter of
strength .5, no blur), for images of values in 0...white."""


@dataclass(frozen=True)
class Encoder:
    """From a volume (c, X, Y, Z), an image (c, X, Y) or a table row (c,) to a representation h."""

    name: Literal["cnn3d", "densenet121_3d", "resnet18_3d", "resnet18_2d", "mlp"] = "cnn3d"
    width: int | None = None
    """Channels of the first stage (cnn3d; the resnets, where 64 is published) or units of a hidden layer (mlp). None:
    as published, and 16 for cnn3d and mlp. densenet121_3d has no other than its own."""
    norm: Literal["published", "batch", "group"] = "published"
    """`group` needs no other sample; `batch` is synchronised over ranks, so that W ranks equal one process.
    `published`: batch for densenet121_3d and the resnets, group for cnn3d and mlp (ours)."""


@dataclass(frozen=True)
class Projector:
    """From h to z: hidden layer with ReLU, then a linear layer (512-128 in the published y-Aware code)."""

    hidden: int = 512
    out: int = 128


Objectives = Literal[
    "simclr",
    "y_aware",
    "cauc",
    "align_uniform",
    "supcon",
    "decoupled_uniformity",
    "threshold",
    "expw",
    "rank_n_contrast",
    "calign_unif",
    "align_cunif",
    "cross_entropy",
    "squared_error",
]


@dataclass(frozen=True)
class Objective:
    """The loss, in the letters of docs/losses.md. `kernel` holds one `column:kind[:scale[:missing]]` a column."""

    name: Objectives = "cauc"
    kernel: tuple[str, ...] = ()
    """E.g. `age:gaussian:5 sex:delta`. kind: gaussian (scale = standard deviation in the column's unit), cauchy
    (scale = gamma), delta. missing: marginal (default), distinct, ignore."""
    combine: Literal["product", "mean"] = "product"
    tau: float = 0.1
    """Temperature of the InfoNCE family and of rank_n_contrast (whose own code has 2)."""
    t: float = 2.0
    """Sharpness of the uniformity terms."""
    alpha: float = 2.0
    """Power of the distance in the alignment terms."""
    lambda_align: float | None = None
    """cauc, calign_unif, align_cunif and align_uniform: weight of the alignment; default: 1 for align_uniform, t for
    the others (docs/losses.md, exact fact 1)."""
    lambda_unif: float = 1.0
    """Weight of their uniformity."""
    normalise: Literal["row", "column"] = "row"
    """y_aware only: `column` reproduces the published code."""
    normalise_align: Literal["row", "global"] = "row"
    """cauc and calign_unif: each subject pulls alike, or each pair by its weight."""
    normalise_unif: Literal["global", "row"] = "global"
    """cauc and align_cunif: each pair repels by its weight, or each subject alike."""
    views: Literal["within", "pooled"] = "within"
    """cauc, calign_unif, align_cunif and align_uniform: uniformity over pairs of one view, or over all embeddings."""
    within: str | None = None
    """cauc and align_cunif: repel only pairs that agree in this column (e.g. site), for features free of it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that a run reads, in the order of y: the kernel's, then `within`."""
        names = tuple(spec.split(":")[0] for spec in self.kernel)
        return names if self.within is None else (*names, self.within)

    @property
    def on_sphere(self) -> bool:
        """Whether the loss takes z of unit rows; the others take it as the projector gives it."""
        return self.name not in ("rank_n_contrast", "cross_entropy", "squared_error")


@dataclass(frozen=True)
class Optim:
    """No decay on norms and biases; linear warm-up, then cosine to zero (or constant, or steps down)."""

    name: Literal["adamw", "adam", "sgd", "lars"] = "adamw"
    """adam: weight decay as an L2 term in the gradient, as published code has it. lars: layer-wise rates for batches of
    thousands (arXiv 1708.03888), with zero_stage 0."""
    lr: float = 1e-3
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """What becomes of `lr` where batch_size is not `reference_batch`: times their ratio, or its root."""
    reference_batch: int | None = None
    """The batch size that `lr` was chosen for."""
    weight_decay: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw and adam."""
    momentum: float = 0.9
    """sgd and lars."""
    warmup_epochs: float = 1.0
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    step_epochs: int = 10
    """step: the rate is multiplied by `step_factor` each time that so many epochs, warm-up included, are over."""
    step_factor: float = 0.9
    clip_norm: float = 0.0
    """Clip the global gradient norm; 0: off."""
    ema: float = 0.0
    """Keep a moving average of the weights with this decay (e.g. .999), for probes and export; 0: off."""


@dataclass(frozen=True)
class Engine:
    """What DeepSpeed is asked for. Stage 1 by default: docs/design.md says what ZeRO is worth here."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What of weights, gradients and moments the ranks share out; one rank alone keeps all of it (0)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16: autocast of the encoder; weights, embeddings and loss stay fp32. fp64, stage 0: for checks."""
    encode_chunk: int | Literal["auto"] | None = None
    """Subjects of a rank that are encoded at once (GradCache, arXiv 2101.06983): the batch is bounded by time, not by
    memory. Two passes, so 1.3 to 1.4 times a step's time. auto: as many as fit in memory_gib. None: all of them."""
    memory_gib: float | None = None
    """Memory that a rank may use; default: 90 % of what its GPU has free, or its share of half of the CPU's."""
    recompute: bool = False
    """Activation checkpointing: keep what lies between an encoder's blocks, compute the rest again."""
    channels_last: bool = False
    """Channels innermost in memory, which convolutions on GPUs prefer."""
    compile: bool = False
    """torch.compile of the encoder."""
    deepspeed: str | None = None
    """A JSON file of further DeepSpeed settings (e.g. comms_logger, bucket sizes); none that are derived here."""
    threads: int = 0
    """CPU threads a rank for torch; 0: OMP_NUM_THREADS, or the cores of the machine divided by its ranks."""
    exchange: Literal["all_gather", "ring"] = "all_gather"
    """How embeddings reach the other ranks. ring: where those of the whole batch do not fit on every GPU."""
    wire: Literal["fp32", "fp16"] = "fp32"
    """Precision of embeddings on the way; fp16 halves the bytes; cosines move by 3e-5 rms (docs/losses.md)."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradient is not finite: end the run, or be left out, and counted."""
    start_minutes: float = 30.0
    """A collective up to the end of the first step that waits longer ends the run: compiling, copying, slow disks."""
    timeout_minutes: float = 5.0
    """The same after the first step."""


@dataclass(frozen=True)
class Checkpoint:
    every_epochs: int = 5
    keep: int = 2
    """The newest so many stay."""
    best: bool = False
    """The one with the smallest mean loss since the one before stays too."""
    background: bool = False
    """Write the files while training goes on."""


@dataclass(frozen=True)
class Trackers:
    """Where the curves go besides RUN/journal.jsonl (docs/trackers.md). Rank 0 writes; none can end a run."""

    tensorboard: bool = True
    """RUN/tensorboard."""
    wandb: bool = False
    """Weights & Biases (extra `wandb`): RUN/wandb, offline unless WANDB_MODE says otherwise."""
    mlflow: bool = False
    """MLflow (extra `mlflow`): RUN/mlruns, or the server that MLFLOW_TRACKING_URI names."""
    project: str = "cauc-dist"
    """W&B's project, MLflow's experiment."""


@dataclass(frozen=True)
class RunConfig:
    """One training run, whole."""

    name: str
    run: Path | None = None
    """Run folder; default: runs/NAME."""
    seed: int = 0
    epochs: int = 10
    batch_size: int = 32
    """Subjects a step over ALL ranks."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    encoder: Encoder = field(default_factory=Encoder)
    projector: Projector = field(default_factory=Projector)
    objective: Objective = field(default_factory=Objective)
    optim: Optim = field(default_factory=Optim)
    engine: Engine = field(default_factory=Engine)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    trackers: Trackers = field(default_factory=Trackers)

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.run or Path("runs") / self.name


def to_json(run: RunConfig) -> str:
    """The whole run as JSON text, every default written out."""
    return json.dumps(dataclasses.asdict(run), indent=1, default=str) + "\n"


def from_json(text: str, source: str = "config") -> RunConfig:
    """The run that `to_json` wrote; BadInput names an unknown field (with the nearest) or a value of a wrong type."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{source} is not JSON ({error})", wanted="a config.json", do="give the one of a run") from None
    return typed(values, RunConfig, source)


T = TypeVar("T")


def typed(values: Any, kind: type[T], source: str) -> T:
    """A dataclass from plain values; BadInput names an unknown field (with the nearest) or a value of a wrong type."""
    import pydantic  # 0.1 s that only a run from a file pays

    _known(values, kind, source)
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadInput(
            f"{source}: {place} = {first['input']!r}", wanted=first["msg"].lower(), do="mend that field"
        ) from None


def read(path: Path) -> RunConfig:
    """The run of a config.json; BadInput as `from_json`, and where the file is no UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text ({error})", wanted="a config.json", do="give the one of a run") from None
    return from_json(text, str(path))


def _known(values: Any, kind: Any, source: str) -> None:
    """Refuse a field that the dataclass `kind` has not, at any depth."""
    if not isinstance(values, dict):
        raise BadInput(f"{source} holds {values!r}", wanted=f"the fields of {kind.__name__}", do="mend it")
    types = {f.name: f.type for f in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in types:
            raise BadInput(
                f"{source}: no field {name!r} in {kind.__name__}", wanted="known fields", do=nearest(name, types)
            )
        for part in (types[name], *get_args(types[name])):  # of `Part | None`
            if dataclasses.is_dataclass(part) and value is not None:
                _known(value, part, f"{source}: {name}")
