"""What can happen to a run while it saves, done for real: a sound checkpoint is always there, and no wrong one is read.

Drawn by seeds, as tests/test_faults.py. Checkpoint `step` is full of the number `step`, so that each tells what it is.
"""

import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cauc_dist import checkpoint
from cauc_dist.checkpoint import Writer
from cauc_dist.errors import BadInput
from tests.faults import Ledger, seeds, small_disk

CARD = {"plan": {"order": "abc", "data": "def"}}
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="it needs root, to mount a small disk")


def tensors(step: int, size: int = 1000) -> dict[str, torch.Tensor]:
    return {f"{kind}/weight": torch.full((size,), float(step)) for kind in ("parameter", "exp_avg", "exp_avg_sq")}


def save(run: Path, *steps: int, keep: int = 2, background: bool = False, size: int = 1000) -> None:
    with Writer(run, CARD, keep=keep, best=True, background=background) as writer:
        for step in steps:
            writer.save(step, tensors(step, size), float(step))


def loaded(run: Path, size: int = 1000) -> tuple[int, list[str]]:
    """(step, complaints); what is loaded is, to the bit, what was saved as that step, or this fails."""
    saved, complaints = checkpoint.latest(run, CARD)
    assert saved is not None
    step = saved.step
    wanted = tensors(step, size)
    assert saved.tensors.keys() == wanted.keys()
    assert all(torch.equal(saved.tensors[name], wanted[name]) for name in wanted)
    assert {key: saved.card[key] for key in ("plan", "step", "loss")} == {**CARD, "step": step, "loss": float(step)}
    return step, complaints


def whole(run: Path) -> list[str]:
    """What lies in the run's folder of checkpoints; each that has the name of one can be loaded, or this fails."""
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    for name in names:
        if not name.startswith("."):
            checkpoint.read(run / "checkpoints" / name, (checkpoint.STATE, checkpoint.CARD))
    return names


def files(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def child(target: Callable[..., None], *arguments: Any) -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cauc_dist.checkpoint"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


# ---- killed -------------------------------------------------------------------------------------------------------

BIG = 1_000_000


def save_for_ever(run: Path, background: bool) -> None:
    with Writer(run, CARD, keep=2, best=False, background=background) as writer:
        for step in range(1, 100_000):
            writer.save(step, tensors(step, BIG), float(step))


@pytest.mark.parametrize("seed", seeds(50))
@pytest.mark.parametrize("background", [False, True])
def test_a_run_killed_at_any_moment_of_its_saves_has_a_sound_checkpoint(
    tmp_path: Path, ledger: Ledger, background: bool, seed: int
) -> None:
    """It does nothing but save: every moment is one of a save. The kill comes within some six of them."""
    moment = random.Random(f"{background} {seed}").random() * 0.2
    process = child(save_for_ever, tmp_path, background)
    while not list((tmp_path / "checkpoints").glob("step-*")):
        assert process.is_alive()
        time.sleep(0.001)
    with ledger.fault("save killed", seed, background=background, moment_s=round(moment, 4)) as entry:
        time.sleep(moment)
        seen = max(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*"))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left = whole(tmp_path)
        step, complaints = loaded(tmp_path, BIG)
        entry["found"] = {"step": step, "left": left}
        assert complaints == []
        assert step >= seen
        save(tmp_path, step + 1)
        assert loaded(tmp_path) == (step + 1, [])
        assert not [name for name in whole(tmp_path) if name.startswith(".")]


def save_and_die(run: Path, background: bool, at: int, log: Path) -> None:
    """Saves steps 1, 2, 3, and dies at event `at` of a save of step 4 that removes 2: 1 is the best, one is kept.

    Events are those that Python tells of before it opens, makes, renames or removes a file or folder.
    """
    save(run, 1, 2, 3, keep=1)
    names: list[str] = []

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event == "open" or (event.startswith(("os.", "shutil.")) and event != "os.kill"):
            names.append(event)
            if len(names) > at:
                os.kill(os.getpid(), signal.SIGKILL)

    writer = Writer(run, CARD, keep=1, best=True, background=background)
    sys.addaudithook(hook)
    writer.save(4, tensors(4), 4.0)
    writer.close()
    log.write_text(str(len(names)))


@pytest.mark.parametrize("background", [False, True])
def test_a_run_killed_before_any_operation_of_a_save_on_the_disk_has_a_sound_checkpoint(
    tmp_path: Path, ledger: Ledger, background: bool
) -> None:
    """Every one of them, those that remove the old ones too: not drawn."""
    dry = child(save_and_die, tmp_path / "dry", background, 10**6, tmp_path / "log")
    dry.join()
    number = int((tmp_path / "log").read_text())
    assert number > 10
    steps = []
    for at in range(number):
        run = tmp_path / f"{at}"
        with ledger.fault("save killed at an operation", at, background=background, of=number) as entry:
            process = child(save_and_die, run, background, at, tmp_path / "never")
            process.join()
            assert process.exitcode == -signal.SIGKILL
            left = whole(run)
            step, complaints = loaded(run)
            entry["found"] = {"step": step, "left": left}
            assert complaints == []
            assert "step-00000001" in left
            steps.append(step)
            save(run, 5, keep=1)
            assert loaded(run) == (5, [])
            assert whole(run) == ["step-00000001", "step-00000005"]
    assert set(steps) == {3, 4}
    assert steps == sorted(steps)
    assert steps.count(4) > 3  # among them those of the removal


# ---- bytes that change, or go -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(100, few=10))
@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_a_bit_that_flips_is_found_and_the_run_goes_on_from_the_checkpoint_before(
    tmp_path: Path, ledger: Ledger, name: str, seed: int
) -> None:
    """A flip that leaves what a card says as it was (1e-05, 1E-05) may pass; no other, and none of the tensors."""
    save(tmp_path, 1, 2)
    path, draw = tmp_path / "checkpoints/step-00000002" / name, random.Random(f"{name} {seed}")
    data = bytearray(path.read_bytes())
    byte, bit = draw.randrange(len(data)), draw.randrange(8)
    with ledger.fault("bit flip in a checkpoint", seed, file=name, byte=byte, of=len(data), bit=bit) as entry:
        data[byte] ^= 1 << bit
        path.write_bytes(data)
        step, complaints = loaded(tmp_path)
        entry["found"] = {"step": step, "told": complaints}
        if step == 1:
            (told,) = complaints
            assert told.startswith("checkpoint step-00000002 is damaged (")
        else:
            assert (name, complaints) == ("checkpoint.json", [])


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def empty(folder: Path, draw: random.Random) -> None:
    for path in folder.iterdir():
        path.unlink()


def another(folder: Path, draw: random.Random) -> None:
    shutil.copy(folder.with_name("step-00000001") / "state.safetensors", folder)


HURT: dict[str, Callable[[Path, random.Random], None]] = {
    "no state": lambda folder, draw: (folder / "state.safetensors").unlink(),
    "no card": lambda folder, draw: (folder / "checkpoint.json").unlink(),
    "empty card": lambda folder, draw: os.truncate(folder / "checkpoint.json", 0),
    "cut card": lambda folder, draw: cut(folder / "checkpoint.json", draw),
    "cut state": lambda folder, draw: cut(folder / "state.safetensors", draw),
    "empty folder": empty,
    "state of another step": another,
}


@pytest.mark.parametrize("seed", seeds(10, few=1))
@pytest.mark.parametrize("what", HURT)
def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before_is_loaded(
    tmp_path: Path, ledger: Ledger, what: str, seed: int
) -> None:
    save(tmp_path, 1, 2)
    with ledger.fault("broken checkpoint", seed, what=what) as entry:
        HURT[what](tmp_path / "checkpoints/step-00000002", random.Random(f"{what} {seed}"))
        step, complaints = loaded(tmp_path)
        entry["found"] = complaints
        assert step == 1
        assert [told.partition(" (")[0] for told in complaints] == ["checkpoint step-00000002 is damaged"]
        save(tmp_path, 2)
        assert loaded(tmp_path) == (2, [])


# ---- disks that refuse --------------------------------------------------------------------------------------------


@ROOT_ONLY
@pytest.mark.parametrize("seed", seeds(20))
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_and_with_room_the_run_goes_on(
    tmp_path: Path, ledger: Ledger, background: bool, seed: int
) -> None:
    size, need = 100_000, 3 * 4 * 100_000
    room = int(random.Random(f"{background} {seed}").random() * need)
    disk, run = tmp_path / "disk", tmp_path / "disk/run"
    facts = {"background": background, "room_bytes": room, "of_bytes": need}
    with small_disk(disk, 4 * 2**20), ledger.fault("disk full in a save", seed, **facts) as entry:
        save(run, 100, size=size)
        before = files(run)
        usage = shutil.disk_usage(disk)
        (disk / "filler").write_bytes(bytes(usage.free - room))
        with pytest.raises(BadInput) as told:
            save(run, 120, size=size, background=background)
        entry["found"] = str(told.value).replace(str(disk), "DISK")
        assert str(told.value) == (
            "checkpoint of step 120 could not be written: No space left on device; wanted room for 1 MiB. "
            f"Free space, then `cauc resume {run}`: the newest checkpoint is step 100."
        )
        assert files(run) == before
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000100"]
        assert loaded(run, size) == (100, [])
        (disk / "filler").unlink()
        save(run, 120, size=size, background=background)
        assert loaded(run, size) == (120, [])


@ROOT_ONLY
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_has_become_read_only_is_told_and_the_checkpoints_are_as_they_were(
    tmp_path: Path, ledger: Ledger, background: bool
) -> None:
    disk, run = tmp_path / "disk", tmp_path / "disk/run"
    with small_disk(disk, 2**20), ledger.fault("read-only disk in a save", 0, background=background) as entry:
        save(run, 100)
        before = files(run)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(BadInput) as told:
            save(run, 120, background=background)
        entry["found"] = str(told.value).replace(str(disk), "DISK")
        assert str(told.value) == (
            "checkpoint of step 120 could not be written: Read-only file system; wanted a disk that takes files in "
            f"{run / 'checkpoints'}. Mend that, then `cauc resume {run}`: the newest checkpoint is step 100."
        )
        assert files(run) == before
        assert loaded(run) == (100, [])
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        save(run, 120, background=background)
        assert loaded(run) == (120, [])
