"""How good is an encoder: frozen features, linear probes fitted on training subjects only, scored on held-out ones.

Numbers are probed by ridge regression, categories by logistic regression; the penalty is chosen on the training
subjects. Every score carries a bootstrap interval over held-out subjects, every comparison is paired over them.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cauc_dist import checkpoint
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.prepare import check_store, load
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import Normalise, chunks
from cauc_dist.stream.plan import split
from cauc_dist.train import architecture, build_model

Array = NDArray[np.float64]
BOOTSTRAPS = 10_000
VOXEL_BYTES = 4 << 30  # raw voxels are probed where all of them fit in this


@dataclass(frozen=True)
class Score:
    """One probe of one column: the headline `value` (MAE, or balanced accuracy) with its 95 % interval.

    `errors` are per held-out subject (absolute error, or 1 = wrong), in the order of `Table.subjects`; `detail`
    holds the other metrics.
    """

    metric: str
    value: float
    low: float
    high: float
    detail: dict[str, float]
    errors: list[float]


@dataclass(frozen=True)
class Table:
    """Scores by method and column, all on the same held-out subjects of one store."""

    store: str
    fingerprint: str
    n_train: int
    n_test: int
    columns: tuple[str, ...]
    chance: dict[str, float]
    scores: dict[str, dict[str, Score]]

    def difference(self, method: str, other: str, column: str) -> tuple[float, float, float]:
        """Mean of error(other) - error(method) over held-out subjects, with its paired 95 % bootstrap interval.

        An interval above 0: `method` is better. For a category the errors are plain mistakes.
        """
        gain = np.subtract(self.scores[other][column].errors, self.scores[method][column].errors)
        low, high = interval(len(gain), lambda rows: gain[rows].mean(-1))
        return float(gain.mean()), low, high

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

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
        star = (
            "untrained" in self.scores and method != "untrained" and self.difference(method, "untrained", column)[1] > 0
        )
        return f"{s.value:.3g} [{s.low:.3g}, {s.high:.3g}]{'*' if star else ''}"


def probe(
    runs: Sequence[Path],
    columns: Sequence[str] = (),
    *,
    voxels: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Table:
    """Probe runs of one store and one split, beside an untrained encoder and (where they fit) raw voxels.

    `columns`: default all of the store's that vary. The table's rows are named after the runs' configurations.
    """
    configs = [load(run) for run in runs]
    store = _one_store(configs)
    train, test = split(store.subjects, configs[0].data.folds, configs[0].data.fold)
    if len(test) == 0:
        raise BadInput(
            "data.folds is 1: nobody is held out", wanted="held-out subjects", do="train with --data.folds 4"
        )
    names = tuple(columns) or varying(store, train)
    store.require(names, train)
    y, kinds = store.metadata(names), [next(c for c in store.columns if c.name == n) for n in names]
    rows = np.concatenate([train, test])
    scores: dict[str, dict[str, Score]] = {}

    def score(method: str, features: Array) -> None:
        fit, held = features[: len(train)], features[len(train) :]
        scores[method] = {c.name: score_column(c, fit, y[train, k], held, y[test, k]) for k, c in enumerate(kinds)}

    for config in configs:
        say(f"probe: embedding {len(rows)} scans with {config.name}")
        score(_name(config, configs), standardise(embed(config, store, rows), len(train)))
    say("probe: the untrained encoder")
    score("untrained", embed(configs[0], store, rows, trained=False))
    if voxels and 4 * len(rows) * int(np.prod(store.shape)) <= VOXEL_BYTES:
        say("probe: raw voxels")
        score("raw voxels", voxel_features(store, rows, len(train), configs[0].data.normalise))
    chance = {c.name: _chance(c, y[train, k], y[test, k]) for k, c in enumerate(kinds)}
    return Table(store.path.name, store.fingerprint, len(train), len(test), names, chance, scores)


def varying(store: Store, rows: NDArray[np.int64]) -> tuple[str, ...]:
    """The columns with two values or more among those rows; of the categories those with two rows or more a value."""
    found = []
    for column in store.columns:
        values = store.metadata([column.name])[rows, 0]
        counts = np.unique(values[~np.isnan(values)], return_counts=True)[1]
        if len(counts) > 1 and (column.kind == "number" or counts.min() > 1):
            found.append(column.name)
    return tuple(found)


def _one_store(configs: Sequence[RunConfig]) -> Store:
    first = configs[0].data
    for config in configs[1:]:
        if (config.data.store, config.data.folds, config.data.fold) != (first.store, first.folds, first.fold):
            raise BadInput(
                f"{config.run} and {configs[0].run} differ in store or fold",
                wanted="runs with the same held-out subjects",
                do="probe them one by one",
            )
    store = Store.open(first.store)
    for config in configs:
        assert config.run is not None
        check_store(config.run, store)
    return store


def _name(config: RunConfig, configs: Sequence[RunConfig]) -> str:
    twins = sum(c.name == config.name for c in configs)
    assert config.run is not None
    return config.name if twins == 1 else f"{config.name} ({config.run.name})"


@torch.no_grad()
def embed(config: RunConfig, store: Store, rows: NDArray[np.int64], *, trained: bool = True, chunk: int = 32) -> Array:
    """Representations h (before the projector) of those scans, in that order: (len(rows), width) float64.

    `trained=False` gives the same architecture with the weights that the run began from.
    """
    assert config.run is not None
    torch.set_num_threads(config.engine.threads or len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() and config.engine.device != "cpu" else "cpu")
    model = build_model(config, store.shape)
    if trained:
        saved, _ = checkpoint.latest(config.run, architecture(config, store.shape))
        if saved is None:
            raise BadInput(
                f"no sound checkpoint in {config.run}", wanted="a trained run", do=f"`cauc resume {config.run}`"
            )
        checkpoint.load_module(model, saved.tensors)
    encoder = model.encoder.to(device).eval()
    h: list[Tensor] = [encoder(x.to(device)).cpu() for x in chunks(store, rows, chunk, normalise=config.data.normalise)]
    return torch.cat(h).double().numpy()


def voxel_features(store: Store, rows: NDArray[np.int64], n_train: int, normalise: Normalise) -> Array:
    """All voxels, rotated onto the principal axes of the training scans: (len(rows), <= n_train) float64.

    A rotation keeps every inner product among training scans, so that ridge on these equals ridge on the voxels
    (in units of their overall standard deviation, so that the usual range of penalties fits).
    """
    x = torch.cat([c.flatten(1) for c in chunks(store, rows, 32, normalise=normalise)])
    x -= x[:n_train].mean(0)
    gram = (x @ x[:n_train].T).double().numpy()  # (all, train)
    values, axes = np.linalg.eigh(gram[:n_train])
    keep = values > values[-1] * 1e-9
    scores = gram @ axes[:, keep] / np.sqrt(values[keep])
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
    r = float(np.corrcoef(predicted, y_test)[0, 1]) if np.std(predicted) > 0 else 0.0
    detail = {"r2": float(1 - np.mean(errors**2) / np.var(y_test)), "r": r}
    return Score("MAE", float(errors.mean()), low, high, detail, errors.tolist())


def _classify(x: Array, y: Array, x_test: Array, y_test: Array) -> Score:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    smallest = int(np.unique(y, return_counts=True)[1].min())
    if smallest < 2:
        raise BadInput("a category with one training subject", wanted="two or more of each", do="choose with --columns")
    grid = {"C": np.logspace(-4, 2, 7)}
    # Log loss, not accuracy: with tens of subjects a fold, accuracies tie and the choice among them is chance.
    search = GridSearchCV(LogisticRegression(max_iter=2000), grid, scoring="neg_log_loss", cv=min(5, smallest))
    predicted = search.fit(x, y).predict(x_test)
    wrong = (predicted != y_test).astype(float)
    low, high = interval(len(wrong), lambda rows: _balanced_accuracy(y_test[rows], wrong[rows]))
    detail = {"accuracy": float(1 - wrong.mean()), **_auc(y_test, search.predict_proba(x_test), search.classes_)}
    value = float(_balanced_accuracy(y_test[None], wrong[None])[0])
    return Score("balanced acc.", value, low, high, detail, wrong.tolist())


def _auc(y: Array, p: Array, classes: Array) -> dict[str, float]:
    """One against the rest, averaged over the classes that the held-out subjects have and not all of them are."""
    from sklearn.metrics import roc_auc_score

    told = [k for k, label in enumerate(classes) if 0 < (y == label).sum() < len(y)]
    return {"auc": float(np.mean([roc_auc_score(y == classes[k], p[:, k]) for k in told]))} if told else {}


def _balanced_accuracy(y: Array, wrong: Array) -> Array:
    """Mean over the classes present in each row of y (B, n) of the share of right ones: (B,)."""
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
