"""`python -m launch` fed with nonsense: found, wanted, what to do; never a traceback, nothing half-written."""

from dataclasses import fields
from pathlib import Path

import pytest

from launch.cli import COMMANDS, main
from launch.site import Resources
from tests import test_cli_fuzz as fuzz

NONSENSE = ("nonsense", "-1", "nan", "", "{}", "99999999999999999999")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without SLURM, and with things that are none."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "site.toml").write_text("partition = [")
    (tmp_path / "manifest.json").write_text('[{"name": 3}]')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    return tmp_path


def refused(arguments: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz.refused(arguments, place, capsys, main)


@pytest.mark.parametrize("what", ["nothing", "empty", "binary", "\0", "é" * 300])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_what_is_none(
    command: str, what: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"ingest": ["new.zarr", "--tasks", "2"]}.get(command, [])
    refused([command, what, *more], place, capsys)


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize("name", [field.name for field in fields(Resources)])
def test_no_resource_is_queued_for_a_store_that_is_none(
    name: str, value: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", "demo_cauc", "--data.store", "none.zarr", "--run", "run"]
    refused([*words, f"--{name.replace('_', '-')}={value}"], place, capsys)


@pytest.mark.parametrize(
    "words",
    [
        ["submit", "demo_cauc", "--site", "site.toml"],
        ["submit", "demo_cauc", "--site", "none"],
        ["sweep", "--manifest", "manifest.json", "--run", "s"],
        ["sweep", "--manifest", "binary", "--run", "s"],
        ["sweep", "demo_cauc", "--grid", "nonsense", "--run", "s"],
        ["sweep", "demo_cauc", "--grid", "seed=x,y", "--run", "s"],
        ["sweep", "--rerun", "empty"],
        ["logs", "empty", "--rank", "x"],
        ["sumbit", "demo_cauc"],
        [""],
    ],
)
def test_no_word_is_taken_for_another(words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(words, place, capsys)


def test_debug_shows_where(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "demo_cauc", "--data.store", "none.zarr", "--run", "run", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
