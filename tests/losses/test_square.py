"""The 2x2 of alignment and uniformity, plain or conditional: golden values, loops, limits, and how they connect."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cauc_dist.kernels import Kernel, cauchy, delta, gaussian, product
from cauc_dist.losses import align_cunif, align_uniform, calign_unif, cauc, similar, tiled
from tests import oracles
from tests.losses import dense_oracle as dense
from tests.losses.cases import grad, hidden_case

F64 = torch.float64
SUBJECTS = torch.arange(6, dtype=F64)[:, None]
VIEWS = ("within", "pooled")
Loss = Callable[[Tensor], Tensor]


def square(y: Tensor, kernel: Kernel, **given: Any) -> dict[str, Loss]:
    """The four corners, of the same t, lambda_align and lambda_unif."""
    return {
        "plain, global": partial(align_uniform, **given),
        "conditional, global": lambda z: calign_unif(z, y, kernel, **given),
        "plain, conditional": lambda z: align_cunif(z, y, kernel, **given),
        "conditional, conditional": lambda z: cauc(z, y, kernel, **given),
    }


# ---- golden values, and the equations by loop ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (calign_unif, 2 * 2.874607852282 - 2.068922738511),
        (align_cunif, 2 * 2.694103345718 - 1.944999565730),
        (partial(calign_unif, normalise_align="global"), 2 * 2.711392375310 - 2.068922738511),
        (partial(align_cunif, normalise_unif="row"), 2 * 2.694103345718 - 1.983946234467),
        (partial(align_cunif, views="pooled"), 2 * 2.694103345718 - 2.200956752526),
    ],
    ids=["calign_unif", "align_cunif", "calign_unif global", "align_cunif by row", "align_cunif pooled"],
)
def test_value_is_the_golden_one(loss: Callable[..., Tensor], expected: float) -> None:
    """The numbers of each term are those of test_paper.py and test_baselines.py; lambda_align is t = 2."""
    _, z, y = oracles.golden()
    assert loss(z, y, gaussian(5.0)).item() == pytest.approx(expected, abs=4e-12)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("normalise", ["row", "global"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_calign_unif_equals_a_loop(count: int, normalise: Any, views: Any) -> None:
    z, kernel = oracles.unit(count, 6, 4), gaussian(4.0)  # no row without weight, also for one view
    w = oracles.weights([("gaussian", 4.0, "distinct", 1.0)], SUBJECTS, SUBJECTS)
    expected = 0.7 * oracles.conditional_alignment(z, w, 1.0, normalise) + 3 * oracles.uniformity(z, 5.0, views)
    found = calign_unif(z, SUBJECTS, kernel, 5.0, 1.0, 0.7, 3.0, normalise, views)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("labels", [None, [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]])
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("normalise", ["row", "global"])
@pytest.mark.parametrize("count", [2, 3])
def test_align_cunif_equals_a_loop(count: int, normalise: Any, views: Any, labels: list[float] | None) -> None:
    z, y, kernel, w = hidden_case(count)
    spread = oracles.conditional_uniformity(z, w, 5.0, normalise, views, labels)
    expected = 0.7 * oracles.view_alignment(z, 1.0) + 3 * spread
    within = None if labels is None else torch.tensor(labels)
    found = align_cunif(z, y, kernel, 5.0, 1.0, 0.7, 3.0, normalise, views, within)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_align_uniform_of_pooled_views_equals_a_loop(count: int) -> None:
    z = oracles.unit(count, 6, 4)
    expected = 0.7 * oracles.view_alignment(z, 1.0) + 3 * oracles.uniformity(z, 5.0, "pooled")
    assert align_uniform(z, 1.0, 5.0, 0.7, 3.0, "pooled").item() == pytest.approx(expected, rel=1e-12)


# ---- how the four connect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [2.0, 5.0])
def test_three_weigh_the_alignment_with_t_by_default_and_align_uniform_with_1(t: float) -> None:
    z, y, kernel, _ = hidden_case()
    for name, loss in square(y, kernel, t=t).items():
        weight = 1.0 if name == "plain, global" else t
        assert torch.equal(loss(z), square(y, kernel, t=t, lambda_align=weight, lambda_unif=1.0)[name](z)), name


@pytest.mark.parametrize("views", VIEWS)
def test_what_one_term_changes_does_not_depend_on_the_other(views: str) -> None:
    """cauc - calign_unif = align_cunif - align_uniform, in value and gradient: the square has no interaction."""
    z, y, kernel, _ = hidden_case()
    given = {"t": 3.0, "alpha": 2.0, "lambda_align": 0.7, "lambda_unif": 3.0, "views": views}
    value, slope = {}, {}
    for name, loss in square(y, kernel, **given).items():
        value[name], slope[name] = grad(loss, z)
    for of in (value, slope):
        one = of["conditional, conditional"] - of["conditional, global"]
        other = of["plain, conditional"] - of["plain, global"]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert float(one.abs().max()) > 1e-2


@pytest.mark.parametrize("kernel", [delta(), gaussian(1e-3), cauchy(1e18)], ids=["delta", "sigma to 0", "gamma to inf"])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_where_nobody_is_like_another_all_four_are_one(kernel: Kernel, alpha: float) -> None:
    z = oracles.unit(2, 6, 4)
    given = {"t": 3.0, "alpha": alpha, "lambda_align": 0.7, "lambda_unif": 1.3}
    expected = 0.7 * oracles.view_alignment(z, alpha) + 1.3 * oracles.uniformity(z, 3.0, "within")
    for name, loss in square(SUBJECTS, kernel, **given).items():
        assert loss(z).item() == pytest.approx(expected, abs=1e-12), name


def test_where_all_are_alike_nobody_is_repelled_by_the_conditional_uniformity() -> None:
    """Constant metadata: that term is 0, without gradient; what is left is the alignment, of views or of all."""
    z, y = oracles.unit(2, 6, 4), torch.full((6, 1), 31.4, dtype=F64)
    ones = [[1.0] * 6] * 6
    four = square(y, gaussian(5.0), t=3.0, lambda_align=0.7)
    plain, every = 0.7 * oracles.view_alignment(z, 2.0), 0.7 * oracles.conditional_alignment(z, ones, 2.0, "row")
    spread = oracles.uniformity(z, 3.0, "within")
    wanted = {
        "plain, global": plain + spread,
        "conditional, global": every + spread,
        "plain, conditional": plain,
        "conditional, conditional": every,
    }
    for name, loss in four.items():
        assert loss(z).item() == pytest.approx(wanted[name], abs=1e-12), name
    _, found = grad(four["plain, conditional"], z)
    _, alone = grad(partial(align_uniform, lambda_align=0.7, lambda_unif=0.0), z)
    assert torch.equal(found, alone)


def test_a_growing_sigma_goes_from_the_plain_square_to_no_repulsion() -> None:
    """From sigma 0 to infinity: cauc leaves align_uniform, and its difference to the all-alike limit goes to 0."""
    z, y = oracles.unit(2, 6, 4), 10 * SUBJECTS
    ones = [[1.0] * 6] * 6
    far = 2 * oracles.conditional_alignment(z, ones, 2.0, "row") + oracles.uniformity(z, 2.0, "within")
    gaps = [abs(calign_unif(z, y, gaussian(sigma)).item() - far) for sigma in (1e-2, 10.0, 1e3, 1e5)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert gaps[-1] < 1e-6


# ---- value and gradient in tiles --------------------------------------------------------------------------------


@pytest.fixture
def tiled_case(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Kernel]:
    """z, y with values missing, its kernel; in tiles of which the last is ragged."""
    monkeypatch.setitem(tiled.ROWS, "cpu", 7)
    monkeypatch.setattr(similar, "SMALL", 0)
    kernel = product(age=gaussian(4.0), sex=delta("distinct")).fit(oracles.cohort(11, seed=1))
    return oracles.unit(2, 23, 6), oracles.cohort(23, hidden=0.2), kernel


def same(ours: Loss, theirs: Loss, z: Tensor) -> None:
    (value, slope), (wanted, expected) = grad(ours, z), grad(theirs, z)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert float((slope - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("normalise", ["row", "global"])
def test_value_and_gradient_in_ragged_tiles_are_those_of_the_dense_form(
    normalise: Any, views: Any, tiled_case: tuple[Tensor, Tensor, Kernel]
) -> None:
    z, y, kernel = tiled_case
    w, c = kernel(y), kernel.complement(y)
    same(
        lambda z: calign_unif(z, y, kernel, 4.0, 2.0, 0.7, 3.0, normalise, views),
        lambda z: 0.7 * dense.conditional_alignment(z, w, 2.0, normalise) + 3 * dense.uniformity(z, 4.0, views),
        z,
    )
    same(
        lambda z: align_cunif(z, y, kernel, 4.0, 2.0, 0.7, 3.0, normalise, views),
        lambda z: 0.7 * dense.view_alignment(z) + 3 * dense.conditional_uniformity(z, c, 4.0, normalise, views),
        z,
    )
