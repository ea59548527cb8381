"""The page is one file that needs no other, and shows what was run."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cauc_dist.errors import BadInput
from cauc_dist.journal import Journal
from cauc_dist.report import report

FACTS = {
    "ranks": 2, "device": "cpu", "batch_size": 8, "scans": 30, "held_out": 10,
    "steps_per_epoch": 3, "epochs": 1, "parameters": 99, "zero_stage": 1,
}  # fmt: skip
VOID = {"meta", "img", "br"}


class Tags(HTMLParser):
    """Every opened tag, and whether each is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def a_run(folder: Path, steps: int = 3) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"name": "<b>bold</b>"}')
    with Journal(folder) as journal:
        journal.write("start", **FACTS)
        for step in range(steps):
            journal.write("step", step=step, loss=1.0 / (step + 1), uniformity=-1.0, lr=1e-3, samples_per_s=9.0)
    return folder


def test_the_page_is_well_formed_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    report([a_run(tmp_path / "a"), a_run(tmp_path / "b")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    tags = Tags(text)
    assert tags.open == []
    sources = [attrs["src"] for tag, attrs in tags.found if tag == "img"]
    assert len(sources) == 4  # loss, uniformity, lr, samples_per_s: what the journal holds
    assert all(source is not None and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", text)


def test_every_image_says_what_it_shows(tmp_path: Path) -> None:
    report([a_run(tmp_path / "a")], tmp_path / "page.html")
    assert all(attrs.get("alt") for tag, attrs in Tags((tmp_path / "page.html").read_text()).found if tag == "img")


def test_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    report([a_run(tmp_path / "a")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<b>bold</b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text


def test_the_probe_table_of_the_first_run_is_shown(tmp_path: Path) -> None:
    from tests.test_probe import table

    run = a_run(tmp_path / "a")
    (run / "probe.json").write_text(table(ours=[1.0, 2.5]).to_json())
    report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "1.75 [0, 1]" in text
    assert "30 subjects to fit the probes, 4 held out" in text


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no step in .*journal.jsonl; wanted a run that was trained"):
        report([a_run(tmp_path / "a", steps=0)], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no table .*t.json; wanted a file that `cauc probe --out` wrote"):
        report([a_run(tmp_path / "a")], tmp_path / "page.html", tmp_path / "t.json")


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed1").mkdir()
    runs = [a_run(tmp_path / "seed0" / "r"), a_run(tmp_path / "seed1" / "r")]
    report(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert all(f"<td>{run}</td>" in text for run in runs)


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("not a table")
    with pytest.raises(BadInput, match=r"t.json is no table"):
        report([a_run(tmp_path / "a")], tmp_path / "page.html", tmp_path / "t.json")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"no matplotlib; wanted the extra `report`"):
        report([a_run(tmp_path / "a")], tmp_path / "page.html")
