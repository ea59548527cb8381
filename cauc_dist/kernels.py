"""The metadata kernel: how alike two subjects are, w(y_i, y_j) in [0, 1], with w = 1 for a subject and itself.

n, m  subjects (rows of y)       k  metadata columns, in the kernel's order; finite, or NaN = missing
w     weight of a pair           d  difference of two values of one column

A kernel is made of one-column kernels (`gaussian`, `cauchy`, `delta`) combined by `product` or `mean`:

    product(age=gaussian(5.0), sex=delta())        # same age (standard deviation 5 years) AND same sex

What a column's factor is where one of the two values is missing (`missing=`):

    marginal  its mean over the training column (both missing: over pairs of training values), the kernel mean
              embedding: positive semi-definite. Needs `kernel.fit(y_train)`. The default.
    distinct  0: an unknown value is like nobody else's. Positive semi-definite.
    ignore    the column is left out for that pair; w = 0 where every column is left out. NOT positive semi-definite.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from cauc_dist.errors import BadInput, nearest

Kind = Literal["gaussian", "cauchy", "delta"]
Missing = Literal["marginal", "distinct", "ignore"]
Combine = Literal["product", "mean"]


@dataclass(frozen=True, eq=False)
class Marginal:
    """A training column in short: what a value that is not known could have been."""

    values: Tensor
    """(U,) the distinct values, float64."""
    share: Tensor
    """(U,) how often each one occurs; sums to 1."""


@dataclass(frozen=True, eq=False)
class Factor:
    """One column's kernel, a function of the difference d of two values."""

    kind: Kind
    scale: float
    """gaussian: standard deviation sigma, in the column's unit; cauchy: gamma; delta: not used."""
    missing: Missing
    weight: float = 1.0
    """Share of the column in a `mean`; 0 switches it off."""
    train: Marginal | None = dataclasses.field(default=None, repr=False)

    def similarity(self, d: Tensor) -> Tensor:
        """w: exp(-d^2 / (2 sigma^2)), 1 / (1 + gamma d^2), or 1 where d = 0 and else 0."""
        match self.kind:
            case "gaussian":
                return (d / self.scale).square_().mul_(-0.5).exp_()
            case "cauchy":
                return d.square().mul_(self.scale).add_(1.0).reciprocal_()
            case "delta":
                return torch.eq(d, 0, out=torch.empty_like(d))  # a comparison into floats: ten times as fast as a mask

    def complement(self, d: Tensor) -> Tensor:
        """1 - w, to machine precision relative to itself: 1 - exp(-x) would round to 0 for small x."""
        match self.kind:
            case "gaussian":
                return (d / self.scale).square_().mul_(-0.5).expm1_().neg_()
            case "cauchy":
                x = d.square().mul_(self.scale)
                return x.div_(x + 1.0)
            case "delta":
                return torch.ne(d, 0, out=torch.empty_like(d))


@dataclass(frozen=True, eq=False)
class Rows:
    """Metadata made ready for tiles: `ready = kernel.rows(y)`, then `kernel(ready[a:b], ready[c:d])`.

    Saves repeated work only: the look for missing values and the means of the policy `marginal`, once for all tiles.
    """

    y: Tensor
    """(n, k), 0 where missing."""
    missing: Tensor | None
    """(n, k) bool; None: every value is there."""
    fill: Tensor | None
    """(2, n, k): the factor, and one minus it, for a partner that lacks this column."""

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, part: slice) -> "Rows":
        missing = None if self.missing is None else self.missing[part]
        return Rows(self.y[part], missing, None if self.fill is None else self.fill[:, part])


@dataclass(frozen=True, eq=False)
class Kernel:
    """w(y_i, y_j) over the columns of y, as a product or a weighted mean of one factor a column."""

    columns: tuple[str, ...]
    """Names, in the order of the columns of y."""
    factors: tuple[Factor, ...]
    combine: Combine = "product"

    def __call__(self, y: Tensor | Rows, y_cols: Tensor | Rows | None = None) -> Tensor:
        """(n, n) weights with a diagonal of 1; or, for two sets of subjects, an (n, m) tile.

        A tile has no diagonal: its rows and columns are ANY subjects. Where one subject stands in both and lacks a
        value, the caller writes the 1. dtype of y (half is raised to fp32, integers to fp64). Memory: ~4 n m numbers.
        """
        tile = self._tile(y, y_cols, complement=False)
        return tile.fill_diagonal_(1.0) if y_cols is None else tile

    def complement(self, y: Tensor | Rows, y_cols: Tensor | Rows | None = None) -> Tensor:
        """1 - w without cancellation: expm1 and sums of positive terms; diagonal 0 for one set of subjects."""
        tile = self._tile(y, y_cols, complement=True)
        return tile.fill_diagonal_(0.0) if y_cols is None else tile

    @property
    def positive_semidefinite(self) -> bool:
        """True unless a column in use has the policy `ignore`."""
        return all(self.factors[k].missing != "ignore" for k in self._used)

    def fit(self, y_train: Tensor) -> "Kernel":
        """The same kernel, knowing the training columns (N, k): what the policy `marginal` needs.

        Give it the dtype of the y it will see: equal values must stay equal. Missing training values are left out.
        """
        self._check(y_train)
        fitted = [self._fit_column(k, y_train[:, k]) for k in range(len(self.columns))]
        return dataclasses.replace(self, factors=tuple(fitted))

    def rows(self, y: Tensor | Rows, dtype: torch.dtype | None = None) -> Rows:
        """y (n, k) made ready for tiles. Looks once whether a value is missing: a GPU is waited for.

        `dtype`: the precision of the tiles, where it is to be less than that of y. Nothing is lost but the last bits of
        differences: categories are numbered first, other columns are centred.
        """
        if isinstance(y, Rows):
            return y
        self._check(y)
        y = floating(y.detach()).T.contiguous().T  # a column's values side by side: tiles read one column at a time
        rows = Rows(y, None, None)
        if not bool(y.isfinite().all()):
            missing = y.isnan()
            for name, column in zip(self.columns, y.isinf().any(0).tolist(), strict=True):
                if column:
                    raise ValueError(f"column {name} of y has an infinite value; wanted finite ones, NaN where missing")
            rows = self._filled(Rows(y.masked_fill(missing, 0.0), missing, None))
        return rows if dtype is None or dtype == y.dtype else self._rounded(rows, dtype)

    def only(self, columns: Sequence[int]) -> "Kernel":
        """The same kernel of some of its columns, by their place."""
        return Kernel(tuple(self.columns[k] for k in columns), tuple(self.factors[k] for k in columns), self.combine)

    def _rounded(self, rows: Rows, dtype: torch.dtype) -> Rows:
        y = torch.empty(rows.y.shape[::-1], dtype=dtype, device=rows.y.device).T
        for k, factor in enumerate(self.factors):
            column = rows.y[:, k]
            if factor.kind != "delta":
                low, high = column.aminmax() if len(column) else (0.0, 0.0)
                column = column - 0.5 * (low + high)
            elif not torch.equal(column.to(dtype).to(column.dtype), column):
                column = torch.unique(column, return_inverse=True)[1]  # equal stays equal, unlike stays unlike
            y[:, k] = column
        return Rows(y, rows.missing, None if rows.fill is None else rows.fill.to(dtype))

    # ---- one column -------------------------------------------------------------------------------------------

    @property
    def _used(self) -> list[int]:
        """Columns that count: a product counts all, a mean those of positive weight."""
        return [k for k, factor in enumerate(self.factors) if self.combine == "product" or factor.weight > 0]

    def _check(self, y: Tensor) -> None:
        if y.ndim != 2 or y.shape[1] != len(self.columns):
            wanted = f"(n, {len(self.columns)}): one column for each of {', '.join(self.columns)}"
            raise ValueError(f"y has shape {tuple(y.shape)}; wanted {wanted}")

    def _fit_column(self, k: int, column: Tensor) -> Factor:
        if self.factors[k].missing != "marginal" or k not in self._used:
            return self.factors[k]
        known = column[~column.isnan()]
        if len(known) == 0:
            raise ValueError(
                f"column {self.columns[k]} has no value in {len(column)} training rows; "
                "wanted at least one for the policy 'marginal'"
            )
        values, counts = torch.unique(known.double(), return_counts=True)
        return dataclasses.replace(self.factors[k], train=Marginal(values, counts.double() / len(known)))

    def _filled(self, rows: Rows) -> Rows:
        """The same rows with `missing` and `fill` present: a tile with a missing value needs both."""
        if rows.fill is not None:
            return rows
        missing = torch.zeros_like(rows.y, dtype=torch.bool) if rows.missing is None else rows.missing
        fill = torch.zeros((2, *rows.y.shape), dtype=rows.y.dtype, device=rows.y.device)
        for k in self._used:
            fill[:, :, k] = self._fill_column(k, rows.y[:, k], missing[:, k])
        return Rows(rows.y, missing, fill)

    def _fill_column(self, k: int, values: Tensor, missing: Tensor) -> Tensor:
        """(2, n): factor and complement of each row against a partner without a value in column k."""
        factor = self.factors[k]
        if factor.missing != "marginal":
            similarity = torch.full_like(values, 1.0 if factor.missing == "ignore" else 0.0)
            return torch.stack([similarity, 1 - similarity])
        if factor.train is not None:
            return _fill_marginal(factor, factor.train, values, missing)
        if bool(missing.any()):
            raise ValueError(
                f"column {self.columns[k]} has a missing value and the kernel was not fitted; "
                "wanted kernel.fit(y_train) first, or the policy 'distinct' or 'ignore'"
            )
        return values.new_zeros((2, len(values)))  # never read: a partner without a value is refused by the line above

    def _column(self, k: int, a: Rows, b: Rows, complement: bool) -> Tensor:
        """(n, m) factor of column k, or one minus it, with missing values filled by the column's policy."""
        factor = self.factors[k]
        d = a.y[:, None, k] - b.y[None, :, k]
        tile = factor.complement(d) if complement else factor.similarity(d)
        if a.missing is None or b.missing is None or a.fill is None or b.fill is None:
            return tile
        tile = torch.where(b.missing[None, :, k], a.fill[int(complement), :, None, k], tile)
        # `fill` of a row without a value is the value for two unknowns, so the order of these two lines is free.
        return torch.where(a.missing[:, None, k], b.fill[int(complement), None, :, k], tile)

    def _left_out(self, k: int, a: Rows, b: Rows) -> Tensor | None:
        """(n, m) where column k does not count for the pair; None: it counts for all."""
        if self.factors[k].missing != "ignore" or a.missing is None or b.missing is None:
            return None
        return a.missing[:, None, k] | b.missing[None, :, k]

    # ---- all columns ------------------------------------------------------------------------------------------

    def _tile(self, y: Tensor | Rows, y_cols: Tensor | Rows | None, complement: bool) -> Tensor:
        a = self.rows(y)
        b = a if y_cols is None else self.rows(y_cols)
        if a.missing is not None or b.missing is not None:
            a, b = self._filled(a), self._filled(b)
        if self.combine == "mean":
            return self._mean(a, b, complement)
        if a.missing is None and b.missing is None:
            return self._product_of_known(a, b, complement)
        return self._product(a, b, complement)

    def _product_of_known(self, a: Rows, b: Rows, complement: bool) -> Tensor:
        """The product where no value is missing, in few passes over the tile: the speed of the tiled objectives."""
        tile: Tensor | None = None
        for k in sorted(self._used, key=lambda k: self.factors[k].kind == "delta"):  # categories last: they only mask
            column = self._column(k, a, b, complement)
            if tile is None:
                tile = column
            elif not complement:
                tile.mul_(column)
            elif self.factors[k].kind == "delta":  # 0 or 1
                torch.maximum(tile, column, out=tile)
            else:  # 1 - f w = (1 - w) + w (1 - f)
                tile.lerp_(torch.ones((), dtype=tile.dtype, device=tile.device), column)
        assert tile is not None  # a kernel has a column
        return tile

    def _product(self, a: Rows, b: Rows, complement: bool) -> Tensor:
        *first, last = self._used
        tile = self._column(last, a, b, complement)
        for k in reversed(first):
            tile = self._column(k, a, b, complement=False) * tile
            if complement:  # 1 - f w = (1 - f) + f (1 - w), all terms positive
                tile = tile + self._column(k, a, b, complement=True)
        masks = [self._left_out(k, a, b) for k in self._used]
        known = [mask for mask in masks if mask is not None]
        if len(known) < len(masks):
            return tile
        return tile.masked_fill(reduce(torch.logical_and, known), 1.0 if complement else 0.0)

    def _mean(self, a: Rows, b: Rows, complement: bool) -> Tensor:
        total = torch.zeros((len(a), len(b)), dtype=a.y.dtype, device=a.y.device)
        weight = torch.zeros_like(total)
        for k in self._used:
            tile = self.factors[k].weight * self._column(k, a, b, complement)
            out = self._left_out(k, a, b)
            total += tile if out is None else tile.masked_fill(out, 0.0)
            weight += self.factors[k].weight * (1.0 if out is None else (~out).to(weight))
        known = weight > 0
        return torch.where(known, total / weight.where(known, 1.0), 1.0 if complement else 0.0)


def gaussian(sigma: float, missing: Missing = "marginal") -> Kernel:
    """exp(-(y_i - y_j)^2 / (2 sigma^2)): sigma is a STANDARD DEVIATION in the column's unit, not a variance."""
    return _one("gaussian", "sigma", sigma, missing)


def cauchy(gamma: float, missing: Missing = "marginal") -> Kernel:
    """1 / (1 + gamma (y_i - y_j)^2): heavier tails than the Gaussian; gamma in 1 / unit^2."""
    return _one("cauchy", "gamma", gamma, missing)


def delta(missing: Missing = "marginal") -> Kernel:
    """1 where two values are equal, else 0: for categories (sex, class, subject)."""
    return _one("delta", "scale", 1.0, missing)


def product(**columns: Kernel) -> Kernel:
    """Alike in every column. Columns of y in the order given; to leave a column out, do not name it."""
    return Kernel(tuple(columns), _single(columns), "product")


def mean(weights: Mapping[str, float] | Sequence[float] | None = None, **columns: Kernel) -> Kernel:
    """Weighted mean over columns, sum_k weight_k w_k / sum_k weight_k. A weight of 0 switches a column off.

    `weights`: by name (a column that is not named weighs 1) or one a column, in order. Default: all alike.
    """
    factors = _single(columns)
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in columns]
        if unknown:
            raise ValueError(f"weights name {unknown[0]!r}; wanted a column of the kernel: {', '.join(columns)}")
        weights = [weights.get(name, 1.0) for name in columns]
    numbers = [1.0] * len(factors) if weights is None else [float(weight) for weight in weights]
    if len(numbers) != len(factors):
        raise ValueError(f"{len(numbers)} weights; wanted one for each of {len(factors)} columns")
    if not all(math.isfinite(w) and w >= 0 for w in numbers) or sum(numbers) == 0:
        raise ValueError(f"weights are {numbers}; wanted numbers of at least 0, one of them above 0")
    weighted = [dataclasses.replace(factor, weight=w) for factor, w in zip(factors, numbers, strict=True)]
    return Kernel(tuple(columns), tuple(weighted), "mean")


def parse(specs: Sequence[str], combine: str = "product") -> Kernel:
    """A kernel from `column:kind[:scale[:missing]]`, one a column: `age:gaussian:5:distinct`, `sex:delta`.

    delta has no scale: `sex:delta:ignore`, or `sex:delta::ignore`. Raises BadInput with the valid names.
    """
    if not specs:
        raise BadInput("the kernel has no column", wanted="at least one", do="Name one, e.g. age:gaussian:5")
    if combine not in get_args(Combine):
        raise BadInput(f"combine is {combine!r}", wanted="product or mean", do=nearest(combine, get_args(Combine)))
    columns: dict[str, Kernel] = {}
    for spec in specs:
        name, kernel = _parse_column(spec)
        if name in columns:
            raise BadInput(f"kernel column {name} is given twice", wanted="each column once", do="Leave one out")
        columns[name] = kernel
    factors = _single(columns)
    return Kernel(tuple(columns), factors, "mean" if combine == "mean" else "product")


# ---- building -------------------------------------------------------------------------------------------------


def _one(kind: Kind, letter: str, scale: float, missing: Missing) -> Kernel:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{letter} is {scale:g}; wanted a number above 0")
    if missing not in get_args(Missing):
        raise ValueError(f"missing is {missing!r}; wanted {', '.join(get_args(Missing))}")
    return Kernel(("y",), (Factor(kind, float(scale), missing),))


def _single(columns: Mapping[str, Kernel]) -> tuple[Factor, ...]:
    if not columns:
        raise ValueError("the kernel has no column; wanted at least one, e.g. age=gaussian(5.0)")
    for name, kernel in columns.items():
        if len(kernel.factors) != 1:
            raise ValueError(
                f"column {name} is given a kernel of {len(kernel.factors)} columns; wanted gaussian, cauchy or delta"
            )
    return tuple(kernel.factors[0] for kernel in columns.values())


def _parse_column(spec: str) -> tuple[str, Kernel]:
    form = "column:kind[:scale[:missing]], e.g. age:gaussian:5 or sex:delta"
    name, *rest = spec.split(":")
    if not name or not rest or len(rest) > 3:
        raise BadInput(f"kernel column {spec!r}", wanted=form, do="Write it in that form")
    kind, *options = rest
    if kind not in get_args(Kind):
        raise BadInput(f"kernel column {spec!r} has kind {kind!r}", wanted=form, do=nearest(kind, get_args(Kind)))
    if kind == "delta":  # no scale: drop an empty one, so that both ways of writing the policy are read
        options = options[1:] if options[:1] == [""] else options
        if len(options) > 1:
            raise BadInput(f"kernel column {spec!r} gives delta a scale", wanted="column:delta[:missing]", do="Drop it")
        return name, delta(_parse_missing(spec, options))
    if not options:
        raise BadInput(f"kernel column {spec!r} has no scale", wanted=form, do=f"Write e.g. {name}:{kind}:5")
    scale, missing = _parse_scale(spec, options[0]), _parse_missing(spec, options[1:])
    return name, gaussian(scale, missing) if kind == "gaussian" else cauchy(scale, missing)


def _parse_scale(spec: str, text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise BadInput(
            f"kernel column {spec!r} has scale {text!r}",
            wanted="a number above 0",
            do="gaussian: standard deviation in the column's unit; cauchy: gamma",
        )
    return scale


def _parse_missing(spec: str, options: Sequence[str]) -> Missing:
    policy = options[0] if options else "marginal"
    if policy in get_args(Missing):
        return cast(Missing, policy)
    raise BadInput(
        f"kernel column {spec!r} has missing-value policy {policy!r}",
        wanted=", ".join(get_args(Missing)),
        do=nearest(policy, get_args(Missing)),
    )


# ---- numbers --------------------------------------------------------------------------------------------------


def floating(y: Tensor) -> Tensor:
    """fp32 and fp64 as they are; half raised to fp32; integers to fp64, which holds any subject number exactly."""
    if y.dtype in (torch.float32, torch.float64):
        return y
    return y.float() if y.is_floating_point() else y.double()


def _fill_marginal(factor: Factor, train: Marginal, values: Tensor, missing: Tensor) -> Tensor:
    """(2, n): one value unknown, the mean over the training column; both, the mean over pairs of it."""
    means = _marginal(factor, train, values)
    if not bool(missing.any()):
        return means
    pair = (_marginal(factor, train, train.values.to(values)) * train.share.to(values)).sum(1, keepdim=True)
    return torch.where(missing, pair.clamp(max=1.0), means)


def _marginal(factor: Factor, train: Marginal, values: Tensor) -> Tensor:
    """(2, n): mean over the training column of the factor, and of one minus it, at each value. O(n U) time."""
    column, share = train.values.to(values), train.share.to(values)
    means = []
    for part in values.tensor_split(1 + len(values) * len(column) // 2**22):  # about 4 M numbers at a time
        d = part[:, None] - column[None, :]
        means.append(torch.stack([factor.similarity(d) @ share, factor.complement(d) @ share]))
    return torch.cat(means, dim=1).clamp(max=1.0)  # shares may sum to 1 + rounding
