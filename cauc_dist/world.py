"""Who this process is among its peers, and the life of their process group."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from cauc_dist.errors import BadInput

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The place of this process: a value, so that a test can make one of any size without processes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "World":
        """Rank and size from the variables that torch's elastic agent sets; a world of one where there are none.

        Raises BadInput where only some of them are set: half a world would train alone, in silence.
        """
        found = [name for name in RANK_VARIABLES if name in env]
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return cls()
        if len(found) < len(RANK_VARIABLES):
            missing = ", ".join(name for name in RANK_VARIABLES if name not in env)
            raise BadInput(
                f"{', '.join(found)} set but not {missing}",
                wanted="all of a launcher's rank variables, or none of them",
                do="start with `cauc train RECIPE --ranks N` or with torchrun, or unset them",
            )
        return cls(int(env["RANK"]), int(env["LOCAL_RANK"]), int(env["WORLD_SIZE"]))

    def device(self, wanted: str = "auto") -> torch.device:
        """`cuda:local_rank` where CUDA is to be had, else the CPU; `wanted` forces one of them."""
        if wanted == "cuda" and not torch.cuda.is_available():
            raise BadInput(
                "no CUDA device",
                wanted="a GPU, since engine.device is cuda",
                do="use --engine.device cpu, or install a CUDA build of torch",
            )
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank)

    @contextlib.contextmanager
    def process_group(self, device: torch.device, timeout_minutes: float = 10.0) -> Iterator[None]:
        """Join the default process group (gloo on CPUs, NCCL on GPUs) and leave it at the end.

        A world of one has its group too: there is one path through the code, whatever the size.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with _loopback(self.world_size):
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=HashStore() if self.world_size == 1 else None,  # nobody to meet
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(minutes=timeout_minutes),
            )
        try:
            yield
        finally:
            # After an error the peers may never reach a barrier: leave without one, and let them see the closed socket.
            if sys.exc_info()[0] is None:
                dist.barrier()
            dist.destroy_process_group()


@contextlib.contextmanager
def _loopback(world_size: int) -> Iterator[None]:
    """Keep a world of one off the network: a host name that resolves to 127.0.1.1 stalls gloo for 42 s."""
    if world_size > 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = loopback_interface()
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def cores() -> int:
    """CPU cores that this process may use; a job's share of the machine where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loopback_interface() -> str:
    """The name of the loopback interface: lo on Linux, lo0 on macOS."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
