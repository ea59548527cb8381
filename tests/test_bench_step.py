"""A measured step is a real one: its parts add up, its bytes are the kernel's, its arithmetic the network's."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.step import OWN_NETWORK
from cauc_dist import config, encoders, recipes
from cauc_dist.bench import rank, step
from cauc_dist.bench.clock import PARTS, Clock
from cauc_dist.bench.projection import Link, Model
from cauc_dist.bench.rank import Measured
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput

FEATURES, WIDTH, N = 24, 48, 24


@pytest.fixture(scope="module")
def run(table: Path) -> RunConfig:
    """A recipe for a table of 40 subjects: an MLP, whose arithmetic is a closed form."""
    run = recipes.get("demo_cauc")
    return replace(
        run,
        name="table",
        batch_size=N,
        data=config.Data(store=str(table), folds=1, normalise="dataset"),
        augment=config.Augment(p_intensity=0.0, p_blur=0.0),
        encoder=config.Encoder(name="mlp", width=WIDTH, norm="batch"),
        engine=replace(run.engine, device="cpu"),
    )


def on_own_network(run: RunConfig, ranks: int, folder: Path, steps: int = 3) -> Measured:
    """A step in a network namespace: nobody else's bytes are on its interfaces."""
    step.ask(folder, run, [run.batch_size], steps, 1)
    program = (
        f"import sys; from cauc_dist import spawn; sys.exit(spawn.start({ranks}, {str(folder)!r}, "
        "module='cauc_dist.bench.rank', threads=1))"
    )
    done = subprocess.run([*OWN_NETWORK, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = step.answer(folder)
    return found


def model(found: Measured, stage: int) -> Model:
    return Model(0, 0, 0, found.gradient_bytes, found.z_bytes, stage, found.small, True, Link(), Link())


@pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (3, 1)])
def test_ranks_send_the_bytes_that_a_projection_counts(run: RunConfig, ranks: int, stage: int, tmp_path: Path) -> None:
    try:
        alone = subprocess.run([*OWN_NETWORK, "true"], capture_output=True).returncode == 0
    except OSError:
        alone = False
    if not alone:
        pytest.skip("no network namespaces here: others' traffic would be counted")
    wide = replace(run, encoder=replace(run.encoder, width=1024), engine=replace(run.engine, zero_stage=stage))  # type: ignore[arg-type]
    found = on_own_network(wide, ranks, tmp_path)
    assert found.sent_bytes is not None
    assert found.sent_bytes / ranks == pytest.approx(model(found, stage).traffic(ranks, N), rel=0.03)


@pytest.fixture(scope="module")
def found(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, list[str], Path]:
    said: list[str] = []
    out = tmp_path_factory.mktemp("out") / "new" / "step.json"
    return step.step(run, 2, quick=True, out=out, say=said.append), said, out


def test_parts_of_a_step_add_up_to_it(found: tuple[Measured, list[str], Path]) -> None:
    one, _, _ = found
    assert tuple(one.seconds) == PARTS
    assert all(seconds >= 0 for seconds in one.seconds.values())
    assert sum(one.shares.values()) == pytest.approx(1)
    assert 0.5 * min(one.step_s) < sum(one.seconds.values()) <= 1.1 * max(one.step_s)
    assert (one.ranks, one.batch, one.share, one.chunks, len(one.step_s)) == (2, N, N // 2, 1, 4)
    assert min(one.seconds[part] for part in ("augment", "encode", "loss", "backward", "communication", "update")) > 0


def test_arithmetic_is_that_of_the_layers(found: tuple[Measured, list[str], Path], run: RunConfig) -> None:
    """2 m n k a product; the backward pass has two of them, one where no gradient of x is needed."""
    one, _, _ = found
    rows = run.augment.views * one.share
    layers = _layers(run)
    expected = sum(2 * rows * a * b * (2 if k == 0 else 3) for k, (a, b) in enumerate(layers))
    assert expected < one.flop < 1.3 * expected  # the rest is the loss
    assert one.parameters == sum(p.numel() for p in _network(run).parameters())
    assert one.gradient_bytes == 4 * one.parameters
    assert one.z_bytes == 2 * run.projector.out * 4


def test_norms_of_every_chunk_meet_forward_and_backward(run: RunConfig) -> None:
    chunked = replace(run, engine=replace(run.engine, encode_chunk=N // 4))
    (found,) = step.on_ranks(chunked, 2, [N], 1, 1)
    layers = sum(isinstance(m, encoders.BatchNorm) for m in _network(run).modules())
    assert layers > 0
    assert found.chunks == 2
    assert found.small == 2 * 2 * layers + rank.TOLD


def _network(run: RunConfig) -> torch.nn.Module:
    from cauc_dist.train import build_model

    return build_model(run, (FEATURES,))


def _layers(run: RunConfig) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in _network(run).modules() if isinstance(m, torch.nn.Linear)]


def test_the_last_line_says_what_limits_and_the_file_has_the_raw_numbers(
    found: tuple[Measured, list[str], Path],
) -> None:
    one, said, out = found
    assert said[0] == "table: batch 24 = 2 ranks x 12, cpu, fp32"
    assert said[-1].startswith("What limits this run: ")
    record = json.loads(out.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert record["found"]["step_s"] == list(one.step_s)
    assert record["verdict"] == said[-1]
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("large", "says"),
    [
        ({"data": 0.2, "encode": 0.8}, "waiting for scans, 20 %"),
        ({"data": 0.05, "encode": 0.4, "backward": 0.55}, "the encoder's arithmetic, 95 %"),
        ({"augment": 0.6, "encode": 0.4}, "augmenting, 60 %"),
        ({"loss": 0.9, "encode": 0.1}, "the loss, 90 %"),
        ({"communication": 0.55, "encode": 0.45}, "communication between ranks, 55 %"),
        ({"update": 0.7, "encode": 0.3}, "the optimiser's update, 70 %"),
        ({"other": 1.0}, "neither encoder nor loss, 100 %"),
    ],
)
def test_the_largest_part_is_what_limits(
    found: tuple[Measured, list[str], Path], large: dict[str, float], says: str
) -> None:
    assert says in step.limits(replace(found[0], seconds=dict.fromkeys(PARTS, 0.0) | large))


def test_a_store_that_is_not_there_is_said_once_before_ranks_start(run: RunConfig) -> None:
    gone = replace(run, data=replace(run.data, store="gone.zarr"))
    with pytest.raises(BadInput, match=r"gone\.zarr"):
        step.step(gone, 2, quick=True, out=None, say=print)


def test_ranks_that_fail_are_told_of(run: RunConfig, capfd: pytest.CaptureFixture[str]) -> None:
    gone = replace(run, data=replace(run.data, store="/gone.zarr"))
    with pytest.raises(BadInput, match=r"2 ranks ended with code 2; wanted a step of the recipe. Mend what they say"):
        step.on_ranks(gone, 2, [N], 1, 1)
    assert "/gone.zarr" in capfd.readouterr().err


def test_a_gradient_is_sent_in_fp32_under_bf16_too_unless_deepspeed_is_told(run: RunConfig) -> None:
    bf16 = replace(run, engine=replace(run.engine, precision="bf16"))
    assert rank.gradient_width(bf16, {}) == 4
    assert rank.gradient_width(bf16, {"communication_data_type": "bf16"}) == 2
    assert rank.gradient_width(replace(run, engine=replace(run.engine, precision="fp64")), {}) == 8


def test_a_part_within_another_is_taken_out_of_it() -> None:
    clock = Clock(torch.device("cpu"))

    class Thing:
        def outer(self) -> None:
            time.sleep(0.02)
            self.inner()

        def inner(self) -> None:
            time.sleep(0.05)

    thing = Thing()
    clock.watch(thing, outer="encode", inner="data")
    clock.restart()
    thing.outer()
    found = clock.restart()
    assert 0.02 <= found["encode"] < 0.05 <= found["data"]
    assert clock.restart()["data"] == 0


def test_a_rank_takes_the_threads_that_training_would(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert step.threads_of(run, 10**6) == 1
    assert step.threads_of(run, 1) == len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert step.threads_of(run, 1) == 3
    assert step.threads_of(replace(run, engine=replace(run.engine, threads=5)), 1) == 5
