"""benchmarks/loss.py compares like with like: every contestant computes the same number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loss

PAIRS = [
    (objective, who) for objective, all_ in loss.OBJECTIVES.items() for who in all_ if who not in ("ours", *loss.PEERS)
]


@pytest.mark.parametrize(("objective", "who"), PAIRS)
@pytest.mark.parametrize("N", [64, 640])
def test_contestants_compute_the_same_value_and_gradient(objective: str, who: str, N: int) -> None:
    pair = loss.measure(loss.Point(objective, ("ours", who), N, D=16, repeats=2))
    assert [len(seconds) for seconds in pair["seconds"].values()] == [2, 2]
    if who == "gemm":
        assert pair["difference"] is None
    else:
        assert pair["difference"]["value"] < 1e-5
        assert pair["difference"]["gradient"] < 1e-4


@pytest.mark.parametrize(("objective", "count"), [("cauc", 3 + 4), ("y_aware", 3 + 3 + 4)])
def test_gemm_does_the_products_of_our_tiles_and_no_others(
    objective: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[Any, ...]] = []

    def noting(product: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            shapes.append(tuple(a.shape for a in args))
            return product(*args, **kwargs)

        return noted

    monkeypatch.setattr(torch, "baddbmm", noting(torch.baddbmm))
    monkeypatch.setattr(torch.Tensor, "baddbmm_", noting(torch.Tensor.baddbmm_))
    a = loss.inputs(1000, 16)  # a whole tile of 512 rows and one of 488
    loss.OBJECTIVES[objective]["ours"](a)
    ours = sorted(shapes)
    shapes.clear()
    loss.OBJECTIVES[objective]["gemm"](a)
    assert sorted(shapes) == ours
    assert len(ours) == count


def test_peak_memory_is_that_of_forward_and_backward_together() -> None:
    """In a process of its own, at an N where N x N matrices are most of what a process has."""
    found = loss.child(loss.Point("cauc", ("dense",), 2048, 16))
    assert 5 < found["peak_bytes"] / (4 * 2048**2) < 12
    assert len(found["seconds"]) == 1


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GiB" in loss.child(loss.Point("cauc", ("dense",), 2**22))["not_run"]
    monkeypatch.setitem(loss.PEERS, "nidl", ("no_such_module", "no-such-package"))
    assert (
        loss.child(loss.Point("y_aware_column", ("ours", "nidl"), 64))["not_run"] == "no-such-package is not installed"
    )


def test_verdict_and_plot_come_from_the_raw_numbers(tmp_path: Path) -> None:
    machine = {"machine": {"processor": "a CPU"}, "versions": {"torch": "2"}}
    pair = {
        "objective": "cauc",
        "contestants": ["ours", "dense"],
        "N": 16384,
        "D": 128,
        "repeats": 2,
        "whole_years": False,
    }
    seconds = {"ours": [1.0, 2.0, 1.0], "dense": [11.0, 30.0, 12.0]}
    alone = [
        {**pair, "contestants": [who], "seconds": [1.0], "peak_bytes": b} for who, b in [("ours", 10), ("dense", 590)]
    ]
    points = [{**pair, "seconds": seconds, "ratio": 12.0, "difference": {"value": 2e-5}}, *alone]
    found = {name: met for name, _, _, _, met in loss.verdict(loss.Results(points))}
    assert found["cauc, N = 16,384: time of dense"] is True
    assert found["cauc, N = 16,384: memory of dense"] is False
    assert found["difference of values, ours and dense"] is False
    assert found["y_aware, N = 16,384: time of dense"] is None
    record = json.loads(json.dumps({**machine, "points": points}))
    assert "MISSED  cauc, N = 16,384: memory of dense: 59" in loss.summary(record)
    loss.plot(record, tmp_path / "r.svg")
    assert (tmp_path / "r.svg").read_text().rstrip().endswith("</svg>")
