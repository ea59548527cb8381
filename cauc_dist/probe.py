"""How good is an encoder: frozen features, linear probes fitted on training subjects only, scored on held-out ones.

Numbers are probed by ridge regression, categories by logistic regression; the penalty is chosen on the training
subjects. Every score carries a bootstrap interval over held-out subjects, every comparison is paired over them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cauc_dist import checkpoint
from cauc_dist.checkpoint import Saved
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.prepare import check_store, load, parts
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import chunks, read_all
from cauc_dist.stream.values import Values, values
from cauc_dist.train import build_model, card
from cauc_dist.world import World, cores

Array = NDArray[np.float64]
BOOTSTRAPS = 10_000
VOXEL_BYTES = 4 << 30  # raw voxels are probed where all of them fit in this


@dataclass(frozen=True)
class Score:
    """One probe of one column: the headline `value` (MAE, or balanced accuracy) with its 95 % interval.

    `errors` are per held-out subject whose value is known (absolute error, or 1 = wrong), `truth` its value, in the
    order of the store; `detail` holds the other metrics.
    """

    metric: str
    value: float
    low: float
    high: float
    detail: dict[str, float]
    errors: list[float]
    truth: list[float]

    def compare(self, other: "Score") -> tuple[float, float, float]:
        """By how much this is better than `other` in its own metric, and the paired 95 % bootstrap interval of that."""
        ours, theirs, truth = np.array(self.errors), np.array(other.errors), np.array(self.truth)

        def gain(rows: NDArray[np.int64]) -> Array:
            if self.metric == "MAE":
                return (theirs - ours)[rows].mean(-1)  # type: ignore[no-any-return]
            return balanced_accuracy(truth[rows], ours[rows]) - balanced_accuracy(truth[rows], theirs[rows])

        return float(gain(np.arange(len(ours))[None])[0]), *interval(len(ours), gain)


@dataclass(frozen=True)
class Table:
    """Scores by method and column, all on the same held-out subjects of one store; `steps` of training by method."""

    store: str
    fingerprint: str
    n_train: int
    n_test: int
    columns: tuple[str, ...]
    chance: dict[str, float]
    scores: dict[str, dict[str, Score]]
    steps: dict[str, int]

    def difference(self, method: str, other: str, column: str) -> tuple[float, float, float]:
        """By how much `method` is better than `other` in the column's metric, with its paired 95 % interval."""
        return self.scores[method][column].compare(self.scores[other][column])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Table":
        values = json.loads(text)
        scores = {m: {c: Score(**s) for c, s in row.items()} for m, row in values.pop("scores").items()}
        return cls(**{**values, "columns": tuple(values["columns"])}, scores=scores)

    def __str__(self) -> str:
        """Plain text, one row a method; `*` marks a mean error below the untrained encoder's (paired, 95 %)."""
        head = ["", *(f"{c} ({self._metric(c)})" for c in self.columns)]
        rows = [["chance", *(f"{self.chance[c]:.3g}" for c in self.columns)]]
        rows += [[m, *(self._cell(m, c) for c in self.columns)] for m in self.scores]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
        ]
        notes = (
            f"{self.n_train} subjects to fit, {self.n_test} held out; [95 % bootstrap]; * better than untrained, paired"
        )
        return "\n".join([*lines, notes])

    def _metric(self, column: str) -> str:
        return next(iter(self.scores.values()))[column].metric

    def _cell(self, method: str, column: str) -> str:
        s = self.scores[method][column]
        # Below ten held-out subjects an interval is no ground for a mark.
        marked = "untrained" in self.scores and method != "untrained" and len(s.errors) >= 10
        star = marked and self.difference(method, "untrained", column)[1] > 0
        return f"{s.value:.3g} [{s.low:.3g}, {s.high:.3g}]{'*' if star else ''}"


def probe(
    runs: Sequence[Path],
    columns: Sequence[str] = (),
    *,
    voxels: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Table:
    """Probe runs of one store and one split, beside an untrained encoder and (where they fit) raw voxels.

    `columns`: default all of the store's that can be probed. The table's rows are named after the runs' configurations.
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
    scores: dict[str, dict[str, Score]] = {}
    steps: dict[str, int] = {}

    def score(method: str, x: Array) -> None:
        scores[method] = {c.name: score_column(c, x[:n], y[train, k], x[n:], y[test, k]) for k, c in enumerate(kinds)}

    for config in configs:
        saved, name = newest(config, store, say), _name(config, configs)
        say(f"probe: embedding {len(rows)} scans with {name}, step {saved.step}")
        score(name, standardise(embed(config, store, rows, saved), n))
        steps[name] = saved.step
    say("probe: the untrained encoder")
    score("untrained", standardise(embed(configs[0], store, rows, None), n))
    if voxels and 4 * len(rows) * int(np.prod(store.shape)) <= VOXEL_BYTES:
        say("probe: raw voxels")
        score("raw voxels", voxel_features(store, rows, n, values(store, configs[0].data.normalise, train)))
    chance = {c.name: _chance(c, y[train, k], y[test, k]) for k, c in enumerate(kinds)}
    names = tuple(c.name for c in kinds)
    return Table(store.name, store.fingerprint, n, len(test), names, chance, scores, steps)


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


def score_column(column: Column, x: Array, y: Array, x_test: Array, y_test: Array) -> Score:
    """Fit on (x, y), score on (x_test, y_test); subjects whose value is missing take part in neither."""
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    known = ~np.isnan(y_test)
    x_test, y_test = x_test[known], y_test[known]
    return (_classify if column.kind == "category" else _regress)(x, y, x_test, y_test)


def _regress(x: Array, y: Array, x_test: Array, y_test: Array) -> Score:
    from sklearn.linear_model import RidgeCV

    predicted = RidgeCV(np.logspace(-3, 6, 28)).fit(x, y).predict(x_test)
    errors = np.abs(predicted - y_test)
    low, high = interval(len(errors), lambda rows: errors[rows].mean(-1))
    detail = {}
    if np.var(y_test) > 0:
        detail["r2"] = float(1 - np.mean(errors**2) / np.var(y_test))
        detail["r"] = float(np.corrcoef(predicted, y_test)[0, 1]) if np.std(predicted) > 0 else 0.0
    return Score("MAE", float(errors.mean()), low, high, detail, errors.tolist(), y_test.tolist())


def _classify(x: Array, y: Array, x_test: Array, y_test: Array) -> Score:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    smallest = int(np.unique(y, return_counts=True)[1].min())
    grid = {"C": np.logspace(-4, 2, 7)}
    # Log loss, not accuracy: with tens of subjects a fold, accuracies tie and the choice among them is chance.
    search = GridSearchCV(LogisticRegression(max_iter=2000), grid, scoring="neg_log_loss", cv=min(5, smallest))
    predicted = search.fit(x, y).predict(x_test)
    wrong = (predicted != y_test).astype(float)
    low, high = interval(len(wrong), lambda rows: balanced_accuracy(y_test[rows], wrong[rows]))
    detail = {"accuracy": float(1 - wrong.mean()), **_auc(y_test, search.predict_proba(x_test), search.classes_)}
    value = float(balanced_accuracy(y_test[None], wrong[None])[0])
    return Score("balanced acc.", value, low, high, detail, wrong.tolist(), y_test.tolist())


def _auc(y: Array, p: Array, classes: Array) -> dict[str, float]:
    """One against the rest, averaged over the classes that the held-out subjects have and not all of them are."""
    from sklearn.metrics import roc_auc_score

    told = [k for k, label in enumerate(classes) if 0 < (y == label).sum() < len(y)]
    return {"auc": float(np.mean([roc_auc_score(y == classes[k], p[:, k]) for k in told]))} if told else {}


def balanced_accuracy(y: Array, wrong: Array) -> Array:
    """Mean over the classes present in each row of y (..., n) of the share of right ones (1 - wrong): (...,)."""
    hits = []
    for label in np.unique(y):
        members = y == label
        count = members.sum(-1)
        right = (members * (1 - wrong)).sum(-1)
        hits.append(np.where(count > 0, right / np.maximum(count, 1), np.nan))
    return np.nanmean(hits, axis=0)  # type: ignore[no-any-return]


def interval(n: int, statistic: Callable[[NDArray[np.int64]], Array], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic of n held-out subjects.

    `statistic` maps row numbers (B, n) to (B,). The resamples depend on n and seed alone, so that methods are paired.
    """
    rows = np.random.default_rng(seed).integers(0, n, (BOOTSTRAPS, n))
    low, high = np.percentile(statistic(rows), [2.5, 97.5])
    return float(low), float(high)


def _chance(column: Column, y: Array, y_test: Array) -> float:
    """What ignoring the scan scores: the training median's MAE, or 1 / classes."""
    if column.kind == "category":
        return 1.0 / len(np.unique(y[~np.isnan(y)]))
    return float(np.nanmean(np.abs(y_test - np.nanmedian(y))))


def standardise(x: Array, n_train: int) -> Array:
    """Each feature with mean 0 and variance 1 over the first n_train rows; a constant one becomes 0."""
    mean, std = x[:n_train].mean(0), x[:n_train].std(0)
    return (x - mean) / np.where(std > 1e-12, std, np.inf)  # type: ignore[no-any-return]
