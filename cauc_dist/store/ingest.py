"""From a BIDS folder to a store, whole or not at all.

The way: table -> pairs of scan and row -> columns -> headers -> one window for all -> shards in parallel ->
metadata -> commit. All that can be refused from names, tables and headers is refused before the first byte is
written. Work happens in a hidden sibling folder that becomes the store by one rename at the very end.

Threads, not processes: inflating, hashing, statistics and blosc all release the GIL. On 2 cores, 50 heads of
80x96x80: 57 scans/s serial, 103 with 2 threads, 64 with 2 processes (start-up included); and no orphan can go
on writing after a kill.

Shapes: a scan is (X, Y, Z) float64 while it is read; a shard's block is (scans, 1, X, Y, Z) as stored.
"""

import contextlib
import fcntl
import functools
import gzip
import hashlib
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import zarr
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from cauc_dist import __version__
from cauc_dist.durable import sync, sync_tree
from cauc_dist.errors import BadInput
from cauc_dist.store import layout
from cauc_dist.store.bids import NAMED, Refused, Scan, find, pair, read_columns, read_table, some
from cauc_dist.store.layout import Column, DType

Shape = tuple[int, int, int]
Volume = NDArray[np.float64]
T = TypeVar("T")

UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError)


@dataclass(frozen=True)
class Error:
    """How far the stored values are from the source, over all scans; zeros and None where all are exact."""

    max_abs: float
    max_of_range: float
    """Largest |error| of a scan over the scan's own range (max - min)."""
    psnr_db: float | None
    """Lowest PSNR of a scan, peak = its range; None: every scan is exact."""
    worst: str | None
    """The scan with the lowest PSNR."""


@dataclass(frozen=True)
class Summary:
    """What an ingest did; `print(summary)` says it in a few lines."""

    store: Path
    n: int
    shape: Shape
    shapes: int
    """Different shapes found among the scans."""
    error: Error
    seconds: float
    bytes_in: int
    bytes_out: int
    set_aside: tuple[Refused, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.n} scans of {_by(self.shape)} (from {self.shapes} shape{'s' * (self.shapes != 1)}) in {self.store}",
            f"{self.bytes_in / 1e6:.1f} MB read, {self.bytes_out / 1e6:.1f} MB written, {self.seconds:.1f} s",
        ]
        if self.error.psnr_db is None:
            lines.append("stored values equal the source exactly")
        else:
            share = f"{self.error.max_of_range:.2g} of the range"
            lines.append(
                f"error against the source: at most {share}, PSNR {self.error.psnr_db:.1f} dB ({self.error.worst})"
            )
        lines += [f"set aside: {name}: {reason}" for name, reason in self.set_aside[:NAMED]]
        if len(self.set_aside) > NAMED:
            lines.append(f"set aside: {len(self.set_aside) - NAMED} more, all listed in the store's attributes")
        return "\n".join(lines)


def ingest(
    source: Path,
    store: Path,
    *,
    shape: Shape | None = None,
    pad: bool = False,
    dtype: DType = "f16",
    suffix: str = "T1w",
    partial: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Make `store` from the BIDS folder `source`; nothing is at `store` unless this returns.

    Reads sub-*/[ses-*/]anat/sub-*_<suffix>.nii[.gz] and participants.tsv; turns scans to RAS; never stretches:
    `shape` takes a window of that many voxels at the centre of every scan, `pad` lets zeros fill a smaller scan.
    `partial` keeps the pairs of scan and participant and sets the rest aside. `progress(done, scans)` is called
    in the calling thread. Memory: workers (default: cores) times a shard (<= 128 MiB) and a few float64 volumes.
    """
    started = time.perf_counter()
    _refuse_settings(store, shape, dtype)
    rows = read_table(source)
    scans, set_aside = pair(rows, find(source, suffix), suffix, keep_pairs=partial)
    columns, values = read_columns({scan.subject: rows[scan.subject] for scan in scans})
    headers = _headers(scans)
    window = _window(headers, shape, pad)
    settings = {"shape": list(window), "pad": pad, "dtype": dtype, "suffix": suffix}
    with _building(store) as folder:
        group = _create(folder, len(scans), (1, *window), dtype)
        records = _write_shards(group, scans, window, dtype, workers, progress)
        _write_rows(group, scans, records, columns, values)
        shutil.copyfile(source / "participants.tsv", folder / "participants.tsv")
        error = _worst(scans, records)
        attributes = {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            "n": len(scans),
            "axes": layout.AXES,
            "orientation": "RAS",
            "voxel_mm": np.median([h.voxel for h in headers], axis=0).tolist(),
            "columns": [column.name for column in columns],
            "source": _describe(source, headers),
            "cauc_dist": __version__,
            "settings": settings,
            "error": asdict(error),
            "set_aside": [list(pair) for pair in set_aside],
        }
        group.attrs.put(json.loads(json.dumps(attributes)))  # the commit record: a reader knows a store by it
    return Summary(
        store=store,
        n=len(scans),
        shape=window,
        shapes=len({h.shape for h in headers}),
        error=error,
        seconds=time.perf_counter() - started,
        bytes_in=sum(scan.path.stat().st_size for scan in scans),
        bytes_out=sum(f.stat().st_size for f in store.rglob("*") if f.is_file()),
        set_aside=tuple(set_aside),
    )


def _refuse_settings(store: Path, shape: Shape | None, dtype: str) -> None:
    if dtype not in layout.STORED_AS:
        raise BadInput(f"dtype {dtype!r}", wanted="f16 or f32", do="Name one of the two")
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise BadInput(f"shape {_by(shape)}", wanted="three positive numbers of voxels", do="Give e.g. 96 112 96")
    _refuse_taken(store)


def _refuse_taken(store: Path) -> None:
    if store.exists():
        raise BadInput(
            f"{store} exists already", wanted="a new path", do="Name another store, or remove this one first"
        )


# ---- the headers: shapes and voxel sizes, before any voxel is read --------------------------------------------


@dataclass(frozen=True)
class Header:
    shape: Shape
    voxel: tuple[float, float, float]


class Unusable(Exception):
    """Why a scan cannot be taken; collected, so that one run names them all."""


def _headers(scans: Sequence[Scan]) -> list[Header]:
    """What each scan will be once turned to RAS; all unreadable scans are named at once."""
    bad: list[Refused] = []
    headers: list[Header] = []
    with ThreadPoolExecutor() as pool:
        for scan, header in zip(
            scans, pool.map(lambda scan: _or_reason(functools.partial(_header, scan)), scans), strict=True
        ):
            if isinstance(header, Header):
                headers.append(header)
            else:
                bad.append((scan.id, header))
    _refuse(bad, len(scans))
    return headers


def _header(scan: Scan) -> Header:
    image = nib.load(scan.path)
    if not isinstance(image, nib.Nifti1Image):
        raise Unusable(f"{type(image).__name__}, not NIfTI")
    shape = image.shape
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        raise Unusable(f"{len(shape)}-D ({_by(shape)}), not one volume")
    voxels = image.get_data_dtype()  # type: ignore[no-untyped-call]
    if voxels.kind not in "iuf":
        raise Unusable(f"voxels of type {voxels}, not real numbers")
    axes = nib.io_orientation(image.affine)[:, 0]  # type: ignore[no-untyped-call]
    sides = nib.affines.voxel_sizes(image.affine)  # type: ignore[no-untyped-call]
    if not np.isfinite(axes).all() or not np.isfinite(sides).all():
        raise Unusable("no orientation in its affine")
    order = np.argsort(axes)
    x, y, z = (int(shape[i]) for i in order)
    a, b, c = (float(sides[i]) for i in order)
    return Header((x, y, z), (a, b, c))


def _window(headers: Sequence[Header], shape: Shape | None, pad: bool) -> Shape:
    """The shape all scans get; refuses what would need resampling, guessing or unasked zeros."""
    voxels = np.array([h.voxel for h in headers])
    if (voxels.max(0) > 1.01 * voxels.min(0)).any():
        found = f"voxel sizes from {_by(voxels.min(0).round(3))} to {_by(voxels.max(0).round(3))} mm"
        raise BadInput(found, wanted="one voxel size within 1 %", do="Resample the scans to one grid first")
    shapes = np.array([h.shape for h in headers])
    x, y, z = (int(side) for side in shapes.min(0))
    if shape is None:
        if (shapes != shapes[0]).any():
            found = f"{len(set(map(tuple, shapes.tolist())))} shapes, from {_by(shapes.min(0))} to {_by(shapes.max(0))}"
            do = f"Give shape {x} {y} {z}, the largest window that lies inside every scan (it is cut from the centre)"
            raise BadInput(found, wanted="one shape", do=do)
        return x, y, z
    if (small := (shapes < shape).any(1)).any() and not pad:
        found = f"{small.sum()} of {len(shapes)} scans are smaller than {_by(shape)}"
        do = f"Give shape {min(x, shape[0])} {min(y, shape[1])} {min(z, shape[2])}, or ask for pad to add zeros"
        raise BadInput(found, wanted="a window inside every scan", do=do)
    return shape


# ---- the voxels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What is kept of a scan beside its voxels; `stats` in the order of layout.STATS, of the source's values."""

    stats: tuple[float, ...]
    checksum: bytes
    max_abs: float
    psnr_db: float  # inf: exact


def read_scan(path: Path, window: Shape) -> Volume:
    """A scan in RAS, (X, Y, Z) float64: the window at its centre, zeros where the scan does not reach."""
    # Unpacked whole: nibabel stops before gzip's checksum, and 44 of 60 flipped bits passed for a scan.
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    kind: Any = type(nib.load(path))
    image = nib.as_closest_canonical(kind.from_bytes(raw))  # type: ignore[no-untyped-call]
    x = np.asarray(image.dataobj, np.float64)
    return central(x.reshape(x.shape[:3]), window)


def central(x: Volume, window: Shape) -> Volume:
    """The central box: element (side - wanted) // 2 comes first where it cuts, as many zeros go first where it pads."""
    for axis, wanted in enumerate(window):
        side = x.shape[axis]
        if side >= wanted:
            first = (side - wanted) // 2
            x = x[(slice(None),) * axis + (slice(first, first + wanted),)]
        else:
            before = (wanted - side) // 2
            x = np.pad(x, [(before, wanted - side - before) if a == axis else (0, 0) for a in range(3)])
    return np.ascontiguousarray(x)


def encode(x: Volume, dtype: DType) -> tuple[NDArray[Any], float]:
    """(stored, scale) with x about stored * scale; raises Unusable where x cannot be trained on."""
    if bad := int(x.size - np.count_nonzero(np.isfinite(x))):
        raise Unusable(f"{bad} voxels are NaN or infinite")
    if x.min() == x.max():
        raise Unusable(f"constant ({x.flat[0]:g} everywhere)")
    scale = layout.scale_for(float(np.abs(x).max()), dtype)
    with np.errstate(over="ignore"):
        stored = (x / scale).astype(layout.STORED_AS[dtype])
    if not np.isfinite(stored).all():
        raise Unusable(f"values up to {np.abs(x).max():g} do not fit {dtype}")
    if stored.min() == stored.max():
        raise Unusable(f"its values differ too little for {dtype} ({x.min():.9g} to {x.max():.9g})")
    return stored, scale


def _record(x: Volume, stored: NDArray[Any], scale: float, path: Path) -> Record:
    error = np.abs(stored * np.float64(scale) - x)
    rmse, span = float(np.sqrt(np.mean(error * error))), float(x.max() - x.min())
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").digest()
    stats = (x.mean(), x.std(), x.min(), x.max(), np.count_nonzero(x), scale, 0.0)
    psnr = 20 * math.log10(span / rmse) if rmse else math.inf
    return Record(tuple(float(s) for s in stats), checksum, float(error.max()), psnr)


def _write_shard(volumes: Any, scans: Sequence[Scan], first: int, window: Shape, dtype: DType) -> list[Record | str]:
    """Read, encode and write the scans of one shard, at once; this thread is the shard's only writer."""
    block = np.zeros((len(scans), 1, *window), layout.STORED_AS[dtype])
    records = [_or_reason(functools.partial(_take, scan, window, dtype, block[j, 0])) for j, scan in enumerate(scans)]
    if all(isinstance(record, Record) for record in records):
        volumes[first : first + len(scans)] = block
    return records


def _take(scan: Scan, window: Shape, dtype: DType, out: NDArray[Any]) -> Record:
    x = read_scan(scan.path, window)
    out[...], scale = encode(x, dtype)
    return _record(x, out, scale, scan.path)


def _write_shards(
    group: zarr.Group,
    scans: Sequence[Scan],
    window: Shape,
    dtype: DType,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> list[Record]:
    """All shards, in parallel; every scan is looked at before a bad one ends the ingest."""
    volumes: Any = group["volumes"]
    size, done = volumes.shards[0], 0
    records: list[Record | str] = [""] * len(scans)
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        firsts = {
            pool.submit(_write_shard, volumes, scans[k : k + size], k, window, dtype): k
            for k in range(0, len(scans), size)
        }
        for future in as_completed(firsts):
            part = future.result()
            records[firsts[future] : firsts[future] + len(part)] = part
            done += len(part)
            if progress:
                progress(done, len(scans))
    finally:
        pool.shutdown(cancel_futures=True)
    _refuse([(s.id, r) for s, r in zip(scans, records, strict=True) if isinstance(r, str)], len(scans))
    return [r for r in records if isinstance(r, Record)]


def _or_reason(take: Callable[[], T]) -> T | str:
    """What `take` gives, or in words why the scan is not usable."""
    try:
        return take()
    except Unusable as error:
        return str(error)
    except UNREADABLE as error:
        return f"unreadable ({type(error).__name__}: {error})"


def _refuse(bad: Sequence[Refused], total: int) -> None:
    if bad:
        found = f"{len(bad)} of {total} scans cannot be used ({some([f'{name}: {why}' for name, why in bad], '; ')})"
        do = "Mend these files, or remove each with its row, then ingest again"
        raise BadInput(found, wanted="one finite, varying 3-D volume a file", do=do)


# ---- the store: arrays, rows, commit --------------------------------------------------------------------------


def _create(folder: Path, n: int, shape: tuple[int, ...], dtype: DType) -> zarr.Group:
    """The group, still without the attributes that make it a store, and its empty `volumes`."""
    group = zarr.create_group(folder)
    stored = layout.STORED_AS[dtype]
    blosc = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=stored.itemsize)
    group.create_array(
        "volumes",
        shape=(n, *shape),
        chunks=(1, *shape),
        shards=(layout.scans_per_shard(n, shape, dtype), *shape),
        dtype=stored,
        compressors=[blosc, Crc32cCodec()],
        fill_value=math.nan,  # an absent shard must not read as zeros: no stored voxel is NaN
        dimension_names=layout.AXES,
    )
    return group


def _write_rows(
    group: zarr.Group,
    scans: Sequence[Scan],
    records: Sequence[Record],
    columns: Sequence[Column],
    values: Sequence[NDArray[np.float64]],
) -> None:
    """All that is small: one chunk an array, whole in memory."""
    for parent in ("stats", "meta"):
        group.create_group(parent)
    _put(group, "ids", layout.encode_text([scan.id for scan in scans]))
    _put(group, "subjects", layout.encode_text([scan.subject for scan in scans]))
    checksums = b"".join(record.checksum for record in records)
    _put(group, "checksums", np.frombuffer(checksums, np.uint8).reshape(len(scans), 32))
    _put(group, "valid", np.full(len(scans), layout.OK, np.uint8))
    for k, name in enumerate(layout.STATS):
        _put(group, f"stats/{name}", np.array([record.stats[k] for record in records], np.float64))
    for column, value in zip(columns, values, strict=True):
        _put(group, column.array, value, asdict(column))


def _put(group: zarr.Group, name: str, values: NDArray[Any], attributes: dict[str, Any] | None = None) -> None:
    """One array, one chunk, written even where it is all fill value: an absent chunk then always means damage."""
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=values.shape,
        dtype=values.dtype,
        compressors=[Crc32cCodec()],
        fill_value=math.nan if values.dtype.kind == "f" else 0,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )
    array[...] = values


def _worst(scans: Sequence[Scan], records: Sequence[Record]) -> Error:
    low = min(range(len(records)), key=lambda i: records[i].psnr_db)
    span = [r.stats[layout.STATS.index("max")] - r.stats[layout.STATS.index("min")] for r in records]
    exact = math.isinf(records[low].psnr_db)
    return Error(
        max_abs=max(r.max_abs for r in records),
        max_of_range=max(r.max_abs / s for r, s in zip(records, span, strict=True)),
        psnr_db=None if exact else records[low].psnr_db,
        worst=None if exact else scans[low].id,
    )


def _describe(source: Path, headers: Sequence[Header]) -> dict[str, Any]:
    """Where the data came from, for people; the fingerprint does not read it."""
    described = source / "dataset_description.json"
    try:
        told = json.loads(described.read_text()) if described.is_file() else {}
    except ValueError:
        told = {}
    return {
        "kind": "BIDS",
        "folder": str(source.resolve()),
        "name": told.get("Name"),
        "license": told.get("License"),
        "shapes": len({h.shape for h in headers}),
        "participants_sha256": hashlib.sha256((source / "participants.tsv").read_bytes()).hexdigest(),
    }


@contextlib.contextmanager
def _building(store: Path) -> Iterator[Path]:
    """An empty hidden sibling folder that becomes `store` at the end, or goes; one left by a kill is taken over."""
    folder = store.with_name(f".{store.name}.partial")
    made = [parent for parent in folder.absolute().parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder, store)
        try:
            _empty(folder)
            yield folder
            sync_tree(folder)
            _refuse_taken(store)
            folder.rename(store)
            sync(store.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made:  # the deepest first; one that somebody else has filled meanwhile stays
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
    finally:
        os.close(lock)


def _lock(lock: int, folder: Path, store: Path) -> None:
    """A lock on the folder itself: it dies with its process, so a kill leaves none behind."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = folder.exists() and folder.stat().st_ino == os.fstat(lock).st_ino  # else just renamed by its owner
    except BlockingIOError:
        same = False
    if not same:
        raise BadInput(
            f"another ingest is writing {store}", wanted="one at a time", do="Wait for it, or name another store"
        )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _by(sides: Any) -> str:
    return "x".join(f"{side:g}" for side in sides)
