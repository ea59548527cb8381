"""Every way to W x against the matrix W, the certificate of the low rank, and which way is taken when."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cauc_dist.kernels import Kernel, cauchy, delta, gaussian, mean, product
from cauc_dist.losses import similar, tiled
from cauc_dist.losses.batch import Batch
from cauc_dist.losses.similar import Exact, Factored, Matrix, Similar, distinct, low_rank, pivoted_cholesky
from tests import oracles

F64 = torch.float64
Make = Callable[[Any], Kernel]  # of a policy for missing values
POLICIES = ("marginal", "distinct", "ignore")


def uniform(n: int, low: float, high: float, seed: int = 0) -> Tensor:
    """(n, 1) float64"""
    draw = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(n, 1, generator=draw, dtype=F64)


def classes(n: int, most: int, seed: int = 0) -> Tensor:
    """(n, 1) float64: 0 ... most - 1"""
    return torch.randint(0, most, (n, 1), generator=torch.Generator().manual_seed(seed)).double()


def hide(y: Tensor, share: float = 0.2) -> Tensor:
    return y.masked_fill(torch.rand(y.shape, generator=torch.Generator().manual_seed(9)) < share, math.nan)


def check(found: Similar | None, kernel: Kernel, y: Tensor, rel: float = 1e-12, dtype: torch.dtype = F64) -> None:
    """Row sums, weighted row sums and pull, against the matrix."""
    assert found is not None
    W = kernel(y).double().fill_diagonal_(0.0)
    z = oracles.unit(3, len(y), 4, seed=1).to(dtype)
    batch, zbar = Batch(z), z.double().sum(0)
    a = 0.1 + uniform(len(y), 0.0, 1.0, seed=7)[:, 0]
    close(found.row_sums(batch), W.sum(1), rel)
    close(found.row_sums(batch, a), W @ a, rel)
    pulled = found.pull(batch, a)
    assert pulled.dtype == dtype
    close(pulled.double(), (W * (a[:, None] + a[None, :])) @ zbar, rel)


def close(found: Tensor, wanted: Tensor, rel: float) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= rel * float(wanted.abs().max())


# ---- every way = the matrix -------------------------------------------------------------------------------------

KERNELS: dict[str, Make] = {
    "product": lambda policy: product(age=gaussian(4.0, policy), sex=delta(policy)),
    "mean": lambda policy: mean([1.0, 0.5], age=cauchy(0.1, policy), sex=delta(policy)),
    "a column off": lambda policy: mean([1.0, 0.0], age=gaussian(4.0, policy), sex=delta("ignore")),
}


@pytest.mark.parametrize("hidden", [0.0, 0.2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("combine", KERNELS)
def test_matrix_exact_and_distinct_are_the_matrix(
    combine: str, policy: str, hidden: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five ages, two sexes, and where hidden a missing one of each: 18 distinct rows of 160."""
    monkeypatch.setitem(tiled.ROWS, "cpu", 64)
    monkeypatch.setattr(similar, "PART", 50)
    y = hide(torch.cat([20 + 3 * classes(160, 5), classes(160, 2, seed=1)], 1), hidden)
    kernel = KERNELS[combine](policy).fit(oracles.cohort(20))
    weights, everyone = tiled.Weights(kernel, y, F64), slice(0, len(y))
    check(Matrix(weights.alike(everyone, everyone)), kernel, y)
    check(Exact(weights), kernel, y)
    found = distinct(kernel, y)
    check(found, kernel, y)
    assert found is not None
    assert len(found.among if found.among is not None else ()) == len(torch.unique(y.nan_to_num(-1.0), dim=0)) <= 18


SMOOTH: dict[str, tuple[Make, list[Tensor]]] = {
    "age": (lambda p: product(age=gaussian(8.0, p)), [uniform(1200, 20, 32)]),
    "cauchy": (lambda p: product(age=cauchy(0.01, p)), [uniform(1200, 20, 32)]),
    "two smooth columns": (
        lambda p: product(age=gaussian(9.0, p), score=cauchy(0.001, p)),
        [uniform(1200, 20, 32), uniform(1200, 0, 9, seed=1)],
    ),
    "a category between": (
        lambda p: product(sex=delta(p), age=gaussian(8.0, p), other=delta(p)),
        [classes(1200, 2), uniform(1200, 20, 32), classes(1200, 2, seed=1)],
    ),
    "a mean with a category": (
        lambda p: mean([2.0, 1.0], age=gaussian(8.0, p), sex=delta(p)),
        [uniform(1200, 20, 32), classes(1200, 2)],
    ),
}


@pytest.mark.parametrize("hidden", [0.0, 0.2])
@pytest.mark.parametrize("policy", ["marginal", "distinct"])
@pytest.mark.parametrize("case", SMOOTH)
def test_low_rank_is_the_matrix_to_its_tolerance(
    case: str, policy: str, hidden: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similar, "PART", 500)
    make, parts = SMOOTH[case]
    y = hide(torch.cat(parts, 1), hidden)
    kernel = make(policy).fit(torch.cat(parts, 1)[:100])
    # Each lost entry is below the tolerance: a row sum loses at most n of it.
    check(low_rank(kernel, y, 1e-8), kernel, y, rel=1200 * 1e-8)
    check(low_rank(kernel, y, 1e-12, most=10**6), kernel, y, rel=1e-10)


def test_low_rank_of_float32_metadata_and_embeddings_keeps_the_precision_of_fp32() -> None:
    y = torch.cat([uniform(2048, 6, 86), classes(2048, 2)], 1).float()
    kernel = product(age=gaussian(5.0), sex=delta())
    check(low_rank(kernel, y), kernel, y.double(), rel=1e-6, dtype=torch.float32)


def test_categories_alone_need_no_factor() -> None:
    y = torch.cat([classes(300, 2), classes(300, 3, seed=1)], 1)
    kernel = product(sex=delta("distinct"), site=delta())
    for z in (y, hide(y)):
        fitted = kernel.fit(y)
        found = low_rank(fitted, z)
        assert found is not None
        assert found.factor is None
        check(found, fitted, z)


def test_subjects_as_categories_are_like_nobody_else() -> None:
    ids = torch.arange(40)
    check(Factored(ids), delta(), ids[:, None].double(), rel=0.0)


def test_classes_as_categories_are_like_their_own() -> None:
    group = classes(40, 7)
    check(Factored(group[:, 0].long()), delta(), group)


# ---- the certificate --------------------------------------------------------------------------------------------

CERTIFIED: dict[str, tuple[Kernel, Tensor]] = {
    "age": (gaussian(5.0), uniform(500, 6, 86)),
    "age twice": (gaussian(5.0), uniform(250, 6, 86).repeat(2, 1)),
    "cauchy": (cauchy(0.01), uniform(500, 6, 86)),
    "two columns": (
        product(age=gaussian(15.0), score=gaussian(3.0)),
        torch.cat([uniform(500, 6, 86), uniform(500, 0, 9, seed=1)], 1),
    ),
    "a mean": (
        mean([1.0, 2.0], age=gaussian(15.0), score=cauchy(0.1)),
        torch.cat([uniform(500, 6, 86), uniform(500, 0, 9, seed=1)], 1),
    ),
    "missing": (gaussian(5.0, "marginal").fit(uniform(100, 6, 86, seed=4)), hide(uniform(500, 6, 86))),
    "missing, distinct": (gaussian(5.0, "distinct"), hide(uniform(500, 6, 86))),
}


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("case", CERTIFIED)
def test_no_entry_is_lost_by_more_than_the_tolerance_and_no_column_is_too_many(case: str, tolerance: float) -> None:
    kernel, y = CERTIFIED[case]
    rows = kernel.rows(y)
    K = kernel(rows, kernel.rows(y.clone()))  # a tile: nothing is written on its diagonal
    L = pivoted_cholesky(kernel, rows, tolerance, len(y))
    assert L is not None
    rounding = 1e-13  # of the sums L L' themselves
    assert float((K - L @ L.T).abs().max()) <= tolerance + rounding
    fewer = L[:, :-1]
    assert float((K - fewer @ fewer.T).abs().max()) > tolerance - rounding


def test_the_rank_of_ages_6_to_86_at_sigma_5_is_about_34_for_1e_7_whatever_their_number() -> None:
    for n in (1_000, 10_000):
        L = pivoted_cholesky(gaussian(5.0), gaussian(5.0).rows(uniform(n, 6, 86)), 1e-7, 256)
        assert L is not None
        assert 30 <= L.shape[1] <= 38


def test_the_default_tolerance_keeps_row_sums_to_fp32() -> None:
    y = uniform(1024, 6, 86)
    W = gaussian(5.0)(y).fill_diagonal_(0.0)
    found = low_rank(gaussian(5.0), y)
    assert found is not None
    lost = found.row_sums(Batch(torch.zeros(1, 1024, 1))) - W.sum(1)
    assert 0 < float(lost.abs().max()) < torch.finfo(torch.float32).eps


# ---- which way --------------------------------------------------------------------------------------------------


def test_low_rank_refuses_what_is_not_low_or_not_positive() -> None:
    ages, ids = uniform(1024, 6, 86), torch.arange(1024.0, dtype=F64)[:, None]
    assert low_rank(gaussian(0.01), ages) is None  # as many ranks as ages
    assert low_rank(gaussian(5.0, "ignore"), ages) is None  # even where no value is missing
    assert low_rank(delta(), ids) is None  # more than 256 categories, or an eighth of n
    assert low_rank(delta(), ids.div(4, rounding_mode="floor")) is None
    assert low_rank(delta(), ids.div(8, rounding_mode="floor")) is not None
    assert low_rank(product(id=delta(), age=gaussian(5.0)), torch.cat([ids, ages], 1)) is None
    many = product(site=delta(), age=gaussian(5.0))  # rank times categories is what has to be small
    assert low_rank(many, torch.cat([classes(1024, 2), ages], 1)) is not None
    assert low_rank(many, torch.cat([classes(1024, 9), ages], 1)) is None
    assert low_rank(gaussian(5.0), ages, most=20) is None


def test_distinct_refuses_more_values_than_an_eighth_of_the_subjects_or_than_most() -> None:
    ids = torch.arange(800.0, dtype=F64)[:, None]
    assert distinct(delta(), ids.remainder(100)) is not None
    assert distinct(delta(), ids.remainder(101)) is None
    assert distinct(delta(), ids.remainder(100), most=99) is None


def way(kernel: Kernel, y: Tensor, dtype: torch.dtype = torch.float32, views: int = 2) -> str:
    z = oracles.unit(views, len(y), 4).to(dtype)
    found = similar.similar(tiled.Weights(kernel, y, dtype), y, Batch(z))
    if isinstance(found, Factored):
        return "distinct" if found.factor is None else "low rank"
    return type(found).__name__.lower()


def test_the_way_taken_is_the_cheapest_that_is_exact_enough() -> None:
    age, sex = uniform(1024, 6, 86), classes(1024, 2)
    both, kernel = torch.cat([age, sex], 1), product(age=gaussian(5.0), sex=delta())
    assert way(kernel, both[:512]) == "matrix"
    assert way(kernel, both[:513]) != "matrix"
    assert way(gaussian(5.0), age.round()) == "distinct"
    assert way(gaussian(5.0, "ignore"), hide(age.round())) == "distinct"
    assert way(delta(), sex, F64) == "distinct"
    assert way(delta(), sex, F64, views=1) == "exact"  # a row may have no weight, which a difference would not give
    assert way(kernel, both) == "low rank"
    assert way(kernel.fit(both), hide(both)) == "exact"  # three categories, a missing one among them
    more = torch.cat([uniform(2048, 6, 86), classes(2048, 2)], 1)
    assert way(kernel.fit(more), hide(more)) == "low rank"
    assert way(kernel, both, F64) == "exact"
    assert way(kernel, both, views=1) == "exact"
    assert way(gaussian(0.01), age) == "exact"
    assert way(product(age=gaussian(5.0, "ignore"), sex=delta()), both) == "exact"
    assert way(delta(), torch.arange(1024.0)[:, None]) == "exact"


def test_with_one_view_a_rare_subject_keeps_the_little_weight_it_has() -> None:
    """Whole ages 20 ... 59 and one of 103: its weights sum to 5e-16, beside a diagonal of 1."""
    y = torch.cat([torch.arange(600.0).remainder(40) + 20, torch.tensor([103.0])]).double()[:, None]
    z = oracles.unit(1, 601, 4)
    kernel = gaussian(5.0)
    found = similar.similar(tiled.Weights(kernel, y, F64), y, Batch(z)).row_sums(Batch(z))[-1]
    wanted = torch.exp(-0.5 * ((y[:-1] - 103) / 5).square()).sum()
    assert 0 < float(wanted) < 1e-13
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
