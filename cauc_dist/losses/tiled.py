"""Sums over all pairs of embeddings, tile by tile: no M x M matrix; value and gradient in the same pass.

V views     n subjects of the global batch, b of them here     M = V n embeddings     D width of z
sets        1 where the views are pooled (a tile of B subjects has V B rows), V where pairs are within a view
s           (sets, m_i, m_j), what a tile computes, in place   kappa  2 t of a uniformity, 1 / tau of InfoNCE

Where both ends of a pair are here its tile is computed once and serves both (upper triangle): 1.5 units of one
M x M x D product for a uniformity, 2 for InfoNCE, against 4 for recomputation by rows. Exponents need no running
maximum: |kappa cos| <= kappa for unit rows, so that every sum fits in fp32 up to kappa = 40 (tau = .025, t = 20); above
it tiles are computed in float64, which carries to 300.
"""

import copy
import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from cauc_dist.kernels import Kernel
from cauc_dist.losses import gpu
from cauc_dist.losses.batch import Batch, Kind

LOG2E = 1.0 / math.log(2.0)
SINGLE, DOUBLE = 40.0, 300.0  # largest kappa of fp32 and of float64 tiles
ROWS = {"cpu": 512, "cuda": 4096}
"""Rows of a tile: 512 x 512 fp32 numbers are 1 MiB, a core's share of cache; a GPU wants fewer, larger launches."""


class Weights:
    """Metadata weights of any two runs of subjects of the global batch, made on the device of z, in its precision."""

    def __init__(self, kernel: Kernel, y: Tensor, dtype: torch.dtype) -> None:
        self.kernel, self.rows = kernel, kernel.rows(y, dtype)
        self.labels: Tensor | None = None

    def among(self, labels: Tensor) -> "Weights":
        """The same, where only subjects of one label (n,) may be unlike."""
        narrowed = copy.copy(self)
        narrowed.labels = labels
        narrowed.__dict__.pop("known", None)
        return narrowed

    @cached_property
    def known(self) -> gpu.Known | None:
        """The same for the Triton kernels, where they can do it."""
        return gpu.known(self)

    def unlike(self, i: slice, j: slice) -> Tensor:
        """c (m_i, m_j) = 1 - w; 0 for a subject and itself, and for subjects of different labels."""
        c = self.kernel.complement(self.rows[i], self.rows[j])
        if self.labels is not None:
            c.masked_fill_(self.labels[i, None] != self.labels[None, j], 0.0)
        return c.fill_diagonal_(0.0) if i == j else c

    def alike(self, i: slice, j: slice) -> Tensor:
        """w (m_i, m_j); 0 for a subject and itself: its other views are a matter of their own."""
        w = self.kernel(self.rows[i], self.rows[j])
        return w.fill_diagonal_(0.0) if i == j else w


class Side:
    """A block z (V, m, D) in tiles of at most B subjects, each (sets, V B / sets, D), with an accumulator for each."""

    def __init__(self, z: Tensor, start: int, sets: int, subjects: int, width: int) -> None:
        width_of_x, rows = z.shape[-1], len(z) // sets
        pieces = torch.split(z, subjects, dim=1)  # a block of no subjects is one empty piece
        self.views = len(z)
        self.runs, stop = [], start
        for piece in pieces:
            self.runs.append(slice(stop, stop := stop + piece.shape[1]))
        self.x = [piece.reshape(sets, rows * piece.shape[1], width_of_x) for piece in pieces]
        self.sum = [x.new_zeros((*x.shape[:2], width)) for x in self.x]

    def joined(self) -> Tensor:
        """(V, m, width) of all tiles."""
        sizes = [run.stop - run.start for run in self.runs]
        parts = [s.reshape(self.views, m, s.shape[-1]) for s, m in zip(self.sum, sizes, strict=True)]
        return torch.cat(parts, dim=1)


class Sweep:
    """Our rows against every block of the batch, in tiles of one size, with scratch that all tiles share."""

    def __init__(self, batch: Batch, sets: int, kappa: float = 0.0) -> None:
        self.batch, self.sets, self.kappa = batch, sets, kappa
        self.dtype = batch.z.dtype if kappa <= SINGLE else torch.float64
        self.views, self.device = len(batch.z), batch.z.device
        self.subjects = max(1, ROWS.get(self.device.type, 4096) * sets // self.views)
        self._scratch: dict[str, Tensor] = {}
        self._only: Tensor | None = None

    def over(self, visit: Callable[[Side, int, Side, int, bool], None], width: int) -> Tensor:
        """Visit all tiles (ours, i, theirs, j, whether it serves theirs too); returns our sums (V, b, width)."""
        ours = self._side(self.batch.start, self.batch.z, width)

        def act(start: int, z: Tensor, kind: Kind) -> Tensor | None:
            theirs = ours if kind == "self" else self._side(start, z, width if kind == "both" else 0)
            for i in range(len(ours.x)):
                for j in range(i if kind == "self" else 0, len(theirs.x)):
                    visit(ours, i, theirs, j, kind == "both" or (kind == "self" and i != j))
            return theirs.joined() if kind == "both" and width else None

        owed = self.batch.meet(act)
        return ours.joined() if owed is None else ours.joined().add_(owed)

    def _side(self, start: int, z: Tensor, width: int) -> Side:
        return Side(z.to(self.dtype), start, self.sets, self.subjects, width)

    def scratch(self, name: str, i: Tensor, j: Tensor) -> Tensor:
        """(sets, m_i, m_j), not initialised; the same memory for every tile."""
        size = self.sets * i.shape[1] * j.shape[1]
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = i.new_empty(size)
        return self._scratch[name][:size].view(self.sets, i.shape[1], j.shape[1])

    def exponential(self, a: Side, i: int, b: Side, j: int) -> Tensor:
        """e^{kappa x_i.x_j} in scratch, 0 for an embedding and itself; computed once where there is no other tile."""
        if self._only is not None:
            return self._only
        s = self.scratch("s", a.x[i], b.x[j])
        torch.baddbmm(s, a.x[i], b.x[j].mT, beta=0, alpha=self.kappa * LOG2E, out=s).exp2_()
        if a is b and i == j:
            s.diagonal(dim1=1, dim2=2).zero_()
            self._only = s if len(a.x) == 1 and a.runs[0] == slice(0, self.batch.n) else None
        return s

    def by_subject(self, s: Tensor, c: Tensor) -> Tensor:
        """s (sets, m_i, m_j) times weights of subjects (B_i, B_j), which all views share, in place."""
        per = self.views // self.sets
        s.view(self.sets, per, c.shape[0], per, c.shape[1]).mul_(c[:, None, :])
        return s

    def split(self, h: Tensor, run: slice) -> Tensor:
        """Numbers (V, n) of all embeddings -> those of a tile (sets, m)."""
        return h[:, run].reshape(self.sets, -1)


def by_pair(w: Tensor, scale: Tensor, i: slice, j: slice) -> Tensor:
    """w_ij (a_i + a_j) of two runs of subjects, in place; a (n,)."""
    return w.mul_(scale[i, None] + scale[None, j])


def add_products(s: Tensor, a: Side, i: int, b: Side, j: int, both: bool) -> None:
    """The sums over j of s_ij x_j, and where the tile serves both sides, over i of s_ij x_i."""
    a.sum[i].baddbmm_(s, b.x[j])
    if both:
        b.sum[j].baddbmm_(s.mT, a.x[i])


def exp_sums(
    batch: Batch,
    sets: int,
    kappa: float,
    weights: Weights | None = None,
    scale: Tensor | None = None,
    grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """S = sum_{i!=j} v_ij e^{kappa x_i.x_j} (sets,), sum v_ij, and G_i = sum_j v_ij e^{kappa x_i.x_j} x_j (V, b, D).

    S and sum v, the mass, are float64 and over OUR rows i. v_ij = c_ij (a_i + a_j), with c = 1 without `weights` and no
    second factor without `scale` a (n,) of subjects; the mass, over pairs of one set, is 0 without weights.
    """
    if gpu.usable(batch, kappa, weights):
        return gpu.exp_sums(batch, sets, kappa, weights, None if scale is None else scale[None], grad)
    sweep = Sweep(batch, sets, kappa)
    S = torch.zeros(sets, dtype=torch.float64, device=sweep.device)
    mass = S.new_zeros(())

    def visit(a: Side, i: int, b: Side, j: int, both: bool) -> None:
        s = sweep.exponential(a, i, b, j)
        if weights is not None:
            c = weights.unlike(a.runs[i], b.runs[j])
            if scale is not None:
                by_pair(c, scale, a.runs[i], b.runs[j])
            mass.add_(c.sum(), alpha=1 + both)
            sweep.by_subject(s, c)
        S.add_(s.sum((1, 2)), alpha=1 + both)
        if grad:
            add_products(s, a, i, b, j, both)

    G = sweep.over(visit, batch.z.shape[-1] if grad else 0)
    return S, mass * (sweep.views // sets) ** 2, G if grad else None


def exp_row_sums(sweep: Sweep) -> Tensor:
    """l (V, b): the sum over all other embeddings of e^{kappa x_i.x_j}; `sweep` of one set."""
    if gpu.usable(sweep.batch, sweep.kappa):
        return gpu.exp_row_sums(sweep.batch, sweep.kappa)

    def visit(a: Side, i: int, b: Side, j: int, both: bool) -> None:
        s = sweep.exponential(a, i, b, j)
        a.sum[i].add_(s.sum(2, keepdim=True))
        if both:
            b.sum[j].add_(s.sum(1)[..., None])

    return sweep.over(visit, 1)[..., 0]


def exp_products(sweep: Sweep, h: Tensor) -> Tensor:
    """G_i = sum_{j!=i} (h_i + h_j) e^{kappa x_i.x_j} x_j (V, b, D), h (V, n) of all embeddings; `sweep` of one set."""
    h = h.to(sweep.dtype)
    if gpu.usable(sweep.batch, sweep.kappa):
        G = gpu.exp_sums(sweep.batch, 1, sweep.kappa, None, h, grad=True)[2]
        assert G is not None
        return G

    def visit(a: Side, i: int, b: Side, j: int, both: bool) -> None:
        s = sweep.exponential(a, i, b, j)
        rows, cols = sweep.split(h, a.runs[i]), sweep.split(h, b.runs[j])
        s.mul_(torch.add(rows[:, :, None], cols[:, None, :], out=sweep.scratch("h", a.x[i], b.x[j])))
        add_products(s, a, i, b, j, both)

    return sweep.over(visit, sweep.batch.z.shape[-1])


def power_sums(
    batch: Batch, weights: Weights, scale: Tensor, exponent: float, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """sum_{i!=j} v_ij d_ij^p (float64, over our rows), d = 2 - 2 cos, and G_i = sum_j v_ij p d_ij^(p-1) x_j (V, b, D).

    All views pooled; v_ij = w_ij (a_i + a_j), the own other view with w = 1. Where d = 0 the gradient is 0.
    """
    sweep = Sweep(batch, 1)
    value = torch.zeros((), dtype=torch.float64, device=sweep.device)

    def visit(a: Side, i: int, b: Side, j: int, both: bool) -> None:
        w = weights.alike(a.runs[i], b.runs[j])
        if a is b and i == j:
            w.fill_diagonal_(1.0)
        by_pair(w, scale, a.runs[i], b.runs[j])
        d = sweep.scratch("s", a.x[i], b.x[j])
        torch.baddbmm(d, a.x[i], b.x[j].mT, beta=0, alpha=-2.0, out=d).add_(2.0)
        if a is b and i == j:
            d.diagonal(dim1=1, dim2=2).zero_()  # an embedding and itself
        slope = d.pow(exponent - 1).masked_fill_(d <= 0, 0.0)
        value.add_((d.clamp_(min=0) * sweep.by_subject(slope, w)).sum(), alpha=1 + both)
        if grad:
            add_products(slope.mul_(exponent), a, i, b, j, both)

    G = sweep.over(visit, batch.z.shape[-1] if grad else 0)
    return value, G if grad else None


def distance_sums(batch: Batch, t: float) -> tuple[Tensor, Tensor]:
    """S = sum_{i!=j} e^{-t ||x_i - x_j||^2} (float64, over our rows) and its gradient; x (1, b, D), any norm.

    e^{-t ||x_i - x_j||^2} = f_i f_j e^{2 t x_i.x_j} with f_i = e^{-t ||x_i||^2}.
    """
    sweep = Sweep(batch, 1, 2 * t)
    width = batch.z.shape[-1]
    S = torch.zeros((), dtype=torch.float64, device=sweep.device)

    def visit(a: Side, i: int, b: Side, j: int, both: bool) -> None:
        s = sweep.exponential(a, i, b, j)
        s.mul_(a.x[i].square().sum(-1).mul_(-t).exp_()[:, :, None]).mul_(
            b.x[j].square().sum(-1).mul_(-t).exp_()[:, None]
        )
        rows = s.sum(2)
        S.add_(rows.sum(), alpha=1 + both)
        a.sum[i][..., width].add_(rows)
        a.sum[i][..., :width].baddbmm_(s, b.x[j])
        if both:
            b.sum[j][..., width].add_(s.sum(1))
            b.sum[j][..., :width].baddbmm_(s.mT, a.x[i])

    sums = sweep.over(visit, width + 1)
    # 4 t sum_j e_ij (x_j - x_i)
    return S, 4 * t * (sums[..., :width] - sums[..., width:] * batch.z)


def pull(batch: Batch, weights: Weights, scale: Tensor) -> Tensor:
    """sum_j w_ij (a_i + a_j) zbar_j (b, D) over the other subjects j, zbar the sum of a subject's views; a (n,)."""
    scale = scale.to(batch.z.dtype)
    if gpu.usable(batch, weights=weights):
        return gpu.pull(batch, weights, scale)
    subjects = Sweep(_Summed(batch), 1)

    def visit(a: Side, i: int, b: Side, j: int, both: bool) -> None:
        w = by_pair(weights.alike(a.runs[i], b.runs[j]), scale, a.runs[i], b.runs[j])
        add_products(w[None], a, i, b, j, both)

    return subjects.over(visit, batch.z.shape[-1])[0]


def row_sums(batch: Batch, weights: Weights, alike: bool, v: Tensor | None = None) -> Tensor:
    """sum_j w_ij v_j (`alike`; v (n,), or 1), or sum_j c_ij, over the other subjects j, for ours: (b,) float64.

    From the metadata alone: nothing is exchanged.
    """
    if gpu.usable(batch, weights=weights):
        return gpu.row_sums(batch, weights, alike, v)
    tile = weights.alike if alike else weights.unlike
    size = ROWS.get(batch.z.device.type, 4096)
    sums = torch.zeros(batch.n, dtype=torch.float64, device=batch.z.device)
    ones = torch.ones_like(sums)
    v = ones if v is None else v.to(sums)
    own = runs(batch.own, size)
    for k, i in enumerate(own):
        for j in [*runs(slice(0, batch.start), size), *own[k:], *runs(slice(batch.own.stop, batch.n), size)]:
            part = tile(i, j).to(v)
            sums[i] += part @ v[j]
            if j in own[k + 1 :]:
                sums[j] += part.T @ v[i]
    return sums[batch.own]


def runs(whole: slice, size: int) -> list[slice]:
    """A run of subjects in pieces of at most `size`."""
    return [slice(a, min(a + size, whole.stop)) for a in range(whole.start, whole.stop, size)]


class _Summed(Batch):
    """A batch whose embeddings are the sums of each subject's views, (1, b, D)."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.z.sum(0, keepdim=True))
        self.n, self.start, self._batch = batch.n, batch.start, batch

    def meet(self, act: Callable[[int, Tensor, Kind], Tensor | None]) -> Tensor | None:
        return self._batch.meet(lambda start, z, kind: act(start, z.sum(0, keepdim=True), kind))
