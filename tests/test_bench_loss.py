"""The loss that is measured is the recipe's, beside products of matrices that are what they are called."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cauc_dist import config, recipes
from cauc_dist.bench import pairs
from cauc_dist.bench.pairs import Losses, Size
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.layout import Column


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    draw, where = np.random.default_rng(0), tmp_path_factory.mktemp("store") / "s.zarr"
    from_arrays(
        where,
        list(draw.standard_normal((20, 1, 4, 4, 4)).astype(np.float32)),
        [f"sub-{i:02}" for i in range(20)],
        shape=(1, 4, 4, 4),
        columns=(Column("age", "number"),),
        metadata=(draw.uniform(20, 80, 20),),
    )
    run = recipes.get("demo_cauc")
    return replace(run, batch_size=16, data=config.Data(store=str(where)), engine=replace(run.engine, device="cpu"))


def test_the_recipes_loss_is_measured_at_its_batch_and_beyond(run: RunConfig, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "loss.json"
    found = pairs.loss(run, quick=True, out=out, say=said.append)
    assert [size.n for size in found.sizes] == [16, 64]  # of 20 scans: their metadata again and again
    assert (found.objective, found.views, found.width, found.batch) == ("cauc", 2, 128, 16)
    assert all(size.loss_s > 0 and size.products_s > 0 for size in found.sizes)
    assert found.sizes[0].ratio == found.sizes[0].loss_s / found.sizes[0].products_s
    assert said[-1].startswith("What limits this loss: at the recipe's 16 subjects it takes ")
    assert json.loads(out.read_text())["found"]["sizes"][1]["n"] == 64


def test_bare_products_are_cosines_and_a_gradient_through_them() -> None:
    z = torch.nn.functional.normalize(torch.randn(2500, 8, dtype=torch.float64), dim=-1)
    torch.testing.assert_close(pairs.products(z), (z @ z.T) @ z)


def test_a_larger_loss_takes_memory_that_is_its_own(run: RunConfig) -> None:
    """10,000 pairs of 64 embeddings are nothing; a dense n x n matrix of 6,000 would be 137 MiB."""
    from cauc_dist.store.reader import Store

    found = pairs.measured(run, Store.open(run.data.store), [16, 3000], 0.01)
    assert found.sizes[1].loss_s > 5 * found.sizes[0].loss_s
    assert found.sizes[1].grown_bytes < 137 * 2**20


def test_seconds_of_a_pair_are_the_slope_of_the_two_largest() -> None:
    assert pairs.slope([(10, 5.0), (200, 4e-6 * 200**2 + 1), (100, 4e-6 * 100**2 + 1)]) == pytest.approx(4e-6)
    assert pairs.slope([(10, 5.0)]) == 0
    assert pairs.slope([(10, 5.0), (20, 4.0)]) == 0


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (Size(32, 0.001, 0.0001, 0), "it takes 1 ms, 10 times its bare products: calls, not arithmetic"),
        (Size(4096, 0.9, 0.3, 0), "it takes 3.0 times its bare products of matrices, 900 ms."),
    ],
)
def test_a_small_loss_is_calls_and_a_large_one_arithmetic(size: Size, says: str) -> None:
    assert says in pairs.limits(Losses("cauc", 2, 128, size.n, "cpu", (size,)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 20_000}, r"batch_size 20,000; wanted 16,384 or less in one process on cpu"),
        ({"batch_size": 1}, r"batch_size 1; wanted 2 or more"),
        ({"data": config.Data(store="gone.zarr")}, r"gone\.zarr"),
        ({"objective": config.Objective(kernel=("height:gaussian:5",))}, r"no column 'height'"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: RunConfig, change: dict[str, object], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        pairs.loss(replace(run, **change), quick=True, out=None, say=print)  # type: ignore[arg-type]
