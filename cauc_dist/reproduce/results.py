"""From the scores of a study's members to its results: every number with its interval, every comparison with its p."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cauc_dist import stats
from cauc_dist.provenance import provenance
from cauc_dist.reproduce.resample import Answers, Fold, difference, estimate
from cauc_dist.study import Contrast, Member, Study

Key = tuple[str, str, str, str]
"""(method, target, evaluation, probe)."""


@dataclass(frozen=True)
class Scores:
    """The records of all members that are done."""

    study: Study
    records: Mapping[Member, Mapping[str, Any]]

    def answers(self) -> dict[Key, Answers]:
        """By method, target, evaluation and probe, but for probes without answers of subjects (few labels)."""
        whose = self.study.source.person or str
        people = sorted({whose(id) for record in self.records.values() for id in record["held_out"]})
        place = {person: i for i, person in enumerate(people)}
        folds: defaultdict[Key, dict[tuple[int, int], Fold]] = defaultdict(dict)
        for member, record in self.records.items():
            for target, told in record["targets"].items():
                at = np.array([place[whose(record["held_out"][i])] for i in told["at"]], np.int64)
                for probe, row in told["probes"].items():
                    if "predicted" in row:
                        fold = Fold(at, np.array(told["truth"]), np.array(row["predicted"]))
                        folds[member.arm, target, member.evaluation, probe][member.seed, member.fold] = fold
        found = {}
        for key, of in folds.items():
            if whole := self._whole(key, of):
                found[key] = Answers(self.study.target(key[1]).metric, len(people), whole)
        return found

    def _whole(self, key: Key, folds: dict[tuple[int, int], Fold]) -> dict[tuple[int, int], Fold]:
        """Of seeds all of whose folds are there: a mean over some of the folds would be of other subjects."""
        n = self.study.evaluation(key[2]).folds
        return {at: fold for at, fold in folds.items() if all((at[0], f) in folds for f in range(n))}


def results(
    study: Study, records: Mapping[Member, Mapping[str, Any]], failed: Sequence[str], folder: Path
) -> dict[str, Any]:
    """What results.json holds; `failed` members are named in it."""
    found = Scores(study, records)
    answers = found.answers()
    return {
        "study": study.name,
        "about": study.about,
        "source": study.source.about,
        "endpoint": study.endpoint,
        "provenance": provenance(),
        "folder": str(folder),
        "fingerprint": next(iter(records.values()))["fingerprint"],
        "members": len(records),
        "failed": list(failed),
        "rows": [_row(study, key, of) for key, of in answers.items()],
        "contrasts": contrasts(study, answers, records),
        "few": _few(study, records),
        "features": _features({member: record for member, record in records.items() if record["effective_rank"]}),
        "within": _within(study, records),
    }


def _row(study: Study, key: Key, answers: Answers) -> dict[str, Any]:
    arm, target, evaluation, probe = key
    by_seed = answers.values.mean(1)
    return {
        "method": arm,
        "target": target,
        "tag": study.tag(arm, target),
        "evaluation": evaluation,
        "probe": probe,
        "metric": answers.metric,
        **dataclasses.asdict(estimate(answers)),
        "seeds": len(by_seed),
        "folds": answers.values.shape[1],
        "subjects": len(np.unique(np.concatenate([f.at for f in answers.folds.values()]))),
        "sd_over_seeds": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
        "by_seed": by_seed.tolist(),
    }


def contrasts(
    study: Study, answers: Mapping[Key, Answers], records: Mapping[Member, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The primary comparison and the others for which both sides are there; Holm's correction over these."""
    found = []
    for contrast in (study.primary, *study.contrasts):
        a, b = (answers.get(_key(contrast, arm)) for arm in (contrast.arm, contrast.other))
        if a is not None and b is not None and set(a.seeds) & set(b.seeds):
            found.append(_compared(study, contrast, a, b, _sizes(records, contrast)))
    for row, p in zip(found, stats.holm([row["p"] for row in found]) if found else [], strict=True):
        row["p_holm"] = float(p)
    return found


def _key(contrast: Contrast, arm: str) -> Key:
    return arm, contrast.target, contrast.evaluation, contrast.probe


def _sizes(records: Mapping[Member, Mapping[str, Any]], contrast: Contrast) -> tuple[float, float]:
    """Mean (n_train, n_test) of the contrast's members."""
    of = [r for m, r in records.items() if (m.arm, m.evaluation) == (contrast.arm, contrast.evaluation)]
    return float(np.mean([r["n_train"] for r in of])), float(np.mean([r["n_test"] for r in of]))


def _compared(study: Study, contrast: Contrast, a: Answers, b: Answers, sizes: tuple[float, float]) -> dict[str, Any]:
    """Paired bootstrap over subjects and seeds; across folds Nadeau and Bengio's corrected t instead."""
    gain, p, by_fold = difference(a, b)
    method = "bootstrap over subjects and seeds"
    if by_fold.shape[1] > 1:
        corrected = stats.nadeau_bengio(by_fold.ravel(), *sizes)
        method = "Nadeau-Bengio over folds x repeats"
        gain = dataclasses.replace(gain, low=corrected.low, high=corrected.high, se=corrected.se)
        p = corrected.p
    return {
        **dataclasses.asdict(contrast),
        "primary": contrast == study.primary,
        "tag": study.tag(contrast.arm, contrast.target),
        "metric": a.metric,
        "test": method,
        **dataclasses.asdict(gain),
        "p": p,
        "smallest_detectable": stats.smallest_detectable(gain.se),
        "seeds": len(by_fold),
        "folds": by_fold.shape[1],
    }


def _few(study: Study, records: Mapping[Member, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Few-label probes: mean and standard deviation over seeds and folds (of means over draws).

    Of held-out targets alone: pre-training read all the labels of a proxy, of which the probe would be given few.
    """
    grouped: defaultdict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    for member, record in records.items():
        for target, told in record["targets"].items():
            for probe, row in told["probes"].items():
                if probe.startswith("few") and study.tag(member.arm, target) == "held-out target":
                    grouped[member.arm, target, member.evaluation, int(probe[3:])].append(row["value"])
    names = ("method", "target", "evaluation", "labels")
    return [{**dict(zip(names, key, strict=True)), **_spread(values)} for key, values in grouped.items()]


def _within(study: Study, records: Mapping[Member, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The AUC of a linear probe inside the bins of another column: mean over seeds and folds, bin by bin."""
    grouped: defaultdict[tuple[str, str, str], list[list[float | None]]] = defaultdict(list)
    for member, record in records.items():
        for target, told in record["targets"].items():
            if "auc_within" in told["probes"]["linear"]:
                grouped[member.arm, target, member.evaluation].append(told["probes"]["linear"]["auc_within"])
    found = []
    for (arm, name, evaluation), of in grouped.items():
        target = study.target(name)
        bins = [[v for v in values if v is not None] for values in zip(*of, strict=True)]
        row = {"method": arm, "target": name, "tag": study.tag(arm, name), "evaluation": evaluation}
        found.append({**row, "by": target.within, "edges": list(target.bins), "bins": [_spread(b) for b in bins]})
    return found


def _features(records: Mapping[Member, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By method and evaluation: effective rank and the geometry of the last epoch, mean over members."""
    grouped: defaultdict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for member, record in records.items():
        grouped[member.arm, member.evaluation].append(record)
    return [
        {"method": arm, "evaluation": evaluation, "n": len(of), **_geometry(of)}
        for (arm, evaluation), of in grouped.items()
    ]


def _geometry(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    told: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        for part, rank in record["effective_rank"].items():
            told[f"effective_rank_{part}"].append(rank)
        for name, value in record["geometry"].items():
            told[name].append(value)
    return {name: float(np.mean(values)) for name, values in told.items()}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"value": float(np.mean(values)), "sd": sd, "n": len(values)}
