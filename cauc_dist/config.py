"""The typed, frozen description of a run. Imports no torch: a login node reads it in milliseconds.

Every number that a run depends on is here or derived from here; `batch_size` is GLOBAL (subjects a step over
all ranks), lengths are voxels, times are epochs unless the name says otherwise.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cauc_dist.errors import BadInput, nearest


@dataclass(frozen=True)
class Data:
    """Which scans a run sees, and how they are read."""

    store: Path = Path("store.zarr")
    """Zarr store made by `cauc ingest`."""
    folds: int = 4
    """Subjects are dealt into this many parts by a hash of their name; 1 trains on everybody."""
    fold: int = 0
    """The part that is held out of pre-training, for probes."""
    normalise: Literal["volume", "none"] = "volume"
    """`volume`: zero mean and unit variance over all voxels of each scan (statistics kept in the store)."""
    threads: int = 2
    """Reader threads a rank."""
    prefetch: int = 2
    """Batches read ahead of the step."""


@dataclass(frozen=True)
class Augment:
    """Random views of a volume; each transform is drawn independently with its probability `p_*` (0: off).

    Defaults: intensities only. Order: flip, shift, crop, grey, intensity, blur, noise, cutout.
    """

    views: int = 2
    p_flip: float = 0.0
    """Mirror along the first spatial axis (left-right in RAS)."""
    p_crop: float = 0.0
    """Random box of `crop` of each side, resized back (trilinear)."""
    crop: float = 0.75
    p_intensity: float = 0.5
    """x -> x * U(1-scale, 1+scale) + U(-shift, shift)."""
    scale: float = 0.2
    shift: float = 0.2
    p_blur: float = 0.5
    """Gaussian blur, standard deviation U(.1, blur) voxels."""
    blur: float = 1.0
    p_noise: float = 0.5
    """Gaussian noise, standard deviation U(0, noise)."""
    noise: float = 0.2
    p_cutout: float = 0.0
    """Random box of `cutout` of each side set to 0."""
    cutout: float = 0.25
    p_shift: float = 0.0
    """Translate by up to `max_shift` voxels on each axis, edges repeated."""
    max_shift: int = 3
    p_grey: float = 0.0
    """Three-channel images only: replace the channels by their mean."""


@dataclass(frozen=True)
class Encoder:
    """From a volume (c, X, Y, Z), an image (c, X, Y) or a table row (c,) to a representation h."""

    name: Literal["cnn3d", "densenet121_3d", "resnet18_3d", "resnet18_2d", "mlp"] = "cnn3d"
    width: int = 16
    """Channels of the first stage (cnn3d) or units of a hidden layer (mlp); the others have a published width."""
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
    """cauc and align_uniform: weight of the alignment; default: t for cauc (docs/losses.md, exact fact 1), 1 for the
    other."""
    lambda_unif: float = 1.0
    normalise: Literal["row", "column"] = "row"
    """y_aware only: `column` reproduces the published code."""
    views: Literal["within", "pooled"] = "within"
    """cauc only: uniformity over pairs of one view, or over all embeddings."""
    within: str | None = None
    """cauc only: repel only pairs that agree in this column (e.g. site), for features free of it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that a run reads, in the order of y: the kernel's, then `within`."""
        names = tuple(spec.split(":")[0] for spec in self.kernel)
        return names if self.within is None else (*names, self.within)


@dataclass(frozen=True)
class Optim:
    """AdamW, no decay on norms and biases, linear warm-up then cosine to zero (or constant)."""

    lr: float = 1e-3
    weight_decay: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_norm: float = 0.0
    """Clip the global gradient norm; 0: off."""


@dataclass(frozen=True)
class Engine:
    """What DeepSpeed is asked for. Stage 1 by default: docs/design.md says what ZeRO is worth here."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """CPU threads a rank for torch; 0: OMP_NUM_THREADS, or the cores of the machine divided by its ranks."""
    exchange: Literal["all_gather", "ring"] = "all_gather"
    """How embeddings reach the other ranks. ring: where those of the whole batch do not fit on every GPU."""
    wire: Literal["fp32", "fp16"] = "fp32"
    """Precision of embeddings on the way; fp16 halves the bytes; cosines move by 3e-5 rms (docs/losses.md)."""
    timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run."""


@dataclass(frozen=True)
class Checkpoint:
    every_epochs: int = 5
    keep: int = 2


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

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.run or Path("runs") / self.name


def to_json(run: RunConfig) -> str:
    """The whole run as JSON text, every default written out."""
    return json.dumps(dataclasses.asdict(run), indent=1, default=str) + "\n"


def from_json(text: str, source: str = "config") -> RunConfig:
    """The run that `to_json` wrote; BadInput names an unknown field (with the nearest) or a value of a wrong type."""
    import pydantic  # 0.1 s that only a run from a file pays

    try:
        values = json.loads(text)
        _known(values, RunConfig, source)
        return pydantic.TypeAdapter(RunConfig).validate_python(values)
    except json.JSONDecodeError as error:
        raise BadInput(f"{source} is not JSON ({error})", wanted="a config.json", do="give the one of a run") from None
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
        raise BadInput(f"{source} holds {values!r}", wanted=f"the fields of {kind.__name__}", do="give a config.json")
    types = {f.name: f.type for f in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in types:
            raise BadInput(
                f"{source}: no field {name!r} in {kind.__name__}", wanted="known fields", do=nearest(name, types)
            )
        if dataclasses.is_dataclass(types[name]):
            _known(value, types[name], f"{source}: {name}")
