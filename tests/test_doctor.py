"""The doctor looks at this machine for real; what is wrong with one is made here, and found with its mend."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from cauc_dist import doctor, durable
from cauc_dist.cli import main
from cauc_dist.doctor import child, disk, handshake, libraries, machine, network, slurm, software, stores
from cauc_dist.doctor.finding import Finding, Look
from cauc_dist.world import loopback_interface
from tests.faults import small_disk

Program = Callable[..., None]
Patch = pytest.MonkeyPatch


@pytest.fixture
def program(tmp_path: Path, monkeypatch: Patch) -> Program:
    """Writes a program of the shell's; those alone are on PATH, with `sleep`."""
    place, shell = tmp_path / "bin", shutil.which("sh")
    place.mkdir()
    (place / "sleep").symlink_to(str(shutil.which("sleep")))
    monkeypatch.setenv("PATH", str(place))

    def write(*names: str, text: str) -> None:
        for name in names:
            (place / name).write_text(f"#!{shell}\n{text}\n")
            (place / name).chmod(0o755)

    return write


def only(found: Iterator[Finding]) -> tuple[str, str, str]:
    """State, finding and mend of the one that there is."""
    (one,) = found
    return one.state, one.found, one.do


# ---- all of it ----------------------------------------------------------------------------------------------------


def test_the_doctor_says_each_line_as_it_is_known_and_scripts_get_the_same(
    store: Path, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine without SLURM, whatever is installed."""
    monkeypatch.setenv("PATH", "")
    code = main(["doctor", "--folder", str(tmp_path), "--store", str(store), "--json"])
    told = capsys.readouterr()
    found = [Finding(**each) for each in json.loads(told.out)]
    assert [str(f) in told.err for f in found] == [True] * len(found)
    assert code == int(any(f.state == "fail" for f in found))
    states = {f.name: f.state for f in found}
    wanted = (
        "python versions torch gloo deepspeed zarr numcodecs interfaces handshake slurm locks rename speed store scans"
    )
    assert {name: states.get(name) for name in wanted.split()} == dict.fromkeys(wanted.split(), "ok")
    counts = [sum(f.state == state for f in found) for state in ("ok", "warn", "fail")]
    assert told.err.splitlines()[-1] == "{} ok, {} warn, {} fail".format(*counts)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_the_first_lines_need_no_torch(tmp_path: Path) -> None:
    text = (
        "import os, sys; from pathlib import Path; from cauc_dist.doctor import doctor\n"
        "def say(line):\n"
        "    if line.split()[1] == 'mpi': print('torch' in sys.modules, flush=True); os._exit(0)\n"
        f"doctor(None, Path({str(tmp_path)!r}), say=say)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_a_finding_is_a_line_and_a_second_one_with_its_mend() -> None:
    assert str(Finding("disk", "ok", "3 GiB free")) == "ok    disk        3 GiB free"
    mended = f"fail  disk        full\n{'':18}-> remove something"
    assert str(Finding("disk", "fail", "full", "remove something")) == mended


def test_a_check_that_raises_is_a_line_of_its_own() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("name", "ok", "before")
        raise RuntimeError("of its own\nand more")

    look = Look("name", check, 10)
    look.begin()
    before, broken = look.findings()
    assert before.state == "ok"
    assert (broken.name, broken.state, broken.found) == ("name", "fail", "RuntimeError: of its own")
    assert "please report it" in broken.do


def test_a_check_that_hangs_is_a_line_of_its_own() -> None:
    def check() -> Iterator[Finding]:
        time.sleep(5)
        yield Finding("name", "ok", "late")

    look = Look("name", check, 0.1)
    look.begin()
    assert only(look.findings()) == ("fail", "no answer in 0.1 s", "see what hangs there, and try again")


# ---- a process of its own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11: without a word"),
        ("import no_such_module", "exit code 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import time; time.sleep(60)", "no end in 2 s"),
    ],
)
def test_a_process_that_ends_badly_is_a_line_after_what_it_has_told(text: str, found: str) -> None:
    told = f'print(\'noise\'); print({child.MARK!r} + \'{{"name": "a", "state": "ok", "found": "b"}}\', flush=True)'
    first, last = child.findings("torch", "-c", f"{told}\n{text}", seconds=2, do="mend it")
    assert first == Finding("a", "ok", "b")
    assert last == Finding("torch", "fail", found, "mend it")


def test_what_one_check_raises_in_the_process_leaves_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    def breaks() -> Iterator[Finding]:
        raise OSError("libcudart.so: cannot open\n")
        yield

    child.each({"torch": breaks, "gloo": lambda: [Finding("gloo", "ok", "there")]})
    lines = [json.loads(line.removeprefix(child.MARK)) for line in capsys.readouterr().out.splitlines()]
    assert [(f["name"], f["found"]) for f in lines] == [
        ("torch", "OSError: libcudart.so: cannot open"),
        ("gloo", "there"),
    ]


# ---- Python, packages, MPI ----------------------------------------------------------------------------------------


def test_packages_are_held_to_the_ranges_that_a_package_asks_for(tmp_path: Path, monkeypatch: Patch) -> None:
    info = tmp_path / "asking-1.0.dist-info"
    info.mkdir()
    asked = ["rich>=1", "numpy>=99", "not-to-be-had>=2", 'pytest>=99; extra == "dev"', 'not-wanted>=1; extra == "dev"']
    text = "Metadata-Version: 2.1\nName: asking\nVersion: 1.0\n" + "".join(f"Requires-Dist: {a}\n" for a in asked)
    (info / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    old, absent, extra, fits = software.versions("asking")
    assert (old.state, old.do) == ("fail", "python -m pip install 'numpy>=99'")
    assert old.found.startswith("numpy ")
    assert old.found.endswith(", outside >=99")
    assert absent.state == "fail"
    assert absent.found == "not-to-be-had is not installed"
    assert extra.state == "warn"
    assert fits.found.startswith("1 packages in their ranges: rich ")


def test_without_the_package_itself_there_are_no_ranges() -> None:
    state, found, do = only(software.versions("no-such-package"))
    assert (state, found) == ("warn", "no-such-package is not installed: there are no ranges to hold packages to")
    assert "pip install -e ." in do


def test_mpi_is_not_needed(program: Program, monkeypatch: Patch) -> None:
    def absent(name: str) -> str:
        raise software.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(software.metadata, "version", absent)
    words = ": not needed, unless ranks are to be started by mpiexec (cauc-dist[mpi])"
    assert only(software.mpi()) == ("ok", f"no mpi4py, no mpiexec{words}", "")
    program("mpirun", text="exit 0")
    assert "mpirun is there, mpi4py is not: not needed" in only(software.mpi())[1]


@pytest.mark.parametrize(
    ("says", "library", "words"),
    [
        ("HYDRA build details:", "", "with MPICH"),
        ("Intel(R) MPI Library for Linux", "", "of Intel MPI"),
        ("something", "", "of an unknown MPI"),
        ("", "", "no mpiexec on PATH"),
        ("HYDRA build details:", "/nowhere/libmpi.so", "does not load: "),
    ],
)
def test_mpi_is_one_library_and_its_own_mpiexec(
    says: str, library: str, words: str, program: Program, monkeypatch: Patch
) -> None:
    pytest.importorskip("mpi4py")
    for name in ("MPI4PY_LIBMPI", "MPI4PY_MPIABI"):
        monkeypatch.delenv(name, raising=False)
    if says:
        program("mpiexec", text=f"echo '{says}'")
    if library:
        monkeypatch.setenv("MPI4PY_LIBMPI", library)
    state, found, do = only(software.mpi())
    assert words in found
    assert (state, bool(do)) == (("ok", False) if words == "with MPICH" else ("warn", True))


# ---- what torch says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "driver", "hidden", "state", "words"),
    [
        (None, "", False, "ok", "built for CPUs alone"),
        (None, "570.1", False, "warn", "built for CPUs alone, on a machine with NVIDIA's driver 570.1"),
        ("12.8", "", False, "ok", "no NVIDIA driver on this machine: the CPU is used"),
        ("12.8", "450.1", False, "fail", "built for CUDA 12.8, and no GPU to be had with driver 450.1"),
        ("12.8", "570.1", True, "warn", "CUDA_VISIBLE_DEVICES hides all GPUs"),
    ],
)
def test_the_build_of_torch_is_held_against_the_driver(
    build: str | None, driver: str, hidden: bool, state: str, words: str, monkeypatch: Patch
) -> None:
    """As seen from a process without a GPU."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(libraries, "_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = only(libraries.torch_())
    assert found[0] == state
    assert words in found[1]
    assert bool(found[2]) == (state != "ok")


def test_the_version_of_the_driver_is_the_kernels(tmp_path: Path) -> None:
    told = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.172.08  Release Build  (dvs-builder@U22)\n"
    (tmp_path / "version").write_text(told)
    assert libraries._driver(tmp_path / "version") == "570.172.08"
    assert libraries._driver(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("free", "computes", "state", "words"),
    [
        (70, True, "ok", "0: H, 70 of 80 GiB free, capability 9.0"),
        (9, True, "warn", "9 of 80 GiB free"),
        (70, False, "fail", "9.0: no kernel image is available"),
    ],
)
def test_a_gpu_is_told_by_memory_and_capability_and_must_compute(
    free: int, computes: bool, state: str, words: str, monkeypatch: Patch
) -> None:
    """A GPU is made up: where there is one, the doctor's own run computes on it."""
    import torch

    def ones(n: int, device: str) -> torch.Tensor:
        if not computes:
            raise RuntimeError("no kernel image is available\nmore")
        return torch.full((n,), 1.0)

    gib = 2**30
    made = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_arch_list": lambda: ["sm_80"],
        "mem_get_info": lambda i: (free * gib, 80 * gib),
        "get_device_properties": lambda i: SimpleNamespace(name="H", major=9, minor=0),
    }
    for name, value in made.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", ones)
    found = only(libraries.gpus())
    assert found[0] == state
    assert words in found[1]
    assert bool(found[2]) == (state != "ok")


def test_a_torch_without_gloo_is_a_fault(monkeypatch: Patch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    gloo, _ = libraries.backends()
    assert (gloo.state, gloo.found) == ("fail", "torch was built without gloo, by which ranks on CPUs meet")


def test_a_gpu_wants_nccl_and_triton(monkeypatch: Patch) -> None:
    import torch
    import torch.distributed as dist

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    _, nccl = libraries.backends()
    assert (nccl.state, nccl.found) == ("fail", "torch was built without NCCL, by which ranks on GPUs meet")
    slower = ("warn", "not here: losses on GPUs take the slower way", "python -m pip install triton")
    assert only(libraries.triton()) == slower
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert only(libraries.triton()) == ("ok", "not here, and not needed without a GPU", "")


def test_little_memory_for_a_job_is_a_warning(monkeypatch: Patch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    state, found, do = only(libraries.memory())
    assert state == "warn"
    assert found.endswith("GiB available, 2 GiB allowed to this job or container")
    assert "--mem" in do


@pytest.mark.parametrize(
    ("asked", "gpu", "state"), [("cuda", False, "fail"), ("cpu", True, "warn"), ("cpu", False, "ok")]
)
def test_deepspeed_takes_the_accelerator_that_is_there(asked: str, gpu: bool, state: str, monkeypatch: Patch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("DS_ACCELERATOR", asked)
    found = only(libraries.deepspeed())
    assert found[0] == state
    assert found[2].startswith("unset DS_ACCELERATOR") == (state != "ok")


# ---- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "state", "words"),
    [
        ("127.0.1.1 n1", "warn", "n1 is 127.0.1.1 to itself, and 10.77.0.1 on v0: gloo, left alone, would offer"),
        ("10.77.0.1 n1", "ok", "n1 is 10.77.0.1"),
        ("10.77.0.2 n2", "warn", "n1 has no address here ("),
    ],
)
def test_a_name_that_leads_other_machines_to_themselves_is_a_warning(
    line: str, state: str, words: str, tmp_path: Path
) -> None:
    """On a machine by name: a network, a host name and an /etc/hosts of its own."""
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{line}\n")
    look = "from cauc_dist.doctor import network; [print(f) for f in network.name()]"
    setup = [
        f"mount --bind {tmp_path / 'hosts'} /etc/hosts && mount --bind /dev/null /etc/resolv.conf && hostname n1",
        "ip link set lo up && ip link add v0 type veth peer name v1 && ip addr add 10.77.0.1/24 dev v0",
        f'ip link set v0 up && ip link set v1 up && echo made && exec {sys.executable} -c "{look}"',
    ]
    try:
        enter = ["unshare", "-nmu", "sh", "-c", " && ".join(setup)]
        done = subprocess.run(enter, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("NOT RUN: no unshare here: needs Linux and root")
    if not done.stdout.startswith("made"):
        pytest.skip(f"NOT RUN: no namespaces here: {done.stderr.strip()}")
    said = done.stdout.removeprefix("made\n")
    assert said.startswith(f"{state:<4}  name        {words}")
    assert ("put `10.77.0.1 n1` into /etc/hosts" in said) == (state == "warn")


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("GLOO_SOCKET_IFNAME", "nosuch0", "GLOO_SOCKET_IFNAME names nosuch0, which is not up on this machine"),
        ("GLOO_SOCKET_IFNAME", "{lo}", None),
        ("GLOO_SOCKET_IFNAME", "{lo},nosuch0", "GLOO_SOCKET_IFNAME names nosuch0, which is not up on this machine"),
        ("NCCL_SOCKET_IFNAME", "=nosuch", "NCCL_SOCKET_IFNAME==nosuch fits no interface that is up on this machine"),
        ("NCCL_SOCKET_IFNAME", "nosuch,l", None),
        ("NCCL_SOCKET_IFNAME", "=l", "NCCL_SOCKET_IFNAME==l fits no interface that is up on this machine"),
        ("NCCL_SOCKET_IFNAME", "={lo}", None),
        ("NCCL_SOCKET_IFNAME", "^nosuch", None),
    ],
)
def test_an_interface_that_is_named_must_be_there(name: str, value: str, fault: str | None) -> None:
    up, *faults = network.interfaces({name: value.format(lo=loopback_interface())})
    assert loopback_interface() in up.found
    assert [f.found for f in faults] == [fault] * (fault is not None)
    assert all(f.state == "fail" and f.do.startswith(f"unset {name}") for f in faults)


PLACE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "state", "words", "do"),
    [
        ({}, "ok", "no launcher's variables", ""),
        (
            PLACE,
            "warn",
            "rank 1 of 4 at n1:29500: a run from this shell would wait for the others",
            "unset RANK LOCAL_",
        ),
        ({**PLACE, "TORCHELASTIC_RUN_ID": "a"}, "ok", "rank 1 of 4 at n1:29500, as a launcher has it", ""),
        ({"RANK": "1"}, "fail", "RANK set but not LOCAL_RANK, WORLD_SIZE", "unset RANK"),
        ({**PLACE, "RANK": "4"}, "fail", "RANK 4 of WORLD_SIZE 4", "unset RANK LOCAL_"),
        ({"MASTER_ADDR": "n1"}, "warn", "MASTER_ADDR set, RANK and WORLD_SIZE not", "unset MASTER_ADDR"),
        ({"SLURM_STEP_ID": "0"}, "ok", "SLURM's step started this process", ""),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"},
            "warn",
            "SLURM's step started this process as one of 4",
            "start runs by",
        ),
        ({"PMI_SIZE": "2"}, "warn", "MPI started this process as one of 2", "start runs by"),
        ({"PMI_SIZE": "1"}, "ok", "MPI started this process", ""),
    ],
)
def test_variables_of_a_launcher_that_is_gone_are_found(
    env: Mapping[str, str], state: str, words: str, do: str
) -> None:
    found = only(network.variables(env))
    assert found[0] == state
    assert found[1].startswith(words)
    assert found[2].startswith(do)
    assert bool(found[2]) == (state != "ok")


# ---- ranks --------------------------------------------------------------------------------------------------------


def test_three_ranks_meet_whatever_the_shell_says_of_others(monkeypatch: Patch) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    met = list(handshake.handshake(3))
    assert met[0].state == "ok", met
    assert met[0].found.startswith("3 ranks of this machine by gloo, in ")


def test_ranks_that_cannot_meet_are_a_fault_with_their_words(monkeypatch: Patch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    state, found, do = only(handshake.handshake(2))
    assert state == "fail"
    assert found.startswith("exit code 1: ")
    assert "nosuch0" in found
    assert "interfaces and variables" in do


def test_a_wrong_sum_is_a_fault() -> None:
    found = handshake._told("nccl", 2, False, 1.5)
    assert (found.state, found.found) == ("fail", "2 ranks of this machine by nccl, in 1.5 s: their sum is wrong")


# ---- the machine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "quota", "state", "words", "do"),
    [
        (None, "max 100000", "ok", "OMP_NUM_THREADS not set: ranks share them", ""),
        ("1", "max 100000", "ok", "OMP_NUM_THREADS=1 for each rank", ""),
        (
            "9",
            "800000 100000",
            "warn",
            "OMP_NUM_THREADS is 9 for each of 2 ranks, on 8 cores",
            "export OMP_NUM_THREADS=4",
        ),
        ("many", "800000 100000", "fail", "OMP_NUM_THREADS is 'many', which is no number", "export OMP_NUM_THREADS=4"),
        (
            None,
            "300000 100000",
            "warn",
            "3 of the machine's 8 cores by this container's quota",
            "export OMP_NUM_THREADS=1",
        ),
    ],
)
def test_threads_of_all_ranks_fit_the_cores(
    text: str | None, quota: str, state: str, words: str, do: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """On a machine of 8 cores."""
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    env = {} if text is None else {"OMP_NUM_THREADS": text}
    found = only(machine.threads(2, env, tmp_path / "cpu.max"))
    assert found[0] == state
    assert words in found[1]
    assert found[2].endswith(do)


def test_a_small_dev_shm_is_a_warning(tmp_path: Path) -> None:
    with small_disk(tmp_path / "shm", 64 * 2**20):
        state, found, do = only(machine.shared_memory(tmp_path / "shm"))
    assert (state, found) == ("warn", f"0.062 GiB free in {tmp_path / 'shm'}")
    assert "--shm-size" in do
    assert only(machine.shared_memory(tmp_path / "none")) == ("ok", f"no {tmp_path / 'none'} on this system", "")


@pytest.mark.parametrize(
    ("soft", "hard", "words"),
    [
        (256, 4096, "warn  files       at most 256 open files a process\n-> ulimit -n 1024"),
        (256, 512, "warn  files       at most 256 open files a process\n-> ulimit -n 512"),
        (256, 256, "warn  files       at most 256 open files a process\n-> ask for more: limits.conf"),
        (2048, 4096, "ok    files       at most 2048 open files a process"),
    ],
)
def test_few_open_files_are_a_warning(soft: int, hard: int, words: str) -> None:
    text = "from cauc_dist.doctor import machine; [print(f) for f in machine.open_files()]"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); {text}"
    done = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True, timeout=60)
    assert done.stdout.replace(" " * 18, "").startswith(words), done.stderr
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 4096


# ---- the disk -----------------------------------------------------------------------------------------------------


def test_a_disk_locks_renames_and_has_a_speed(tmp_path: Path) -> None:
    names = [(f.name, f.state) for f in (*disk.kind(tmp_path), *disk.speed(tmp_path, 2**20)) if f.name != "disk"]
    assert names == [("locks", "ok"), ("rename", "ok"), ("speed", "ok")]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither bytes on the disk, nor a process."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "waits.py").write_text(
        "import os, time; from pathlib import Path\n"
        "Path('new').write_text(str(os.getpid())); os.replace('new', 'pid'); time.sleep(60)"
    )
    text = (
        "import time; from pathlib import Path; from cauc_dist.doctor import child, disk\n"
        "from cauc_dist.doctor.finding import Look\n"
        "Look('a', lambda: child.findings('a', 'waits.py', seconds=60), 60).begin()\n"
        "Look('b', lambda: disk.speed(Path('disk'), 2**34), 60).begin()\n"
        "while not (Path('pid').exists() and list(Path('disk').glob('*/bytes'))): time.sleep(0.01)\n"
        "raise KeyboardInterrupt"
    )
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert list((tmp_path / "disk").iterdir()) == []
    pid, until = (tmp_path / "pid").read_text(), time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_a_folder_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    place = tmp_path / "none"
    mend = "make it first, or name another: --folder"
    assert only(disk.kind(place)) == ("fail", f"no folder {place}", mend)
    assert list(disk.speed(place)) == []


def test_a_disk_without_room_is_a_fault_and_stays_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "small"
    with small_disk(place, 16 * 2**20):
        space, *_ = disk.kind(place)
        assert (space.state, space.do) == ("warn", "make room: stores and checkpoints are written here")
        assert space.found.startswith(f"{place} on tmpfs: 0.0156 GiB free")
        found = "256 MiB could not be written and read here: No space left on device"
        assert only(disk.speed(place)) == ("fail", found, disk.ELSEWHERE)
        assert list(place.iterdir()) == []
        (place / "all").write_bytes(bytes(16 * 2**20))
        space, *_ = disk.kind(place)
        assert (space.state, space.do) == ("fail", disk.ELSEWHERE)


def test_a_disk_that_is_only_read_is_a_fault(tmp_path: Path) -> None:
    place = tmp_path / "small"
    with small_disk(place, 2**20):
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        *_, found = disk.kind(place)
    assert (found.state, found.found) == ("fail", f"{place} cannot be written to: Read-only file system")


def test_a_disk_in_memory_is_a_warning(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(disk, "SPACE", 2**20)
    monkeypatch.setattr(disk, "INODES", 1)
    with small_disk(tmp_path / "small", 16 * 2**20):
        space, *_ = disk.kind(tmp_path / "small")
        (speed,) = disk.speed(tmp_path / "small", 2**20)
    assert (space.state, space.do[:35]) == ("warn", "it is this machine's memory: gone w")
    assert speed.found.endswith(", from memory")


def test_the_file_system_is_the_innermost_and_the_last_that_was_mounted(tmp_path: Path) -> None:
    mounts = [("/", "ext4"), (tmp_path, "nfs4"), (tmp_path, "lustre"), (tmp_path / "no", "tmpfs")]
    (tmp_path / "mounts").write_text("".join(f"device {at} {form} rw 0 0\n" for at, form in mounts))
    assert disk.file_system(tmp_path / "x", tmp_path / "mounts") == "lustre"
    assert disk.file_system(Path("/"), tmp_path / "mounts") == "ext4"
    assert disk.file_system(tmp_path, tmp_path / "none") == "an unknown file system"


@pytest.mark.parametrize(
    ("flock", "words"),
    [
        (lambda *_: os.listxattr("/nowhere"), "this file system does not lock (No such file or directory)"),
        (lambda *_: None, "a locked file was locked a second time"),
    ],
)
def test_a_file_system_that_does_not_lock_is_a_fault(
    flock: Callable[..., None], words: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """None is at hand: its answers are made up."""
    monkeypatch.setattr(disk.fcntl, "flock", flock)
    locks = next(f for f in disk.kind(tmp_path) if f.name == "locks")
    assert (locks.state, locks.found) == ("fail", words)
    assert "-o flock" in locks.do


def test_a_rename_that_loses_the_file_is_a_fault(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(durable, "replace", lambda path, data: None)
    *_, found = disk.kind(tmp_path)
    assert (found.state, found.found) == ("fail", "a replaced file is not what was written")


def test_a_slow_disk_is_a_warning(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(disk, "SLOW", 1e9)
    state, _, do = only(disk.speed(tmp_path, 2**20))
    assert state == "warn"
    assert "--data.stage" in do


# ---- SLURM and a store --------------------------------------------------------------------------------------------

UP = 'case "$0 $1" in *"squeue --version") echo slurm 22.05.8;; *"scontrol ping") {ping};; esac'


@pytest.mark.parametrize(
    ("there", "ping", "state", "words", "do"),
    [
        ((), "", "ok", "not on this machine: no sbatch, no srun", ""),
        (
            slurm.NEEDED,
            "echo 'Slurmctld(primary) at n0 is UP'",
            "ok",
            "slurm 22.05.8; Slurmctld(primary) at n0 is UP",
            "",
        ),
        (slurm.NEEDED, "echo 'Slurmctld(primary) at n0 is DOWN'", "fail", "at n0 is DOWN", "go to a login node"),
        (
            slurm.NEEDED,
            "echo no contact; exit 1",
            "fail",
            "slurm 22.05.8; scontrol ping: no contact",
            "go to a login node",
        ),
        (slurm.NEEDED, "exit 3", "fail", "scontrol ping: exit code 3 without a word", "go to a login node"),
        (slurm.NEEDED, "sleep 30", "fail", "scontrol ping: no answer in 0.5 s", "go to a login node"),
        (("srun", "squeue"), "", "fail", "sbatch, scontrol not on PATH", "load the module"),
    ],
)
def test_slurm_answers_or_is_not_there(
    there: tuple[str, ...], ping: str, state: str, words: str, do: str, program: Program, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(slurm, "SECONDS", 0.5)
    program(*there, text=UP.format(ping=ping))
    found = only(slurm.reach())
    assert found[0] == state
    assert found[1].endswith(words)
    assert found[2].startswith(do)


def test_a_slurm_without_its_configuration_is_a_fault(program: Program) -> None:
    program(*slurm.NEEDED, text="echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1")
    state, found, do = only(slurm.reach())
    assert (state, found[:50]) == ("fail", "squeue --version: squeue: fatal: Could not establi")
    assert "SLURM_CONF" in do


def test_a_store_opens_and_some_of_it_is_read(store: Path) -> None:
    opened, scans = stores.health(str(store))
    assert opened.found.startswith(f"{store}: 24 scans, ")
    assert scans.found.startswith("8 of 24 scans read, ")
    assert scans.found.endswith(f"all of them: cauc store verify {store}")


def test_a_store_that_is_damaged_or_none_is_a_fault_with_its_mend(store: Path, tmp_path: Path) -> None:
    state, found, do = only(stores.health(str(tmp_path / "none")))
    assert (state, found) == ("fail", f"no store at {tmp_path / 'none'}; wanted a folder made by ingest")
    assert do == "Check the path, or ingest first"
    copy = shutil.copytree(store, tmp_path / "copy.zarr")
    shard = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    shard.write_bytes(bytes(shard.stat().st_size))
    *_, damaged = stores.health(str(copy))
    assert (damaged.state, "Restore it from a copy" in damaged.do) == ("fail", True)


def test_a_store_that_the_network_hides_is_a_fault() -> None:
    pytest.importorskip("obstore")
    *_, found = stores.health("http://127.0.0.1:9/none.zarr")  # discard: nobody listens
    assert found.state == "fail"


def test_the_package_names_its_two() -> None:
    assert doctor.__all__ == ["Finding", "doctor"]
