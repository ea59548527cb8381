"""Ranks of this machine meet and add up numbers, as in a training: gloo on CPUs, and NCCL where there are GPUs.

`python -m cauc_dist.doctor.handshake start N` starts them; each is `python -m cauc_dist.doctor.handshake DEVICE`.
"""

import sys
import time
from collections.abc import Iterator, Sequence

from cauc_dist import spawn
from cauc_dist.doctor import child
from cauc_dist.doctor.finding import Finding
from cauc_dist.errors import BAD_INPUT, BadInput
from cauc_dist.world import World

MODULE = "cauc_dist.doctor.handshake"
MINUTES, NUMBERS = 0.75, 2**20
SECONDS = 100.0
DO = "see the lines on interfaces and variables above; a firewall on this machine may close its own ports"


def handshake(ranks: int) -> Iterator[Finding]:
    """`ranks` processes, by gloo; then a process a GPU, `ranks` at most, by NCCL."""
    return child.findings("handshake", "-m", MODULE, "start", str(ranks), seconds=SECONDS, do=DO)


def meet(device: str) -> None:
    """One rank: 4 MiB of its own are summed with those of the others; rank 0 tells."""
    import torch
    import torch.distributed as dist

    world, began = World.from_env(), time.perf_counter()
    place = world.device(device)
    with world.process_group(place, start_minutes=MINUTES):
        x = torch.full((NUMBERS,), float(world.rank + 1), device=place)
        dist.all_reduce(x)
        right = bool((x == world.world_size * (world.world_size + 1) / 2).all())
        seconds = time.perf_counter() - began
        if world.rank == 0:
            child.tell([_told(dist.get_backend(), world.world_size, right, seconds)])


def _told(backend: str, ranks: int, right: bool, seconds: float) -> Finding:
    found = f"{ranks} rank{'s' * (ranks > 1)} of this machine by {backend}, in {seconds:.2g} s"
    if right:
        return Finding("handshake", "ok", f"{found}: their sum is right")
    return Finding("handshake", "fail", f"{found}: their sum is wrong", f"try another torch, or {backend} by itself")


def main(arguments: Sequence[str]) -> int:
    """The exit code: of the ranks that failed first, where they did."""
    if arguments[0] != "start":
        try:
            meet(arguments[0])
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT
        return 0
    import torch

    ranks, gpus = int(arguments[1]), torch.cuda.device_count()
    code = spawn.start(ranks, "cpu", module=MODULE)
    return spawn.start(min(ranks, gpus), "cuda", module=MODULE) if gpus and not code else code


if __name__ == "__main__":
    spawn.leave(main(sys.argv[1:]))
