"""An export's README.md says what the run knows and asks for the rest; no path, host, subject or value is in it."""

import dataclasses
import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from cauc_dist.config import Data, Engine, Objective, RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.export import export, load_encoder
from cauc_dist.model_card import ASK, settings
from cauc_dist.prepare import load
from cauc_dist.probe import probe
from cauc_dist.store.reader import Store
from cauc_dist.table import Table
from tests.test_export import config, trained


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ages and sexes, probed."""
    objective = Objective(kernel=("age:gaussian:5", "sex:delta"), lambda_align=1.0)
    folder = trained(config(store, tmp_path_factory.mktemp("runs") / "run", objective=objective))
    (folder / "probe.json").write_text(probe([folder], knn=True).to_json())
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (export(run, run.parent / "out") / "README.md").read_text()


def test_the_card_says_what_was_trained_how_and_on_how_many(text: str, run: Path) -> None:
    opened = Store.open(load(run).data.store)
    subjects = len(set(opened.subjects))
    assert text.startswith("# test\n")
    assert (
        "\nEncoder `cnn3d` of 16 x 16 x 16 voxels, 1 channel, pre-trained with the objective `cauc` by cauc-dist"
        in text
    )
    found = re.search(r"Store `store.zarr`: (\d+) scans of (\d+) subjects were trained on, (\d+) scans held out", text)
    assert found is not None
    assert (found[1], int(found[1]) + int(found[3])) == (found[2], subjects)
    assert "12 x 12 x 12 mm, RAS; normalised by `volume`" in text
    assert "the objective read: `age`, `sex`." in text
    told = json.loads(text.split("```json")[1].split("```")[0])
    assert told == json.loads(json.dumps(settings(load(run))))
    assert told["objective"]["kernel"] == ["age:gaussian:5", "sex:delta"]


@pytest.mark.parametrize(
    "asked", ["licence of the data", "by whom", "where the data come from", "licence of the weights"]
)
def test_what_no_run_knows_is_asked_for(text: str, asked: str) -> None:
    assert f"{ASK} {asked}" in text


def test_the_lines_of_use_are_python_that_runs(text: str, run: Path) -> None:
    code = text.split("```python")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code.replace('"FOLDER"', repr(str(run.parent / "out"))), names)
    told = re.search(r"# \((\d+), (\d+)\)\n$", code)
    assert told is not None
    assert tuple(names["h"].shape) == (int(told[1]), int(told[2]))  # type: ignore[attr-defined]


def test_the_scores_are_those_of_the_probe(text: str, run: Path) -> None:
    table = Table.from_json((run / "probe.json").read_text())
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert list(rows) == ["", "---", "chance", "this encoder", "this encoder, kNN", "untrained", "raw voxels"]
    for told, method in (("this encoder", "test"), ("this encoder, kNN", "test, kNN"), ("untrained", "untrained")):
        scores = table.scores[method].values()
        assert rows[told] == "| " + " | ".join(
            [told, *(f"{s.value:.3g} [{s.low:.3g}, {s.high:.3g}]" for s in scores)]
        ) + (" |")
    assert f"fitted on {table.n_train} scans, scored on {table.n_test} held out; [95 %" in text
    assert "probed at step" not in text


def reexported(run: Path, to: Path, probes: str | None) -> str:
    """README.md of an export of a copy of the run, with another probe.json or none."""
    folder = shutil.copytree(run, to / "run")
    (folder / "probe.json").unlink()
    if probes is not None:
        (folder / "probe.json").write_text(probes)
    return (export(folder, to / "out") / "README.md").read_text()


def test_a_run_that_was_not_probed_says_how_to_get_there(run: Path, tmp_path: Path) -> None:
    assert f"Not probed. {ASK} by `cauc probe RUN` and a new export" in reexported(run, tmp_path, None)


@pytest.mark.parametrize("changes", [{"fingerprint": "0" * 64}, {"steps": {"other": 7}}])
def test_scores_of_another_store_or_run_are_left_out(run: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    probes = json.loads((run / "probe.json").read_text())
    text = reexported(run, tmp_path, json.dumps({**probes, **changes}))
    assert "The run's probe.json is of another store or run." in text
    assert "this encoder" not in text


def test_scores_of_an_earlier_step_say_so(run: Path, tmp_path: Path) -> None:
    probes = json.loads((run / "probe.json").read_text())
    text = reexported(run, tmp_path, json.dumps({**probes, "steps": {"test": 3, "untrained": 0}}))
    assert "held out; [95 % bootstrap interval]; probed at step 3." in text


def test_a_probe_json_that_is_no_table_is_refused_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"probe.json holds no table \(KeyError.*wanted what `cauc probe` wrote"):
        reexported(run, tmp_path, "{}")
    assert not (tmp_path / "out").exists()


def test_no_place_and_no_host_is_in_the_card(text: str, run: Path) -> None:
    opened = Store.open(load(run).data.store)
    for hidden in (
        *opened.ids,
        str(run.parent),
        str(Path(opened.where).parent),
        str(Path.home()),
        socket.gethostname(),
    ):
        assert hidden not in text


def test_settings_that_are_places_are_left_out() -> None:
    run = RunConfig(
        name="test", run=Path("/a"), data=Data(store="/b/s.zarr", stage="/c"), engine=Engine(deepspeed="/d.json")
    )
    assert "/" not in json.dumps(settings(run))
    fields = {f"{part.name}.{f.name}": str(f.type) for part in dataclasses.fields(run) for f in _fields(run, part.name)}
    texts = {name for name, kind in fields.items() if kind in ("<class 'str'>", "str | None") or "Path" in kind}
    assert texts == {  # a new one: is it a place?
        "data.store",
        "data.stage",
        "data.split",
        "data.weights",
        "data.balance",
        "objective.within",
        "engine.deepspeed",
        "trackers.project",
    }


def _fields(run: RunConfig, part: str) -> tuple[dataclasses.Field[object], ...]:
    value = getattr(run, part)
    return dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()


def test_whoever_edits_the_card_can_still_load_the_encoder(text: str, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run.parent / "out", tmp_path / "copy")
    (folder / "README.md").write_text(text.replace(ASK, "Known:"))
    assert load_encoder(folder).card["step"] == 7
    (folder / "README.md").unlink()
    assert load_encoder(folder).card["step"] == 7
