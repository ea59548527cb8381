"""BatchNorm over ranks against nn.BatchNorm in one process on the concatenated rows; group counts."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cauc_dist.encoders.blocks import Blocks, recompute
from cauc_dist.encoders.norm import BatchNorm, Kept, frozen, groups, norm
from cauc_dist.gather import AllGathered
from tests.ranks import run_ranks

PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ROWS = {1: [7], 2: [2, 5], 3: [1, 4, 2], 4: [3, 1, 2, 5]}  # unequal on purpose


def network(axes: int, plain: bool) -> nn.Sequential:
    """Two norms, so that the gradient of the second runs through the statistics of the first."""
    torch.manual_seed(1)
    first, last = (
        {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes](a, b, **({"kernel_size": 3} if axes else {}))
        for a, b in ((2, 5), (5, 3))
    )
    make: Any = PLAIN[max(axes, 1)] if plain else BatchNorm
    net = nn.Sequential(first, make(5), nn.Tanh(), last, make(3)).double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def samples(n: int, axes: int, seed: int) -> Tensor:
    """Rows that differ in mean and spread, so that statistics of a part are not those of the whole."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, *[7] * axes, generator=g, dtype=torch.float64)
    scale = torch.arange(1.0, n + 1).double().view(-1, *[1] * (1 + axes))
    return x * scale + 3 * scale


def share(h: Tensor, first: int) -> Tensor:
    """The part of sum_i sin(i * h_i) that these rows, number `first` and on, make up."""
    weight = torch.arange(first + 1.0, first + len(h) + 1).double().view(-1, *[1] * (h.dim() - 1))
    return torch.sin(weight * h).sum()


def train_twice(net: nn.Sequential, rows: slice, n: int, axes: int, scale: float) -> tuple[Tensor, Tensor]:
    """Two passes (running statistics move twice); the values and d loss / d x of the second."""
    net.train()
    net(samples(n, axes, 10)[rows])
    net.zero_grad()
    x = samples(n, axes, 11)[rows].requires_grad_()
    h = net(x)
    (share(h, rows.start) * scale).backward()
    assert x.grad is not None
    return h.detach(), x.grad


def on_a_rank(sizes: list[int], every: list[int]) -> list[dict[str, Any]]:
    return [pass_on_a_rank(sizes, axes) for axes in every]


def pass_on_a_rank(sizes: list[int], axes: int) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    start = sum(sizes[:rank])
    net = network(axes, plain=False)
    value, dx = train_twice(net, slice(start, start + sizes[rank]), sum(sizes), axes, scale=world)
    grads = {}
    for name, p in net.named_parameters():
        dist.all_reduce(p.grad)
        grads[name] = p.grad / world  # what DeepSpeed and DDP do
    return {"value": value, "dx": dx / world, "grads": grads, "buffers": dict(net.named_buffers())}


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-12 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_with_unequal_rows_equal_one_process_on_all_rows(world: int) -> None:
    ranks = run_ranks(world, on_a_rank, ROWS[world], [0, 1, 2, 3])
    for axes in (0, 1, 2, 3):
        assert_equal_one_process([r[axes] for r in ranks], ROWS[world], axes)


def assert_equal_one_process(ranks: list[dict[str, Any]], sizes: list[int], axes: int) -> None:
    plain = network(axes, plain=True)
    value, dx = train_twice(plain, slice(0, sum(sizes)), sum(sizes), axes, scale=1.0)
    assert_close(torch.cat([r["value"] for r in ranks]), value)
    assert_close(torch.cat([r["dx"] for r in ranks]), dx)
    for r in ranks:
        for name, p in plain.named_parameters():
            assert p.grad is not None
            assert_close(r["grads"][name], p.grad)
        for name, b in plain.named_buffers():
            assert_close(r["buffers"][name], b)
            assert torch.equal(r["buffers"][name], ranks[0]["buffers"][name])


def pair_loss(z: Tensor) -> Tensor:
    """A loss of the whole batch that is no sum over rows: log-mean-exp of all squared distances, (V, n, D) -> ()."""
    return (torch.cdist(z, z).pow(2) * -2).flatten(1).logsumexp(1).sum()


def train_step_on_a_rank(b: int, axes: int) -> dict[str, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    net = network(axes, plain=False)
    h = net(samples(b * world, axes, 12)[rank * b : (rank + 1) * b])
    h = h.flatten(1)[None]
    pair_loss(AllGathered(h, [h.shape[1]] * dist.get_world_size()).whole(h)).backward()
    for p in net.parameters():
        dist.all_reduce(p.grad)
    return {name: p.grad / world for name, p in net.named_parameters() if p.grad is not None}


def test_gathered_embeddings_and_averaged_gradients_give_the_gradient_of_one_process() -> None:
    plain = network(3, plain=True)
    pair_loss(plain(samples(6, 3, 12)).flatten(1)[None]).backward()
    for grads in run_ranks(3, train_step_on_a_rank, 2, 3):
        for name, p in plain.named_parameters():
            assert p.grad is not None
            assert_close(grads[name], p.grad)


def fp32_on_a_rank(mean: float) -> tuple[Tensor, Tensor]:
    layer = BatchNorm(2)
    g = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(4, 2, 16, 16, 16, generator=g) + mean
    return x, layer(x).detach()


def test_the_variance_does_not_cancel_in_fp32_where_the_mean_is_large() -> None:
    ranks = run_ranks(2, fp32_on_a_rank, 3e3)  # E[x^2] is 9e6: fp32 leaves it an error of about 1, the variance
    x, y = (torch.cat(parts).double() for parts in zip(*ranks, strict=True))
    centred = x - x.mean((0, 2, 3, 4), keepdim=True)
    wanted = centred / centred.pow(2).mean((0, 2, 3, 4), keepdim=True).add(1e-5).sqrt()
    assert (y - wanted).abs().max() < 1e-3  # half an ulp of x is 1.2e-4


def bf16_on_a_rank() -> tuple[torch.dtype, torch.dtype, float, float]:
    layer = BatchNorm(2)
    g = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(8, 2, 10, generator=g).bfloat16().requires_grad_()
    y = layer(x)
    y.float().pow(3).sum().backward()
    assert x.grad is not None
    assert layer.running_mean is not None
    total = x.detach().double().sum()
    dist.all_reduce(total)
    return y.dtype, x.grad.dtype, layer.running_mean.double().sum().item(), total.item()


def test_bf16_goes_through_with_statistics_in_fp32() -> None:
    for y, dx, running, total in run_ranks(2, bf16_on_a_rank):
        assert y == dx == torch.bfloat16
        assert running == pytest.approx(0.1 * total / 160, rel=1e-4)  # 160 values a channel, momentum .1


def eval_on_first_rank() -> float:
    layer = BatchNorm(3).eval()
    x = torch.ones(2, 3, 4)
    return layer(x).sum().item() if dist.get_rank() == 0 else 0.0


def test_eval_mode_has_no_collective() -> None:
    assert run_ranks(2, eval_on_first_rank, timeout=20.0)[0] == pytest.approx(24, rel=1e-4)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_without_a_process_group_it_is_nn_batchnorm_and_reads_its_state(axes: int) -> None:
    plain, ours = PLAIN[axes](2), BatchNorm(2)
    x = samples(4, axes, 3).float()
    plain(x)
    ours.load_state_dict(plain.state_dict())
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    plain.load_state_dict(ours.state_dict())


def test_an_input_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found an input of shape \(4,\), wanted \(B, C\)"):
        BatchNorm(4)(torch.zeros(4))


def test_groups_divide_the_channels_and_hold_four_or_more() -> None:
    for channels in range(1, 200):
        g = groups(channels)
        assert channels % g == 0
        assert g == 1 or (g <= 32 and channels // g >= 4)


@pytest.mark.parametrize(("channels", "wanted"), [(16, 4), (64, 16), (128, 32), (1024, 32), (96, 24), (7, 1), (2, 1)])
def test_group_norm_has_as_many_groups_as_it_may(channels: int, wanted: int) -> None:
    layer = norm("group", channels)
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == wanted


def test_group_norm_and_batch_norm_are_made_by_name() -> None:
    assert isinstance(norm("batch", 8), BatchNorm)
    x = torch.randn(2, 8, 3, 4, 5)
    grouped = x.view(2, 2, 4 * 60)  # 8 channels: two groups of four
    wanted = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm("group", 8)(x), wanted.view_as(x), atol=1e-5)


def second_pass() -> dict[str, Any]:
    """A pass over some rows, and two passes of which the second uses the moments of the first; how often ranks met."""
    rank, met, meet = dist.get_rank(), [0], dist.all_reduce

    def counting(*args: Any) -> None:
        met[0] += 1
        meet(*args)

    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        for kept in (None, Kept()):
            net = network(3, plain=False).train()
            x = samples(5, 3, 11)[2 * rank : 2 * rank + 2 + rank].requires_grad_()
            if kept is not None:
                with torch.no_grad(), frozen(keep=kept):
                    net(x)
                assert all(b == 0 for name, b in net.named_buffers() if name.endswith("num_batches_tracked"))
            met[0] = 0
            with frozen(tracks=True, use=kept):
                h = net(x)
            forward = met[0]
            share(h, 2 * rank).backward()
            state = {**dict(net.named_buffers()), "h": h.detach(), "dx": x.grad}
            results["again" if kept is not None else "once"] = (forward, met[0] - forward, state)
    return results


def test_a_second_pass_over_the_same_rows_has_the_same_bits_and_meets_nobody_on_its_way_forward() -> None:
    for results in run_ranks(2, second_pass):
        (forward, backward, once), (forward_again, backward_again, again) = results["once"], results["again"]
        assert (forward, backward, forward_again, backward_again) == (2, 2, 0, 2)
        for name, tensor in once.items():
            assert torch.equal(tensor, again[name]), name


def recomputed() -> bool:
    """Whether blocks that are computed twice have gradients and running statistics of the same bits."""
    rank, found = dist.get_rank(), []
    for again in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(2, 4, 3), BatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), BatchNorm(4))
        net = nn.Sequential(Blocks(block))
        if again:
            recompute(net)
        x = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1))[2 * rank : 2 * rank + 2 + rank]
        net(x).square().sum().backward()
        found.append([*(p.grad for p in net.parameters()), *net.buffers()])
    return all(torch.equal(once, twice) for once, twice in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2])
def test_blocks_with_batch_norm_can_be_recomputed(world: int) -> None:
    assert run_ranks(world, recomputed) == [True] * world
