"""What holds for every objective alike: invariance, gradients by finite differences, precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cauc_dist.kernels import delta, gaussian, product
from cauc_dist.losses import similar, tiled
from tests import oracles
from tests.losses.cases import DENSE, EVERY, ON_SPHERE, SUPERVISED, TILED, grad, hidden_case


@pytest.mark.parametrize("name", ON_SPHERE)
def test_value_is_the_same_for_a_rotation(name: str) -> None:
    z, y, kernel, _ = hidden_case()
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    expected = EVERY[name](z, y, kernel).item()
    assert EVERY[name](z @ rotation, y, kernel).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_value_is_the_same_for_a_permutation_and_swapped_views(name: str) -> None:
    z, y, kernel, _ = hidden_case()
    loss = EVERY[name]
    expected = loss(z, y, kernel).item()
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert loss(z[:, order], y[order], kernel).item() == pytest.approx(expected, abs=1e-12)
    assert loss(z.flip(0), y, kernel).item() == pytest.approx(expected, abs=1e-12)


OFF_SPHERE = ["rank_n_contrast", *SUPERVISED]


def raw_loss(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a function of rows of any norm, and such rows."""
    z, y, kernel, _ = hidden_case()

    def loss(raw: Tensor) -> Tensor:
        z = raw if name in OFF_SPHERE else torch.nn.functional.normalize(raw, dim=-1)
        return EVERY[name](z, y, kernel)

    return loss, (z * torch.linspace(0.5, 2.0, 6, dtype=torch.float64)[:, None]).requires_grad_()


@pytest.mark.parametrize("name", [*DENSE, *SUPERVISED])
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    loss, raw = raw_loss(name)
    assert torch.autograd.gradcheck(loss, (raw,))


@pytest.mark.parametrize("rows", [2, 512], ids=["small tiles", "one tile"])
@pytest.mark.parametrize("name", TILED)
def test_gradient_of_tiles_is_that_of_finite_differences(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.ROWS, "cpu", rows)
    monkeypatch.setattr(similar, "SMALL", 512 if rows == 512 else 0)
    loss, raw = raw_loss(name)
    assert torch.autograd.gradcheck(loss, (raw,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_coincident_embeddings_give_finite_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    _, y, kernel, _ = hidden_case()
    z = torch.zeros(2, 6, 4, dtype=dtype)
    z[..., 0] = 1.0
    value, gradient = grad(lambda z: EVERY[name](z, y, kernel), z)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_constant_metadata_gives_finite_value_and_gradient(name: str) -> None:
    z, y = oracles.unit(2, 6, 4), torch.ones(6, 2, dtype=torch.float64)
    value, gradient = grad(lambda z: EVERY[name](z, y, product(age=gaussian(5.0), sex=delta())), z)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_two_subjects_are_enough(name: str) -> None:
    z, y = oracles.unit(2, 2, 4), torch.tensor([[20.0, 0.0], [29.0, 1.0]], dtype=torch.float64)
    assert EVERY[name](z, y, product(age=gaussian(5.0), sex=delta("distinct"))).isfinite()


@pytest.mark.parametrize("name", EVERY)
def test_fp32_agrees_with_fp64_in_value_and_gradient(name: str) -> None:
    """Of ages in years, whose fp32 and fp64 forms are the same numbers."""
    loss, z = EVERY[name], oracles.unit(2, 64, 32).float()
    y, kernel = oracles.cohort(64, hidden=0.2), product(age=gaussian(4.0), sex=delta()).fit(oracles.cohort(40, seed=7))
    value, gradient = grad(lambda z: loss(z, y.float(), kernel), z)
    exact, expected = grad(lambda z: loss(z, y, kernel), z.double())
    assert value.dtype == gradient.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=3e-6)
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_raised_to_fp32_before_anything_is_computed(name: str, half: torch.dtype) -> None:
    z, y, kernel, _ = hidden_case()
    value, gradient = grad(lambda z: EVERY[name](z, y, kernel), z.to(half))
    assert value.dtype == torch.float32
    assert gradient.dtype == half
    assert torch.equal(value, EVERY[name](z.to(half).float(), y, kernel))


@pytest.mark.parametrize("n", [64, 600])
@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_not_one_bit(name: str, n: int) -> None:
    """Products in bf16 would move cosines by 8e-3; most trainers call their loss inside autocast."""
    z, y = oracles.unit(2, n, 16).float(), oracles.cohort(n)
    kernel = product(age=gaussian(5.0), sex=delta())
    value, slope = grad(lambda z: EVERY[name](z, y, kernel), z)

    def inside(z: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return EVERY[name](z, y, kernel)

    found, found_slope = grad(inside, z)
    assert found.dtype == value.dtype
    assert torch.equal(found, value)
    assert torch.equal(found_slope, slope)
