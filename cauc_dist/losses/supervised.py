"""Supervised objectives to compare with: z is read as an answer, not as a place on the sphere; see docs/losses.md.

V views, b subjects here, n subjects in the global batch, D width of z, k columns of numbers.

z (V, b, D), NOT normalised, in, a scalar of z's dtype and device out, differentiable in z; `exchange` as in
`cauc_dist.losses.paper`. Computed in float64. A process looks at its own rows alone: of others it needs one sum.
"""

import torch
from torch import Tensor

from cauc_dist.losses.batch import Batch, Exchange
from cauc_dist.losses.checks import embeddings, metadata
from cauc_dist.losses.terms import Part, Term, evaluate


def cross_entropy(z: Tensor, labels: Tensor, exchange: Exchange = Batch) -> Tensor:
    """Mean over views and labelled subjects of -log softmax(z_i)[label_i], z taken as logits.

    labels (n,): class codes 0, 1, ... of at most D classes; NaN: no label, left out. 0 with zero gradient where nobody
    has one.
    """
    z, batch = embeddings(z, exchange=exchange)
    codes = _codes(labels.to(batch.z.device), batch)
    return evaluate(z, batch, (1.0, _log_loss(codes)))


def squared_error(z: Tensor, y: Tensor, exchange: Exchange = Batch) -> Tensor:
    """Mean over views and known values of (z_ij - y_ij)^2, by the first k of the D columns of z.

    y (n, k), standardised by the caller; NaN: not known, left out. 0 with zero gradient where no value is known.
    """
    z, batch = embeddings(z, exchange=exchange)
    y = metadata(y, batch)
    if y.ndim != 2 or y.shape[1] > z.shape[-1]:
        raise ValueError(f"y has shape {tuple(y.shape)}; wanted (n, k) with k at most {z.shape[-1]}, the width of z")
    return evaluate(z, batch, (1.0, _squares(y.double())))


def _codes(labels: Tensor, batch: Batch) -> Tensor:
    """(n,) int64, -1 for no label; refuses what is no class of z (V, b, D)."""
    if labels.shape != (batch.n,):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; wanted ({batch.n},): one label a subject")
    codes = labels.double().nan_to_num(-1.0)
    width = batch.z.shape[-1]
    wrong = ~labels.isnan() & ((codes < 0) | (codes >= width) | (codes != codes.floor()))
    if bool(wrong.any()):
        raise ValueError(
            f"label {codes[wrong][0].item():g}; wanted a class code of 0 to {width - 1}, a column of z each"
        )
    return codes.long()


def _log_loss(codes: Tensor) -> Term:
    def term(batch: Batch, grad: bool) -> Part:
        own = codes[batch.own].expand(len(batch.z), -1)[..., None]  # (V, b, 1)
        labelled, place = own >= 0, own.clamp(min=0)
        log_p = batch.z.double().log_softmax(-1)
        total = -log_p.gather(-1, place).where(labelled, 0.0).sum()
        slope = log_p.exp().scatter_add(-1, place, -torch.ones_like(log_p[..., :1])).where(labelled, 0.0)
        return _mean(batch, total, slope if grad else None, len(batch.z) * int((codes >= 0).sum()))

    return term


def _squares(y: Tensor) -> Term:
    def term(batch: Batch, grad: bool) -> Part:
        known = ~y.isnan()
        off = (batch.z[..., : y.shape[1]].double() - y[batch.own]).where(known[batch.own], 0.0)  # (V, b, k)
        slope = torch.nn.functional.pad(2 * off, (0, batch.z.shape[-1] - y.shape[1])) if grad else None
        return _mean(batch, off.square().sum(), slope, len(batch.z) * int(known.sum()))

    return term


def _mean(batch: Batch, total: Tensor, slope: Tensor | None, count: int) -> Part:
    """total over `count`, which is of the whole batch; 0 where that is 0."""
    over = max(count, 1)
    return Part(
        total[None], lambda sums: (sums[0] / over, None if slope is None else slope.div_(over).to(batch.z.dtype))
    )
