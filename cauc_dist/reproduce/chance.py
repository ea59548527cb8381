"""What a probe that sees nothing says: the median of the training labels, or their most frequent class."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cauc_dist.prepare import parts
from cauc_dist.store.reader import Store
from cauc_dist.study import Member, Study, Target, run_of

ARM = "chance"
Record = Mapping[str, Any]


def chance(study: Study, records: Mapping[Member, Record], store: Store) -> dict[Member, Record]:
    """Records of one more method: the same answer for every held-out subject of each evaluation, seed and fold."""
    found: dict[Member, Record] = {}
    for member, record in records.items():
        blind = dataclasses.replace(member, arm=ARM)
        if blind not in found and member.arm in study.arms:
            targets = {target.column: _of(study, member, target, record, store) for target in study.targets}
            found[blind] = {**record, "targets": targets, "geometry": {}, "effective_rank": {}}
    return found


def _of(study: Study, member: Member, target: Target, record: Record, store: Store) -> dict[str, Any]:
    told, run = record["targets"][target.column], run_of(study, member, store.where)
    labels = store.metadata([target.column])[parts(run, store)[0], 0]
    predicted = answer(target, labels[~np.isnan(labels)])
    return {**told, "tag": "", "probes": {"linear": {"predicted": [predicted] * len(told["truth"])}}}


def answer(target: Target, labels: np.ndarray) -> float:
    """As a probe of the target's metric answers: a number, P(second class), or a class."""
    if target.metric == "mae":
        return float(np.median(labels))
    classes, counts = np.unique(labels, return_counts=True)
    return float(counts[-1] / len(labels) if target.metric == "auc" else classes[counts.argmax()])
