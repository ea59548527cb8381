"""Supervised objectives: loops, what torch has of them, missing values, and logits that are large."""

import math

import pytest
import torch
import torch.nn.functional as F

from cauc_dist.losses import cross_entropy, squared_error
from tests import oracles
from tests.losses.cases import grad

F64 = torch.float64
LABELS = [0.0, 2.0, math.nan, 1.0, 1.0, math.nan]


@pytest.mark.parametrize("views", [1, 2, 3])
def test_cross_entropy_equals_a_loop_over_labelled_subjects(views: int) -> None:
    z = oracles.unit(views, 6, 4) * 3
    found = cross_entropy(z, torch.tensor(LABELS))
    assert found.item() == pytest.approx(oracles.cross_entropy(z, LABELS), rel=1e-13)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("columns", [1, 2, 4])
def test_squared_error_equals_a_loop_over_known_values(views: int, columns: int) -> None:
    z, y = oracles.unit(views, 6, 4) * 3, oracles.cohort(6, hidden=0.3).repeat(1, 2)[:, :columns]
    assert y.isnan().any()
    assert squared_error(z, y).item() == pytest.approx(oracles.squared_error(z, y), rel=1e-13)


def test_values_are_the_golden_ones() -> None:
    """Computed by loops over math.exp and math.log in float64."""
    raw, _, y = oracles.golden()
    assert cross_entropy(raw, torch.tensor([0.0, 1.0, math.nan, 4.0])).item() == pytest.approx(
        1.833992337235547, abs=1e-12
    )
    assert squared_error(raw, (y - 40) / 20).item() == pytest.approx(1.273890854943260, abs=1e-12)


def test_value_and_gradient_are_those_of_torch_on_the_labelled() -> None:
    z, y = oracles.unit(2, 6, 4) * 3, oracles.cohort(6, hidden=0.3)
    labels = torch.tensor(LABELS)
    codes = labels.nan_to_num(-100).long().repeat(2)
    known = ~y.isnan().repeat(2, 1)
    pairs = [
        (
            lambda z: cross_entropy(z, labels),
            lambda z: F.cross_entropy(z.reshape(12, 4), codes),
        ),
        (
            lambda z: squared_error(z, y),
            lambda z: F.mse_loss(z.reshape(12, 4)[:, :2][known], y.repeat(2, 1)[known]),
        ),
    ]
    for ours, theirs in pairs:
        value, slope = grad(ours, z)
        wanted, expected = grad(theirs, z)
        torch.testing.assert_close(value, wanted, rtol=1e-13, atol=0)
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-15)


def test_a_subject_without_a_label_and_a_column_nobody_asks_for_have_no_gradient() -> None:
    z = oracles.unit(2, 6, 4)
    _, slope = grad(lambda z: cross_entropy(z, torch.tensor(LABELS)), z)
    assert not slope[:, [2, 5]].any()
    assert slope[:, [0, 1, 3, 4]].all()
    _, slope = grad(lambda z: squared_error(z, torch.ones(6, 1, dtype=F64)), z)
    assert not slope[..., 1:].any()


def test_a_batch_without_any_label_has_value_and_gradient_zero() -> None:
    for loss in (
        lambda z: cross_entropy(z, torch.full((6,), math.nan)),
        lambda z: squared_error(z, torch.full((6, 2), math.nan)),
    ):
        value, slope = grad(loss, oracles.unit(2, 6, 4))
        assert value.item() == 0
        assert not slope.any()


def test_logits_of_thousands_neither_overflow_nor_lose_the_value() -> None:
    z = torch.tensor([[[5000.0, -5000.0], [5000.0, -5000.0]]])
    assert cross_entropy(z, torch.tensor([0.0, 0.0])).item() == 0
    assert cross_entropy(z, torch.tensor([1.0, 0.0])).item() == 5000


def test_z_is_not_normalised() -> None:
    z = oracles.unit(2, 6, 4)
    labels, y = torch.tensor(LABELS), torch.ones(6, 1, dtype=F64)
    assert abs(cross_entropy(2 * z, labels) - cross_entropy(z, labels)) > 1e-3
    assert abs(squared_error(2 * z, y) - squared_error(z, y)) > 1e-3
