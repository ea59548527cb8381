"""`cauc reproduce`: a study on a small table, run for real; what is done is not done again."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from cauc_dist import journal
from cauc_dist.cli import main
from cauc_dist.config import Augment, Checkpoint, Data, Encoder, Engine, Objective, Optim, Projector, RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.reproduce import Place, figures, page, reproduce
from cauc_dist.reproduce.cohort import store_of
from cauc_dist.reproduce.member import Work
from cauc_dist.reproduce.resample import Answers, Fold, difference, estimate, subject_counts
from cauc_dist.reproduce.results import Scores
from cauc_dist.store.reader import Store
from cauc_dist.studies.splits import cross_validation
from cauc_dist.study import Contrast, Evaluation, Member, Source, Study, Target, under

N = 60
pytestmark = pytest.mark.timeout(300)  # whole studies, in processes: beside other work they take their time


def write_table(folder: Path) -> None:
    """60 subjects, 8 features that follow age and sex, as `cauc ingest` reads it."""
    draw = np.random.default_rng(5)
    age, sex = draw.uniform(20, 80, N), draw.integers(0, 2, N)
    x = np.outer(age / 60, draw.normal(size=8)) + np.outer(sex, draw.normal(size=8)) + draw.normal(size=(N, 8)) / 2
    folder.mkdir(parents=True)
    people = [f"{i},{a:.3f},{s},{'train' if i % 3 else 'test'}" for i, (a, s) in enumerate(zip(age, sex, strict=True))]
    (folder / "all_participants.csv").write_text("\n".join(["participant_id,age,sex,split", *people]) + "\n")
    rows = [",".join([f"{i}", *(f"{v:.5f}" for v in row)]) for i, row in enumerate(x)]
    names = ",".join(["participant_id", *(f"f{k}" for k in range(8))])
    (folder / "all_rois.csv").write_text("\n".join([names, *rows]) + "\n")


def tiny(epochs: int = 2) -> Study:
    """Two arms, two baselines, one split of its own and 2-fold cross-validation."""
    run = RunConfig(
        name="tiny",
        epochs=epochs,
        batch_size=10,
        data=Data(normalise="dataset", threads=1),
        augment=Augment(p_blur=0.0),
        encoder=Encoder(name="mlp", width=16),
        projector=Projector(hidden=16, out=8),
        objective=Objective(kernel=("age:gaussian:5",), lambda_align=1.5),
        optim=Optim(warmup_epochs=1),
        engine=Engine(device="cpu", threads=1),
        checkpoint=Checkpoint(every_epochs=1, keep=1),
    )
    return Study(
        name="tiny",
        about="A test.",
        source=Source("table", "made here", columns=lambda s: cross_validation(s, "cv{seed}f{fold}", 2, 2)),
        arms={"cauc": under(run, name="cauc"), "calign_unif": under(run, name="calign_unif")},
        evaluations=(Evaluation("test", "split", seeds=2), Evaluation("cv", "cv{seed}f{fold}", seeds=2, folds=2)),
        targets=(Target("age", "mae"), Target("sex", "auc", within="age", bins=(50.0,))),
        primary=Contrast("cauc", "calign_unif", "sex", "cv"),
        endpoint="AUC of sex.",
        contrasts=(Contrast("cauc", "raw", "age", "test"),),
        confound="f0",
        budgets=(20,),
    ).check()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_table(folder / "table")
    return folder


@pytest.fixture(scope="module")
def done(data: Path) -> Path:
    """The whole study, run."""
    reproduce(tiny(), data / "study", data=data, jobs=2, say=lambda line: None)
    return data / "study"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(results: Any, **wanted: str) -> list[Any]:
    return [row for row in results["rows"] if all(row[name] == value for name, value in wanted.items())]


def test_a_study_ends_in_a_table_of_every_method_target_and_evaluation(done: Path) -> None:
    results = read(done / "results.json")
    told = {(r["method"], r["target"], r["evaluation"]) for r in rows(results, probe="linear")}
    assert told == {
        (m, t, e)
        for m in ("cauc", "calign_unif", "raw", "untrained", "chance")
        for t in ("age", "sex")
        for e in ("test", "cv")
    }
    assert {r["seeds"] for r in results["rows"]} == {2}
    assert all(r["low"] <= r["value"] <= r["high"] for r in results["rows"])
    assert {(r["method"], r["target"]) for r in rows(results, tag="proxy")} == {("cauc", "age"), ("calign_unif", "age")}
    assert results["failed"] == results["unfinished"] == []
    assert sum(results["commits"].values()) == 12
    assert "paper value unavailable" in (done / "results.md").read_text()
    assert (done / "plane.svg").exists()


def test_comparisons_have_an_interval_a_p_and_the_smallest_detectable_difference(done: Path) -> None:
    first, second = read(done / "results.json")["contrasts"]
    assert (first["primary"], first["seeds"], first["folds"], first["test"][:6]) == (True, 2, 2, "Nadeau")
    assert (second["primary"], second["folds"], second["test"][:9]) == (False, 1, "bootstrap")
    for row in (first, second):
        assert row["low"] < row["value"] < row["high"]
        assert 0 < row["p"] <= row["p_holm"] <= 1
        assert row["smallest_detectable"] == pytest.approx(2.8 * row["se"])


def test_ridge_on_raw_features_is_scikit_learns(done: Path) -> None:
    store = Store.open(done / "store.zarr")
    y, part = store.metadata(["age", "split"]).T
    train = part == store.column("split").levels.index("train")
    x = np.stack([store.volume(i) for i in range(N)])
    x = (x - x[train].mean(0)) / x[train].std(0)
    wanted = np.abs(RidgeCV(np.logspace(-3, 6, 28)).fit(x[train], y[train]).predict(x[~train]) - y[~train]).mean()
    row = rows(read(done / "results.json"), method="raw", target="age", evaluation="test", probe="linear")[0]
    assert row["value"] == pytest.approx(wanted, rel=0.02)  # another grid of penalties would differ by less


def test_chance_is_the_median_of_the_training_part_and_tells_no_two_subjects_apart(done: Path) -> None:
    store, results = Store.open(done / "store.zarr"), read(done / "results.json")
    y, part = store.metadata(["age", "split"]).T
    train = part == store.column("split").levels.index("train")
    wanted = np.abs(y[~train] - np.median(y[train])).mean()
    (age,) = rows(results, method="chance", target="age", evaluation="test")
    assert age["value"] == pytest.approx(wanted, rel=1e-4)  # answers are kept to 6 digits
    assert {row["value"] for row in rows(results, method="chance", target="sex")} == {0.5}
    assert results["members"] == 24, "chance is no member"


def test_the_auc_of_sex_is_told_inside_the_bins_of_age(done: Path) -> None:
    store, results = Store.open(done / "store.zarr"), read(done / "results.json")
    (row,) = [r for r in results["within"] if (r["method"], r["evaluation"]) == ("cauc", "test")]
    assert (row["target"], row["by"], row["edges"], len(row["bins"])) == ("sex", "age", [50.0], 2)
    age = dict(zip(store.ids, store.metadata(["age"])[:, 0], strict=True))
    found = []
    for seed in (0, 1):
        scores = read(done / "runs" / f"cauc-test-s{seed}-f0" / "scores.json")
        told, ids = scores["targets"]["sex"], scores["held_out"]
        old = [k for k, i in enumerate(told["at"]) if age[ids[i]] >= 50]
        truth, says = ([told["truth"], told["probes"]["linear"]["predicted"]][j] for j in (0, 1))
        found.append(roc_auc_score([truth[k] for k in old], [says[k] for k in old]))
    assert row["bins"][1]["value"] == pytest.approx(np.mean(found), abs=1e-3)
    assert "AUC within bins of age" in (done / "results.md").read_text()


def test_the_geometry_of_held_out_subjects_stands_beside_that_of_training(done: Path) -> None:
    told = {(f["method"], f["evaluation"]): f for f in read(done / "results.json")["features"]}
    assert {method for method, _ in told} == {"cauc", "calign_unif", "raw", "untrained"}
    assert told["cauc", "cv"]["uniformity_held_out"] < 0 < told["cauc", "cv"]["alignment_held_out"]
    assert "uniformity_held_out" not in told["raw", "cv"]


def test_each_setting_has_a_figure_of_its_own() -> None:
    rows = [{"method": f"{loss}_{name}=1"} for loss in ("cauc", "calign_unif") for name in ("sigma", "t")]
    assert figures.settings({"rows": [*rows, {"method": "raw"}]}) == ["sigma", "t"]


def test_scores_name_the_held_out_subjects_and_their_truth(done: Path) -> None:
    store = Store.open(done / "store.zarr")
    scores = read(done / "runs" / "cauc-cv-s1-f0" / "scores.json")
    at = [store.ids.index(id) for id in scores["held_out"]]
    np.testing.assert_allclose(scores["targets"]["age"]["truth"], store.metadata(["age"])[at, 0], rtol=1e-5)
    entries = store.metadata(["cv1f0"])[at, 0]
    assert {store.column("cv1f0").levels[int(code)] for code in entries} == {"test"}


def test_what_is_done_is_not_done_again(done: Path, data: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in done.glob("runs/*/scores.json")}
    said: list[str] = []
    again = reproduce(tiny(), done, jobs=2, say=said.append)
    assert {p: p.stat().st_mtime_ns for p in done.glob("runs/*/scores.json")} == before
    assert "24 members, 24 are done" in said[0]
    assert len(before) == again["members"] == 24


def test_some_methods_of_one_seed_then_the_others(data: Path, tmp_path: Path) -> None:
    first = reproduce(tiny(), tmp_path, methods=["raw"], seeds=1, data=data, say=lambda line: None)
    assert {(r["method"], r["seeds"]) for r in first["rows"]} == {("raw", 1)}
    assert first["contrasts"] == []
    second = reproduce(tiny(), tmp_path, methods=["untrained"], seeds=1, say=lambda line: None)
    assert {r["method"] for r in second["rows"]} == {"raw", "untrained"}


@pytest.fixture(scope="module")
def never_ended(data: Path) -> Path:
    """Forty epochs of one method, undisturbed."""
    reproduce(tiny(40), data / "whole", methods=["cauc"], seeds=1, data=data, jobs=1, say=lambda line: None)
    return data / "whole"


SCRIPT = """
import sys
from pathlib import Path
from tests.test_reproduce import tiny
from cauc_dist.reproduce import reproduce
reproduce(tiny(int(sys.argv[3])), Path(sys.argv[1]), methods=["cauc"], seeds=1, data=Path(sys.argv[2]), jobs=1)
"""


def _begun(folder: Path, data: Path, until: Callable[[], bool], number: int) -> str:
    """A study of 40 epochs, sent a signal once `until` says so; what it said."""
    command = [sys.executable, "-c", SCRIPT, str(folder), str(data), "40"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while not until() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    return said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_study_that_was_ended_goes_on_to_the_numbers_of_one_that_was_not(
    data: Path, never_ended: Path, tmp_path: Path, number: int
) -> None:
    part = tmp_path / "part"
    second = part / "runs" / "cauc-cv-s0-f0"

    def at_work() -> bool:
        return second.is_dir() and sum(e["event"] == "step" for e in journal.read(second)) > 10

    _begun(part, data, at_work, number)
    _idle(second)
    assert (part / "runs" / "cauc-test-s0-f0" / "scores.json").exists()
    assert not (second / "scores.json").exists()
    reproduce(tiny(40), part, methods=["cauc"], seeds=1, jobs=1, say=lambda line: None)
    assert [e["event"] for e in journal.read(second) if e["event"] in ("start", "resume")] == ["start", "resume"]
    one, other = (read(f / "runs" / second.name / "scores.json") for f in (part, never_ended))
    assert one["targets"] == other["targets"]


def _idle(run: Path) -> None:
    """Wait until nobody is at work in a run: members of a killed parent save and end by themselves."""
    import fcntl

    lock = os.open(run / "lock", os.O_RDWR)
    try:
        for _ in range(600):
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
        raise AssertionError(f"{run} is still at work")
    finally:
        os.close(lock)


def test_a_member_that_fails_is_named_and_the_others_are_told(data: Path, tmp_path: Path) -> None:
    study = tiny()
    wild = dataclasses.replace(study.arms["cauc"], optim=Optim(name="sgd", lr=1e30, warmup_epochs=0))
    study = dataclasses.replace(study, arms={**study.arms, "cauc": wild})
    said: list[str] = []
    results = reproduce(study, tmp_path, methods=["cauc", "raw"], seeds=1, data=data, jobs=2, say=said.append)
    assert sorted(results["failed"]) == ["cauc-cv-s0-f0", "cauc-cv-s0-f1", "cauc-test-s0-f0"]
    assert {row["method"] for row in results["rows"]} == {"raw"}
    assert any("cauc-test-s0-f0" in line and "not finite" in line for line in said)
    later = reproduce(study, tmp_path, only="tables", say=lambda line: None)
    assert later["unfinished"] == ["cauc-test-s0-f0", "cauc-cv-s0-f0", "cauc-cv-s0-f1"]
    assert "Begun, not done: cauc-test-s0-f0" in (tmp_path / "results.md").read_text()


def test_an_arm_that_cannot_be_trained_is_named_before_any_is(data: Path, tmp_path: Path) -> None:
    study = tiny()
    wrong = under(study.arms["cauc"], kernel=("height:gaussian:5",))
    study = dataclasses.replace(study, arms={**study.arms, "cauc": wrong})
    with pytest.raises(BadInput, match="arm cauc: no column 'height'"):
        reproduce(study, tmp_path, data=data, say=lambda line: None)
    assert not (tmp_path / "runs").exists()


def test_a_run_of_other_settings_is_not_taken_for_this_studys(done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = tiny(epochs=3)
    place = Place(done, done / "store.zarr")
    member = Member("cauc", "test", 0, 0)
    run = dataclasses.replace(study.arms["cauc"], data=dataclasses.replace(study.arms["cauc"].data, split="split"))
    assert Work(study, member, run, place.home(member))() == 2
    assert "was made with other settings (epochs)" in capfd.readouterr().out


def test_without_store_and_data_it_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAUC_DATA", raising=False)
    with pytest.raises(BadInput, match=r"--data or set \$CAUC_DATA"):
        reproduce(tiny(), tmp_path, say=lambda line: None)
    with pytest.raises(BadInput, match="no table in"):
        reproduce(tiny(), tmp_path, data=tmp_path, say=lambda line: None)


def test_few_label_curves_leave_out_what_pre_training_read_all_labels_of(done: Path) -> None:
    told = {(row["method"], row["target"]) for row in read(done / "results.json")["few"]}
    assert told == {
        ("cauc", "sex"),
        ("calign_unif", "sex"),
        *((m, t) for m in ("raw", "untrained") for t in ("age", "sex")),
    }


def _pair(scan: str) -> str:
    return f"{int(scan.removeprefix('sub-')) // 2}"


def test_scans_of_one_person_are_drawn_together(done: Path) -> None:
    study = dataclasses.replace(tiny(), source=dataclasses.replace(tiny().source, person=_pair))
    member = Member("raw", "cv", 0, 0)
    record = read(done / "runs" / member.name / "scores.json")
    other = dataclasses.replace(member, fold=1)
    records = {member: record, other: read(done / "runs" / other.name / "scores.json")}
    answers = Scores(study, records).answers()["raw", "age", "cv", "linear"]
    people = sorted({_pair(f"sub-{i}") for i in range(N)})
    assert answers.n == len(people) == N // 2
    errors = np.abs(
        np.subtract(record["targets"]["age"]["probes"]["linear"]["predicted"], record["targets"]["age"]["truth"])
    )
    for counts, draw in zip(subject_counts(answers.n, 5), answers.draws[:5, 0, 0], strict=True):
        drawn = dict(zip(people, counts.astype(int), strict=True))
        again = np.repeat(errors, [drawn[_pair(scan)] for scan in record["held_out"]])
        assert draw == pytest.approx(again.mean())


def test_a_store_whose_splits_are_of_another_version_is_refused(data: Path, tmp_path: Path) -> None:
    store_of(tiny(), tmp_path / "s.zarr", data, lambda line: None)
    dealt = Source("table", "made here", columns=lambda s: cross_validation(s, "cv{seed}f{fold}", 3, 2, person=_pair))
    with pytest.raises(BadInput, match=r"column cv0f0 .* is not what the study makes now"):
        store_of(dataclasses.replace(tiny(), source=dealt), tmp_path / "s.zarr", None, lambda line: None)


def test_columns_of_a_study_are_added_once(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    one = store_of(tiny(), tmp_path / "s.zarr", data, said.append)
    two = store_of(tiny(), tmp_path / "s.zarr", None, said.append)
    assert [c.name for c in one.columns] == [c.name for c in two.columns]
    assert sum("4 columns" in line for line in said) == 1
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing_like_it"], "no study 'nothing_like_it'"),
        (["ixi_roi", "--seeds", "0"], "--seeds 0"),
        (["ixi_roi", "--jobs", "0"], "--jobs 0"),
        (["ixi_roi", "--methods", "nobody"], "no method 'nobody' in study ixi_roi"),
        (["ixi_roi", "--only", "tables"], "no member of ixi_roi is done"),
    ],
)
def test_the_command_refuses_in_words(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *words, "--folder", str(tmp_path / "f")]) == 2
    assert told in capsys.readouterr().err


def test_the_manifest_names_what_is_missing_as_a_sweep_reads_it(data: Path, tmp_path: Path) -> None:
    from launch import sweep

    reproduce(tiny(), tmp_path, methods=["cauc", "raw"], seeds=1, data=data, only="check", say=lambda line: None)
    listed = sweep.listed(tmp_path / "manifest.json")
    assert [m.name for m in listed] == ["cauc-test-s0-f0", "cauc-cv-s0-f0", "cauc-cv-s0-f1"]
    run = sweep.run_of(listed[1], tmp_path / "sweep-0")
    assert (run.data.split, run.seed, run.objective) == ("cv0f0", 0, tiny().arms["cauc"].objective)
    home = Place(tmp_path, tmp_path / "store.zarr").home(Member("cauc", "cv", 0, 0))
    assert home == tmp_path / "runs" / "cauc-cv-s0-f0"
    run.folder.mkdir(parents=True)
    assert Place(tmp_path, tmp_path / "store.zarr").home(Member("cauc", "cv", 0, 0)) == run.folder


def _fold(metric: str, n: int = 40) -> Fold:
    draw = np.random.default_rng(len(metric))
    truth = draw.normal(size=n) if metric == "mae" else draw.integers(0, 2 if metric == "auc" else 3, n).astype(float)
    answers = truth + draw.normal(size=n).round(1) if metric != "balanced_accuracy" else draw.permutation(truth)
    return Fold(np.arange(n), truth, answers)


@pytest.mark.parametrize("metric", ["mae", "auc", "balanced_accuracy"])
def test_a_metric_of_counts_is_that_of_the_repeated_subjects(metric: Any) -> None:
    fold = _fold(metric)
    oracle = {
        "mae": lambda y, p: np.abs(y - p).mean(),
        "auc": roc_auc_score,
        "balanced_accuracy": balanced_accuracy_score,
    }[metric]
    counts = subject_counts(40, 5)
    got = Answers(metric, 40, {(0, 0): fold}).resampled(counts)
    for b, row in enumerate(counts.astype(int)):
        again = np.repeat(np.arange(40), row)
        assert got[b, 0, 0] == pytest.approx(oracle(fold.truth[again], fold.answers[again]))


def test_the_interval_of_a_mean_error_is_that_of_the_normal_law() -> None:
    draw = np.random.default_rng(0)
    errors = draw.exponential(size=400)
    fold = Fold(np.arange(400), np.zeros(400), errors)
    got = estimate(Answers("mae", 400, {(0, 0): fold}))
    assert got.value == pytest.approx(errors.mean())
    assert got.se == pytest.approx(errors.std() / 20, rel=0.08)


def test_seeds_that_differ_widen_the_interval() -> None:
    fold = _fold("mae")
    worse = [dataclasses.replace(fold, answers=fold.answers + shift) for shift in (0.0, 3.0, -3.0)]
    alike = estimate(Answers("mae", 40, {(s, 0): fold for s in range(3)}))
    unlike = estimate(Answers("mae", 40, {(s, 0): worse[s] for s in range(3)}))
    assert unlike.se > 2 * alike.se


def test_a_difference_is_paired_and_has_the_sign_of_better() -> None:
    fold = _fold("mae")
    better = dataclasses.replace(fold, answers=fold.truth + 0.9 * (fold.answers - fold.truth))
    a, b = (Answers("mae", 40, {(s, 0): of for s in range(3)}) for of in (better, fold))
    gain, p, by_fold = difference(a, b)
    assert gain.low > 0
    assert p < 0.01
    assert by_fold.shape == (3, 1)
    assert estimate(a).high > estimate(b).low  # unpaired, the intervals overlap
    assert difference(b, a)[0].value == pytest.approx(-gain.value)
    assert difference(a, a)[1] == 1.0


def test_results_stand_between_their_marks_of_a_document(done: Path, tmp_path: Path) -> None:
    document = tmp_path / "d.md"
    document.write_text("before\n<!-- results tiny -->\nstale words\n<!-- end tiny -->\nafter\n")
    results = read(done / "results.json")
    page.into(document, results)
    page.into(document, results)
    text = document.read_text()
    assert text.startswith("before\n<!-- results tiny -->\n### tiny")
    assert text.endswith("<!-- end tiny -->\nafter\n")
    assert "stale words" not in text
    document.write_text("nothing")
    with pytest.raises(BadInput, match="no marks of tiny"):
        page.into(document, results)
