"""Probes are fitted on training subjects alone, and their intervals and comparisons are what they say."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from cauc_dist import probe, recipes, spawn
from cauc_dist.config import Encoder, Projector
from cauc_dist.errors import BadInput
from cauc_dist.prepare import prepare
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.stream.plan import split
from cauc_dist.stream.values import values
from cauc_dist.table import Score, Table

AGE, SEX = Column("age", "number"), Column("sex", "category", ("F", "M"))
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs' worth of one: a small trained model on the shared cohort."""
    recipe = recipes.get("demo_cauc")
    config = dataclasses.replace(
        recipe,
        run=tmp_path_factory.mktemp("runs") / "a",
        epochs=2,
        optim=dataclasses.replace(recipe.optim, lr=1e-2),
        batch_size=6,
        data=dataclasses.replace(recipe.data, store=str(store)),
        encoder=Encoder(width=2),
        projector=Projector(8, 4),
    )
    folder = prepare(config, 1)
    assert spawn.start(1, str(folder)) == 0
    return folder


def test_a_linear_relation_is_found_and_noise_is_not() -> None:
    x, noise = RNG.normal(size=(400, 5)), RNG.normal(size=400)
    y = x @ np.array([3.0, -2, 0, 0, 1]) + 50
    score = probe.score_column(AGE, x[:300], y[:300], x[300:], y[300:])
    assert score.metric == "MAE"
    assert score.value < 0.05
    assert score.detail["r2"] > 0.999
    blind = probe.score_column(AGE, x[:300], noise[:300], x[300:], noise[300:])
    assert blind.detail["r2"] < 0.1


def test_the_mean_absolute_error_and_r2_are_those_of_ridge_by_hand() -> None:
    x, y = RNG.normal(size=(80, 3)), RNG.normal(size=80) * 10 + 40
    score = probe.score_column(AGE, x[:60], y[:60], x[60:], y[60:], as_is=True)
    candidates = []
    for alpha in np.logspace(-3, 6, 28):  # leave-one-out by refitting: what RidgeCV does in closed form
        left_out = [
            (Ridge(alpha).fit(np.delete(x[:60], i, 0), np.delete(y[:60], i)).predict(x[i : i + 1])[0] - y[i]) ** 2
            for i in range(60)
        ]
        candidates.append((np.mean(left_out), alpha))
    predicted = Ridge(min(candidates)[1]).fit(x[:60], y[:60]).predict(x[60:])
    assert score.value == pytest.approx(np.abs(predicted - y[60:]).mean(), rel=1e-6)
    assert score.errors == pytest.approx(np.abs(predicted - y[60:]).tolist(), rel=1e-6)
    assert score.detail["r2"] == pytest.approx(1 - ((predicted - y[60:]) ** 2).mean() / y[60:].var(), rel=1e-6)


def test_held_out_labels_do_not_change_what_is_predicted() -> None:
    x, y = RNG.normal(size=(60, 4)), RNG.integers(0, 2, 60).astype(float)
    right = probe.score_column(SEX, x[:40], y[:40], x[40:], y[40:])
    flipped = probe.score_column(SEX, x[:40], y[:40], x[40:], 1 - y[40:])
    assert np.array(right.errors) + np.array(flipped.errors) == pytest.approx(np.ones(20))


def test_separable_classes_are_told_apart() -> None:
    y = np.tile([0.0, 1.0, 2.0], 40)
    x = np.eye(3)[y.astype(int)] * 5 + RNG.normal(size=(120, 3)) * 0.1
    score = probe.score_column(Column("site", "category", ("A", "B", "C")), x[:90], y[:90], x[90:], y[90:])
    assert (score.value, score.detail["accuracy"], score.detail["auc"]) == (1.0, 1.0, 1.0)


def test_subjects_without_a_value_take_no_part() -> None:
    x, y = RNG.normal(size=(60, 3)), RNG.normal(size=60)
    missing = y.copy()
    missing[[3, 50]] = np.nan
    keep = [i for i in range(60) if i not in (3, 50)]
    ours = probe.score_column(AGE, x[:40], missing[:40], x[40:], missing[40:])
    theirs = probe.score_column(AGE, x[keep][:39], y[keep][:39], x[keep][39:], y[keep][39:])
    assert ours.errors == theirs.errors


def table(**errors: list[float]) -> Table:
    scores = {
        m.replace("_", " "): {"age": Score("MAE", float(np.mean(e)), 0, 1, {"r2": 0.5}, e, e)}
        for m, e in errors.items()
    }
    return Table("store.zarr", "f" * 64, 30, 4, ("age",), {"age": 9.0}, scores, {"ours": 7})


def test_a_comparison_is_paired_over_subjects() -> None:
    """Every subject is one year better, whatever their errors: unpaired intervals would overlap widely."""
    one = table(ours=[1.0, 11.0, 21.0, 31.0], untrained=[2.0, 12.0, 22.0, 32.0])
    assert one.difference("ours", "untrained", "age") == (1.0, 1.0, 1.0)
    assert one.difference("untrained", "ours", "age") == (-1.0, -1.0, -1.0)


def test_a_star_marks_what_is_better_than_untrained() -> None:
    assert "*" not in str(table(ours=[1.0, 2.0], untrained=[5.0, 6.0])).splitlines()[2]  # two subjects are no ground
    text = str(table(ours=[1.0, 2.0] * 5, untrained=[5.0, 6.0] * 5, raw_voxels=[1.0, 9.0] * 5))
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines["ours"].endswith("*")
    assert not lines["raw voxels"].endswith("*")
    assert not lines["untrained"].endswith("*")
    assert "30 subjects to fit, 4 held out" in text


def test_a_table_comes_back_from_json() -> None:
    one = table(ours=[1.0, 2.0])
    assert Table.from_json(one.to_json()) == one


def test_ridge_on_voxel_features_is_ridge_on_voxels(store: Path) -> None:
    opened = Store.open(store)
    rows = np.arange(24)
    x = np.stack([opened.volume(i).ravel() for i in rows])
    y = opened.metadata(["age"])[:, 0]
    features = probe.voxel_features(opened, rows, 18, values(opened, "none"))
    unit = np.linalg.norm(x[0] - x[:18].mean(0)) / np.linalg.norm(features[0])
    by_hand = Ridge(100.0 * unit**2).fit(x[:18], y[:18]).predict(x[18:])
    ours = Ridge(100.0).fit(features[:18], y[:18]).predict(features[18:])
    assert ours == pytest.approx(by_hand, rel=1e-4)


def test_embeddings_come_in_the_order_of_their_rows(run: Path, store: Path) -> None:
    from cauc_dist.prepare import load

    config, opened = load(run), Store.open(store)
    rows = np.arange(24)
    saved = probe.newest(config, opened)
    straight, mixed = probe.embed(config, opened, rows, saved), probe.embed(config, opened, rows[::-1], saved, chunk=5)
    assert straight.shape == (24, 32)
    assert mixed[::-1] == pytest.approx(straight, rel=1e-4, abs=1e-5)
    untrained = probe.embed(config, opened, rows, None)
    assert np.abs(untrained - straight).max() > 1e-3


def test_the_probe_fits_on_the_subjects_that_the_run_trained_on(run: Path, store: Path) -> None:
    found = probe.probe([run])
    train, test = split(Store.open(store).subjects, 4, 0)
    assert (found.n_train, found.n_test) == (len(train), len(test))
    assert found.columns == ("age", "sex", "site")
    assert list(found.scores) == ["demo_cauc", "untrained", "raw voxels"]
    y = Store.open(store).metadata(["age"])[:, 0]
    assert found.chance["age"] == pytest.approx(np.abs(y[test] - np.median(y[train])).mean())
    assert found.chance["site"] == pytest.approx(1 / 3)


def copy_with(run: Path, into: Path, old: str, new: str) -> Path:
    import shutil

    shutil.copytree(run, into)
    text = (into / "config.json").read_text()
    assert old in text
    (into / "config.json").write_text(text.replace(old, new))
    return into


def test_runs_of_different_folds_are_not_compared(run: Path, tmp_path: Path) -> None:
    other = copy_with(run, tmp_path / "b", '"fold": 0', '"fold": 1')
    with pytest.raises(BadInput, match=r"differ in store or fold; wanted runs with the same held-out subjects"):
        probe.probe([run, other])


def test_a_run_that_held_nobody_out_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data.folds is 1: nobody is held out"):
        probe.probe([copy_with(run, tmp_path / "b", '"folds": 4', '"folds": 1')])


def test_a_run_without_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    other = copy_with(run, tmp_path / "b", '"fold": 0', '"fold": 0')
    shutil.rmtree(other / "checkpoints")
    with pytest.raises(BadInput, match=r"no sound checkpoint in .*; wanted a trained run"):
        probe.probe([other])


def test_runs_of_different_encoders_have_no_common_baseline(run: Path, tmp_path: Path) -> None:
    other = copy_with(run, tmp_path / "b", '"width": 2', '"width": 4')
    with pytest.raises(BadInput, match=r"have different encoders"):
        probe.probe([run, other])


def test_a_run_whose_weights_are_the_initial_ones_scores_as_untrained(run: Path, store: Path, tmp_path: Path) -> None:
    """The baseline goes through the same scaling and penalties as what it is compared with."""
    from cauc_dist import checkpoint
    from cauc_dist.prepare import load
    from cauc_dist.train import build_model

    other = copy_with(run, tmp_path / "b", '"fold": 0', '"fold": 0')
    saved, _ = checkpoint.latest(other)
    assert saved is not None
    initial = build_model(load(other), Store.open(store).shape)
    tensors = {**saved.tensors, **{f"parameter/{name}": p for name, p in initial.named_parameters()}}
    with checkpoint.Writer(other, saved.card, keep=1) as writer:
        writer.save(saved.step + 1, tensors, 0.0)
    found = probe.probe([other], voxels=False)
    assert found.scores["demo_cauc"] == found.scores["untrained"]
    assert found.steps == {"demo_cauc": saved.step + 1}


def test_a_damaged_newest_checkpoint_is_said(run: Path, store: Path, tmp_path: Path) -> None:
    import shutil

    from cauc_dist.prepare import load

    other = copy_with(run, tmp_path / "b", '"fold": 0', '"fold": 0')
    (newest,) = sorted((other / "checkpoints").iterdir())[-1:]
    shutil.copytree(newest, newest.with_name("step-00009999"))
    (newest.with_name("step-00009999") / "state.safetensors").write_bytes(b"cut")
    said: list[str] = []
    assert probe.newest(load(other), Store.open(store), said.append).path == newest
    assert "step-00009999 is damaged" in said[0]


def column_reason(values: list[float], column: Column = AGE) -> str:
    return probe._unfit(column, np.array(values), np.arange(4), np.arange(4, 6))


def test_a_column_that_cannot_be_probed_says_why() -> None:
    nan = float("nan")
    assert column_reason([1, 2, 3, 4, 5, 6]) == ""
    assert column_reason([1, 1, 1, nan, 5, 6]) == "fewer than two values among the training subjects"
    assert column_reason([1, 2, 3, 4, nan, nan]) == "no value among the held-out subjects"
    assert column_reason([0, 0, 0, 1, 0, 1], SEX) == "one training subject has 'M', two are needed of each"


def test_columns_that_cannot_be_probed_are_refused_when_asked_for_and_said_when_not(store: Path) -> None:
    opened, said = Store.open(store), list[str]()
    train, nobody = np.arange(24), np.arange(0)
    with pytest.raises(BadInput, match=r"column age: no value among the held-out subjects"):
        probe.choose(opened, ["age"], train, nobody)
    with pytest.raises(BadInput, match=r"no column of .* can be probed"):
        probe.choose(opened, [], train, nobody, said.append)
    assert said[0] == "probe: column age is left out: no value among the held-out subjects"
    with pytest.raises(BadInput, match=r"no column 'agee'"):
        probe.choose(opened, ["agee"], train, nobody)


def test_one_held_out_subject_has_no_r2() -> None:
    score = probe.score_column(AGE, RNG.normal(size=(20, 2)), RNG.normal(size=20), np.zeros((1, 2)), np.ones(1))
    assert score.detail == {}


def test_a_category_is_compared_by_balanced_accuracy() -> None:
    """Always the majority: fewer mistakes than a method that tells both classes, and yet the worse of the two."""
    truth = [0.0] * 18 + [1.0] * 2
    majority = Score("balanced acc.", 0.5, 0, 1, {}, [0.0] * 18 + [1.0] * 2, truth)
    telling = Score("balanced acc.", 0.9, 0, 1, {}, [1.0] * 4 + [0.0] * 16, truth)
    assert telling.compare(majority)[0] == pytest.approx((14 / 18 + 1) / 2 - 0.5)


# ---- beside the linear probes of h


@pytest.fixture(scope="module")
def full(run: Path) -> Table:
    return probe.probe([run], ["age", "sex"], knn=True, after_projector=True, geometries=True, few_labels=(8, 14))


def test_what_is_asked_for_beside_the_linear_probes_changes_none_of_them(run: Path, full: Table) -> None:
    plain = probe.probe([run], ["age", "sex"])
    assert {name: full.scores[name] for name in plain.scores} == plain.scores
    assert (plain.few, plain.geometry) == ({}, {})
    ends = ["", ", kNN", ", z", ", z, kNN"]
    expected = [m + end for m in ("demo_cauc", "untrained") for end in ends] + ["raw voxels", "raw voxels, kNN"]
    assert list(full.scores) == expected


def test_the_projector_is_probed_on_the_rows_that_the_loss_sees(run: Path, store: Path, full: Table) -> None:
    from cauc_dist import checkpoint
    from cauc_dist.prepare import load
    from cauc_dist.stream.loader import read_all
    from cauc_dist.train import build_model

    config, opened = load(run), Store.open(store)
    saved, _ = checkpoint.latest(run)
    assert saved is not None
    model = build_model(config, opened.shape).eval()
    checkpoint.load_module(model, saved.tensors, ema=True)
    train, test = split(opened.subjects, 4, 0)
    x = read_all(opened, np.arange(24), values(opened, config.data.normalise, train))
    z = model(x).detach().double().numpy()
    age = opened.metadata(["age"])[:, 0]
    by_hand = probe.score_column(AGE, z[train], age[train], z[test], age[test])
    assert full.scores["demo_cauc, z"]["age"].errors == pytest.approx(by_hand.errors, rel=1e-3)


def test_few_labels_of_ages_in_whole_years_are_drawn_as_those_of_any_other_number() -> None:
    """A ten-thousandth of a day more or less, and nothing changes: the kind of the column says how, not its values."""
    x, years = RNG.normal(size=(120, 3)), RNG.integers(20, 40, 120).astype(float)
    days = years + RNG.uniform(-1e-7, 1e-7, 120)
    whole, part = (probe.few_of(AGE, x[:80], y[:80], x[80:], y[80:], (20, 60)) for y in (years, days))
    assert whole["20"] == pytest.approx(part["20"], rel=1e-4)
    assert whole["60"] == pytest.approx(part["60"], rel=1e-4)


def test_few_labels_are_scored_by_the_same_headline(full: Table) -> None:
    assert list(full.few) == ["demo_cauc", "demo_cauc, z", "untrained", "untrained, z", "raw voxels"]
    assert all(list(found) == ["8", "14"] for row in full.few.values() for found in row.values())
    assert all(0 <= mean <= 1 and sd >= 0 for row in full.few.values() for mean, sd in row["sex"].values())


def test_budgets_that_no_column_allows_are_refused_before_a_scan_is_read(run: Path) -> None:
    said: list[str] = []
    with pytest.raises(BadInput, match=r"100 labels of age; wanted 2 to 18, the training subjects with a value"):
        probe.probe([run], ["age"], few_labels=(100,), say=said.append)
    with pytest.raises(BadInput, match=r"3 labels of sex; wanted 4 to 18"):
        probe.probe([run], ["sex"], few_labels=(3,), say=said.append)
    assert said == []


def test_a_full_table_comes_back_from_json_and_an_old_one_too(full: Table) -> None:
    import json

    assert Table.from_json(full.to_json()) == full
    old = {k: v for k, v in json.loads(full.to_json()).items() if k not in ("few", "geometry")}
    assert Table.from_json(json.dumps(old)).scores == full.scores


def test_a_table_says_labels_and_geometry_below_the_scores(full: Table) -> None:
    lines = str(full).splitlines()
    assert "8 labels" in next(line for line in lines if line.startswith("age (MAE) "))
    head = next(line for line in lines if "conditional uniformity" in line)
    assert head.split("  ")[-1] == "effective rank"
    assert sum(line.startswith(("demo_cauc, train", "untrained, held-out")) for line in lines) == 2


def test_neighbours_are_compared_with_the_untrained_encoders_neighbours() -> None:
    worst, best = [9.0, 8.0] * 5, [1.0, 2.0] * 5
    one = table(untrained=best, **{"untrained, kNN": worst, "ours, kNN": [5.0, 6.0] * 5, "ours": [5.0, 6.0] * 5})
    lines = {line.split("  ")[0]: line for line in str(one).splitlines()}
    assert lines["ours, kNN"].endswith("*")
    assert not lines["ours"].endswith("*")
