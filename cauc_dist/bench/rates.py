"""What the machine itself gives: products of matrices, copies of memory, reads of a disk, an all-reduce.

W ranks. Rates are the best of what was measured: what a run could have at most, when nothing else goes on.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cauc_dist.bench.projection import Link, hops
from cauc_dist.gather import _all_gather

PIECE = 4 * 2**20
"""Bytes that a thread reads at a time."""


def best(act: Callable[[], object], seconds: float, device: torch.device, least: int = 3) -> float:
    """Seconds of the fastest of many calls; at least `least`, and for as long as `seconds`, after one to warm up."""
    act()
    found, deadline = list[float](), time.perf_counter() + seconds
    while len(found) < least or time.perf_counter() < deadline:
        found.append(once(act, device))
    return min(found)


def once(act: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; a GPU is waited for."""
    wait(device)
    began = time.perf_counter()
    act()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def products(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of torch.mm on square matrices, with this process's threads."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.rand(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * side**3 / best(lambda: torch.mm(a, a, out=out), seconds, device)


def copies(threads: int, size: int, seconds: float = 0.5) -> float:
    """Copies of `size` bytes a second, from memory to memory, by `threads` threads."""
    n = max(2 * threads, min(64, 2**28 // size))  # beyond what caches hold, within 256 MiB
    source, target = np.ones((n, size), np.uint8), np.ones((n, size), np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        took = best(lambda: list(pool.map(np.copyto, target, source)), seconds, torch.device("cpu"), least=2)
    return n / took


def disk(files: Sequence[Path], threads: int, most: int) -> float:
    """Bytes a second of reading files that the system has forgotten, up to `most` bytes in all."""
    pieces = _pieces(files, most)
    forget(files)
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        read = sum(pool.map(_read, pieces))
        return read / (time.perf_counter() - began)


def forget(files: Sequence[Path]) -> None:
    """Ask the system to drop what it holds of these files in memory; it does so for what is on a disk already."""
    for file in files if hasattr(os, "posix_fadvise") else ():
        number = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(number)


def _pieces(files: Sequence[Path], most: int) -> list[tuple[Path, int]]:
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, PIECE)]
    return pieces[: max(1, most // PIECE)]


def _read(piece: tuple[Path, int]) -> int:
    with piece[0].open("rb", buffering=0) as file:
        file.seek(piece[1])
        return len(file.read(PIECE))


def link(numbers: int, device: torch.device) -> Link:
    """What an all-reduce of so many fp32 numbers gives, beside one of a single number. A collective.

    Taken for a ring: each rank sends 2 (W - 1) / W of the bytes, in 2 (W - 1) messages one after the other.
    """
    world = dist.get_world_size()
    if world == 1:
        return Link()
    small, large = (reduced(n, device) for n in (1, numbers))
    moved = 2 * (world - 1) / world * 4 * numbers
    return Link(moved / max(large - small, 1e-9), small / (2 * hops(world, ring=device.type == "cpu")))


def reduced(numbers: int, device: torch.device) -> float:
    """Seconds of an all-reduce of fp32 numbers, the best of five. A collective."""
    x = torch.zeros(numbers, device=device)
    return together(lambda: dist.all_reduce(x), device)


def gathered(numbers: int, device: torch.device) -> float:
    """Seconds of an all-gather of that many fp32 numbers from each rank, the best of five. A collective."""
    ours = torch.zeros(max(1, numbers), device=device)
    everyones = ours.new_empty(dist.get_world_size() * len(ours))
    return together(lambda: _all_gather(everyones, ours), device)


def together(act: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of five calls, each begun by all ranks at once. A collective."""
    found = []
    for _ in range(5):
        dist.barrier()
        found.append(once(act, device))
    return min(found)
