"""`launch reproduce`: what is missing of a study as one array, which `cauc reproduce` finds again."""

import json
from pathlib import Path

import pytest

from cauc_dist import journal, spawn, studies
from cauc_dist.reproduce import reproduce
from launch.sweep import read
from tests.launch.conftest import Launch, Slurm
from tests.test_reproduce import tiny, write_table


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_table(tmp_path / "data" / "table")
    monkeypatch.setattr(studies, "studies", lambda: {"tiny": tiny})
    return tmp_path / "data"


def test_the_missing_members_are_one_array_that_the_tables_are_made_of(
    data: Path, tmp_path: Path, launch: Launch, site: Path, slurm: Slurm
) -> None:
    folder = tmp_path / "study"
    reproduce(tiny(), folder, methods=["cauc", "raw"], seeds=1, data=data, jobs=1, say=lambda line: None)
    asked = ("tiny", "--seeds", "1", "--folder", folder, "--data", data, "--site", site)
    said = launch("reproduce", *asked)
    assert said.code == 0, said.err
    members = read(folder / "sweep-0")
    assert [m.name for m in members] == [f"calign_unif-{e}" for e in ("test-s0-f0", "cv-s0-f0", "cv-s0-f1")]
    assert len(slurm.queue) == 3
    assert spawn.start(1, str(folder / "sweep-0" / members[0].run)) == 0  # what a task of the array does
    before = len(journal.read(folder / "sweep-0" / members[0].run))
    found = reproduce(tiny(), folder, seeds=1, jobs=1, say=lambda line: None)
    assert {row["seeds"] for row in found["rows"]} == {1}
    assert {row["method"] for row in found["rows"]} == {"cauc", "calign_unif", "raw", "untrained", "chance"}
    assert len(journal.read(folder / "sweep-0" / members[0].run)) == before
    assert not list((folder / "runs").glob("calign_unif*"))


def test_a_second_array_of_a_study_is_refused_with_the_way_on(
    data: Path, tmp_path: Path, launch: Launch, site: Path, slurm: Slurm
) -> None:
    asked = ("tiny", "--seeds", "1", "--folder", tmp_path / "study", "--data", data, "--site", site)
    assert launch("reproduce", *asked).code == 0
    queued = json.dumps(slurm.queue)
    said = launch("reproduce", *asked)
    assert said.code == 2
    assert "sweep --rerun" in said.err
    assert json.dumps(slurm.queue) == queued


def test_a_dry_run_queues_nothing(data: Path, tmp_path: Path, launch: Launch, site: Path, slurm: Slurm) -> None:
    asked = ("tiny", "--seeds", "1", "--folder", tmp_path / "study", "--data", data, "--site", site, "--dry-run")
    said = launch("reproduce", *asked)
    assert said.code == 0
    assert "#SBATCH --array=0-5" in said.out
    assert not slurm.queue
    assert not (tmp_path / "study" / "sweep-0").exists()
