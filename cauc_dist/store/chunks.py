"""Zarr v3 arrays, read thinly: the chains of codecs that a store is written with, straight into the caller's memory.

zarr-python takes 10 ms of CPU for a volume of 121x145x121 that is decoded here in .3 ms, and has no way to say that a
chunk is missing: it reads as fill values. Chains that are not known here are read by zarr-python all the same.

Known: [bytes little, nothing | blosc | zstd, crc32c], plain or as the inner chain of sharding_indexed with one row a
chunk and the index at the end; rows are the first axis, and all other axes are whole in a chunk.
"""

import json
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import google_crc32c
import numpy as np
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray

from cauc_dist.store.files import Bytes, File, Files, LocalFiles, RemoteFiles

ABSENT = 2**64 - 1
CRC = 4  # bytes
Decode = Callable[[Bytes, NDArray[Any]], object]


class Rows(Protocol):
    """An array's rows one at a time: `out` has a row's shape and dtype and is contiguous."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read_into(self, i: int, out: NDArray[Any]) -> None: ...


class Described(NamedTuple):
    """The zarr.json of an array, as far as it is read here."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: int
    """Rows a file: of a shard, or of a chunk where there are none."""
    decode: Decode | None
    """None: the chain is `bytes, crc32c`, and bytes are values."""
    attributes: dict[str, Any]


def whole(files: Files, name: str, n: int) -> tuple[NDArray[Any], dict[str, Any]]:
    """The first n rows of a small array and its attributes; ValueError where a chunk is broken or not there."""
    told = _metadata(files, name)
    described = _described(told, sharded=False)
    if described is None:
        array = _zarr(files, name)
        if array.nchunks_initialized != array.nchunks:
            raise ValueError(f"a chunk of {name} is not there")
        return array[:n], told.get("attributes", {})
    if described.shape[0] < n:
        raise ValueError(f"{name} has {described.shape[0]} rows, not {n}")
    rest = described.shape[1:]
    out = np.empty((n, *rest), described.dtype)
    chunk = np.empty((described.rows, *rest), described.dtype)
    for k, start in enumerate(range(0, n, described.rows)):
        raw = np.frombuffer(files.read(f"{name}/{'/'.join(['c', str(k), *['0'] * len(rest)])}"), np.uint8)
        _decode(described.decode, raw, chunk)
        out[start : start + described.rows] = chunk[: n - start]
    return out, described.attributes


def rows_a_file(files: Files, name: str) -> int:
    """Rows of the array that lie in one file: a shard, or a chunk where there are none."""
    return int(_metadata(files, name)["chunk_grid"]["configuration"]["chunk_shape"][0])


def open_rows(files: Files, name: str) -> Rows:
    """The large array: by the thin reader where it knows the chain, else by zarr-python."""
    described = _described(_metadata(files, name), sharded=True)
    return ZarrRows(files, name) if described is None else ThinRows(files, name, described)


class _Shard(NamedTuple):
    file: File
    spans: list[tuple[int, int]]
    """(start, length) of each row in the file; start ABSENT: never written."""


class ThinRows:
    """Rows of a sharded array; safe in many threads. ValueError or EOFError where bytes are wrong or absent."""

    def __init__(self, files: Files, name: str, described: Described) -> None:
        self.shape, self.dtype = described.shape, described.dtype
        self._files, self._name, self._decode, self._per = files, name, described.decode, described.rows
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        # Descriptors are few, often 1,024 a process; what is behind a URL holds none.
        few = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._kept = few if isinstance(files, LocalFiles) else sys.maxsize
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def read_into(self, i: int, out: NDArray[Any]) -> None:
        k, j = divmod(i, self._per)
        shard = self._shard(k)
        start, length = shard.spans[j]
        if start == ABSENT:
            raise ValueError(f"row {j} was never written to shard {k}")
        if self._decode is None:
            if length != out.nbytes + CRC:
                raise ValueError(f"{length} bytes in shard {k} for a row of {out.nbytes}")
            target, crc = out.reshape(-1).view(np.uint8), np.empty(CRC, np.uint8)
            shard.file.read_into([target, crc], start)
            _check(target, crc)
            return
        raw = self._buffer(length)
        shard.file.read_into([raw], start)
        _decode(self._decode, raw, out)

    def _buffer(self, length: int) -> Bytes:
        """A thread's own scratch: fresh memory for each row would cost a page fault each 4 KiB."""
        kept: Bytes | None = getattr(self._scratch, "bytes", None)
        if kept is None or len(kept) < length:
            kept = self._scratch.bytes = np.empty(length, np.uint8)
        return kept[:length]

    def _shard(self, k: int) -> _Shard:
        with self._lock:
            if k in self._shards:
                self._shards.move_to_end(k)
                return self._shards[k]
        shard = self._open(k)  # outside the lock: two threads may both open it, which harms nobody
        with self._lock:
            self._shards[k] = shard
            while len(self._shards) > self._kept:
                self._shards.popitem(last=False)
        return shard

    def _open(self, k: int) -> _Shard:
        file = self._files.open(shard_name(self._name, k, len(self.shape)))
        raw = np.empty(16 * self._per + CRC, np.uint8)
        if file.size < len(raw):
            raise ValueError(f"shard {k} has {file.size} bytes, its index alone {len(raw)}: it is cut short")
        file.read_into([raw], file.size - len(raw))
        try:
            _check(raw[:-CRC], raw[-CRC:])
        except ValueError as error:
            raise ValueError(f"the index of shard {k}: {error}") from None
        spans = [(start, length) for start, length in raw[:-CRC].view("<u8").reshape(-1, 2).tolist()]
        if any(start != ABSENT and start + length > file.size for start, length in spans):
            raise ValueError(f"shard {k} has {file.size} bytes, its index tells of more: it is cut short")
        return _Shard(file, spans)


class ZarrRows:
    """The same by zarr-python, for chains that others wrote."""

    def __init__(self, files: Files, name: str) -> None:
        self._array = _zarr(files, name)
        self.shape, self.dtype = self._array.shape, self._array.dtype
        self._fill = self._array.fill_value

    def read_into(self, i: int, out: NDArray[Any]) -> None:
        out[...] = self._array[i]
        if out.flat[0] == self._fill or (out.dtype.kind == "f" and np.isnan(out.flat[0])):
            raise ValueError("its chunk is not there")


def shard_name(name: str, k: int, dimensions: int) -> str:
    return "/".join([name, "c", str(k), *["0"] * (dimensions - 1)])


def crc32c(data: Bytes) -> Bytes:
    """(4,) the checksum as it is written, little endian."""
    return np.frombuffer(int(google_crc32c.value(data)).to_bytes(CRC, "little"), np.uint8)


def _check(data: Bytes, crc: Bytes) -> None:
    if not np.array_equal(crc32c(data), crc):
        raise ValueError("its crc32c does not match: bytes have changed")


def _decode(decode: Decode | None, raw: Bytes, out: NDArray[Any]) -> None:
    """A chunk with its crc at the end, into out."""
    if len(raw) < CRC:
        raise ValueError(f"a chunk of {len(raw)} bytes")
    _check(raw[:-CRC], raw[-CRC:])
    if decode is not None:
        decode(raw[:-CRC], out)
    elif len(raw) - CRC != out.nbytes:
        raise ValueError(f"{len(raw) - CRC} bytes for values of {out.nbytes}")
    else:
        out.reshape(-1).view(np.uint8)[...] = raw[:-CRC]


def _metadata(files: Files, name: str) -> dict[str, Any]:
    told = json.loads(files.read(f"{name}/zarr.json"))
    if not isinstance(told, dict) or told.get("node_type") != "array":
        raise ValueError(f"{name}/zarr.json describes no array")
    return told


def _described(told: dict[str, Any], *, sharded: bool) -> Described | None:
    """None where zarr.json asks for anything that is not known here."""
    try:
        shape, codecs = tuple(told["shape"]), told["codecs"]
        rows, *rest = told["chunk_grid"]["configuration"]["chunk_shape"]
        known = told["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        known &= tuple(rest) == shape[1:] and not told.get("storage_transformers")
        if sharded:
            inner = codecs[0]["configuration"]
            known &= [c["name"] for c in codecs] == ["sharding_indexed"] and inner["chunk_shape"] == [1, *rest]
            known &= [c["name"] for c in inner["index_codecs"]] == ["bytes", "crc32c"]
            known &= inner["index_codecs"][0]["configuration"]["endian"] == "little"
            known &= inner.get("index_location", "end") == "end"
            codecs = inner["codecs"]
        first, *middle, last = codecs
        known &= first["name"] == "bytes" and first.get("configuration", {}).get("endian", "little") == "little"
        known &= last["name"] == "crc32c" and len(middle) < 2
        decoders: dict[str, Decode] = {"blosc": _blosc, "zstd": _zstd}
        decode = decoders[middle[0]["name"]] if middle else None
        dtype = np.dtype(told["data_type"]).newbyteorder("<")
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return Described(shape, dtype, rows, decode, told.get("attributes", {})) if known else None


# numcodecs fills an `out` that is too large in part, and says nothing: what was there before would pass for voxels.
def _blosc(raw: Bytes, out: NDArray[Any]) -> None:
    if (size := int.from_bytes(raw[4:8].tobytes(), "little")) != out.nbytes:  # of blosc's header
        raise ValueError(f"{size} bytes for values of {out.nbytes}")
    Blosc().decode(raw, out=out)


def _zstd(raw: Bytes, out: NDArray[Any]) -> None:
    values = np.frombuffer(Zstd().decode(raw), np.uint8)
    if values.nbytes != out.nbytes:
        raise ValueError(f"{values.nbytes} bytes for values of {out.nbytes}")
    out.reshape(-1).view(np.uint8)[...] = values


def _zarr(files: Files, name: str) -> Any:
    import zarr  # .3 s that a store of ours does not pay

    if isinstance(files, LocalFiles):
        return zarr.open_array(f"{files.where}/{name}", mode="r", zarr_format=3)
    assert isinstance(files, RemoteFiles)
    return zarr.open_array(files.for_zarr(), path=name, mode="r", zarr_format=3)
