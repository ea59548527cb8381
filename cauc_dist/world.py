"""Who this process is among its peers, how they find each other, and the life of their process group.

Whatever started it: explicit variables (torchrun, our own `--ranks`), else a SLURM step, else MPI, else it is alone.
"""

import contextlib
import ipaddress
import json
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

from cauc_dist.errors import BadInput

if TYPE_CHECKING:  # the command line asks who it is before it needs torch
    import torch
    from torch._C._distributed_c10d import Store

EXPLICIT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
)
MPI_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI and others of its family
MPI_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
GRACE = 3.0  # seconds in which peers come, where they come at all
LOOPBACK = "127.0.0.1"
# Keys of the store, by rank: it answers the roll call, ends by an error of its own, knows who has answered.
ROLL, FAILED, KNOWS = "roll", "failed", "knows"


@dataclass
class _Meeting:
    """What a world holds while it lives: its store, and what its ranks have said there."""

    store: "Store | None" = None
    listening: socket.socket | None = None
    """Rank 0's under MPI, bound before the others heard of its port."""
    names: tuple[str, ...] = ()
    called: bool = False
    """A roll call was asked for here."""
    failed: tuple[int, ...] = ()
    """Ranks that have ended by an error of their own, as a roll call found."""


@dataclass(frozen=True)
class World:
    """The place of this process: a value, so that a test can make one of any size without processes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_size: int = 1
    """Ranks on this host."""
    master: str = LOOPBACK
    """Host of the store in which the ranks meet."""
    port: int = 0
    agent: bool = False
    """The store is the launcher's (torchrun's agent, our `--ranks`), not rank 0's."""
    source: str = "single"
    """Where all this comes from: single, environment, slurm or mpi."""
    _meeting: _Meeting = field(default_factory=_Meeting, init=False, repr=False, compare=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "World":
        """The place that a launcher gave this process; under MPI a collective.

        Raises BadInput where variables contradict each other or MPI: part of a world would train alone, in silence.
        """
        if "RANK" in env or "WORLD_SIZE" in env:
            return _from_variables(env)
        if "SLURM_STEP_ID" in env and not _mpirun_within_slurm(env):  # a batch script has no step: it is one process
            return _from_slurm(env)
        if any(name in env for name in MPI_SIZE + MPI_RANK) or "mpi4py.MPI" in sys.modules:
            return _from_mpi(env)
        return cls()

    def device(self, wanted: str = "auto") -> "torch.device":
        """`cuda:local_rank` where CUDA is to be had, else the CPU; `wanted` forces one of them."""
        import torch

        if wanted == "cuda" and not torch.cuda.is_available():
            raise BadInput(
                "no CUDA device",
                wanted="a GPU, since engine.device is cuda",
                do="use --engine.device cpu, or install a CUDA build of torch",
            )
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        # srun --gpus-per-task and the like show each rank its own GPU only.
        alone = self.source in ("slurm", "mpi") and torch.cuda.device_count() == 1
        return torch.device("cuda", 0 if alone else self.local_rank)

    @contextlib.contextmanager
    def process_group(self, device: "torch.device", start_minutes: float = 30.0) -> Iterator[None]:
        """Join the default process group (gloo on CPUs, NCCL on GPUs) and leave it at the end.

        A rank that waits longer than `start_minutes` for another fails, until `shorten` says less. A world of one has
        its group too: there is one path through the code, whatever the size.
        """
        import torch
        import torch.distributed as dist
        from torch._C._distributed_c10d import HashStore

        if device.type == "cuda":
            torch.cuda.set_device(device)
        interface = self._meet(start_minutes)
        with _socket_interface(interface):
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=self._meeting.store or HashStore(),  # a world of one has nobody to meet
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(minutes=start_minutes),
            )
            over = threading.Event()
            answering = threading.Thread(target=self._answer, args=(over,), daemon=True)
            answering.start()
            try:
                yield
            finally:
                over.set()
                fails = sys.exc_info()[0] is not None and not self._meeting.called
                # After an error the peers may never reach a barrier: without one, they see closed sockets.
                if fails:
                    self._note(FAILED)
                elif not self._meeting.called:
                    dist.barrier()
                answering.join(GRACE)
                dist.destroy_process_group()
                if fails:
                    self._linger()

    def _answer(self, over: threading.Event) -> None:
        """Answer a roll call while the rank computes: it may meet the closed sockets only at the end of its step."""
        store = self._meeting.store
        with contextlib.suppress(RuntimeError):  # the store is gone
            while store is not None and not over.wait(0.5) and not self._meeting.called:
                if store.check([ROLL]):
                    self._note(ROLL)
                    return

    def _note(self, what: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone
            if self._meeting.store is not None:
                self._meeting.store.set(f"{what}/{self.rank}", "")

    def _linger(self) -> None:
        """Rank 0's store ends with it: the others hear first that it was an error of its own."""
        store, deadline = self._meeting.store, time.monotonic() + GRACE
        if self.rank or self.agent or store is None:
            return
        others = range(1, self.world_size)
        while time.monotonic() < deadline:
            if all(any(store.check([f"{what}/{rank}"]) for what in (FAILED, KNOWS)) for rank in others):
                return
            time.sleep(0.05)

    def shorten(self, timeout_minutes: float) -> None:
        """From now on a collective that waits longer fails, in DeepSpeed's groups too: theirs begin with torch's 30."""
        from torch.distributed import distributed_c10d as c10d

        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)

    def missing(self, seconds: float = GRACE) -> tuple[int, ...]:
        """Ranks that do not answer within `seconds`; to be asked by every rank whose collective has failed.

        () where all answer, or where nothing can be known. Where the store is gone, rank 0 is: it was its host. One
        that has ended by an error of its own is not missing, but in `failed` from now on.
        """
        self._meeting.called, store = True, self._meeting.store
        if store is None:
            return ()
        absent, failed, ended = set(range(self.world_size)), set[int](), threading.Event()

        def listen() -> None:
            deadline = time.monotonic() + seconds
            with contextlib.suppress(RuntimeError):  # the store is gone
                store.set(ROLL, "")
                self._note(ROLL)
                while absent and time.monotonic() < deadline:
                    failed.update(r for r in absent if store.check([f"{FAILED}/{r}"]))
                    absent.difference_update([r for r in absent if store.check([f"{ROLL}/{r}"])], failed)
                    time.sleep(0.05)
                if failed:  # else rank 0 does not wait for it, and its store may be gone
                    self._note(KNOWS)
                ended.set()

        # A thread: a frozen host's store neither answers nor fails.
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        thread.join(seconds + 1)
        self._meeting.failed = tuple(sorted(failed))
        if not ended.is_set() and self.agent:
            return ()
        # A rank 0 that has answered, and ended since, is not missing.
        return (0,) if not ended.is_set() and 0 in absent else tuple(sorted(absent))

    @property
    def failed(self) -> tuple[int, ...]:
        """Ranks that have ended by an error of their own, which they have told: what the last `missing` found."""
        return self._meeting.failed

    @property
    def names(self) -> tuple[str, ...]:
        """What each rank is called in a message: `rank 3 (host n2, pid 4242)` once they have met."""
        return self._meeting.names or tuple(f"rank {rank}" for rank in range(self.world_size))

    def name(self, rank: int) -> str:
        """What that rank is called in a message."""
        return self.names[rank]

    def tell(self, say: Callable[[], str]) -> str:
        """What `say` returns on rank 0, where alone it is called, on every rank; before there is a process group.

        Rank 0 returns when all have heard: it may end then, and its store with it.
        """
        store = self._open(30.0)
        store.set_timeout(timedelta(days=1))  # `say` may take its time; a dead rank 0 closes the store
        if self.rank == 0:
            store.set("said", say())
        said = store.get("said").decode()
        if store.add("heard", 1) == self.world_size:
            store.set("all heard", "")
        if self.rank == 0:
            store.wait(["all heard"])
        return said

    def end(self, code: int) -> None:
        """Say how this process ends. Under MPI a failed rank ends the others, unless all come here within seconds.

        MPI_Finalize, at the exit of Python, would wait for ever for a rank that does not come.
        """
        if self.source != "mpi" or code == 0:
            return
        from mpi4py import MPI
        from mpi4py.run import set_abort_status

        sys.stdout.flush()
        everyone, deadline = MPI.COMM_WORLD.Ibarrier(), time.monotonic() + GRACE
        while not everyone.Test() and time.monotonic() < deadline:
            time.sleep(0.05)
        if not everyone.Test():
            set_abort_status(code)

    def _open(self, minutes: float) -> "Store":
        """The store in which the ranks meet: rank 0's, or the launcher's. Opened again, it is the same one."""
        from torch._C._distributed_c10d import PrefixStore, TCPStore
        from torch.distributed import DistError

        hosts = self.rank == 0 and not self.agent
        listening, self._meeting.listening = self._meeting.listening, None
        try:
            store = TCPStore(
                self.master,
                self.port,
                is_master=hosts,
                timeout=timedelta(minutes=minutes),
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=listening.detach() if listening else None,
            )
        except DistError as error:
            if hosts:
                raise BadInput(
                    f"rank 0 cannot listen on port {self.port} ({str(error).splitlines()[0]})",
                    wanted="a free port",
                    do="set MASTER_PORT to another one",
                ) from None
            raise BadInput(
                f"rank {self.rank} on {socket.gethostname()} found no rank 0 at {self.master}:{self.port} "
                f"in {minutes:g} minutes",
                wanted=f"all {self.world_size} ranks, at the same time",
                do="look at what rank 0 said, whether that name is known here, and whether a firewall closes that port",
            ) from None
        # torchrun keeps its store when it starts the ranks again.
        self._meeting.store = PrefixStore(f"cauc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        return self._meeting.store

    def _meet(self, minutes: float) -> str | None:
        """Learn who the ranks are; the interface through which this one reaches those of other hosts."""
        here = f"host {socket.gethostname()}, pid {os.getpid()}"
        if self.world_size == 1:
            self._meeting.names = (f"rank 0 ({here})",)
            return loopback_interface()
        from torch.distributed import DistError

        store = self._open(minutes)
        own, theirs = (LOOPBACK, LOOPBACK) if self.rank == 0 else route(self.master, self.port)
        with_rank_0 = own == theirs or ipaddress.ip_address(own).is_loopback
        store.set(f"rank/{self.rank}", json.dumps(("" if with_rank_0 else own, here)))
        keys = [f"rank/{rank}" for rank in range(self.world_size)]
        try:
            said = [json.loads(text) for text in store.multi_get(keys)]
        except DistError:
            absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            raise BadInput(
                f"rank {', '.join(absent)} of {self.world_size} did not come in {minutes:g} minutes",
                wanted="every rank that the launcher was asked for",
                do="look at what they said, and at the nodes that they were started on",
            ) from None
        self._meeting.names = tuple(f"rank {rank} ({who})" for rank, (_, who) in enumerate(said))
        # From rank 0's host the way goes to another one: its own name may be 127.0.1.1 there.
        peer = next((address for address, _ in said if address), None)
        if peer is None:
            return loopback_interface()
        return interface_of(route(peer, self.port)[0] if with_rank_0 else own)


def _from_variables(env: Mapping[str, str]) -> World:
    rank, local_rank, size, port = _numbers(env, EXPLICIT, "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    if not 0 <= rank < size:
        raise BadInput(
            f"RANK {rank} of WORLD_SIZE {size}",
            wanted="ranks from 0 to WORLD_SIZE - 1",
            do="mend what sets them: it counts from 0, over all machines",
        )
    return World(
        rank,
        local_rank,
        size,
        local_size=int(env.get("LOCAL_WORLD_SIZE", size)),
        master=env["MASTER_ADDR"],
        port=port,
        agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        source="environment",
    )


def _mpirun_within_slurm(env: Mapping[str, str]) -> bool:
    """Whether mpirun started this process, and SLURM only mpirun's daemons; `srun --mpi=pmi2` sets PMI_SIZE, too."""
    inner = int(env.get("PMI_SIZE", "1"))
    return int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 or (
        inner > 1 and env["PMI_SIZE"] != env.get("SLURM_STEP_NUM_TASKS")
    )


def _from_slurm(env: Mapping[str, str]) -> World:
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    rank, local_rank, size, node, job, step = _numbers(env, (*SLURM, "SLURM_STEP_ID"), *names)
    return World(
        rank,
        local_rank,
        size,
        local_size=tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[node],
        master=first_host(env["SLURM_STEP_NODELIST"]),
        # Known to every task without asking; below the ports that systems give to clients (32768 and up).
        port=int(env.get("MASTER_PORT", 10007 + (16 * job + step) % 19997)),
        source="slurm",
    )


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: n1 of `n[1-3,07],m2`."""
    first = re.match(r"(?:[^,\[]|\[[^]]*])+", nodelist)
    assert first is not None, nodelist
    return re.sub(r"\[(\w+)[^]]*]", r"\1", first[0])


def tasks_per_node(text: str) -> list[int]:
    """SLURM's counts, written out: 2, 2, 1 of `2(x2),1`."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _from_mpi(env: Mapping[str, str]) -> World:
    if [env[name] for name in MPI_SIZE if name in env] == ["1"]:
        return World()
    # mpi4py's wheels would load MPICH where it is beside them, and that would end the process.
    if MPI_SIZE[0] in env and not {"MPI4PY_MPIABI", "MPI4PY_LIBMPI"} & env.keys():
        os.environ["MPI4PY_MPIABI"] = "openmpi"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another MPI's variables: what is wrong is said below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BadInput(
            f"MPI started this process, and mpi4py does not load ({error})",
            wanted="mpi4py and the MPI library whose mpiexec is used",
            do="install cauc-dist[mpi] and that MPI",
        ) from None
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    for name, found in [*((name, size) for name in MPI_SIZE), *((name, rank) for name in MPI_RANK)]:
        if env.get(name, str(found)) != str(found):
            library = MPI.Get_library_version().split("\n")[0].replace("\t", " ")
            raise BadInput(
                f"{name} is {env[name]}, and mpi4py ({library}) sees rank {rank} of {size}",
                wanted="the mpiexec of the MPI library that mpi4py loads",
                do=f"use {sys.prefix}/bin/mpiexec where the library came by pip, or set MPI4PY_LIBMPI",
            )
    if size == 1:
        return World()
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=rank)
    # DeepSpeed insists on Open MPI's own count of local ranks.
    local_rank, local_size = int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", node.Get_rank())), node.Get_size()
    node.Free()
    listening = _listen(everywhere=local_size < size) if rank == 0 else None
    host = MPI.Get_processor_name() if local_size < size else LOOPBACK
    master, port = comm.bcast((host, listening.getsockname()[1]) if listening else None)
    world = World(rank, local_rank, size, local_size=local_size, master=master, port=port, source="mpi")
    world._meeting.listening = listening
    return world


def _listen(everywhere: bool) -> socket.socket:
    """A socket on a free port, which stays this process's until the store takes it."""
    if everywhere and socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("" if everywhere else LOOPBACK, 0))


def _numbers(env: Mapping[str, str], wanted: tuple[str, ...], *names: str) -> list[int]:
    """The numbers `names`; BadInput where one of `wanted` is not set, or one of `names` is no number."""
    missing = [name for name in wanted if name not in env]
    if missing:
        raise BadInput(
            f"{', '.join(name for name in wanted if name in env)} set but not {', '.join(missing)}",
            wanted="all of a launcher's rank variables, or none of them",
            do="start with `cauc train RECIPE --ranks N`, torchrun, srun or mpiexec, or unset them",
        )
    try:
        return [int(env[name]) for name in names]
    except ValueError:
        found = " ".join(f"{name}={env[name]}" for name in names)
        raise BadInput(found, wanted="numbers", do="mend what sets them, or unset them") from None


@contextlib.contextmanager
def _socket_interface(name: str | None) -> Iterator[None]:
    """gloo and NCCL on one interface while groups live, unless the user said which.

    Left alone, gloo takes the address of the host's own name: 127.0.1.1 (Debian's default) stalls it for 42 s.
    """
    wanted = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}
    added = {key: value for key, value in wanted.items() if value and key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def route(host: str, port: int) -> tuple[str, str]:
    """(address of this host, that host's) on the way to it. Nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as way:
        way.connect(address)
        return way.getsockname()[0], way.getpeername()[0]


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address."""
    found = psutil.net_if_addrs().items()
    return next((name for name, has in found if address in [a.address.split("%")[0] for a in has]), None)


def cores() -> int:
    """CPU cores that this process may use; a job's share of the machine where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loopback_interface() -> str:
    """The name of the loopback interface: lo on Linux, lo0 on macOS."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
