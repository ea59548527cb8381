"""Each transform against scipy or numpy in float64, with the numbers of its address (seed, epoch, row, view)."""

import dataclasses
import math
import time
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from torch import Tensor

from cauc_dist.augment import draws, views
from cauc_dist.config import Augment
from cauc_dist.errors import BadInput

FLIP, SHIFT, CROP, GREY, INTENSITY, BLUR, NOISE, CUTOUT = range(8)  # the order of the chain
PROBABILITIES = [f.name for f in dataclasses.fields(Augment) if f.name.startswith("p_")]
NOTHING = Augment(views=1, **dict.fromkeys(PROBABILITIES, 0.0))
SPATIAL = ["p_flip", "p_shift", "p_crop", "p_blur", "p_cutout"]
SHAPES = [(1, 31, 40, 24), (2, 9, 14, 11), (3, 17, 22), (1, 48, 48)]


def only(*names: str, p: float = 1.0, **fields: Any) -> Augment:
    """Nothing but these transforms."""
    return dataclasses.replace(NOTHING, **dict.fromkeys((f"p_{name}" for name in names), p), **fields)


def every(shape: tuple[int, ...], p: float, **fields: Any) -> Augment:
    """All transforms that suit the shape."""
    names = [name for name in PROBABILITIES if not (len(shape) == 1 and name in SPATIAL)]
    return dataclasses.replace(NOTHING, **{n: p for n in names if n != "p_grey" or shape[0] == 3}, **fields)


def sample(shape: tuple[int, ...], b: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((b, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one(shape: tuple[int, ...], augment: Augment, row: int) -> tuple[np.ndarray, np.ndarray, list[list[float]]]:
    """A sample, its view, and the numbers of the view."""
    x = sample(shape, seed=row)
    return x[0].numpy(), views(x, [row], seed=5, epoch=2, augment=augment)[0].numpy(), draws(5, 2, row, 0)


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


# --- each transform


@pytest.mark.parametrize("shape", [*SHAPES, (5,)])
def test_a_view_with_nothing_on_is_a_copy(shape: tuple[int, ...]) -> None:
    x = sample(shape, 3)
    out = views(x, [1, 2, 3], seed=0, epoch=0, augment=dataclasses.replace(NOTHING, views=2))
    assert torch.equal(out, torch.cat([x, x]))
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_mirrors_the_first_spatial_axis(shape: tuple[int, ...]) -> None:
    x, view, _ = one(shape, only("flip"), 1)
    assert np.array_equal(view, x[:, ::-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [1, 3, 8])
def test_shift_moves_whole_voxels_and_repeats_the_edges(shape: tuple[int, ...], most: int) -> None:
    for row in range(4):
        x, view, u = one(shape, only("shift", max_shift=most), row)
        assert np.array_equal(view, translated(x, most, u[SHIFT][1:]))


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
    wanted = resized(x[box_of(crop, shape, u[CROP][1:])], shape)
    np.testing.assert_allclose(view, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "mode"), [((2, 20, 15), "bilinear"), ((1, 12, 20, 15), "trilinear")])
def test_crop_is_torchs_interpolate_of_the_box(shape: tuple[int, ...], mode: str) -> None:
    x, view, u = one(shape, only("crop"), 3)
    box = torch.from_numpy(x[box_of(0.75, shape, u[CROP][1:])])[None]
    wanted = torch.nn.functional.interpolate(box, shape[1:], mode=mode, align_corners=False)[0]
    np.testing.assert_allclose(view, wanted.numpy(), atol=1e-12)


def test_grey_is_the_mean_of_three_channels() -> None:
    x, view, _ = one((3, 8, 9), only("grey"), 3)
    np.testing.assert_allclose(view, np.stack([x.mean(0)] * 3), atol=1e-14)


@pytest.mark.parametrize("shape", [*SHAPES, (6,)])
def test_intensity_is_one_factor_and_one_offset_a_view(shape: tuple[int, ...]) -> None:
    x, view, u = one(shape, only("intensity", scale=0.4, shift=0.3), 4)
    factor, offset = 0.6 + 0.8 * u[INTENSITY][1], -0.3 + 0.6 * u[INTENSITY][2]
    np.testing.assert_allclose(view, factor * x + offset, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blur", [0.1, 1.0, 2.5])
def test_blur_is_scipys_gaussian_filter(shape: tuple[int, ...], blur: float) -> None:
    for row in range(3):
        x, view, u = one(shape, only("blur", blur=blur), row)
        np.testing.assert_allclose(view, blurred(x, 0.1 + (blur - 0.1) * u[BLUR][1]), atol=1e-12)


def test_blur_leaves_a_constant_as_it_is() -> None:
    x = torch.full((1, 1, 6, 7, 8), 3.5, dtype=torch.float64)
    assert torch.allclose(views(x, [0], seed=0, epoch=0, augment=only("blur", blur=2.0)), x, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 24, 24, 24), (3, 64, 64), (5000,)])
def test_noise_is_gaussian_with_the_drawn_standard_deviation(shape: tuple[int, ...]) -> None:
    x, view, u = one(shape, only("noise", noise=0.7), 6)
    standard = (view - x).ravel() / (0.7 * u[NOISE][1])
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
    wanted[box_of(cutout, shape, u[CUTOUT][1:])] = 0
    assert np.array_equal(view, wanted)
    assert (view == 0).sum() == shape[0] * math.prod(math.ceil(cutout * n) for n in shape[1:])


def test_boxes_reach_every_corner_and_stay_inside() -> None:
    x = torch.ones(400, 1, 3, 4)
    out = views(x, range(400), seed=1, epoch=0, augment=only("cutout", cutout=0.3))  # one row of 3, two of 4
    hit = (out == 0).double().mean(0)[0]
    assert torch.all((out == 0).sum((1, 2, 3)) == 2)
    np.testing.assert_allclose(hit, np.outer([1 / 3] * 3, [1 / 3, 2 / 3, 2 / 3, 1 / 3]), atol=5 * math.sqrt(0.25 / 400))


@pytest.mark.parametrize("shape", [(3, 17, 22), (1, 15, 20, 12)])
def test_the_chain_is_flip_shift_crop_grey_intensity_blur_noise_cutout(shape: tuple[int, ...]) -> None:
    augment = dataclasses.replace(every(shape, 1.0), noise=0.0)
    x, view, u = one(shape, augment, 9)
    v = translated(x[:, ::-1], 3, u[SHIFT][1:])
    v = resized(v[box_of(0.75, shape, u[CROP][1:])], shape)
    v = np.broadcast_to(v.mean(0), v.shape) if shape[0] == 3 else v
    v = v * (0.8 + 0.4 * u[INTENSITY][1]) + (-0.2 + 0.4 * u[INTENSITY][2])
    v = blurred(v, 0.1 + 0.9 * u[BLUR][1])
    v[box_of(0.25, shape, u[CUTOUT][1:])] = 0
    np.testing.assert_allclose(view, v, atol=1e-12)


def test_noise_comes_after_blur_and_before_cutout() -> None:
    x, view, u = one((1, 24, 24, 24), only("blur", "noise", "cutout", noise=2.0), 11)
    box = box_of(0.25, (1, 24, 24, 24), u[CUTOUT][1:])
    assert np.all(view[box] == 0)
    added = np.delete((view - blurred(x, 0.1 + 0.9 * u[BLUR][1]))[0], np.r_[box[1]], axis=0)
    standard = (added / (2.0 * u[NOISE][1])).ravel()
    assert scipy.stats.kstest(standard, "norm").pvalue > 1e-3  # white: not blurred


# --- addresses


def philox(seed: int, epoch: int, row: int, view: int, block: int) -> list[float]:
    """Philox-4x64-10 (Salmon et al. 2011), block by block: four doubles of 53 bits."""
    mask = 2**64 - 1
    key, c = [seed, epoch], [block + 1, 0, row, view]  # numpy counts up before it makes a block
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ key[0], second & mask, (first >> 64) ^ c[3] ^ key[1], first & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return [(word >> 11) * 2.0**-53 for word in c]


@pytest.mark.parametrize("address", [(0, 0, 0, 0), (3, 17, 123456, 1), (2**63 + 5, 2**40, 2**50, 7)])
def test_the_numbers_of_a_view_are_philox_blocks_of_its_address(address: tuple[int, int, int, int]) -> None:
    assert draws(*address) == [philox(*address, block) for block in range(8)]


def test_numbers_are_uniform_and_unrelated_between_rows_views_epochs_and_seeds() -> None:
    tables = [
        np.array([draws(s, e, row, v) for row in range(600)]).reshape(600, -1)
        for s, e, v in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    ]
    assert scipy.stats.kstest(np.concatenate(tables).ravel(), "uniform").pvalue > 1e-3
    columns = np.corrcoef(np.concatenate(tables, 1).T)  # 128 columns: each table's 32
    assert np.abs(columns - np.eye(128)).max() < 6 / math.sqrt(600)
    rows = np.corrcoef(tables[0][:-1].ravel(), tables[0][1:].ravel())[0, 1]
    assert abs(rows) < 5 / math.sqrt(599 * 32)


@pytest.mark.parametrize("shape", [(1, 31, 40, 24), (3, 17, 19), (21,)])
def test_a_view_has_the_same_bits_in_any_batch(shape: tuple[int, ...]) -> None:
    augment = every(shape, 0.6, views=2)
    x, rows = sample(shape, 7, dtype=torch.float32), [40, 3, 77, 8, 1000000, 5, 6]
    out = views(x, rows, seed=1, epoch=4, augment=augment).view(2, 7, *shape)
    for order in ([3, 1, 0, 6, 5, 2, 4], [2], [4, 6], [5, 5]):
        part = views(x[order], [rows[i] for i in order], seed=1, epoch=4, augment=augment)
        assert torch.equal(part.view(2, len(order), *shape), out[:, order])


@pytest.mark.parametrize("shape", [(1, 48, 57, 49), (3, 131, 97), (1, 301, 203), (5000,)])
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
@pytest.mark.parametrize("name", [name for name in PROBABILITIES if name != "p_grey"])
def test_a_transform_is_applied_with_its_probability(name: str, p: float) -> None:
    n = 600
    x = sample((1, 4, 5, 6)).expand(n, 1, 4, 5, 6)
    out = views(x, range(n), seed=0, epoch=0, augment=only(name[2:], p=p))
    share = (out != x).flatten(1).any(1).double().mean().item()
    unseen = {"p_shift": 1 / 343, "p_blur": 0.025 / 0.9}.get(name, 0.0)  # every offset 0; int(4 sd + 1/2) = 0
    wanted = p * (1 - unseen)
    assert abs(share - wanted) <= 4.5 * math.sqrt(wanted * (1 - wanted) / n)


def test_two_views_and_two_transforms_are_drawn_independently() -> None:
    n = 2000
    gates = np.array([[draws(0, 0, row, v) for v in (0, 1)] for row in range(n)])[..., 0] < 0.5  # (n, view, transform)
    together = gates.reshape(n, 16).astype(float)
    assert np.abs(np.corrcoef(together.T) - np.eye(16)).max() < 5 / math.sqrt(n)
    assert np.abs(together.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(n)


# --- manners


@pytest.mark.parametrize("name", PROBABILITIES)
def test_x_is_left_as_it_is(name: str) -> None:
    x = sample((3, 9, 8, 7), 2)
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


def test_a_view_of_48_cubed_takes_few_milliseconds_on_one_core() -> None:
    x, threads = sample((1, 48, 48, 48), 16, dtype=torch.float32), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for epoch in range(3):
            start = time.process_time()
            views(x, range(16), seed=0, epoch=epoch, augment=every((1, 48, 48, 48), 0.5, views=2))
            seconds.append((time.process_time() - start) / 32)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 5e-3  # about 1e-3


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


def test_grey_refuses_other_than_three_channels() -> None:
    with pytest.raises(BadInput, match="p_grey above 0 for 1 channels; wanted three channels"):
        views(sample((1, 8, 8)), [0], seed=0, epoch=0, augment=only("grey"))


def test_rows_and_samples_must_match() -> None:
    with pytest.raises(ValueError, match="2 rows for 3 samples"):
        views(sample((1, 8, 8), 3), [0, 1], seed=0, epoch=0, augment=NOTHING)
