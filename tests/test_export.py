"""An exported encoder gives the features of its run, on scans that it normalises itself, and tells nobody's secrets."""

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cauc_dist
from cauc_dist import checkpoint, cli, probe
from cauc_dist.checkpoint import Writer
from cauc_dist.config import Augment, Data, Encoder, Objective, Optim, Projector, RunConfig
from cauc_dist.errors import BAD_INPUT, BadInput
from cauc_dist.export import export, load_encoder
from cauc_dist.prepare import load, prepare
from cauc_dist.provenance import provenance
from cauc_dist.store.ingest import ingest
from cauc_dist.store.planned import Settings
from cauc_dist.store.reader import Store
from cauc_dist.train import build_model, card
from tests.store.cohorts import bids, noise
from tests.test_checkpoint import Evil


def config(store: Path, run: Path, **changes: Any) -> RunConfig:
    base = RunConfig(
        name="test",
        run=run,
        batch_size=4,
        data=Data(store=str(store)),
        augment=Augment(p_intensity=0.0, p_blur=0.0),
        encoder=Encoder(width=4),
        projector=Projector(16, 8),
        objective=Objective(kernel=("age:gaussian:5",), lambda_align=1.0),
    )
    return dataclasses.replace(base, **changes)


EXACT = Settings(layout="dense", dtype="f32", codec="none")
AVERAGE = 0.05
"""What is added to the parameters to make the moving average of these tests."""


def trained(run: RunConfig, *, step: int = 7, ema: bool = False) -> Path:
    """A run folder with one checkpoint of weights and statistics that no seed gives, and all that Adam keeps."""
    folder = prepare(run, 1)
    store = Store.open(run.data.store)
    model, draw = build_model(run, store.shape), torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {"optimizer/step": torch.tensor(7.0)}
    for name, p in model.named_parameters():
        value = p.detach() + 0.1 * torch.randn(p.shape, generator=draw)
        state |= {f"parameter/{name}": value, f"exp_avg/{name}": value * 0, f"exp_avg_sq/{name}": value * 0}
        if ema:
            state[f"ema/{name}"] = value + AVERAGE
    for name, b in model.named_buffers():
        state[f"buffer/{name}"] = b + torch.rand(b.shape, generator=draw) if b.is_floating_point() else b + 7
    with Writer(folder, card(run, store), keep=1) as writer:
        writer.save(step, state, 1.0)
    return folder


def features(run: Path) -> np.ndarray:
    """Of every scan of the store, by the probe: loader, normalisation and model of training."""
    settings = load(run)
    store = Store.open(settings.data.store)
    return probe.embed(settings, store, np.arange(len(store)), probe.newest(settings, store))


def raw(run: Path) -> Tensor:
    store = Store.open(load(run).data.store)
    return torch.stack([torch.from_numpy(store.volume(i)) for i in range(len(store))])


@pytest.fixture(scope="module")
def stores(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed heads; the same number of full volumes in which no voxel is 0; a table of features."""
    folder = tmp_path_factory.mktemp("stores")
    ingest(bids(folder / "bids", [noise(i, (17, 18, 17)) for i in range(8)]), folder / "dense", EXACT)
    (folder / "f").mkdir()
    draw = np.random.default_rng(0)
    table = ["participant_id\ta\tb\tc\td\te\n"]
    table += [f"sub-{i:02d}\t" + "\t".join(f"{x:.4f}" for x in draw.normal(50, 9, 4)) + "\t3\n" for i in range(24)]
    (folder / "f/features.tsv").write_text("".join(table))
    people = [f"sub-{i:02d}\t{20 + i}\t{'MF'[i % 2]}\n" for i in range(24)]
    (folder / "f/participants.tsv").write_text("participant_id\tage\tsex\n" + "".join(people))
    ingest(folder / "f", folder / "rows", features=folder / "f/features.tsv")
    return {"packed": store, "dense": folder / "dense", "rows": folder / "rows"}


@pytest.mark.parametrize(
    ("of", "normalise", "encoder"),
    [
        ("packed", "volume", Encoder(width=4)),
        ("packed", "dataset", Encoder(width=4)),
        ("dense", "volume", Encoder(width=4, norm="batch")),
        ("dense", "dataset", Encoder(width=8)),
        ("dense", "none", Encoder(width=4, norm="batch")),
        ("rows", "dataset", Encoder(name="mlp", width=8)),
        ("rows", "none", Encoder(name="mlp", width=8)),
    ],
)
def test_features_of_raw_scans_are_those_that_the_probe_has(
    stores: dict[str, Path], tmp_path: Path, of: str, normalise: str, encoder: Encoder
) -> None:
    data = Data(store=str(stores[of]), normalise=normalise)  # type: ignore[arg-type]
    folder = trained(config(stores[of], tmp_path / "run", data=data, encoder=encoder))
    exported = cauc_dist.load_encoder(export(folder, tmp_path / "out"))
    wanted, scans = features(folder), raw(folder)
    with torch.no_grad():
        found = exported(exported.prepare(scans)).numpy()
    assert wanted.std(0).max() > 1e-3  # scans differ
    assert found.shape == (len(scans), exported.width)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_the_moving_average_is_exported_and_probed_where_the_run_kept_one(store: Path, tmp_path: Path) -> None:
    run = config(store, tmp_path / "run", optim=Optim(ema=0.9))
    folder = trained(run, ema=True)
    exported = load_encoder(export(folder, tmp_path / "out"))
    saved, _ = checkpoint.latest(folder)
    assert saved is not None
    for name, p in exported.network.named_parameters():
        assert torch.equal(p, saved.tensors[f"parameter/encoder.{name}"] + AVERAGE)
    with torch.no_grad():
        found = exported(exported.prepare(raw(folder))).numpy()
    np.testing.assert_allclose(found, features(folder), rtol=1e-5, atol=1e-6)
    assert exported.card["ema"] == 0.9


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config(store, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def out(run: Path) -> Path:
    return export(run, run.parent / "models" / "out")


def test_what_is_written_is_the_encoder_alone_and_how_to_use_it(run: Path, out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "encoder.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    told = json.loads((out / "config.json").read_text())
    assert (told["format"], told["version"], told["step"]) == ("cauc_dist.encoder", 1, 7)
    assert told["encoder"] == {"name": "cnn3d", "width": 4, "norm": "published"}
    assert (told["shape"], told["orientation"], told["voxel_mm"]) == ([1, 16, 16, 16], "RAS", [12.0, 12.0, 12.0])
    assert (told["normalise"], told["outside"], told["objective"], told["ema"]) == ("volume", 0.0, "cauc", 0.0)
    assert told["versions"] == provenance()["versions"]
    assert "mean" not in told
    encoder = load_encoder(out)
    names = {f"encoder.{name}" for name in encoder.network.state_dict()}
    assert names == {name for name in build_model(load(run), (1, 16, 16, 16)).state_dict() if "projector" not in name}
    assert not encoder.training


def secrets(store: Path) -> set[bytes]:
    """Names of subjects and scans, levels of columns, and every number of the metadata as text and as float64."""
    opened = Store.open(store)
    numbers = opened.metadata([c.name for c in opened.columns if c.kind == "number"]).ravel()
    texts = {*opened.ids, *opened.subjects, *(x for c in opened.columns for x in c.levels if len(x) > 1)}
    return {t.encode() for t in texts} | {n.tobytes() for n in numbers if n > 0} | {str(n).encode() for n in numbers}


def test_neither_checkpoint_nor_export_holds_a_name_or_a_value_of_the_metadata(tmp_path: Path) -> None:
    """Levels and values are long, so that none is there by chance."""
    (tmp_path / "b").mkdir()
    source = bids(tmp_path / "b", [noise(i, (16, 16, 16)) for i in range(8)])
    rows = [f"sub-{i:02d}\t{20 + i * 1.2345678 + 0.0123}\tclinic-{'MF'[i % 2]}\n" for i in range(8)]
    (source / "participants.tsv").write_text("participant_id\tage\tsite\n" + "".join(rows))
    ingest(source, tmp_path / "s.zarr")
    objective = Objective(kernel=("age:gaussian:5", "site:delta"), lambda_align=1.0)
    folder = trained(config(tmp_path / "s.zarr", tmp_path / "run", objective=objective))
    out = export(folder, tmp_path / "out")
    hidden = secrets(tmp_path / "s.zarr")
    assert {b"sub-00", b"clinic-M"} <= hidden
    assert len(hidden) == 8 + 2 + 8 + 8
    files = [p for root in (out, folder / "checkpoints") for p in root.rglob("*") if p.is_file()]
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        assert [text for text in hidden if text in data] == []
        assert str(tmp_path).encode() not in data
        assert re.findall(rb"/(?:home|root|tmp|work)\b", data) == []


def test_the_search_for_secrets_finds_what_is_planted(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    ages = torch.from_numpy(opened.metadata(["age"]))
    with Writer(tmp_path, {"who": opened.subjects[3]}, keep=1) as writer:
        writer.save(1, {"buffer/y": ages}, 1.0)
    data = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    found = {text for text in secrets(store) if text in data}
    assert found == {opened.subjects[3].encode(), *(age.numpy().tobytes() for age in ages)}


def test_an_encoder_opens_without_the_run_its_store_or_deepspeed(out: Path, tmp_path: Path) -> None:
    code = (
        "import sys, cauc_dist; assert 'torch' not in sys.modules; import torch\n"
        f"encoder = cauc_dist.load_encoder({str(out)!r})\n"
        "assert not {'deepspeed', 'zarr', 'sklearn', 'mpi4py'} & set(sys.modules)\n"
        "x = torch.arange(4096.0).view(1, 1, 16, 16, 16)\n"
        "print(tuple(encoder(encoder.prepare(x)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "(1, 64)\n"


def test_the_package_has_no_other_name_that_comes_when_it_is_asked_for() -> None:
    with pytest.raises(AttributeError, match="module 'cauc_dist' has no attribute 'load_model'"):
        cauc_dist.load_model  # noqa: B018


def test_the_command_line_exports(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'out'}: cauc_dist.load_encoder opens it\n")
    assert load_encoder(tmp_path / "out").card["step"] == 7
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == BAD_INPUT
    assert "out exists already; wanted a new folder" in capsys.readouterr().err


def copy(out: Path, to: Path, **changes: object) -> Path:
    """A folder that `write` might have made of another card."""
    tensors, told = checkpoint.read(out, ("encoder.safetensors", "config.json"))
    checkpoint.write(to, tensors, {**told, **changes}, ("encoder.safetensors", "config.json"))
    return to


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"version": 2}, r'is of \["cauc_dist.encoder", 2, "volume"\]; wanted format cauc_dist.encoder, version 1'),
        ({"format": "other"}, r'is of \["other", 1'),
        ({"normalise": "site"}, r'1, "site"\]; wanted .* a normalisation of volume, dataset, none'),
        ({"encoder": {"name": "vit", "width": 2, "norm": "group"}}, "encoder 'vit'; wanted a known encoder"),
        ({"encoder": {"kind": "cnn3d"}}, r"describes no encoder that is known here \(.*'kind'"),
        ({"encoder": {"name": "cnn3d", "width": 2, "norm": "group"}}, r"describes no encoder .*size mismatch"),
        ({"shape": None}, "describes no encoder that is known here"),
    ],
)
def test_what_this_version_does_not_know_is_refused(
    out: Path, tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(BadInput, match=re.compile(complaint, re.DOTALL)):
        load_encoder(copy(out, tmp_path / "other", **changes))


@pytest.mark.parametrize("name", ["encoder.safetensors", "config.json"])
def test_a_damaged_or_missing_file_is_refused(out: Path, tmp_path: Path, name: str) -> None:
    path = copy(out, tmp_path / "other") / name
    data = path.read_bytes()
    path.write_bytes(data.replace(b"7", b"6", 1) if name == "config.json" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadInput, match=r"holds no sound encoder \(ValueError: .*; wanted encoder.safetensors and con"):
        load_encoder(path.parent)
    path.unlink()
    with pytest.raises(BadInput, match=r"holds no sound encoder \(FileNotFoundError"):
        load_encoder(path.parent)


def test_a_pickle_under_the_name_of_the_weights_is_not_run(out: Path, tmp_path: Path) -> None:
    folder, mark = copy(out, tmp_path / "other"), tmp_path / "ran"
    (folder / "encoder.safetensors").write_bytes(pickle.dumps(Evil(mark)))
    told = json.loads((folder / "config.json").read_text())
    del told["seal"]
    told["sha256"] = checkpoint._sha256(folder / "encoder.safetensors")
    (folder / "config.json").write_text(json.dumps({**told, "seal": checkpoint._seal(told)}))
    with pytest.raises(BadInput, match=r"holds no sound encoder \(SafetensorError"):
        load_encoder(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("scans", "complaint"),
    [
        (torch.ones(2, 1, 16, 16, 17), r"scans of shape \(2, 1, 16, 16, 17\); wanted \(B, 1, 16, 16, 16\)"),
        (torch.full((1, 1, 16, 16, 16), torch.nan), "scans with NaN or infinite values; wanted finite ones"),
        (torch.ones(1, 1, 16, 16, 16), "a scan with a constant channel; wanted one that varies"),
    ],
)
def test_scans_that_training_would_have_refused_are_refused(out: Path, scans: Tensor, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        load_encoder(out).prepare(scans)


def test_an_export_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync_tree", full)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path / "models" / "out")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_run_without_a_sound_checkpoint_or_with_another_store_is_not_exported(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(BadInput, match="no sound checkpoint in"):
        export(tmp_path / "run", tmp_path / "out")
    record = json.loads((tmp_path / "run/provenance.json").read_text())
    (tmp_path / "run/provenance.json").write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    with pytest.raises(BadInput, match="has the fingerprint"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
