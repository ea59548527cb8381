"""A run on real ranks: one process's curve on any number of them, and a stopped run goes on as if it never stopped."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cauc_dist import checkpoint, journal
from cauc_dist.config import Augment, Checkpoint, Data, Encoder, Objective, Optim, Projector, RunConfig, read
from cauc_dist.prepare import prepare
from cauc_dist.store.reader import Store
from cauc_dist.stream.plan import Plan, split
from cauc_dist.train import build_model, main
from cauc_dist.trainer import Feed, NonFinite, Step, Trainer, non_finite
from tests import ranks as forked


def config(store: Path, run: Path, **changes: object) -> RunConfig:
    """Two epochs of three steps of 6 subjects, every transform on."""
    base = RunConfig(
        name="test",
        run=run,
        epochs=2,
        batch_size=6,
        data=Data(store=str(store)),
        augment=Augment(p_flip=0.5, p_crop=0.5, p_cutout=0.5, p_shift=0.5, max_shift=2),
        encoder=Encoder(width=2),
        projector=Projector(16, 8),
        objective=Objective(kernel=("age:gaussian:5", "sex:delta"), lambda_align=1.0),
        optim=Optim(lr=1e-2),
        checkpoint=Checkpoint(every_epochs=1, keep=2),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def curve(run: Path) -> list[float]:
    return [e["loss"] for e in journal.read(run) if e["event"] == "step"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved, complaints = checkpoint.latest(run)
    assert saved is not None
    assert complaints == []
    return saved.tensors


def trained(run: RunConfig, ranks: int) -> Path:
    folder = prepare(run, ranks)
    assert forked.train(folder, ranks) == [0] * ranks
    return folder


@pytest.fixture(scope="module")
def one(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config(store, tmp_path_factory.mktemp("runs") / "one"), 1)


@pytest.fixture(scope="module")
def two(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config(store, tmp_path_factory.mktemp("runs") / "two"), 2)


def test_two_ranks_have_the_curve_and_the_weights_of_one(one: Path, two: Path) -> None:
    assert len(curve(one)) == 6
    assert curve(two) == pytest.approx(curve(one), rel=1e-4, abs=1e-6)
    ours, theirs = weights(two), weights(one)
    # The moments' tolerance is absolute: Adam divides by roots of numbers near 1e-8.
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-3) for name in theirs)


def test_the_loss_is_the_objective_of_views_that_the_test_makes_itself(one: Path, store: Path) -> None:
    """Step 0 by hand: plan -> volumes -> views -> z -> loss, without loader, engine or gather."""
    from cauc_dist import kernels, losses
    from cauc_dist.augment import views

    run = config(store, one)
    opened = Store.open(store)
    train, _ = split(opened.subjects, 4, 0)
    rows = Plan(train, [opened.subjects[i] for i in train], run.batch_size, run.seed).batch(0)
    volumes = []
    for row in rows.tolist():
        value = torch.from_numpy(opened.volume(row))
        volumes.append((value - value.mean()) / value.std(correction=0))
    x = views(torch.stack(volumes).float(), opened.keys[rows], seed=0, epoch=0, augment=run.augment)
    with torch.no_grad():
        z = build_model(run, opened.shape)(x).view(2, len(rows), -1)
    y = torch.from_numpy(opened.metadata(["age", "sex"])[rows])
    loss = losses.cauc(z, y, kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta()), lambda_align=1.0)
    assert curve(one)[0] == pytest.approx(loss.item(), rel=1e-5)


def test_the_same_run_twice_is_the_same_to_the_bit(two: Path, store: Path, tmp_path: Path) -> None:
    again = trained(config(store, tmp_path / "again"), 2)
    assert curve(again) == curve(two)
    ours, theirs = weights(again), weights(two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_chunks_that_fit_a_budget_of_memory_have_the_same_curve(two: Path, store: Path, tmp_path: Path) -> None:
    from cauc_dist.config import Engine

    run = trained(config(store, tmp_path / "run", engine=Engine(encode_chunk="auto", memory_gib=0.0002)), 2)
    begun = journal.read(run)[0]
    assert (begun["per_rank"], begun["encode_chunk"], begun["chunks"]) == (3, 1, 3)
    assert curve(run) == pytest.approx(curve(two), rel=1e-4, abs=1e-6)
    assert journal.read(two)[0]["chunks"] == 1


def test_the_journal_has_what_a_step_came_to(two: Path) -> None:
    events = journal.read(two)
    steps = [e for e in events if e["event"] == "step"]
    assert events[0]["deepspeed"]["gradient_clipping"] == 0.0
    for step in steps:
        assert 1 <= step["effective_rank"] <= 8
        assert 0 < step["memory_gib"] < 16
        assert step["samples_per_s"] == pytest.approx(6 / step["step_s"])
    assert all(0 < step["communication_share"] <= 1 for step in steps[1:])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_has_the_same_curve(two: Path, store: Path, tmp_path: Path, stage: int) -> None:
    from cauc_dist.config import Engine

    other = trained(config(store, tmp_path / "run", engine=Engine(zero_stage=stage)), 2)  # type: ignore[arg-type]
    assert curve(other) == pytest.approx(curve(two), rel=1e-4, abs=1e-6)


def stopped(run: Path, into: Path) -> Path:
    """A copy of a finished run as it stood after its first epoch."""
    shutil.copytree(run, into)
    shutil.rmtree(into / "checkpoints" / "step-00000006")
    lines = (into / journal.FILE).read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"checkpoint"' in line)
    (into / journal.FILE).write_text("\n".join(lines[:at]) + "\n")
    return into


def test_stopped_and_resumed_equals_never_stopped_to_the_bit(two: Path, tmp_path: Path) -> None:
    run = stopped(two, tmp_path / "run")
    assert forked.train(run, 2) == [0, 0]
    assert [e["event"] for e in journal.read(run)].count("resume") == 1
    assert curve(run) == curve(two)
    ours, theirs = weights(run), weights(two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_of_two_ranks_goes_on_with_three(two: Path, tmp_path: Path) -> None:
    run = stopped(two, tmp_path / "run")
    assert forked.train(run, 3) == [0, 0, 0]
    assert curve(run) == pytest.approx(curve(two), rel=1e-4, abs=1e-6)


def test_a_finished_run_started_again_does_nothing_and_succeeds(one: Path, tmp_path: Path) -> None:
    shutil.copytree(one, tmp_path / "run")
    assert forked.train(tmp_path / "run", 1) == [0]
    assert curve(tmp_path / "run") == curve(one)


def test_kill_9_of_one_rank_ends_the_run_and_the_checkpoint_goes_on(store: Path, tmp_path: Path) -> None:
    run = prepare(config(store, tmp_path / "run", epochs=400), 2)
    command = [
        sys.executable,
        "-c",
        f"import sys; from cauc_dist import spawn; sys.exit(spawn.start(2, {str(run)!r}, threads=1))",
    ]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list((run / "checkpoints").glob("step-*")):
        assert parent.poll() is None
        time.sleep(0.05)
    pids = subprocess.run(
        ["pgrep", "-P", str(parent.pid), "-f", "cauc_dist.train"], capture_output=True, text=True, check=True
    )
    os.kill(int(pids.stdout.split()[-1]), signal.SIGKILL)
    output, _ = parent.communicate(timeout=60)
    assert parent.returncode == 128 + signal.SIGKILL
    assert "was ended by signal 9 (SIGKILL); the other ranks were stopped." in output
    assert f"`cauc resume {run}` goes on." in output
    saved, complaints = checkpoint.latest(run)
    assert saved is not None
    assert complaints == []
    # The rest of the run, cut short: it goes on from the checkpoint, not from scratch.
    short = (run / "config.json").read_text().replace('"epochs": 400', f'"epochs": {saved.step // 3 + 1}')
    (run / "config.json").write_text(short)
    assert forked.train(run, 2) == [0, 0]
    resumed = next(e for e in journal.read(run) if e["event"] == "resume")
    assert resumed["step"] == saved.step


def test_a_checkpoint_of_another_architecture_ends_with_code_2(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(one, run)
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"width": 2', '"width": 4'))
    assert main(str(run)) == 2
    assert "holds the architecture" in capsys.readouterr().err


def test_another_store_than_the_run_began_with_ends_with_code_2(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(one, run)
    record = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    assert main(str(run)) == 2
    assert "has the fingerprint" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_code_3_and_names_the_step(store: Path, tmp_path: Path) -> None:
    run = prepare(config(store, tmp_path / "run", optim=Optim(lr=1e30, warmup_epochs=0)), 2)
    assert forked.train(run, 2) == [3, 3]
    error = "".join(Path(f"{run}.rank-{rank}.log.err").read_text() for rank in range(2))
    assert error.count("error: at step 1" if "error: at step 1" in error else "error: the loss at step 1") == 1
    assert any(e["event"] == "non_finite" for e in journal.read(run))


def test_the_message_of_a_non_finite_loss_names_the_subjects_of_those_rows() -> None:
    step = Step(number=7, epoch=0, lr=0.1, ids=("f", "b", "d"), y=torch.zeros(3, 1))
    assert "all embeddings are finite, the loss is not" in non_finite(step, [])
    assert non_finite(step, [0, 2]).startswith("the loss at step 7 is not finite: embeddings of f, d are not finite")
    assert "not one embedding is" in non_finite(step, [0, 1, 2])


def test_ranks_that_found_different_checkpoints_stop() -> None:
    from tests.ranks import run_ranks

    with pytest.raises(
        AssertionError, match=r"ranks found checkpoints of different steps \[0, 1\]; is the run folder on a shared disk"
    ):
        run_ranks(2, disagree)


def disagree() -> None:
    import torch.distributed as dist

    from cauc_dist.train import agree

    agree(dist.get_rank())


def test_deepspeed_is_told_everything_that_it_would_otherwise_decide() -> None:
    from cauc_dist.engine import deepspeed_config
    from cauc_dist.world import World

    told = deepspeed_config(config(Path("x"), Path("y")), World(0, 0, 3))
    assert told["train_micro_batch_size_per_gpu"] == 2
    assert told["gradient_clipping"] == 0.0
    assert told["zero_optimization"] == {"stage": 1}


def test_a_run_folder_in_which_another_training_is_at_work_is_refused(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    run = tmp_path / "run"
    shutil.copytree(one, run)
    with (run / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(str(run)) == 2
    assert f"another training is at work in {run}" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR2, 5)])
def test_a_signal_to_the_parent_saves_on_all_ranks_and_a_resume_ends_as_if_there_had_been_none(
    store: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run, options = tmp_path / "run", ["--data.store", str(store), "--batch-size", "6", "--ranks", "2", "--epochs", "30"]
    command = [sys.executable, "-m", "cauc_dist", "train", "demo_cauc", *options, "--encoder.width", "2", "--run"]
    parent = subprocess.Popen([*command, str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(curve(run)) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)
    _, error = parent.communicate(timeout=60)
    assert parent.returncode == code
    assert "goes on from the" in error
    (event,) = [e for e in journal.read(run) if e["event"] == "stopped"]
    assert len(curve(run)) == event["step"] < 90
    saved, _ = checkpoint.latest(run)
    assert saved is not None
    assert saved.step == event["step"]  # nothing is done again
    if number == signal.SIGUSR2:
        assert event["signal"] == signal.SIGUSR2
        assert forked.train(run, 2) == [0, 0]
        undisturbed = dataclasses.replace(read(run / "config.json"), run=tmp_path / "whole")
        assert forked.train(prepare(undisturbed, 2), 2) == [0, 0]
        assert curve(run) == curve(tmp_path / "whole")


class Exploding:
    """An engine whose loss is finite and whose gradient is not; tests/test_engine.py shows the real one do the same."""

    device = torch.device("cpu")
    module = torch.nn.Identity()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.eye(4, 3, requires_grad=True)

    def backward(self, losses: list[torch.Tensor], number: int) -> None:
        pass

    def update(self, lr: float) -> float:
        raise FloatingPointError("the gradient's norm is nan")


def test_a_gradient_that_is_not_finite_is_told_from_a_loss_that_is_not(store: Path) -> None:
    from cauc_dist.objective import Objective as Loss
    from cauc_dist.stream.loader import Batch
    from cauc_dist.world import World

    run = config(store, Path("x"), objective=Objective(kernel=("age:gaussian:5",)), batch_size=2)
    y = torch.tensor([[20.0], [60.0]])
    step = Step(number=7, epoch=0, lr=0.1, ids=("a", "b"), y=y)
    batch = Batch(7, np.arange(2), torch.zeros(2, 1, 16, 16, 16), np.ones(2, bool), (), 0.0)
    keys = np.arange(3, dtype=np.uint64)
    with World().process_group(torch.device("cpu")):
        trainer = Trainer(Exploding(), Loss(run.objective, y), run, World(), Feed(iter([batch])), keys)  # type: ignore[arg-type]
        with pytest.raises(NonFinite, match=r"at step 7 the loss is finite and the gradient's norm is nan"):
            trainer.step(step)


@pytest.mark.parametrize(("content", "message"), [(None, "no provenance.json in"), ("{}", "is damaged (KeyError")])
def test_a_run_folder_without_its_provenance_is_refused(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(one, run)
    (run / "provenance.json").unlink()
    if content is not None:
        (run / "provenance.json").write_text(content)
    assert main(str(run)) == 2
    assert message in capsys.readouterr().err


def test_more_ranks_than_gpus_are_refused(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"2 ranks on 1 GPUs; wanted a GPU a rank"):
        prepare(config(store, tmp_path / "run"), 2)


def test_a_run_folder_can_be_written_without_starting_it(store: Path, tmp_path: Path) -> None:
    from cauc_dist.cli import main as cauc

    options = ["--data.store", str(store), "--run", str(tmp_path / "run"), "--batch-size", "6", "--no-start"]
    assert cauc(["train", "demo_cauc", *options]) == 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "provenance.json"]
