"""The journal keeps every event that was written, and only whole ones are read."""

import json
from pathlib import Path

import pytest

from cauc_dist import journal
from cauc_dist.errors import BadInput
from cauc_dist.journal import Journal


def test_events_are_read_back_in_order(tmp_path: Path) -> None:
    with Journal(tmp_path) as j:
        j.write("start", ranks=2)
        j.write("step", step=0, loss=1.5)
    events = journal.read(tmp_path)
    assert [e["event"] for e in events] == ["start", "step"]
    assert (events[0]["ranks"], events[1]["loss"]) == (2, 1.5)


def test_a_quiet_journal_writes_no_file(tmp_path: Path) -> None:
    with Journal(tmp_path, quiet=True) as j:
        j.write("start")
    assert list(tmp_path.iterdir()) == []


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    with Journal(tmp_path) as j:
        j.write("step", step=0)
    with (tmp_path / journal.FILE).open("a") as file:
        file.write('{"event": "step", "st')
    assert [e["step"] for e in journal.read(tmp_path)] == [0]


def test_a_resume_takes_back_the_steps_past_its_checkpoint(tmp_path: Path) -> None:
    with Journal(tmp_path) as j:
        for step in range(6):
            j.write("step", step=step, loss=1.0)
        j.write("resume", step=2)
        j.write("step", step=2, loss=2.0)
    steps = [(e["step"], e["loss"]) for e in journal.read(tmp_path) if e["event"] == "step"]
    assert steps == [(0, 1.0), (1, 1.0), (2, 2.0)]


def test_what_follows_a_torn_line_is_not_lost_with_it(tmp_path: Path) -> None:
    (tmp_path / journal.FILE).write_text('{"event": "step", "step": 0}\n{"event": "st')
    with Journal(tmp_path) as j:
        j.write("resume", step=1)
    assert [e["event"] for e in journal.read(tmp_path)] == ["step", "resume"]


def test_non_finite_numbers_are_null_and_the_line_is_json(tmp_path: Path) -> None:
    with Journal(tmp_path) as j:
        j.write("step", step=0, loss=float("nan"))
    line = (tmp_path / journal.FILE).read_text()
    assert json.loads(line, parse_constant=lambda c: 1 / 0)["loss"] is None


def test_a_run_without_journal_has_no_events(tmp_path: Path) -> None:
    assert journal.read(tmp_path) == []


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    (tmp_path / journal.FILE).symlink_to("/dev/full")
    with (
        pytest.raises(BadInput, match=r"journal\.jsonl could not be written: No space left on device; wanted room"),
        journal.Journal(tmp_path) as written,
    ):
        written.write("start")
