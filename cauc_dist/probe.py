"""How good is an encoder: frozen features, linear probes fitted on training subjects only, scored on held-out ones.

Numbers are probed by ridge regression, categories by logistic regression; the penalty is chosen on the training
subjects. Every score carries a bootstrap interval over held-out subjects, every comparison is paired over them.
n subjects of both parts, the first of them to fit; H width of h, D of z.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cauc_dist import checkpoint, scores
from cauc_dist.checkpoint import Saved
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.geometry import geometry
from cauc_dist.prepare import check_store, load, parts
from cauc_dist.scores import Predicted
from cauc_dist.stats import interval
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import chunks, read_all
from cauc_dist.stream.values import Values, values
from cauc_dist.table import AFTER, KNN, Few, Score, Table
from cauc_dist.train import build_model, card
from cauc_dist.world import World, cores

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
VOXEL_BYTES = 4 << 30  # raw voxels are probed where all of them fit in this


def probe(
    runs: Sequence[Path],
    columns: Sequence[str] = (),
    *,
    voxels: bool = True,
    knn: bool = False,
    after_projector: bool = False,
    geometries: bool = False,
    few_labels: Sequence[int] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Table:
    """Probe runs of one store and one split, beside an untrained encoder and (where they fit) raw voxels.

    `columns`: default all of the store's that can be probed. The table's rows are named after the runs' configurations.
    Beside these: `knn` probes, the representation `after_projector`, the `geometries` of both parts, probes that were
    fitted on `few_labels`.
    """
    configs = [load(run) for run in runs]
    store = _one_store(configs)
    train, test = parts(configs[0], store)
    if len(test) == 0:
        raise BadInput(
            "data.folds is 1: nobody is held out", wanted="held-out subjects", do="train with --data.folds 4"
        )
    kinds = choose(store, columns, train, test, say)
    y = store.metadata([c.name for c in kinds])
    rows, n = np.concatenate([train, test]), len(train)
    _refuse_budgets(few_labels, kinds, y[train])
    asked = _Asked(kinds, y[train], y[test], knn, tuple(few_labels))
    steps, shapes = dict[str, int](), dict[str, dict[str, dict[str, float]]]()

    def ask(name: str, config: RunConfig, saved: Saved | None) -> None:
        h = embed(config, store, rows, saved)
        asked.of(name, h[:n], h[n:])
        if after_projector:
            z = project(config, store, saved, h.astype(np.float32)).astype(np.float64)
            asked.of(name + AFTER, z[:n], z[n:])
        if geometries:
            shapes[name] = geometry(config, store, saved)

    for config in configs:
        saved, name = newest(config, store, say), _name(config, configs)
        say(f"probe: embedding {len(rows)} scans with {name}, step {saved.step}")
        ask(name, config, saved)
        steps[name] = saved.step
    say("probe: the untrained encoder")
    ask("untrained", configs[0], None)
    if voxels and 4 * len(rows) * int(np.prod(store.shape)) <= VOXEL_BYTES:
        say("probe: raw voxels")
        x = voxel_features(store, rows, n, values(store, configs[0].data.normalise, train))
        asked.of("raw voxels", x[:n], x[n:], as_is=True)
    chance = {c.name: chance_of(c, y[train, k], y[test, k]) for k, c in enumerate(kinds)}
    names = tuple(c.name for c in kinds)
    told = (store.name, store.fingerprint, n, len(test), names, chance, asked.scores, steps)
    return Table(*told, shapes, asked.few)


@dataclass(frozen=True)
class _Asked:
    """The columns that each method is asked for, and what was found."""

    columns: Sequence[Column]
    y: Array
    """(n, k)"""
    y_test: Array
    knn: bool
    budgets: tuple[int, ...]
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    few: dict[str, dict[str, Few]] = field(default_factory=dict)

    def of(self, method: str, x: Array, x_test: Array, *, as_is: bool = False) -> None:
        """All probes of one representation."""
        for k, column in enumerate(self.columns):
            part = (x, self.y[:, k], x_test, self.y_test[:, k])
            for end in ("", KNN) if self.knn else ("",):
                found = score_column(column, *part, knn=end == KNN, as_is=as_is)
                self.scores.setdefault(method + end, {})[column.name] = found
            if self.budgets:
                self.few.setdefault(method, {})[column.name] = few_of(column, *part, self.budgets, as_is=as_is)


def few_of(
    column: Column, x: Array, y: Array, x_test: Array, y_test: Array, budgets: Sequence[int], *, as_is: bool = False
) -> Few:
    """Mean and standard deviation over draws of the headline of probes that were fitted on so many labels."""
    classes = column.kind == "category"
    fit = partial(scores.logistic if classes else scores.ridge, as_is=as_is)
    metric = scores.balanced_accuracy if classes else scores.mae
    drawn = scores.few_labels(x, y, x_test, y_test, budgets=budgets, probe=fit, classes=classes)
    found = {str(n): np.array([metric(p) for p in of]) for n, of in drawn.items()}
    return {n: (float(each.mean()), float(each.std(ddof=1))) for n, each in found.items()}


def _refuse_budgets(budgets: Sequence[int], columns: Sequence[Column], y: Array) -> None:
    """BadInput, before scans are embedded, where a budget is more than the training subjects with a value, or too few.

    Of categories it must hold two subjects of each.
    """
    for column, values_of in zip(columns, y.T, strict=True):
        known = values_of[~np.isnan(values_of)]
        least = 2 * len(np.unique(known)) if column.kind == "category" else 2
        for budget in budgets:
            if not least <= budget <= len(known):
                raise BadInput(
                    f"{budget} labels of {column.name}",
                    wanted=f"{least} to {len(known)}, the training subjects with a value",
                    do="choose other numbers, or fewer columns with --columns",
                )


def choose(
    store: Store,
    wanted: Sequence[str],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    say: Callable[[str], None] = lambda line: None,
) -> list[Column]:
    """The columns to probe: those asked for, or all that can be; one that cannot is refused, or named and left out."""
    found = []
    columns = {c.name: c for c in store.columns}
    store.metadata(wanted)  # an unknown name is refused with the nearest
    for name in wanted or columns:
        reason = _unfit(columns[name], store.metadata([name])[:, 0], train, test)
        if reason and wanted:
            raise BadInput(f"column {name}: {reason}", wanted="a column that can be probed", do="choose with --columns")
        if reason:
            say(f"probe: column {name} is left out: {reason}")
        else:
            found.append(columns[name])
    if not found:
        raise BadInput(
            f"no column of {store.where} can be probed", wanted="one that varies", do="add it and ingest again"
        )
    return found


def _unfit(column: Column, y: Array, train: NDArray[np.int64], test: NDArray[np.int64]) -> str:
    """Why a column cannot be probed; empty where it can."""
    values, counts = np.unique(y[train][~np.isnan(y[train])], return_counts=True)
    if len(values) < 2:
        return "fewer than two values among the training subjects"
    if np.isnan(y[test]).all():
        return "no value among the held-out subjects"
    if column.kind == "category" and counts.min() < 2:
        return f"one training subject has {column.levels[int(values[counts.argmin()])]!r}, two are needed of each"
    return ""


def _one_store(configs: Sequence[RunConfig]) -> Store:
    first = configs[0]
    for config in configs[1:]:
        if _held_out(config) != _held_out(first):
            raise BadInput(
                f"{config.folder} and {first.folder} differ in store or fold",
                wanted="runs with the same held-out subjects",
                do="probe them one by one",
            )
        if config.encoder != first.encoder:
            raise BadInput(
                f"{config.folder} and {first.folder} have different encoders",
                wanted="runs that one untrained encoder is the baseline of",
                do="probe them one by one",
            )
    store = Store.open(first.data.store)
    for config in configs:
        check_store(config.folder, store)
    return store


def _held_out(config: RunConfig) -> tuple[str, str | None, int, int]:
    return config.data.store, config.data.split, config.data.folds, config.data.fold


def _name(config: RunConfig, configs: Sequence[RunConfig]) -> str:
    twins = sum(c.name == config.name for c in configs)
    return config.name if twins == 1 else f"{config.name} ({config.folder.name})"


def newest(config: RunConfig, store: Store, say: Callable[[str], None] = lambda line: None) -> Saved:
    """The newest sound checkpoint of a run; what is damaged is said."""
    saved, complaints = checkpoint.latest(config.folder, card(config, store))
    for line in complaints:
        say(line)
    if saved is None:
        raise BadInput(
            f"no sound checkpoint in {config.folder}", wanted="a trained run", do=f"`cauc resume {config.folder}`"
        )
    return saved


@torch.no_grad()
def embed(
    config: RunConfig,
    store: Store,
    rows: NDArray[np.int64],
    saved: Saved | None,
    *,
    chunk: int = 32,
    world: World | None = None,
) -> Array:
    """Representations h (before the projector) of those scans, in that order: (len(rows), width) float64.

    With the weights of a checkpoint (their moving average, where that was kept); None: those that the run began from.
    `world`: where several ranks embed a share each; their device and threads.
    """
    world = world or World()
    torch.set_num_threads(config.engine.threads or max(1, cores() // world.local_size))
    device = world.device("cpu" if config.engine.device == "cpu" else "auto")
    model = build_model(config, store.shape)
    if saved is not None:
        checkpoint.load_module(model, saved.tensors, ema=True)
    encoder = model.encoder.to(device).eval()
    train, _ = parts(config, store)
    volumes = chunks(store, rows, chunk, values(store, config.data.normalise, train))
    h: list[Tensor] = [encoder(x.to(device)).cpu() for x in volumes]
    return torch.cat(h).double().numpy()


@torch.no_grad()
def project(config: RunConfig, store: Store, saved: Saved | None, h: Floats) -> Floats:
    """z (n, D) of h (n, H) by the projector of a checkpoint; unit rows where the loss had them, fp32.

    None: by the one that the run began from.
    """
    model = build_model(config, store.shape)
    if saved is not None:
        checkpoint.load_module(model, saved.tensors, ema=True)
    model.encoder, model.bf16 = torch.nn.Identity(), False
    z: Floats = model.eval()(torch.from_numpy(h)).numpy()
    return z


def voxel_features(store: Store, rows: NDArray[np.int64], n_train: int, values: Values) -> Array:
    """All voxels, rotated onto the principal axes of the training scans: (len(rows), <= n_train) float64.

    A rotation keeps every inner product among training scans, so that ridge on these equals ridge on the voxels
    (in units of their overall standard deviation, so that the usual range of penalties fits).
    """
    x = read_all(store, rows, values).flatten(1)
    x -= x[:n_train].mean(0)
    gram = (x @ x[:n_train].T).double().numpy()  # (all, train)
    sizes, axes = np.linalg.eigh(gram[:n_train])
    keep = sizes > sizes[-1] * 1e-9
    scores = gram @ axes[:, keep] / np.sqrt(sizes[keep])
    return scores / scores[:n_train].std()  # type: ignore[no-any-return]


def score_column(
    column: Column, x: Array, y: Array, x_test: Array, y_test: Array, *, knn: bool = False, as_is: bool = False
) -> Score:
    """Fit on (x, y), score on (x_test, y_test); subjects whose value is missing take part in neither.

    Features are standardised on (x, y), but for those that are to be taken `as_is`.
    """
    if column.kind == "category":
        fit = scores.knn_classify if knn else scores.logistic
    else:
        fit = scores.knn_regress if knn else scores.ridge
    return score_of(column, fit(x, y, x_test, y_test, as_is=as_is))


def score_of(column: Column, answers: Predicted) -> Score:
    """The headline of what was said, with its interval."""
    return (_of_classes if column.kind == "category" else _of_numbers)(answers)


def _of_numbers(p: Predicted) -> Score:
    errors = np.abs(p.predicted - p.truth)
    low, high = interval(len(errors), lambda rows: errors[rows].mean(-1))
    detail = _finite(r2=scores.r2(p), r=scores.pearson(p))
    return Score("MAE", scores.mae(p), low, high, detail, errors.tolist(), p.truth.tolist())


def _of_classes(p: Predicted) -> Score:
    wrong = (p.predicted != p.truth).astype(float)
    low, high = interval(len(wrong), lambda rows: scores.balanced(p.truth[rows], 1 - wrong[rows]))
    detail = _finite(accuracy=scores.accuracy(p), auc=scores.auc(p))
    value = scores.balanced_accuracy(p)
    return Score("balanced acc.", value, low, high, detail, wrong.tolist(), p.truth.tolist())


def _finite(**metrics: float) -> dict[str, float]:
    """Those that are numbers: JSON has no other."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def chance_of(column: Column, y: Array, y_test: Array) -> float:
    """What ignoring the scan scores: the training median's MAE, or 1 / classes."""
    if column.kind == "category":
        return 1.0 / len(np.unique(y[~np.isnan(y)]))
    return float(np.nanmean(np.abs(y_test - np.nanmedian(y))))
