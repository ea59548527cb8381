"""One member of a study: train it (or go on), embed, score; its folder holds scores.json when it is done.

H features of an embedding, n subjects of the training part, m held out.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cauc_dist import durable, journal, probe, scores, train
from cauc_dist.config import RunConfig, Trackers, to_json
from cauc_dist.errors import BAD_INPUT, BadInput
from cauc_dist.geometry import geometry
from cauc_dist.prepare import load, parts, prepare
from cauc_dist.scores import Predicted
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import read_all
from cauc_dist.stream.values import values
from cauc_dist.study import Member, Study, Target

SCORES = "scores.json"
VERSION = 1
"""Of scores.json: one of another version is made again from the checkpoint."""
WATCHED = ("alignment", "uniformity", "conditional_alignment", "conditional_uniformity")
FEW_FEATURES = 4096
"""Raw volumes of more are rotated onto their principal axes, which ridge does not notice."""

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """Picklable: what the process of a member does."""

    study: Study
    member: Member
    run: RunConfig
    folder: Path

    def __call__(self) -> int:
        try:
            if self.member.arm in self.study.arms and (code := trained(self.run, self.folder)):
                return code
            record = scored(self.study, self.member, self.run, self.folder)
        except (BadInput, OSError) as error:
            print(f"error: {error}")
            return BAD_INPUT
        self.folder.mkdir(parents=True, exist_ok=True)
        durable.replace(self.folder / SCORES, (json.dumps(finite(record), allow_nan=False) + "\n").encode())
        return 0


def trained(run: RunConfig, folder: Path) -> int:
    """Train, or go on from the newest checkpoint; the exit code of `cauc train`."""
    if not (folder / "config.json").exists():
        prepare(dataclasses.replace(run, run=folder), 1)
    same(run, folder)
    if any(event["event"] == "end" for event in journal.read(folder)):
        return 0
    return train.main(str(folder))


def same(run: RunConfig, folder: Path) -> None:
    """BadInput where the folder's run has other settings than these, but for where it ran and who was told."""
    then, now = (json.loads(to_json(_bare(one))) for one in (load(folder), run))
    if then != now:
        different = sorted(_different(then, now))
        raise BadInput(
            f"{folder} was made with other settings ({', '.join(different)})",
            wanted="runs of one study in one folder",
            do="remove that run, or choose another --folder",
        )


def _bare(run: RunConfig) -> RunConfig:
    engine = dataclasses.replace(run.engine, device="auto", threads=0)
    data = dataclasses.replace(run.data, store="")
    return dataclasses.replace(run, run=None, name="", engine=engine, data=data, trackers=Trackers())


def _different(then: dict[str, Any], now: dict[str, Any], above: str = "") -> list[str]:
    found: list[str] = []
    for name, value in now.items():
        if isinstance(value, dict) and isinstance(then.get(name), dict):
            found += _different(then[name], value, f"{above}{name}.")
        elif then.get(name) != value:
            found.append(above + name)
    return found


def scored(study: Study, member: Member, run: RunConfig, folder: Path) -> dict[str, Any]:
    """The record of scores.json: every target by every probe, on the member's held-out subjects."""
    store = Store.open(run.data.store)
    evaluation = study.evaluation(member.evaluation)
    split = dataclasses.replace(run.data, split=evaluation.column(member.seed, member.fold))
    fit, held = parts(dataclasses.replace(run, data=split), store)
    x, step = features(study, member, run, folder, store, fit, held)
    confound = raw_feature(store, study.confound) if study.confound else None
    asked = Asked(study, member, store, x, fit, held, confound)
    return {
        "version": VERSION,
        "study": study.name,
        "member": dataclasses.asdict(member),
        "step": step,
        "fingerprint": store.fingerprint,
        "n_train": len(fit),
        "n_test": len(held),
        "held_out": [store.ids[i] for i in held],
        "effective_rank": {"train": effective_rank(x[: len(fit)]), "held_out": effective_rank(x[len(fit) :])},
        "geometry": {**_geometry(folder), **_held_out(study, member, run, folder, store)},
        "targets": {target.column: asked.of(target) for target in study.targets},
    }


def features(
    study: Study, member: Member, run: RunConfig, folder: Path, store: Store, fit: Rows, held: Rows
) -> tuple[Floats, int | None]:
    """(n + m, H) of a trained, untrained or raw representation, and the step of its training."""
    rows = np.concatenate([fit, held])
    kind, _, name = member.arm.partition(":")
    if member.arm in study.arms:
        config = load(folder)
        data = dataclasses.replace(config.data, store=run.data.store)
        config = dataclasses.replace(config, engine=run.engine, data=data)
        saved = probe.newest(config, store, print)
        return probe.embed(config, store, rows, saved), saved.step
    if kind == "untrained":
        return probe.embed(run, store, rows, None), 0
    if kind == "feature":
        return raw_feature(store, name)[rows], None
    if kind == "column":
        return one_hot(store, name)[rows], None
    given = values(store, run.data.normalise, fit)
    if int(np.prod(store.shape)) > FEW_FEATURES:
        return probe.voxel_features(store, rows, len(fit), given), None
    return read_all(store, rows, given).flatten(1).double().numpy(), None


def raw_feature(store: Store, name: str) -> Floats:
    """(N, 1): one feature of a table, as it is in the store; BadInput where the table has no such feature."""
    names = store.attributes["sources"][0].get("features") or ()
    if name not in names:
        raise BadInput(f"no feature {name!r} in {store.where}", wanted="one of the table's", do="mend the study")
    k = list(names).index(name)
    return np.array([[store.volume(i)[k]] for i in range(len(store))])


def one_hot(store: Store, name: str) -> Floats:
    """(N, levels) of a column of texts, (N, 1) of numbers; a missing entry is the mean, or no level."""
    column, y = store.column(name), store.metadata([name])[:, 0]
    if column.kind == "category":
        return np.stack([(y == k).astype(float) for k in range(len(column.levels))], 1)
    return np.where(np.isnan(y), np.nanmean(y), y)[:, None]


@dataclass(frozen=True)
class Asked:
    """What the probes of a member are given."""

    study: Study
    member: Member
    store: Store
    x: Floats
    fit: Rows
    held: Rows
    confound: Floats | None

    def of(self, target: Target) -> dict[str, Any]:
        """A target by all probes, with the truth and its subjects (places in `held_out`); unknown ones are left out."""
        y = self.store.metadata([target.column])[:, 0]
        known = np.flatnonzero(~np.isnan(y[self.held]))
        probes = {
            name: {
                **told(target, predicted),
                **self._within(target, predicted, known),
                "fitted": int((~np.isnan(labels)).sum()),
            }
            for name, labels, predicted in self._predictions(target, y, known)
        }
        return {
            "tag": self.study.tag(self.member.arm, target.column),
            "metric": target.metric,
            "at": known.tolist(),
            "truth": rounded(y[self.held][known]),
            "probes": {**probes, **self._few(target, y, known)},
        }

    def _predictions(self, target: Target, y: Floats, known: Rows) -> list[tuple[str, Floats, Predicted]]:
        """(probe, labels that it was fitted on, what it says of the known held-out subjects)."""
        n = len(self.fit)
        x, x_test, labels, truth = self.x[:n], self.x[n:][known], y[self.fit], y[self.held][known]
        linear = self._probe(target)
        knn = partial(scores.knn_classify if target.of_classes else scores.knn_regress, as_is=self._rotated)
        found = [("linear", labels, linear(x, labels, x_test, truth)), ("knn", labels, knn(x, labels, x_test, truth))]
        if self.confound is not None:
            c = self.confound[np.concatenate([self.fit, self.held])]
            free, free_test = scores.residualise(x, x_test, c[:n], c[n:][known])
            found.append(("linear-free", labels, linear(free, labels, free_test, truth)))
        if target.within is not None and not target.bins:
            groups = self.store.metadata([target.within])[:, 0]
            among = inside(found[0][2], labels, groups[self.fit], groups[self.held][known])
            found.append(("linear-within", labels, among))
        for column in self.study.visible_to(self.member.arm, target.column):
            seen = self.store.metadata([column])[self.fit, 0]
            found.append((f"linear:{column}", seen, linear(x, seen, x_test, truth)))
        return found

    def _probe(self, target: Target) -> scores.Probe:
        """The linear one."""
        return partial(scores.logistic if target.of_classes else scores.ridge, as_is=self._rotated)

    @property
    def _rotated(self) -> bool:
        """Whether the features are raw volumes on their principal axes, whose lengths say what matters."""
        return self.member.arm == "raw" and int(np.prod(self.store.shape)) > FEW_FEATURES

    def _within(self, target: Target, predicted: Predicted, known: Rows) -> dict[str, Any]:
        """The AUC inside the bins of another column, where the target asks for it."""
        if target.within is None or not target.bins:
            return {}
        column = self.store.metadata([target.within])[self.held, 0][known]
        return {"auc_within": scores.auc_within(predicted, column, target.bins)}

    def _few(self, target: Target, y: Floats, known: Rows) -> dict[str, Any]:
        """Mean over draws of the metric at each number of labels."""
        repeated = self.study.evaluation(self.member.evaluation).folds > 1  # few-label curves are of one split
        budgets = [b for b in self.study.budgets if b < len(self.fit) and not repeated]
        if not budgets:
            return {}
        n, seed = len(self.fit), self.member.seed
        x_test, truth = self.x[n:][known], y[self.held][known]
        how: dict[str, Any] = {"budgets": budgets, "seed": seed, "classes": target.of_classes}
        drawn = scores.few_labels(self.x[:n], y[self.fit], x_test, truth, probe=self._probe(target), **how)
        return {f"few{b}": {"value": metric_of(target, drawn[b])} for b in budgets}


def inside(predicted: Predicted, labels: Floats, groups: Floats, groups_test: Floats) -> Predicted:
    """The likeliest of those classes that training subjects of the held-out subject's own group have."""
    assert predicted.probability is not None
    assert predicted.classes is not None
    allowed = {group: np.isin(predicted.classes, labels[groups == group]) for group in np.unique(groups_test)}
    mask = np.stack([allowed[group] for group in groups_test])
    best = predicted.classes[np.where(mask, predicted.probability, -1).argmax(1)]
    return Predicted(predicted.truth, best, predicted.probability * mask, predicted.classes)


def told(target: Target, predicted: Predicted) -> dict[str, Any]:
    """The metrics of a probe, and its answer for every subject: a number, P(second class), or the class."""
    if target.metric == "mae":
        p = predicted
        return {"mae": scores.mae(p), "r2": scores.r2(p), "r": scores.pearson(p), "predicted": rounded(p.predicted)}
    found: dict[str, Any] = {
        "balanced_accuracy": scores.balanced_accuracy(predicted),
        "accuracy": scores.accuracy(predicted),
        "auc": scores.auc(predicted),
    }
    assert predicted.probability is not None
    answers = predicted.probability[:, 1] if target.metric == "auc" else predicted.predicted
    return {**found, "predicted": rounded(answers)}


def metric_of(target: Target, draws: list[Predicted]) -> float:
    """The mean over draws of the target's own metric."""
    return float(np.mean([getattr(scores, target.metric)(one) for one in draws]))


def rounded(x: Floats) -> list[float]:
    """Five digits after the first: enough to have every table again."""
    return [float(f"{v:.6g}") for v in x]


def finite(value: Any) -> Any:
    """The same with None for what is no number (the correlation of constant answers): JSON has none."""
    if isinstance(value, dict):
        return {name: finite(of) for name, of in value.items()}
    if isinstance(value, list):
        return [finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def effective_rank(x: Floats) -> float:
    """exp of the entropy of the singular values' shares, centred (Roy and Vetterli 2007)."""
    sizes = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = sizes[sizes > 0] / sizes.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def _held_out(study: Study, member: Member, run: RunConfig, folder: Path, store: Store) -> dict[str, float]:
    """Of z of held-out subjects' views, by the arm's own kernel."""
    if member.arm not in study.arms:
        return {}
    config = dataclasses.replace(load(folder), engine=run.engine, data=run.data)
    told = geometry(config, store, probe.newest(config, store, print))["held-out"]
    return {f"{name}_held_out": value for name, value in told.items() if name in WATCHED}


def _geometry(folder: Path) -> dict[str, float]:
    """Means over the last epoch of what the journal has of the training batches."""
    steps = [e for e in journal.read(folder) if e["event"] == "step"] if folder.exists() else []
    last = [e for e in steps if e["epoch"] == steps[-1]["epoch"]] if steps else []
    told = {name: [e[name] for e in last if e.get(name) is not None] for name in (*WATCHED, "loss")}
    return {name: float(np.mean(values)) for name, values in told.items() if values}
