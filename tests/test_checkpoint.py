"""A checkpoint is whole or absent, a damaged one is never loaded, and what cannot be written is told."""

import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from cauc_dist import checkpoint
from cauc_dist.checkpoint import Writer
from cauc_dist.errors import BadInput

CARD = {"architecture": {"encoder": "cnn3d"}}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"parameter/weight": torch.full((3, 2), value), "buffer/count": torch.tensor(7)}


def save(
    run: Path, *steps: int, keep: int = 2, losses: dict[int, float] | None = None, background: bool = False
) -> Path:
    """The folder of the last of `steps`; with `losses` the best one is kept too."""
    with Writer(run, CARD, keep=keep, best=losses is not None, background=background) as writer:
        for step in steps:
            writer.save(step, tensors(step), (losses or {}).get(step, 1.0))
    return run / "checkpoints" / f"step-{steps[-1]:08d}"


def kept(run: Path) -> list[int]:
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert all(name.startswith("step-") for name in names)
    return [int(name.removeprefix("step-")) for name in names]


@pytest.mark.parametrize("background", [False, True])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, background: bool) -> None:
    torch.manual_seed(0)
    wanted = {"parameter/weight": torch.randn(5, 3).T, "exp_avg/weight": torch.randn(5, 3) * 1e-30}
    with Writer(tmp_path, CARD, keep=2, background=background) as writer:
        writer.save(12, wanted, 0.5)
    saved, complaints = checkpoint.latest(tmp_path, CARD)
    assert saved is not None
    assert (saved.step, saved.card["loss"], complaints) == (12, 0.5, [])
    assert all(torch.equal(saved.tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("background", [False, True])
def test_only_the_newest_are_kept(tmp_path: Path, background: bool) -> None:
    save(tmp_path, 1, 2, 10, keep=2, background=background)
    assert kept(tmp_path) == [2, 10]


def test_the_one_with_the_smallest_loss_stays_too(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.5}
    save(tmp_path, 1, 2, 3, 4, 5, keep=1, losses=losses)
    assert kept(tmp_path) == [2, 5]
    assert json.loads((tmp_path / "checkpoints/step-00000002/checkpoint.json").read_text())["loss"] == 1.0
    save(tmp_path, 6, keep=1, losses={6: 0.5})  # another life of the run, which knows the best from the card alone
    assert kept(tmp_path) == [6]


@pytest.mark.parametrize("card", ["", "null", "[1]", '{"loss": null}', "{"])
def test_a_card_that_cannot_be_read_breaks_no_save(tmp_path: Path, card: str) -> None:
    losses = {1: 0.1, 2: 2.0, 3: 3.0}
    (save(tmp_path, 1, keep=1, losses=losses) / "checkpoint.json").write_text(card)
    save(tmp_path, 2, 3, keep=1, losses=losses)
    assert kept(tmp_path) == [2, 3]


def test_what_others_put_beside_the_checkpoints_stays(tmp_path: Path) -> None:
    names = {"step-00000001-backup", "notes.txt"}
    save(tmp_path, 1, keep=1)
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir()
    save(tmp_path, 2, keep=1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == names | {"step-00000002"}
    assert checkpoint.latest(tmp_path)[1] == []


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in (".step-00000001.tmp", ".step-00000001.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save(tmp_path, 2)
    assert kept(tmp_path) == [2]


def test_a_save_in_the_background_returns_before_it_is_written_and_the_next_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is held up by the test: no clock decides."""
    go, real = threading.Event(), checkpoint.write

    def slow(*arguments: object) -> None:
        assert go.wait(60)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write", slow)
    with Writer(tmp_path, CARD, keep=2, background=True) as writer:
        writer.save(1, tensors(1), 1.0)
        assert checkpoint.latest(tmp_path) == (None, [])
        second = threading.Thread(target=writer.save, args=(2, tensors(2), 1.0))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        go.set()
        second.join(60)
        assert (tmp_path / "checkpoints/step-00000001").exists()
    assert kept(tmp_path) == [1, 2]


def blocked(run: Path) -> Path:
    """A run whose checkpoints cannot be written: a file stands where their folder would be."""
    run.mkdir()
    (run / "checkpoints").write_text("")
    return run


def test_what_cannot_be_written_is_told_with_the_step_and_what_to_do(tmp_path: Path) -> None:
    run = blocked(tmp_path / "run")
    found = r"checkpoint of step 120 could not be written: Not a directory; wanted a disk that takes files in "
    with pytest.raises(BadInput, match=found) as told, Writer(run, CARD, keep=1) as writer:
        writer.save(120, tensors(1), 1.0)
    assert str(told.value).endswith(f"Mend that, then `cauc resume {run}`: there is no checkpoint yet.")


def test_an_error_of_the_thread_comes_out_at_the_next_save_and_at_the_end(tmp_path: Path) -> None:
    run = blocked(tmp_path / "run")
    with Writer(run, CARD, keep=1, background=True) as writer:
        writer.save(1, tensors(1), 1.0)
        with pytest.raises(BadInput, match="checkpoint of step 1 could not be written"):
            writer.save(2, tensors(2), 1.0)
    writer = Writer(run, CARD, keep=1, background=True)
    writer.save(3, tensors(1), 1.0)
    with pytest.raises(BadInput, match="checkpoint of step 3 could not be written"):
        writer.close()
    writer.close()


def test_where_the_run_ends_by_another_error_that_one_is_raised_and_the_writers_is_its_note(tmp_path: Path) -> None:
    run = blocked(tmp_path / "run")

    def diverge() -> None:
        with Writer(run, CARD, keep=1, background=True) as writer:
            writer.save(1, tensors(1), 1.0)
            raise ArithmeticError("loss")

    with pytest.raises(ArithmeticError) as told:
        diverge()
    assert "checkpoint of step 1 could not be written" in told.value.__notes__[0]


def test_a_flipped_bit_sends_the_run_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 2) / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    saved, complaints = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert len(complaints) == 1
    assert "step-00000002 is damaged (ValueError: sha256 of state.safetensors" in complaints[0]


def test_a_number_changed_in_the_card_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 2) / "checkpoint.json"
    path.write_text(path.read_text().replace('"loss": 1.0', '"loss": 5.0'))
    assert "step-00000002 is damaged (ValueError: checkpoint.json is not what" in checkpoint.latest(tmp_path)[1][0]


def test_a_missing_card_is_damage(tmp_path: Path) -> None:
    (save(tmp_path, 1, 2) / "checkpoint.json").unlink()
    saved, complaints = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert "step-00000002 is damaged (FileNotFoundError" in complaints[0]


def test_a_folder_of_another_step_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 20)
    path.rename(path.with_name("step-00000028"))
    assert "its card says step 20" in checkpoint.latest(tmp_path)[1][0]


def test_where_all_are_damaged_the_run_does_not_start_from_scratch(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "state.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=r"step-00000002 is damaged .*; wanted one that is sound"):
        checkpoint.latest(tmp_path)


def test_damaged_ones_of_later_steps_do_not_push_out_what_is_saved_now(tmp_path: Path) -> None:
    for step in (60, 120):
        (save(tmp_path, step, losses={step: 0.0}) / "state.safetensors").write_bytes(b"")
    save(tmp_path, 30, losses={30: 1.0})
    saved, complaints = checkpoint.latest(tmp_path)
    assert saved is not None
    assert (saved.step, complaints) == (30, [])


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (save(tmp_path, 1, 2) / "state.safetensors").write_bytes(b"")
    save(tmp_path, 2)
    saved, complaints = checkpoint.latest(tmp_path)
    assert saved is not None
    assert (saved.step, complaints) == (2, [])
    assert kept(tmp_path) == [1, 2]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) == (None, [])


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(BadInput, match=r'holds the architecture {"encoder": "cnn3d"}; wanted {"encoder": "mlp"}'):
        checkpoint.latest(tmp_path, {"architecture": {"encoder": "mlp"}})


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return Path.touch, (self.mark,)


def test_a_pickle_is_never_run_whatever_it_is_called_and_however_well_it_is_signed(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    evil = pickle.dumps(Evil(mark))
    pickle.loads(evil)
    assert mark.exists()  # it would run
    mark.unlink()
    folder = save(tmp_path / "run", 1, 2)
    for name in ("state.pt", "state.pkl", "pytorch_model.bin"):
        (folder / name).write_bytes(evil)
    assert checkpoint.latest(tmp_path / "run")[1] == []
    (folder / "state.safetensors").write_bytes(evil)
    card = {**CARD, "step": 2, "loss": None, "sha256": checkpoint._sha256(folder / "state.safetensors")}
    (folder / "checkpoint.json").write_text(json.dumps({**card, "seal": checkpoint._seal(card)}))
    saved, complaints = checkpoint.latest(tmp_path / "run")
    assert saved is not None
    assert saved.step == 1
    assert "step-00000002 is damaged (SafetensorError" in complaints[0]
    assert not mark.exists()


def test_parameters_and_buffers_go_into_a_bare_module_and_the_average_where_it_is_asked_for_and_there() -> None:
    module = nn.BatchNorm1d(2)
    state = {f"parameter/{k}": torch.full_like(p, 3.0) for k, p in module.named_parameters()}
    state |= {f"buffer/{k}": torch.full_like(b, 4) for k, b in module.named_buffers()}
    state |= {"exp_avg/weight": torch.zeros(2), "optimizer/step": torch.tensor(1.0)}
    checkpoint.load_module(module, state, ema=True)
    assert module.weight.tolist() == [3.0, 3.0]
    assert module.running_var is not None
    assert module.running_var.tolist() == [4.0, 4.0]
    state |= {f"ema/{k}": torch.full_like(p, 5.0) for k, p in module.named_parameters()}
    checkpoint.load_module(module, state)
    assert module.weight.tolist() == [3.0, 3.0]
    checkpoint.load_module(module, state, ema=True)
    assert module.weight.tolist() == [5.0, 5.0]
    assert module.running_var.tolist() == [4.0, 4.0]
