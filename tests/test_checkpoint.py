"""A checkpoint is whole or absent, and a damaged one is never loaded."""

import multiprocessing as mp
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from cauc_dist import checkpoint
from cauc_dist.errors import BadInput

CARD = {"architecture": {"encoder": "cnn3d"}}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"parameter/weight": torch.full((3, 2), value), "buffer/count": torch.tensor(7)}


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = {"parameter/weight": torch.randn(5, 3), "exp_avg/weight": torch.randn(5, 3) * 1e-30}
    checkpoint.save(tmp_path, 12, wanted, CARD, keep=2)
    saved, complaints = checkpoint.latest(tmp_path, CARD)
    assert saved is not None
    assert (saved.step, complaints) == (12, [])
    assert all(torch.equal(saved.tensors[name], wanted[name]) for name in wanted)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, tensors(step), CARD, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000010"]


def test_a_flipped_bit_sends_the_run_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, tensors(1), CARD, keep=2)
    path = checkpoint.save(tmp_path, 2, tensors(2), CARD, keep=2) / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    saved, complaints = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert len(complaints) == 1
    assert "step-00000002 is damaged (ValueError: sha256 of state.safetensors" in complaints[0]


def test_a_missing_card_is_damage(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, tensors(1), CARD, keep=2)
    path = checkpoint.save(tmp_path, 2, tensors(2), CARD, keep=2)
    (path / "checkpoint.json").unlink()
    saved, complaints = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert "step-00000002 is damaged (FileNotFoundError" in complaints[0]


def test_a_card_of_another_step_is_damage(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, tensors(1), CARD, keep=2)
    path = checkpoint.save(tmp_path, 20, tensors(2), CARD, keep=2) / "checkpoint.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 28'))
    assert "its card says step 28" in checkpoint.latest(tmp_path)[1][0]


def test_where_all_are_damaged_the_run_does_not_start_from_scratch(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 2, tensors(2), CARD, keep=2)
    (path / "state.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=r"step-00000002 is damaged .*; wanted one that is sound"):
        checkpoint.latest(tmp_path)


def test_damaged_ones_of_later_steps_do_not_push_out_what_is_saved_now(tmp_path: Path) -> None:
    for step in (60, 120):
        (checkpoint.save(tmp_path, step, tensors(step), CARD, keep=2) / "state.safetensors").write_bytes(b"")
    checkpoint.save(tmp_path, 30, tensors(30), CARD, keep=2)
    saved, complaints = checkpoint.latest(tmp_path)
    assert saved is not None
    assert (saved.step, complaints) == (30, [])


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) == (None, [])


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, tensors(1), CARD, keep=1)
    with pytest.raises(BadInput, match=r'holds the architecture {"encoder": "cnn3d"}; wanted {"encoder": "mlp"}'):
        checkpoint.latest(tmp_path, {"architecture": {"encoder": "mlp"}})


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, tensors(1), CARD, keep=1)
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".safetensors"]


def test_parameters_and_buffers_go_into_a_bare_module() -> None:
    module = nn.BatchNorm1d(2)
    state = {f"parameter/{k}": torch.full_like(p, 3.0) for k, p in module.named_parameters()}
    state |= {f"buffer/{k}": torch.full_like(b, 4) for k, b in module.named_buffers()}
    checkpoint.load_module(module, {**state, "exp_avg/weight": torch.zeros(2)})
    assert module.weight.tolist() == [3.0, 3.0]
    assert module.running_var is not None
    assert module.running_var.tolist() == [4.0, 4.0]


def save_for_ever(run: Path) -> None:
    big = {"parameter/weight": torch.zeros(2_000_000)}
    for step in range(1, 10_000):
        big["parameter/weight"].fill_(step)
        checkpoint.save(run, step, big, CARD, keep=2)


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.031, 0.057, 0.11])
def test_kill_9_while_saving_leaves_a_sound_checkpoint(tmp_path: Path, delay: float) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    process = context.Process(target=save_for_ever, args=(tmp_path,))
    process.start()
    while not list((tmp_path / "checkpoints").glob("step-*")):
        time.sleep(0.002)
    time.sleep(delay)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    saved, complaints = checkpoint.latest(tmp_path)
    assert saved is not None
    assert complaints == []
    assert torch.all(saved.tensors["parameter/weight"] == saved.step)
