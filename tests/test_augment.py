"""Each transform against scipy, numpy or a formula in float64, with the numbers of (seed, epoch, key, view)."""

import colorsys
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial
import scipy.stats
import torch
from torch import Tensor

from cauc_dist.augment import chain, draws, philox, rotation, views
from cauc_dist.config import PRESETS, Augment, Transform
from cauc_dist.errors import BadInput

NAMES = get_args(Transform)
PROBABILITIES = [f"p_{name}" for name in NAMES]
NOTHING = Augment(views=1, **dict.fromkeys(PROBABILITIES, 0.0))
OF_TABLES = ["p_intensity", "p_noise"]
OF_COLOURS = ["p_colour", "p_grey"]
SPATIAL = [name for name in PROBABILITIES if name not in OF_TABLES]
SHAPES = [(1, 31, 40, 24), (2, 9, 14, 11), (3, 17, 22), (1, 48, 48)]


def only(*names: str, p: float = 1.0, **fields: Any) -> Augment:
    """Nothing but these transforms."""
    return dataclasses.replace(NOTHING, **dict.fromkeys((f"p_{name}" for name in names), p), **fields)


def every(shape: tuple[int, ...], p: float, **fields: Any) -> Augment:
    """All transforms that suit the shape."""
    names = OF_TABLES if len(shape) == 1 else PROBABILITIES
    colours = shape[0] == 3 and len(shape) == 3
    return dataclasses.replace(NOTHING, **{n: p for n in names if n not in OF_COLOURS or colours}, **fields)


def sample(shape: tuple[int, ...], b: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((b, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numbers(seed: int, epoch: int, key: int, view: int) -> dict[str, list[float]]:
    """Those of one view, for each transform."""
    found = draws(seed, epoch, np.array([key], np.uint64), view + 1, NAMES)[:, view, 0]
    return dict(zip(NAMES, found.tolist(), strict=True))


def one(shape: tuple[int, ...], augment: Augment, key: int) -> tuple[np.ndarray, np.ndarray, dict[str, list[float]]]:
    """A sample (values from 0 to 1 where there are three channels), its view, and the numbers of the view."""
    x = sample(shape, seed=key)
    if shape[0] == 3:
        x = torch.special.ndtr(x)
    return x[0].numpy(), views(x, [key], seed=5, epoch=2, augment=augment)[0].numpy(), numbers(5, 2, key, 0)


def box_of(part: float, shape: tuple[int, ...], u: list[float]) -> tuple[slice, ...]:
    sides = [math.ceil(part * n) for n in shape[1:]]
    starts = [math.floor(a * (n - side + 1)) for a, n, side in zip(u, shape[1:], sides, strict=False)]
    return (slice(None), *(slice(s, s + side) for s, side in zip(starts, sides, strict=True)))


def resized(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Linear interpolation between voxel centres, an axis at a time."""
    for axis in range(1, x.ndim):
        m, n = x.shape[axis], shape[axis]
        at = (np.arange(n) + 0.5) * m / n - 0.5
        x = np.apply_along_axis(lambda line, at=at, m=m: np.interp(at, np.arange(m), line), axis, x)
    return x


def translated(x: np.ndarray, most: int, u: list[float]) -> np.ndarray:
    moves = [math.floor(a * (2 * most + 1)) - most for a in u[: x.ndim - 1]]
    return scipy.ndimage.shift(x, [0, *moves], order=0, mode="nearest")


def blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(x, [0.0] + [sigma] * (x.ndim - 1), mode="nearest", truncate=4.0)


def box_of_area(
    shape: tuple[int, ...], area: tuple[float, float], aspect: tuple[float, float], u: list[float]
) -> tuple[slice, ...]:
    """RandomResizedCrop.get_params of torchvision, its draws replaced by u: ten areas, ten aspects, two places."""
    height, width = shape[1:]
    for a, r in zip(u[:10], u[10:20], strict=True):
        target = height * width * (area[0] + (area[1] - area[0]) * a)
        ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * r)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            i, j = math.floor(u[20] * (height - h + 1)), math.floor(u[21] * (width - w + 1))
            return slice(None), slice(i, i + h), slice(j, j + w)
    w, h = width, height
    if width / height < aspect[0]:
        h = round(w / aspect[0])
    elif width / height > aspect[1]:
        w = round(h * aspect[1])
    i, j = (height - h) // 2, (width - w) // 2
    return slice(None), slice(i, i + h), slice(j, j + w)


def turned(x: np.ndarray, augment: Augment, u: list[float]) -> np.ndarray:
    d = x.ndim - 1
    angles = [math.radians(augment.rotate * (2 * a - 1)) for a in u[:3]]
    c, s = math.cos(angles[0]), math.sin(angles[0])
    R = (
        scipy.spatial.transform.Rotation.from_euler("xyz", angles).as_matrix()
        if d == 3
        else np.array([[c, -s], [s, c]])
    )
    zooms = np.array([1 + augment.zoom * (2 * a - 1) for a in u[3 : 3 + d]])
    moves = np.array([augment.move * (2 * a - 1) for a in u[6 : 6 + d]])
    centre = (np.array(x.shape[1:]) - 1) / 2
    back = np.linalg.inv(R @ np.diag(zooms))
    offset = centre - back @ (centre + moves)
    return np.stack([scipy.ndimage.affine_transform(one, back, offset, order=1, mode="nearest") for one in x])


def luma(x: np.ndarray) -> np.ndarray:
    return np.einsum("c,cxy->xy", [0.2989, 0.587, 0.114], x)


def of_hue(x: np.ndarray, turn: float) -> np.ndarray:
    def pixel(rgb: np.ndarray) -> tuple[float, float, float]:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + turn) % 1, s, v)

    return np.apply_along_axis(pixel, 0, x)


def coloured(x: np.ndarray, augment: Augment, u: list[float]) -> np.ndarray:
    """torchvision's adjust_brightness, _contrast, _saturation and _hue."""
    for change in list(itertools.permutations(range(4)))[math.floor(u[4] * 24)]:
        amount = (augment.brightness, augment.contrast, augment.saturation, augment.hue)[change]
        low, high = (-amount, amount) if change == 3 else (max(0, 1 - amount), 1 + amount)
        f = low + (high - low) * u[change]
        x = of_hue(x, f) if change == 3 else np.clip(f * x + (1 - f) * (0, luma(x).mean(), luma(x))[change], 0, 1)
    return x


def biased(x: np.ndarray, most: float, u: list[float]) -> np.ndarray:
    d = x.ndim - 1
    C = np.zeros((4,) * d)
    powers = [e for e in itertools.product(range(4), repeat=d) if sum(e) <= 3]
    for e, number in zip(powers, u, strict=False):
        C[e] = most * (2 * number - 1)
    evaluate = np.polynomial.polynomial.polygrid3d if d == 3 else np.polynomial.polynomial.polygrid2d
    field = evaluate(*(np.linspace(-1, 1, n) for n in x.shape[1:]), C)
    low = x.min(tuple(range(1, x.ndim)), keepdims=True)
    return low + (x - low) * np.exp(field)


def powered(x: np.ndarray, most: float, u: float) -> np.ndarray:
    axes = tuple(range(1, x.ndim))
    low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    return low + (high - low) * ((x - low) / (high - low)) ** math.exp(most * (2 * u - 1))


# --- each transform


@pytest.mark.parametrize("shape", [*SHAPES, (5,)])
def test_a_view_with_nothing_on_is_a_copy(shape: tuple[int, ...]) -> None:
    x = sample(shape, 3)
    out = views(x, [1, 2, 3], seed=0, epoch=0, augment=dataclasses.replace(NOTHING, views=2))
    assert torch.equal(out, torch.cat([x, x]))
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_mirrors_the_first_spatial_axis_where_nothing_else_is_asked(shape: tuple[int, ...]) -> None:
    x, view, _ = one(shape, only("flip"), 1)
    assert np.array_equal(view, x[:, ::-1])


def test_flip_mirrors_one_of_the_axes_asked_for_each_as_often() -> None:
    x = sample((1, 4, 5, 6)).expand(600, 1, 4, 5, 6)
    out = views(x, range(600), seed=0, epoch=0, augment=only("flip", flip_axes=(0, 2)))
    first, last = (np.array([torch.equal(view, x[0].flip(axis)) for view in out]) for axis in (1, 3))
    assert np.all(first ^ last)
    assert abs(first.mean() - 0.5) < 4.5 * 0.5 / math.sqrt(600)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [1, 3, 8])
def test_shift_moves_whole_voxels_and_repeats_the_edges(shape: tuple[int, ...], most: int) -> None:
    for row in range(4):
        x, view, u = one(shape, only("shift", max_shift=most), row)
        assert np.array_equal(view, translated(x, most, u["shift"][1:]))


def test_shift_draws_each_offset_as_often() -> None:
    x = torch.arange(9.0).view(1, 1, 9, 1).expand(3500, 1, 9, 1)
    out = views(x, range(3500), seed=0, epoch=0, augment=only("shift", max_shift=3))
    moves = 4 - out[:, 0, 4, 0]
    counts = [(moves == move).sum().item() for move in range(-3, 4)]
    assert sum(counts) == 3500
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("crop", [0.01, 0.3, 0.75, 1.0])
def test_crop_resizes_a_box_linearly(shape: tuple[int, ...], crop: float) -> None:
    x, view, u = one(shape, only("crop", crop=crop), 2)
    wanted = resized(x[box_of(crop, shape, u["crop"][1:])], shape)
    np.testing.assert_allclose(view, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "mode"), [((2, 20, 15), "bilinear"), ((1, 12, 20, 15), "trilinear")])
def test_crop_is_torchs_interpolate_of_the_box(shape: tuple[int, ...], mode: str) -> None:
    x, view, u = one(shape, only("crop"), 3)
    box = torch.from_numpy(x[box_of(0.75, shape, u["crop"][1:])])[None]
    wanted = torch.nn.functional.interpolate(box, shape[1:], mode=mode, align_corners=False)[0]
    np.testing.assert_allclose(view, wanted.numpy(), atol=1e-12)


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.2, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 17, 22), (2, 12, 40)])
def test_crop_area_resizes_the_box_of_torchvisions_loop(shape: tuple[int, ...], area: tuple[float, float]) -> None:
    for key in range(8):
        x, view, u = one(shape, only("crop", crop_area=area), key)
        wanted = resized(x[box_of_area(shape, area, (3 / 4, 4 / 3), u["crop"][1:])], shape)
        np.testing.assert_allclose(view, wanted, rtol=0, atol=1e-12)


def test_boxes_of_crop_area_have_the_areas_and_aspects_asked_for_and_lie_anywhere() -> None:
    x = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))[None]  # (row, column)
    out = views(x.expand(500, 2, 64, 64), range(500), seed=0, epoch=0, augment=only("crop", crop_area=(0.1, 0.5)))
    sides = out.amax((2, 3)) - out.amin((2, 3)) + 1  # (500, 2) rows, columns of the box
    areas = (sides.prod(1) / 64**2).numpy()
    assert np.all((areas > 0.08) & (areas < 0.52))  # sides are whole pixels
    assert scipy.stats.kstest(areas, "uniform", (0.1, 0.4)).pvalue > 1e-3
    log_aspects = (sides[:, 1] / sides[:, 0]).log().numpy()
    assert scipy.stats.kstest(log_aspects, "uniform", (-math.log(4 / 3), 2 * math.log(4 / 3))).pvalue > 1e-4
    places = (out.amin((2, 3)) / (64 - sides)).numpy()
    assert np.all(np.abs(places.mean(0) - 0.5) < 0.06)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fields", [{}, {"rotate": 180.0, "zoom": 0.5, "move": 4.0}, {"rotate": 0.0, "zoom": 0.0}])
def test_affine_is_scipys_affine_transform(shape: tuple[int, ...], fields: dict[str, float]) -> None:
    for key in range(3):
        augment = only("affine", **fields)
        x, view, u = one(shape, augment, key)
        np.testing.assert_allclose(view, turned(x, augment, u["affine"][1:]), atol=1e-9)


def test_rotation_turns_about_the_first_then_the_second_then_the_third_axis() -> None:
    angles = np.array([[0.3, -0.5, 1.1], [2.0, 0.1, -0.7]])
    wanted = scipy.spatial.transform.Rotation.from_euler("xyz", angles).as_matrix()
    np.testing.assert_allclose(rotation(angles, 3), wanted, atol=1e-14)


def test_colour_is_brightness_contrast_saturation_and_hue_in_the_drawn_order() -> None:
    augment = only("colour", brightness=0.8, contrast=0.7, saturation=0.6, hue=0.5)
    orders = set()
    for key in range(40):
        x, view, u = one((3, 6, 7), augment, key)
        np.testing.assert_allclose(view, coloured(x, augment, u["colour"][1:]), atol=1e-12)
        orders.add(math.floor(u["colour"][5] * 24))
    assert len(orders) > 10


def test_colour_takes_bytes_where_white_is_255() -> None:
    x = torch.special.ndtr(sample((3, 9, 8), 2))
    unit, scaled = (
        views(x * white, [1, 2], seed=0, epoch=0, augment=only("colour", white=white)) for white in (1.0, 255.0)
    )
    torch.testing.assert_close(scaled, 255 * unit)


@pytest.mark.parametrize(
    "colour", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.2, 0.7, 0.7), (0.0, 0.0, 0.0)]
)
def test_hue_of_greys_and_ties_is_colorsys(colour: tuple[float, ...]) -> None:
    x = torch.tensor(colour, dtype=torch.float64).view(1, 3, 1, 1)
    augment = only("colour", brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5)
    out = views(x, [3], seed=0, epoch=0, augment=augment)
    turn = numbers(0, 0, 3, 0)["colour"][4] - 0.5
    np.testing.assert_allclose(out.flatten(), of_hue(np.array(colour).reshape(3, 1, 1), turn).ravel(), atol=1e-12)


def test_grey_is_the_luma_of_three_channels() -> None:
    x, view, _ = one((3, 8, 9), only("grey"), 3)
    np.testing.assert_allclose(view, np.stack([luma(x)] * 3), atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_multiplies_what_lies_above_the_least_value_by_the_exp_of_a_cubic(shape: tuple[int, ...]) -> None:
    x, view, u = one(shape, only("bias", bias=0.7), 5)
    np.testing.assert_allclose(view, biased(x, 0.7, u["bias"][1:]), atol=1e-12)


def test_bias_leaves_the_background_as_it_is() -> None:
    x = sample((1, 8, 9, 7)).abs().mul_(10).sub_(5).clamp_min_(-1)
    view = views(x, [0], seed=0, epoch=0, augment=only("bias"))
    assert torch.equal(view == -1, x == -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_gamma_is_a_power_between_the_least_and_the_greatest_value(shape: tuple[int, ...]) -> None:
    x, view, u = one(shape, only("gamma", gamma=0.9), 6)
    np.testing.assert_allclose(view, powered(x, 0.9, u["gamma"][1]), atol=1e-12)


def test_gamma_leaves_a_constant_channel_as_it_is() -> None:
    x = torch.cat([sample((1, 6, 7)), torch.full((1, 1, 6, 7), 2.5)], 1)
    assert torch.equal(views(x, [0], seed=0, epoch=0, augment=only("gamma"))[:, 1], x[:, 1])


@pytest.mark.parametrize("shape", [*SHAPES, (6,)])
def test_intensity_is_one_factor_and_one_offset_a_view(shape: tuple[int, ...]) -> None:
    x, view, u = one(shape, only("intensity", scale=0.4, shift=0.3), 4)
    factor, offset = 0.6 + 0.8 * u["intensity"][1], -0.3 + 0.6 * u["intensity"][2]
    np.testing.assert_allclose(view, factor * x + offset, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blur", [0.1, 1.0, 2.5])
def test_blur_is_scipys_gaussian_filter(shape: tuple[int, ...], blur: float) -> None:
    for row in range(3):
        x, view, u = one(shape, only("blur", blur=blur), row)
        np.testing.assert_allclose(view, blurred(x, 0.1 + (blur - 0.1) * u["blur"][1]), atol=1e-12)


def test_blur_leaves_a_constant_as_it_is() -> None:
    x = torch.full((1, 1, 6, 7, 8), 3.5, dtype=torch.float64)
    assert torch.allclose(views(x, [0], seed=0, epoch=0, augment=only("blur", blur=2.0)), x, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 24, 24, 24), (3, 64, 64), (5000,)])
def test_noise_is_gaussian_with_the_drawn_standard_deviation(shape: tuple[int, ...]) -> None:
    x, view, u = one(shape, only("noise", noise=0.7), 6)
    standard = (view - x).ravel() / (0.7 * u["noise"][1])
    assert scipy.stats.kstest(standard, "norm").pvalue > 1e-3


def test_noise_of_two_views_is_uncorrelated() -> None:
    x = torch.zeros(2, 1, 32, 32, 32)
    out = views(x, [0, 1], seed=0, epoch=0, augment=only("noise", views=2)).flatten(1)
    off_diagonal = torch.corrcoef(out) - torch.eye(4)
    assert off_diagonal.abs().max() < 5 / math.sqrt(32**3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cutout", [0.01, 0.25, 1.0])
def test_cutout_zeroes_one_box(shape: tuple[int, ...], cutout: float) -> None:
    x, view, u = one(shape, only("cutout", cutout=cutout), 7)
    wanted = x.copy()
    wanted[box_of(cutout, shape, u["cutout"][1:])] = 0
    assert np.array_equal(view, wanted)
    assert (view == 0).sum() == shape[0] * math.prod(math.ceil(cutout * n) for n in shape[1:])


def test_boxes_reach_every_corner_and_stay_inside() -> None:
    x = torch.ones(400, 1, 3, 4)
    out = views(x, range(400), seed=1, epoch=0, augment=only("cutout", cutout=0.3))  # one row of 3, two of 4
    hit = (out == 0).double().mean(0)[0]
    assert torch.all((out == 0).sum((1, 2, 3)) == 2)
    np.testing.assert_allclose(hit, np.outer([1 / 3] * 3, [1 / 3, 2 / 3, 2 / 3, 1 / 3]), atol=5 * math.sqrt(0.25 / 400))


def chained(x: np.ndarray, augment: Augment, u: dict[str, list[float]]) -> np.ndarray:
    """Every transform but noise, by the oracles."""
    numbers = {name: u[name][1:] for name in u}
    steps: dict[str, Callable[[np.ndarray, list[float]], np.ndarray]] = {
        "flip": lambda x, u: x[:, ::-1],
        "affine": lambda x, u: turned(x, augment, u),
        "shift": lambda x, u: translated(x, 3, u),
        "crop": lambda x, u: resized(x[box_of(0.75, x.shape, u)], x.shape),
        "colour": lambda x, u: coloured(x, augment, u),
        "grey": lambda x, u: np.stack([luma(x)] * 3),
        "bias": lambda x, u: biased(x, 0.5, u),
        "gamma": lambda x, u: powered(x, 0.3, u[0]),
        "intensity": lambda x, u: x * (0.8 + 0.4 * u[0]) + (-0.2 + 0.4 * u[1]),
        "blur": lambda x, u: blurred(x, 0.1 + 0.9 * u[0]),
        "cutout": lambda x, u: cut(x, box_of(0.25, x.shape, u)),
    }
    for name in (name for name in augment.order if getattr(augment, f"p_{name}") > 0 and name != "noise"):
        x = steps[name](x, numbers[name])
    return x


def cut(x: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    x = x.copy()
    x[box] = 0
    return x


REVERSED = tuple(reversed(NAMES))


@pytest.mark.parametrize("order", [NAMES, REVERSED])
@pytest.mark.parametrize("shape", [(3, 17, 22), (1, 15, 20, 12)])
def test_transforms_come_in_the_order_asked_for(shape: tuple[int, ...], order: tuple[Transform, ...]) -> None:
    augment = dataclasses.replace(every(shape, 1.0), noise=0.0, order=order)
    x, view, u = one(shape, augment, 9)
    np.testing.assert_allclose(view, chained(x, augment, u), atol=1e-9)


def test_the_order_is_flip_first_and_cutout_last_where_nothing_else_is_asked() -> None:
    wanted = "flip affine shift crop colour grey bias gamma intensity blur noise cutout"
    assert Augment().order == NAMES == tuple(wanted.split())


def test_noise_comes_after_blur_and_before_cutout() -> None:
    x, view, u = one((1, 24, 24, 24), only("blur", "noise", "cutout", noise=2.0), 11)
    box = box_of(0.25, (1, 24, 24, 24), u["cutout"][1:])
    assert np.all(view[box] == 0)
    added = np.delete((view - blurred(x, 0.1 + 0.9 * u["blur"][1]))[0], np.r_[box[1]], axis=0)
    standard = (added / (2.0 * u["noise"][1])).ravel()
    assert scipy.stats.kstest(standard, "norm").pvalue > 1e-3  # white: not blurred


# --- addresses


KNOWN = [  # kat_vectors of Random123: counter, key, words
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_has_the_published_words(counter: list[int], key: list[int], words: str) -> None:
    found = philox([np.array([word], np.uint64) for word in counter], key)[0]
    assert [f"{int(word):08x}" for word in found] == words.split()


@pytest.mark.parametrize("address", [(0, 0, 0, 0), (3, 17, 123456, 1), (2**63 + 5, 2**40, 2**64 - 7, 7)])
def test_the_numbers_of_a_view_are_the_words_at_its_address(address: tuple[int, int, int, int]) -> None:
    seed, epoch, key, view = address
    found, two = numbers(*address), np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint32)
    for place, name in enumerate(NAMES):
        for block in range(8):
            counter = [key % 2**32, key >> 32, view, 8 * place + block]
            words = philox([np.array([word], np.uint64) for word in counter], two)[0]
            assert found[name][4 * block : 4 * block + 4] == [int(word) / 2**32 for word in words]


def test_numbers_are_uniform_and_unrelated_between_keys_views_epochs_and_seeds() -> None:
    keys = np.arange(600, dtype=np.uint64) + np.uint64(2**32 - 300)
    names = ("flip", "noise")
    tables = [
        draws(s, e, keys, v + 1, names)[:, v].swapaxes(0, 1).reshape(600, -1)
        for s, e, v in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    ]
    assert scipy.stats.kstest(np.concatenate(tables).ravel(), "uniform").pvalue > 1e-3
    columns = np.corrcoef(np.concatenate(tables, 1).T)  # 256 columns: each table's 64
    assert np.abs(columns - np.eye(256)).max() < 6 / math.sqrt(600)
    neighbours = np.corrcoef(tables[0][:-1].ravel(), tables[0][1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(599 * 64)


def test_numbers_depend_on_no_other_key_view_or_transform() -> None:
    keys = np.array([5, 2**40, 9], np.uint64)
    whole = draws(1, 2, keys, 3, NAMES)
    part = draws(1, 2, keys[1:2], 2, ("noise", "flip"))
    assert np.array_equal(part, whole[[NAMES.index("noise"), NAMES.index("flip")], :2, 1:2])


@pytest.mark.parametrize(
    ("shape", "fields"),
    [((1, 15, 20, 12), {}), ((3, 17, 19), {}), ((3, 17, 19), {"crop_area": (0.2, 0.9)}), ((21,), {})],
)
def test_samples_that_go_together_get_the_views_of_each_alone(shape: tuple[int, ...], fields: dict[str, Any]) -> None:
    """What a GPU does, on a CPU: each transform on the whole batch, whose samples draw different numbers."""
    augment = every(shape, 0.6, **fields)
    x, keys = torch.special.ndtr(sample(shape, 9)), np.arange(9, dtype=np.uint64)
    alone = views(x, keys, seed=1, epoch=4, augment=augment)
    on = [name for name in NAMES if getattr(augment, f"p_{name}") > 0]
    table = dict(zip(on, draws(1, 4, keys, 1, on)[:, 0], strict=True))
    torch.testing.assert_close(chain(x.clone(), table, augment), alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(1, 31, 40, 24), (3, 17, 19), (21,)])
def test_a_view_has_the_same_bits_in_any_batch(shape: tuple[int, ...]) -> None:
    augment = every(shape, 0.6, views=2)
    x, rows = sample(shape, 7, dtype=torch.float32), [40, 3, 77, 8, 1000000, 5, 6]
    out = views(x, rows, seed=1, epoch=4, augment=augment).view(2, 7, *shape)
    for order in ([3, 1, 0, 6, 5, 2, 4], [2], [4, 6], [5, 5]):
        part = views(x[order], [rows[i] for i in order], seed=1, epoch=4, augment=augment)
        assert torch.equal(part.view(2, len(order), *shape), out[:, order])


@pytest.mark.parametrize("shape", [(1, 48, 57, 49), (3, 131, 97), (3, 301, 203), (5000,)])
def test_a_view_has_the_same_bits_with_any_number_of_threads(shape: tuple[int, ...]) -> None:
    augment, x, before = every(shape, 1.0), sample(shape, 2, dtype=torch.float32), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(views(x, [1, 2], seed=0, epoch=0, augment=augment))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_view_has_the_same_bits_in_any_memory_layout() -> None:
    x = sample((2, 9, 14, 11), 3, dtype=torch.float32)
    turned = x.contiguous(memory_format=torch.channels_last_3d)
    augment = every((2, 9, 14, 11), 0.6, views=4)
    once, again = (views(a, [1, 2, 3], seed=0, epoch=0, augment=augment) for a in (x, turned))
    assert torch.equal(once, again)


def test_views_are_view_major_and_more_of_them_leave_the_first_alone() -> None:
    x, rows = sample((1, 9, 8, 7), 3), [11, 12, 13]
    two, three = (
        views(x, rows, seed=0, epoch=0, augment=every((1, 9, 8, 7), 0.7, views=v)).view(v, 3, 1, 9, 8, 7)
        for v in (2, 3)
    )
    assert torch.equal(three[:2], two)
    alone = [views(x[i : i + 1], rows[i : i + 1], seed=0, epoch=0, augment=every((1, 9, 8, 7), 0.7)) for i in range(3)]
    assert torch.equal(two[0], torch.cat(alone))  # the first b are view 0 of samples 0, 1, 2


def test_every_part_of_the_address_changes_the_view() -> None:
    x = sample((1, 9, 8, 7)).expand(2, 1, 9, 8, 7)
    augment = only("noise", "intensity", views=2)
    base = views(x, [1, 2], seed=0, epoch=0, augment=augment)
    assert len(torch.unique(base, dim=0)) == 4  # two rows of two views
    for seed, epoch in ((1, 0), (0, 1)):
        other = views(x, [1, 2], seed=seed, epoch=epoch, augment=augment)
        assert len(torch.unique(torch.cat([base, other]), dim=0)) == 8


def test_switching_a_transform_on_leaves_the_draws_of_the_others_alone() -> None:
    x = sample((1, 16, 16, 16))
    with_flip, without = (
        views(x, [1], seed=0, epoch=0, augment=only(*names)) for names in (("flip", "noise"), ("noise",))
    )
    torch.testing.assert_close(with_flip - x.flip(2), without - x, rtol=0, atol=1e-12)


# --- probabilities


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_transform_is_applied_with_its_probability(name: str, p: float) -> None:
    n = 600
    shape = (3, 5, 6) if name in OF_COLOURS else (1, 4, 5, 6)
    x = torch.special.ndtr(sample(shape)).expand(n, *shape)
    out = views(x, range(n), seed=0, epoch=0, augment=only(name[2:], p=p))
    share = (out != x).flatten(1).any(1).double().mean().item()
    unseen = {"p_shift": 1 / 343, "p_blur": 0.025 / 0.9}.get(name, 0.0)  # every offset 0; int(4 sd + 1/2) = 0
    wanted = p * (1 - unseen)
    assert abs(share - wanted) <= 4.5 * math.sqrt(wanted * (1 - wanted) / n)


def test_two_views_and_two_transforms_are_drawn_independently() -> None:
    n = 2000
    gates = draws(0, 0, np.arange(n, dtype=np.uint64), 2, NAMES)[..., 0] < 0.5  # (transform, view, n)
    together = gates.reshape(-1, n).astype(float)
    assert np.abs(np.corrcoef(together) - np.eye(len(together))).max() < 5 / math.sqrt(n)
    assert np.abs(together.mean(1) - 0.5).max() < 5 * 0.5 / math.sqrt(n)


# --- presets


@pytest.mark.parametrize(("name", "shape"), [(n, (1, 20, 24, 18)) for n in ("all_tf", "cutout", "crop")])
def test_the_presets_of_y_aware_are_its_published_chain(name: str, shape: tuple[int, ...]) -> None:
    preset = PRESETS[name]
    for key in range(12):
        x, view, u = one(shape, preset, key)
        drawn = {step for step in preset.order if u[step][0] < getattr(preset, f"p_{step}")}
        if "flip" in drawn:
            x = np.flip(x, 1 + math.floor(3 * u["flip"][1]))
        if "blur" in drawn:
            x = blurred(x, 0.1 + 0.9 * u["blur"][1])
        if "noise" in drawn:
            white = torch.Generator().manual_seed(int(u["noise"][2] * 2**32))
            x = x + (0.1 + 0.9 * u["noise"][1]) * torch.randn(shape, generator=white, dtype=torch.float64).numpy()
        if "cutout" in drawn:
            x = cut(x, box_of(0.25, shape, u["cutout"][1:]))
        if "crop" in drawn:
            x = resized(x[box_of(0.75, shape, u["crop"][1:])], shape)
        np.testing.assert_allclose(view, x, atol=1e-12)
        assert drawn == {name} or name == "all_tf"


def test_the_preset_of_simclr_is_crop_flip_jitter_grey() -> None:
    preset = PRESETS["simclr_2d"]
    for key in range(30):
        x, view, u = one((3, 32, 32), preset, key)
        x = resized(x[box_of_area((3, 32, 32), (0.08, 1.0), (3 / 4, 4 / 3), u["crop"][1:])], (3, 32, 32))
        if u["flip"][0] < 0.5:
            x = x[:, :, ::-1]
        if u["colour"][0] < 0.8:
            x = coloured(x, Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1), u["colour"][1:])
        if u["grey"][0] < 0.2:
            x = np.stack([luma(x)] * 3)
        np.testing.assert_allclose(view, x, atol=1e-12)


# --- manners


@pytest.mark.parametrize("name", PROBABILITIES)
def test_x_is_left_as_it_is(name: str) -> None:
    x = sample((3, 9, 8) if name in OF_COLOURS else (3, 9, 8, 7), 2)
    before = x.clone()
    out = views(x, [0, 1], seed=0, epoch=0, augment=only(name[2:], views=2))
    assert torch.equal(x, before)
    out.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_views_keep_the_dtype_and_carry_no_gradient(dtype: torch.dtype) -> None:
    x = sample((3, 8, 8), 2, dtype=torch.float32).to(dtype).requires_grad_()
    out = views(x, [0, 1], seed=0, epoch=0, augment=every((3, 8, 8), 1.0))
    assert out.dtype == dtype
    assert not out.requires_grad


# --- refusals


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"p_flip": 1.5}, r"augment\.p_flip 1\.5; wanted 0 to 1"),
        ({"p_noise": -0.1}, r"augment\.p_noise -0\.1; wanted 0 to 1"),
        ({"crop": 0.0}, r"augment\.crop 0\.0; wanted 1e-06 to 1"),
        ({"cutout": 1.2}, r"augment\.cutout 1\.2; wanted 1e-06 to 1"),
        ({"views": 0}, r"augment\.views 0; wanted 1 or more"),
        ({"blur": 0.05}, r"augment\.blur 0\.05; wanted 0\.1 or more"),
        ({"scale": -1.0}, r"augment\.scale -1\.0; wanted 0 or more"),
        ({"shift": -1.0}, r"augment\.shift -1\.0; wanted 0 or more"),
        ({"noise": float("nan")}, r"augment\.noise nan; wanted 0 or more"),
        ({"max_shift": -1}, r"augment\.max_shift -1; wanted 0 or more"),
        ({"noise_min": 0.3}, r"augment\.noise 0\.2; wanted 0\.3 or more"),
        ({"noise_min": -0.1}, r"augment\.noise_min -0\.1; wanted 0 or more"),
        ({"rotate": -1.0}, r"augment\.rotate -1\.0; wanted 0 or more"),
        ({"zoom": 1.0}, r"augment\.zoom 1\.0; wanted 0 to 0\.9"),
        ({"hue": 0.6}, r"augment\.hue 0\.6; wanted 0 to 0\.5"),
        ({"white": 0.0}, r"augment\.white 0\.0; wanted 1e-06 or more"),
        ({"bias": -0.5}, r"augment\.bias -0\.5; wanted 0 or more"),
        ({"gamma": -0.5}, r"augment\.gamma -0\.5; wanted 0 or more"),
        ({"contrast": float("inf") * -1}, r"augment\.contrast -inf; wanted 0 or more"),
        ({"crop_area": (0.5, 1.5)}, r"augment\.crop_area 1\.5; wanted 1e-06 to 1"),
        ({"crop_aspect": (0.0, 1.0)}, r"augment\.crop_aspect 0\.0; wanted 1e-06 or more"),
    ],
)
def test_a_field_out_of_range_is_refused(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(BadInput, match=found):
        views(sample((1, 8, 8, 8)), [0], seed=0, epoch=0, augment=dataclasses.replace(NOTHING, **fields))


@pytest.mark.parametrize("name", SPATIAL)
def test_table_rows_refuse_a_spatial_transform(name: str) -> None:
    with pytest.raises(
        BadInput, match=f"{name} above 0 for table rows; wanted samples with spatial axes. Set {name} to 0"
    ):
        views(sample((5,)), [0], seed=0, epoch=0, augment=only(name[2:]))


@pytest.mark.parametrize("name", ["colour", "grey"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8, 8)])
def test_colours_refuse_other_than_images_of_three_channels(name: str, shape: tuple[int, ...]) -> None:
    found = rf"p_{name} above 0 for samples of {shape[0]} channels and {len(shape) - 1} spatial axes; wanted images of"
    with pytest.raises(BadInput, match=found):
        views(sample(shape), [0], seed=0, epoch=0, augment=only(name))


def test_crop_area_refuses_volumes() -> None:
    with pytest.raises(BadInput, match=r"augment\.crop_area for 3 spatial axes; wanted images\. Leave it out"):
        views(sample((1, 8, 8, 8)), [0], seed=0, epoch=0, augment=only("crop", crop_area=(0.1, 1.0)))


@pytest.mark.parametrize("axes", [(), (2,), (0, -1)])
def test_flip_refuses_an_axis_that_is_not_there(axes: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=r"augment\.flip_axes .* for 2 spatial axes; wanted one or more of 0, 1"):
        views(sample((1, 8, 8)), [0], seed=0, epoch=0, augment=only("flip", flip_axes=axes))


def test_an_order_without_a_transform_that_is_on_is_refused() -> None:
    with pytest.raises(BadInput, match=r"order without flip, blur, whose p is above 0; wanted every .* Add flip, blur"):
        views(sample((1, 8, 8)), [0], seed=0, epoch=0, augment=only("flip", "blur", "noise", order=("noise",)))


def test_an_order_with_a_transform_twice_is_refused() -> None:
    with pytest.raises(BadInput, match=r"augment\.order .*; wanted each transform once"):
        views(sample((1, 8, 8)), [0], seed=0, epoch=0, augment=only(order=("noise", "flip", "noise")))


@pytest.mark.parametrize("name", ["crop_area", "crop_aspect"])
def test_a_range_that_runs_backwards_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=rf"augment\.{name} .*; wanted the smaller number first"):
        views(sample((1, 8, 8)), [0], seed=0, epoch=0, augment=only(**{name: (0.9, 0.5)}))


def test_keys_and_samples_must_match() -> None:
    with pytest.raises(ValueError, match="2 keys for 3 samples"):
        views(sample((1, 8, 8), 3), [0, 1], seed=0, epoch=0, augment=NOTHING)
