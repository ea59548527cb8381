"""Each optimiser is its paper's; what decays, and at which rate, is what the run says."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from cauc_dist import encoders
from cauc_dist.config import Encoder, Optim
from cauc_dist.errors import BadInput
from cauc_dist.optimisers import learning_rate, make, moments, peak_lr

Array = NDArray[np.float64]
LR, DECAY, B1, B2, MOMENTUM, EPS = 0.03, 0.1, 0.8, 0.95, 0.7, 1e-8


def adamw(w: Array, gradients: list[Array], decay: float) -> Array:
    """arXiv 1711.05101, algorithm 2."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        w = w - LR * decay * w - LR * (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
    return w


def adam(w: Array, gradients: list[Array], decay: float) -> Array:
    """arXiv 1412.6980, algorithm 1, with an L2 term."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + decay * w
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        w = w - LR * (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
    return w


def sgd(w: Array, gradients: list[Array], decay: float) -> Array:
    """torch.optim.SGD's page: b_1 = g_1, b_t = mu b + g_t."""
    b = None
    for gradient in gradients:
        g = gradient + decay * w
        b = g if b is None else MOMENTUM * b + g
        w = w - LR * b
    return w


def lars(w: Array, gradients: list[Array], decay: float) -> Array:
    """arXiv 1708.03888, algorithm 1, at one learning rate all along; SGD for vectors, as in arXiv 2002.05709."""
    v = np.zeros_like(w)
    for g in gradients:
        local = 1e-3 * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w)) if w.ndim > 1 else 1.0
        v = MOMENTUM * v + LR * local * (g + decay * w)
        w = w - v
    return w


FORMULAS: list[Callable[[Array, list[Array], float], Array]] = [adamw, adam, sgd, lars]


def settings(name: str) -> Optim:
    return Optim(name=name, weight_decay=DECAY, betas=(B1, B2), momentum=MOMENTUM)  # type: ignore[arg-type]


@pytest.mark.parametrize("formula", FORMULAS)
def test_three_updates_are_those_of_the_paper_and_vectors_do_not_decay(formula: Callable[..., Array]) -> None:
    model = nn.Linear(5, 4, dtype=torch.float64)
    optimizer = make(settings(formula.__name__), model, LR, fused=False)
    draw = np.random.default_rng(0)
    before = [p.detach().numpy().copy() for p in model.parameters()]
    gradients = [draw.normal(size=(3, *p.shape)) for p in model.parameters()]
    for step in range(3):
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = torch.from_numpy(g[step].copy())
        optimizer.step()
    for p, w, g, decay in zip(model.parameters(), before, gradients, (DECAY, 0.0), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), formula(w, list(g), decay), rtol=1e-12)
        assert np.abs(p.detach().numpy() - w).max() > 1e-5
        kept = {key for key, value in optimizer.state[p].items() if value.shape == p.shape}
        assert kept == set(moments(settings(formula.__name__)))  # all that there is to save


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lars"])
def test_moments_of_zero_are_a_fresh_start_to_the_bit(name: str) -> None:
    ends = []
    for zeros in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        optimizer = make(settings(name), model, LR, fused=False)
        for p in model.parameters() if zeros else ():
            counted = {"step": torch.tensor(0.0)} if name.startswith("adam") else {}
            optimizer.state[p] = {**counted, **{key: torch.zeros_like(p) for key in moments(settings(name))}}
        for _ in range(2):
            optimizer.zero_grad()
            (model(torch.ones(3, 5)) ** 2).sum().backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(fresh, loaded) for fresh, loaded in zip(*ends, strict=True))


def test_filters_and_matrices_decay_norms_and_biases_do_not_and_what_is_frozen_is_left_out() -> None:
    encoder = encoders.build(Encoder(), (1, 16, 16, 16))
    frozen = next(encoder.parameters()).requires_grad_(False)
    decay, none = make(settings("adamw"), encoder, LR, fused=False).param_groups
    assert (decay["weight_decay"], none["weight_decay"]) == (DECAY, 0.0)
    names = {id(p): name for name, p in encoder.named_parameters()}
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decay["params"])
    assert {*names} - {id(p) for p in (*decay["params"], *none["params"])} == {id(frozen)}
    assert any(names[id(p)].endswith("weight") for p in none["params"])  # of a norm


def test_the_rate_warms_up_then_falls_as_a_half_cosine() -> None:
    optim = Optim(lr=9.0, warmup_epochs=2)
    rates = [learning_rate(optim, 2.0, step, 5, 12) for step in range(60)]
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * i / 50) for i in range(50)])
    assert learning_rate(dataclasses.replace(optim, schedule="constant"), 2.0, 59, 5, 12) == 2.0


def test_the_rate_steps_down_after_every_so_many_epochs() -> None:
    optim = Optim(warmup_epochs=0, schedule="step", step_epochs=10, step_factor=0.9)
    rates = [learning_rate(optim, 2.0, step, 7, 30) for step in range(7 * 30)]
    assert rates == pytest.approx([2.0] * 70 + [1.8] * 70 + [1.62] * 70)
    warmed = [learning_rate(dataclasses.replace(optim, warmup_epochs=12), 2.0, step, 7, 30) for step in range(7 * 30)]
    assert warmed[:84] == pytest.approx([2.0 * (i + 1) / 84 for i in range(84)])
    assert warmed[84:] == rates[84:]


@pytest.mark.parametrize("warmup", [0, 0.01, 0.5, 1.1, 2.9])
def test_a_warm_up_that_ends_within_an_epoch_does_not_overshoot(warmup: float) -> None:
    rates = [learning_rate(Optim(warmup_epochs=warmup), 2.0, step, 50, 12) for step in range(600)]
    assert 1.99 < max(rates) <= 2.0


def test_the_peak_follows_the_batch_as_the_run_says() -> None:
    def peak(scaling: str) -> float:
        return peak_lr(Optim(lr=0.3, lr_scaling=scaling, reference_batch=256), 4096)  # type: ignore[arg-type]

    assert [peak("none"), peak("linear"), peak("sqrt")] == pytest.approx([0.3, 4.8, 1.2])
    with pytest.raises(BadInput, match=r"lr_scaling sqrt without optim\.reference_batch; wanted the batch size that"):
        peak_lr(Optim(lr_scaling="sqrt"), 64)
