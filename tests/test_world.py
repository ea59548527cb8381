"""Rank and size come whole from what a launcher sets, or the run is refused."""

import ipaddress
import os
import socket

import psutil
import pytest
import torch
import torch.distributed as dist

from cauc_dist.errors import BadInput
from cauc_dist.world import World, first_host, interface_of, loopback_interface, route, tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
BATCH = {"SLURM_JOB_ID": "4242", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "5"}
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}


def test_without_rank_variables_the_world_is_this_process() -> None:
    assert World.from_env({}) == World(0, 0, 1)


def test_torchruns_variables_are_taken() -> None:
    expected = World(5, 1, 8, local_size=4, master="10.0.0.7", port=29500, agent=True, source="environment")
    assert World.from_env(TORCHRUN) == expected


def test_a_slurm_step_is_a_world_and_the_batch_script_around_it_is_alone() -> None:
    found = World.from_env(STEP)
    assert found == World(3, 1, 5, local_size=2, master="gpu07", port=found.port, source="slurm")
    assert World.from_env({**STEP, "SLURM_NODEID": "2"}).local_size == 1
    assert World.from_env(BATCH) == World()


def test_explicit_variables_count_more_than_slurms_and_slurms_more_than_those_of_its_own_pmi() -> None:
    assert World.from_env({**STEP, **TORCHRUN}).source == "environment"
    assert World.from_env({**STEP, "PMI_RANK": "3", "PMI_SIZE": "5", "PMIX_RANK": "3"}).source == "slurm"


def test_steps_and_jobs_that_run_at_once_have_ports_of_their_own_below_those_of_clients() -> None:
    def port(job: int, step: int, **more: str) -> int:
        return World.from_env({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), **more}).port

    ports = {port(job, step) for job in range(900000, 901000) for step in range(16)}
    assert len(ports) == 16000
    assert min(ports) > 1023
    assert max(ports) < 32768
    assert port(1, 0, MASTER_PORT="555") == 555


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n[1-3,07],m2", "n1"),
        ("gpu[007-010]", "gpu007"),
        ("m2,n[1-3]", "m2"),
        ("r[2-3]c[4,9]-x", "r2c4-x"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,16(x2)", [1, 16, 16])])
def test_slurms_counts_of_tasks_written_out(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {name: value for name, value in TORCHRUN.items() if not name.startswith("MASTER")},
            "RANK, LOCAL_RANK, WORLD_SIZE set but not MASTER_ADDR, MASTER_PORT; wanted all",
        ),
        ({**BATCH, "SLURM_STEP_ID": "0"}, r"SLURM_STEP_ID set but not SLURM_STEP_NUM_TASKS, .*NODELIST; wanted all"),
        ({**TORCHRUN, "RANK": "8"}, "RANK 8 of WORLD_SIZE 8; wanted ranks from 0 to WORLD_SIZE - 1"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 MASTER_PORT=http; wanted numbers"),
    ],
)
def test_half_a_world_and_an_impossible_one_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        World.from_env(env)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test does without")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(BadInput, match=r"no CUDA device.*--engine.device cpu"):
        World().device("cuda")


def test_a_world_of_one_has_a_process_group_and_leaves_it() -> None:
    world = World()
    assert World(1, 1, 2).names == ("rank 0", "rank 1")
    with world.process_group(torch.device("cpu")):
        x = torch.ones(1)
        dist.all_reduce(x)
        world.shorten(0.1)
        assert (dist.get_world_size(), x.item(), world.missing()) == (1, 1.0, ())
        assert world.name(0) == f"rank 0 (host {socket.gethostname()}, pid {os.getpid()})"
    assert not dist.is_initialized()


def test_the_loopback_interface_exists_and_has_the_loopback_addresses() -> None:
    assert loopback_interface() in [name for _, name in socket.if_nameindex()]
    assert interface_of("127.0.0.1") == loopback_interface()
    assert interface_of("192.0.2.1") is None  # an address of documentation (RFC 5737)


def test_the_way_to_a_name_of_this_machine_ends_on_this_machine() -> None:
    """127.0.1.1 is what Debian gives a machine's own name."""
    own = [a.address for has in psutil.net_if_addrs().values() for a in has if a.family == socket.AF_INET]
    for address in [*own, "127.0.1.1"]:
        ours, theirs = route(address, 9)
        assert ours == theirs or ipaddress.ip_address(ours).is_loopback
