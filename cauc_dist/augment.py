"""Random views of volumes, images and table rows, on the device they are on; docs/augment.md has the formulas.

V  views a sample     b  samples     g  samples that go together     c  channels     d  spatial axes
v  (g, c, *spatial)   u  (g, n)      uniform numbers in [0, 1) of each sample for one transform

A transform is written for g samples, each with its own numbers. On a GPU g = b: few kernels for the whole batch. On a
CPU g = 1: a view has the same bits in any batch, and needs little memory. (Table rows: g = b there too; what suits them
adds and multiplies number by number.) What rounds otherwise with another number
of threads is avoided (torch 2.13: F.interpolate over two axes, a mean over all pixels, pow, exp2).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cauc_dist.config import Augment, Transform
from cauc_dist.errors import BadInput

SMALLEST_BLUR = 0.1  # voxels: what a drawn standard deviation starts from
NUMBERS = 32  # of a transform in a view: whether, and up to 31 parameters
DEGREE = 3  # of the bias field
TRIES = 10  # for a box of `crop_area` that fits, as in torchvision

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@torch.no_grad()
def views(x: Tensor, keys: ArrayLike, *, seed: int, epoch: int, augment: Augment) -> Tensor:
    """V random views of each sample, view-major: (b, c, *spatial) -> (V*b, c, *spatial), view v of sample i at v*b + i.

    `keys[i]` is the address of sample i, as `Store.keys` has it. On a CPU a view depends on its voxels and on (seed,
    epoch, key, view) alone, to the bit: not on the batch it is in, nor on the number of ranks or threads. A GPU makes
    the same choices with its own roundings and its own noise. x is left as it is.
    Memory: the result and, of what goes together, about three copies.

    BadInput where a field of `augment` is out of range, or a transform does not suit the samples.
    """
    keys = np.asarray(keys, np.uint64)
    if len(keys) != len(x):
        raise ValueError(f"views found {len(keys)} keys for {len(x)} samples, wanted one key a sample")
    check(augment, tuple(x.shape[1:]))
    on = [name for name in augment.order if getattr(augment, f"p_{name}") > 0]
    numbers = draws(seed, epoch, keys, augment.views, on)
    out = x.new_empty((augment.views, *x.shape))
    together = 1 if x.device.type == "cpu" and x.ndim > 2 else len(x)
    for view, i in itertools.product(range(augment.views), range(0, len(x), together)):
        these = slice(i, i + together)
        v = out[view, these].copy_(x[these])  # transforms may write into it
        v.copy_(chain(v, dict(zip(on, numbers[:, view, these], strict=True)), augment))
    return out.flatten(0, 1)


def draws(seed: int, epoch: int, keys: NDArray[np.uint64], count: int, names: Sequence[Transform]) -> Floats:
    """Uniform numbers (transforms, V, b, NUMBERS), multiples of 2^-32; the first of each row says whether.

    Philox4x32-10 (Salmon et al., SC 2011) is a function of key and counter: its key is made of (seed, epoch), the
    counter is (the sample's key: two words, view, transform and block). So a transform on or off, or in another place
    of the order, leaves the others' numbers alone.
    """
    blocks, every = NUMBERS // 4, get_args(Transform)
    which = np.array([every.index(name) for name in names], np.uint64)
    block = which[:, None, None, None] * np.uint64(blocks) + np.arange(blocks, dtype=np.uint64)
    view, key = np.arange(count, dtype=np.uint64)[:, None, None], keys[:, None]
    words = philox((key & LOW, key >> HALF, view, block), np.random.SeedSequence([seed, epoch]).generate_state(2))
    return words.reshape(len(names), count, len(keys), NUMBERS).astype(np.float64) * 2.0**-32


LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: Sequence[NDArray[Any]], key: Sequence[int] | NDArray[Any]) -> NDArray[np.uint64]:
    """Philox4x32-10: (..., 4) words of 32 bits, of counters of four words (arrays that broadcast), under two words."""
    a, b, c, d = np.broadcast_arrays(*counter)
    k, l = (int(word) for word in key)  # noqa: E741
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> HALF) ^ b ^ np.uint64(k), q & LOW, (p >> HALF) ^ d ^ np.uint64(l), p & LOW
        k, l = (k + 0x9E3779B9) & 0xFFFFFFFF, (l + 0xBB67AE85) & 0xFFFFFFFF  # noqa: E741
    return np.stack([a, b, c, d], -1)


def chain(v: Tensor, numbers: dict[Transform, Floats], augment: Augment) -> Tensor:
    """The transforms in the order of `numbers`, each on the samples that drew it; may write into v."""
    for name, u in numbers.items():
        drawn = u[:, 0] < getattr(augment, f"p_{name}")
        v = _where(drawn, v, u[:, 1:], lambda v, u, name=name: TRANSFORMS[name](v, u, augment))  # type: ignore[misc]
    return v


def _where(drawn: NDArray[np.bool_], v: Tensor, u: Floats, f: Callable[[Tensor, Floats], Tensor]) -> Tensor:
    """f on those samples only."""
    if drawn.all():
        return f(v, u)
    if drawn.any():
        index = torch.from_numpy(np.flatnonzero(drawn)).to(v.device)
        v[index] = f(v[index], u[drawn])
    return v


def _each(v: Tensor, f: Callable[[Tensor, int], Tensor]) -> Tensor:
    """f(sample, its place) of one sample after another: what only moves voxels, each by its own amount."""
    return f(v[0], 0)[None] if len(v) == 1 else torch.stack([f(one, i) for i, one in enumerate(v)])


# ---- what moves voxels


def _flip(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """Mirrored along one of `flip_axes`."""
    axes = np.array(augment.flip_axes)[_integers(u[:, 0], len(augment.flip_axes))]
    for axis in set(augment.flip_axes):
        v = _where(axes == axis, v, u, lambda v, u, axis=axis: v.flip(2 + axis))  # type: ignore[misc]
    return v


def _affine(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """Rotated about the centre, stretched along the axes and moved, in one linear resampling; edges repeated."""
    sides = v.shape[2:]
    d = len(sides)
    angles = np.radians(_between(-augment.rotate, augment.rotate, u[:, :3]))
    zooms = _between(1 - augment.zoom, 1 + augment.zoom, u[:, 3 : 3 + d])
    moves = _between(-augment.move, augment.move, u[:, 6 : 6 + d])
    # What is at offset o from the centre afterwards was at stretch^-1 rotation^-1 (o - move).
    back = rotation(angles, d).swapaxes(1, 2) / zooms[:, :, None]  # (g, d, d)
    grid = v.new_zeros((len(v), *sides, d))  # the positions, in halves of a side, the last axis first
    for a, b in itertools.product(range(d), repeat=2):
        o = np.arange(sides[b]) - (sides[b] - 1) / 2
        part = back[:, a, b, None] * (o - moves[:, b, None]) / max((sides[a] - 1) / 2, 0.5)  # (g, side)
        grid[..., d - 1 - a] += _along(part, 1 + b, v, d + 1)
    return F.grid_sample(v, grid, mode="bilinear", padding_mode="border", align_corners=True)


def rotation(angles: Floats, d: int) -> Floats:
    """(g, 3) radians -> (g, d, d): about the first, then the second, then the third axis; an image has one angle."""
    turned = np.broadcast_to(np.eye(d), (len(angles), d, d))
    for angle, (i, j) in zip(angles.T, [(1, 2), (2, 0), (0, 1)] if d == 3 else [(0, 1)], strict=False):
        one = np.tile(np.eye(d), (len(angles), 1, 1))
        one[:, i, i] = one[:, j, j] = np.cos(angle)
        one[:, j, i] = np.sin(angle)
        one[:, i, j] = -one[:, j, i]
        turned = one @ turned
    return turned


def _shift(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """Moved by whole voxels, -max_shift ... max_shift on each axis, the faces repeated into what opens up."""
    moves = _integers(u[:, : v.ndim - 2], 2 * augment.max_shift + 1) - augment.max_shift

    def moved(one: Tensor, i: int) -> Tensor:
        padded = _repeat_edges(one[None], [(max(move, 0), max(-move, 0)) for move in moves[i].tolist()])[0]
        return padded[_box(np.maximum(-moves[i], 0), np.array(one.shape[1:]))]

    return _each(v, moved)


def _crop(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """A box resized back: linear between voxel centres on each axis, beyond the outer ones their value."""
    sides = np.array(v.shape[2:])
    if augment.crop_area is None:
        starts, lengths = _boxes(sides, augment.crop, u)
    else:
        starts, lengths = _boxes_of_area(sides, augment.crop_area, augment.crop_aspect, u)
    if len(v) == 1:
        v = v[(slice(None), *_box(starts[0], lengths[0]))]
        for axis in range(v.ndim - 1, 1, -1):  # the last one first: it is the slowest, and now there is least of it
            v = _resize(v, axis, int(sides[axis - 2]))
        return v
    for axis in range(2, v.ndim):
        v = _resize_each(v, axis, starts[:, axis - 2], lengths[:, axis - 2])
    return v


def _resize(v: Tensor, axis: int, n: int) -> Tensor:
    """One axis to n voxels, as F.interpolate(align_corners=False) has it, plane by plane: no copies of neighbours."""
    m = v.shape[axis]
    if axis == v.ndim - 1:  # no planes, but lines
        return F.interpolate(v.reshape(1, -1, m), n, mode="linear").view(*v.shape[:-1], n)
    below, above, weight = _neighbours(np.array([m]), n)
    planes = v.unbind(axis)
    out = v.new_empty((*v.shape[:axis], n, *v.shape[axis + 1 :]))
    for to, i, j, w in zip(out.unbind(axis), below[0].tolist(), above[0].tolist(), weight[0].tolist(), strict=True):
        torch.lerp(planes[i], planes[j], w, out=to)
    return out


def _resize_each(v: Tensor, axis: int, starts: Integers, lengths: Integers) -> Tensor:
    """The same for samples with boxes of their own, which need not have one size."""
    below, above, weight = _neighbours(lengths, v.shape[axis])

    def at(index: Integers) -> Tensor:
        along = torch.from_numpy(index + starts[:, None]).to(v.device)
        return v.gather(axis, _spread(along, axis, v.ndim).expand(v.shape))

    return at(below).lerp_(at(above), _along(weight, axis, v))


def _neighbours(lengths: Integers, n: int) -> tuple[Integers, Integers, Floats]:
    """(g, n) the voxels below and above each of n that are spread over `lengths`, and the weight of the one above."""
    m = lengths[:, None]
    at = np.clip((np.arange(n) + 0.5) * (m / n) - 0.5, 0, m - 1)
    below = at.astype(np.int64)
    return below, np.minimum(below + 1, m - 1), at - below


# ---- what changes values


def _colour(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """Brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter."""
    amounts = [augment.brightness, augment.contrast, augment.saturation]
    factors = [_between(max(0.0, 1 - amount), 1 + amount, u[:, i]) for i, amount in enumerate(amounts)]
    factors.append(_between(-augment.hue, augment.hue, u[:, 3]))
    orders = np.array(list(itertools.permutations(range(4))))[_integers(u[:, 4], 24)]  # (g, 4)
    v = v / augment.white
    for k, change in itertools.product(range(4), range(4)):
        how = COLOUR_CHANGES[change]
        v = _where(orders[:, k] == change, v, factors[change], lambda v, f, how=how: how(v, _scalar(f, v)))  # type: ignore[misc]
    return v.mul_(augment.white)


def _brightness(v: Tensor, factor: Tensor) -> Tensor:
    return (v * factor).clamp_(0, 1)


def _contrast(v: Tensor, factor: Tensor) -> Tensor:
    return _blend(v, _luma(v).mean(-1, keepdim=True).mean(-2, keepdim=True), factor)


def _saturation(v: Tensor, factor: Tensor) -> Tensor:
    return _blend(v, _luma(v), factor)


def _hue(v: Tensor, turn: Tensor) -> Tensor:
    """A turn of the HSV circle by a part of it; value and saturation stay."""
    red, green, blue = _channels(v)
    high = v.amax(1, keepdim=True)
    chroma = high - v.amin(1, keepdim=True)
    c = torch.where(chroma == 0, 1, chroma)
    at_green = torch.where(high == green, 2 + (blue - red) / c, 4 + (red - green) / c)
    sextant = torch.where(high == red, (green - blue) / c, at_green) + 6 * turn
    k = (v.new_tensor([5, 3, 1]).view(3, 1, 1) + sextant) % 6
    return high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


COLOUR_CHANGES = (_brightness, _contrast, _saturation, _hue)


def _blend(v: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * v + (1 - factor) * other).clamp_(0, 1)


def _luma(v: Tensor) -> Tensor:
    red, green, blue = _channels(v)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _channels(v: Tensor) -> Iterator[Tensor]:
    return (v[:, i : i + 1] for i in range(3))


def _grey(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """Each of the three channels becomes their luma."""
    return _luma(v).expand_as(v).contiguous()


def _bias(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """What lies above a channel's least value, times the exp of a random polynomial: background stays background.

    The polynomial has all monomials up to DEGREE, of coordinates that run from -1 to 1 along each axis.
    """
    d = v.ndim - 2
    powers = [np.linspace(-1, 1, side) ** np.arange(DEGREE + 1)[:, None] for side in v.shape[2:]]  # (DEGREE + 1, side)
    monomials = [e for e in itertools.product(range(DEGREE + 1), repeat=d) if sum(e) <= DEGREE]
    coefficients = _between(-augment.bias, augment.bias, u[:, : len(monomials)])
    field = v.new_zeros((len(v), 1, *v.shape[2:]))
    for first in range(DEGREE + 1):  # the other axes by themselves: a hundredth of the voxels
        rest = sum(
            coefficients[:, i].reshape(-1, *[1] * (d - 1)) * _outer([powers[a][e[a]] for a in range(1, d)])
            for i, e in enumerate(monomials)
            if e[0] == first
        )
        plane = torch.from_numpy(np.asarray(rest)).to(v)[:, None, None]  # (g, 1, 1, *the other axes)
        field.addcmul_(plane, _along(powers[0][first][None], 2, v))
    low = _lowest(v)
    return v.sub_(low).mul_(field.exp_()).add_(low)


def _outer(lines: Sequence[Floats]) -> Floats:
    """(Y,), (Z,) -> (Y, Z)"""
    return lines[0] if len(lines) == 1 else np.multiply.outer(lines[0], _outer(lines[1:]))


def _gamma(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """A power of the channel scaled to 0...1; its least and greatest value stay."""
    power = _scalar(np.exp(_between(-augment.gamma, augment.gamma, u[:, 0])), v)
    low = _lowest(v)
    span = v.amax(tuple(range(2, v.ndim)), keepdim=True).sub_(low)
    span.masked_fill_(span == 0, 1)
    least = v == low
    v.sub_(low).div_(span).masked_fill_(least, 1)  # the logarithm of a background of zeros takes four times longer
    return v.log_().mul_(power).exp_().masked_fill_(least, 0).mul_(span).add_(low)


def _intensity(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """v * U(1 - scale, 1 + scale) + U(-shift, shift), one pair of numbers a view."""
    factor = _between(1 - augment.scale, 1 + augment.scale, u[:, 0])
    return v.mul_(_scalar(factor, v)).add_(_scalar(_between(-augment.shift, augment.shift, u[:, 1]), v))


def _blur(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """Gaussian blur, the same standard deviation U(.1, blur) on each axis, the kernel cut at four of them.

    Beyond the border the face is repeated (scipy.ndimage's `nearest`), so a constant stays what it is. Shifted adds,
    an axis at a time: on a CPU a 3-D convolution of the same kernel takes tens of times longer.
    """
    kernel = gaussians(_between(SMALLEST_BLUR, augment.blur, u[:, 0]))  # (g, 1 + radius)
    weights = [_scalar(tap, v) for tap in kernel.T]
    radius = len(weights) - 1
    for axis in range(2, v.ndim):
        n = v.shape[axis]
        padded = _repeat_edges(v, [(radius * (a == axis),) * 2 for a in range(2, v.ndim)])
        v = padded.narrow(axis, radius, n) * weights[0]
        for j in range(1, radius + 1):
            v.addcmul_(padded.narrow(axis, radius - j, n), weights[j])
            v.addcmul_(padded.narrow(axis, radius + j, n), weights[j])
    return v


def gaussians(sd: Floats) -> Floats:
    """(g, 1 + radius) the middle and one side of sampled Gaussians, cut at int(4 sd + 1/2); both sides sum to 1."""
    radius = (4 * sd + 0.5).astype(np.int64)[:, None]
    j = np.arange(radius.max() + 1)
    half = np.where(j <= radius, np.exp(-0.5 * (j / sd[:, None]) ** 2), 0.0)
    kernel: Floats = half / (2 * half.sum(1, keepdims=True) - half[:, :1])
    return kernel


def _noise(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """v + N(0, sd^2) in each voxel, sd = U(noise_min, noise)."""
    sd = _between(augment.noise_min, augment.noise, u[:, 0])
    generator, noise = torch.Generator(v.device), torch.empty_like(v)
    for one, s, word in zip(noise, sd.tolist(), u[:, 1].tolist(), strict=True):
        one.normal_(0.0, s, generator=generator.manual_seed(int(word * 2**32)))
    return v.add_(noise)


def _cutout(v: Tensor, u: Floats, augment: Augment) -> Tensor:
    """A box of ceil(cutout * side) becomes 0 in all channels: the volume's mean, where each volume is normalised."""
    for one, start, length in zip(v, *_boxes(np.array(v.shape[2:]), augment.cutout, u), strict=True):
        one[_box(start, length)] = 0.0
    return v


TRANSFORMS: dict[Transform, Callable[[Tensor, Floats, Augment], Tensor]] = {
    "flip": _flip,
    "affine": _affine,
    "shift": _shift,
    "crop": _crop,
    "colour": _colour,
    "grey": _grey,
    "bias": _bias,
    "gamma": _gamma,
    "intensity": _intensity,
    "blur": _blur,
    "noise": _noise,
    "cutout": _cutout,
}


# ---- numbers and boxes


def _between(low: float, high: float, u: Floats) -> Floats:
    return low + (high - low) * u


def _integers(u: Floats, n: int | Integers) -> Integers:
    """0 ... n-1, each as likely."""
    return np.asarray(u * n).astype(np.int64)


def _scalar(values: Floats, v: Tensor) -> Tensor:
    """A number for each sample, to be multiplied with v."""
    return _along(values.reshape(-1, 1), 1, v)


def _along(values: Floats, axis: int, v: Tensor, ndim: int | None = None) -> Tensor:
    """(g, n) -> (g, 1, ... n at `axis` ..., 1), of v's dtype and device."""
    return _spread(torch.from_numpy(values).to(v), axis, v.ndim if ndim is None else ndim)


def _spread(values: Tensor, axis: int, ndim: int) -> Tensor:
    sizes = {0: values.shape[0], axis: values.shape[1]}
    return values.view([sizes.get(a, 1) for a in range(ndim)])


def _lowest(v: Tensor) -> Tensor:
    """(g, c, 1, ...) the least value of each channel."""
    return v.amin(tuple(range(2, v.ndim)), keepdim=True)


def _boxes(sides: Integers, part: float, u: Floats) -> tuple[Integers, Integers]:
    """(g, d) starts and lengths of boxes of ceil(part * side) that lie wholly inside."""
    lengths = np.ceil(part * sides).astype(np.int64)
    return _integers(u[:, : len(sides)], sides - lengths + 1), np.broadcast_to(lengths, (len(u), len(sides)))


def _boxes_of_area(
    sides: Integers, area: tuple[float, float], aspect: tuple[float, float], u: Floats
) -> tuple[Integers, Integers]:
    """(g, 2) starts and lengths as torchvision's RandomResizedCrop has them: the first of TRIES boxes that fits, or
    the largest one in the middle whose aspect is allowed.
    """
    pixels = _between(*area, u[:, :TRIES]) * sides.prod()
    ratio = np.exp(_between(math.log(aspect[0]), math.log(aspect[1]), u[:, TRIES : 2 * TRIES]))  # columns over rows
    tried = np.stack([np.sqrt(pixels / ratio), np.sqrt(pixels * ratio)], -1).round().astype(np.int64)  # (g, TRIES, 2)
    fits = np.all((tried >= 1) & (tried <= sides), axis=-1)
    lengths = tried[np.arange(len(u)), fits.argmax(1)]
    starts = _integers(u[:, 2 * TRIES : 2 * TRIES + 2], sides - lengths + 1)
    middle = np.minimum(sides, np.rint([sides[1] / aspect[0], sides[0] * aspect[1]]).astype(np.int64))
    some = np.any(fits, axis=1, keepdims=True)
    return np.where(some, starts, (sides - middle) // 2), np.where(some, lengths, middle)


def _box(start: Integers, length: Integers) -> tuple[slice, ...]:
    """All channels of a box, for one sample."""
    return (slice(None), *(slice(a, a + n) for a, n in zip(start.tolist(), length.tolist(), strict=True)))


def _repeat_edges(v: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """v with `widths[a]` = (before, after) voxels more on spatial axis a."""
    last_axis_first = [width for pair in reversed(widths) for width in pair]
    return F.pad(v, last_axis_first, mode="replicate")


# ---- what is refused


def check(augment: Augment, shape: tuple[int, ...]) -> None:
    """BadInput unless `augment` makes sense for samples of this shape (c, *spatial)."""
    for name, value, least, most in _ranges(augment):
        if not least <= value <= most:
            wanted = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise BadInput(f"augment.{name} {value}", wanted=wanted, do=f"Set augment.{name} within that")
    for name in ("crop_area", "crop_aspect"):
        pair = getattr(augment, name)
        if pair is not None and pair[0] > pair[1]:
            raise BadInput(f"augment.{name} {pair}", wanted="the smaller number first", do=f"Turn augment.{name} round")
    if len(set(augment.order)) < len(augment.order):
        raise BadInput(f"augment.order {augment.order}", wanted="each transform once", do="Take out the second one")
    on = [name for name in get_args(Transform) if getattr(augment, f"p_{name}") > 0]
    if missing := [name for name in on if name not in augment.order]:
        raise BadInput(
            f"augment.order without {', '.join(missing)}, whose p is above 0",
            wanted="every transform that is on",
            do=f"Add {', '.join(missing)} to augment.order, or set its p to 0",
        )
    _check_shape(augment, shape, on)


def _ranges(augment: Augment) -> Iterator[tuple[str, float, float, float]]:
    """(field, value, least, most) of every number."""
    for name in (name for name in vars(augment) if name.startswith("p_")):
        yield name, getattr(augment, name), 0, 1
    least: dict[str, float] = {"views": 1, "blur": SMALLEST_BLUR, "noise": augment.noise_min, "white": 1e-6}
    any_size = ("scale", "shift", "noise_min", "max_shift", "rotate", "move", "bias", "gamma", "brightness")
    for name in (*least, *any_size, "contrast", "saturation"):
        yield name, getattr(augment, name), least.get(name, 0), math.inf
    yield from ((name, getattr(augment, name), 1e-6, 1) for name in ("crop", "cutout"))
    yield "zoom", augment.zoom, 0, 0.9
    yield "hue", augment.hue, 0, 0.5
    yield from (("crop_area", area, 1e-6, 1) for area in augment.crop_area or ())
    yield from (("crop_aspect", aspect, 1e-6, math.inf) for aspect in augment.crop_aspect)


def _check_shape(augment: Augment, shape: tuple[int, ...], on: Sequence[str]) -> None:
    axes = len(shape) - 1
    if wrong := [f"p_{name}" for name in on if axes == 0 and name not in ("intensity", "noise")]:
        raise BadInput(
            f"{', '.join(wrong)} above 0 for table rows",
            wanted="samples with spatial axes",
            do=f"Set {', '.join(wrong)} to 0",
        )
    for name in ("colour", "grey"):
        if name in on and (axes != 2 or shape[0] != 3):
            raise BadInput(
                f"p_{name} above 0 for samples of {shape[0]} channels and {axes} spatial axes",
                wanted="images of three channels",
                do=f"Set p_{name} to 0",
            )
    if "crop" in on and augment.crop_area is not None and axes != 2:
        raise BadInput(
            f"augment.crop_area for {axes} spatial axes",
            wanted="images",
            do="Leave it out: augment.crop is for volumes too",
        )
    if "flip" in on and (not augment.flip_axes or any(not 0 <= axis < axes for axis in augment.flip_axes)):
        raise BadInput(
            f"augment.flip_axes {augment.flip_axes} for {axes} spatial axes",
            wanted=f"one or more of {', '.join(str(axis) for axis in range(axes))}",
            do="Set augment.flip_axes to some of them",
        )
