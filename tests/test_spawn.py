"""Ranks on this machine: they meet, hear what the command hears, save as long as they like, and end together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cauc_dist import spawn
from cauc_dist.errors import BAD_INPUT, LOST, NON_FINITE, STOPPED

HEAD = """
import os, signal, sys, time
from pathlib import Path
rank, here = os.environ["RANK"], Path(__file__).parent
def mark(name):
    (here / f"new-{name}{rank}").write_text(str(os.getpid()))
    os.replace(here / f"new-{name}{rank}", here / f"{name}{rank}")
def saving(number, frame):
    time.sleep(float(os.environ.get("SAVING", "0")) * (rank == "1"))
    mark(signal.Signals(number).name)
    sys.exit(5)
"""
SAVES = """
signal.signal(signal.SIGTERM, saving); signal.signal(signal.SIGUSR2, saving); mark("ready"); time.sleep(120)
"""
DEAF = """
signal.signal(signal.SIGTERM, lambda *_: mark("heard")); mark("ready")
for _ in range(120): time.sleep(1)
"""
HURRY = "spawn.LAST_WORDS = spawn.TO_KILL = spawn.AT_ONCE = 0.1"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes the module that the ranks run, and gives its name; what they mark is beside it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def write(text: str) -> str:
        (tmp_path / "ranks_run_this.py").write_text(HEAD + text)
        return "ranks_run_this"

    return write


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAST_WORDS", "TO_KILL", "AT_ONCE"):
        monkeypatch.setattr(spawn, name, 0.1)


def command(module: str, ranks: int = 2, before: str = "") -> "subprocess.Popen[str]":
    """A process that starts ranks, as the command line does."""
    lines = (
        "import signal, sys; from cauc_dist import spawn",
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)",  # whatever the tests were started under
        HURRY,
        before,
        f"sys.exit(spawn.start({ranks}, module={module!r}, threads=1))",
    )
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stderr=subprocess.PIPE, text=True)


def wait(*paths: Path) -> None:
    """Until all are there; pytest's faulthandler_timeout and the caller's patience bound it."""
    for _ in range(1200):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.05)
    raise AssertionError(f"no {paths}")


def gone(pid: int) -> bool:
    """No such process, or one that only waits to be asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_the_ranks_meet_and_each_has_its_place(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    text = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([10.0 ** int(rank)])
dist.all_reduce(x)
place = [os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")]
(here / rank).write_text(f"{x.item()} {' '.join(place)} {sys.argv[1:]} {dist.get_rank()}")
dist.destroy_process_group()
"""
    assert spawn.start(3, "a", "b c", module=module(text), threads=7) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [
        f"111.0 {rank} 3 3 7 ['a', 'b c'] {rank}" for rank in range(3)
    ]


def test_what_the_user_has_set_stays(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "17")
    monkeypatch.setenv("WORLD_SIZE", "99")  # of a launcher around this one: its ranks are not ours
    names = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "WORLD_SIZE")
    text = f"(here / 'seen').write_text(' '.join(os.environ[name] for name in {names}))"
    assert spawn.start(1, module=module(text), threads=7) == 0
    assert (tmp_path / "seen").read_text() == "3 17 1"


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("0 0", 0),
        ("1 3", NON_FINITE),
        ("6 2", BAD_INPUT),
        ("-9 3", NON_FINITE),
        ("1 -9", 128 + 9),
        ("-11 6", 128 + 11),
        ("-15 1", 128 + 15),  # a SIGTERM that was not ours
        ("0 1", 1),
        ("6 1", 1),
        ("6 0", LOST),
        ("6 600", LOST),  # the other is ended here
        ("1 600", 1),
        ("5 0", STOPPED),
    ],
)
def test_the_exit_code_is_the_one_that_says_most(
    module: Callable[[str], str], capfd: pytest.CaptureFixture[str], ends: str, code: int
) -> None:
    text = f"""
end = {ends.split()}[int(rank)]
mark("ready")
while len(list(here.glob("ready*"))) < 2: time.sleep(.01)
if end == "600": time.sleep(120)
os.kill(os.getpid(), -int(end)) if int(end) < 0 else sys.exit(int(end))
"""
    assert spawn.start(2, module=module(text), threads=1) == code
    error = capfd.readouterr().err
    assert ("was ended by signal" in error) == (code > 128)


def test_a_rank_that_is_killed_is_named_with_the_likely_reason(
    module: Callable[[str], str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = module("mark('ready')\nif rank == '1': os.kill(os.getpid(), 9)")
    assert spawn.start(2, module=name, threads=1) == 128 + 9
    pid = (tmp_path / "ready1").read_text()
    error = capfd.readouterr().err
    assert f"rank 1 (pid {pid}) was ended by signal 9 (SIGKILL); the other ranks were stopped.\n" in error
    assert "Often the memory is full: fewer subjects a rank, or --engine.encode_chunk auto." in error
    assert "cauc resume" not in error  # that is for training (tests/test_train.py)


@pytest.mark.usefixtures("hurried")
def test_a_frozen_rank_is_killed_once_another_has_failed(module: Callable[[str], str], tmp_path: Path) -> None:
    text = """
mark("ready")
if rank == "1": os.kill(os.getpid(), signal.SIGSTOP)
while not (here / "ready1").exists(): time.sleep(.01)
sys.exit(6)
"""
    assert spawn.start(2, module=module(text), threads=1) == LOST
    assert gone(int((tmp_path / "ready1").read_text()))


@pytest.mark.usefixtures("hurried")
def test_the_peers_of_a_failed_rank_hear_sigterm_before_they_are_killed(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    text = f"if rank == '0':\n    while not (here / 'ready1').exists(): time.sleep(.01)\n    sys.exit(3)\n{DEAF}"
    assert spawn.start(2, module=module(text), threads=1) == NON_FINITE
    assert (tmp_path / "heard1").exists()
    assert gone(int((tmp_path / "ready1").read_text()))


@pytest.mark.parametrize(
    ("number", "told", "code"),
    [
        (signal.SIGTERM, "SIGTERM", STOPPED),
        (signal.SIGHUP, "SIGTERM", STOPPED),
        (signal.SIGUSR2, "SIGUSR2", STOPPED),
        (signal.SIGINT, "SIGTERM", -signal.SIGINT),  # KeyboardInterrupt: Python ends itself by the signal
    ],
)
def test_a_signal_goes_on_to_every_rank_and_saving_takes_as_long_as_it_takes(
    module: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    told: str,
    code: int,
) -> None:
    """Rank 1 saves for longer than a failure's whole patience after rank 0 has gone."""
    monkeypatch.setenv("SAVING", "1.5")
    parent = command(module(SAVES))
    wait(tmp_path / "ready0", tmp_path / "ready1")
    parent.send_signal(number)
    _, error = parent.communicate(timeout=60)
    assert parent.returncode == code
    assert (tmp_path / f"{told}0").exists()
    assert (tmp_path / f"{told}1").exists()
    assert f"{number.name}: waiting for the ranks to save and end; SIGTERM now ends them at once" in error


def test_ctrl_c_of_a_terminal_reaches_the_ranks_once(module: Callable[[str], str], tmp_path: Path) -> None:
    """It goes to the whole foreground process group; the ranks, of which none minds SIGINT, are told by SIGTERM."""
    parent = command(module(SAVES), before="import os; os.setpgid(0, 0)")
    wait(tmp_path / "ready0", tmp_path / "ready1")
    os.killpg(parent.pid, signal.SIGINT)
    _, error = parent.communicate(timeout=60)
    assert error.count("\nKeyboardInterrupt\n") == 1  # the parent's own
    assert (tmp_path / "SIGTERM0").exists()
    assert (tmp_path / "SIGTERM1").exists()


@pytest.mark.parametrize("numbers", [(15, 15), (2, 2), (12, 15, 15)])
def test_a_second_sigterm_ends_the_ranks_at_once(
    module: Callable[[str], str], tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    parent = command(module(f"signal.signal(12, lambda *_: None)\n{DEAF}"))
    pids = [tmp_path / "ready0", tmp_path / "ready1"]
    wait(*pids)
    for number in numbers:
        time.sleep(0.5)  # more than AT_ONCE: whatever ends them too early has done so
        assert parent.poll() is None
        parent.send_signal(number)
        if number != 12:
            wait(tmp_path / "heard0", tmp_path / "heard1")
    parent.communicate(timeout=60)
    assert parent.returncode == (-signal.SIGINT if 2 in numbers else 128 + 9)
    assert all(gone(int(path.read_text())) for path in pids)


def test_kill_9_of_the_parent_leaves_no_rank_behind(module: Callable[[str], str], tmp_path: Path) -> None:
    parent = command(module(DEAF))
    pids = [tmp_path / "ready0", tmp_path / "ready1"]
    wait(*pids)
    parent.kill()
    parent.communicate(timeout=60)
    for path in pids:
        for _ in range(200):
            if gone(int(path.read_text())):
                break
            time.sleep(0.05)
        assert gone(int(path.read_text()))


def test_a_rank_whose_parent_died_before_it_began_does_not_begin(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    line = [sys.executable, "-c", f"open({str(begun)!r}, 'w')"]
    for parent, there in ((os.getppid(), False), (os.getpid(), True)):
        subprocess.run([sys.executable, "-I", "-S", "-c", spawn.TIED, str(parent), *line], check=True)
        assert begun.exists() == there


def test_under_nohup_a_hangup_is_ignored(module: Callable[[str], str], tmp_path: Path) -> None:
    parent = command(module(SAVES), before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    wait(tmp_path / "ready0", tmp_path / "ready1")
    parent.send_signal(signal.SIGHUP)
    parent.send_signal(signal.SIGUSR2)
    _, error = parent.communicate(timeout=60)
    assert (tmp_path / "SIGUSR20").exists()
    assert not (tmp_path / "SIGTERM0").exists()
    assert "SIGHUP" not in error


def test_what_a_rank_has_started_ends_with_it_when_it_is_killed(module: Callable[[str], str], tmp_path: Path) -> None:
    text = "import subprocess\n(here / 'child').write_text(str(subprocess.Popen(['sleep', '600']).pid))\n"
    parent = command(module(text + DEAF), ranks=1)
    wait(tmp_path / "ready0")
    parent.send_signal(15)
    wait(tmp_path / "heard0")
    parent.send_signal(15)
    parent.communicate(timeout=60)
    assert gone(int((tmp_path / "child").read_text()))


def test_signal_handlers_are_as_they_were(module: Callable[[str], str]) -> None:
    before = {number: signal.getsignal(number) for number in spawn.PASSED_ON}
    assert spawn.start(1, module=module("sys.exit(1)"), threads=1) == 1
    assert {number: signal.getsignal(number) for number in spawn.PASSED_ON} == before
