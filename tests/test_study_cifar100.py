"""The studies on CIFAR-100: their splits are of equal classes, the test images stay closed to choices."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cauc_dist import studies
from cauc_dist.reproduce.member import inside
from cauc_dist.scores import Predicted
from cauc_dist.studies.cifar100 import EPOCHS, SIZES, columns

FINE = np.concatenate([np.repeat(np.arange(100), 500), np.repeat(np.arange(100), 100)])
TEST = np.arange(60_000) >= 50_000


class _Store:
    """What `columns` reads of a store: 500 training and 100 test images of each of 100 classes."""

    def metadata(self, names: list[str]) -> Any:
        return np.stack([{"fine": FINE, "split": 1.0 * ~TEST}[name].astype(float) for name in names], 1)

    def column(self, name: str) -> Any:
        return SimpleNamespace(levels=("test", "train"))


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """By split and entry, whether an image has it."""
    made = {name: np.array(entries) for name, entries in columns(_Store()).items()}  # type: ignore[arg-type]
    return {name: {entry: told == entry for entry in np.unique(told)} for name, told in made.items()}


@pytest.mark.parametrize(
    ("split", "trained", "held", "of"),
    [
        *(("final", 450, "test", 100), ("select", 450, "selection", 50)),
        *(("small", 60, "test", 50), ("small_select", 41, "selection", 20)),
    ],
)
def test_a_split_has_as_many_images_of_every_class(parts: Any, split: str, trained: int, held: str, of: int) -> None:
    assert set(np.bincount(FINE[parts[split]["train"]], minlength=100)) == {trained}
    assert set(np.bincount(FINE[parts[split][held]], minlength=100)) == {of}
    assert set(parts[split]) <= {"train", held, ""}


def test_nothing_trains_on_test_images_nor_on_those_kept_for_choices(parts: Any) -> None:
    trains = [split["train"] for split in parts.values()]
    kept = parts["select"]["selection"]
    assert not any((train & (TEST | kept)).any() for train in trains)
    assert all(split["test"][~TEST].sum() == 0 for split in parts.values() if "test" in split)
    assert (parts["small_select"]["train"] <= parts["small"]["train"]).all()
    assert (parts["small_select"]["selection"] <= kept).all()


def test_a_split_is_the_same_each_time() -> None:
    assert columns(_Store()) == columns(_Store())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cifar100", "cifar100_small"])
def test_a_coarse_class_is_read_where_the_fine_one_is(name: str) -> None:
    study = studies.get(name)
    assert [study.tag("supcon_fine", column) for column in ("fine", "coarse")] == ["proxy", "proxy"]
    assert [study.tag("cauc", column) for column in ("fine", "coarse")] == ["held-out target", "proxy"]
    assert [study.tag("simclr", column) for column in ("fine", "coarse")] == ["held-out target"] * 2


def test_batches_of_the_batch_study_have_equal_epochs_or_equal_updates() -> None:
    arms = studies.get("batch").arms
    for method in ("cauc", "calign_unif"):
        sizes: dict[str, dict[int, int]] = {"epochs": {}, "updates": {}}
        for name, run in arms.items():
            if name.startswith(f"{method}_") and "lr0.001" in name:
                sizes["epochs" if "_epochs_" in name else "updates"][run.batch_size] = run.epochs
        assert sizes["epochs"] == dict.fromkeys(SIZES, EPOCHS)
        updates = {n: (4100 // n) * epochs for n, epochs in sizes["updates"].items()}
        assert updates == dict.fromkeys((16, 64, 1024), (4100 // 256) * EPOCHS)


def test_within_a_group_only_its_own_classes_are_chosen_from() -> None:
    probability = np.array([[0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0]])
    predicted = Predicted(np.array([0.0, 2.0, 3.0]), np.zeros(3), probability, np.arange(4.0))
    labels, groups = np.array([0.0, 1.0, 2.0, 3.0]), np.array([7.0, 7.0, 8.0, 8.0])
    told = inside(predicted, labels, groups, np.array([7.0, 8.0, 8.0]))
    assert told.predicted.tolist() == [0.0, 2.0, 2.0]  # of no weight at all the first of the group


def test_epochs_of_a_study_can_be_set_for_all_arms_and_it_says_so() -> None:
    study = studies.get("cifar100", epochs=3)
    assert {run.epochs for run in study.arms.values()} == {3}
    assert "at 3 epochs" in study.about
    assert {run.epochs for run in studies.get("cifar100").arms.values()} != {3}
