"""Processes that share work: all results, errors as they are, and none that outlives the process that asked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cauc_dist.errors import BadInput
from cauc_dist.store.parallel import run


def test_one_worker_works_here_and_in_order() -> None:
    assert list(run(lambda unit: (unit, os.getpid()), [3, 1, 2], 1)) == [(unit, os.getpid()) for unit in (3, 1, 2)]
    assert list(run(abs, [], 4)) == []


def test_several_workers_do_every_unit_once() -> None:
    assert sorted(run(abs, range(-20, 0), 3)) == list(range(1, 21))


def test_an_error_in_a_worker_comes_through_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"invalid literal for int.*'x'"):
        list(run(int, ["1", "x", "2"], 2))


def test_a_killed_worker_is_told_with_what_to_do() -> None:
    with pytest.raises(BadInput, match=r"a worker process was killed; wanted all.*fewer workers.*What is done is kept"):
        list(run(os._exit, [1, 1], 2))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    said = tmp_path / "pids"
    code = "import os\nfrom cauc_dist.store.parallel import run\nif __name__ == '__main__':\n"
    code += f"    for _ in run(os.system, ['echo $PPID >> {said}; sleep .2'] * 50, 2): os.kill(os.getpid(), 9)\n"
    parent = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL, timeout=60
    )
    assert parent.returncode == -signal.SIGKILL
    workers = set(map(int, said.read_text().split()))
    assert len(workers) == 2
    until = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < until, workers
        time.sleep(0.05)
    assert len(said.read_text().split()) < 50
