"""The arithmetic of a store: scales, shards, chunks, names, keys and the fingerprint."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cauc_dist.store import layout
from cauc_dist.store.layout import Column, affine_for, decode_text, encode_text

PEAKS = st.floats(1e-290, 1e290)


@given(low=PEAKS, high=PEAKS, signs=st.tuples(st.sampled_from([-1, 1]), st.sampled_from([-1, 1])))
def test_f16_scales_by_the_power_of_two_that_brings_the_peak_into_1024_to_2048(
    low: float, high: float, signs: tuple[int, int]
) -> None:
    scale, offset = affine_for(signs[0] * low, signs[1] * high, "f16")
    assert offset == 0
    assert math.frexp(scale)[0] == 0.5
    assert 1024 < Fraction(max(low, high)) / Fraction(scale) <= 2048


@given(bounds=st.tuples(st.floats(-1e290, 1e290), st.floats(-1e290, 1e290)).map(sorted))
def test_i16_maps_low_and_high_to_the_ends_of_65535_levels(bounds: list[float]) -> None:
    low, high = bounds
    scale, offset = affine_for(low, high, "i16")
    assert scale > 0
    size = max(abs(low), abs(high), 1e-300)
    for value, level in ((low, -32767), (high, 32767)):
        if high - low > 1e-9 * size:
            assert float(Fraction(level) * Fraction(scale) + Fraction(offset)) == pytest.approx(value, abs=1e-12 * size)


def test_f32_and_zeros_are_kept_as_they_are() -> None:
    assert affine_for(-5, 1e30, "f32") == (1, 0)
    for dtype in ("f16", "i16"):
        assert affine_for(0, 0, dtype) == (1, 0)


@pytest.mark.parametrize(
    ("n", "row_bytes", "per"),
    [
        (1, 100, 1),
        (31, 100, 31),
        (70, 100, 32),  # small stores: 32 rows
        (2048, 100, 32),
        (6400, 100, 100),  # large ones: 64 shards
        (10_000, 1_300_000, 103),  # 134 MB, that is 128 MiB
        (10_000, 50 * 2**20, 2),
        (5, 500 * 2**20, 1),  # never less than one row
    ],
)
def test_a_shard_has_so_many_rows(n: int, row_bytes: int, per: int) -> None:
    assert layout.rows_per_shard(n, row_bytes) == per


def test_chunks_of_row_arrays_do_not_depend_on_the_number_of_rows() -> None:
    assert [layout.row_chunk(size) for size in (1, 8, 32, 64, 128)] == [65536] * 5
    assert [layout.row_chunk(size) for size in (129, 256, 3000, 10**8)] == [32768, 32768, 2048, 1]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_names_come_back_from_rows_of_a_multiple_of_64_bytes(names: list[str]) -> None:
    rows = encode_text(names)
    longest = max(len(name.encode()) for name in names)
    assert rows.shape[1] % 64 == 0
    assert longest <= rows.shape[1] < longest + 64 or rows.shape[1] == 64
    assert decode_text(rows) == tuple(names)
    assert decode_text(encode_text(names, 640)) == tuple(names)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.text(min_size=1))
def test_no_column_s_name_leaves_its_folder_or_is_taken_for_another_or_for_zarr_s(name: str, other: str) -> None:
    path = Column(name, "number").array
    folder, file = path.split("/")  # one slash
    assert folder == "meta"
    assert file not in ("", ".", "..", "zarr.json")
    assert not file.startswith("__")
    assert file.isascii()
    try:
        other.encode()
    except UnicodeEncodeError:
        return
    assert (Column(other, "number").array == path) == (other == name)


def test_keys_and_fingerprint_are_what_sha256_says() -> None:
    digest = hashlib.sha256("höhe".encode()).digest()
    assert layout.keys(["höhe"]).tolist() == [int.from_bytes(digest[:8], "little")]
    text = '["cauc_dist.store", 2, ["a", "b"], {"dtype": "f16", "shape": [1, 2]}]'
    sums = np.arange(64, dtype=np.uint8).reshape(2, 32)
    expected = hashlib.sha256(text.encode() + b"\0" + bytes(range(64))).hexdigest()
    assert layout.fingerprint(["a", "b"], sums, {"shape": [1, 2], "dtype": "f16"}) == expected
