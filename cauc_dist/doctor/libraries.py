"""What torch, its backends, triton, DeepSpeed and zarr say once imported: `python -m` this, a finding a line."""

import importlib
import os
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil

from cauc_dist.doctor import child
from cauc_dist.doctor.finding import Finding

GIB = 2**30
LEAST = 4 * GIB
"""Bytes of memory below which it is worth a warning. Ours."""
CPU_BUILD = "install a CUDA build: pytorch.org/get-started has the command for this driver"


def torch_() -> Iterator[Finding]:
    """The build of torch, against the machine's GPUs."""
    import torch

    driver, build = _driver(), torch.version.cuda
    found = f"{torch.__version__}, built for {f'CUDA {build}' if build else 'CPUs alone'}"
    if torch.cuda.is_available():
        yield Finding("torch", "ok", f"{found}, driver {driver or 'unknown'}")
    elif not build and driver:
        yield Finding("torch", "warn", f"{found}, on a machine with NVIDIA's driver {driver}", CPU_BUILD)
    elif not build:
        yield Finding("torch", "ok", found)
    elif driver and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("torch", "warn", f"{found}, and CUDA_VISIBLE_DEVICES hides all GPUs", "unset it, or name some")
    elif driver:
        do = "update the driver, or install torch for an older CUDA; see `nvidia-smi`"
        yield Finding("torch", "fail", f"{found}, and no GPU to be had with driver {driver}", do)
    else:
        yield Finding("torch", "ok", f"{found}; no NVIDIA driver on this machine: the CPU is used")


def _driver(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of the kernel's NVIDIA module; "" where there is none."""
    try:
        words = path.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "of unknown version")


def gpus() -> Iterator[Finding]:
    """Each GPU: memory, compute capability, and a sum computed on it."""
    import torch

    known = torch.cuda.get_arch_list() if torch.cuda.is_available() else []
    for i in range(torch.cuda.device_count()):
        told, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        found = (
            f"{i}: {told.name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free, capability {told.major}.{told.minor}"
        )
        try:
            right = float(torch.ones(1024, device=f"cuda:{i}").sum()) == 1024
        except RuntimeError as error:
            do = f"a torch that is built for it (this one: {', '.join(known)}), or CUDA_VISIBLE_DEVICES without it"
            yield Finding("gpu", "fail", f"{found}: {str(error).splitlines()[0]}", do)
            continue
        if not right:
            yield Finding("gpu", "fail", f"{found}: a sum on it is wrong", "leave it out by CUDA_VISIBLE_DEVICES")
        elif free < total / 2:
            yield Finding("gpu", "warn", found, "`nvidia-smi` shows who uses it")
        else:
            yield Finding("gpu", "ok", found)


def backends() -> Iterator[Finding]:
    """gloo and NCCL, as torch was built."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        do = "install torch from pytorch.org or PyPI: theirs have it"
        yield Finding("gloo", "fail", "torch was built without gloo, by which ranks on CPUs meet", do)
    else:
        yield Finding("gloo", "ok", "part of torch")
    if not torch.cuda.is_available():
        yield Finding("nccl", "ok", "not needed without a GPU")
    elif dist.is_nccl_available():
        version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        yield Finding("nccl", "ok", ".".join(map(str, version)))
    else:
        do = "install torch from pytorch.org or PyPI: theirs have it"
        yield Finding("nccl", "fail", "torch was built without NCCL, by which ranks on GPUs meet", do)


def triton() -> Iterator[Finding]:
    """Which the fused losses on GPUs are compiled by."""
    import torch

    gpu = torch.cuda.is_available()
    if find_spec("triton"):
        yield Finding("triton", "ok", metadata.version("triton") + " (used on GPUs)" * (not gpu))
    elif gpu:
        yield Finding("triton", "warn", "not here: losses on GPUs take the slower way", "python -m pip install triton")
    else:
        yield Finding("triton", "ok", "not here, and not needed without a GPU")


def memory() -> Iterator[Finding]:
    """What is free, and what a job or a container may use of it."""
    from cauc_dist.memory import limits

    told, limit = psutil.virtual_memory(), min(limits())
    may = min(told.available, limit)
    found = f"{told.available / GIB:.3g} of {told.total / GIB:.3g} GiB available"
    found += f", {limit / GIB:.3g} GiB allowed to this job or container" if limit < told.total else ""
    do = "ask for more (--mem of SLURM, --memory of docker), or engine.encode_chunk auto" * (may < LEAST)
    yield Finding("memory", "warn" if do else "ok", found, do)


def deepspeed() -> Iterator[Finding]:
    """Whether it imports, with the accelerator that it would take."""
    import torch

    gpu, asked = torch.cuda.is_available(), os.environ.get("DS_ACCELERATOR")
    if asked == "cuda" and not gpu:
        found = "DS_ACCELERATOR is cuda, and torch has no GPU here"
        yield Finding("deepspeed", "fail", found, "unset DS_ACCELERATOR: runs on CPUs set it themselves")
        return
    if not gpu:  # as the engine does: else it looks for a GPU, and says that it guesses
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    module = importlib.import_module("deepspeed")  # only to see whether it does; the engine alone works with it
    if asked == "cpu" and gpu:
        found = f"{module.__version__}, and DS_ACCELERATOR is cpu on a machine with a GPU"
        yield Finding("deepspeed", "warn", found, "unset DS_ACCELERATOR, or train with --engine.device cpu")
    else:
        yield Finding("deepspeed", "ok", f"{module.__version__} imports, DS_ACCELERATOR {asked or 'not set'}")


def arrays() -> Iterator[Finding]:
    """zarr and numcodecs, by which stores are read; their versions are held to their ranges elsewhere."""
    for name in ("zarr", "numcodecs"):
        yield Finding(name, "ok", f"{importlib.import_module(name).__version__} imports")


CHECKS = {
    "torch": torch_,
    "gpu": gpus,
    "gloo": backends,
    "triton": triton,
    "memory": memory,
    "deepspeed": deepspeed,
    "zarr": arrays,
}

if __name__ == "__main__":
    child.each(CHECKS)
