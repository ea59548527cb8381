"""A study describes itself: arms, members, tags, splits."""

import dataclasses
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cauc_dist import studies
from cauc_dist.config import Objective, RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.objective import READERS
from cauc_dist.studies.hippocampus import person
from cauc_dist.studies.ixi_hidden import MECHANISMS, SHARES, hidden
from cauc_dist.studies.splits import cross_validation
from cauc_dist.study import Contrast, Study, chosen, members, run_of, two_by_two, under

NAMES = sorted(studies.studies())


@pytest.fixture(params=NAMES)
def study(request: pytest.FixtureRequest) -> Study:
    return studies.get(request.param)


def test_every_arm_of_a_2x2_has_one_t_and_one_lambda_align(study: Study) -> None:
    names = [name for name in study.arms if name.rpartition("_")[2] == "cauc" or name == "cauc"]
    for cauc in names:
        prefix = cauc.removesuffix("cauc")
        others = [f"{prefix}calign_unif", f"{prefix}align_cunif", "align_uniform"]
        four = [study.arms[name].objective for name in (cauc, *others)]
        assert len({(o.t, o.lambda_align, o.lambda_unif, o.alpha, o.views) for o in four}) == 1
        assert four[0].lambda_align is not None
        assert [o.name for o in four] == ["cauc", "calign_unif", "align_cunif", "align_uniform"]


def test_arms_of_one_prefix_differ_in_their_objective_alone() -> None:
    study = studies.get("ixi_roi")
    bare = {dataclasses.replace(run, objective=Objective()) for run in study.arms.values()}
    assert len(bare) == 1


def test_the_matched_pair_has_the_constants_of_y_aware() -> None:
    arms = two_by_two(RunConfig(name="x", objective=Objective(kernel=("age:gaussian:5",), lambda_align=1.0, tau=0.1)))
    assert {(a.objective.t, a.objective.lambda_align) for n, a in arms.items() if "matched" in n} == {(5.0, 5.0)}


def test_no_arm_sets_what_its_objective_does_not_read(study: Study) -> None:
    for run in study.arms.values():
        for field, readers in READERS.items():
            assert getattr(run.objective, field) == getattr(Objective(), field) or run.objective.name in readers


def test_a_2x2_without_one_lambda_for_all_four_is_refused() -> None:
    with pytest.raises(BadInput, match="no lambda_align"):
        two_by_two(RunConfig(name="x", objective=Objective(kernel=("age:gaussian:5",))))


def test_a_column_is_a_proxy_where_the_loss_read_it() -> None:
    study = studies.get("ixi_roi")
    told = {(arm, column): study.tag(arm, column) for arm in study.arms for column in ("age", "sex")}
    assert told["age_cauc", "age"] == told["sex_supervised", "sex"] == "proxy"
    assert told["age_cauc", "sex"] == told["sex_yaware", "age"] == "held-out target"
    assert {told[arm, c] for arm in ("simclr", "align_uniform") for c in ("age", "sex")} == {"held-out target"}
    assert study.tag("raw", "age") == "held-out target"


def test_a_column_that_is_made_of_ages_is_a_proxy_for_age() -> None:
    study = studies.get("ixi_roi_hidden")
    for arm, run in study.arms.items():
        assert study.tag(arm, "age") == ("held-out target" if run.objective.name == "simclr" else "proxy"), arm


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ixi_roi_hidden"])
def test_the_primary_endpoint_is_on_a_held_out_target(name: str) -> None:
    study = studies.get(name)
    assert study.tag(study.primary.arm, study.primary.target) == "held-out target"
    assert study.tag(study.primary.other, study.primary.target) == "held-out target"


def test_members_come_seed_by_seed_and_each_once() -> None:
    study = studies.get("ixi_roi")
    all_members = list(members(study, chosen(study, [])))
    assert len({m.name for m in all_members}) == len(all_members)
    assert [m.seed for m in all_members] == sorted(m.seed for m in all_members)
    assert Counter(m.evaluation for m in all_members if m.arm == "age_cauc") == {"test": 10, "cv": 25}
    assert {m.seed for m in members(study, ["simclr"], seeds=2)} == {0, 1}


def test_names_of_members_are_what_a_sweep_takes(study: Study) -> None:
    from launch.sweep import _plain

    names = [m.name for m in members(study, chosen(study, []))]
    assert names == [_plain(name) for name in names]


def test_the_run_of_a_member_has_its_seed_and_split() -> None:
    study = studies.get("hippocampus")
    member = next(m for m in members(study, ["anterior_cauc"]) if (m.seed, m.fold) == (3, 2))
    run = run_of(study, member, "s.zarr")
    assert (run.seed, run.data.split, run.data.store) == (3, "head3f2", "s.zarr")


def test_an_unknown_study_or_method_is_named_with_the_nearest() -> None:
    with pytest.raises(BadInput, match="Did you mean ixi_roi"):
        studies.get("ixi_rio")
    with pytest.raises(BadInput, match="Did you mean age_cauc"):
        chosen(studies.get("ixi_roi"), ["age_kauc"])


def test_a_comparison_of_what_a_study_has_not_is_refused() -> None:
    study = studies.get("ixi50")
    wrong = dataclasses.replace(study, primary=Contrast("cauc", "nobody", "sex", "cv"))
    with pytest.raises(BadInput, match="compares the other 'nobody'"):
        wrong.check()


def _store(n: int = 60, **columns: Any) -> Any:
    """What a study's functions of columns read of a store."""
    part = np.array([i % 4 == 0 for i in range(n)], float)
    values = {"split": part, "age": np.linspace(20, 80, n), **columns}
    return _Fake(tuple(f"sub-{i:03d}" for i in range(n)), values)


class _Fake(SimpleNamespace):
    def __init__(self, subjects: tuple[str, ...], values: dict[str, Any]) -> None:
        super().__init__(subjects=subjects, values=values)

    def __len__(self) -> int:
        return len(self.subjects)

    def metadata(self, names: list[str]) -> Any:
        return np.stack([self.values[name] for name in names], 1)

    def column(self, name: str) -> Any:
        return SimpleNamespace(levels=("train", "validation"))


def test_each_repeat_holds_every_subject_out_once_and_balances_the_label() -> None:
    sex = np.arange(60) % 2.0
    columns = cross_validation(_store(), "cv{seed}f{fold}", 2, 5, by=list(sex))
    assert sorted(columns) == [f"cv{s}f{f}" for s in range(2) for f in range(5)]
    for seed in range(2):
        held = np.array([[entry == "test" for entry in columns[f"cv{seed}f{f}"]] for f in range(5)])
        np.testing.assert_array_equal(held.sum(0), 1)
        assert {tuple(np.bincount(sex[row].astype(int))) for row in held} == {(6, 6)}
    assert columns["cv0f0"] != columns["cv1f0"]


def test_a_subject_without_a_label_of_its_stratum_is_on_neither_side() -> None:
    by = [None if i < 10 else 0 for i in range(60)]
    entries = cross_validation(_store(), "in{seed}f{fold}", 1, 5, by=by)["in0f3"]
    assert set(entries[:10]) == {""}
    assert Counter(entries[10:]) == {"train": 40, "test": 10}


def test_both_sides_of_a_head_are_in_one_fold() -> None:
    crops = _store(90)
    crops.ids = crops.subjects
    columns = cross_validation(crops, "head{seed}f{fold}", 2, 5, person=person)
    for entries in columns.values():
        part = dict(zip(crops.ids, entries, strict=True))
        assert all(part[f"sub-{k:03d}"] == part[f"sub-{k + 1:03d}"] for k in range(1, 89, 2))
        assert set(part.values()) == {"train", "test"}
    assert studies.get("hippocampus").source.person is person


def test_masks_of_hidden_ages_are_nested_and_of_training_subjects_only() -> None:
    store = _store(400)
    columns = hidden(store)
    train = store.values["split"] == 0
    for mechanism in MECHANISMS:
        gone = [np.isnan(np.array(columns[f"age_{mechanism}{share}"])) for share in SHARES]
        assert [round(100 * g[train].mean()) for g in gone] == list(SHARES)
        assert not any(g[~train].any() for g in gone)
        assert all((small <= large).all() for small, large in itertools.pairwise(gone))
        filled = np.array(columns[f"age_{mechanism}50_filled"])
        seen = train & ~gone[1]
        np.testing.assert_allclose(filled[gone[1]], store.values["age"][seen].mean())
        complete = columns[f"complete_age_{mechanism}50"]
        assert [e for e, g in zip(complete, gone[1], strict=True) if g] == [""] * int(gone[1].sum())


def test_old_ages_are_hidden_more_often_than_young_ones() -> None:
    store = _store(400)
    train, age = store.values["split"] == 0, store.values["age"]
    for mechanism, differs in (("random", False), ("old", True)):
        gone = np.isnan(np.array(hidden(store)[f"age_{mechanism}50"]))
        assert (age[train & gone].mean() - age[train & ~gone].mean() > 8) == differs


def test_under_changes_the_objective_alone() -> None:
    run = RunConfig(name="x")
    assert dataclasses.replace(under(run, t=3.0), objective=run.objective) == run


def test_probes_of_methods_that_saw_no_mask_are_fitted_under_every_mask() -> None:
    study = studies.get("ixi_roi_hidden")
    masks = {f"age_{mechanism}{share}" for mechanism in MECHANISMS for share in SHARES}
    for method in ("simclr", "raw", "untrained", "cauc_0"):
        assert set(study.visible_to(method, "age")) == masks
    assert study.visible_to("cauc_complete_old50", "age") == ["age_old50"]
    assert study.visible_to("simclr", "sex") == []


def test_ignore_is_distinct_for_a_kernel_of_one_column() -> None:
    import torch

    from cauc_dist.kernels import parse

    y = torch.tensor([[20.0], [float("nan")], [24.0], [float("nan")]], dtype=torch.float64)
    one, other = (parse((f"age:gaussian:5:{policy}",), "product").fit(y)(y) for policy in ("ignore", "distinct"))
    assert torch.equal(one, other)
