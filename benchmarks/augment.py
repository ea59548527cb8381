"""What does a view cost: the published y-Aware chain on volumes of 121 x 145 x 121, on one CPU thread?

    python benchmarks/augment.py --out benchmarks/results/DATE-augment.json      # on a quiet machine, 5 minutes
    python benchmarks/augment.py --quick --out /tmp/augment.json                 # a minute

The chain (`all_tf`): z-normalisation, flip, blur of U(.1, 1) voxels, noise of U(.1, 1), cutout of a quarter of each
side, crop to three quarters resized back, each of the five with probability 1/2. Contestants:

ours       cauc_dist.augment; the mean and the standard deviation of a scan are known, as they are from a store
monai      its transforms       pip install monai
torchio    its transforms       pip install torchio
published  the chain as published: numpy, scipy.ndimage, skimage.transform.resize       pip install scikit-image

All have the same scans, and the same of the five transforms for the same view: those that `ours` draws. What is left of
chance (sizes of blurs, places of boxes) is each library's own. They run in turn in one process, A B C D A B C D ...;
ratios are medians of those of neighbours. Peak memory is that of a process that runs one contestant.
A peer that is not installed is left out. None may bring torchvision: it can replace torch by another build.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cauc_dist.augment import draws, views
from cauc_dist.config import PRESETS, Augment, Transform
from cauc_dist.provenance import provenance

SHAPE = (121, 145, 121)
CROP = tuple(int(np.ceil(0.75 * side)) for side in SHAPE)
CUT = tuple(int(np.ceil(0.25 * side)) for side in SHAPE)
CHAIN = PRESETS["all_tf"]
SCANS = 4
TARGET = 3.5
"""Times our CPU time that MONAI's is to be."""
PEERS = {"monai": ("monai", "monai"), "torchio": ("torchio", "torchio"), "published": ("skimage", "scikit-image")}
"""Contestant: module and distribution."""
MIB = 2**20

Array = NDArray[Any]
Steps = dict[str, Callable[[Any], Any]]


def scans() -> Array:
    """(SCANS, 1, *SHAPE) fp32: smooth values on a ball, 0 outside; about three quarters are 0, as in real maps."""
    grid = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in SHAPE), indexing="ij")
    inside = sum(axis**2 for axis in grid) < 0.6
    waves = [np.sin(7 * axis + k) for k, axis in enumerate(grid)]
    return np.stack([inside * (2 + waves[k % 3] * waves[(k + 1) % 3]) for k in range(SCANS)])[:, None]


def drawn(key: int, epoch: int) -> list[list[str]]:
    """The transforms of each of the two views of a scan, in order."""
    gates = draws(0, epoch, np.array([key], np.uint64), CHAIN.views, CHAIN.order)[:, :, 0, 0] < 0.5
    return [[name for name, on in zip(CHAIN.order, gates[:, view], strict=True) if on] for view in range(CHAIN.views)]


# ---- contestants: a scan and its key -> its views, one by one ---------------------------------------------------


class Ours:
    def __init__(self, volumes: Array) -> None:
        self.stats = [(float(v.mean()), float(v.std())) for v in volumes]

    def __call__(self, v: Array, key: int, epoch: int) -> Iterator[Tensor]:
        mean, std = self.stats[key]
        x = torch.from_numpy(v).sub(mean).div_(std)
        yield from views(x[None], [key], seed=0, epoch=epoch, augment=CHAIN)


class Peer:
    """A chain from single transforms."""

    steps: Steps
    normalise: Callable[[Array], Any]

    def __call__(self, v: Array, key: int, epoch: int) -> Iterator[Any]:
        for names in drawn(key, epoch):
            x = self.normalise(v)
            for name in names:
                x = self.steps[name](x)
            yield x


class Monai(Peer):
    def __init__(self, volumes: Array) -> None:
        import monai.transforms as m
        from monai.data import set_track_meta
        from monai.utils import set_determinism

        set_determinism(0)
        set_track_meta(False)  # the faster of its two ways: plain tensors
        norm, resize = m.NormalizeIntensity(), m.Resize(SHAPE, mode="trilinear")
        crop = m.RandSpatialCrop(CROP, random_size=False)
        self.normalise = lambda v: norm(torch.from_numpy(v))
        self.steps = {
            "flip": m.RandAxisFlip(prob=1.0),
            "blur": m.RandGaussianSmooth((0.1, 1), (0.1, 1), (0.1, 1), prob=1.0),
            "noise": m.RandGaussianNoise(prob=1.0, std=1.0),  # of U(0, 1)
            "cutout": m.RandCoarseDropout(holes=1, spatial_size=CUT, fill_value=0, prob=1.0),
            "crop": lambda x: resize(crop(x)),
        }


class Torchio(Peer):
    """It has no cutout, and no crop of a random place: those are slices."""

    def __init__(self, volumes: Array) -> None:
        import torchio

        torch.manual_seed(0)
        norm, resize = torchio.ZNormalization(), torchio.Resize(SHAPE)
        random = np.random.default_rng(0)

        def cutout(x: Tensor) -> Tensor:
            x = x.clone()
            x[box(CUT, random)] = 0
            return x

        self.normalise = lambda v: norm(torch.from_numpy(v))
        self.steps = {
            "flip": lambda x: torchio.RandomFlip(axes=(int(random.integers(3)),), flip_probability=1)(x),
            "blur": torchio.RandomBlur(std=(0.1, 1)),
            "noise": torchio.RandomNoise(std=(0.1, 1)),
            "cutout": cutout,
            "crop": lambda x: resize(x[box(CROP, random)].contiguous()),
        }


class Published(Peer):
    """As in the code of arXiv 2106.08808, but that flip and blur leave the axis of channels alone."""

    def __init__(self, volumes: Array) -> None:
        from scipy.ndimage import gaussian_filter
        from skimage.transform import resize

        random = np.random.default_rng(0)

        def noise(x: Array) -> Array:
            return x + np.random.normal(0, random.uniform(0.1, 1), [2, *x.shape])[0]  # two channels drawn, one used

        def blur(x: Array) -> Array:
            sd = random.uniform(0.1, 1)
            blurred: Array = gaussian_filter(x, (0, sd, sd, sd))
            return blurred

        def cutout(x: Array) -> Array:
            x = np.copy(x)
            x[box(CUT, random)] = 0
            return x

        self.normalise = lambda v: (v - np.mean(v)) / (np.std(v) + 1e-8)
        self.steps = {
            "flip": lambda x: np.flip(x, int(random.integers(1, 4))),
            "blur": blur,
            "noise": noise,
            "cutout": cutout,
            "crop": lambda x: resize(x[box(CROP, random)], (1, *SHAPE), preserve_range=True),
        }

    def __call__(self, v: Array, key: int, epoch: int) -> Iterator[Tensor]:
        for x in super().__call__(v, key, epoch):
            yield torch.as_tensor(np.ascontiguousarray(x), dtype=torch.float)


CONTESTANTS: dict[str, Callable[[Array], Callable[[Array, int, int], Iterator[Any]]]] = {
    "ours": Ours,
    "monai": Monai,
    "torchio": Torchio,
    "published": Published,
}


def box(sides: Sequence[int], random: np.random.Generator) -> tuple[slice, ...]:
    starts = [int(random.integers(n - side + 1)) for n, side in zip(SHAPE, sides, strict=True)]
    return (slice(None), *(slice(a, a + side) for a, side in zip(starts, sides, strict=True)))


def absent(who: str) -> bool:
    return who in PEERS and importlib.util.find_spec(PEERS[who][0]) is None


# ---- measuring --------------------------------------------------------------------------------------------------


def once(contestant: Callable[[Array, int, int], Iterator[Any]], volumes: Array, epoch: int) -> dict[str, float]:
    """All views of all scans in an epoch: ms of CPU and of wall a view; the mean of their standard deviations."""
    spread: list[float] = []
    cpu, wall = 0.0, 0.0
    for key, v in enumerate(volumes):
        started = time.process_time(), time.perf_counter()
        made = list(contestant(v, key, epoch))  # a generator does its work here
        cpu, wall = cpu + time.process_time() - started[0], wall + time.perf_counter() - started[1]
        for view in made:
            assert tuple(view.shape) == (1, *SHAPE)
            spread.append(float(view.std()))
    return {"cpu_ms": cpu / len(spread) * 1e3, "wall_ms": wall / len(spread) * 1e3, "spread": float(np.mean(spread))}


def contest(names: Sequence[str], epochs: int) -> dict[str, list[dict[str, float]]]:
    """In turn, epoch by epoch, after a warm-up; the same views for all."""
    volumes = scans()
    contestants = {name: CONTESTANTS[name](volumes) for name in names}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for epoch in range(-1, epochs):
        for name, contestant in contestants.items():
            result = once(contestant, volumes, max(epoch, 0))
            if epoch >= 0:
                found[name].append(result)
    return found


def alone(transforms: Sequence[Transform]) -> dict[str, float]:
    """ms of CPU a view of each of ours with p = 1 and nothing else, and of the copy that every view is (`none`)."""
    x = torch.from_numpy(scans())
    found: dict[str, float] = {}
    for name in (None, *transforms):
        on = {f"p_{other}": float(other == name) for other in get_args(Transform)}
        augment: Augment = replace(CHAIN, order=get_args(Transform), **on)  # type: ignore[arg-type]
        seconds = []
        for epoch in range(4):
            start = time.process_time()
            for key in range(len(x)):
                views(x[key : key + 1], [key], seed=0, epoch=epoch, augment=augment)
            seconds.append((time.process_time() - start) / len(x) / augment.views)
        found[name or "none"] = median(seconds[1:]) * 1e3
    return found


def peak(name: str) -> dict[str, Any]:
    """Growth of the largest resident memory while views are made one scan at a time."""
    volumes = scans()
    contestant = CONTESTANTS[name](volumes)
    drop(contestant(volumes[0], 0, 0))  # what is imported at the first use
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    for epoch in range(4):
        for key, v in enumerate(volumes):
            drop(contestant(v, key, epoch))
    return {"peak_bytes": status("VmHWM") - before, "how": "VmHWM, reset by clear_refs, minus VmRSS before"}


def drop(made: Iterator[Any]) -> None:
    for _ in made:
        pass


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_NUM_THREADS"), "1")
ONE_THREAD["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # torchio resizes and blurs by SimpleITK


def child(task: str, *arguments: str) -> Any:
    """The result of a task in a process of its own, or why there is none."""
    command = [sys.executable, str(Path(__file__).resolve()), "--task", task, *arguments]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"not_run": f"ended with {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def benchmark(quick: bool) -> dict[str, Any]:
    names = [name for name in CONTESTANTS if not absent(name)]
    record = provenance()
    for package in (*(distribution for _, distribution in PEERS.values()), "scipy", "simpleitk"):
        record["versions"][package] = version(package)
    record |= {"question": (__doc__ or "").splitlines()[0], "threads": 1, "shape": SHAPE, "target": TARGET}
    record["left_out"] = [f"{name}: {PEERS[name][1]} is not installed" for name in PEERS if name not in names]
    record["contest"] = child("contest", "2" if quick else "12", *names)
    record["memory"] = {name: child("peak", name) for name in names}
    record["alone_ms"] = child("alone")
    return record


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---- what came out ----------------------------------------------------------------------------------------------


def ratio(record: dict[str, Any], name: str, what: str = "cpu_ms") -> float:
    """Its time over ours: the median over epochs, in each of which both made the same views."""
    pairs = zip(record["contest"]["ours"], record["contest"][name], strict=True)
    return float(median(theirs[what] / ours[what] for ours, theirs in pairs))


def summary(record: dict[str, Any]) -> str:
    if "not_run" in record["contest"]:
        return f"not run: {record['contest']['not_run']}"
    lines = ["           CPU ms a view    wall    times ours    peak MiB    spread of the views"]
    for name, epochs in record["contest"].items():
        cpu, wall, spread = (float(np.mean([e[what] for e in epochs])) for what in ("cpu_ms", "wall_ms", "spread"))
        memory = record["memory"][name].get("peak_bytes")
        shown = "-" if memory is None else f"{memory / MIB:.0f}"
        lines.append(f"{name:10} {cpu:13.1f} {wall:7.1f} {ratio(record, name):13.2f} {shown:>11} {spread:22.3f}")
    lines.append("one by one, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in record["alone_ms"].items()))
    lines += record["left_out"]
    if "monai" in record["contest"]:
        found = ratio(record, "monai")
        lines.append(f"{'met   ' if found >= TARGET else 'MISSED'}  CPU time of monai: {found:.2f} (target {TARGET})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="where the JSON goes")
    task.add_argument("--show", type=Path, help="a result: print its table again, run nothing")
    task.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    a = parser.parse_args()
    if a.task is not None:
        torch.set_num_threads(1)
        what, *arguments = a.task
        if what == "contest":
            print(json.dumps(contest(arguments[1:], int(arguments[0]))))
        else:
            print(json.dumps(peak(arguments[0]) if what == "peak" else alone(in_3d())))
        return
    record = json.loads(a.show.read_text()) if a.show else benchmark(a.quick)
    if a.out is not None:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(record, indent=1) + "\n")
    print(summary(record))


def in_3d() -> list[Transform]:
    return [name for name in get_args(Transform) if name not in ("colour", "grey")]


if __name__ == "__main__":
    main()
