"""Rank and size come whole from the environment, or the run is refused."""

import pytest
import torch

from cauc_dist.errors import BadInput
from cauc_dist.world import World, loopback_interface

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_without_rank_variables_the_world_is_this_process() -> None:
    assert World.from_env({}) == World(0, 0, 1)


def test_the_elastic_agents_variables_are_taken() -> None:
    assert World.from_env(TORCHRUN) == World(rank=5, local_rank=1, world_size=8)


def test_half_a_world_is_refused_and_the_missing_half_named() -> None:
    half = {name: value for name, value in TORCHRUN.items() if not name.startswith("MASTER")}
    with pytest.raises(BadInput, match=r"RANK, .* set but not MASTER_ADDR, MASTER_PORT"):
        World.from_env(half)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test does without")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(BadInput, match=r"no CUDA device.*--engine.device cpu"):
        World().device("cuda")


def test_a_world_of_one_has_a_process_group_and_leaves_it() -> None:
    import torch.distributed as dist

    with World().process_group(torch.device("cpu")):
        x = torch.ones(1)
        dist.all_reduce(x)
        assert (dist.get_world_size(), x.item()) == (1, 1.0)
    assert not dist.is_initialized()


def test_the_loopback_interface_exists() -> None:
    import socket

    assert loopback_interface() in [name for _, name in socket.if_nameindex()]
