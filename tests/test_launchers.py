"""Ranks started by mpiexec, torchrun and as SLURM would, on one host and on two; and what is said of one that is gone.

Real processes and a real MPI. The two hosts are namespaces of this machine with a network between them (needs root).
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from cauc_dist import journal
from cauc_dist.cli import main
from cauc_dist.errors import BadInput
from cauc_dist.world import World
from tests.ranks import codes, fork, train
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
    assert main(["train", *options, "--run", str(run), "--no-start"]) == 0
    assert train(run, 1) == [0]
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


def test_ranks_of_open_mpi_have_the_curve_of_one_process_beside_another_mpi(
    options: list[str], one: list[float], tmp_path: Path
) -> None:
    """mpi4py's wheel would load MPICH, which is there, and end every process."""
    mpiexec = shutil.which("mpiexec.openmpi")
    if mpiexec is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("no Open MPI: apt-get install openmpi-bin")
    run, as_root = tmp_path / "run", ["--allow-run-as-root"] if os.getuid() == 0 else []
    start = [mpiexec, *as_root, "--oversubscribe", "-n", "3", sys.executable, "-m", "cauc_dist"]
    done = call(*start, "train", *options, "--run", str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1
    assert curve(run) == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_ranks_of_torchrun_have_the_curve_of_one_process(options: list[str], one: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = [*TORCHRUN, "--nproc-per-node", "2", "-m", "--", "cauc_dist"]  # without --, torchrun looks into --run
    done = call(*started, "train", *options, "--run", str(run), "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert curve(run) == pytest.approx(one, rel=1e-4, abs=1e-6)


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
    words = ["train", *options, "--run", str(tmp_path / "run"), *wrong]
    ranks = forked(tmp_path, [step(rank, 2, "localhost", 2) for rank in range(2)], main, words)
    assert ends(ranks) == [code, code]
    assert re.search(message, ranks[0].err)
    assert (ranks[1].out, ranks[1].err) == ("", "")
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

OURS = {"MPI4PY_LIBMPI": str(Path(sys.prefix) / "lib" / "libmpi.so.12")}
"""The user's word, against what the variables of the process say."""
ALONE = "import sys; from cauc_dist.cli import main; {}sys.exit(main(['train', 'demo_cauc']))"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4", **OURS}, "OMPI_COMM_WORLD_SIZE is 4, and mpi4py (MPICH"),
        ({"PMI_RANK": "2"}, "PMI_RANK is 2, and mpi4py (MPICH"),
        ({**step(0, 1, "n1", 1), "OMPI_COMM_WORLD_SIZE": "4", **OURS}, "OMPI_COMM_WORLD_SIZE is 4, and mpi4py"),
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


def member(minutes: float, what: str) -> int:
    """A rank that meets the others and calls a collective again and again, unless it is `off`."""
    import torch
    import torch.distributed as dist

    world = World.from_env()
    try:
        with world.process_group(torch.device("cpu"), start_minutes=minutes):
            again = dist.new_group()  # as DeepSpeed makes them
            dist.all_reduce(torch.ones(1), group=again)
            world.shorten(2 / 60)
            print(f"{world.rank} is here", flush=True)
            try:
                while what != "off":
                    if what == f"rank {world.rank} fails":
                        raise BadInput("a bad scan", wanted="a good one", do="mend it")
                    dist.all_reduce(torch.ones(1), group=again)
            except RuntimeError:
                print([world.name(rank) for rank in world.missing()], *world.failed, flush=True)
                return 6
    except BadInput as error:
        print(error, file=sys.stderr)
        return 1
    return 0


@dataclass
class Rank:
    """A forked process, and what it says."""

    process: BaseProcess
    log: Path

    @property
    def out(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def err(self) -> str:
        return Path(f"{self.log}.err").read_text()


def forked(folder: Path, envs: Sequence[dict[str, str]], fn: Callable[..., int], *args: Any) -> list[Rank]:
    """A process for each environment."""
    logs = [folder / f"rank-{i}" for i in range(len(envs))]
    made = [fork(fn, *args, log=log, env=environment(**env)) for log, env in zip(logs, envs, strict=True)]
    return [Rank(process, log) for process, log in zip(made, logs, strict=True)]


def ends(ranks: Sequence[Rank], seconds: float = SECONDS) -> list[int | None]:
    return codes([rank.process for rank in ranks], seconds)


@pytest.mark.parametrize(
    ("number", "victim", "agent"),
    [(signal.SIGKILL, 1, False), (signal.SIGKILL, 0, False), (signal.SIGSTOP, 0, False), (signal.SIGSTOP, 0, True)],
)
def test_the_others_say_which_rank_was_killed_or_frozen(
    number: signal.Signals, victim: int, agent: bool, tmp_path: Path
) -> None:
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent else None
    port = server.port if server else free_port()
    more = {"TORCHELASTIC_USE_AGENT_STORE": str(agent)}
    ranks = forked(tmp_path, [explicit(rank, 3, port, **more) for rank in range(3)], member, 1.0, "on")
    deadline = time.monotonic() + SECONDS
    while any(rank.out != f"{i} is here\n" for i, rank in enumerate(ranks)):
        assert time.monotonic() < deadline, [rank.err for rank in ranks]
        time.sleep(0.02)
    pid = ranks[victim].process.pid
    assert pid is not None
    os.kill(pid, number)
    others = [rank for rank in ranks if rank is not ranks[victim]]
    assert ends(others, 30) == [6, 6]
    assert ends([ranks[victim]], 0) == [-9]
    gone = f"['rank {victim} (host {socket.gethostname()}, pid {pid})']\n"
    assert [rank.out.partition("\n")[2] for rank in others] == [gone] * 2


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_ends_by_an_error_of_its_own_is_not_taken_for_gone(culprit: int, tmp_path: Path) -> None:
    port = free_port()
    ranks = forked(tmp_path, [explicit(rank, 3, port) for rank in range(3)], member, 1.0, f"rank {culprit} fails")
    assert ends(ranks, 60) == [1 if rank == culprit else 6 for rank in range(3)]
    for i, rank in enumerate(ranks):
        if i == culprit:
            assert "a bad scan; wanted a good one" in rank.err
        else:
            assert rank.out == f"{i} is here\n[] {culprit}\n"


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank 1, 2 of 3 did not come in 0.05 minutes; wanted every rank"),
        (1, rf"rank 1 on {socket.gethostname()} found no rank 0 at 127.0.0.1:\d+ in 0.05 minutes; wanted all 3 ranks"),
    ],
)
def test_a_rank_whose_peers_do_not_come_says_so(rank: int, message: str, tmp_path: Path) -> None:
    alone = forked(tmp_path, [explicit(rank, 3, free_port())], member, 0.05, "off")
    assert ends(alone) == [1]
    assert re.search(message, alone[0].err)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        alone = forked(tmp_path, [explicit(0, 2, port)], member, 0.05, "off")
        assert ends(alone) == [1]
    assert f"rank 0 cannot listen on port {port} (" in alone[0].err
    assert "; wanted a free port. Set MASTER_PORT" in alone[0].err


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
    start = [MPIEXEC, "-launcher", "ssh", "-launcher-exec", str(ssh), "-hosts", "n1,n2", "-ppn", "1", "-n", "2"]
    done = call(*hosts[0].enter, *start, *CAUC, "train", *options, "--run", str(run))
    assert done.returncode == 0, done.stderr
    assert curve(run) == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_ranks_are_not_asked_for_twice_nor_below_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", "none", "--ranks", "-1"]) == 2
    assert "--ranks -1; wanted 1 or more processes" in capsys.readouterr().err
