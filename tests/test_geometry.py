"""Where subjects lie on the sphere is told of both parts alike, by views that training never drew."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cauc_dist import recipes
from cauc_dist.config import Augment, Encoder, Objective, Projector, RunConfig
from cauc_dist.geometry import embedded, geometry, spread
from cauc_dist.prepare import parts
from cauc_dist.store.reader import Store


@pytest.fixture
def run(store: Path) -> RunConfig:
    base = recipes.get("demo_cauc")
    data = dataclasses.replace(base.data, store=str(store))
    return dataclasses.replace(base, data=data, encoder=Encoder(width=2), projector=Projector(8, 4))


def test_it_is_that_of_pairs_counted_one_by_one(run: RunConfig, store: Path) -> None:
    run = dataclasses.replace(run, objective=Objective(name="cauc", kernel=("age:gaussian:5", "sex:delta"), t=1.5))
    opened = Store.open(store)
    found = geometry(run, opened, None)
    train, held = parts(run, opened)
    assert (len(train), len(held)) == (18, 6)
    for name, rows in (("train", train[::3]), ("held-out", held)):
        z = embedded(run, opened, rows, None).double().numpy()  # (2, 6, 4)
        age, sex = opened.metadata(["age", "sex"])[rows].T
        between = ((z[:, :, None] - z[:, None]) ** 2).sum(-1)
        apart = ~np.eye(6, dtype=bool)
        w = np.exp(-((age[:, None] - age) ** 2) / 50) * (sex[:, None] == sex)
        repels = (1 - w) * apart
        assert found[name]["alignment"] == pytest.approx(((z[0] - z[1]) ** 2).sum(-1).mean(), rel=1e-4)
        uniformity = np.mean([np.log(np.exp(-1.5 * d)[apart].mean()) for d in between])
        assert found[name]["uniformity"] == pytest.approx(uniformity, rel=1e-4)
        conditional = np.mean([np.log((repels * np.exp(-1.5 * d)).sum() / repels.sum()) for d in between])
        assert found[name]["conditional_uniformity"] == pytest.approx(conditional, rel=1e-4)
        shares = np.linalg.svd(z.reshape(12, 4), compute_uv=False)
        shares /= shares.sum()
        assert found[name]["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_without_augmentation_both_views_are_one(run: RunConfig, store: Path) -> None:
    off = {f.name: 0.0 for f in dataclasses.fields(Augment) if f.name.startswith("p_")}
    run = dataclasses.replace(run, augment=dataclasses.replace(run.augment, **off))  # type: ignore[arg-type]
    found = geometry(run, Store.open(store), None)
    assert found["train"]["alignment"] == pytest.approx(0, abs=1e-6)


def test_views_are_those_of_the_epoch_after_the_last_whatever_the_chunk(run: RunConfig, store: Path) -> None:
    opened, rows = Store.open(store), np.arange(10)
    whole, cut = embedded(run, opened, rows, None), embedded(run, opened, rows, None, chunk=3)
    assert torch.allclose(whole, cut, atol=1e-5)
    other = embedded(dataclasses.replace(run, epochs=run.epochs + 1), opened, rows, None)
    assert not torch.allclose(whole, other, atol=1e-3)


def test_a_run_without_a_kernel_has_no_conditional_terms(run: RunConfig, store: Path) -> None:
    run = dataclasses.replace(run, objective=Objective(name="simclr"))
    assert set(geometry(run, Store.open(store), None)["held-out"]) == {"alignment", "uniformity", "effective_rank"}


def test_subjects_are_spread_over_the_store() -> None:
    assert spread(np.arange(10, 20), 5).tolist() == [10, 12, 14, 16, 18]
    assert spread(np.arange(3), 3).tolist() == [0, 1, 2]
