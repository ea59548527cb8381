"""Random views of volumes, images and table rows, on the device they are on.

V  views a sample     b  samples     c  channels     v  one view, (c, *spatial)     u  three uniform numbers in [0, 1)

Samples go through the chain one at a time. So a view has the same bits in any batch, and on a CPU a volume of 48^3
stays in cache; on a GPU that costs up to about 50 small kernels a view, most of them the blur's.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cauc_dist.config import Augment
from cauc_dist.errors import BadInput

SMALLEST_BLUR = 0.1  # voxels: what a drawn standard deviation starts from


@torch.no_grad()
def views(x: Tensor, rows: Sequence[int], *, seed: int, epoch: int, augment: Augment) -> Tensor:
    """V random views of each sample, view-major: (b, c, *spatial) -> (V*b, c, *spatial), view v of sample i at v*b + i.

    `rows[i]` is sample i's row in the store. A view depends on its voxels and on (seed, epoch, row, view) alone, to the
    bit: not on the batch it is in, nor on the number of ranks or threads. (Noise comes from the device's own generator:
    a CPU and a GPU draw different noise.) x is left as it is; it should be z-normalised, 0 being the volume's mean.
    Time on one CPU core: .5 ms a view of 48^3 with the defaults, 1 ms with every transform at p = 1/2.
    Memory: the result and about three volumes.

    BadInput where a field of `augment` is out of range, or a transform does not suit the samples.
    """
    if len(rows) != len(x):
        raise ValueError(f"views found {len(rows)} rows for {len(x)} samples, wanted one row a sample")
    check(augment, tuple(x.shape[1:]))
    out = x.new_empty((augment.views * len(x), *x.shape[1:]))
    for view in range(augment.views):
        for i, row in enumerate(rows):
            out[view * len(x) + i] = _chain(x[i], draws(seed, epoch, row, view), augment)
    return out


def draws(seed: int, epoch: int, row: int, view: int) -> list[list[float]]:
    """The uniform numbers of one view: a row a transform in the order of the chain, the first of four says whether.

    Philox (Salmon et al., SC 2011) is a function of key and counter: the key is (seed, epoch), the upper half of the
    counter (row, view). Every view draws the same count, so one transform on or off leaves the others' draws alone.
    """
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, row, view], np.uint64)
    numbers: list[list[float]] = np.random.Generator(np.random.Philox(key=key, counter=counter)).random((8, 4)).tolist()
    return numbers


def _chain(v: Tensor, numbers: list[list[float]], augment: Augment) -> Tensor:
    steps: tuple[tuple[float, Callable[[Tensor, list[float], Augment], Tensor]], ...] = (
        (augment.p_flip, _flip),
        (augment.p_shift, _shift),
        (augment.p_crop, _crop),
        (augment.p_grey, _grey),
        (augment.p_intensity, _intensity),
        (augment.p_blur, _blur),
        (augment.p_noise, _noise),
        (augment.p_cutout, _cutout),
    )
    for (p, transform), (gate, *u) in zip(steps, numbers, strict=True):
        if gate < p:
            v = transform(v, u, augment)
    return v


def _flip(v: Tensor, u: list[float], augment: Augment) -> Tensor:
    """Mirrored along the first spatial axis."""
    return v.flip(1)


def _shift(v: Tensor, u: list[float], augment: Augment) -> Tensor:
    """Moved by whole voxels, -max_shift ... max_shift on each axis, the faces repeated into what opens up."""
    moves = [_integer(a, 2 * augment.max_shift + 1) - augment.max_shift for a in u[: v.ndim - 1]]
    padded = _repeat_edges(v, [(max(move, 0), max(-move, 0)) for move in moves])
    return padded[_box([max(-move, 0) for move in moves], v.shape[1:])]


def _crop(v: Tensor, u: list[float], augment: Augment) -> Tensor:
    """A box of ceil(crop * side), resized back: linear between voxel centres on each axis, no anti-aliasing."""
    sides, v = v.shape, v[_random_box(v, augment.crop, u)]
    for axis in range(v.ndim - 1, 0, -1):  # the last one first: gathers along it are slow, and now they are few
        v = _resize(v, axis, sides[axis])
    return v


def _resize(v: Tensor, axis: int, n: int) -> Tensor:
    """One axis interpolated to n voxels, as F.interpolate(align_corners=False) does.

    Not by it: in 2-D it takes another kernel, which rounds otherwise, where there is more than one thread (torch 2.13).
    """
    m = v.shape[axis]
    at = ((torch.arange(n, dtype=torch.float64, device=v.device) + 0.5) * (m / n) - 0.5).clamp_(0, m - 1)
    below = at.long()  # (n,)
    weight = (at - below).to(v.dtype).view(-1, *[1] * (v.ndim - 1 - axis))
    lower, upper = v.index_select(axis, below), v.index_select(axis, (below + 1).clamp_(max=m - 1))
    return upper.sub_(lower).mul_(weight).add_(lower)


def _grey(v: Tensor, u: list[float], augment: Augment) -> Tensor:
    """Each of the three channels becomes their mean."""
    return v.mean(0, keepdim=True).expand_as(v)


def _intensity(v: Tensor, u: list[float], augment: Augment) -> Tensor:
    """v * U(1 - scale, 1 + scale) + U(-shift, shift), one pair of numbers a view."""
    return v * (1 + augment.scale * (2 * u[0] - 1)) + augment.shift * (2 * u[1] - 1)


def _blur(v: Tensor, u: list[float], augment: Augment) -> Tensor:
    """Gaussian blur, the same standard deviation U(.1, blur) on each axis, the kernel cut at four of them.

    Beyond the border the face is repeated (scipy.ndimage's `nearest`), so a constant stays what it is. Shifted adds,
    an axis at a time: on a CPU a 3-D convolution of the same kernel takes tens of times longer.
    """
    kernel = _gaussian(SMALLEST_BLUR + (augment.blur - SMALLEST_BLUR) * u[0])
    radius = len(kernel) - 1
    for axis in range(1, v.ndim):
        n = v.shape[axis]
        padded = _repeat_edges(v, [(radius * (a == axis),) * 2 for a in range(1, v.ndim)])
        v = padded.narrow(axis, radius, n) * kernel[0]
        for j in range(1, radius + 1):
            v.add_(padded.narrow(axis, radius - j, n), alpha=kernel[j])
            v.add_(padded.narrow(axis, radius + j, n), alpha=kernel[j])
    return v


def _noise(v: Tensor, u: list[float], augment: Augment) -> Tensor:
    """v + N(0, sd^2) in each voxel, sd = U(0, noise)."""
    generator = torch.Generator(v.device).manual_seed(int(u[1] * 2**53))
    return v.new_empty(v.shape).normal_(0.0, augment.noise * u[0], generator=generator).add_(v)


def _cutout(v: Tensor, u: list[float], augment: Augment) -> Tensor:
    """A box of ceil(cutout * side) becomes 0 in all channels: the volume's mean, where each volume is normalised."""
    v = v.clone()
    v[_random_box(v, augment.cutout, u)] = 0.0
    return v


def _integer(u: float, n: int) -> int:
    """0 ... n-1, each as likely."""
    return int(u * n)


def _random_box(v: Tensor, part: float, u: list[float]) -> tuple[slice, ...]:
    """All channels of a box of ceil(part * side) that lies wholly inside."""
    sides = [math.ceil(part * side) for side in v.shape[1:]]
    starts = [_integer(a, side - length + 1) for a, side, length in zip(u, v.shape[1:], sides, strict=False)]
    return _box(starts, sides)


def _box(starts: Sequence[int], sides: Sequence[int]) -> tuple[slice, ...]:
    return (slice(None), *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))


def _repeat_edges(v: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """v with `widths[a]` = (before, after) voxels more on spatial axis a."""
    last_axis_first = [width for pair in reversed(widths) for width in pair]
    return F.pad(v[None], last_axis_first, mode="replicate")[0]


def _gaussian(sd: float) -> list[float]:
    """The middle and one side of a sampled Gaussian, cut at int(4 sd + 1/2) voxels; both sides sum to 1."""
    half = [math.exp(-0.5 * (j / sd) ** 2) for j in range(int(4 * sd + 0.5) + 1)]
    total = 2 * sum(half) - half[0]
    return [value / total for value in half]


def check(augment: Augment, shape: tuple[int, ...]) -> None:
    """BadInput unless `augment` makes sense for samples of this shape (c, *spatial)."""
    for name in (name for name in vars(augment) if name.startswith("p_")):
        _in_range(name, getattr(augment, name), 0, 1)
    for name in ("crop", "cutout"):
        _in_range(name, getattr(augment, name), 1e-6, 1)
    _in_range("views", augment.views, 1, math.inf)
    _in_range("blur", augment.blur, SMALLEST_BLUR, math.inf)
    for name in ("scale", "shift", "noise", "max_shift"):
        _in_range(name, getattr(augment, name), 0, math.inf)
    spatial = ("p_flip", "p_shift", "p_crop", "p_blur", "p_cutout")
    if wrong := [name for name in spatial if len(shape) == 1 and getattr(augment, name) > 0]:
        raise BadInput(
            f"{', '.join(wrong)} above 0 for table rows",
            wanted="samples with spatial axes",
            do=f"Set {', '.join(wrong)} to 0",
        )
    if augment.p_grey > 0 and shape[0] != 3:
        raise BadInput(f"p_grey above 0 for {shape[0]} channels", wanted="three channels", do="Set p_grey to 0")


def _in_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        wanted = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
        raise BadInput(f"augment.{name} {value}", wanted=wanted, do=f"Set augment.{name} within that")
