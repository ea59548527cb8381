"""What the newest sound checkpoint of a run knows, as numbers for a page: maps, weights of a batch, similarities.

n scans of the map, m subjects of the batch, p pairs of held-out subjects, k metadata columns, H width of h, D of z.
"""

import base64
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from cauc_dist import checkpoint, kernels, probe
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.geometry import spread
from cauc_dist.objective import NEEDS_KERNEL
from cauc_dist.prepare import check_store, load, parts, plan_of
from cauc_dist.report.hidden import Hidden
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
MAPPED, PAIRED, WEIGHED, BINS = 2000, 300, 256, 12
"""Scans of a map, subjects whose pairs are compared, subjects of a kernel matrix, bins of distance: the most."""
FEWEST = 8
"""Scans for a t-SNE."""


def newest(run: Path) -> str:
    """The name of the newest checkpoint folder, sound or not; "" without one. Reads no tensor."""
    return max((path.name for path in (run / checkpoint.FOLDER).glob("step-*")), default="")


def maps(run: Path, hidden: Hidden, say: Callable[[str], None]) -> dict[str, Any]:
    """JSON of one run's maps; BadInput where there is no checkpoint, or its store is not where it was.

    Map: h of at most 2,000 scans, evenly over the store's order, by PCA and by t-SNE (seed 0, perplexity 30 or a third
    of the scans). Weights: the run's kernel on its first batch. Similarities: cosine of z, pairs of held-out subjects.
    """
    config = load(run)
    store = Store.open(config.data.store)
    check_store(run, store)
    hidden.knows(store.fingerprint, store.ids, store.subjects)
    saved = probe.newest(config, store, say)
    train, held = parts(config, store)
    used = np.sort(np.concatenate([train, held]))
    rows = spread(used, min(len(used), MAPPED))
    say(f"report: embedding {len(rows)} scans with {run.name}, step {saved.step}")
    h = probe.embed(config, store, rows, saved)
    if not np.isfinite(h).all():
        raise BadInput(f"step {saved.step} embeds some scans as no numbers", wanted="finite features", do="train anew")
    columns = [_column(c, store, rows, hidden) for c in store.columns]
    return {
        "step": saved.step,
        "whole": len(used),
        "hashes": [hidden(str(store.subjects[i])) for i in rows],
        "parts": ["held out" if out else "training" for out in np.isin(rows, held).tolist()],
        "columns": columns,
        **_projections(h, say),
        "kernel": weights(config, store, train, hidden),
        "pairs": _pairs(config, store, saved, held),
    }


def _column(column: Column, store: Store, rows: Rows, hidden: Hidden) -> dict[str, Any]:
    """Its values of those scans; None is missing. A level that is an id is hidden as one."""
    values = store.metadata([column.name])[rows, 0]
    levels = [hidden.scrub(hidden(level) if level in hidden.known else level) for level in column.levels]
    whole = column.kind == "category"
    told = [None if not np.isfinite(v) else int(v) if whole else _short(v) for v in values.tolist()]
    return {"name": hidden.scrub(column.name), "kind": column.kind, "levels": levels, "values": told}


def _projections(h: Array, say: Callable[[str], None]) -> dict[str, Any]:
    """h (n, H) -> pca and tsne (n, 2) as lists, and what share of the variance the first holds; tsne None: too few."""
    if len(h) < 3:
        return {"pca": None, "tsne": None, "explained": 0.0}
    wide = h if h.shape[1] > 1 else np.hstack([h, np.zeros_like(h)])
    with np.errstate(invalid="ignore", divide="ignore"):
        pca = PCA(2, random_state=0)
        first = pca.fit_transform(wide)
    explained = float(np.nan_to_num(pca.explained_variance_ratio_).sum())
    second = None
    if len(h) >= FEWEST and explained > 0:
        say(f"report: t-SNE of {len(h)} scans")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn's threads
            tsne = TSNE(2, perplexity=min(30.0, (len(h) - 1) / 3), init="pca", random_state=0)
            second = _points(tsne.fit_transform(wide.astype(np.float32)))
    return {"pca": _points(first), "tsne": second, "explained": _short(explained)}


def weights(config: RunConfig, store: Store, train: Rows, hidden: Hidden) -> dict[str, Any]:
    """w (m, m) of the first batch as bytes, ordered by the first of the kernel's columns; `why` where there is none.

    `watched`: the objective does not learn from it; the conditional terms that are watched do.
    """
    objective = config.objective
    if not objective.kernel:
        return {"why": f"The objective {objective.name} weighs by no metadata: it has no kernel."}
    batch = plan_of(config, store).batch(0)
    batch = spread(batch, min(len(batch), WEIGHED))
    names = objective.columns[: len(objective.kernel)]
    y, y_train = (torch.from_numpy(store.metadata(names)[of]) for of in (batch, train))
    order = torch.argsort(y[:, 0].nan_to_num(torch.inf), stable=True)
    w = kernels.parse(objective.kernel, objective.combine).fit(y_train)(y[order])
    levels = np.clip(np.rint(255 * w.numpy()), 0, 255).astype(np.uint8)
    first = store.column(names[0])
    told = [_value(first, v, hidden) for v in y[order, 0].tolist()]
    return {
        "title": hidden.scrub(" · ".join(objective.kernel) + (f" ({objective.combine})" if len(names) > 1 else "")),
        "n": len(batch),
        "of": config.batch_size,
        "watched": objective.name not in (*NEEDS_KERNEL, "decoupled_uniformity"),
        "column": hidden.scrub(names[0]),
        "values": told,
        "w": base64.b64encode(levels.tobytes()).decode(),
    }


def _value(column: Column, value: float, hidden: Hidden) -> str:
    if not np.isfinite(value):
        return "missing"
    return hidden.scrub(column.levels[int(value)]) if column.kind == "category" else f"{value:.4g}"


def _pairs(config: RunConfig, store: Store, saved: checkpoint.Saved, held: Rows) -> list[dict[str, Any]]:
    """By column: mean and standard deviation of the cosine similarity of z in bins of metadata distance."""
    firsts = held[np.unique(np.array(store.subjects)[held], return_index=True)[1]]  # one scan a subject
    firsts = np.sort(firsts)
    rows = spread(firsts, min(len(firsts), PAIRED))
    if len(rows) < 3:
        return []
    h = probe.embed(config, store, rows, saved)
    z = probe.project(config, store, saved, h.astype(np.float32)).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    i, j = np.triu_indices(len(rows), 1)
    similarity = (z @ z.T)[i, j]
    y = store.metadata([column.name for column in store.columns])[rows]
    found = [
        {"column": c.name, "subjects": len(rows), "bins": _bins(c, np.abs(v[i] - v[j]), similarity)}
        for c, v in zip(store.columns, y.T, strict=True)
    ]
    return [each for each in found if each["bins"]]


def _bins(column: Column, distance: Array, similarity: Array) -> list[dict[str, Any]]:
    """Of pairs (p,) whose both values are known: same and different of categories, else bins of as many pairs."""
    known = np.isfinite(distance)
    distance, similarity = distance[known], similarity[known]
    if len(distance) == 0:
        return []
    if column.kind == "category":
        kinds = (("same", distance == 0), ("different", distance > 0))
        return [{"x": name, **_of(similarity[of])} for name, of in kinds if of.any()]
    edges = np.unique(np.quantile(distance, np.linspace(0, 1, BINS + 1)))
    which = np.clip(np.searchsorted(edges, distance, "right") - 1, 0, max(0, len(edges) - 2))
    return [
        {"x": _short(distance[of].mean()), **_of(similarity[of])} for b in np.unique(which) if (of := which == b).any()
    ]


def _of(similarity: Array) -> dict[str, float]:
    return {"mean": _short(similarity.mean()), "sd": _short(similarity.std()), "n": len(similarity)}


def _points(of: NDArray[Any]) -> list[list[float]]:
    return [[_short(x), _short(y)] for x, y in of.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
