"""Each objective and each kernel as a float64 Python loop over its equation: slow, plain, sharing no code with ours.

Embeddings are pooled view-major: embedding i is view i // n of subject i % n. `w` is the (n, n) list of lists of
subject weights, 1 on the diagonal.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Matrix = Sequence[Sequence[float]]


def golden() -> tuple[Tensor, Tensor, Tensor]:
    """raw (2, 4, 5), its unit rows z, and ages y (4, 1): the data of the golden values."""
    i, k = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(5, dtype=torch.float64)[None, :]
    raw = torch.sin(1 + (5 * i + k) ** 1.3)
    y = torch.tensor([[20.0], [24.0], [40.0], [71.0]], dtype=torch.float64)
    return raw.reshape(2, 4, 5), (raw / raw.norm(dim=1, keepdim=True)).reshape(2, 4, 5), y


def unit(views: int, n: int, width: int, seed: int = 0) -> Tensor:
    """Random unit rows (views, n, width), fp64; the views of a subject are near each other."""
    draw = torch.Generator().manual_seed(seed)
    raw = torch.randn(1, n, width, generator=draw, dtype=torch.float64)
    raw = raw + 0.5 * torch.randn(views, n, width, generator=draw, dtype=torch.float64)
    return torch.nn.functional.normalize(raw, dim=-1)


def cohort(n: int, seed: int = 0, hidden: float = 0.0) -> Tensor:
    """y (n, 2), fp64: an age in whole years, often shared, and a sex; a share `hidden` of the values is NaN."""
    draw = torch.Generator().manual_seed(1000 + seed)
    age = torch.randint(20, 32, (n,), generator=draw).double()
    sex = torch.randint(0, 2, (n,), generator=draw).double()
    y = torch.stack([age, sex], 1)
    return y.masked_fill(torch.rand(n, 2, generator=draw) < hidden, math.nan)


# ---- kernels ----------------------------------------------------------------------------------------------------

Column = tuple[str, float, str, float]
"""kind, scale, missing, weight"""


def factor(kind: str, scale: float, a: float, b: float) -> float:
    if kind == "gaussian":
        return math.exp(-((a - b) ** 2) / (2 * scale**2))
    if kind == "cauchy":
        return 1 / (1 + scale * (a - b) ** 2)
    return 1.0 if a == b else 0.0


def column_weight(column: Column, train: Sequence[float], a: float, b: float) -> float | None:
    """The factor of one column; None where it does not count."""
    kind, scale, missing, _ = column
    known = [x for x in train if not math.isnan(x)]
    if not math.isnan(a) and not math.isnan(b):
        return factor(kind, scale, a, b)
    if missing == "ignore":
        return None
    if missing == "distinct":
        return 0.0
    first = known if math.isnan(a) else [a]
    second = known if math.isnan(b) else [b]
    return sum(factor(kind, scale, p, q) for p in first for q in second) / (len(first) * len(second))


def pair_weight(columns: Sequence[Column], train: Matrix, a: Sequence[float], b: Sequence[float], mean: bool) -> float:
    factors = [
        (column[3], column_weight(column, [row[k] for row in train], a[k], b[k])) for k, column in enumerate(columns)
    ]
    counted = [(weight, f) for weight, f in factors if f is not None and (weight > 0 or not mean)]
    if not counted:
        return 0.0
    if mean:
        return sum(weight * f for weight, f in counted) / sum(weight for weight, _ in counted)
    return math.prod(f for _, f in counted)


def weights(columns: Sequence[Column], train: Tensor, y: Tensor, mean: bool = False) -> list[list[float]]:
    rows, known = y.tolist(), train.tolist()
    return [
        [1.0 if i == j else pair_weight(columns, known, a, b, mean) for j, b in enumerate(rows)]
        for i, a in enumerate(rows)
    ]


# ---- pairs ------------------------------------------------------------------------------------------------------


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    """||a - b||^2"""
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def pooled(z: Tensor) -> list[list[float]]:
    rows: list[list[float]] = z.reshape(-1, z.shape[-1]).tolist()
    return rows


# ---- objectives -------------------------------------------------------------------------------------------------


def y_aware(z: Tensor, w: Matrix, tau: float, column: bool = False) -> float:
    e, n = pooled(z), z.shape[1]
    total = 0.0
    for i in range(len(e)):
        log_sum = math.log(sum(math.exp(dot(e[i], e[k]) / tau) for k in range(len(e)) if k != i))
        for j in range(len(e)):
            if j != i:
                r = j if column else i
                mass = sum(w[r % n][k % n] for k in range(len(e)) if k != r)
                total += w[i % n][j % n] / mass * (log_sum - dot(e[i], e[j]) / tau)
    return total / (n if column else len(e))


def conditional_alignment(z: Tensor, w: Matrix, alpha: float, normalise: str) -> float:
    e, n = pooled(z), z.shape[1]
    top = [
        sum(w[i % n][j % n] * apart(e[i], e[j]) ** (alpha / 2) for j in range(len(e)) if j != i) for i in range(len(e))
    ]
    mass = [sum(w[i % n][j % n] for j in range(len(e)) if j != i) for i in range(len(e))]
    if normalise == "global":
        return float(sum(top) / sum(mass))
    return float(sum(a / b for a, b in zip(top, mass, strict=True)) / len(e))


def view_alignment(z: Tensor, alpha: float) -> float:
    views: list[list[list[float]]] = z.tolist()
    gaps = [
        apart(a, b) ** (alpha / 2)
        for v in range(len(views))
        for u in range(v)
        for a, b in zip(views[v], views[u], strict=True)
    ]
    return float(sum(gaps) / len(gaps))


def sets(z: Tensor, views: str) -> list[list[list[float]]]:
    return [pooled(z)] if views == "pooled" else [view.tolist() for view in z]


def uniformity(z: Tensor, t: float, views: str) -> float:
    values = []
    for e in sets(z, views):
        terms = [math.exp(-t * apart(e[i], e[j])) for i in range(len(e)) for j in range(i + 1, len(e))]
        values.append(math.log(sum(terms) / len(terms)))
    return sum(values) / len(values)


def conditional_uniformity(
    z: Tensor, w: Matrix, t: float, normalise: str, views: str, labels: Sequence[float] | None = None
) -> float:
    n, values = z.shape[1], []
    for e in sets(z, views):
        m, top, mass = len(e), [], []
        for i in range(m):
            c = [
                0.0 if labels is not None and labels[i % n] != labels[j % n] else 1 - w[i % n][j % n] for j in range(m)
            ]
            top.append(sum(c[j] * math.exp(-t * apart(e[i], e[j])) for j in range(m) if j != i))
            mass.append(sum(c[j] for j in range(m) if j != i))
        if normalise == "row":
            kept = [a / b for a, b in zip(top, mass, strict=True) if b > 0]
            values.append(math.log(sum(kept) / len(kept)))
        else:
            values.append(math.log(sum(top) / sum(mass)))
    return sum(values) / len(values)


def decoupled(z: Tensor, t: float, smoother: Matrix | None = None) -> float:
    mu = z.mean(0).tolist()
    if smoother is not None:
        mu = [
            [sum(a * row[d] for a, row in zip(line, mu, strict=True)) for d in range(len(mu[0]))] for line in smoother
        ]
    terms = [math.exp(-t * apart(mu[i], mu[j])) for i in range(len(mu)) for j in range(i + 1, len(mu))]
    return math.log(sum(terms) / len(terms))


def threshold(z: Tensor, w: Matrix, tau: float) -> float:
    e, n = pooled(z), z.shape[1]
    total, m = 0.0, len(e)
    for i in range(m):
        s = [dot(e[i], e[j]) / tau for j in range(m)]
        v = [w[i % n][j % n] for j in range(m)]
        mass = sum(v) - v[i]
        for k in range(m):
            if k != i:
                repelled = sum(math.exp(s[j]) for j in range(m) if j != i and v[j] < v[k])
                total -= v[k] / mass * math.log(math.exp(s[k]) / (math.exp(s[k]) + repelled))
    return total / m


def expw(z: Tensor, w: Matrix, tau: float, shifted: bool) -> float:
    e, n = pooled(z), z.shape[1]
    total, m = 0.0, len(e)
    for i in range(m):
        s = [dot(e[i], e[j]) / tau for j in range(m)]
        s = [x - max(s) for x in s] if shifted else s
        v = [w[i % n][j % n] for j in range(m)]
        log_sum = math.log(sum(math.exp(s[j] * (1 - v[j])) for j in range(m) if j != i))
        mass = sum(v) - v[i]
        total -= sum(v[k] / mass * (s[k] - log_sum) for k in range(m) if k != i)
    return total / m


def rank_n_contrast(z: Tensor, y: Tensor, tau: float) -> float:
    e, rows, n = pooled(z), y.tolist(), z.shape[1]
    total, m = 0.0, len(e)
    for i in range(m):
        gap = [sum(abs(a - b) for a, b in zip(rows[i % n], rows[j % n], strict=True)) for j in range(m)]
        s = [-math.sqrt(apart(e[i], e[j])) / tau for j in range(m)]
        for j in range(m):
            if j != i:
                farther = sum(math.exp(s[k]) for k in range(m) if k != i and gap[k] >= gap[j])
                total -= math.log(math.exp(s[j]) / farther)
    return total / (m * (m - 1))


def cross_entropy(z: Tensor, labels: Sequence[float]) -> float:
    terms = []
    for view in z.tolist():
        for row, label in zip(view, labels, strict=True):
            if not math.isnan(label):
                terms.append(math.log(sum(math.exp(x) for x in row)) - row[int(label)])
    return float(sum(terms) / len(terms))


def squared_error(z: Tensor, y: Tensor) -> float:
    terms = [
        (answer - value) ** 2
        for view in z.tolist()
        for row, wanted in zip(view, y.tolist(), strict=True)
        for answer, value in zip(row, wanted, strict=False)
        if not math.isnan(value)
    ]
    return float(sum(terms) / len(terms))
