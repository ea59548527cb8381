"""How many volumes a second does each way of reading give: ours, its peers, and what the machine could do at most?

n synthetic grey-matter maps (c, X, Y, Z) = (1, 121, 145, 121), page cache warm, batches of 8 in random order, 2 threads
or 2 workers. Each way lives in a process of its own. All are first checked against the source, then read in turn,
A B C ... A B C ...: a ratio is the median of those within one round, so that a busy machine slows both sides of it.
What a consumer gets is a float32 batch; `packed raw` gives float16 rows of the mask's voxels, which a device expands.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing as mp
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cauc_dist.errors import BadInput
from cauc_dist.provenance import provenance
from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.layout import DType
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import Loader
from cauc_dist.stream.plan import Plan, Rows

SHAPE = (1, 121, 145, 121)
BATCH, WORKERS = 8, 2
LEAD = 4
"""Batches before the clock starts: more than any ring here holds, as many as a DataLoader reads ahead."""
BASE = "zarr default"
"""What ratios are relative to: what a Zarr user has without a second thought."""
PACKED, F16, I16 = "packed-f16", "dense-f16", "dense-i16"
"""Folders of our stores."""
MIB = 2**20

Volume = NDArray[np.float32]
Batches = Iterator[tuple[Rows, Tensor]]
Read = Callable[[list[Rows]], Batches]
"""From the batches wanted (rows of each) to (rows, batch), in any order, each row of a pass once."""
Gives = Literal["source", "rounded", "normalised", "stored", "packed"]
"""The source's voxels; those rounded to f16 or i16; normalised a scan; without scale and offset; those of the mask."""
Say = Callable[[str], None]


# ---- what is read -----------------------------------------------------------------------------------------------


class Maps:
    """Grey-matter-like maps: smooth positive values in a brain with folds, about 74 % exact zeros; no two alike."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.shape, self._seed = shape, seed
        draw = np.random.default_rng(seed)
        noise = draw.standard_normal((4, *shape[1:]), np.float32)
        self._textures = [t / t.std() for t in (gaussian_filter(n, 1.5, mode="wrap") for n in noise)]
        axes = np.meshgrid(*[np.linspace(-1, 1, s, dtype=np.float32) for s in shape[1:]], indexing="ij", sparse=True)
        self._radius = np.sqrt(sum(np.square(a / np.float32(r)) for a, r in zip(axes, (0.80, 0.85, 0.80), strict=True)))

    def volume(self, i: int) -> Volume:
        """(c, X, Y, Z) of scan i: depends on the seed and i alone."""
        draw = np.random.default_rng([self._seed, i])
        out = np.empty(self.shape, np.float32)
        for channel in out:
            a, b = draw.choice(4, 2, replace=False)
            turn = draw.integers(0, self.shape[1:])
            texture = np.roll(self._textures[a], turn, (0, 1, 2)) * 0.8 + self._textures[b] * 0.6
            inside = self._radius + 0.03 * texture < draw.uniform(0.97, 1.0)
            channel[...] = np.where(inside, 0.35 * np.exp(0.5 * texture), 0)
        return out


@dataclass(frozen=True)
class Data:
    """The same n scans in every format, below one folder."""

    folder: Path
    n: int
    shape: tuple[int, ...] = SHAPE

    def npy(self, i: int) -> Path:
        return self.folder / "npy" / f"{i:05}.npy"

    def nii(self, i: int) -> Path:
        return self.folder / "nii" / f"{i:05}.nii.gz"

    def __getitem__(self, i: int) -> Volume:
        volume: Volume = np.load(self.npy(i))
        return volume


def write_npy(data: Data) -> None:
    maps = Maps(data.shape)
    for i in range(data.n):
        np.save(data.npy(i), maps.volume(i))


def write_nii(data: Data) -> None:
    import nibabel as nib

    for i in range(data.n):
        nib.save(nib.Nifti1Image(data[i][0], np.eye(4)), data.nii(i))  # type: ignore[no-untyped-call]


def write_zarr(data: Data) -> None:
    import zarr

    chunks = (1, *data.shape)
    array = zarr.create_array(data.folder / "zarr", shape=(data.n, *data.shape), chunks=chunks, dtype="float32")
    for i in range(data.n):
        array[i] = data[i]


def write_tar(data: Data) -> None:
    """Shards for webdataset: two a worker, .npy inside."""
    import tarfile

    for k, rows in enumerate(np.array_split(np.arange(data.n), 2 * WORKERS)):
        with tarfile.open(data.folder / "tar" / f"{k}.tar", "w") as tar:
            for i in rows:
                tar.add(data.npy(i), f"{i:05}.npy")


def write_store(dtype: DType, *, packed: bool) -> Callable[[Data], None]:
    def write(data: Data) -> None:
        mask = np.any([data[i] != 0 for i in range(data.n)], axis=0) if packed else None
        path = data.folder / f"{'packed' if packed else 'dense'}-{dtype}"
        ids = [f"{i:05}" for i in range(data.n)]
        from_arrays(path, (data[i] for i in range(data.n)), ids, shape=data.shape, mask=mask, dtype=dtype)

    return write


WRITERS: dict[str, Callable[[Data], None]] = {
    "npy": write_npy,  # first: the others read it
    "nii": write_nii,
    "zarr": write_zarr,
    "tar": write_tar,
    F16: write_store("f16", packed=False),
    I16: write_store("i16", packed=False),
    PACKED: write_store("f16", packed=True),
}


def write(data: Data, formats: Sequence[str], say: Say) -> dict[str, int]:
    """Make the formats that are not there yet; bytes of each."""
    sizes = {}
    for name in sorted({"npy", *formats}, key=list(WRITERS).index):
        folder, done = data.folder / name, data.folder / f"{name}.written"
        told = json.dumps([data.n, data.shape])
        if not done.exists():
            began = time.perf_counter()
            if name in ("npy", "nii", "tar"):
                folder.mkdir(parents=True)
            WRITERS[name](data)
            done.write_text(told)
            say(f"wrote {data.n} volumes as {name} in {time.perf_counter() - began:.1f} s")
        elif done.read_text() != told:
            found, wanted = f"{folder} with [n, shape] {done.read_text()}", told
            raise BadInput(found, wanted=wanted, do="name another folder, or delete this one")
        sizes[name] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return sizes


# ---- limits and ours --------------------------------------------------------------------------------------------


def ring(data: Data, fill: Callable[[int, Volume], object]) -> Read:
    """Batches in three buffers that two threads fill ahead of the consumer: what the machine can do at most."""
    buffers = np.zeros((3, BATCH, *data.shape), np.float32)
    pool = ThreadPoolExecutor(WORKERS)

    def read(order: list[Rows]) -> Batches:
        waiting: list[list[Future[object]]] = []
        for k in range(len(order) + 2):
            if k < len(order):
                waiting.append([pool.submit(fill, int(i), buffers[k % 3, j]) for j, i in enumerate(order[k])])
            if k >= 2:
                for done in waiting[k - 2]:
                    done.result()
                yield order[k - 2], torch.from_numpy(buffers[(k - 2) % 3])

    return read


def memcpy(data: Data) -> Read:
    volumes = [data[i] for i in range(data.n)]
    return ring(data, lambda i, out: np.copyto(out, volumes[i]))


def preadv(data: Data) -> Read:
    files = [os.open(data.npy(i), os.O_RDONLY) for i in range(data.n)]
    head = data.npy(0).stat().st_size - 4 * math.prod(data.shape)
    return ring(data, lambda i, out: os.preadv(files[i], [out.data], head))


def ours(name: str, **how: Any) -> Callable[[Data], Read]:
    def open_(data: Data) -> Read:
        store = Store.open(data.folder / name)
        rows = np.arange(len(store))
        plan = Plan(rows, store.subjects, BATCH, seed=0)
        done = 0

        def read(order: list[Rows]) -> Batches:
            """By a loader of its own: the ring is made anew, and filled before the clock starts."""
            nonlocal done
            start, done = done, done + len(order)
            span: dict[str, Any] = {"rank": 0, "world_size": 1, "start": start, "stop": done, "threads": WORKERS}
            with Loader(store, plan, **span, **how) as batches:
                for batch in batches:
                    yield batch.rows, batch.volumes

        return read

    return open_


# ---- peers ------------------------------------------------------------------------------------------------------


class Of(Dataset[tuple[int, Tensor]]):
    """What a map-style dataset of a user looks like: (row, volume) by row."""

    def __init__(self, n: int, volume: Callable[[int], NDArray[Any]]) -> None:
        self._n, self._volume = n, volume

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        return i, torch.from_numpy(self._volume(i))


class Order:
    """A batch sampler whose batches change from pass to pass: the workers stay."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def loader(dataset: Any, of: Callable[[Any], tuple[Any, Tensor]], make: Any = DataLoader) -> Read:
    order_ = Order()
    batches = make(dataset, batch_sampler=order_, num_workers=WORKERS, persistent_workers=True)

    def read(order: list[Rows]) -> Batches:
        order_.batches = [rows.tolist() for rows in order]
        for batch in batches:
            rows, volumes = of(batch)
            yield np.asarray(rows), volumes.float()

    return read


def zarr_array(*path: str) -> Callable[[Data], Read]:
    def open_(data: Data) -> Read:
        import zarr

        array: Any = zarr.open_array(data.folder.joinpath(*path), mode="r")
        return loader(Of(data.n, lambda i: array[i]), tuple)

    return open_


def npy(data: Data) -> Read:
    return loader(Of(data.n, lambda i: np.load(data.npy(i))), tuple)


def nibabel(data: Data) -> Read:
    import nibabel as nib

    def volume(i: int) -> NDArray[np.float32]:
        image: Any = nib.load(data.nii(i))
        read: NDArray[np.float32] = image.get_fdata(dtype=np.float32)[None]
        return read

    return loader(Of(data.n, volume), tuple)


def webdataset(data: Data) -> Read:
    """In the order of the shards: it has no random access."""
    wds = import_module("webdataset")
    urls = [str(data.folder / "tar" / f"{k}.tar") for k in range(2 * WORKERS)]
    scans = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("__key__", "npy")
    batched = scans.map_tuple(int, torch.from_numpy).batched(BATCH)  # tensors: workers hand them over without a copy
    batches = wds.WebLoader(batched, batch_size=None, num_workers=WORKERS, persistent_workers=True)

    def read(order: list[Rows]) -> Batches:
        for _ in range(0, len(order) * BATCH, data.n):
            for rows, volumes in batches:
                yield np.asarray(rows), volumes.float()

    return read


def monai(*, persistent: bool) -> Callable[[Data], Read]:
    def open_(data: Data) -> Read:
        peer = import_module("monai")
        items = [{"image": str(data.nii(i)), "row": i} for i in range(data.n)]
        load = peer.transforms.LoadImaged(keys="image", ensure_channel_first=True)
        if persistent:
            dataset: Any = peer.data.PersistentDataset(items, load, cache_dir=data.folder / "monai")
        else:
            dataset = peer.data.Dataset(items, load)
        return loader(dataset, lambda batch: (batch["row"], batch["image"].as_subclass(Tensor)), peer.data.DataLoader)

    return open_


def torchio(data: Data) -> Read:
    tio = import_module("torchio")
    subjects = [tio.Subject(image=tio.ScalarImage(data.nii(i)), row=i) for i in range(data.n)]
    return loader(
        tio.SubjectsDataset(subjects, load_getitem=True),
        lambda batch: (batch["row"], batch["image"]["data"]),
        tio.SubjectsLoader,
    )


@dataclass(frozen=True)
class Way:
    what: str
    format: str
    open: Callable[[Data], Read]
    gives: Gives = "source"
    needs: str = ""
    """Package that may be absent."""


WAYS: dict[str, Way] = {
    "memcpy": Way("limit: float32 volumes in memory, copied by 2 threads", "npy", memcpy),
    "preadv": Way("limit: float32 files without decoding or checks, read by 2 threads", "npy", preadv),
    "packed raw": Way(
        "ours, packed f16, left for a device to expand", PACKED, ours(PACKED, normalise="none", expand=False), "packed"
    ),
    "packed": Way("ours, packed f16, expanded to float32", PACKED, ours(PACKED, normalise="none"), "rounded"),
    "packed volume": Way(
        "the same, mean 0 and variance 1 a scan", PACKED, ours(PACKED, normalise="volume"), "normalised"
    ),
    "dense f16": Way("ours, dense f16 lz4, to float32", F16, ours(F16, normalise="none"), "rounded"),
    "dense i16": Way("ours, dense i16 lz4, to float32", I16, ours(I16, normalise="none"), "rounded"),
    BASE: Way("zarr-python, its default codec, float32, a chunk a volume; DataLoader", "zarr", zarr_array("zarr")),
    "zarr f16": Way("zarr-python on our dense f16 lz4 store; DataLoader", F16, zarr_array(F16, "volumes"), "stored"),
    "npy": Way("float32 .npy files; DataLoader", "npy", npy),
    "nibabel": Way("float32 .nii.gz files; DataLoader", "nii", nibabel),
    "webdataset": Way("tar files of .npy, in their order; WebLoader", "tar", webdataset, needs="webdataset"),
    "monai": Way("LoadImaged of .nii.gz; Dataset, its DataLoader", "nii", monai(persistent=False), needs="monai"),
    "monai disk": Way("the same from the files of PersistentDataset", "nii", monai(persistent=True), needs="monai"),
    "torchio": Way("ScalarImage of .nii.gz; SubjectsDataset, SubjectsLoader", "nii", torchio, needs="torchio"),
}
OURS = ("packed raw", "packed", "packed volume", "dense f16", "dense i16")
LEFT_OUT = "monai's CacheDataset holds every volume in memory: it is a copy, see memcpy, and fits no cohort of 10,000"


# ---- is it what was asked for? ----------------------------------------------------------------------------------


def difference(data: Data, way: Way, rows: Rows, batch: Tensor) -> float:
    """Largest |found - source| over the source's largest value, of the batch's first scan."""
    i = int(rows[0])
    found, source = batch[0].numpy().astype(np.float64), data[i]
    if way.gives in ("packed", "stored", "normalised"):
        store = Store.open(data.folder / way.format)
        k = store.ids.index(f"{i:05}")
        of = {name: values[k].reshape(-1, *[1] * (source.ndim - 1)) for name, values in store.stats.items()}
        if way.gives == "packed":
            assert store.mask is not None
            full = np.zeros(source.shape)
            full[store.mask] = found
            found = np.where(store.mask, full * of["scale"] + of["offset"], 0)
        elif way.gives == "stored":
            found = found * of["scale"] + of["offset"]
        else:
            found = found * of["std"] + of["mean"]
    return float(np.abs(found - source).max() / np.abs(source).max())


def allowed(way: Way) -> float:
    """Half a unit in the last place of f16, and some more for the arithmetic in float32."""
    return 0.0 if way.gives == "source" else 2.0**-11


def check(data: Data, way: Way, read: Read) -> float:
    """Read all once; the largest difference. ValueError where scans are missing, come twice, or have other voxels."""
    seen: list[int] = []
    worst = 0.0
    for rows, batch in read(order(data.n, 0)):
        if way.gives != "packed" and (batch.dtype, tuple(batch.shape[1:])) != (torch.float32, data.shape):
            raise ValueError(f"batches are {batch.dtype} {tuple(batch.shape)}, not float32 of {data.shape}")
        seen += rows.tolist()
        worst = max(worst, difference(data, way, rows, batch))
    if sorted(seen) != list(range(data.n)):
        raise ValueError(f"{len(seen)} scans were read, {len(set(seen))} different ones, of {data.n}")
    if not worst <= allowed(way):
        raise ValueError(f"voxels differ from the source by {worst:.3g} of its largest value")
    return worst


def order(n: int, passes: int) -> list[Rows]:
    """The batches of one pass over n scans, in an order of its own for each pass."""
    return list(np.random.default_rng(passes).permutation(n).reshape(-1, BATCH))


# ---- a way, in a process of its own -----------------------------------------------------------------------------


def serve(pipe: Connection, name: str, data: Data, at_least: float) -> None:
    """Open the way and check it; then, for each message, read for `at_least` seconds and tell what it took."""
    try:
        mp.set_start_method("fork", force=True)  # of the peers' workers: what DataLoader does by default on Linux
        torch.set_num_threads(1)
        way = WAYS[name]
        read = way.open(data)
        told: dict[str, Any] = {"difference": check(data, way, read)}
        once = timed(data, read, 0, 1)  # warm; how often to repeat it
        passes = math.ceil(at_least / once["seconds"])
        pipe.send(told | held(data, read))
        for k in iter(pipe.recv, None):
            pipe.send(timed(data, read, k * passes, passes))
    except EOFError:  # the parent has gone
        pass
    except Exception as error:
        pipe.send({"not_run": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})


def timed(data: Data, read: Read, first: int, passes: int) -> dict[str, Any]:
    """Wall and CPU seconds, of the workers too, for some passes in random order; each batch is touched.

    The clock starts after some batches more: buffers are made and filled, and what was read ahead of it is used up.
    """
    lead = -(-LEAD * BATCH // data.n)  # passes that hold them
    batches = [rows for k in range(first, first + passes) for rows in order(data.n, k)]
    reading = read([rows for k in range(lead) for rows in order(data.n, k)][:LEAD] + batches)
    for _, batch in itertools.islice(reading, LEAD):
        batch[-1].flatten()[-1].item()
    volumes, cpu, began = 0, cpu_seconds(), time.perf_counter()
    for rows, batch in reading:
        batch[-1].flatten()[-1].item()
        volumes += len(rows)
    seconds = time.perf_counter() - began
    return {"volumes": volumes, "seconds": seconds, "cpu_seconds": cpu_seconds() - cpu}


def held(data: Data, read: Read) -> dict[str, Any]:
    """Memory over three epochs of one reading: the largest, and that at the end of each. Asking takes time."""
    found, ends, done = [memory()], list[int](), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            found.append(memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        volumes = 0
        for rows, _ in read([rows for k in range(3) for rows in order(data.n, k)]):
            volumes += len(rows)
            if volumes % data.n == 0:
                ends.append(memory())
    finally:
        done.set()
        watcher.join()
    return {"peak_bytes": max(found + ends), "epoch_bytes": ends}


def cpu_seconds() -> float:
    """Of this process, and of its workers to a hundredth; NaN where there is no /proc."""
    return time.process_time() + sum(map(_worker_seconds, _workers()))


def _worker_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime


def memory() -> int:
    """Bytes of this process and its workers: own pages, and a share of those that several processes map."""
    return sum(map(_proportional, (os.getpid(), *_workers())))


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # no /proc, or a worker that has just ended
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def _workers() -> list[int]:
    return [child.pid for child in mp.active_children() if child.pid is not None]


LIMIT = 600.0
"""Seconds without an answer after which a way is given up: a peer's forked workers may wait for each other for ever."""
ENDED = "its process ended"


class Contestant:
    """A way in its process, checked and warm. `with`, or the process stays."""

    def __init__(self, name: str, data: Data, at_least: float) -> None:
        # Fork from a small server that has the imports and no threads: a fork of this process might have both.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["zarr", "nibabel", "cauc_dist.bench.peers"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, data, at_least))
        self._process.start()
        theirs.close()
        self.told = self._receive()

    def round(self, k: int) -> dict[str, Any]:
        """What the k-th round took, or why it was not run."""
        try:
            self._pipe.send(k)
        except OSError:
            return {"not_run": ENDED}
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        if not self._pipe.poll(LIMIT):
            self._process.kill()
            return {"not_run": f"it said nothing for {LIMIT:.0f} s"}
        try:
            told: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            return {"not_run": ENDED}
        return told

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


# ---- all of them ------------------------------------------------------------------------------------------------


def contest(data: Data, names: Sequence[str], rounds: int, at_least: float, say: Say) -> dict[str, dict[str, Any]]:
    """By way: its rounds, or why it was not run."""
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        running = {}
        for name in names:
            results[name] = {"what": WAYS[name].what}
            if not installed(WAYS[name].needs):
                results[name]["not_run"] = f"{WAYS[name].needs} is not installed"
                continue
            one = stack.enter_context(Contestant(name, data, at_least))
            results[name] |= one.told
            if "not_run" not in one.told:
                running[name], results[name]["rounds"] = one, []
        for k in range(rounds):
            for name in list(running):
                told = running[name].round(k + 1)
                if "not_run" in told:
                    results[name] |= told
                    del running[name]
                else:
                    results[name]["rounds"].append(told)
            say(f"round {k + 1} of {rounds} is done")
    return results


def installed(package: str) -> bool:
    return not package or importlib.util.find_spec(package) is not None


def ratio(results: dict[str, dict[str, Any]], name: str, base: str = BASE) -> float | None:
    """Volumes a second over those of `base`: median of the rounds' ratios; None where one was not run."""
    ways = [results.get(one, {"not_run": ""}) for one in (name, base)]
    if any("not_run" in way for way in ways):
        return None
    ours, theirs = ([r["volumes"] / r["seconds"] for r in way["rounds"]] for way in ways)
    return float(median(a / b for a, b in zip(ours, theirs, strict=True)))


def table(results: dict[str, dict[str, Any]]) -> str:
    head = f"{'way':<14}{'volumes/s':>10}{'x ' + BASE:>15}{'CPU ms':>8}{'MiB':>7}  "
    lines = [head + "(CPU a volume; peak memory with its workers)"]
    for name, way in results.items():
        if "not_run" in way:
            lines.append(f"{name:<14}left out: {way['not_run']}")
            continue
        rate = median(r["volumes"] / r["seconds"] for r in way["rounds"])
        cpu = median(1000 * r["cpu_seconds"] / r["volumes"] for r in way["rounds"])
        times = ratio(results, name)
        shown = f"{name:<14}{rate:>10,.0f}{'' if times is None else f'{times:.2f}':>15}{cpu:>8.2f}"
        lines.append(f"{shown}{way['peak_bytes'] / MIB:>7,.0f}  {way['what']}")
    return "\n".join(lines)


def last_line(results: dict[str, dict[str, Any]]) -> str:
    found = [(name, ratio(results, name)) for name in results if name != BASE]
    told = ", ".join(f"{name} {times:.2f}" for name, times in found if times is not None)
    return f"volumes/s, as multiples of zarr-python's default with a DataLoader: {told or 'none was run'}"


def measure(
    names: Sequence[str], say: Say, *, n: int, shape: tuple[int, ...], rounds: int, at_least: float, folder: Path | None
) -> dict[str, Any]:
    """The record of a run: what it was, bytes of each format, the ways. Formats stay in `folder`, if any."""
    if n % BATCH:
        raise BadInput(f"{n} volumes", wanted=f"whole batches of {BATCH}", do=f"use {n // BATCH * BATCH + BATCH}")
    record = provenance()
    for package in {WAYS[name].needs for name in names} - {""}:
        record["versions"][package] = importlib.metadata.version(package) if installed(package) else "not installed"
    record |= {"question": (__doc__ or "").splitlines()[0], "n": n, "shape": shape, "batch": BATCH, "workers": WORKERS}
    record |= {"rounds": rounds, "at_least_s": at_least, "left_out": LEFT_OUT}
    began = time.perf_counter()
    with ExitStack() as stack:
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cauc-bench-")))
        here = Data(where, n, shape)
        record["bytes"] = write(here, [WAYS[name].format for name in names if installed(WAYS[name].needs)], say)
        record["ways"] = contest(here, names, rounds, at_least, say)
    record["minutes"] = (time.perf_counter() - began) / 60
    return record


def data(quick: bool, out: Path | None, say: Say, **how: Any) -> int:
    """`measure`, and its table said, the ratios last; 1 where one of ours failed. `quick`: under a minute.

    `out` gets the raw numbers as JSON. `how`: of `measure`, where it is to be other than here.
    """
    names = how.pop("names", [name for name in WAYS if not (quick and WAYS[name].needs)])
    size = {"n": 24, "rounds": 3, "at_least": 0.4} if quick else {"n": 192, "rounds": 7, "at_least": 2.0}
    record = measure(names, say, **({"shape": SHAPE, "folder": None} | size | how))
    if out is not None:
        save(record, out)
    say(table(record["ways"]))
    say(last_line(record["ways"]))
    return int(any("not_run" in way for name, way in record["ways"].items() if name in OURS))


def save(record: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
