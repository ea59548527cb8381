"""The command line fed with nonsense: found, wanted, what to do; never a traceback, nothing half-written."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cauc_dist import recipes
from cauc_dist.cli import main
from cauc_dist.cli.completion import KINDS, names
from cauc_dist.config import RunConfig, to_json

NONSENSE = ("nonsense", "-1", "nan", "", "9999999999999999999")
INNOCENT = ("run", "seed", "name", "data.stage", "trackers.project")  # any word, or any number, is one of these
BARE = ("demo", "doctor", "verify", "completion")
"""They need no source, and would begin."""
COMMANDS = [command for command in KINDS if command not in BARE]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder, and what is in each file."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with things that are none."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "list.json").write_text("[1, 2")
    (tmp_path / "table.tsv").write_text("participant_id\tage\nsub-1\tx\n\t\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(
    arguments: list[str],
    place: Path,
    capsys: pytest.CaptureFixture[str],
    program: Callable[[list[str]], int] = main,
) -> None:
    """Run it: exit code 2, told in the words of BadInput or of the parser, and nothing is written."""
    before = tree(place)
    try:
        code: Any = program(arguments)
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    assert code == 2, (code, told.err[-2000:])
    assert "Traceback" not in told.err
    last = told.err.strip().splitlines()[-1] if told.err.startswith("error:") else ""
    parser = "For full helptext" in told.err
    assert parser or ("; wanted " in last and last.endswith((".", "?"))) or "Check the path" in last, told.err
    assert tree(place) == before


def fields(kind: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(kind):
        value = getattr(recipes.get("demo_cauc"), field.name) if kind is RunConfig else None
        if dataclasses.is_dataclass(value):
            yield from (f"{field.name}.{inner.name}" for inner in dataclasses.fields(value))
        else:
            yield prefix + field.name


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize("field", [name for name in fields(RunConfig) if name not in INNOCENT])
def test_no_field_of_a_run_takes_nonsense_in_silence(
    field: str, value: str, store: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a field takes for a value of its own is checked as a whole run is, and then its folder is written."""
    option = f"--{field.replace('_', '-')}={value}"
    arguments = ["train", "demo_cauc", "--data.store", str(store), "--no-start", "--batch-size", "6", option]
    before = tree(place)
    try:
        code: Any = main(arguments)
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    assert code in (0, 2), told.err[-2000:]
    assert "Traceback" not in told.err
    if code == 2:
        assert "For full helptext" in told.err or "; wanted " in told.err or "Check the path" in told.err, told.err
        assert tree(place) == before
    else:
        assert value not in ("nonsense", "nan"), told.out


@pytest.mark.parametrize("what", ["nothing", "empty", "binary", "list.json", "table.tsv", "\0", "é" * 300])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_what_is_none(
    command: str, what: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {"ingest": ["new.zarr"], "store append": ["old.zarr"], "export": ["out"], "embed": ["out"]}
    more = {"finetune": ["--target", "age"]}.get(command, [])
    refused([*command.split(), what, *outputs.get(command, []), *more], place, capsys)


@pytest.mark.parametrize("value", ["nonsense", "-7", ""])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        (command, option)
        for command, kind in KINDS.items()
        if command not in ("train", "augment-preview", "bench loss", "bench step", "bench scale")
        for option in names(kind)
    ],
)
def test_no_option_takes_what_is_none(
    command: str, option: str, value: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a source that is not there: whichever is found first."""
    option += "x" * (command in BARE)
    sources = {"ingest": ["no", "new"], "store append": ["no", "new"], "export": ["no", "out"], "embed": ["no", "out"]}
    bare = {"demo": [], "doctor": [], "verify": [], "completion": ["bash"]}
    more = ["--target", "age"] if command == "finetune" and option != "--target" else []
    given = {**sources, **bare}.get(command, ["no"])
    refused([*command.split(), *given, *more, f"{option}={value}"], place, capsys)


@pytest.mark.parametrize("words", [["trian"], [""], ["--x"], ["store", "inof"], ["store", ""], ["\0"], ["train", "-1"]])
def test_no_word_is_taken_for_a_command(words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(words, place, capsys)


def spoilt(seed: int) -> str:
    """A config.json in which one thing is not as it was written."""
    draw = random.Random(seed)
    config = json.loads(to_json(recipes.get("demo_cauc")))
    groups = [config, *(value for value in config.values() if isinstance(value, dict))]
    group = draw.choice(groups)
    name = draw.choice(list(group))
    change = seed % 5
    if change == 0:
        group[name] = draw.choice([{}, [[]], {"a": None}, "nonsense\n", [None, {}]])
    elif change == 1:
        group["no_such_field"] = 1
    elif change == 2:
        return json.dumps(config)[: draw.randrange(1, 300)]
    elif change == 3:
        return json.dumps(draw.choice([[], None, 3, "x", {}, {"data": 3}]))
    else:
        name = draw.choice([name for name, value in group.items() if isinstance(value, int | float)] or ["seed"])
        group[name] = draw.choice(["x", None, [1], {"b": 2}])
    return json.dumps(config)


@pytest.mark.parametrize("seed", range(60))
def test_no_spoilt_config_is_trained(seed: int, store: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "config.json").write_text(spoilt(seed))
    refused(["train", "config.json", "--data.store", str(store), "--no-start"], place, capsys)
