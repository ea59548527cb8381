"""What a step needs, measured on a subject before training, and how many subjects at once fit a budget.

b subjects a rank, V views, W ranks.
"""

import contextlib
import math
import os
import resource
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cauc_dist import encoders, optimisers
from cauc_dist.config import RunConfig
from cauc_dist.world import World

GIB = 2**30
OVERHEAD, RECOMPUTED = 1.3, 4.0
"""What a backward pass holds over what was saved for it; and where it computes blocks again (measured: 2.5 to 3.8)."""


class Need(NamedTuple):
    """Bytes of a rank: whatever the batch, and for each subject that is encoded at once."""

    fixed: float
    each: float

    def of(self, subjects: int) -> float:
        return self.fixed + subjects * self.each


def need(model: nn.Module, run: RunConfig, shape: tuple[int, ...], world_size: int, device: torch.device) -> Need:
    """Parameters, gradients and optimiser; and what the encoder keeps of a subject for its backward pass.

    Costs a forward pass of a subject. A collective where the encoder has BatchNorm. Random numbers are left alone.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    state = 1 + len(optimisers.moments(run.optim))  # ZeRO: a copy of the weights, and the moments
    partitions = world_size if run.engine.zero_stage else 1
    fixed = parameters * (2 + state / partitions + (run.optim.ema > 0))
    x = torch.zeros((run.augment.views, *shape), device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), encoders.frozen():
        each = kept(model.train(), x)
    if device.type == "cuda":  # of the measuring, nothing shall count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    volumes = 4 * math.prod(shape) * (run.data.prefetch + 1 if device.type == "cpu" else 1)
    return Need(fixed, (RECOMPUTED if run.engine.recompute else OVERHEAD) * each + volumes)


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes of what model(x) keeps for its backward pass, x among it and parameters not."""
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = model(x)  # storages stay where they are as long as the graph holds them
    total = sum(found.values())
    del alive
    return total


def budget(run: RunConfig, world: World, device: torch.device) -> float:
    """Bytes that this rank may use, as `engine.memory_gib` has it."""
    if run.engine.memory_gib is not None:
        return run.engine.memory_gib * GIB
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    return min(float(psutil.virtual_memory().available), *limits()) / 2 / world.local_size


def limits() -> list[float]:
    """Bytes that a job may use on this host: SLURM's, and those of the control groups that this process is in."""
    found, env = [math.inf], os.environ
    if "SLURM_MEM_PER_NODE" in env:  # in MiB, as the next
        found.append(float(env["SLURM_MEM_PER_NODE"]) * 2**20)
    if "SLURM_MEM_PER_CPU" in env and "SLURM_CPUS_ON_NODE" in env:
        found.append(float(env["SLURM_MEM_PER_CPU"]) * float(env["SLURM_CPUS_ON_NODE"]) * 2**20)
    with contextlib.suppress(OSError):
        own = Path("/proc/self/cgroup").read_text().partition("0::/")[2].partition("\n")[0]
        for group in (Path("/sys/fs/cgroup", own), *Path("/sys/fs/cgroup", own).parents):
            if (text := group / "memory.max").is_file() and (limit := text.read_text().strip()) != "max":
                found.append(float(limit))
    return found


def chunk(budget: float, need: Need, share: int) -> int:
    """Subjects that are encoded at once: all of the share where they fit, one at least."""
    return max(1, min(share, int((budget - need.fixed) / need.each)))


def peak(device: torch.device) -> int:
    """The most bytes that this process has used so far: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
