"""The estimator is scikit-learn's in form, and in what it computes a run of `cauc train` and its export."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from cauc_dist import config, embed, recipes
from cauc_dist.config import Encoder
from cauc_dist.errors import BadInput
from cauc_dist.estimator import ContrastiveEncoder
from cauc_dist.prepare import load, parts, prepare
from cauc_dist.store.reader import Store
from cauc_dist.world import World
from tests import ranks as forked

SMALL: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 6,
    "optim__lr": 1e-2,
    "encoder__width": 2,
    "projector__hidden": 8,
    "projector__out": 4,
    "engine__device": "cpu",
    "engine__threads": 1,  # sums over more threads have other last bits
}


@pytest.fixture(scope="module")
def kept(store: Path, tmp_path_factory: pytest.TempPathFactory) -> ContrastiveEncoder:
    run = tmp_path_factory.mktemp("runs") / "kept"
    return ContrastiveEncoder("demo_cauc", run=run, **SMALL).fit(store)


def test_it_trains_the_run_that_the_command_line_trains(kept: ContrastiveEncoder, store: Path, tmp_path: Path) -> None:
    settings = load(Path(kept.run))
    folder = prepare(dataclasses.replace(settings, run=tmp_path / "run"), 1)
    assert forked.train(folder, 1) == [0]
    rows = np.arange(24)
    wanted, _ = embed.of_run(folder, World()).represent(rows)
    ours, _ = embed.of_run(Path(kept.run), World()).represent(rows)
    np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_allclose(kept.transform(store), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert kept.transform(store).dtype == np.float32
    np.testing.assert_array_equal(kept.train_rows_, parts(settings, Store.open(store))[0])


def test_fitted_twice_in_one_process_it_is_the_same_and_leaves_no_group_threads_or_generator_changed(
    kept: ContrastiveEncoder, store: Path
) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = clone(kept).set_params(run=None)
    assert again.fit(Store.open(store), y=np.zeros(24)) is again
    np.testing.assert_array_equal(again.transform(store), kept.transform(store))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert not torch.distributed.is_initialized()


def test_it_has_the_parameters_that_scikit_learn_asks_for(kept: ContrastiveEncoder) -> None:
    one = ContrastiveEncoder("demo_simclr", epochs=3, objective__tau=0.2)
    assert one.get_params() == {"recipe": "demo_simclr", "run": None, "epochs": 3, "objective__tau": 0.2}
    assert clone(one).get_params() == one.get_params()
    assert one.set_params(recipe="demo_yaware", objective__tau=0.3, seed=4) is one
    assert one.get_params() == {"recipe": "demo_yaware", "run": None, "epochs": 3, "objective__tau": 0.3, "seed": 4}
    found, base = one.config(), recipes.get("demo_yaware")
    assert found.objective == dataclasses.replace(base.objective, tau=0.3)
    assert (found.epochs, found.seed, found.encoder) == (3, 4, base.encoder)
    assert "objective__tau=0.3" in repr(one)
    assert not hasattr(clone(kept), "encoder_")


def test_a_run_config_and_a_config_json_are_recipes_too(tmp_path: Path) -> None:
    base = dataclasses.replace(recipes.get("demo_cauc"), seed=9)
    (tmp_path / "config.json").write_text(config.to_json(base))
    for recipe in (base, str(tmp_path / "config.json")):
        found = ContrastiveEncoder(recipe, encoder=Encoder(width=3), data__folds=1).config()
        assert found == dataclasses.replace(
            base, encoder=Encoder(width=3), data=dataclasses.replace(base.data, folds=1)
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epoch": 3}, "no field 'epoch' in RunConfig; wanted known fields. Did you mean epochs"),
        ({"objective__tua": 0.1}, "no field 'tua' in Objective"),
        ({"objektive__tau": 0.1}, "no field 'objektive' in RunConfig"),
        ({"epochs__tau": 0.1}, "epochs__tau = 0.1; wanted a field of a part"),
        ({"epochs": "many"}, "epochs = 'many'; wanted input should be a valid integer"),
        ({"recipe": "demo_cuac"}, "no recipe 'demo_cuac'"),
    ],
)
def test_what_is_no_setting_is_refused_and_changes_nothing(wrong: dict[str, Any], message: str) -> None:
    one = ContrastiveEncoder()
    with pytest.raises(BadInput, match=message):
        one.set_params(**wrong)
    assert one.get_params() == {"recipe": "demo_cauc", "run": None}
    with pytest.raises(BadInput, match=message):
        ContrastiveEncoder(**wrong).fit("nowhere.zarr")


def test_it_stands_in_a_pipeline_before_a_ridge(store: Path) -> None:
    """Trained on everybody: rows of `transform` and of the metadata are the store's."""
    opened = Store.open(store)
    age = opened.metadata(["age"])[:, 0]
    line = make_pipeline(ContrastiveEncoder("demo_cauc", **SMALL, data__folds=1), Ridge(1.0))
    fitted = line.fit(opened, age)
    by_hand = Ridge(1.0).fit(fitted[0].transform(opened), age)
    np.testing.assert_allclose(fitted.predict(opened), by_hand.predict(fitted[0].transform(opened)), rtol=1e-6)
    assert fitted[0].train_rows_.tolist() == list(range(24))
    assert np.abs(fitted.predict(opened) - age).mean() < np.abs(age - age.mean()).mean()


def test_what_was_not_fitted_transforms_nothing(store: Path) -> None:
    with pytest.raises(NotFittedError):
        ContrastiveEncoder().transform(store)


def test_a_run_folder_that_exists_is_refused_before_the_training(kept: ContrastiveEncoder, store: Path) -> None:
    with pytest.raises(BadInput, match=r"run folder .* exists already"):
        clone(kept).fit(store)


def test_scans_of_another_shape_are_refused(kept: ContrastiveEncoder, tmp_path: Path) -> None:
    from cauc_dist.store.ingest import ingest
    from tests.store.cohorts import bids, noise

    ingest(bids(tmp_path / "bids", [noise(i) for i in range(3)]), tmp_path / "store.zarr")
    with pytest.raises(BadInput, match=r"has scans of shape \(1, 8, 9, 7\); wanted \(1, 16, 16, 16\)"):
        kept.transform(tmp_path / "store.zarr")


def fit_within_a_group(store: Path) -> str:
    try:
        ContrastiveEncoder(**SMALL).fit(store)
    except BadInput as error:
        return str(error)
    return "none"


def test_within_a_process_group_it_is_refused(store: Path) -> None:
    (told,) = forked.run_ranks(1, fit_within_a_group, store)
    assert told.startswith("a process group of 1 in this process; wanted none: fit makes its own.")
