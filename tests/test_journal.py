"""The journal keeps every event that was written, and only whole ones are read."""

import json
from pathlib import Path

from cauc_dist import journal
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


def test_of_a_step_done_twice_the_later_event_holds(tmp_path: Path) -> None:
    with Journal(tmp_path) as j:
        for step, loss in [(0, 1.0), (1, 2.0), (1, 3.0)]:
            j.write("step", step=step, loss=loss)
    assert [(e["step"], e["loss"]) for e in journal.read(tmp_path)] == [(0, 1.0), (1, 3.0)]


def test_non_finite_numbers_are_null_and_the_line_is_json(tmp_path: Path) -> None:
    with Journal(tmp_path) as j:
        j.write("step", step=0, loss=float("nan"))
    line = (tmp_path / journal.FILE).read_text()
    assert json.loads(line, parse_constant=lambda c: 1 / 0)["loss"] is None


def test_a_run_without_journal_has_no_events(tmp_path: Path) -> None:
    assert journal.read(tmp_path) == []
