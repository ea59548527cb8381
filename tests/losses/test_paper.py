import math
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from cauc_dist.kernels import Kernel, cauchy, delta, gaussian, mean, product
from cauc_dist.losses import (
    align_uniform,
    cauc,
    conditional_alignment,
    conditional_uniformity,
    ntxent,
    supcon,
    uniformity,
    y_aware_infonce,
)
from tests import oracles
from tests.losses.cases import Loss, grad, hidden_case, tangent

F64 = torch.float64
Views = Literal["within", "pooled"]
VIEWS: tuple[Views, ...] = get_args(Views)


# ---- golden values ----------------------------------------------------------------------------------------------

GOLDEN: dict[str, tuple[float, Loss]] = {
    "y_aware": (12.171384392422, y_aware_infonce),
    "y_aware as published": (24.335521585375, lambda z, y, k: y_aware_infonce(z, y, k, normalise="column")),
    "alignment row": (2.874607852282, conditional_alignment),
    "alignment global": (2.711392375310, lambda z, y, k: conditional_alignment(z, y, k, normalise="global")),
    "uniformity": (-2.068922738511, lambda z, y, k: uniformity(z)),
    "within global": (-1.944999565730, conditional_uniformity),
    "within row": (-1.983946234467, lambda z, y, k: conditional_uniformity(z, y, k, normalise="row")),
    "pooled global": (-2.200956752526, lambda z, y, k: conditional_uniformity(z, y, k, views="pooled")),
    "pooled row": (
        -2.239080583823,
        lambda z, y, k: conditional_uniformity(z, y, k, normalise="row", views="pooled"),
    ),
    "cauc": (2 * 2.874607852282 - 1.944999565730, cauc),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_value_is_the_golden_one(name: str) -> None:
    _, z, y = oracles.golden()
    expected, loss = GOLDEN[name]
    assert loss(z, y, gaussian(5.0)).item() == pytest.approx(expected, abs=2e-12)


def test_product_of_age_and_sex_has_the_golden_value() -> None:
    _, z, age = oracles.golden()
    y = torch.cat([age, torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=F64)], 1)
    value = y_aware_infonce(z, y, product(age=gaussian(5.0), sex=delta()))
    assert value.item() == pytest.approx(11.269945960655, abs=1e-12)


# ---- the equation, by loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("normalise", ["row", "column"])
def test_y_aware_equals_a_loop(views: int, tau: float, normalise: Literal["row", "column"]) -> None:
    z, y, _, _ = hidden_case(views)
    train = oracles.cohort(9, seed=1, hidden=0.2)
    kernel = mean([1, 2], age=gaussian(4.0), sex=delta()).fit(train)  # no row without weight, also for one view
    w = oracles.weights([("gaussian", 4.0, "marginal", 1.0), ("delta", 1.0, "marginal", 2.0)], train, y, mean=True)
    expected = oracles.y_aware(z, w, tau, column=normalise == "column")
    assert y_aware_infonce(z, y, kernel, tau, normalise).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("normalise", ["row", "global"])
def test_conditional_alignment_equals_a_loop(views: int, alpha: float, normalise: Literal["row", "global"]) -> None:
    z, y, kernel, w = hidden_case(views)
    expected = oracles.conditional_alignment(z, w, alpha, normalise)
    assert conditional_alignment(z, y, kernel, alpha, normalise).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("t", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("views", VIEWS)
def test_uniformity_equals_a_loop(count: int, t: float, views: Views) -> None:
    z = oracles.unit(count, 6, 4)
    assert uniformity(z, t, views).item() == pytest.approx(oracles.uniformity(z, t, views), rel=1e-12)


@pytest.mark.parametrize("labels", [None, [0.0, 1.0, 0.0, 0.0, 1.0, 2.0]])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("normalise", ["global", "row"])
@pytest.mark.parametrize("views", VIEWS)
def test_conditional_uniformity_equals_a_loop(
    labels: list[float] | None, count: int, normalise: Literal["global", "row"], views: Views
) -> None:
    z, y, kernel, w = hidden_case(count)
    expected = oracles.conditional_uniformity(z, w, 2.0, normalise, views, labels)
    within = None if labels is None else torch.tensor(labels)
    found = conditional_uniformity(z, y, kernel, normalise=normalise, views=views, within=within)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_cauc_is_its_two_terms_with_every_option_passed_on() -> None:
    z, y, kernel, w = hidden_case()
    site = [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    expected = 0.7 * oracles.conditional_alignment(z, w, 1.0, "global") + 3 * oracles.conditional_uniformity(
        z, w, 5.0, "row", "pooled", site
    )
    found = cauc(z, y, kernel, 5.0, 1.0, 0.7, 3.0, "global", "row", "pooled", torch.tensor(site))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_cauc_weighs_the_alignment_with_t_by_default() -> None:
    z, y, kernel, _ = hidden_case()
    for t in (2.0, 5.0):
        assert torch.equal(cauc(z, y, kernel, t), cauc(z, y, kernel, t, lambda_align=t, lambda_unif=1.0))
    only = cauc(z, y, kernel, lambda_align=0.0)
    torch.testing.assert_close(only, conditional_uniformity(z, y, kernel), rtol=0, atol=1e-15)


# ---- exact facts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5, 1.0])
def test_fact_1_y_aware_is_alignment_plus_a_uniformity(tau: float) -> None:
    z, y, kernel, _ = hidden_case()

    def split(z: Tensor) -> Tensor:
        e = z.reshape(-1, z.shape[-1])
        own = torch.eye(len(e), dtype=torch.bool)
        d = (e[:, None] - e[None, :]).square().sum(-1)
        terms = torch.exp(-d / (2 * tau)).masked_fill(own, 0).sum(1) / (len(e) - 1)
        return conditional_alignment(z, y, kernel) / (2 * tau) + terms.log().mean() + math.log(len(e) - 1)

    value, gradient = grad(lambda z: y_aware_infonce(z, y, kernel, tau), z)
    expected, other = grad(split, z)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(tangent(gradient, z), tangent(other, z), rtol=0, atol=1e-12)


def test_fact_1_gives_the_default_weights_the_pull_of_tau_one_tenth() -> None:
    """tau = .1: alignment weight 5 and t = 5, so cauc at t = 5 weighs its alignment as y-aware does."""
    z, y, kernel, _ = hidden_case()
    pull = cauc(z, y, kernel, t=5.0) - conditional_uniformity(z, y, kernel, t=5.0)
    assert pull.item() == pytest.approx(conditional_alignment(z, y, kernel).item() / (2 * 0.1), abs=1e-12)


SUBJECTS = torch.arange(6, dtype=F64)[:, None]


@pytest.mark.parametrize("kernel", [delta(), gaussian(1e-3), cauchy(1e18)], ids=["delta", "gaussian", "cauchy"])
def test_fact_2_kernel_on_the_subject_gives_the_unconditional_objectives(kernel: Kernel) -> None:
    z = oracles.unit(2, 6, 4)
    found = {
        "alignment": conditional_alignment(z, SUBJECTS, kernel, alpha=3.0) + uniformity(z),
        "alignment global": conditional_alignment(z, SUBJECTS, kernel, 3.0, "global") + uniformity(z),
        "both": conditional_alignment(z, SUBJECTS, kernel, 3.0) + conditional_uniformity(z, SUBJECTS, kernel),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(align_uniform(z, alpha=3.0).item(), abs=1e-12), name
    alone = conditional_uniformity(z, SUBJECTS, kernel).item()
    assert alone == pytest.approx(oracles.uniformity(z, 2.0, "within"), abs=1e-12)
    assert y_aware_infonce(z, SUBJECTS, kernel).item() == pytest.approx(ntxent(z).item(), abs=1e-12)


def test_fact_2_kernel_on_the_class_makes_y_aware_supcon() -> None:
    z, labels = oracles.unit(2, 6, 4), torch.tensor([0, 1, 1, 2, 0, 1])
    assert y_aware_infonce(z, labels[:, None], delta()).item() == pytest.approx(supcon(z, labels).item(), abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("normalise", ["global", "row"])
@pytest.mark.parametrize("views", VIEWS)
def test_fact_3_constant_metadata_has_value_and_gradient_zero(
    views: Views, normalise: Literal["global", "row"], dtype: torch.dtype
) -> None:
    y = torch.tensor([[31.4, 1.0]], dtype=F64).expand(6, 2)
    for kernel in (product(age=gaussian(5.0), sex=delta()), mean([0.1, 0.7], age=cauchy(5.0), sex=delta())):
        value, gradient = grad(
            lambda z, kernel=kernel: conditional_uniformity(z, y, kernel, 2.0, normalise, views),  # type: ignore[misc]
            oracles.unit(2, 6, 4).to(dtype),
        )
        assert value.item() == 0
        assert value.dtype == dtype
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_fact_3_holds_where_every_subject_has_a_site_of_its_own() -> None:
    z, y, kernel, _ = hidden_case()
    value, gradient = grad(lambda z: conditional_uniformity(z, y, kernel, within=torch.arange(6)), z)
    assert value.item() == 0
    assert not gradient.any()


# ---- gradients --------------------------------------------------------------------------------------------------


def test_y_aware_gradient_is_its_closed_form() -> None:
    """dz_i = (1/(tau M)) sum_j [ e^{s_ij-lse_i} + e^{s_ij-lse_j} - w_ij (1/W_i + 1/W_j) ] z_j"""
    z, y, kernel, w = hidden_case()
    tau, e = 0.2, z.reshape(-1, 4)
    own = torch.eye(12, dtype=torch.bool)
    s = (e @ e.T / tau).masked_fill(own, -math.inf)
    lse = s.logsumexp(1)
    pair = torch.tensor(w, dtype=F64).repeat(2, 2).masked_fill(own, 0)
    mass = pair.sum(1)
    coefficient = (s - lse[:, None]).exp() + (s - lse[None]).exp() - pair * (1 / mass[:, None] + 1 / mass[None])
    _, gradient = grad(lambda z: y_aware_infonce(z, y, kernel, tau), z)
    torch.testing.assert_close(gradient.reshape(-1, 4), coefficient @ e / (tau * 12), rtol=0, atol=1e-13)


@pytest.mark.parametrize("normalise", ["global", "row"])
def test_conditional_uniformity_gradient_is_its_closed_form_in_the_tangent_plane(
    normalise: Literal["global", "row"],
) -> None:
    """dL/dz_i^v = -(4t/(V S_v)) sum_j c_ij e^{-t d_ij} (z_i^v - z_j^v); row: c_ij (1/R_i + 1/R_j)/2 for c_ij"""
    z, y, kernel, w = hidden_case()
    t, c = 2.0, 1 - torch.tensor(w, dtype=F64)
    if normalise == "row":
        c = c * (1 / c.sum(1)[:, None] + 1 / c.sum(1)[None]) / 2
    expected = torch.zeros_like(z)
    for v in range(2):
        apart = z[v][:, None] - z[v][None]  # (n, n, D)
        terms = c * torch.exp(-t * apart.square().sum(-1))
        expected[v] = -4 * t / (2 * terms.sum()) * (terms[..., None] * apart).sum(1)
    _, gradient = grad(lambda z: conditional_uniformity(z, y, kernel, t, normalise), z)
    torch.testing.assert_close(tangent(gradient, z), tangent(expected, z), rtol=0, atol=1e-13)


def test_uniformity_of_differences_has_another_gradient_in_the_radial_part_only() -> None:
    z = oracles.unit(1, 6, 4)

    def by_difference(z: Tensor) -> Tensor:
        d = (z[0][:, None] - z[0][None]).square().sum(-1)[~torch.eye(6, dtype=torch.bool)]
        return torch.exp(-2 * d).mean().log()

    (_, ours), (_, other) = grad(uniformity, z), grad(by_difference, z)
    torch.testing.assert_close(tangent(ours, z), tangent(other, z), rtol=0, atol=1e-13)
    assert (ours - other).abs().max() > 0.01


# ---- edges ------------------------------------------------------------------------------------------------------


def test_one_view_without_any_positive_has_value_and_gradient_zero() -> None:
    for loss in (
        lambda z: y_aware_infonce(z, SUBJECTS, delta()),
        lambda z: y_aware_infonce(z, SUBJECTS, delta(), normalise="column"),
        lambda z: conditional_alignment(z, SUBJECTS, delta()),
        lambda z: conditional_alignment(z, SUBJECTS, delta(), normalise="global"),
    ):
        value, gradient = grad(loss, oracles.unit(1, 6, 4))
        assert value.item() == 0
        assert not gradient.any()


def test_sharp_temperatures_do_not_underflow_in_fp32() -> None:
    """e^{-t d} is below the smallest fp32 number for opposite embeddings from t = 26 on."""
    z = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    y = torch.arange(4.0)[:, None]
    assert uniformity(z, t=120.0).item() == pytest.approx(-240 + math.log(8 / 12), rel=1e-6)
    assert conditional_uniformity(z, y, delta(), t=120.0).item() == pytest.approx(-240 + math.log(8 / 12), rel=1e-6)
    assert y_aware_infonce(z, y, gaussian(1.0), tau=0.004).isfinite()


def test_pairs_of_nearly_equal_metadata_still_repel_in_fp32() -> None:
    """1 - w is 2e-14 here: 1 - exp(-x) in fp32 is 0, and the term would vanish."""
    z, y = oracles.unit(2, 4, 4).float(), torch.tensor([[0.0], [1e-6], [2e-6], [3e-6]])
    found = conditional_uniformity(z, y, gaussian(5.0))
    assert found.item() == pytest.approx(conditional_uniformity(z.double(), y.double(), gaussian(5.0)).item(), rel=1e-5)
    assert found.item() < -0.01


def test_subject_without_a_site_repels_nobody() -> None:
    z, y, kernel, w = hidden_case()
    site = [0.0, 0.0, 0.0, math.nan, 1.0, 1.0]
    expected = oracles.conditional_uniformity(z, w, 2.0, "global", "within", [0, 0, 0, 9, 1, 1])
    assert conditional_uniformity(z, y, kernel, within=torch.tensor(site)).item() == pytest.approx(expected, rel=1e-12)
