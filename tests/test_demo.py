"""The whole chain at the size that `make demo` runs: every method learns more of age than an untrained encoder has.

And the quick one, which has the same stages and files, and claims nothing.
"""

import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import pytest

from cauc_dist.cli import main
from cauc_dist.config import read
from cauc_dist.demo import CHAIN_ONLY, METHODS, QUICK, demo, verdict
from cauc_dist.errors import BadInput
from cauc_dist.store.reader import Store
from cauc_dist.table import Table

T = TypeVar("T")


def full(test: T) -> T:
    """Marks of what needs the fixture below."""
    return pytest.mark.demo(pytest.mark.timeout(600)(test))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "cauc_dist", "demo", "--folder", str(folder)],
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@full
@pytest.mark.parametrize("method", METHODS)
def test_each_method_beats_the_untrained_encoder_on_held_out_age(made: tuple[Path, str], method: str) -> None:
    table = Table.from_json((made[0] / "table.json").read_text())
    gain, low, _ = table.difference(method, "untrained", "age")
    assert gain > 0
    assert low > 0, f"{method}: the paired 95 % interval of the gain reaches {low:.2f} years"
    assert table.scores[method]["age"].value < table.chance["age"]


@full
def test_the_demo_prints_its_table_and_writes_a_page(made: tuple[Path, str]) -> None:
    folder, printed = made
    table = Table.from_json((folder / "table.json").read_text())
    assert str(table) in printed
    assert verdict(table) in printed
    assert table.n_train + table.n_test == 240
    assert list(table.scores) == [*METHODS, "untrained", "raw voxels"]
    page = (folder / "report.html").read_text()
    assert [name for name in METHODS if name in page] == list(METHODS)


@full
def test_a_taken_folder_is_refused(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--folder", str(made[0])]) == 2
    assert f"{made[0]} exists; wanted a new folder" in capsys.readouterr().err


@pytest.mark.timeout(400)
def test_the_quick_demo_writes_the_same_files_and_says_that_it_shows_the_chain_only(tmp_path: Path) -> None:
    folder, told = tmp_path / "demo", list[str]()
    assert demo(folder, ranks=2, seed=0, say=told.append, quick=True) == 0
    files = {path.name for path in folder.iterdir()}
    assert files == {"cohort", "store.zarr", "table.json", "report.html", *METHODS}
    table = Table.from_json((folder / "table.json").read_text())
    assert table.n_train + table.n_test == len(Store.open(folder / "store.zarr")) == 48
    assert list(table.scores) == [*METHODS, "untrained", "raw voxels"]
    assert [read(folder / name / "config.json").epochs for name in METHODS] == [3, 3, 3]
    text = "\n".join(told)
    assert f"{table}\n\n{CHAIN_ONLY}" in text
    assert "better" not in text.replace(str(table), "")  # no verdict of a method
    assert [f"[{i}/5]" in text for i in range(1, 6)] == [True] * 5


def test_the_quick_demo_refuses_what_its_batches_cannot_do(tmp_path: Path) -> None:
    for subjects, size, complaint in ((31, 24, "--subjects 31; wanted 32 or more"), (48, 15, "--size 15; wanted 16")):
        with pytest.raises(BadInput, match=complaint):
            demo(tmp_path / "demo", subjects=subjects, size=size, ranks=2, seed=0, say=print, quick=True)
    assert not (tmp_path / "demo").exists()
    assert QUICK.batch_size == 16
