import itertools
import math
import pickle
from decimal import Decimal, localcontext
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cauc_dist.errors import BadInput
from cauc_dist.kernels import Kernel, Missing, cauchy, delta, gaussian, mean, parse, product
from tests import oracles

F64 = torch.float64
POLICIES: tuple[Missing, ...] = get_args(Missing)
NAN = math.nan
reproducible = settings(derandomize=True, deadline=None, max_examples=40, database=None)


def column(*values: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def rows(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=F64)


# ---- known values -----------------------------------------------------------------------------------------------


def test_gaussian_has_the_golden_weights_so_sigma_is_a_standard_deviation() -> None:
    w = gaussian(5.0)(column(20, 24, 40, 71))
    assert w[0, 1].item() == pytest.approx(0.726149037074, abs=1e-12)
    assert w[0, 2].item() == pytest.approx(0.000335462628, abs=1e-12)


def test_cauchy_and_delta_are_their_formulas() -> None:
    assert cauchy(0.5)(column(1, 3))[0, 1].item() == pytest.approx(1 / (1 + 0.5 * 4), abs=1e-15)
    assert delta()(column(1, 3, 1)).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_product_multiplies_and_mean_averages_with_weights() -> None:
    y = rows((20, 0), (24, 1), (24, 0))
    age = math.exp(-16 / 50)
    both = product(age=gaussian(5.0), sex=delta())(y)
    assert both[0].tolist() == pytest.approx([1, 0, age])
    either = mean({"age": 3.0}, age=gaussian(5.0), sex=delta())(y)
    assert either[0].tolist() == pytest.approx([1, 3 / 4 * age, (3 * age + 1) / 4])
    assert torch.equal(mean([3, 1], age=gaussian(5.0), sex=delta())(y), either)


def test_weight_zero_switches_a_column_off_even_where_it_is_missing() -> None:
    y = rows((20, NAN), (24, 1), (31, NAN))
    only_age = gaussian(5.0)(y[:, :1])
    for policy in POLICIES:  # marginal: not fitted, and not asked for
        off = mean({"sex": 0.0}, age=gaussian(5.0), sex=delta(policy))
        torch.testing.assert_close(off(y), only_age, rtol=0, atol=0)
        torch.testing.assert_close(off.complement(y), gaussian(5.0).complement(y[:, :1]), rtol=0, atol=0)


# ---- missing values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["product", "mean"])
@pytest.mark.parametrize("kinds", list(itertools.product(["gaussian", "cauchy", "delta"], repeat=2)))
@pytest.mark.parametrize("policies", list(itertools.product(POLICIES, repeat=2)))
def test_weights_equal_a_loop_over_pairs_for_every_policy(
    policies: tuple[str, str], kinds: tuple[str, str], combine: str
) -> None:
    train, y = oracles.cohort(9, seed=1, hidden=0.3), oracles.cohort(8, seed=2, hidden=0.4)
    assert y.isnan().all(1).any()
    assert y.isnan().any(1).sum() > y.isnan().all(1).sum()
    specs = [f"{name}:{kind}:3:{policy}" for name, kind, policy in zip("ab", kinds, policies, strict=True)]
    specs = [spec.replace("delta:3", "delta") for spec in specs]
    kernel = parse(specs, combine).fit(train)
    columns = [(kind, 3.0, policy, 1.0) for kind, policy in zip(kinds, policies, strict=True)]
    expected = torch.tensor(oracles.weights(columns, train, y, mean=combine == "mean"), dtype=F64)
    torch.testing.assert_close(kernel(y), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(kernel.complement(y), 1 - expected, rtol=0, atol=1e-14)


def test_unequal_weights_are_renormalised_over_the_columns_both_have() -> None:
    train, y = oracles.cohort(9, seed=1), oracles.cohort(8, seed=2, hidden=0.4)
    kernel = mean([0.2, 0.7], age=gaussian(3.0, "ignore"), sex=delta("marginal")).fit(train)
    columns = [("gaussian", 3.0, "ignore", 0.2), ("delta", 1.0, "marginal", 0.7)]
    expected = torch.tensor(oracles.weights(columns, train, y, mean=True), dtype=F64)
    torch.testing.assert_close(kernel(y), expected, rtol=0, atol=1e-14)


def test_unknown_pair_never_weighs_one() -> None:
    y, train = column(NAN, NAN, 25), column(20, 25, 30)
    assert gaussian(5.0).fit(train)(y)[0, 1].item() < 0.8
    assert gaussian(5.0, "distinct")(y)[0].tolist() == [1, 0, 0]
    assert gaussian(5.0, "ignore")(y)[0].tolist() == [1, 0, 0]


def test_own_subject_weighs_one_and_repels_nothing_whatever_is_missing() -> None:
    y = rows((NAN, NAN), (20, NAN), (NAN, 1))
    for policy in POLICIES:
        kernel = product(age=gaussian(5.0, policy), sex=delta(policy)).fit(oracles.cohort(9))
        assert kernel(y).diagonal().tolist() == [1, 1, 1]
        assert kernel.complement(y).diagonal().tolist() == [0, 0, 0]


@pytest.mark.parametrize("combine", ["product", "mean"])
@pytest.mark.parametrize("policy", ["marginal", "distinct"])
@reproducible
@given(seed=st.integers(0, 10_000), hidden=st.floats(0, 1))
def test_marginal_and_distinct_are_positive_semidefinite(policy: str, combine: str, seed: int, hidden: float) -> None:
    kernel = parse([f"age:gaussian:4:{policy}", f"sex:delta:{policy}"], combine).fit(oracles.cohort(11, seed + 1))
    assert kernel.positive_semidefinite
    assert torch.linalg.eigvalsh(kernel(oracles.cohort(12, seed, hidden))).min().item() > -1e-12


def test_ignore_is_not_positive_semidefinite_and_says_so() -> None:
    y = rows((0, 0), (0, NAN), (NAN, 0), (NAN, 1), (0, 1))
    kernel = product(a=delta("ignore"), b=delta("ignore"))
    assert torch.linalg.eigvalsh(kernel(y)).min().item() < -0.1
    assert not kernel.positive_semidefinite
    assert mean([1, 0], a=delta(), b=delta("ignore")).positive_semidefinite  # switched off


def test_fit_gives_a_new_kernel_and_leaves_the_old_one_unfitted() -> None:
    kernel = gaussian(5.0)
    fitted = kernel.fit(column(20, 30))
    assert fitted(column(NAN, 20))[0, 1].item() == pytest.approx((1 + math.exp(-2)) / 2)
    with pytest.raises(ValueError, match="not fitted"):
        kernel(column(NAN, 20))


def test_a_fitted_column_stays_fitted_inside_a_product() -> None:
    y = rows((NAN, 0), (20, 0))
    kernel = product(age=gaussian(5.0).fit(column(20, 30)), sex=delta())
    assert kernel(y)[0, 1].item() == pytest.approx((1 + math.exp(-2)) / 2)


def test_missing_in_one_column_asks_no_fit_of_another() -> None:
    y = rows((NAN, 0), (20, 0))
    assert product(age=gaussian(5.0, "distinct"), sex=delta("marginal"))(y)[0, 1].item() == 0


def test_marginal_mean_is_exact_over_more_training_values_than_one_chunk_holds() -> None:
    train = torch.linspace(0, 100, 3_000, dtype=F64)[:, None]
    y = torch.cat([column(NAN), torch.linspace(0, 100, 4_000, dtype=F64)[:, None]])
    w = gaussian(5.0).fit(train)(y[:1], y[1:])[0]
    for j in (0, 17, 2_345, 3_999):
        value = y[1 + j].item()
        expected = sum(math.exp(-((x - value) ** 2) / 50) for x in train[:, 0].tolist()) / 3_000
        assert w[j].item() == pytest.approx(expected, abs=1e-13)


# ---- complement -------------------------------------------------------------------------------------------------


def exact_complement(kind: str, scale: float, d: float) -> Decimal:
    """1 - w to 60 digits."""
    x = Decimal(d) ** 2
    similarity = (-x / (2 * Decimal(scale) ** 2)).exp() if kind == "gaussian" else 1 / (1 + Decimal(scale) * x)
    return 1 - similarity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["gaussian", "cauchy"])
@pytest.mark.parametrize("exponent", [-30, -24, -12, -3, 0, 3])
def test_complement_is_accurate_to_machine_precision_near_the_diagonal(
    kind: str, exponent: int, dtype: torch.dtype
) -> None:
    d = 2.0**exponent
    eps = torch.finfo(dtype).eps
    one, other = (gaussian(5.0), gaussian(3.0)) if kind == "gaussian" else (cauchy(5.0), cauchy(3.0))
    with localcontext() as context:
        context.prec = 60
        a, b = exact_complement(kind, 5.0, d), exact_complement(kind, 3.0, d)
        expected = {"single": float(a), "product": float(1 - (1 - a) * (1 - b)), "mean": float((a + b) / 2)}
    y = torch.tensor([[0.0, 0.0], [d, d]], dtype=dtype)
    found = {
        "single": one.complement(y[:, :1])[0, 1],
        "product": product(a=one, b=other).complement(y)[0, 1],
        "mean": mean(a=one, b=other).complement(y)[0, 1],
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(expected[name], rel=8 * eps), name
    if exponent == -30 and dtype is torch.float32:
        assert (1 - one(y[:, :1]))[0, 1].item() == 0  # what the plain form would have given


@reproducible
@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 2)), min_size=2, max_size=8), st.integers(0, 1))
def test_weights_are_symmetric_between_zero_and_one_and_add_up_with_the_complement(
    values: list[tuple[float, int]], which: int
) -> None:
    kernel = parse(["age:gaussian:5", "site:delta"], ("product", "mean")[which])
    y = torch.tensor(values, dtype=F64)
    w, c = kernel(y), kernel.complement(y)
    assert torch.equal(w, w.T)
    assert torch.equal(c, c.T)
    assert w.min() >= 0
    assert w.max() <= 1
    assert c.min() >= 0
    assert c.max() <= 1
    torch.testing.assert_close(w + c, torch.ones_like(w), rtol=0, atol=1e-15)


def test_constant_metadata_has_a_complement_of_exactly_zero() -> None:
    y = rows(*[(31.4, 1.0)] * 5)
    for kernel in (product(age=gaussian(5.0), sex=delta()), mean([0.1, 0.7], age=cauchy(5.0), sex=delta())):
        assert torch.equal(kernel.complement(y), torch.zeros(5, 5, dtype=F64))


# ---- tiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("combine", ["product", "mean"])
def test_tiles_put_together_are_the_whole_matrix_but_for_its_diagonal(policy: str, combine: str) -> None:
    y = oracles.cohort(13, seed=3, hidden=0.4)
    kernel = parse([f"age:gaussian:4:{policy}", f"sex:delta:{policy}"], combine).fit(oracles.cohort(9))
    ready = kernel.rows(y)
    for whole, tile in ((kernel(y), kernel), (kernel.complement(y), kernel.complement)):
        for source in (y, ready):
            parts = [
                torch.cat([tile(source[i : i + 5], source[j : j + 5]) for j in range(0, 13, 5)], 1)
                for i in range(0, 13, 5)
            ]
            together = torch.cat(parts).diagonal_scatter(whole.diagonal())
            torch.testing.assert_close(together, whole, rtol=0, atol=1e-15)


def test_tile_has_no_diagonal_so_two_unknown_subjects_are_not_one() -> None:
    y = column(NAN, 20)
    kernel = gaussian(5.0).fit(column(20, 30))
    assert kernel(y)[0, 0].item() == 1
    assert kernel(y, y)[0, 0].item() == pytest.approx((1 + math.exp(-2)) / 2)


def test_complete_rows_meet_rows_with_a_missing_value() -> None:
    kernel = gaussian(5.0).fit(column(20, 30))
    complete, holed = kernel.rows(column(20, 21)), kernel.rows(column(NAN, 21))
    assert len(complete) == 2
    torch.testing.assert_close(kernel(complete, holed), kernel(holed, complete).T, rtol=0, atol=0)
    assert kernel(complete, holed)[0, 0].item() == pytest.approx((1 + math.exp(-2)) / 2)


# ---- dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_as", "computed_in"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float64),
    ],
)
def test_weights_have_the_dtype_of_y_with_half_raised_and_integers_exact(
    given_as: torch.dtype, computed_in: torch.dtype
) -> None:
    y = torch.tensor([[20], [24]]).to(given_as)
    w = gaussian(5.0).fit(y)(y)
    assert w.dtype == computed_in
    assert gaussian(5.0).complement(y).dtype == computed_in
    assert w[0, 1].item() == pytest.approx(math.exp(-16 / 50), rel=1e-6)


def test_large_integer_subject_numbers_are_told_apart() -> None:
    assert delta()(torch.tensor([[2**25], [2**25 + 1]]))[0, 1].item() == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_fp32_weights_agree_with_fp64(policy: Missing) -> None:
    y, train = oracles.cohort(20, seed=5, hidden=0.3), oracles.cohort(20, seed=6)
    kernel = product(age=gaussian(5.0, policy), sex=delta(policy))
    exact, single = kernel.fit(train)(y), kernel.fit(train.float())(y.float())
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=5e-7)


def test_kernel_survives_pickling() -> None:
    kernel = product(age=gaussian(5.0), sex=delta()).fit(oracles.cohort(9))
    y = oracles.cohort(8, hidden=0.3)
    again: Kernel = pickle.loads(pickle.dumps(kernel))
    assert torch.equal(again(y), kernel(y))
    assert again.columns == ("age", "sex")


# ---- parse ------------------------------------------------------------------------------------------------------


def test_parse_reads_what_the_functions_build() -> None:
    y = oracles.cohort(8, seed=2, hidden=0.3)
    train = oracles.cohort(9)
    built = product(age=gaussian(5.0, "distinct"), sex=delta("ignore")).fit(train)
    for sex in ("sex:delta:ignore", "sex:delta::ignore"):
        parsed = parse(["age:gaussian:5:distinct", sex]).fit(train)
        assert parsed.columns == ("age", "sex")
        assert torch.equal(parsed(y), built(y))
    averaged = parse(["age:cauchy:.1", "sex:delta"], "mean").fit(train)
    assert torch.equal(averaged(y), mean(age=cauchy(0.1), sex=delta()).fit(train)(y))


@pytest.mark.parametrize(
    ("specs", "combine", "message"),
    [
        ([], "product", "the kernel has no column; wanted at least one. Name one"),
        (["age:gaussian:5"], "sum", "combine is 'sum'; wanted product or mean"),
        (["age:gaussian:5", "age:delta"], "product", "column age is given twice"),
        (["age"], "product", "kernel column 'age'; wanted column:kind"),
        ([":delta"], "product", "kernel column ':delta'; wanted column:kind"),
        (["age:gaussian:5:ignore:1"], "product", "wanted column:kind"),
        (["age:gausian:5"], "product", "has kind 'gausian'.*Did you mean gaussian"),
        (["age:gaussian"], "product", "has no scale.*Write e.g. age:gaussian:5"),
        (["age:gaussian:five"], "product", "has scale 'five'; wanted a number above 0"),
        (["age:gaussian:-1"], "product", "has scale '-1'; wanted a number above 0"),
        (["age:cauchy:nan"], "product", "has scale 'nan'; wanted a number above 0"),
        (["age:gaussian:5:marginl"], "product", "policy 'marginl'.*Did you mean marginal"),
        (["sex:delta:1"], "product", "policy '1'"),
        (["sex:delta:1:ignore"], "product", "gives delta a scale"),
    ],
)
def test_parse_refuses_nonsense_by_name(specs: list[str], combine: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse(specs, combine)


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_wrong_columns_are_refused_with_found_and_wanted() -> None:
    kernel = product(age=gaussian(5.0), sex=delta())
    for call in (kernel, kernel.complement, kernel.fit, kernel.rows):
        with pytest.raises(ValueError, match=r"y has shape \(4, 3\); wanted \(n, 2\): one column for each of age, sex"):
            call(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"y has shape \(4,\); wanted \(n, 1\)"):
        gaussian(5.0)(torch.zeros(4))


def test_missing_value_without_a_fit_is_refused_by_column() -> None:
    kernel = product(age=gaussian(5.0, "distinct"), sex=delta())
    with pytest.raises(
        ValueError, match=r"column sex has a missing value and the kernel was not fitted; wanted kernel"
    ):
        kernel(rows((NAN, 1), (20, NAN)))


def test_training_column_without_a_value_is_refused_only_where_it_is_needed() -> None:
    empty = rows((20, NAN), (21, NAN))
    with pytest.raises(ValueError, match="column sex has no value in 2 training rows; wanted at least one"):
        product(age=gaussian(5.0), sex=delta()).fit(empty)
    product(age=gaussian(5.0), sex=delta("distinct")).fit(empty)
    mean([1, 0], age=gaussian(5.0), sex=delta()).fit(empty)


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, math.inf])
def test_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"sigma is .*; wanted a number above 0"):
        gaussian(scale)
    with pytest.raises(ValueError, match=r"gamma is .*; wanted a number above 0"):
        cauchy(scale)


def test_kernels_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(ValueError, match="missing is 'drop'; wanted marginal, distinct, ignore"):
        delta("drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the kernel has no column; wanted at least one"):
        product()
    with pytest.raises(
        ValueError, match="column both is given a kernel of 2 columns; wanted gaussian, cauchy or delta"
    ):
        product(both=product(a=delta(), b=delta()))
    with pytest.raises(ValueError, match="weights name 'sx'; wanted a column of the kernel: sex"):
        mean({"sx": 1.0}, sex=delta())
    with pytest.raises(ValueError, match="2 weights; wanted one for each of 1 columns"):
        mean([1, 2], sex=delta())
    for weights in ([-1.0, 2.0], [0.0, 0.0], [NAN, 1.0]):
        with pytest.raises(ValueError, match=r"weights are .*; wanted numbers of at least 0, one of them above 0"):
            mean(weights, age=gaussian(5.0), sex=delta())
