"""A recipe is a whole run: it says where it is from, fits its data, and differs from its siblings as it says."""

import dataclasses
import inspect

import pytest
import torch

from cauc_dist import augment, encoders, recipes
from cauc_dist.config import PRESETS, RunConfig
from cauc_dist.objective import Objective
from cauc_dist.optimisers import learning_rate

NAMES = sorted(recipes.recipes())
SHAPES = {
    "demo": (1, 32, 32, 32),
    "hippocampus": (1, 31, 40, 24),
    "ixi50": (1, 80, 96, 80),
    "ixi": (288,),
    "yaware": (1, 121, 145, 121),
    "cauc": (1, 121, 145, 121),
    "openbhb": (1, 121, 145, 121),
    "cifar100": (3, 32, 32),
}
"""Of a sample, by the first word of a recipe's name."""


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_recipe_has_the_name_of_its_function_and_says_source_time_and_result(name: str) -> None:
    recipe = recipes.recipes()[name]
    assert recipe().name == recipe.__name__ == name
    told = inspect.getdoc(recipe) or ""
    assert all(word in told for word in ("Time: ", "Result: "))
    assert "Source: " in told or "its authors" in told


def test_a_recipe_s_encoder_and_views_fit_its_data(name: str) -> None:
    run, shape = recipes.get(name), SHAPES[name.partition("_")[0]]
    with torch.device("meta"):
        encoders.build(run.encoder, shape)
    augment.check(run.augment, shape)


def test_a_recipe_s_objective_sets_nothing_that_it_does_not_read(name: str) -> None:
    run = recipes.get(name)
    y = torch.arange(8.0)[:, None].repeat(1, len(run.objective.columns)) // 2
    Objective(run.objective, y).try_out(y, run.projector.out)
    two_terms = run.objective.name in ("cauc", "calign_unif", "align_cunif", "align_uniform")
    assert (run.objective.lambda_align is not None) == two_terms


def test_arms_of_a_family_differ_in_name_and_objective_alone() -> None:
    for start in ("demo_", "hippocampus_", "ixi50_", "ixi_roi_", "openbhb_", "cifar100_"):
        of = [recipes.get(name) for name in NAMES if name.startswith(start) and not name.endswith("_small")]
        assert len({bare(run) for run in of}) == 1, start
        assert len({run.objective for run in of}) == len(of) > 2, start


def bare(run: RunConfig) -> RunConfig:
    """The run without its name and what makes an arm."""
    objective = dataclasses.replace(run.objective, name="simclr", kernel=(), lambda_align=None)
    return dataclasses.replace(run, name="", objective=objective)


def test_y_aware_of_2021_has_the_settings_of_its_authors_code() -> None:
    run = recipes.get("yaware_bhb_2021")
    assert (run.encoder.name, run.epochs, run.batch_size) == ("densenet121_3d", 100, 64)
    assert (run.optim.name, run.optim.lr, run.optim.weight_decay) == ("adam", 1e-4, 5e-5)
    assert {learning_rate(run.optim, run.optim.lr, step, 10, 100) for step in (0, 500, 999)} == {1e-4}
    assert (run.objective.tau, run.objective.kernel, run.objective.normalise) == (0.1, ("age:gaussian:5",), "column")
    assert (run.projector.hidden, run.projector.out) == (512, 128)
    assert run.augment == PRESETS["all_tf"]


def test_openbhb_s_rate_is_nine_tenths_after_every_ten_epochs() -> None:
    run = recipes.get("openbhb_yaware")
    assert (run.encoder.name, run.epochs, run.batch_size) == ("resnet18_3d", 300, 32)
    assert run.objective.kernel == ("age:gaussian:2",)
    rates = [learning_rate(run.optim, run.optim.lr, 5 * epoch, 5, run.epochs) for epoch in range(30)]
    assert rates == pytest.approx([1e-4] * 10 + [9e-5] * 10 + [8.1e-5] * 10)


def test_small_and_full_cifar_have_the_same_arms() -> None:
    full = [name for name in NAMES if name.startswith("cifar100_") and not name.endswith("_small")]
    for name in full:
        small, large = recipes.get(f"{name}_small"), recipes.get(name)
        assert small.objective == large.objective
        assert small.augment == large.augment


def test_one_arm_of_cifar_alone_is_given_the_fine_classes() -> None:
    given = {name: recipes.get(name).objective.kernel for name in NAMES if name.startswith("cifar100_")}
    assert {name for name, kernel in given.items() if kernel == ("fine:delta",)} == {
        "cifar100_supcon_fine",
        "cifar100_supcon_fine_small",
    }
    assert set(given.values()) == {("fine:delta",), ("coarse:delta",)}
