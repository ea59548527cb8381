"""`cauc verify` passes what is right, finds the classic faults of a distributed loss, and names them."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cauc_dist import losses, spawn, verify
from cauc_dist.errors import BadInput
from cauc_dist.gather import AllGather, Ring
from cauc_dist.losses import similar
from cauc_dist.losses.batch import Batch, Exchange
from cauc_dist.losses.tiled import Weights
from cauc_dist.verify import Objective, Row
from tests.ranks import run_ranks

N, CPU = 67, torch.device("cpu")


# ---- two losses as one would write them by hand, with a gather and a reduction to choose --------------------------


class _WithGradient(torch.autograd.Function):
    """All rows (V, n, D); backward, each rank gets what all ranks owe its rows (a reduce-scatter)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return everyone(z, batch)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.batch.gather(grads[0]).sum(0)[:, ctx.batch.own], None


class _Summed(torch.autograd.Function):
    """A sum over ranks whose gradient is summed over ranks, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return batch.gather(x).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.batch.gather(grads[0]).sum(0), None


Gather = Callable[[Tensor, Batch], Tensor]
Reduce = Callable[[Tensor, Batch], Tensor]


def everyone(z: Tensor, batch: Batch) -> Tensor:
    return batch.everyone(z.transpose(0, 1)).transpose(0, 1)


def with_gradient(z: Tensor, batch: Batch) -> Tensor:
    return _WithGradient.apply(z, batch)  # type: ignore[no-any-return, no-untyped-call]


def without_gradient(z: Tensor, batch: Batch) -> Tensor:
    """One process needs no gather, and has its gradient."""
    return z if batch.world_size == 1 else everyone(z.detach(), batch)


def own_put_back(z: Tensor, batch: Batch) -> Tensor:
    """As many published codes do: the gathered rows have no gradient, our own among them do."""
    columns = everyone(z.detach(), batch).clone()
    columns[:, batch.own] = z
    return columns


def summed(x: Tensor, batch: Batch) -> Tensor:
    return _Summed.apply(x, batch)  # type: ignore[no-any-return, no-untyped-call]


def plain(x: Tensor, batch: Batch) -> Tensor:
    """dist.all_reduce: the number is the sum, autograd knows of our own share only."""
    return x + (batch.gather(x.detach()).sum(0) - x.detach())


def local(x: Tensor, batch: Batch) -> Tensor:
    """Our own share for all."""
    return x * batch.n / (batch.own.stop - batch.own.start)


def uniformity(gather: Gather, reduce: Reduce, conditional: bool = False) -> Objective:
    """log of the mean over pairs within a view, from the pairs of our anchors with all columns."""

    def objective(z: Tensor, y: Tensor, exchange: Exchange) -> Tensor:
        batch = exchange(z)
        y, kernel = verify.aged(y)
        c = kernel.complement(y).to(z) if conditional else 1.0 - torch.eye(batch.n)
        s = (4 * (z @ gather(z, batch).mT - 1)).exp() * c[batch.own]
        return (reduce(s.sum((1, 2)), batch) / c.sum()).log().mean()

    return objective


def y_aware(gather: Gather) -> Objective:
    """The mean over our own anchors, which the trainer averages over ranks; n / b: shares are uneven."""

    def objective(z: Tensor, y: Tensor, exchange: Exchange) -> Tensor:
        batch = exchange(z)
        views, b = z.shape[:2]
        y, kernel = verify.aged(y)
        s = torch.einsum("vid,wjd->viwj", z, gather(z, batch)) / 0.1
        itself = torch.zeros(s.shape, dtype=torch.bool)
        for view in range(views):
            itself[view, torch.arange(b), view, torch.arange(batch.own.start, batch.own.stop)] = True
        w = kernel(y).to(z)[batch.own][None, :, None].expand(s.shape).masked_fill(itself, 0.0)
        p = w / w.sum((2, 3), keepdim=True)
        lse = s.masked_fill(itself, -torch.inf).logsumexp((2, 3), keepdim=True)
        return (p * (lse - s)).sum() * batch.world_size / (views * batch.n)

    return objective


def own_rows_only(z: Tensor, y: Tensor, exchange: Exchange) -> Tensor:
    return losses.uniformity(z)


def other_order(z: Tensor, y: Tensor, exchange: Exchange) -> Tensor:
    """Metadata not in the order in which ranks hold the subjects."""
    y = y if exchange is Batch else y.flip(0)
    return losses.cauc(z, *verify.aged(y), exchange=exchange)


def summed_gradient(z: Tensor, y: Tensor, exchange: Exchange) -> Tensor:
    """W twice: for a trainer that sums, under one that averages."""
    z = z * 1.0
    z.register_hook(lambda g: g * exchange(z).world_size)
    return losses.uniformity(z, exchange=exchange)


def detached(z: Tensor, y: Tensor, exchange: Exchange) -> Tensor:
    return losses.uniformity(z if exchange is Batch else z * 0 + z.detach(), exchange=exchange)


BY_HAND: dict[str, Objective] = {
    "uniformity": uniformity(with_gradient, summed),
    "conditional uniformity": uniformity(with_gradient, summed, conditional=True),
    "y_aware": y_aware(with_gradient),
}
PLAIN: dict[str, Objective] = {
    "uniformity": uniformity(with_gradient, plain),
    "conditional uniformity": uniformity(with_gradient, plain, conditional=True),
}
HALF: dict[str, Objective] = {
    "uniformity": uniformity(without_gradient, summed),
    "conditional uniformity": uniformity(without_gradient, summed, conditional=True),
}
ASKEW: dict[str, Objective] = {
    "y_aware": y_aware(without_gradient),
    "y_aware, own rows put back": y_aware(own_put_back),
    "uniformity, own rows put back": uniformity(own_put_back, summed),
}
OTHER: dict[str, Objective] = {
    "local log": uniformity(with_gradient, local),
    "own rows only": own_rows_only,
    "metadata in another order": other_order,
}


def judged(name: str) -> list[Row]:
    return verify.compare(globals()[name], N, AllGather(N), CPU)


def causes(rows: list[Row], world: int) -> set[str]:
    assert not any(row.ok for row in rows)
    return {verify.diagnosis(row, world) for row in rows}


# ---- what is right passes -----------------------------------------------------------------------------------------


def all_rows(exchange: str) -> list[Row]:
    import torch.distributed as dist

    made = {"all_gather": AllGather, "ring": Ring}[exchange]
    small, large = verify.sizes(dist.get_world_size())
    rows = verify.compare(verify.every_objective(), small, made(small), CPU)
    return rows + verify.compare(verify.tiled_objectives(), large, made(large), CPU)


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_objective_is_ok_on_w_ranks_through_both_exchanges(world: int, exchange: str) -> None:
    told = run_ranks(world, all_rows, exchange)
    assert all(rows == told[0] for rows in told)  # every rank knows, and leaves with the same code
    assert [row.name for row in told[0] if not row.ok] == []
    assert len(told[0]) == len(verify.every_objective()) + len(verify.tiled_objectives())
    # Room to spare: tolerances are not what decides.
    assert max(abs(row.ratio - 1) for row in told[0]) < 3e-6
    assert max(abs(row.found / row.wanted - 1) for row in told[0]) < 3e-6
    assert verify.faults(told[0], world) == []


@pytest.mark.parametrize("world", [2, 3])
def test_a_loss_by_hand_whose_gather_and_reduction_carry_gradients_is_ok(world: int) -> None:
    assert [row.name for row in run_ranks(world, judged, "BY_HAND")[0] if not row.ok] == []


def test_saboteurs_are_right_in_one_process() -> None:
    """So that what is at fault on W ranks is the ranks' doing, not the formula's."""
    for saboteurs in (PLAIN, HALF, ASKEW, OTHER):
        for name, objective in saboteurs.items():
            model, x, y = verify.problem(N)
            found = verify.value_and_gradient(objective, model.double(), x.double(), y, Batch)
            right = verify.every_objective()
            loss = "cauc" if "metadata" in name else name.split(",")[0]
            loss = loss if loss in right else "uniformity"
            wanted = verify.value_and_gradient(right[loss], model, x.double(), y, Batch)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_all_objectives_of_the_package_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = set(losses.__all__) - {"geometry", "loss_and_grad"}
    called = set()

    def spy(name: str) -> Callable[..., Tensor]:
        right = getattr(losses, name)

        def loss(*arguments: Any, **options: Any) -> Tensor:
            called.add(name)
            return right(*arguments, **options)  # type: ignore[no-any-return]

        return loss

    for name in wanted:
        monkeypatch.setattr(losses, name, spy(name))
    _, _, y = verify.problem(N)
    z = torch.nn.functional.normalize(torch.randn(2, N, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    for objective in verify.every_objective().values():
        objective(z, y, Batch)
    assert called == wanted


def test_the_large_batch_goes_each_way_to_the_weights() -> None:
    n = verify.sizes(2)[1]
    _, _, y = verify.problem(n)
    z = torch.zeros(2, n, 16)
    ways = []
    for columns in (verify.aged, verify.scored, verify.known):
        few, kernel = columns(y)
        ways.append(similar.similar(Weights(kernel, few, z.dtype), few, Batch(z)))
    distinct, low_rank, exact = ways
    assert isinstance(distinct, similar.Factored)
    assert distinct.factor is None
    assert isinstance(low_rank, similar.Factored)
    assert low_rank.factor is not None
    assert isinstance(exact, similar.Exact)


def test_ranks_hold_unequal_shares_of_unlike_subjects() -> None:
    for world in range(2, 600):
        assert all(n % world for n in verify.sizes(world))
    _, x, y = verify.problem(N)
    assert len(torch.unique(x.reshape(-1, x.shape[-1]), dim=0)) == 2 * N
    assert y[:, verify.AGE].isnan().any()
    assert not y[:, [verify.SITE, verify.SCORE]].isnan().any()
    assert len(torch.unique(y[:, verify.SCORE])) == N


# ---- what is wrong is found and named -----------------------------------------------------------------------------


ASKEW_CAUSE = "right value, wrong direction: pairs with other ranks lost or misplaced, as by a gather without gradient"
OTHER_CAUSE = "a different loss, e.g. the log of each rank's own sum averaged over ranks, or rows in another order"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_plain_all_reduce_before_the_log_has_ratio_1_over_w_and_cosine_1(world: int) -> None:
    rows = run_ranks(world, judged, "PLAIN")[0]
    assert all(row.same_value and row.apart < 1e-9 for row in rows)
    assert [row.ratio for row in rows] == pytest.approx([1 / world] * 2, rel=2e-6)
    assert all(
        f"ratio 1/{world}, cosine 1: a plain all_reduce before the log" in cause for cause in causes(rows, world)
    )


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_gather_without_gradient_has_half_the_gradient_of_symmetric_losses(world: int) -> None:
    rows = run_ranks(world, judged, "HALF")[0]
    assert all(row.same_value and row.apart < 1e-9 for row in rows)
    assert [row.ratio for row in rows] == pytest.approx([1 / 2] * 2, rel=2e-6)
    assert all("ratio 1/2, cosine 1: a gather without gradient" in cause for cause in causes(rows, world))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_gather_without_gradient_turns_the_gradient_of_others(world: int) -> None:
    rows = run_ranks(world, judged, "ASKEW")[0]
    assert all(row.same_value and row.apart > 1e-4 for row in rows)
    assert causes(rows, world) == {ASKEW_CAUSE}


@pytest.mark.parametrize("world", [2, 3])
def test_a_log_of_each_ranks_own_sum_is_a_different_loss(world: int) -> None:
    rows = run_ranks(world, judged, "OTHER")[0]
    assert causes(rows, world) == {OTHER_CAUSE}


def test_on_two_ranks_one_half_is_both_faults_and_three_tell_them_apart() -> None:
    row = Row("x", N, 1.0, 1.0, 0.5, 0.0)
    assert verify.diagnosis(row, 2) == (
        "ratio 1/2, cosine 1: a plain all_reduce before the log, or a factor W left out; "
        "or ratio 1/2, cosine 1: a gather without gradient; "
        "three ranks tell them apart"
    )
    assert verify.diagnosis(row, 3) == "ratio 1/2, cosine 1: a gather without gradient"


MORE: dict[str, Objective] = {"summed": summed_gradient, "detached": detached}


def test_a_gradient_that_is_summed_and_one_that_is_lost_are_named() -> None:
    rows = run_ranks(3, judged, "MORE")[0]
    assert [row.ok for row in rows] == [False, False]
    assert verify.diagnosis(rows[0], 3) == "ratio 3, cosine 1: gradients summed over ranks, or multiplied by W twice"
    assert verify.diagnosis(rows[1], 3) == "no gradient, or one that is not a number"


@pytest.mark.parametrize(
    "row",
    [
        Row("value", N, 1 + 2e-5, 1.0, 1.0, 0.0),
        Row("small value", N, 1e-3 + 1e-7, 1e-3, 1.0, 0.0),
        Row("ratio", N, 1.0, 1.0, 1 - 2e-5, 0.0),
        Row("cosine", N, 1.0, 1.0, 1.0, 2e-5),
        Row("value nan", N, math.nan, 1.0, 1.0, 0.0),
        Row("nan", N, 1.0, 1.0, math.nan, math.nan),
        Row("scaled", N, 1.0, 1.0, 0.7, 0.0),
    ],
    ids=lambda row: row.name,
)
def test_each_number_alone_makes_a_fault(row: Row) -> None:
    good = Row("good", N, 1 + 5e-6, 1.0, 1 + 5e-6, 5e-6)
    assert (good.ok, row.ok) == (True, False)
    (line,) = verify.faults([good, row], 3)
    assert line.startswith("FAULT ")
    assert line.endswith(f": in {row.name} (67)")
    lines = verify.table([good, row], 3).splitlines()
    assert [text.split()[-1] for text in lines[1:]] == ["ok", "FAULT"]


# ---- as a command -------------------------------------------------------------------------------------------------


SABOTAGE = {
    "scaled": "z.register_hook(lambda g: g / exchange(z).world_size)",
    "killed": "os.environ.get('RANK') == '1' and os.kill(os.getpid(), 9)",
    "failing": "if os.environ.get('RANK') == '1': raise ValueError('no such luck')",
}


def sabotaged(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int = 3) -> int:
    """`cauc verify` of a package whose uniformity is not what it was; the exit code."""
    (folder / "sabotaged.py").write_text(
        "import os, sys\n"
        "from cauc_dist import losses, verify\n"
        "right = losses.uniformity\n"
        "def uniformity(z, views='within', exchange=None):\n"
        f"    {SABOTAGE[how]}\n"
        "    return right(z, views=views, exchange=exchange)\n"
        "losses.uniformity = uniformity\n"
        "sys.exit(verify.main(['--device', 'cpu']))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return spawn.start(ranks, module="sabotaged", threads=1)


def test_a_fault_ends_the_command_with_code_1_the_diagnosis_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sabotaged("scaled", tmp_path, monkeypatch) == 1
    out, error = capfd.readouterr()
    assert error == ""
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.endswith("  FAULT")] == [
        "uniformity",
        "uniformity, views pooled",
    ]
    assert "2 of them differ by more than 1e-05" in lines[-2]
    where = "in uniformity (67); uniformity, views pooled (67)"
    assert lines[-1] == f"FAULT ratio 1/3, cosine 1: a plain all_reduce before the log, or a factor W left out: {where}"


def test_a_killed_rank_ends_the_command_with_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sabotaged("killed", tmp_path, monkeypatch, ranks=2) == 128 + 9
    error = capfd.readouterr().err
    assert re.search(r"rank 1 \(pid \d+\) was ended by signal 9 \(SIGKILL\); the other ranks were stopped\.", error)


def test_a_rank_that_fails_says_which_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sabotaged("failing", tmp_path, monkeypatch, ranks=2) == 1
    error = capfd.readouterr().err
    # torch puts the rank before each line.
    assert re.search(r"ValueError: no such luck\n.*on rank 1 of 2, in uniformity of 67 subjects\n", error)


def test_without_a_launcher_one_process_is_a_world_of_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert spawn.start(1, "--exchange", "ring", "--device", "cpu", module="cauc_dist.verify", threads=1) == 0
    out = capfd.readouterr().out
    assert "37 objectives, 1 rank on 1 host (CPU fp32, gloo, exchange ring, torch 2." in out
    assert out.endswith("against 1 process (CPU float64): all equal to 1e-05\n")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_fewer_gpus_than_ranks_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    verify.check(device, 2)
    with pytest.raises(BadInput, match=r"3 ranks for 2 GPUs on this machine; wanted a GPU a rank.*or 2 ranks"):
        verify.check(device, 3)
    verify.check("cpu", 3)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BadInput, match=r"no CUDA device; wanted a GPU, since --device is cuda.*--device cpu"):
        verify.check("cuda", 1)
    verify.check("auto", 8)


def test_a_rank_of_half_a_world_is_refused_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert verify.main([]) == 2
    assert "RANK set but not" in capsys.readouterr().err
