"""Real scans through the whole chain: shapes, intensities and orientations that no phantom has."""

import os
from pathlib import Path

import pytest

from cauc_dist.cli import main
from cauc_dist.probe import probe
from cauc_dist.store.reader import Store

DATA = os.environ.get("CAUC_DATA")
pytestmark = [pytest.mark.real, pytest.mark.skipif(not DATA, reason="CAUC_DATA does not name the real data")]


def test_hippocampus_scans_of_236_shapes_train_and_are_probed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, store = str(Path(DATA or "") / "hippocampus260"), tmp_path / "store.zarr"
    assert main(["ingest", source, str(store)]) == 2
    assert "shape 31 40 24" in capsys.readouterr().err  # the window that the recipe's docstring names
    assert main(["ingest", source, str(store), "--shape", "31", "40", "24"]) == 0
    run = tmp_path / "run"
    options = ["--data.store", str(store), "--run", str(run), "--epochs", "2", "--ranks", "2"]
    assert main(["train", "hippocampus_cauc", *options]) == 0
    table = probe([run])
    assert (table.n_train, table.n_test, table.columns) == (195, 65, ("anterior_mm3", "posterior_mm3"))


def test_whole_heads_train_and_are_probed(tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    assert main(["ingest", str(Path(DATA or "") / "ixi50"), str(store)]) == 0
    assert Store.open(store).shape == (1, 80, 96, 80)
    run = tmp_path / "run"
    assert (
        main(["train", "ixi50_cauc", "--data.store", str(store), "--run", str(run), "--epochs", "2", "--ranks", "2"])
        == 0
    )
    table = probe([run], ["age", "sex"])
    assert (table.n_train, table.n_test) == (40, 10)
