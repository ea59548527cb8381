"""zarr-python, tensorstore and the thin reader see the same values, in our stores and in chains that others write."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from cauc_dist.errors import BadInput
from cauc_dist.store.chunks import ThinRows, ZarrRows, open_rows, whole
from cauc_dist.store.files import open_files
from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.layout import Codec, Column, DType
from cauc_dist.store.reader import Damaged, Store
from tests.store.cohorts import SIDES, blob, by_tensorstore, by_zarr, change, noise, shard

N = 5


def build(
    path: Path,
    volumes: list[np.ndarray],
    dtype: DType,
    codec: Codec,
    *,
    packed: bool = False,
) -> Store:
    mask = np.any([x != 0 for x in volumes], axis=0) if packed else None
    ids = [f"s{i}" for i in range(len(volumes))]
    from_arrays(path, volumes, ids, shape=volumes[0].shape, mask=mask, dtype=dtype, codec=codec)
    return Store.open(path)


def rows(store: Store) -> np.ndarray:
    out = np.empty((len(store), *store.row_shape), store.dtype)
    for i, row in enumerate(out):
        store.read_into(i, row)
    return out


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- stores of ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["f16", "f32", "i16"])
def test_other_readers_see_the_same_bits_of_volumes(tmp_path: Path, dtype: DType, codec: Codec, packed: bool) -> None:
    volumes = [np.stack([blob(i), noise(i)]) for i in range(N)]
    store = build(tmp_path / "s.zarr", volumes, dtype, codec, packed=packed)
    assert isinstance(store._volumes, ThinRows)
    ours = rows(store)
    for read in (by_zarr, by_tensorstore):
        stored = read(tmp_path / "s.zarr", "volumes")
        assert same(stored, ours)
        # `volume` by hand, from what any reader sees: value = stored * scale + offset; outside the mask 0.
        scale, offset = (read(tmp_path / "s.zarr", f"stats/{name}") for name in ("scale", "offset"))
        mask = read(tmp_path / "s.zarr", "mask") if packed else np.ones(store.shape, bool)
        channel = np.nonzero(mask)[0]
        for i in range(N):
            expected = np.zeros(store.shape)
            expected[mask] = stored[i].ravel().astype(np.float64) * scale[i][channel] + offset[i][channel]
            assert np.array_equal(store.volume(i), expected)
            bound = {"f16": 2**-11, "i16": 2**-16, "f32": 0}[dtype] * 250
            assert np.abs(expected - volumes[i]).max() <= bound


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_other_readers_see_the_same_bits_of_images_and_tables(tmp_path: Path, codec: Codec) -> None:
    for k, shape in enumerate([(3, 12, 10), (7,)]):
        values = [noise(i, shape) for i in range(N)]
        store = build(tmp_path / f"{k}.zarr", values, "f32", codec)
        assert np.array_equal(rows(store), values)
        assert np.array_equal([store.volume(i) for i in range(N)], values)
        for read in (by_zarr, by_tensorstore):
            assert same(read(tmp_path / f"{k}.zarr", "volumes"), rows(store))


def test_row_arrays_are_plain_arrays_for_other_readers(tmp_path: Path) -> None:
    column = Column("age", "number"), Column("sex", "category", ("F", "M"))
    values = [np.array([20.5, np.nan, 3]), np.array([1, 0, np.nan])]
    volumes = [noise(i)[None] for i in range(3)]
    path = tmp_path / "s.zarr"
    from_arrays(path, volumes, ["a", "höhe", "c"], shape=(1, *SIDES), columns=column, metadata=values)
    store = Store.open(path)
    for read in (by_zarr, by_tensorstore):
        assert [bytes(row).rstrip(b"\0").decode() for row in read(path, "ids")] == ["a", "höhe", "c"]
        assert same(read(path, "subjects"), read(path, "ids"))
        assert read(path, "valid").tolist() == [1, 1, 1]
        for name, expected in zip(("meta/age", "meta/sex"), values, strict=True):
            np.testing.assert_array_equal(read(path, name), expected)
        for name in store.stats:
            assert same(read(path, f"stats/{name}"), store.stats[name])
        assert same(read(path, "checksums"), store.checksums)


@pytest.mark.parametrize("dtype", ["f16", "f32", "i16"])
def test_what_is_not_there_reads_as_nan_or_the_least_integer_and_not_as_zeros(tmp_path: Path, dtype: DType) -> None:
    build(tmp_path / "s.zarr", [noise(i)[None] for i in range(N)], dtype, "none")
    shard(tmp_path / "s.zarr", 0).unlink()
    for read in (by_zarr, by_tensorstore):
        values = read(tmp_path / "s.zarr", "volumes")
        assert (values == -32768).all() if dtype == "i16" else np.isnan(values).all()


def test_rows_may_be_read_in_many_threads_while_shards_are_closed(tmp_path: Path) -> None:
    build(tmp_path / "s.zarr", [noise(i, (1, 4, 4, 4)) for i in range(100)], "f32", "lz4")
    store = Store.open(tmp_path / "s.zarr")
    store._volumes._kept = 1  # type: ignore[attr-defined]
    assert store._volumes._per == 32  # type: ignore[attr-defined]
    start = threading.Barrier(4)

    def read(seed: int) -> bool:
        out = np.empty(store.row_shape, store.dtype)
        start.wait(10)
        for i in np.random.default_rng(seed).integers(0, 100, 200).tolist():
            store.read_into(i, out)
            if not np.array_equal(out, noise(i, (1, 4, 4, 4))):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [True] * 4
    assert len(store._volumes._shards) == 1  # type: ignore[attr-defined]


# ---- chains that others write ---------------------------------------------------------------------------------


def array(path: Path, values: np.ndarray, chunk: int, codecs: list[Any]) -> None:
    """By zarr-python, the codecs as they are given."""
    shape = (chunk, *values.shape[1:])
    fill = np.nan if values.dtype.kind == "f" else -32768
    with_codecs: Any = zarr.api.synchronous.create(
        store=path, shape=values.shape, chunks=shape, dtype=values.dtype, codecs=codecs, fill_value=fill, zarr_format=3
    )
    with_codecs[...] = values


LITTLE, CRC = BytesCodec(endian="little"), Crc32cCodec()


def sharded(*inner: Any, rows: int = 1, **index: Any) -> Callable[[tuple[int, ...]], list[Any]]:
    return lambda row: [ShardingCodec(chunk_shape=(rows, *row), codecs=list(inner), **index)]


# By what is strange in them; `thin`: known all the same.
CHAINS: dict[str, tuple[bool, int, Callable[[tuple[int, ...]], list[Any]]]] = {
    "as ours": (True, 4, sharded(LITTLE, CRC)),
    "blosc of another kind": (
        True,
        4,
        sharded(LITTLE, BloscCodec(cname="zstd", shuffle="bitshuffle", typesize=4), CRC),
    ),
    "zstd without checksum": (True, 4, sharded(LITTLE, ZstdCodec(level=1), CRC)),
    "gzip": (False, 4, sharded(LITTLE, GzipCodec(level=1), CRC)),
    "no crc": (False, 4, sharded(LITTLE, ZstdCodec(level=1))),
    "crc before compression": (False, 4, sharded(LITTLE, CRC, ZstdCodec(level=1))),
    "big endian": (False, 4, sharded(BytesCodec(endian="big"), CRC)),
    "two rows a chunk": (False, 4, sharded(LITTLE, CRC, rows=2)),
    "index first": (False, 4, sharded(LITTLE, CRC, index_location="start")),
    "index without crc": (False, 4, sharded(LITTLE, CRC, index_codecs=[LITTLE])),
    "no shards": (False, 1, lambda row: [LITTLE, CRC]),
}


@pytest.mark.parametrize("strange", CHAINS)
def test_volumes_that_another_tool_wrote_read_the_same(tmp_path: Path, strange: str) -> None:
    thin, chunk, codecs = CHAINS[strange]
    dtype: DType = "i16" if strange in ("gzip", "no shards") else "f32"
    store = build(tmp_path / "s.zarr", [noise(i)[None] for i in range(N)], dtype, "none")
    before, volumes = rows(store), [store.volume(i) for i in range(N)]
    shard(tmp_path / "s.zarr", 0).unlink()
    array(tmp_path / "other", before, chunk, codecs(before.shape[1:]))
    shutil.rmtree(tmp_path / "s.zarr/volumes")
    (tmp_path / "other").rename(tmp_path / "s.zarr/volumes")
    store = Store.open(tmp_path / "s.zarr")
    assert isinstance(store._volumes, ThinRows if thin else ZarrRows)
    assert same(rows(store), before)
    assert np.array_equal([store.volume(i) for i in range(N)], volumes)
    last = max((f for f in (tmp_path / "s.zarr/volumes/c").rglob("*") if f.is_file()), key=str)
    last.unlink()
    with pytest.raises(Damaged, match=r"scan s4 \(row 4\)"):  # by whichever reader: never zeros or NaN
        rows(Store.open(tmp_path / "s.zarr"))


def test_spatial_chunks_read_the_same(tmp_path: Path) -> None:
    values = np.stack([noise(i)[None] for i in range(N)])
    made = zarr.create_array(tmp_path / "v", shape=values.shape, chunks=(2, 1, 4, 4, 4), dtype="f4", fill_value=np.nan)
    made[...] = values
    reader = open_rows(open_files(tmp_path), "v")
    assert isinstance(reader, ZarrRows)
    out = np.empty(reader.shape[1:], reader.dtype)
    for i in range(N):
        reader.read_into(i, out)
        assert np.array_equal(out, values[i])


@pytest.mark.parametrize("strange", ["gzip", "no crc", "big endian", "other separator", "nothing strange"])
def test_small_arrays_that_another_tool_wrote_read_the_same(tmp_path: Path, strange: str) -> None:
    values = np.random.default_rng(0).normal(size=(10, 3))
    codecs: dict[str, list[Any]] = {
        "gzip": [LITTLE, GzipCodec(level=1), CRC],
        "no crc": [LITTLE, ZstdCodec(level=1)],
        "big endian": [BytesCodec(endian="big"), CRC],
    }
    array(tmp_path / "a", values, 4, codecs.get(strange, [LITTLE, CRC]))
    if strange == "other separator":
        change(tmp_path / "a/zarr.json", lambda t: t["chunk_key_encoding"].update(configuration={"separator": "."}))
        for k in range(3):
            (tmp_path / f"a/c/{k}/0").rename(tmp_path / f"a/c.{k}.0")
    for n in (10, 9, 4, 1):
        assert same(whole(open_files(tmp_path), "a", n)[0], values[:n])
    (tmp_path / ("a/c.1.0" if strange == "other separator" else "a/c/1/0")).unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        whole(open_files(tmp_path), "a", 10)


def test_the_first_rows_of_an_array_that_has_grown_are_read_and_no_more_files_than_they_need(tmp_path: Path) -> None:
    values = np.arange(30.0)
    array(tmp_path / "a", values[:10], 4, [LITTLE, ZstdCodec(level=1), CRC])
    before = whole(open_files(tmp_path), "a", 10)[0]
    grown: Any = zarr.open_array(tmp_path / "a", mode="r+")
    grown.resize((30,))
    grown[...] = values
    assert np.array_equal(before, values[:10])
    for k in range(3, 8):
        (tmp_path / f"a/c/{k}").unlink()
    assert same(whole(open_files(tmp_path), "a", 10)[0], values[:10])
    with pytest.raises(ValueError, match=r"a has 30 rows, not 31"):
        whole(open_files(tmp_path), "a", 31)


def test_what_is_no_array_is_an_error(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "g")
    for read in (lambda: whole(open_files(tmp_path), "g", 1), lambda: open_rows(open_files(tmp_path), "g")):
        with pytest.raises(ValueError, match=r"g/zarr.json describes no array"):
            read()


def test_a_row_of_another_length_is_damage_and_nothing_is_read_past_it(tmp_path: Path) -> None:
    store = build(tmp_path / "s.zarr", [noise(i)[None] for i in range(N)], "f32", "none")
    # A shorter mask of the same crc cannot be made by accident; a shard of another store can be copied over.
    build(tmp_path / "t.zarr", [noise(i, (1, 4, 4, 4)) for i in range(N)], "f32", "none")
    shard(tmp_path / "s.zarr", 0).write_bytes(shard(tmp_path / "t.zarr", 0).read_bytes())
    with pytest.raises(Damaged, match=r"scan s0 .*260 bytes in shard 0 for a row of 2016"):
        rows(store)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("side", [4, 9])
def test_a_compressed_row_of_another_length_is_damage_and_never_fills_a_part(
    tmp_path: Path, codec: Codec, side: int
) -> None:
    build(tmp_path / "s.zarr", [noise(i)[None] for i in range(N)], "f32", codec)
    build(tmp_path / "t.zarr", [noise(i, (1, side, side, side)) for i in range(N)], "f32", codec)
    shard(tmp_path / "s.zarr", 0).write_bytes(shard(tmp_path / "t.zarr", 0).read_bytes())
    with pytest.raises(Damaged, match=rf"scan s0 .*{4 * side**3} bytes for values of 2016"):
        rows(Store.open(tmp_path / "s.zarr"))


def test_rows_of_a_table_are_exact_and_have_no_other_type(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 7)).astype("f4")
    from_arrays(tmp_path / "s.zarr", rows, list("abcde"), shape=(7,))
    store = Store.open(tmp_path / "s.zarr")
    np.testing.assert_array_equal([store.volume(i) for i in range(5)], rows)
    with pytest.raises(BadInput, match="dtype f16 for rows of a table; wanted f32"):
        from_arrays(tmp_path / "t.zarr", rows, list("abcde"), shape=(7,), dtype="f16")
