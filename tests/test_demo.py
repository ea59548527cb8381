"""The whole chain at the size that `make demo` runs: every method learns more of age than an untrained encoder has."""

import subprocess
import sys
from pathlib import Path

import pytest

from cauc_dist.cli import main
from cauc_dist.demo import METHODS, verdict
from cauc_dist.table import Table

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "cauc_dist", "demo", "--folder", str(folder)],
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_each_method_beats_the_untrained_encoder_on_held_out_age(demo: tuple[Path, str], method: str) -> None:
    table = Table.from_json((demo[0] / "table.json").read_text())
    gain, low, _ = table.difference(method, "untrained", "age")
    assert gain > 0
    assert low > 0, f"{method}: the paired 95 % interval of the gain reaches {low:.2f} years"
    assert table.scores[method]["age"].value < table.chance["age"]


def test_the_demo_prints_its_table_and_writes_a_page(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    table = Table.from_json((folder / "table.json").read_text())
    assert str(table) in printed
    assert verdict(table) in printed
    assert table.n_train + table.n_test == 240
    assert list(table.scores) == [*METHODS, "untrained", "raw voxels"]
    assert (folder / "report.html").read_text().count("<img") >= 6


def test_a_taken_folder_is_refused(demo: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--folder", str(demo[0])]) == 2
    assert f"{demo[0]} exists; wanted a new folder" in capsys.readouterr().err
