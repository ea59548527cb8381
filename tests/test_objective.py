"""The settings name the loss: each equals the pure function called by hand."""

from typing import get_args

import pytest
import torch

from cauc_dist import kernels, losses
from cauc_dist.config import Objective as Settings
from cauc_dist.config import Objectives
from cauc_dist.errors import BadInput
from cauc_dist.objective import Objective

torch.manual_seed(0)
Z = torch.nn.functional.normalize(torch.randn(2, 9, 6, dtype=torch.float64), dim=-1)
AGE = torch.rand(9, 1, dtype=torch.float64) * 50 + 20
SITE = torch.tensor([[0.0], [0], [1], [1], [2], [2], [0], [1], [2]], dtype=torch.float64)
KERNEL = kernels.product(age=kernels.gaussian(5.0))

BY_HAND = {
    "simclr": lambda: losses.ntxent(Z, 0.2),
    "y_aware": lambda: losses.y_aware_infonce(Z, AGE, KERNEL, 0.2, "column"),
    "cauc": lambda: losses.cauc(Z, AGE, KERNEL, t=3.0, alpha=1.0, lambda_align=0.5, lambda_unif=2.0, views="pooled"),
    "align_uniform": lambda: losses.align_uniform(Z, 1.0, 3.0, 0.5, 2.0),
    "supcon": lambda: losses.supcon(Z, SITE[:, 0], 0.2),
    "decoupled_uniformity": lambda: losses.decoupled_uniformity(Z, AGE, KERNEL, 3.0),
    "threshold": lambda: losses.threshold(Z, AGE, KERNEL, 0.2),
    "expw": lambda: losses.expw(Z, AGE, KERNEL, 0.2),
    "rank_n_contrast": lambda: losses.rank_n_contrast(Z, AGE, 0.2),
}


@pytest.mark.parametrize("name", get_args(Objectives))
def test_each_name_is_its_function_with_the_settings_passed_on(name: Objectives) -> None:
    settings = Settings(
        name=name,
        kernel=("site:delta",) if name == "supcon" else ("age:gaussian:5",),
        tau=0.2,
        t=3.0,
        alpha=1.0,
        lambda_align=0.5,
        lambda_unif=2.0,
        normalise="column" if name == "y_aware" else "row",
        views="pooled" if name == "cauc" else "within",
    )
    y = SITE if name == "supcon" else AGE
    assert Objective(settings, y).loss(Z, y).item() == pytest.approx(BY_HAND[name]().item(), rel=1e-12)


def test_a_setting_that_the_loss_does_not_read_is_refused() -> None:
    settings = Settings(name="y_aware", kernel=("age:gaussian:5",), within="site")
    with pytest.raises(BadInput, match=r"objective.within site with objective y_aware; wanted objective cauc"):
        Objective(settings, torch.cat([AGE, SITE], 1))


def test_supcon_wants_one_column_of_classes() -> None:
    with pytest.raises(
        BadInput, match=r"objective supcon with the kernel age:gaussian:5; wanted one column of classes"
    ):
        Objective(Settings(name="supcon", kernel=("age:gaussian:5",)), AGE)


def test_a_loss_that_the_metadata_does_not_allow_is_refused_before_training() -> None:
    missing = AGE.clone()
    missing[3] = torch.nan
    objective = Objective(Settings(name="rank_n_contrast", kernel=("age:gaussian:5",)), missing)
    with pytest.raises(BadInput, match=r"objective rank_n_contrast: .*; wanted a loss that this metadata allows"):
        objective.try_out(missing)


def test_within_is_the_last_column_and_no_part_of_the_kernel() -> None:
    settings = Settings(name="cauc", kernel=("age:gaussian:5",), within="site")
    y = torch.cat([AGE, SITE], 1)
    wanted = losses.cauc(Z, AGE, KERNEL, within=SITE[:, 0])
    assert Objective(settings, y).loss(Z, y).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_geometry_is_wangs_alignment_and_uniformity_and_their_conditional_forms() -> None:
    terms = Objective(Settings(name="simclr", kernel=("age:gaussian:5",)), AGE).geometry(Z, AGE)
    assert terms["alignment"] == pytest.approx(((Z[0] - Z[1]) ** 2).sum(-1).mean().item(), rel=1e-6)
    watched = {"alignment", "uniformity", "effective_rank"}
    assert set(terms) == {*watched, "conditional_alignment", "conditional_uniformity"}
    without = Objective(Settings(name="simclr"), torch.zeros(9, 0)).geometry(Z, torch.zeros(9, 0))
    assert set(without) == watched


def test_a_loss_on_metadata_without_a_kernel_is_refused() -> None:
    with pytest.raises(BadInput, match=r"objective cauc without a kernel.*--objective.kernel age:gaussian:5"):
        Objective(Settings(name="cauc"), torch.zeros(9, 0))
