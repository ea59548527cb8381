"""A run's description survives JSON, and a wrong one is answered with what to type."""

import dataclasses
import json
from pathlib import Path

import pytest

from cauc_dist import recipes
from cauc_dist.config import Objective, RunConfig, from_json, read, to_json
from cauc_dist.errors import BadInput


@pytest.mark.parametrize("name", sorted(recipes.recipes()))
def test_every_recipe_comes_back_from_json_as_it_was(name: str) -> None:
    run = recipes.get(name)
    assert from_json(to_json(run)) == run


def test_defaults_are_written_out() -> None:
    values = json.loads(to_json(RunConfig(name="x")))
    assert values["optim"]["lr"] == 1e-3
    assert values["objective"]["lambda_align"] is None


def test_the_config_of_a_run_older_than_trackers_is_read_with_their_defaults() -> None:
    values = json.loads(to_json(RunConfig(name="x")))
    assert values.pop("trackers")["tensorboard"] is True
    assert from_json(json.dumps(values)) == RunConfig(name="x")


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    values = json.loads(to_json(RunConfig(name="x")))
    values["optim"]["weight_decai"] = 1
    with pytest.raises(BadInput, match=r"config: optim: no field 'weight_decai' in Optim.*Did you mean weight_decay"):
        from_json(json.dumps(values))


def test_a_value_of_a_wrong_type_is_refused_by_its_place() -> None:
    values = json.loads(to_json(RunConfig(name="x")))
    values["optim"]["lr"] = "fast"
    with pytest.raises(BadInput, match=r"here: optim.lr = 'fast'; wanted input should be a valid number"):
        from_json(json.dumps(values), "here")


def test_a_value_outside_its_choices_is_refused() -> None:
    values = json.loads(to_json(RunConfig(name="x")))
    values["objective"]["name"] = "simcrl"
    with pytest.raises(BadInput, match=r"objective.name = 'simcrl'"):
        from_json(json.dumps(values))


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(BadInput, match=r"config is not JSON .*; wanted a config.json"):
        from_json("name: x")


def test_a_section_that_is_not_an_object_is_refused() -> None:
    with pytest.raises(BadInput, match=r"config: optim holds 3; wanted the fields of Optim"):
        from_json('{"name": "x", "optim": 3}')


def test_columns_are_the_kernels_in_order_then_within() -> None:
    objective = Objective(kernel=("age:gaussian:5", "sex:delta"), within="site")
    assert objective.columns == ("age", "sex", "site")


def test_a_run_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig(name="x").epochs = 3  # type: ignore[misc]


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"no recipe 'demo_cuac'.*Did you mean demo_cauc"):
        recipes.get("demo_cuac")


def test_paths_stay_paths() -> None:
    assert from_json(to_json(RunConfig(name="x", run=Path("a/b")))).run == Path("a/b")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match=r"config.json is no text"):
        read(tmp_path / "config.json")
