"""benchmarks/step.py compares like with like, and its counters count."""

import json
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks import step
from benchmarks.step import ENGINES, Point
from cauc_dist.world import World
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(step.cohort(tmp_path_factory.mktemp("store"), 64, 32))


def contest() -> dict[str, list[float]]:
    step.LR = 0.05  # so that an update is felt
    point = Point("engine", side=9, batch=6, contestants=ENGINES, rounds=1, optimiser="sgd")
    found = step.engines(point, World(dist.get_rank(), dist.get_rank(), dist.get_world_size()))
    assert [len(seconds) for seconds in found["seconds"].values()] == [1] * len(ENGINES)
    losses: dict[str, list[float]] = found["losses"]
    return losses


def test_contestants_go_down_the_same_way() -> None:
    """By SGD, to which a gradient of another scale is another step; AdamW would not mind."""
    losses = run_ranks(2, contest)[0]
    for first, _, last in losses.values():
        moved = losses["ddp"][2] - losses["ddp"][0]
        assert abs(moved) > 1e-3
        assert last - first == pytest.approx(moved, rel=1e-3)


def test_bytes_for_z_are_those_of_one_all_gather(store: str) -> None:
    if not step.has_own_network():
        pytest.skip("no network namespaces here: others' traffic would be counted")
    found = step.world_of(Point("wire", side=32, batch=64, store=store))
    assert found["least_bytes"] == 2 * 64 * 128 * 4
    assert 1 < step.of_z(found) < 1.15
    assert found["sent_bytes"]["backward"] < found["sent_bytes"]["silence"] + 2048


def test_peak_memory_is_that_of_what_is_encoded_at_once(store: str) -> None:
    whole, parts = (step.world_of(Point("memory", side=32, batch=64, chunk=c, store=store)) for c in (0, 4))
    assert not (whole | parts).get("not_run")
    kept = 2 * 32 * 4 * 16**3 * 16 * 2  # of 32 subjects' views: first convolution and its norm, 16 channels of 16^3
    assert kept < min(whole["peak_bytes"]) < whole["baseline_bytes"] / 2  # the process itself is not counted
    assert max(parts["peak_bytes"]) < min(whole["peak_bytes"]) / 3


def test_what_cannot_run_says_why() -> None:
    found = step.world_of(Point("memory", ranks=1, store="no such store"))
    assert "no such store" in found["not_run"]


def test_verdict_and_table_come_from_the_raw_numbers() -> None:
    def point(question: str, numbers: dict[str, Any], **facts: Any) -> dict[str, Any]:
        return {**step.asdict(Point(question, **facts)), **numbers}

    losses = {name: [1.0, 0.5] for name in ENGINES} | {"zero 3": [1.0, 0.6]}
    seconds = {name: [1.0, 2.0, 1.0] for name in ENGINES} | {"zero 1": [1.2, 2.0, 1.3]}
    sent = {"silence": 10, "loss": 1060, "backward": 510, "geometry": 10}
    points = [
        point("engine", {"seconds": seconds, "losses": losses}, contestants=ENGINES),
        point(
            "engine", {"seconds": {"ddp": [1.0]}, "losses": {"ddp": [1.0]}, "peak_bytes": [2**20]}, contestants=("ddp",)
        ),
        point("chunks", {"seconds": {"whole": [1.0, 1.0], "chunks": [1.4, 1.4]}}, chunk=2),
        *(point("memory", {"peak_bytes": [[b, 1]]}, batch=n, chunk=2) for n, b in [(64, 100), (256, 100), (1024, 120)]),
        point("wire", {"sent_bytes": sent, "least_bytes": 1000}),
        {**step.asdict(Point("wire", ranks=4)), "not_run": "ended with 1: no"},
    ]
    found = [(value, bound) for _, value, bound in step.verdict([p for p in points if "not_run" not in p])]
    assert found == [
        (1.0, 1.1),
        (1.2, 1.1),
        (pytest.approx(0.1), 1e-3),
        (pytest.approx(1.4), 1.45),
        (1.55, 1.05),
        (0.5, 0.01),
        (pytest.approx(0.2), 0.1),
    ]
    text = step.summary(json.loads(json.dumps({"points": points})))
    assert "MISSED  engine: cnn3d 64^3, n = 16, W = 2, zero 1 over ddp: 1.2 (wanted <= 1.1)" in text
    assert "zero 1      1.300 s    1.20 x ddp" in text
    assert "not run wire: cnn3d 64^3, n = 16, W = 4, cauc, all_gather: ended with 1: no" in text
