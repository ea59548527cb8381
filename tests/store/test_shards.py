"""What becomes of a volume: its statistics, its stored values and their error, against float64 on the whole volume."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cauc_dist.store import layout
from cauc_dist.store.chunks import crc32c
from cauc_dist.store.layout import Codec, DType
from cauc_dist.store.shards import BLOCK, Encoder, Form, ShardWriter
from cauc_dist.store.sources import Unusable
from tests.store.cohorts import blob, noise

SHAPE = (2, 40, 35, 30)  # 42,000 voxels a channel: more than one block


def volume(i: int, *, spread: float = 1.0) -> np.ndarray:
    """Two channels of float32 of very different size, with zeros and a flat background."""
    x = np.stack([noise(i, SHAPE[1:]), noise(i + 1, SHAPE[1:]) * np.float32(1e4 * spread) - np.float32(7e5)])
    x[:, 25:] = 0
    x[0, 3, 4, :9] = 0
    return x


def form(dtype: DType, mask: np.ndarray | None = None, shape: tuple[int, ...] = SHAPE, codec: Codec = "none") -> Form:
    return Form(shape, dtype, codec, mask)


def back(row: np.ndarray, stats: np.ndarray) -> np.ndarray:
    """value = stored * scale + offset, a channel at a time, of a dense row."""
    scale, offset = (stats[layout.STATS.index(name)] for name in ("scale", "offset"))
    wide = row.astype(np.float64).reshape(len(scale), -1)
    return (wide * scale[:, None] + offset[:, None]).reshape(row.shape)


def refused(x: np.ndarray, words: str, kept: Form) -> None:
    with pytest.raises(Unusable, match=words):
        Encoder(kept).encode(x)


# ---- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["f16", "f32", "i16"])
def test_statistics_are_of_the_source_and_of_every_voxel(dtype: DType, packed: bool) -> None:
    x = volume(0)
    mask = np.broadcast_to(x.any(0) if packed else np.ones(SHAPE[1:], bool), SHAPE) if packed else None
    stats = Encoder(form(dtype, mask)).encode(x).stats
    for c, channel in enumerate(x.astype(np.float64).reshape(2, -1)):
        mean = math.fsum(channel) / channel.size
        std = math.sqrt(math.fsum((channel - mean) ** 2) / channel.size)
        told = dict(zip(layout.STATS, stats[:, c], strict=True))
        assert told["mean"] == pytest.approx(mean, rel=1e-13)
        assert told["std"] == pytest.approx(std, rel=1e-12)
        assert (told["min"], told["max"]) == (channel.min(), channel.max())
        assert told["nonzero"] == np.count_nonzero(channel)


def test_the_background_of_a_packed_scan_counts_as_zeros_below_all_values() -> None:
    x = blob(0)[None] + np.float32(0)
    mask = x != 0
    mask[0, 0, 0, 0] = True  # and a zero inside the mask stays one
    x[0, 0, 0, 0] = 0
    stats = Encoder(form("f16", mask, x.shape)).encode(x).stats
    assert stats[layout.STATS.index("min"), 0] == 0
    assert stats[layout.STATS.index("max"), 0] == x.max()
    assert stats[layout.STATS.index("mean"), 0] == pytest.approx(x.astype(np.float64).mean(), rel=1e-13)


# ---- values and errors ----------------------------------------------------------------------------------------


def test_f16_is_the_source_over_a_power_of_two_rounded_once() -> None:
    x = volume(0)
    encoded = Encoder(form("f16")).encode(x)
    for c in range(2):
        peak = float(np.abs(x[c]).max())
        scale = next(2.0**k for k in range(-40, 40) if 1024 < peak / 2.0**k <= 2048)
        assert encoded.stats[layout.STATS.index("scale"), c] == scale
        assert encoded.stats[layout.STATS.index("offset"), c] == 0
        assert np.array_equal(encoded.row[c], (x[c].astype(np.float64) / scale).astype(np.float16))


def test_float64_is_not_rounded_by_way_of_float32() -> None:
    # 1025 + 2**-1 + 2**-30 lies above the middle of two halves; float32 would round it onto the middle, then to even.
    x = np.array([2048.0, 1025 - 0.5 + 2**-30, 1024 + 0.5 + 2**-30, 0, 0, 0, 0, 0]).reshape(1, 2, 2, 2)
    row = Encoder(form("f16", shape=x.shape)).encode(x).row
    assert row.ravel()[:3].tolist() == [2048, 1025, 1025]
    assert np.array_equal(row, x.astype(np.float16))
    assert x.astype(np.float32).astype(np.float16).ravel()[2] == 1024  # so this test can fail


@pytest.mark.parametrize("dtype", ["f16", "i16", "f32"])
@pytest.mark.parametrize("source", [np.float32, np.float64, np.int32])
def test_the_error_told_is_that_of_the_stored_values_and_within_bounds(dtype: DType, source: Any) -> None:
    x = volume(3).astype(source)
    if source is np.float64:
        x[0] += np.random.default_rng(0).normal(0, 1e-9, SHAPE[1:])
    encoded = Encoder(form(dtype)).encode(x)
    truth, spans = x.astype(np.float64), [np.ptp(channel.astype(np.float64)) for channel in x]
    error = np.abs(back(encoded.row, encoded.stats) - truth)
    assert encoded.max_abs == pytest.approx(error.max(), rel=1e-9, abs=0)
    assert encoded.max_of_range == pytest.approx(max(e.max() / s for e, s in zip(error, spans, strict=True)), rel=1e-9)
    worst = max(math.sqrt(np.square(e).mean()) / s for e, s in zip(error, spans, strict=True))
    if worst == 0:
        assert encoded.psnr_db == math.inf
    else:
        assert encoded.psnr_db == pytest.approx(-20 * math.log10(worst), abs=1e-8)
    for c in range(2):
        peak = np.abs(truth[c]).max()
        bound = {"f16": peak * 2**-11, "i16": 0.5001 * spans[c] / 65534, "f32": peak * 2**-24}[dtype]
        assert error[c].max() <= bound
        if dtype != "f32" and source is not np.int32:  # the bound is no idle one
            assert error[c].max() > bound / 4
    assert encoded.psnr_db > {"f16": 70, "i16": 95, "f32": 140}[dtype]


def test_f16_keeps_integers_to_2048_exactly_and_survives_1_7_million() -> None:
    small = np.arange(-2048, 2048, dtype=np.int16).reshape(1, 16, 16, 16)
    encoded = Encoder(form("f16", shape=small.shape)).encode(small)
    assert np.array_equal(encoded.row.astype(np.int64), small)
    assert (encoded.max_abs, encoded.psnr_db) == (0, math.inf)
    large = np.linspace(0, 1.7e6, small.size).reshape(small.shape)
    encoded = Encoder(form("f16", shape=small.shape)).encode(large)
    assert np.isfinite(encoded.row).all()
    assert 0 < encoded.max_of_range < 2**-11


@pytest.mark.parametrize("dtype", ["f16", "i16", "f32"])
def test_the_fill_value_is_never_stored(dtype: DType) -> None:
    x = np.array([-1e30, 1e30, 0, 1, 2, 3, 4, 5]).reshape(1, 2, 2, 2)
    row = Encoder(form(dtype, shape=x.shape)).encode(x).row
    assert not (np.isnan(row).any() if row.dtype.kind == "f" else (row == -32768).any())


def test_i16_spreads_low_to_high_over_65535_levels() -> None:
    x = np.linspace(-3, 5, 65535).reshape(1, 15, 17, 257)
    encoded = Encoder(form("i16", shape=x.shape)).encode(x)
    assert np.array_equal(encoded.row.ravel(), np.arange(-32767, 32768))


def test_a_packed_row_is_the_mask_s_voxels_channel_after_channel() -> None:
    x = volume(5)
    mask = x != 0
    mask[0, 3, 4, :9] = True  # zeros inside the mask
    encoded = Encoder(form("f32", mask)).encode(x)
    assert np.array_equal(encoded.row, np.concatenate([x[0][mask[0]], x[1][mask[1]]]))
    assert (encoded.row[: int(mask[0].sum())] == 0).sum() == 9


def test_an_encoder_may_be_used_again_for_another_type() -> None:
    x, mask = volume(5), volume(5) != 0
    encoder = Encoder(form("f16", mask))
    first = encoder.encode(x).row
    wide = encoder.encode(x.astype(np.float64) * 3).row
    assert np.array_equal(encoder.encode(x).row, first)
    assert np.array_equal(wide, Encoder(form("f16", mask)).encode(x.astype(np.float64) * 3).row)


# ---- what is refused ------------------------------------------------------------------------------------------


def changed(value: float, at: tuple[int, ...] = (1, 3, 4, 5)) -> np.ndarray:
    x = volume(0).astype(np.float64)
    x[at] = value
    return x


@pytest.mark.parametrize("at", [(0, 0, 0, 0), (1, 39, 34, 29)])  # of the first block and of the last
def test_one_voxel_that_is_not_finite_refuses_the_scan(at: tuple[int, ...]) -> None:
    assert math.prod(SHAPE[1:]) > BLOCK
    for value in (np.nan, np.inf, -np.inf):
        refused(changed(value, at), "^1 voxels are NaN or infinite$", form("f16"))


def test_values_beyond_float32_refuse_the_scan_only_for_f32() -> None:
    refused(changed(1e60), r"values up to 1e\+60 do not fit f32", form("f32"))
    assert np.isfinite(Encoder(form("f16")).encode(changed(1e60)).row).all()


@pytest.mark.parametrize("dtype", ["f16", "i16"])
def test_values_whose_squares_overflow_refuse_the_scan(dtype: DType) -> None:
    for value in (1e200, -1.7e308):
        refused(changed(value), r"^values up to \d\S+: too large to compute with$", form(dtype))


@pytest.mark.parametrize(("dtype", "value"), [("f16", 5e-324), ("f32", 1e-60)])
def test_values_that_all_become_zero_refuse_the_scan(dtype: DType, value: float) -> None:
    x = np.zeros((1, 4, 4, 4))
    x[0, 1] = value
    for mask in (None, x != 0):
        refused(x, f"its values differ too little for {dtype}", form(dtype, mask, x.shape))
    encoded = Encoder(form("f16", shape=x.shape)).encode(x * 1e50)  # small values that are not too small
    assert back(encoded.row, encoded.stats).max() == pytest.approx(value * 1e50, rel=1e-3)


def test_a_constant_channel_refuses_the_scan() -> None:
    x = volume(0)
    x[1] = 3
    refused(x, r"^constant \(3 everywhere\)$", form("f32"))
    refused(np.zeros_like(x), r"^constant \(0 everywhere\)$", form("f16", x != 0))


def test_values_that_become_equal_refuse_the_scan() -> None:
    x = 1e6 + noise(0, (1, 8, 8, 8)).astype(np.float64) / 1e3
    refused(x, r"its values differ too little for f16 \(1000000\.\d+ to 1000000\.\d+\)", form("f16", shape=x.shape))
    assert len(np.unique(Encoder(form("i16", shape=x.shape)).encode(x).row)) > 400


def test_voxels_outside_the_mask_refuse_the_scan() -> None:
    x = volume(0)
    mask = x != 0
    x[0, 30, 0, :4] = 1
    refused(x, "^4 voxels outside the store's mask are not 0$", form("f16", mask))


# ---- rows of features -----------------------------------------------------------------------------------------


def test_a_row_of_features_is_kept_as_float32_with_one_set_of_statistics() -> None:
    x = np.array([0.1, -5, 0, 1e30])
    encoded = Encoder(Form((4,), "f32", "none")).encode(x)
    assert np.array_equal(encoded.row, x.astype(np.float32))
    told = dict(zip(layout.STATS, encoded.stats[:, 0].tolist(), strict=True))
    assert encoded.stats.shape == (len(layout.STATS), 1)
    assert told["mean"] == pytest.approx(x.mean(), rel=1e-14)
    assert told["std"] == pytest.approx(x.std(), rel=1e-14)
    assert (told["min"], told["max"], told["nonzero"], told["scale"], told["offset"]) == (-5, 1e30, 3, 1, 0)
    assert encoded.max_abs == abs(float(np.float32(1e30)) - 1e30)
    assert Encoder(Form((2,), "f32", "none")).encode(np.zeros(2)).psnr_db == math.inf  # a row may be constant


def test_features_that_are_not_finite_or_do_not_fit_are_refused() -> None:
    kept = Form((2,), "f32", "none")
    refused(np.array([1, np.nan]), "^1 features are NaN or infinite$", kept)
    refused(np.array([1, 1e39]), r"^values up to 1e\+39 do not fit f32$", kept)


# ---- shards ---------------------------------------------------------------------------------------------------


def test_a_shard_holds_rows_then_an_index_with_its_crc(tmp_path: Path) -> None:
    kept = Form((1, 2, 2, 2), "f32", "none")
    rows = [np.arange(8, dtype=np.float32).reshape(kept.row) + i for i in range(2)]
    path = tmp_path / "volumes/c/0"
    with ShardWriter(path, 3, kept) as writer:
        writer.put(2, rows[0])  # in any order; one is left out
        writer.put(0, rows[1])
        size = writer.close()
    data = path.read_bytes()
    assert size == len(data) == 2 * (32 + 4) + 3 * 16 + 4
    assert data[:32] == rows[0].tobytes()
    assert data[36:68] == rows[1].tobytes()
    absent = b"\xff" * 16
    index = np.array([36, 36], "<u8").tobytes() + absent + np.array([0, 36], "<u8").tobytes()
    assert data[72:120] == index
    # The Castagnoli polynomial, bit by bit.
    for part, crc in ((data[:32], data[32:36]), (index, data[120:])):
        register = 0xFFFFFFFF
        for byte in part:
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ 0x82F63B78 * (register & 1)
        assert crc == (register ^ 0xFFFFFFFF).to_bytes(4, "little")
    assert crc32c(np.frombuffer(b"123456789", np.uint8)).tobytes() == (0xE3069283).to_bytes(4, "little")


def test_an_error_leaves_no_shard_and_a_shard_that_was_there_as_it_was(tmp_path: Path) -> None:
    kept = Form((1, 2, 2, 2), "f32", "none")
    path = tmp_path / "c/0"
    path.parent.mkdir()
    path.write_bytes(b"old")

    def spoil() -> None:
        with ShardWriter(path, 3, kept) as writer:
            writer.put(0, np.ones(kept.row, np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spoil()
    assert [p.name for p in path.parent.iterdir()] == ["0"]
    assert path.read_bytes() == b"old"
