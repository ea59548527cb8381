import math
from itertools import combinations

import pytest
import torch

from cauc_dist.kernels import delta, gaussian
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
from tests.losses.cases import Loss, grad, hidden_case

F64 = torch.float64
LABELS = [0, 1, 1, 2, 0, 1]


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


def test_kernel_form_solves_in_fp64_where_the_kernel_is_all_but_singular() -> None:
    """200 subjects of one age: condition number 2e4 for lam = .01, 2e7 for 1e-5, past fp32."""
    z, y = oracles.unit(2, 200, 16), torch.full((200, 1), 40.0)
    y[:100] += 1e-3 * torch.arange(100)[:, None]
    exact = decoupled_uniformity(z, y.double(), gaussian(5.0), lam=1e-5)
    found = decoupled_uniformity(z.float(), y.double(), gaussian(5.0), lam=1e-5)
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_decoupled_uniformity_without_a_kernel_does_not_look_at_y() -> None:
    z = oracles.unit(2, 6, 4)
    assert torch.equal(decoupled_uniformity(z, torch.zeros(6, 1)), decoupled_uniformity(z))


def test_uniformity_of_align_uniform_is_the_one_within_views() -> None:
    z = oracles.unit(2, 6, 4)
    assert align_uniform(z, lambda_align=0.0).item() == pytest.approx(uniformity(z).item(), abs=1e-15)
