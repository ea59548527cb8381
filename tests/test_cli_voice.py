"""One voice over all commands: --json, --quiet, --debug, help, completion, colours, broken pipes."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cauc_dist import cli, recipes
from cauc_dist.cli import completion, voice, words
from cauc_dist.progress import EVERY, Counter, Progress
from cauc_dist.studies import studies
from tests.test_cli import SMALL, cauc

Captured = pytest.CaptureFixture[str]


def told(arguments: list[str], capsys: Captured, code: int = 0) -> Any:
    """The one JSON document that a command prints."""
    assert cli.main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_ingest_and_store_tell_scripts_what_they_tell_people(cohort: Path, tmp_path: Path, capsys: Captured) -> None:
    store = str(tmp_path / "s.zarr")
    planned = told(["ingest", str(cohort), store, "--dry-run"], capsys)
    assert (planned["n"], planned["subjects"]) == (24, 24)
    made = told(["ingest", str(cohort), store, "--workers", "1"], capsys)
    assert (made["n"], made["shape"], made["set_aside"]) == (24, [1, 16, 16, 16], [])
    facts = told(["store", "info", store], capsys)
    assert (facts["scans"], facts["subjects"], facts["shape"]) == (24, 24, [1, 16, 16, 16])
    assert {c["name"]: c["kind"] for c in facts["columns"]} == {"age": "number", "sex": "category", "site": "category"}
    assert "sub-" not in json.dumps(facts)
    assert told(["store", "verify", store], capsys)["faults"] == []
    assert told(["store", "split", store, "--parts", "train=.5", "test=.5"], capsys) == {
        "train": {"subjects": 12, "scans": 12},
        "test": {"subjects": 12, "scans": 12},
    }


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", "demo_cauc", "--data.store", str(store), "--run", str(folder), "--ranks", "2", *SMALL]
    return folder, cauc(*words, "--json")


def test_a_training_on_ranks_tells_scripts_its_last_step_and_people_on_stderr(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = run
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["run"], found["code"], found["steps"]) == (str(folder), 0, 3)
    assert found["last"]["step"] == 2
    assert found["last"]["loss"] < 100
    assert "step 3/3" in done.stderr


def test_what_a_run_knows_is_told_to_scripts(
    run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: Captured
) -> None:
    folder = str(run[0])
    table = told(["probe", folder, "--columns", "age", "--no-voxels"], capsys)
    assert set(table["scores"]) == {"demo_cauc", "untrained"}
    assert told(["export", folder, str(tmp_path / "out")], capsys) == {"wrote": str(tmp_path / "out")}
    page = str(tmp_path / "page.html")
    assert told(["report", folder, "--out", page], capsys) == {"wrote": page}
    done = cauc("resume", folder, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verify_tells_scripts_each_objective() -> None:
    done = cauc("verify", "--ranks", "1", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(row["ok"] for row in found["objectives"])
    assert f"{len(found['objectives'])} objectives, 1 rank on 1 host" in found["summary"]


def test_json_and_quiet_are_one_or_the_other(capsys: Captured) -> None:
    assert cli.main(["store", "info", "x", "--json", "--quiet"]) == 2
    assert "--json and --quiet; wanted one of them" in capsys.readouterr().err


def test_debug_shows_where_and_without_it_nobody_sees_a_traceback(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["store", "info", "nowhere"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["store", "info", "nowhere", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("error: no store at nowhere")

    def broken(arguments: list[str]) -> int:
        return arguments.index("no such")

    monkeypatch.setitem(cli.RUN, "demo", broken)
    assert cli.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: ValueError: 'no such' is not in list. This is a fault of cauc-dist: .* with the command.\n", error
    )


def test_what_was_interrupted_says_how_to_go_on(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def hears(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    for command, again in (
        ("train", "`cauc resume RUN`"),
        ("ingest", "The same command"),
        ("probe", "The same command begins anew"),
    ):
        monkeypatch.setitem(cli.RUN, command, hears)
        assert cli.main([command, "x"]) == 130
        assert f"interrupted. {again}" in capsys.readouterr().err


@pytest.mark.parametrize("command", completion.KINDS)
def test_the_completion_knows_the_options_of_the_parser(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    page = capsys.readouterr().out
    rows = re.findall(r"^[|│ ] (?:-h, )?(--[a-z][\w.-]*)(?:, (--[a-z][\w.-]*))?", page, re.M)
    listed = {name for row in rows for name in row if name}
    named = {*completion.names(completion.KINDS[command]), "--help"}
    assert listed <= named, listed - named
    assert named <= listed, named - listed


def test_every_example_is_of_known_words() -> None:
    assert set(words.EXAMPLES) == set(completion.KINDS)
    for command, examples in words.EXAMPLES.items():
        known = {*completion.names(completion.KINDS[command]), *voice.FLAGS}
        for example in examples:
            options = re.findall(r" (--[\w.-]+)", example)
            assert set(options) <= known, example
    text = json.dumps(words.EXAMPLES)
    assert set(re.findall(r"(?:train|--recipe|step|loss|scale) ([a-z]\w+)(?= )", text)) <= set(recipes.recipes())
    assert set(re.findall(r"reproduce (\w+)", text)) <= set(studies())


def in_bash(line: str) -> list[str]:
    """What bash offers for a line that ends where the cursor is."""
    script = f"""
        source <({sys.executable} -m cauc_dist completion bash)
        COMP_WORDS=({line} {'""' if line.endswith(" ") else ""}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); _cauc
        printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cauc inge", ["ingest"]),
        ("cauc store ver", ["verify"]),
        ("cauc bench sc", ["scale"]),
        ("cauc bench scale demo_cauc --gb", ["--gbits"]),
        ("cauc train yaware_", ["yaware_bhb_2021"]),
        ("cauc train demo_cauc --data.sto", ["--data.store"]),
        ("cauc reproduce hip", ["hippocampus"]),
        ("cauc probe pyproj", ["pyproject.toml"]),
        ("cauc export runs/x --js", ["--json"]),
    ],
)
def test_bash_completes(line: str, offered: list[str]) -> None:
    assert in_bash(line) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_all_commands(shell: str, capsys: Captured) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in words.COMMANDS)
    assert "mapfile" not in text


def test_who_has_read_enough_is_no_error() -> None:
    line = f"{sys.executable} -m cauc_dist completion fish | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("141", "0")  # 0: all was in the pipe before it closed


@pytest.mark.parametrize(("more", "red"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_an_error_is_red_on_a_terminal_unless_colours_are_not_wanted(more: dict[str, str], red: bool) -> None:
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | more
    subprocess.run([sys.executable, "-m", "cauc_dist", "nix"], stderr=theirs, env=env, timeout=60, check=False)
    text = os.read(ours, 1000).decode()
    assert text.startswith("\033[1;31merror:\033[0m" if red else "error:")


def test_a_log_has_a_line_every_fifty_steps_of_a_long_epoch_and_one_an_epoch(capsys: Captured) -> None:
    record = {"loss": 1.0, "uniformity": -1.0, "samples_per_s": 3.0}
    with Progress("run", 260, quiet=False) as progress:
        for done in range(1, 261):
            progress.step(done, done // 201, record)
    steps = [int(line.split()[2].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps == [1, 51, 101, 151, 201, 251, 260]
    assert EVERY == 50


@pytest.mark.parametrize(("mode", "place"), [("", "out"), ("json", "err"), ("quiet", "")])
def test_news_go_where_the_voice_says(mode: str, place: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAUC_VOICE", mode)
    voice.say("news [of] it")
    with Counter("reading") as counter:
        counter(4, 4)
    captured = capsys.readouterr()
    for name in ("out", "err"):
        assert getattr(captured, name) == ("news [of] it\nreading: 4 of 4\n" if name == place else "")


def test_the_page_of_the_commands_names_all_of_them_and_every_exit_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    for command in [*words.COMMANDS, *(f"store {n}" for n in words.STORE), *(f"bench {n}" for n in words.BENCH)]:
        assert f"`cauc {command}`" in page
    for code, text in words.CODES.items():
        assert f"| {code} | {text} |" in page
    assert all(f"`{flag}`" in page for flag in voice.FLAGS)


def test_numbers_that_json_has_not_are_null(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAUC_VOICE", "json")
    voice.tell("text", {"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "x"}


def test_a_folder_is_no_file_to_write(tmp_path: Path, capsys: Captured) -> None:
    assert cli.main(["report", "x", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder; wanted a file to write" in capsys.readouterr().err
