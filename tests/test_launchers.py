"""Ranks started by mpiexec, torchrun and as SLURM would, on one host and on two; and what is said of one that is gone.

Real processes and a real MPI. The two hosts are namespaces of this machine with a network between them (needs root).
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cauc_dist import journal
from cauc_dist.cli import main
from tests.test_cli import SMALL

ROOT = Path(__file__).parents[1]
MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
CAUC = [sys.executable, "-m", "cauc_dist"]
SECONDS = 110

pytestmark = pytest.mark.timeout(300)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def call(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment(**env))


def begin(stack: ExitStack, *command: str, **env: str) -> subprocess.Popen[str]:
    """A process that is killed, if it still runs, when the stack is left."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(**env))
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def step(rank: int, ranks: int, nodes: str, ranks_a_node: int) -> dict[str, str]:
    """What srun sets for one task."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % ranks_a_node),
        "SLURM_NODEID": str(rank // ranks_a_node),
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_TASKS_PER_NODE": f"{ranks_a_node}(x{ranks // ranks_a_node})",
        "SLURM_STEP_NODELIST": nodes,
    }


def explicit(rank: int, ranks: int, port: int, **more: str) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def curve(run: Path) -> list[float]:
    return [event["loss"] for event in journal.read(run) if event["event"] == "step"]


# ---- cauc train and cauc resume, started as ranks -----------------------------------------------------------------


@pytest.fixture(scope="module")
def options(store: Path) -> list[str]:
    return ["demo_cauc", "--data.store", str(store), *SMALL]


@pytest.fixture(scope="module")
def one(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("one") / "run"
    done = call(*CAUC, "train", *options, "--run", str(run))
    assert done.returncode == 0, done.stderr
    return curve(run)


def test_ranks_of_mpiexec_have_the_curve_of_one_process(options: list[str], one: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        MPIEXEC,
        "-n",
        "3",
        sys.executable,
        "-m",
        "mpi4py",
        "-m",
        "cauc_dist",
        "train",
        *options,
        "--run",
        str(run),
    ]
    done = call(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1
    assert "batch 6 = 3 ranks x 2" in done.stdout
    assert len(one) == 3
    assert curve(run) == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_ranks_of_torchrun_have_the_curve_of_one_process_and_resume(
    options: list[str], one: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = [*TORCHRUN, "--nproc-per-node", "2", "-m", "--", "cauc_dist"]  # without --, torchrun looks into --run
    done = call(*started, "train", *options, "--run", str(run), "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert curve(run) == pytest.approx(one, rel=1e-4, abs=1e-6)
    again = call(*started, "resume", str(run))
    assert again.returncode == 0, again.stderr
    assert "from step 3" in again.stdout


@pytest.mark.parametrize(
    ("wrong", "message", "code"),
    [
        (["--batch-size", "99"], "error: batch_size 99 for 18 training subjects", 2),
        (["--ranks", "4"], r"error: --ranks 4 on each of 2 processes that are ranks already \(slurm\)", 2),
        (["--nonsense"], "Unrecognized options: --nonsense", 2),
        (["--run", "pyproject.toml/x"], r"error: .*Check the path, its permissions and the disk\.", 2),
        (["--help"], "", 0),
    ],
)
def test_what_rank_0_refuses_all_refuse_and_it_is_said_once(
    options: list[str], tmp_path: Path, wrong: list[str], message: str, code: int
) -> None:
    command = [*CAUC, "train", *options, "--run", str(tmp_path / "run"), *wrong]
    with ExitStack() as stack:
        ranks = [begin(stack, *command, **step(rank, 2, "localhost", 2)) for rank in range(2)]
        said = [rank.communicate(timeout=SECONDS) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, code]
    assert re.search(message, said[0][1])
    assert said[1] == ("", "")
    assert not (tmp_path / "run").exists()


BROKEN = """
import sys, time
import cauc_dist.train
from cauc_dist.cli import main
from cauc_dist.world import World

def train(folder, **_):
    if World.from_env().rank != 1:
        time.sleep(1000)
    {how}

cauc_dist.train.main = train
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("how", "code", "said"), [("return 6", 6, ""), ("1 / 0", 1, "ZeroDivisionError")])
def test_a_rank_of_mpiexec_that_fails_ends_all(
    options: list[str], tmp_path: Path, how: str, code: int, said: str
) -> None:
    script = BROKEN.format(how=how)
    command = [sys.executable, "-c", script, "train", *options, "--run", str(tmp_path / "run")]
    done = call(MPIEXEC, "-n", "2", *command)
    assert done.returncode == code
    assert said in done.stderr


# ---- an MPI that is not the one of mpi4py -------------------------------------------------------------------------

ALONE = "import sys; from cauc_dist.cli import main; {}sys.exit(main(['train', 'demo_cauc']))"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4, and mpi4py (MPICH"),
        ({"PMI_RANK": "2"}, "PMI_RANK is 2, and mpi4py (MPICH"),
        ({**step(0, 1, "n1", 1), "OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4, and mpi4py"),
        ({**step(0, 1, "n1", 1), "PMI_SIZE": "4"}, "PMI_SIZE is 4, and mpi4py"),  # mpirun inside SLURM is innermost
    ],
)
def test_a_process_of_many_that_mpi4py_sees_alone_is_refused(env: dict[str, str], message: str) -> None:
    done = call(sys.executable, "-c", ALONE.format(""), **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert "sees rank 0 of 1; wanted the mpiexec of the MPI library that mpi4py loads" in done.stderr
    assert done.stderr.count("\n") == 1


def test_mpiexec_without_mpi4py_is_refused() -> None:
    done = call(sys.executable, "-c", ALONE.format("sys.modules['mpi4py'] = None; "), PMI_SIZE="2", PMI_RANK="0")
    assert done.returncode == 2
    assert "MPI started this process, and mpi4py does not load (" in done.stderr


@pytest.mark.parametrize("env", [{}, {"PMI_SIZE": "1", "PMI_RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}])
def test_a_process_alone_loads_neither_mpi_nor_torch_to_know_it(env: dict[str, str]) -> None:
    code = (
        "import sys; from cauc_dist.world import World; assert World.from_env() == World();"
        "sys.exit(bool({'mpi4py', 'torch'} & set(sys.modules)))"
    )
    done = call(sys.executable, "-c", code, **env)
    assert done.returncode == 0, done.stderr


# ---- ranks that are gone, frozen, or never came -------------------------------------------------------------------

RANK = """
import sys
import torch
import torch.distributed as dist
from cauc_dist.errors import BadInput
from cauc_dist.world import World

world = World.from_env()
try:
    with world.process_group(torch.device("cpu"), start_minutes=float(sys.argv[1])):
        again = dist.new_group()  # as DeepSpeed makes them
        dist.all_reduce(torch.ones(1), group=again)
        world.shorten(2 / 60)
        print(f"{world.rank} is here", flush=True)
        try:
            while sys.argv[2] != "off":
                if sys.argv[2] == f"rank {world.rank} fails":
                    raise BadInput("a bad scan", wanted="a good one", do="mend it")
                dist.all_reduce(torch.ones(1), group=again)
        except RuntimeError:
            print([world.name(rank) for rank in world.missing()], *world.failed, flush=True)
            sys.exit(6)
except BadInput as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("number", "victim", "agent"),
    [(signal.SIGKILL, 1, False), (signal.SIGKILL, 0, False), (signal.SIGSTOP, 0, False), (signal.SIGSTOP, 0, True)],
)
def test_the_others_say_which_rank_was_killed_or_frozen(number: signal.Signals, victim: int, agent: bool) -> None:
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent else None
    port = server.port if server else free_port()
    with ExitStack() as stack:
        more = {"TORCHELASTIC_USE_AGENT_STORE": str(agent)}
        command = [sys.executable, "-c", RANK, "1", "on"]
        ranks = [begin(stack, *command, **explicit(rank, 3, port, **more)) for rank in range(3)]
        for rank, process in enumerate(ranks):
            assert process.stdout is not None
            assert process.stdout.readline() == f"{rank} is here\n"
        ranks[victim].send_signal(number)
        others = [process for rank, process in enumerate(ranks) if rank != victim]
        said = [process.communicate(timeout=30) for process in others]
    gone = f"['rank {victim} (host {socket.gethostname()}, pid {ranks[victim].pid})']\n"
    assert [out for out, _ in said] == [gone] * 2, said
    assert [process.returncode for process in others] == [6, 6]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_ends_by_an_error_of_its_own_is_not_taken_for_gone(culprit: int) -> None:
    port = free_port()
    with ExitStack() as stack:
        command = [sys.executable, "-c", RANK, "1", f"rank {culprit} fails"]
        ranks = [begin(stack, *command, **explicit(rank, 3, port)) for rank in range(3)]
        said = [process.communicate(timeout=30) for process in ranks]
    assert [process.returncode for process in ranks] == [1 if rank == culprit else 6 for rank in range(3)]
    for rank, (out, error) in enumerate(said):
        if rank == culprit:
            assert "a bad scan; wanted a good one" in error
        else:
            assert out == f"{rank} is here\n[] {culprit}\n", said


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank 1, 2 of 3 did not come in 0.05 minutes; wanted every rank"),
        (1, rf"rank 1 on {socket.gethostname()} found no rank 0 at 127.0.0.1:\d+ in 0.05 minutes; wanted all 3 ranks"),
    ],
)
def test_a_rank_whose_peers_do_not_come_says_so(rank: int, message: str) -> None:
    done = call(sys.executable, "-c", RANK, "0.05", "off", **explicit(rank, 3, free_port()))
    assert done.returncode == 1
    assert re.search(message, done.stderr)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        done = call(sys.executable, "-c", RANK, "0.05", "off", **explicit(0, 2, port))
    assert done.returncode == 1
    assert f"rank 0 cannot listen on port {port} (" in done.stderr
    assert "; wanted a free port. Set MASTER_PORT" in done.stderr


# ---- two hosts ----------------------------------------------------------------------------------------------------


class Host:
    """A machine by name: a network, a host name and an /etc/hosts of its own, which gives that name 127.0.1.1."""

    def __init__(self, i: int, folder: Path, stack: ExitStack) -> None:
        hosts = folder / f"hosts{i}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 n{i}\n10.77.0.{3 - i} n{3 - i}\n")
        setup = f"mount --bind {hosts} /etc/hosts && hostname n{i} && ip link set lo up && echo up && exec sleep 1000"
        self.process = subprocess.Popen(
            ["unshare", "-nmu", "sh", "-c", setup], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        stack.enter_context(self.process)
        stack.callback(self.process.kill)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "up\n":
            pytest.skip("no namespaces here: needs Linux and root")
        self.enter = ["nsenter", "-t", str(self.process.pid), "-n", "-m", "-u"]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with ExitStack() as stack:
        try:
            two = [Host(i, tmp_path, stack) for i in (1, 2)]
        except FileNotFoundError:
            pytest.skip("no unshare here: needs Linux and root")
        ends = [word for i, host in enumerate(two, 1) for word in (f"v{i}", "netns", str(host.process.pid))]
        subprocess.run(["ip", "link", "add", *ends[:3], "type", "veth", "peer", "name", *ends[3:]], check=True)
        for i, host in enumerate(two, 1):
            subprocess.run([*host.enter, "ip", "addr", "add", f"10.77.0.{i}/24", "dev", f"v{i}"], check=True)
            subprocess.run([*host.enter, "ip", "link", "set", f"v{i}", "up"], check=True)
        yield two


def test_mpiexec_on_two_hosts_trains_as_one(
    hosts: list[Host], options: list[str], one: list[float], tmp_path: Path
) -> None:
    """With a `ssh` that enters the other host: called as `ssh -x n2 COMMAND`."""
    run, ssh = tmp_path / "run", tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\nshift 2\nexec {" ".join(hosts[1].enter)} sh -c "$*"\n')
    ssh.chmod(0o755)
    start = [MPIEXEC, "-launcher", "ssh", "-launcher-exec", str(ssh), "-hosts", "n1,n2", "-ppn", "2", "-n", "4"]
    done = call(*hosts[0].enter, *start, *CAUC, "train", *options, "--run", str(run))
    assert done.returncode == 0, done.stderr
    assert curve(run) == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_ranks_are_not_asked_for_twice_nor_below_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", "none", "--ranks", "-1"]) == 2
    assert "--ranks -1; wanted 1 or more processes" in capsys.readouterr().err
