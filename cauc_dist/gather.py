"""What the loss sends between ranks: embeddings forward, a few sums, and nothing in the backward pass.

V views, b subjects on this rank, W ranks, n subjects in the global batch (rank r holds `shares(n, W)[r]`, in order),
D embedding width. Every rank knows the metadata of the whole batch; only z travels.

    exchange = AllGather(n)                       # or Ring(n)
    loss = losses.cauc(z, y, kernel, exchange=exchange)      z (V, b, D) of this rank, y (n, k) of all

Where scans cannot be read, ranks hold what is left, of any numbers down to none:

    sound, _ = tell(ours, [], sizes)              # (b,) bool of each rank -> one array a rank
    exchange = AllGather(sum(map(sum, sound)), sizes=[int(rows.sum()) for rows in sound])

A rank computes the pairs of its own rows with all rows, and holds the complete gradient of its own rows. It is
multiplied by W because the trainer AVERAGES parameter gradients over ranks (DeepSpeed, DDP): the sum over ranks of the
gradients through each rank's own rows is that of one process on the whole batch.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cauc_dist.losses.batch import Act, Batch, Exchange
from cauc_dist.stream.plan import shares

# torch 2.13 renamed the first and warns of it; older versions know only the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_CPU = torch.device("cpu")


def tell(
    sound: NDArray[np.bool_], facts: Sequence[float], sizes: Sequence[int], device: torch.device = _CPU
) -> tuple[list[NDArray[np.bool_]], NDArray[np.float64]]:
    """What every rank must know of every other before a step ends, in one small all-gather.

    sound (b,): which of this rank's rows could be read, b its place in `sizes` (W,); facts (f,): numbers of this rank.
    Returns sound of each rank, and facts (W, f). A collective: call it on every rank.
    """
    ours = torch.zeros(len(facts) + max(sizes), dtype=torch.float64)
    ours[: len(facts)] = torch.tensor(facts, dtype=torch.float64)
    ours[len(facts) : len(facts) + len(sound)] = torch.from_numpy(sound)
    ours = ours.to(device)
    gathered = ours.new_empty((dist.get_world_size(), len(ours)))
    _all_gather(gathered.flatten(), ours)
    found = gathered.cpu().numpy()
    rows = [row[len(facts) : len(facts) + size].astype(bool) for row, size in zip(found, sizes, strict=True)]
    return rows, found[:, : len(facts)]


class Ranks(Batch):
    """A batch of n subjects over the ranks of the default process group; what is common to both ways of exchange.

    z (V, b, D) are this rank's rows, `sizes` how many each rank holds. `wire`: the dtype in which z is sent, e.g.
    torch.float16 for half the bytes; the loss is then exactly that of the rounded z, on every rank alike, and its
    gradient is handed to z unchanged (of `decoupled_uniformity` without kernel, what is sent and rounded are the
    centroids).
    """

    def __init__(self, z: Tensor, sizes: Sequence[int], wire: torch.dtype | None = None) -> None:
        self.world_size, self.rank, self.n = dist.get_world_size(), dist.get_rank(), sum(sizes)
        self.sizes = list(sizes)
        if z.shape[1] != self.sizes[self.rank]:
            raise ValueError(
                f"z has {z.shape[1]} subjects on rank {self.rank}; wanted {self.sizes[self.rank]}: "
                f"{self.n} over {self.world_size} ranks are {self.sizes}"
            )
        self.start = sum(self.sizes[: self.rank])
        self.wire = wire or z.dtype
        self.z = z.detach().to(self.wire).to(z.dtype)

    def gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.world_size, *x.shape))
        _all_gather(gathered.flatten(0, 1) if x.ndim else gathered, x.contiguous())
        return gathered

    def everyone(self, x: Tensor) -> Tensor:
        """An all-gather of the largest share; what pads the smaller ones is cut off again."""
        return self._joined(self.gather(self._padded(x, 0)), 0)

    def agree(self, upstream: Tensor, tolerance: float = 0.0) -> None:
        """With TORCH_DISTRIBUTED_DEBUG set: ValueError on every rank where upstream gradients differ."""
        if dist.get_debug_level() == dist.DebugLevel.OFF:  # type: ignore[attr-defined]
            return
        found = self.gather(upstream.detach().reshape(1)).flatten()
        if bool(((found - found[0]).abs() > tolerance * found[0].abs()).any()):
            raise ValueError(
                f"the gradient that arrives at the loss differs between ranks: {found.tolist()}; wanted one number. "
                "Scale the loss by the same factor on every rank"
            )

    def whole(self, z: Tensor) -> Tensor:
        """One all-gather forward, none backward: every rank computes the same loss from the same numbers, so that each
        holds the same dL/dz, of which its own rows, times W, are all it needs.
        """
        return _Whole.apply(z, self)  # type: ignore[no-any-return, no-untyped-call]

    def _padded(self, x: Tensor, dim: int) -> Tensor:
        short = max(self.sizes) - x.shape[dim]
        if not short:
            return x
        return torch.cat([x, x.new_zeros((*x.shape[:dim], short, *x.shape[dim + 1 :]))], dim)

    def _joined(self, gathered: Tensor, dim: int) -> Tensor:
        """(W, ..., largest share, ...) -> (..., n, ...), without the padding."""
        parts = [x.narrow(dim, 0, size) for x, size in zip(gathered, self.sizes, strict=True)]
        return torch.cat(parts, dim)


class AllGathered(Ranks):
    """Every rank gets all rows: one all-gather of V n D numbers, on its way while the rank's own pairs are computed."""

    def meet(self, act: Act) -> Tensor | None:
        work = self._send()
        act(self.start, self.z, "self")
        work()
        stop = self.start + self.z.shape[1]
        for start, end in ((0, self.start), (stop, self.n)):
            if start < end:
                act(start, self.columns[:, start:end], "one")
        return None

    def total(self, of: Callable[[int, Tensor], Tensor]) -> Tensor:
        self._send()()
        return of(0, self.columns)

    def release(self) -> None:
        if "_sent" in self.__dict__:  # nobody else's rows were needed
            self._send()()
        self.__dict__.pop("_sent", None)
        self.__dict__.pop("columns", None)

    @cached_property
    def _sent(self) -> tuple[Tensor, Any]:
        z = self._padded(self.z, 1).to(self.wire).contiguous()
        gathered = z.new_empty((self.world_size, *z.shape))
        return gathered, _all_gather(gathered.flatten(0, 1), z, async_op=True)

    def _send(self) -> Callable[[], None]:
        """Start the all-gather, once; returns what waits for its end."""
        if "columns" in self.__dict__:
            return lambda: None
        work = self._sent[1]
        return lambda: work.wait()

    @cached_property
    def columns(self) -> Tensor:
        """(V, n, D): the embeddings of the whole batch, in global order."""
        columns = self._joined(self._sent[0], 1).to(self.z.dtype)
        del self._sent
        return columns


class Rotated(Ranks):
    """Blocks go round half a ring: no rank ever holds more than three blocks (V, b, D), and each pair is computed once.

    At hop k rank r meets the block of rank r + k, does its owner's part too and sends that back; where W is even, the
    ranks opposite each other meet twice and each does its own part. Sends about as many bytes as an all-gather.
    """

    sums_here = False

    def meet(self, act: Act) -> Tensor | None:
        act(self.start, self.z, "self")
        ours: Tensor | None = None
        hops = self.world_size // 2 if max(self.sizes) < self.n else 0  # where one rank holds all, it has all pairs
        block = self._padded(self.z, 1).to(self.wire).contiguous()
        arriving = self._pass_on(block, -1, 1) if hops else None
        for k in range(1, hops + 1):
            assert arriving is not None
            block = arriving()
            arriving = self._pass_on(block, -1, 1) if k < hops else None  # on its way while we compute
            other = (self.rank + k) % self.world_size
            start, z = sum(self.sizes[:other]), block[:, : self.sizes[other]].to(self.z.dtype)
            theirs = act(start, z, "one" if 2 * k == self.world_size else "both")
            if theirs is not None:
                owed = self._pass_on(self._padded(theirs, 1).contiguous(), k, -k)()[:, : self.sizes[self.rank]]
                ours = owed if ours is None else ours.add_(owed)
                del theirs, owed
        return ours

    def total(self, of: Callable[[int, Tensor], Tensor]) -> Tensor:
        sums = of(self.start, self.z)
        dist.all_reduce(sums)
        return sums

    def _pass_on(self, x: Tensor, to: int, source: int) -> Callable[[], Tensor]:
        """Send x `to` ranks ahead and receive as much from `source` ahead; returns what waits for it."""
        received = torch.empty_like(x)
        ops = [
            dist.P2POp(dist.isend, x, (self.rank + to) % self.world_size),
            dist.P2POp(dist.irecv, received, (self.rank + source) % self.world_size),
        ]
        works = dist.batch_isend_irecv(ops)

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return wait


class AllGather:
    """Exchange by one all-gather: the fastest where V n D numbers fit on every rank."""

    batch: type[Ranks] = AllGathered

    def __init__(self, n: int, wire: torch.dtype | None = None, sizes: Sequence[int] | None = None) -> None:
        """`sizes`: how many of the n rows each rank holds, where these are not `shares(n, W)`."""
        if sizes is not None and (len(sizes), sum(sizes)) != (dist.get_world_size(), n):
            found = f"sizes {list(sizes)} for {n} rows over {dist.get_world_size()} ranks"
            raise ValueError(f"{found}; wanted one size for each rank, {n} in sum")
        self.n, self.wire, self.sizes = n, wire, sizes
        self._alike = False

    def __call__(self, z: Tensor) -> Batch:
        """The batch of which z (V, b, D) are this rank's rows. The first call compares the shapes of all ranks.

        ValueError on every rank alike where one holds another number of rows than its share, other views or widths.
        """
        sizes = shares(self.n, dist.get_world_size()) if self.sizes is None else self.sizes
        if not self._alike:
            same_shapes(z, sizes)
            self._alike = True
        return self.batch(z, sizes, self.wire)


class Ring(AllGather):
    """Exchange block by block: where V n D numbers do not fit on every rank."""

    batch = Rotated


class Once:
    """An exchange whose rows travel once for all that is computed of one z: the loss, and what is watched beside it.

    Others' rows stay until `close` (with Ring there are none to stay: blocks go round again).
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._met: tuple[Tensor, Batch] | None = None

    def __call__(self, z: Tensor) -> Batch:
        if self._met is None or self._met[0].data_ptr() != z.data_ptr() or self._met[0].shape != z.shape:
            self.close()
            self._met = z.detach(), self._exchange(z)
            self._met[1].release = lambda: None  # type: ignore[method-assign]
        return self._met[1]

    def close(self) -> None:
        if self._met is not None:
            batch = self._met[1]
            type(batch).release(batch)
            self._met = None


EXCHANGES = {"all_gather": AllGather, "ring": Ring}


def same_shapes(z: Tensor, sizes: Sequence[int]) -> None:
    """Refuse, on every rank alike, z that is not (V, its place in sizes, D) on each rank, V and D the same on all."""
    world_size = dist.get_world_size()
    facts_here = [*[*z.shape, -1, -1, -1][:3], z.ndim, z.element_size()]
    ours = torch.tensor(facts_here, dtype=torch.float64, device=z.device)
    gathered = ours.new_empty((world_size, len(ours)))
    _all_gather(gathered.flatten(), ours)
    facts = [[int(x) for x in row] for row in gathered.tolist()]
    views, _, width, *_ = facts[0]
    wanted = [[views, size, width, 3, facts[0][4]] for size in sizes]
    if facts != wanted:
        found = ", ".join(str(tuple(row[: min(row[3], 3)])) for row in facts)
        raise ValueError(
            f"z has shapes {found} on ranks 0 to {world_size - 1}; wanted (V, b, D) of one V, D and dtype, with "
            f"{sum(sizes)} subjects shared as b = {', '.join(map(str, sizes))}"
        )


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, batch: Ranks) -> Tensor:
        ctx.batch = batch
        return batch._joined(batch.gather(batch._padded(batch.z.to(batch.wire), 1)), 1).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Each rank's own sums over pairs: on GPUs the last bits may differ.
        ctx.batch.agree(torch.linalg.vector_norm(grads[0], dtype=torch.float64), tolerance=1e-4)
        return grads[0][:, ctx.batch.own] * ctx.batch.world_size, None
