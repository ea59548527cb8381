"""The objectives through the Triton kernels, in Triton's interpreter: chosen where they apply, and the same numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cauc_dist import kernels, losses
from cauc_dist.losses import gpu, similar
from cauc_dist.losses.batch import Batch, Exchange
from cauc_dist.losses.tiled import Weights
from tests.oracles import unit
from tests.ranks import run_ranks

N = 21
KERNEL = kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta())

Loss = Callable[[Tensor, Tensor, Exchange], Tensor]
LOSSES: dict[str, Loss] = {
    "cauc": lambda z, y, e: losses.cauc(z, y, KERNEL, exchange=e),
    "cauc pooled, by rows": lambda z, y, e: losses.cauc(
        z, y, KERNEL, views="pooled", normalise_unif="row", normalise_align="global", exchange=e
    ),
    "cauc within sex": lambda z, y, e: losses.cauc(z, y, KERNEL, within=y[:, 1], exchange=e),
    "cauc by sex alone": lambda z, y, e: losses.cauc(z, y[:, 1:], kernels.delta(), exchange=e),
    "y_aware": lambda z, y, e: losses.y_aware_infonce(z, y, KERNEL, exchange=e),
    "y_aware by columns": lambda z, y, e: losses.y_aware_infonce(z, y, KERNEL, normalise="column", exchange=e),
    "ntxent": lambda z, y, e: losses.ntxent(z, exchange=e),
    "supcon": lambda z, y, e: losses.supcon(z, y[:, 1], exchange=e),
    "uniformity pooled": lambda z, y, e: losses.uniformity(z, views="pooled", exchange=e),
}


@pytest.fixture(autouse=True)
def _triton_is_there() -> None:
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        pytest.fail("triton is not installed: pip install triton. The GPU path is tested here or nowhere: no skip")


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    age = 6 + 80 * torch.rand(N, generator=draw, dtype=torch.float64)
    return unit(2, N, 12), torch.stack([age, torch.randint(0, 2, (N,), generator=draw).double()], 1)


def through_kernels(names: list[str], exchange: Exchange = Batch) -> dict[str, tuple[int, float, Tensor]]:
    """(how many of its sums a kernel made, value, gradient of the rows held here) of each."""
    similar.SMALL = gpu.SMALLEST = 0  # W in kernels too, and so few rows
    z, y = batch()
    found, real = {}, gpu.usable
    for name in names:
        taken: list[bool] = []
        gpu.usable = lambda *a, taken=taken, **k: taken.append(real(*a, **k)) or taken[-1]  # type: ignore[func-returns-value]
        own = exchange(z).own if exchange is Batch else share(exchange)
        ours = z[:, own].float().requires_grad_()
        value = LOSSES[name](ours, y, exchange)
        value.backward()
        assert ours.grad is not None
        found[name] = (sum(taken) if all(taken) else 0, value.item(), ours.grad)
    gpu.usable = real
    return found


def share(exchange: Any) -> slice:
    """The rows of this rank."""
    import torch.distributed as dist

    from cauc_dist.stream.plan import shares

    sizes, rank = shares(N, dist.get_world_size()), dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def on_ranks(names: list[str], kind: str) -> list[dict[str, tuple[int, float, Tensor]]]:
    return run_ranks(3, rank_through_kernels, names, kind)


def rank_through_kernels(names: list[str], kind: str) -> dict[str, tuple[int, float, Tensor]]:
    from cauc_dist import gather

    return through_kernels(names, getattr(gather, kind)(N))


def reference(name: str) -> tuple[float, Tensor]:
    """Tiles in float64, which other tests hold to the equations."""
    z, y = batch()
    z.requires_grad_()
    value = LOSSES[name](z, y, Batch)
    (grad,) = torch.autograd.grad(value, z)
    return value.item(), grad


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < 2e-6


def test_every_objective_through_kernels_is_the_one_through_tiles(interpreted: Callable[..., Any]) -> None:
    found = interpreted(through_kernels, list(LOSSES))
    for name, (taken, value, grad) in found.items():
        wanted, slope = reference(name)
        assert taken >= 1, f"{name} did not go through the kernels"
        assert value == pytest.approx(wanted, rel=2e-6), name
        close(grad, slope)


@pytest.mark.parametrize("kind", ["AllGather", "Ring"])
def test_three_ranks_through_kernels_are_one_process_through_tiles(interpreted: Callable[..., Any], kind: str) -> None:
    names = ["cauc", "cauc pooled, by rows", "y_aware"]
    ranks = interpreted(on_ranks, names, kind)
    for name in names:
        wanted, slope = reference(name)
        assert all(rank[name][0] for rank in ranks), name
        assert len({rank[name][1] for rank in ranks}) == 1
        assert ranks[0][name][1] == pytest.approx(wanted, rel=2e-6)
        close(torch.cat([rank[name][2] for rank in ranks], dim=1) / 3, slope)  # times W, for trainers that average


def which(case: str) -> bool:
    z, y = batch()
    z = z.float()
    kernel, kappa = KERNEL, 4.0
    gpu.SMALLEST = len(z) * N + (case == "few rows")
    if case == "a missing value":
        y[3, 0] = float("nan")
        kernel = KERNEL.fit(y)
    if case == "a cauchy column":
        kernel = kernels.product(age=kernels.cauchy(0.1), sex=kernels.delta())
    if case == "a mean of columns":
        kernel = kernels.mean(age=kernels.gaussian(5.0), sex=kernels.delta())
    if case == "float64":
        z = z.double()
    if case == "a sharp temperature":
        kappa = 50.0
    if case == "wide embeddings":
        z = torch.zeros(2, N, 257)
    return gpu.usable(Batch(z), kappa, Weights(kernel, y, z.dtype))


@pytest.mark.parametrize(
    "case",
    [
        *("a missing value", "a cauchy column", "a mean of columns", "float64", "a sharp temperature"),
        *("wide embeddings", "few rows"),
    ],
)
def test_what_the_kernels_cannot_do_is_left_to_the_tiles(interpreted: Callable[..., Any], case: str) -> None:
    assert interpreted(which, "none of these")
    assert not interpreted(which, case)


def test_on_a_cpu_without_the_interpreter_tiles_are_taken() -> None:
    assert not which("none of these")
