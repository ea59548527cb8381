import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from cauc_dist.kernels import Kernel, delta, gaussian, product
from cauc_dist.losses import (
    align_uniform,
    decoupled_uniformity,
    expw,
    ntxent,
    rank_n_contrast,
    supcon,
    threshold,
    uniformity,
)
from tests import oracles

F64 = torch.float64
LABELS = [0, 1, 1, 2, 0, 1]
Loss = Callable[[Tensor, Tensor, Kernel], Tensor]

LOSSES: dict[str, Loss] = {
    "ntxent": lambda z, y, k: ntxent(z),
    "supcon": lambda z, y, k: supcon(z, y[:, 1]),
    "align_uniform": lambda z, y, k: align_uniform(z),
    "align_uniform_alpha_1": lambda z, y, k: align_uniform(z, alpha=1.0, t=3.0),
    "decoupled": lambda z, y, k: decoupled_uniformity(z),
    "kernel_decoupled": lambda z, y, k: decoupled_uniformity(z, y, k, lam=0.1),
    "threshold": threshold,
    "expw": expw,
    "expw_shifted": lambda z, y, k: expw(z, y, k, shifted=True),
    "rank_n_contrast": lambda z, y, k: rank_n_contrast(z, y.nan_to_num(25.0)),
}
WITH_KERNEL = ("kernel_decoupled", "threshold", "expw", "expw_shifted")


def grad(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z)
    (found,) = torch.autograd.grad(value, z)
    return value.detach(), found


def hidden_case(views: int = 2, n: int = 6) -> tuple[Tensor, Tensor, Kernel, list[list[float]]]:
    """z, y of two columns with values missing, a fitted kernel, and its weights by a loop."""
    y, train = oracles.cohort(n, seed=4, hidden=0.3), oracles.cohort(9, seed=1, hidden=0.2)
    assert 0 < y.isnan().sum() < y.numel()
    kernel = product(age=gaussian(4.0), sex=delta("distinct")).fit(train)
    w = oracles.weights([("gaussian", 4.0, "marginal", 1.0), ("delta", 1.0, "distinct", 1.0)], train, y)
    return oracles.unit(views, n, 4, seed=2), y, kernel, w


# ---- golden values ----------------------------------------------------------------------------------------------

GOLDEN: dict[str, tuple[float, Loss]] = {
    "supcon": (10.273406270411, lambda z, y, k: supcon(z, torch.tensor([0, 0, 1, 1]))),
    "ntxent": (11.268861859602, lambda z, y, k: ntxent(z)),
    "wang align": (2.694103345718, lambda z, y, k: align_uniform(z, lambda_unif=0.0)),
    "wang uniform": (-2.068922738511, lambda z, y, k: align_uniform(z, lambda_align=0.0)),
    "wang both": (2.694103345718 - 2.068922738511, lambda z, y, k: align_uniform(z)),
    "decoupled": (-1.109585432678, lambda z, y, k: decoupled_uniformity(z)),
    "kernel decoupled": (-1.073505727246, decoupled_uniformity),
    "threshold": (11.955750891953, threshold),
    "expw formula": (11.827029845729, expw),
    "expw shifted": (14.613915615184, lambda z, y, k: expw(z, y, k, shifted=True)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_value_is_the_golden_one(name: str) -> None:
    _, z, y = oracles.golden()
    expected, loss = GOLDEN[name]
    assert loss(z, y, gaussian(5.0)).item() == pytest.approx(expected, abs=2e-12)


def test_rank_n_contrast_has_the_golden_value_on_rows_that_are_not_normalised() -> None:
    raw, _, y = oracles.golden()
    assert rank_n_contrast(raw, y).item() == pytest.approx(1.494372390025, abs=1e-12)


# ---- the equation, by loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ntxent_and_supcon_equal_a_loop(views: int, tau: float) -> None:
    z = oracles.unit(views, 6, 4)
    own = [[float(i == j) for j in range(6)] for i in range(6)]
    same = [[float(a == b) for b in LABELS] for a in LABELS]
    assert ntxent(z, tau).item() == pytest.approx(oracles.y_aware(z, own, tau), rel=1e-13)
    assert supcon(z, torch.tensor(LABELS), tau).item() == pytest.approx(oracles.y_aware(z, same, tau), rel=1e-13)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_align_uniform_equals_a_loop(views: int, alpha: float) -> None:
    z = oracles.unit(views, 6, 4)
    pairs = [(z[a][i].tolist(), z[b][i].tolist()) for a, b in combinations(range(views), 2) for i in range(6)]
    align = sum(oracles.apart(a, b) ** (alpha / 2) for a, b in pairs) / len(pairs)
    spread = oracles.uniformity(z, 3.0, "within")
    assert align_uniform(z, alpha, 3.0).item() == pytest.approx(align + spread, rel=1e-12)
    assert align_uniform(z, alpha, 3.0, 0.5, 2.0).item() == pytest.approx(align / 2 + 2 * spread, rel=1e-12)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_decoupled_uniformity_equals_a_loop(views: int) -> None:
    z = oracles.unit(views, 6, 4)
    assert decoupled_uniformity(z, t=3.0).item() == pytest.approx(oracles.decoupled(z, 3.0), rel=1e-12)


@pytest.mark.parametrize("lam", [0.01, 0.5])
def test_kernel_form_of_decoupled_uniformity_equals_a_loop(lam: float) -> None:
    z, y, kernel, w = hidden_case()
    K = torch.tensor(w, dtype=F64)
    values, vectors = torch.linalg.eigh(K)
    smoother = (vectors * (values / (values + lam)) @ vectors.T).tolist()
    expected = oracles.decoupled(z, 2.0, smoother)
    assert decoupled_uniformity(z, y, kernel, lam=lam).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_threshold_equals_a_triple_loop(views: int, tau: float) -> None:
    z, y, kernel, w = hidden_case(views)
    assert threshold(z, y, kernel, tau).item() == pytest.approx(oracles.threshold(z, w, tau), rel=1e-12)


def test_threshold_repels_the_less_alike_and_not_the_more_alike() -> None:
    """Two positives of one anchor: the nearer in age repels the farther one, not the other way round."""
    z = oracles.unit(1, 3, 4)
    y = torch.tensor([[20.0], [22.0], [30.0]], dtype=F64)
    w = oracles.weights([("gaussian", 5.0, "distinct", 1.0)], y, y)
    found = threshold(z, y, gaussian(5.0), 0.5).item()
    assert found == pytest.approx(oracles.threshold(z, w, 0.5), rel=1e-12)
    inverted = oracles.threshold(
        z, [[(1 - x) if i != j else 1.0 for j, x in enumerate(row)] for i, row in enumerate(w)], 0.5
    )
    assert abs(found - inverted) > 0.01


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("shifted", [False, True])
def test_expw_equals_a_loop(views: int, tau: float, shifted: bool) -> None:
    z, y, kernel, w = hidden_case(views)
    assert expw(z, y, kernel, tau, shifted).item() == pytest.approx(oracles.expw(z, w, tau, shifted), rel=1e-12)


def test_expw_shifts_by_the_maximum_of_each_row_not_of_all() -> None:
    """Rows of unit norm all have the maximum 1/tau; rows of other norms tell the two apart."""
    z, y, kernel, w = hidden_case()
    z = z * torch.linspace(0.5, 1.5, 6, dtype=F64)[:, None]
    assert expw(z, y, kernel, shifted=True).item() == pytest.approx(oracles.expw(z, w, 0.1, True), rel=1e-12)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_rank_n_contrast_equals_a_triple_loop_with_many_ties(views: int, tau: float) -> None:
    z, y = oracles.unit(views, 12, 4) * 3, oracles.cohort(12, seed=3)
    assert len({tuple(row) for row in y.tolist()}) < 12
    assert rank_n_contrast(z, y, tau).item() == pytest.approx(oracles.rank_n_contrast(z, y, tau), rel=1e-12)


# ---- facts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_value_is_the_same_for_a_rotation_a_permutation_and_swapped_views(name: str) -> None:
    z, y, kernel, _ = hidden_case()
    loss = LOSSES[name]
    expected = loss(z, y, kernel).item()
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert loss(z @ rotation, y, kernel).item() == pytest.approx(expected, abs=1e-12)
    assert loss(z[:, order], y[order], kernel).item() == pytest.approx(expected, abs=1e-12)
    assert loss(z.flip(0), y, kernel).item() == pytest.approx(expected, abs=1e-12)


def test_threshold_and_expw_become_what_their_weights_say_for_binary_weights() -> None:
    """Delta on the subject: threshold is NT-Xent; expw is NT-Xent with the own other view as e^0 = 1 in the sum."""
    z, subjects = oracles.unit(2, 6, 4), torch.arange(6)[:, None]
    e = z.reshape(-1, 4)
    s = e @ e.T / 0.1
    other = ~torch.eye(6, dtype=torch.bool).repeat(2, 2)
    positive = s.diagonal(6).repeat(2)
    negatives = s.where(other, -math.inf).logsumexp(1)
    assert threshold(z, subjects, delta()).item() == pytest.approx(ntxent(z).item(), abs=1e-12)
    expected = (torch.logaddexp(negatives, torch.zeros(12, dtype=F64)) - positive).mean()
    assert expw(z, subjects, delta()).item() == pytest.approx(expected.item(), abs=1e-12)


def test_kernel_form_with_the_identity_kernel_shrinks_every_centroid_alike() -> None:
    z, subjects = oracles.unit(2, 6, 4), torch.arange(6)[:, None]
    expected = oracles.decoupled(z / 1.25, 2.0)
    assert decoupled_uniformity(z, subjects, delta(), lam=0.25).item() == pytest.approx(expected, rel=1e-12)


def test_unlabelled_subject_has_only_its_own_other_view_as_positive() -> None:
    z = oracles.unit(2, 4, 4)
    same = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    found = supcon(z, torch.tensor([5.0, 5.0, math.nan, math.nan]))
    assert found.item() == pytest.approx(oracles.y_aware(z, same, 0.1), rel=1e-13)


# ---- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    z, y, kernel, _ = hidden_case()
    raw = (z * torch.linspace(0.5, 2.0, 6, dtype=F64)[:, None]).requires_grad_()

    def loss(raw: Tensor) -> Tensor:
        normalised = raw if name == "rank_n_contrast" else torch.nn.functional.normalize(raw, dim=-1)
        return LOSSES[name](normalised, y, kernel)

    assert torch.autograd.gradcheck(loss, (raw,))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", LOSSES)
def test_coincident_embeddings_give_finite_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    _, y, kernel, _ = hidden_case()
    z = torch.zeros(2, 6, 4, dtype=dtype)
    z[..., 0] = 1.0
    value, gradient = grad(lambda z: LOSSES[name](z, y, kernel), z)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_constant_metadata_gives_finite_value_and_gradient(name: str) -> None:
    z, y = oracles.unit(2, 6, 4), torch.ones(6, 2, dtype=F64)
    value, gradient = grad(lambda z: LOSSES[name](z, y, product(age=gaussian(5.0), sex=delta())), z)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_threshold_of_constant_metadata_is_zero_because_nobody_is_less_alike() -> None:
    z, y = oracles.unit(2, 6, 4), torch.ones(6, 1, dtype=F64)
    value, gradient = grad(lambda z: threshold(z, y, delta()), z)
    assert value.item() == 0
    assert not gradient.any()


def test_one_view_without_any_positive_has_value_and_gradient_zero() -> None:
    z, subjects = oracles.unit(1, 6, 4), torch.arange(6)
    for loss in (
        lambda z: supcon(z, subjects),
        lambda z: threshold(z, subjects[:, None], delta()),
        lambda z: expw(z, subjects[:, None], delta()),
    ):
        value, gradient = grad(loss, z)
        assert value.item() == 0
        assert not gradient.any()


# ---- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_fp32_agrees_with_fp64_in_value_and_gradient(name: str) -> None:
    z = oracles.unit(2, 64, 32).float()
    y, kernel = oracles.cohort(64, hidden=0.2), product(age=gaussian(4.0), sex=delta()).fit(oracles.cohort(40, seed=7))
    value, gradient = grad(lambda z: LOSSES[name](z, y.float(), kernel), z)
    exact, expected = grad(lambda z: LOSSES[name](z, y.float().double(), kernel), z.double())
    assert value.dtype == gradient.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=3e-6)
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def test_kernel_form_solves_in_fp64_where_the_kernel_is_all_but_singular() -> None:
    """200 subjects of one age: condition number 2e4 for lam = .01, 2e7 for 1e-5, past fp32."""
    z, y = oracles.unit(2, 200, 16), torch.full((200, 1), 40.0)
    y[:100] += 1e-3 * torch.arange(100)[:, None]
    exact = decoupled_uniformity(z, y.double(), gaussian(5.0), lam=1e-5)
    found = decoupled_uniformity(z.float(), y.double(), gaussian(5.0), lam=1e-5)
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_raised_to_fp32_before_anything_is_computed(name: str, half: torch.dtype) -> None:
    z, y, kernel, _ = hidden_case()
    value, gradient = grad(lambda z: LOSSES[name](z, y, kernel), z.to(half))
    assert value.dtype == torch.float32
    assert gradient.dtype == half
    assert torch.equal(value, LOSSES[name](z.to(half).float(), y, kernel))


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_z_of_another_shape_or_of_one_subject_is_refused(name: str) -> None:
    y, kernel = torch.zeros(6, 2), product(a=delta(), b=delta())
    with pytest.raises(ValueError, match=r"z has shape \(6, 4\); wanted \(V, n, D\): views, subjects, width"):
        LOSSES[name](torch.zeros(6, 4), y, kernel)
    with pytest.raises(ValueError, match=r"z has 1 subject\(s\); wanted at least 2: a pair needs two"):
        LOSSES[name](torch.zeros(2, 1, 4), y[:1], kernel)


@pytest.mark.parametrize("name", [*WITH_KERNEL, "rank_n_contrast"])
def test_y_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"y has shape \(5, 2\); wanted one row for each of 6 subjects"):
        LOSSES[name](oracles.unit(2, 6, 4), torch.zeros(5, 2), product(a=delta(), b=delta()))


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_y_that_does_not_fit_the_kernel_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"y has shape \(6, 3\); wanted \(n, 2\): one column for each of a, b"):
        LOSSES[name](oracles.unit(2, 6, 4), torch.zeros(6, 3), product(a=delta(), b=delta()))


@pytest.mark.parametrize("loss", [ntxent, align_uniform])
def test_objectives_whose_only_positive_is_the_other_view_want_two(loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"z has 1 view\(s\); wanted at least 2 of each subject"):
        loss(oracles.unit(1, 6, 4))


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels have shape \(5,\); wanted \(6,\): one label a subject"):
        supcon(oracles.unit(2, 6, 4), torch.zeros(5))


def test_decoupled_uniformity_is_plain_without_a_kernel_and_wants_y_with_one() -> None:
    z = oracles.unit(2, 6, 4)
    assert torch.equal(decoupled_uniformity(z, torch.zeros(6, 1)), decoupled_uniformity(z))
    with pytest.raises(ValueError, match=r"a kernel is given without y; wanted y \(n, k\) with it"):
        decoupled_uniformity(z, kernel=delta())


def test_kernel_form_refuses_a_kernel_that_is_not_positive_semidefinite() -> None:
    with pytest.raises(ValueError, match="missing='ignore', so it is not positive semi-definite; wanted 'marginal'"):
        decoupled_uniformity(oracles.unit(2, 6, 4), torch.zeros(6, 1), delta("ignore"))


def test_rank_n_contrast_refuses_missing_values_and_flat_labels() -> None:
    z = oracles.unit(2, 6, 4)
    with pytest.raises(ValueError, match=r"y has 2 missing value\(s\); wanted none: rank_n_contrast ranks all pairs"):
        rank_n_contrast(z, torch.tensor([[1.0], [math.nan], [2.0], [math.nan], [3.0], [4.0]]))
    with pytest.raises(ValueError, match=r"y has shape \(6,\); wanted \(n, k\)"):
        rank_n_contrast(z, torch.zeros(6))


def test_numbers_that_mean_nothing_are_refused_by_name() -> None:
    z, y = oracles.unit(2, 6, 4), torch.zeros(6, 1)
    refusals: list[tuple[Callable[[], Tensor], str]] = [
        (lambda: ntxent(z, tau=0.0), "tau"),
        (lambda: supcon(z, y[:, 0], tau=0.0), "tau"),
        (lambda: align_uniform(z, alpha=0.0), "alpha"),
        (lambda: align_uniform(z, t=0.0), "t"),
        (lambda: decoupled_uniformity(z, t=0.0), "t"),
        (lambda: decoupled_uniformity(z, y, delta(), lam=0.0), "lam"),
        (lambda: threshold(z, y, delta(), tau=0.0), "tau"),
        (lambda: expw(z, y, delta(), tau=0.0), "tau"),
        (lambda: rank_n_contrast(z, y, tau=0.0), "tau"),
    ]
    for loss, letter in refusals:
        with pytest.raises(ValueError, match=f"^{letter} is 0.0; wanted a number above 0"):
            loss()


def test_uniformity_of_align_uniform_is_the_one_within_views() -> None:
    z = oracles.unit(2, 6, 4)
    assert align_uniform(z, lambda_align=0.0).item() == pytest.approx(uniformity(z).item(), abs=1e-15)
