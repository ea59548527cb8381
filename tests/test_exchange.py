"""What the exchange sends, and when: nothing in the backward pass, few numbers forward, the same loss on every rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.ranks import run_ranks

N, D, VIEWS = 13, 6, 2
EXCHANGES = ("AllGather", "Ring")


def losses_by_name() -> dict[str, Any]:
    """loss(z of this rank, y of all, exchange) of each way to exchange: sums, sums by row, row sums, whole rows."""
    from cauc_dist import kernels, losses

    kernel = kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta())
    return {
        "cauc": lambda z, y, e: losses.cauc(z, y, kernel, exchange=e),
        "cauc by rows": lambda z, y, e: losses.cauc(z, y, kernel, normalise_unif="row", views="pooled", exchange=e),
        "cauc, alpha 1": lambda z, y, e: losses.cauc(z, y, kernel, alpha=1.0, exchange=e),
        "y_aware": lambda z, y, e: losses.y_aware_infonce(z, y, kernel, exchange=e),
        "ntxent": lambda z, y, e: losses.ntxent(z, 0.02, exchange=e),
        "align_uniform": lambda z, y, e: losses.align_uniform(z, exchange=e),
        "kernel decoupled": lambda z, y, e: losses.decoupled_uniformity(z, y, kernel, exchange=e),
        "threshold": lambda z, y, e: losses.threshold(z, y, kernel, exchange=e),
        "rank_n_contrast": lambda z, y, e: losses.rank_n_contrast(z, y, exchange=e),
    }


def problem(n: int = N, width: int = D) -> tuple[Tensor, Tensor]:
    """z (V, n, D) of unit rows and y (n, 2), float64."""
    y = torch.cat([20 + 15 * torch.rand(n, 1, generator=torch.Generator().manual_seed(5)), oracles.cohort(n)[:, 1:]], 1)
    return oracles.unit(VIEWS, n, width), y.double()


def own(n: int = N) -> slice:
    import torch.distributed as dist

    from cauc_dist.stream.plan import shares

    sizes, rank = shares(n, dist.get_world_size()), dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def tiles(rows: int) -> None:
    from cauc_dist.losses import similar, tiled

    tiled.ROWS["cpu"] = rows
    similar.SMALL = 0


# ---- shares -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "world", "wanted"),
    [(12, 4, [3, 3, 3, 3]), (13, 4, [4, 3, 3, 3]), (15, 4, [4, 4, 4, 3]), (3, 4, [1, 1, 1, 0]), (5, 1, [5])],
)
def test_shares_are_even_but_for_one_more_on_the_first_ranks(n: int, world: int, wanted: list[int]) -> None:
    from cauc_dist.stream.plan import shares

    assert shares(n, world) == wanted


# ---- the wire ---------------------------------------------------------------------------------------------------


def rounded(exchange: str, names: list[str]) -> dict[str, tuple[float, Tensor]]:
    """Value, and the gradient of this rank's rows, in float64 with fp16 on the wire."""
    from cauc_dist import gather

    tiles(4)
    z, y = problem()
    found = {}
    for name in names:
        ours = z[:, own()].clone().requires_grad_()
        value = losses_by_name()[name](ours, y, getattr(gather, exchange)(N, torch.float16))
        found[name] = (value.item(), torch.autograd.grad(value, ours)[0])
    return found


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_fp16_on_the_wire_is_one_process_on_rounded_rows_with_the_gradient_passed_through(
    exchange: str, world: int
) -> None:
    from cauc_dist.losses.batch import Batch

    z, y = problem()
    names = list(losses_by_name())
    ranks = run_ranks(world, rounded, exchange, names)
    for name in names:
        half = z.half().double().requires_grad_()
        value = losses_by_name()[name](half, y, Batch)
        (wanted,) = torch.autograd.grad(value, half)
        exact = losses_by_name()[name](z, y, Batch).item()
        assert abs(value.item() - exact) > 1e-7  # rounding is seen
        for found in ranks:
            assert found[name][0] == pytest.approx(value.item(), rel=1e-12), name
        gradient = torch.cat([found[name][1] for found in ranks], 1) / world  # the trainer averages
        assert float((gradient - wanted).abs().max()) < 1e-12 * float(wanted.abs().max()), name


def decoupled_rounded() -> float:
    from cauc_dist import losses
    from cauc_dist.gather import AllGather

    z, _ = problem()
    return losses.decoupled_uniformity(z[:, own()], exchange=AllGather(N, torch.float16)).item()


# ---- what is sent -----------------------------------------------------------------------------------------------


OTHERS = ["reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_object", "broadcast"]
OTHERS += ["reduce", "gather", "scatter", "all_to_all", "all_to_all_single", "send", "recv", "barrier"]


@contextmanager
def counted() -> Iterator[list[tuple[str, torch.dtype, int]]]:
    """(collective, dtype, numbers that this rank sends) of each one issued; every other collective raises."""
    import torch.distributed as dist

    from cauc_dist import gather

    sent: list[tuple[str, torch.dtype, int]] = []
    all_gather, all_reduce, batch = gather._all_gather, dist.all_reduce, dist.batch_isend_irecv

    def counting_gather(out: Tensor, x: Tensor, **k: Any) -> Any:
        sent.append(("all_gather", x.dtype, x.numel()))
        return all_gather(out, x, **k)

    def counting_reduce(x: Tensor) -> Any:
        sent.append(("all_reduce", x.dtype, x.numel()))
        return all_reduce(x)

    def counting_batch(ops: list[Any]) -> Any:
        sent.extend(("send", op.tensor.dtype, op.tensor.numel()) for op in ops if op.op is dist.isend)
        return batch(ops)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective that the exchange is not known to use")

    with pytest.MonkeyPatch.context() as patch:
        for name in OTHERS:
            patch.setattr(dist, name, refuse)
        patch.setattr(gather, "_all_gather", counting_gather)
        patch.setattr(dist, "all_reduce", counting_reduce)
        patch.setattr(dist, "batch_isend_irecv", counting_batch)
        yield sent


def sent_by(
    exchange: str, names: list[str], n: int, width: int, wire: torch.dtype | None = None, matrix: bool = False
) -> dict[str, list[Any]]:
    """What the forward pass of each loss sends, and how many collectives its backward pass issues."""
    from cauc_dist import gather

    if not matrix:
        tiles(64)
    z, y = problem(n, width)
    found = {}
    for name in names:
        ours = z[:, own(n)].clone().requires_grad_()
        over = getattr(gather, exchange)(n, wire)
        over(ours)  # the first call compares shapes
        with counted() as sent:
            value = losses_by_name()[name](ours, y, over)
            forward = list(sent)
            value.backward()
        assert ours.grad is not None
        assert ours.grad.abs().sum() > 0
        found[name] = [forward, len(sent) - len(forward)]
    return found


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_backward_sends_nothing(exchange: str) -> None:
    names = list(losses_by_name())
    for found in run_ranks(3, sent_by, exchange, names, N, D):
        for name in names:
            forward, backward = found[name]
            assert forward, name
            assert backward == 0, name


def test_cauc_gathers_rows_once_and_then_a_handful_of_sums() -> None:
    """n = 40 over 3 ranks: 14 rows of 2 views at most, D = 33. No second message of as many numbers: no gradient."""
    names = ["cauc", "cauc by rows", "cauc, alpha 1", "y_aware", "align_uniform", "kernel decoupled"]
    found = run_ranks(3, sent_by, "AllGather", names, 40, 33)
    rows, subjects, embeddings = VIEWS * 14 * 33, 14, VIEWS * 14
    f64 = torch.float64
    wanted = {  # in order: what is known of a subject from its metadata, the rows, what is known of a row, the sums
        "cauc": [subjects, rows, 1 + 2 + 3],
        "cauc by rows": [subjects, subjects, rows, 1 + 2 + 2],
        "cauc, alpha 1": [subjects, rows, 1 + 2 + 3],
        "y_aware": [subjects, rows, embeddings, 1 + 2],
        "align_uniform": [rows, 1 + 1 + 3],
        "kernel decoupled": [rows],
    }
    for rank in found:
        for name in names:
            assert sorted(rank[name][0]) == sorted(("all_gather", f64, size) for size in wanted[name]), name
    for rank in run_ranks(3, sent_by, "AllGather", names, 40, 33, None, True):
        for name, first in (("cauc", 0), ("cauc by rows", 1), ("y_aware", 0)):  # W is held: no sums of it are sent
            known = [subjects] * first
            assert sorted(size for *_, size in rank[name][0]) == sorted([*known, *wanted[name][first + 1 :]]), name


@pytest.mark.parametrize("world", [4, 5])
def test_a_ring_sends_about_as_many_numbers_as_an_all_gather(world: int) -> None:
    """Blocks half round the ring and, where a block was met for both, its part back: never more than W - 1 blocks."""
    share = -(-40 // world)
    block = VIEWS * share * 33
    for found in run_ranks(world, sent_by, "Ring", ["align_uniform"], 40, 33):
        forward = found["align_uniform"][0]
        sends = [size for kind, _, size in forward if kind == "send"]
        assert sends == [block] * (world - 1)
        assert [size for kind, _, size in forward if kind == "all_gather"] == [1 + 1 + 3]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_fp16_halves_the_bytes_of_the_rows_and_of_nothing_else(exchange: str) -> None:
    for found in run_ranks(2, sent_by, exchange, ["cauc", "threshold"], 40, 33, torch.float16):
        for name in ("cauc", "threshold"):
            for _, dtype, size in found[name][0]:
                assert dtype == (torch.float16 if size >= VIEWS * 20 * 33 else torch.float64)


def once(exchange: str) -> tuple[dict[str, float], list[int]]:
    """(geometry of 13 subjects beside their loss, how many numbers of the size of z this rank sent)."""
    import torch.distributed as dist

    from cauc_dist import gather, losses
    from cauc_dist.stream.plan import shares

    sizes, rank = shares(13, dist.get_world_size()), dist.get_rank()
    z = oracles.unit(VIEWS, 13, D).double()[:, sum(sizes[:rank]) :][:, : sizes[rank]].requires_grad_()
    meet = gather.Once(gather.EXCHANGES[exchange](13))
    with counted() as sent:
        losses.align_uniform(z, exchange=meet).backward()
        found = losses.geometry(z.detach(), exchange=meet)
    meet.close()
    return found, [size for _, _, size in sent if size >= VIEWS * max(sizes) * D]


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_rows_travel_once_for_the_loss_and_what_is_watched(exchange: str) -> None:
    from cauc_dist import losses

    wanted = losses.geometry(oracles.unit(VIEWS, 13, D).double())
    for found, sent in run_ranks(3, once, exchange):
        assert found == pytest.approx(wanted, rel=1e-9)
        assert exchange == "ring" or sent == [VIEWS * 5 * D]


def sound_and_uneven() -> tuple[list[bool], list[tuple[str, torch.dtype, int]], dict[str, list[int]]]:
    """(which rows are sound, what it sent to learn that, numbers sent where rank 0 holds every row, by exchange).

    Shares of 5, 5 and 4 scans; each rank tells its number, and half of it, beside them.
    """
    import torch.distributed as dist

    from cauc_dist import gather, losses

    rank, world = dist.get_rank(), dist.get_world_size()
    with counted() as sent:
        ours = (torch.arange(5 - (rank == 2)) % (rank + 2) > 0).numpy()
        sound, facts = gather.tell(ours, [rank, rank / 2], [5, 5, 4])
    assert facts.tolist() == [[0, 0], [1, 0.5], [2, 1]]
    sizes, by_exchange = [4] + [0] * (world - 1), {}
    z = oracles.unit(VIEWS, sizes[rank], D).double()
    for name, exchange in gather.EXCHANGES.items():
        with counted() as numbers:
            losses.align_uniform(z, exchange=exchange(4, sizes=sizes))
        by_exchange[name] = [size for _, _, size in numbers]
    return [bool(s) for rows in sound for s in rows], sent, by_exchange


def test_which_rows_are_sound_is_one_number_a_row_and_a_ring_of_one_holder_sends_no_rows() -> None:
    wanted = [digit == "1" for digit in "01010011010111"]
    for sound, sent, by_exchange in run_ranks(3, sound_and_uneven):
        assert sound == wanted
        assert sent == [("all_gather", torch.float64, 7)]
        shapes, sums = 5, 1 + 1 + 3
        assert by_exchange == {"all_gather": [shapes, VIEWS * 4 * D, sums], "ring": [shapes, sums]}


# ---- memory -----------------------------------------------------------------------------------------------------


def held(exchange: str) -> tuple[list[tuple[int, str]], int]:
    """(first subject, kind) of each block met, and how many blocks of unit rows were alive at once, at most."""
    import gc

    from cauc_dist import gather

    n = 60
    z, _ = problem(n)
    batch = getattr(gather, exchange)(n)(z[:, own(n)].clone())
    del z
    size, met, alive = batch.z.numel(), [], [0]

    def act(start: int, x: Tensor, kind: str) -> Tensor | None:
        large = [t for t in gc.get_objects() if type(t) is Tensor and t.untyped_storage().nbytes() >= 8 * size]
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in large if t.dtype == torch.float64}
        rows = [
            torch.empty(0, dtype=torch.float64).set_(s, 0, (s.nbytes() // 8 // D, D), (D, 1)) for s in memory.values()
        ]
        unit = [r for r in rows if torch.allclose(r.norm(dim=1), torch.ones(len(r), dtype=r.dtype))]
        alive.append(sum(r.numel() for r in unit) // size)
        met.append((start, kind))
        return torch.full_like(x, 7.0) if kind == "both" else None

    batch.meet(act)
    return met, max(alive)


def test_a_ring_never_holds_more_than_three_blocks_of_rows_and_meets_each_pair_of_ranks_once() -> None:
    world, b = 6, 10
    pairs = []
    for rank, (met, most) in enumerate(run_ranks(world, held, "Ring")):
        assert most == 3  # ours, the one met, the one arriving
        assert met[0] == (rank * b, "self")
        pairs += [(rank, start // b, kind) for start, kind in met[1:]]
    both = {frozenset((r, s)) for r, s, kind in pairs if kind == "both"}
    once = [(r, s) for r, s, kind in pairs if kind == "one"]
    assert len(both) == sum(kind == "both" for *_, kind in pairs) == 12
    assert sorted(once) == [(r, (r + 3) % 6) for r in range(6)]  # opposite ranks: each does its own part
    assert len(both) + len(once) // 2 == 15  # all pairs of six ranks


def test_an_all_gather_meets_its_own_rows_first_and_then_all_others() -> None:
    for rank, (met, most) in enumerate(run_ranks(3, held, "AllGather")):
        assert met[0] == (rank * 20, "self")
        assert met[1:] == [(0, "one")] * (rank > 0) + [((rank + 1) * 20, "one")] * (rank < 2)
        assert most >= 4  # ours and all: what the ring is for


# ---- the same on all ranks --------------------------------------------------------------------------------------


def values(exchange: str, n: int) -> list[bytes]:
    """The bits of each loss, of fp64 and fp32 rows."""
    from cauc_dist import gather

    tiles(5)
    z, y = problem(n)
    e = getattr(gather, exchange)(n)
    rows = (z[:, own(n)], z[:, own(n)].float())
    return [loss(ours, y, e).numpy().tobytes() for loss in losses_by_name().values() for ours in rows]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world", [3, 4])
def test_the_loss_has_the_same_bits_on_every_rank(world: int, exchange: str) -> None:
    first, *others = run_ranks(world, values, exchange, N)
    assert len(first) == 2 * len(losses_by_name())
    for other in others:
        assert other == first


def factored(exchange: str, n: int) -> dict[str, tuple[str, float, Tensor]]:
    """(way to W x, value, gradient of this rank's rows) where metadata are factored."""
    from cauc_dist import gather

    return {
        name: (way, value.item(), torch.autograd.grad(value, ours)[0])
        for name, (way, value, ours) in through_factors(getattr(gather, exchange)(n), own(n), n).items()
    }


def through_factors(e: Callable[[Tensor], Any], mine: slice, n: int) -> dict[str, tuple[str, Tensor, Tensor]]:
    from cauc_dist import losses
    from cauc_dist.kernels import delta, gaussian, product
    from cauc_dist.losses import similar, tiled

    similar.PART = 100  # own rows in parts that do not start at 0
    z = oracles.unit(VIEWS, n, 8)
    age = 20 + 12 * torch.rand(n, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.cat([age, oracles.cohort(n)[:, 1:]], 1)
    kernel, found = product(age=gaussian(6.0), sex=delta()), {}
    for name, rows, metadata in (("distinct", z, y.div(4).round()), ("low rank", z.float(), y)):
        way = similar.similar(tiled.Weights(kernel, metadata, rows.dtype), metadata, e(rows[:, mine]))
        factored = "distinct" if getattr(way, "factor", None) is None else "low rank"
        ours = rows[:, mine].clone().requires_grad_()
        value = losses.y_aware_infonce(ours, metadata, kernel, exchange=e) + losses.conditional_alignment(
            ours, metadata, kernel, exchange=e
        )
        found[name] = (factored if isinstance(way, similar.Factored) else "exact", value, ours)
    return found


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_factored_weights_on_three_ranks_are_those_of_one_process(
    exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cauc_dist.losses import similar
    from cauc_dist.losses.batch import Batch

    monkeypatch.setattr(similar, "PART", similar.PART)  # put back what through_factors sets
    n = 601
    ranks = run_ranks(3, factored, exchange, n)
    for name, (way, value, z) in through_factors(Batch, slice(0, n), n).items():
        assert way == name
        (wanted,) = torch.autograd.grad(value, z)
        rel = 1e-12 if name == "distinct" else 2e-6
        # Round a ring no sum is made of the factors of several ranks, which may differ where machines do.
        there = "exact" if (exchange, name) == ("Ring", "low rank") else name
        for found in ranks:
            assert found[name][:2] == (there, pytest.approx(value.item(), rel=rel))
        gradient = torch.cat([found[name][2] for found in ranks], 1) / 3
        assert float((gradient - wanted).abs().max()) < rel * float(wanted.abs().max())


# ---- upstream gradients -----------------------------------------------------------------------------------------


def upstream(level: str, scales: list[float]) -> tuple[str, int, list[str]]:
    """(what backward raised, collectives it issued, the same through whole rows) for a loss scaled by rank."""
    import torch.distributed as dist

    from cauc_dist.gather import AllGather

    dist.set_debug_level(getattr(dist.DebugLevel, level))  # type: ignore[attr-defined]
    z, y = problem()
    raised, count = [], 0
    for name in ("cauc", "threshold"):
        ours = z[:, own()].clone().requires_grad_()
        value = losses_by_name()[name](ours, y, AllGather(N)) * scales[dist.get_rank()]
        with counted() as sent:
            try:
                value.backward()
                raised.append("")
            except ValueError as error:
                raised.append(str(error))
        count += len(sent) if name == "cauc" else 0
    return raised[0], count, raised[1:]


@pytest.mark.parametrize("level", ["INFO", "DETAIL"])
def test_in_debug_mode_unlike_upstream_gradients_raise_on_every_rank_and_name_all(level: str) -> None:
    for found, count, _ in run_ranks(3, upstream, level, [1.0, 1.0, 0.5]):
        assert found == (
            "the gradient that arrives at the loss differs between ranks: [1.0, 1.0, 0.5]; wanted one number. "
            "Scale the loss by the same factor on every rank"
        )
        assert count == 1


def test_in_debug_mode_equal_upstream_gradients_pass_and_without_it_nothing_is_sent() -> None:
    assert [found[:2] for found in run_ranks(2, upstream, "INFO", [0.5, 0.5])] == [("", 1)] * 2
    assert [found[:2] for found in run_ranks(2, upstream, "OFF", [1.0, 0.5])] == [("", 0)] * 2


def test_losses_of_whole_rows_look_too() -> None:
    for _, _, (found,) in run_ranks(2, upstream, "INFO", [1.0, 0.5]):
        assert "differs between ranks" in found
