"""A fine-tuned encoder is plain AdamW on the training subjects, judged on the others as its frozen probe is."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from cauc_dist import probe, recipes, spawn
from cauc_dist.cli import main
from cauc_dist.config import Augment, Encoder, Engine, Objective, Projector, RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.finetune import Settings, Tuning, finetune
from cauc_dist.prepare import load, parts, prepare
from cauc_dist.store.ingest import ingest
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import read_all
from cauc_dist.stream.plan import split
from cauc_dist.stream.values import values
from cauc_dist.table import Table
from cauc_dist.train import build_model

N = 240
OFF = {f.name: 0.0 for f in dataclasses.fields(Augment) if f.name.startswith("p_")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of three features, and two columns that no linear map of them tells."""
    made = tmp_path_factory.mktemp("table")
    draw = np.random.default_rng(0)
    x = draw.normal(size=(N, 3))
    bent, group = x[:, 0] * x[:, 1] * 5 + 50, (np.abs(x[:, 2]) > 0.67).astype(int)
    names = [f"sub-{i:03d}" for i in range(N)]
    head = "participant_id\t" + "\t".join(f"f{k}" for k in range(3)) + "\n"
    rows = [f"{name}\t" + "\t".join(f"{v:.6f}" for v in row) + "\n" for name, row in zip(names, x, strict=True)]
    (made / "features.tsv").write_text(head + "".join(rows))
    ages = ["n/a" if i in (3, 60) else f"{v:.4f}" for i, v in enumerate(bent)]
    told = [f"{n}\t{a}\t{'ab'[g]}\n" for n, a, g in zip(names, ages, group, strict=True)]
    (made / "participants.tsv").write_text("participant_id\tbent\tgroup\n" + "".join(told))
    ingest(made, made / "store.zarr", features=made / "features.tsv")
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    base = recipes.get("demo_cauc")
    config = dataclasses.replace(
        base,
        run=folder / "run",
        epochs=2,
        engine=Engine(device="cpu", threads=1),
        data=dataclasses.replace(base.data, store=str(folder / "store.zarr"), normalise="none", folds=4),
        encoder=Encoder(name="mlp", width=32),
        projector=Projector(8, 4),
        augment=dataclasses.replace(base.augment, **{**OFF, "p_noise": 0.5}),
        objective=Objective(name="simclr"),
    )
    assert spawn.start(1, str(prepare(config, 1))) == 0
    return folder / "run"


def tuning(run: Path, target: str, settings: Settings, **changes: object) -> tuple[Tuning, NDArray[np.int64]]:
    config: RunConfig = dataclasses.replace(load(run), **changes)  # type: ignore[arg-type]
    store = Store.open(config.data.store)
    train, test = parts(config, store)
    y = store.metadata([target])[:, 0]
    kept, held = (rows[~np.isnan(y[rows])] for rows in (train, test))
    return Tuning(config, store, store.column(target), y, kept, settings), held


@pytest.mark.parametrize("target", ["bent", "group"])
def test_an_epoch_is_one_of_plain_adamw_on_encoder_and_head(run: Path, target: str) -> None:
    still = dataclasses.replace(load(run).augment, **OFF)
    one, test = tuning(run, target, Settings(batch_size=50, lr=1e-2, weight_decay=0.1), augment=still)
    *_, model = one.trained(None, one.train, 2)
    config, store = one.config, one.store
    network = build_model(config, store.shape).encoder
    head = nn.Linear(32, 1 if target == "bent" else 2)
    for p in head.parameters():
        nn.init.zeros_(p)
    ours = nn.Sequential(network, head)
    matrices = [p for p in ours.parameters() if p.ndim == 2]
    vectors = [p for p in ours.parameters() if p.ndim == 1]
    steps = [torch.optim.AdamW(matrices, 1e-2, weight_decay=0.1), torch.optim.AdamW(vectors, 1e-2, weight_decay=0)]
    x = read_all(store, np.arange(N), values(store, "none"))
    y = torch.from_numpy(one.y)
    scaled = ((y - y[one.train].mean()) / y[one.train].std(correction=0)).float()
    for epoch in range(2):
        order = np.random.default_rng([0, epoch]).permutation(one.train)
        for k in range(0, len(order), 50):
            at = order[k : k + 50]
            out = ours(x[at])
            loss = (
                ((out[:, 0] - scaled[at]) ** 2).mean()
                if target == "bent"
                else -out.log_softmax(1)[torch.arange(len(at)), y[at].long()].mean()
            )
            ours.zero_grad()
            loss.backward()
            for step in steps:
                step.step()
    with torch.no_grad():
        wanted = ours.eval()(x[test]).double().numpy()
    found = one.answers(model, test)
    if target == "bent":
        mean, sd = y[one.train].mean().item(), y[one.train].std(correction=0).item()
        assert found.predicted == pytest.approx(wanted[:, 0] * sd + mean, rel=1e-4)
    else:
        assert found.probability is not None
        assert found.probability[:, 1] == pytest.approx(1 / (1 + np.exp(wanted[:, 0] - wanted[:, 1])), rel=1e-3)


def test_the_number_of_epochs_is_that_of_least_error_on_a_fifth_of_the_training_subjects(run: Path) -> None:
    one, test = tuning(run, "bent", Settings(epochs=6, lr=3e-2))
    epochs, answers = one(None, test)
    names = sorted({one.store.subjects[i] for i in one.train})
    fit, choose = split([one.store.subjects[i] for i in one.train], 5, 0)
    assert len(choose) == pytest.approx(len(names) / 5, abs=1)
    curve = [one.error(model, one.train[choose]) for model in one.trained(None, one.train[fit], 6)]
    assert epochs == int(np.argmin(curve)) + 1
    *_, again = one.trained(None, one.train, epochs)
    assert one.answers(again, test).predicted.tolist() == answers.predicted.tolist()


def test_a_store_that_does_not_fit_in_memory_is_read_by_batches_to_the_same_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, test = tuning(run, "group", Settings(epochs=1))
    *_, model = one.trained(None, one.train, 1)
    assert one.whole is not None
    monkeypatch.setattr(probe, "VOXEL_BYTES", 100)
    two = dataclasses.replace(one)
    *_, read = two.trained(None, two.train, 1)
    assert two.whole is None
    assert two.answers(read, test).predicted.tolist() == one.answers(model, test).predicted.tolist()


def test_held_out_values_change_nothing_that_is_said(run: Path) -> None:
    one, test = tuning(run, "group", Settings(epochs=2))
    flipped = one.y.copy()
    flipped[test] = 1 - flipped[test]
    other = dataclasses.replace(one, y=flipped)
    (epochs, said), (epochs_too, said_too) = one(None, test), other(None, test)
    assert epochs == epochs_too
    assert said.predicted.tolist() == said_too.predicted.tolist()
    assert (said.truth + said_too.truth).tolist() == [1.0] * len(test)


def test_what_no_linear_map_tells_is_learned_end_to_end(run: Path) -> None:
    table = finetune(run, "group", Settings(epochs=30, lr=1e-2), scratch=True)
    assert list(table.scores) == ["demo_cauc", "untrained", "demo_cauc, fine-tuned", "from scratch"]
    tuned = table.scores["demo_cauc, fine-tuned"]["group"]
    assert tuned.value > 0.75
    assert 1 <= tuned.detail["epochs"] <= 30
    assert (table.n_train, table.n_test) == (180, 60)


def test_the_frozen_rows_are_those_of_the_probe(run: Path) -> None:
    table = finetune(run, "bent", Settings(epochs=1))
    probed = probe.probe([run], ["bent"], voxels=False)
    assert {m: table.scores[m] for m in probed.scores} == probed.scores
    assert table.chance == probed.chance
    config, store = load(run), Store.open(load(run).data.store)
    known = ~np.isnan(store.metadata(["bent"])[parts(config, store)[1], 0])
    assert len(table.scores["demo_cauc, fine-tuned"]["bent"].truth) == known.sum()


def test_the_command_writes_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", str(run), "--target", "group", "--epochs", "1"]) == 0
    text = (run / "finetune-group.json").read_text()
    assert list(Table.from_json(text).scores) == list(json.loads(text)["scores"])
    told = capsys.readouterr().out
    assert "finetune: demo_cauc, fine-tuned: 1 epochs, the most that it was given" in told
    assert "untrained" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "bnet"], "no column 'bnet'"),
        (["--target", "group", "--epochs", "0"], "--epochs 0; wanted 1 or more"),
        (["--target", "group", "--batch-size", "1"], "--batch-size 1; wanted 2 or more"),
        (["--target", "group", "--lr", "nan"], "--lr nan"),
        (["--target", "bent", "--lr", "1e30"], "wanted a finite one. Lower --lr"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(run), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_held_nobody_out_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "all"
    shutil.copytree(run, other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"folds": 4', '"folds": 1'))
    with pytest.raises(BadInput, match="held nobody out"):
        finetune(other, "group")
