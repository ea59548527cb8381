"""One real SLURM cluster (slurm/cluster/cluster.sh) for all tests of this folder, and runs on it.

    def test_a_run_ends(cluster, undisturbed):
        run = cluster.submit("mine", "--seed", "0", nodes=2, ranks=2, minutes=10)
        run.at_step(20)                                     # the step is in the journal
        cluster.on(run.nodes()[0], "hostname")              # or .kill(node) .boot .cut .heal .rate .traffic()
        run.wait(120)
        assert run.verdicts() == ["done"]
        assert run.steps() == undisturbed                   # step -> loss, of a local training on 4 ranks

Every run trains `TRAINING` (60 steps of 16 subjects, a checkpoint each 15) on a store of 48 scans of 16^3, unless
overrides say otherwise: a curve can be compared with `undisturbed`, or with `cluster.local(ranks, *overrides)`. A rank
takes 8 s of a core to come up, and a step far less: `cluster.slow()` makes steps slow where a test needs
time between them, and `cluster.mend()`, which each test ends with, lifts that, heals links and boots nodes.

Every test here has the marks slurm and timeout(300). They are skipped only off root or without SLURM, and never in CI.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from cauc_dist import journal

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "cluster" / "cluster.sh"
NODES = 4
STEPS = 60
TRAINING = (
    *("--epochs", "20", "--batch-size", "16", "--data.folds", "1", "--checkpoint.every-epochs", "5"),
    *("--encoder.width", "8", "--projector.hidden", "64", "--projector.out", "32"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300))


def wait_for(what: Callable[[], T], seconds: float, words: str | Callable[[], str]) -> T:
    """What `what` returns once it is true; AssertionError with `words` where it is not in that time."""
    deadline = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        if time.monotonic() > deadline:
            said = words if isinstance(words, str) else words()
            raise AssertionError(f"not in {seconds:g} s: {said}")
        time.sleep(0.1)


@dataclass
class Cluster:
    """A running cluster; its verbs are those of cluster.sh."""

    folder: Path
    """All of it: SITE, store.zarr, runs/, which any user may write in."""
    _local: dict[Any, dict[int, float]] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.folder / "store.zarr"

    def verb(self, *words: str | Path, check: bool = True, env: dict[str, str] | None = None) -> str:
        """What cluster.sh prints, both streams; AssertionError with it where it fails, unless not to `check`."""
        done = subprocess.run(
            [SCRIPT, *map(str, words)],
            env={**os.environ, "SITE": str(self.folder / "site"), **(env or {})},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0 or not check, (
            f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}"
        )
        return done.stdout

    def run(self, *command: str | Path, user: str = "root", check: bool = True, **env: str) -> str:
        """What a command prints on the login node, with the variables `env` added."""
        return self.verb(*(("exec",) if user == "root" else ("as", user)), *command, check=check, env=env)

    def on(self, node: str, *command: str | Path) -> str:
        return self.verb("on", node, *command)

    def kill(self, node: str) -> None:
        """Power it off."""
        self.verb("kill", node)

    def boot(self, node: str) -> None:
        self.verb("boot", node)

    def cut(self, node: str) -> None:
        self.verb("cut", node)

    def heal(self, node: str) -> None:
        self.verb("heal", node)

    def rate(self, node: str, rate: str) -> None:
        """Limit its link, e.g. 100mbit; none lifts it."""
        self.verb("rate", node, rate)

    def slow(self, rate: str = "10mbit") -> None:
        """Limit every link: at that rate a step of `TRAINING` on 2 nodes takes most of a second. none lifts it."""
        for number in range(1, NODES + 1):
            self.rate(f"n{number}", rate)

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes that each node has received and sent."""
        rows = [line.split() for line in self.verb("traffic").splitlines()]
        return {node: (int(received), int(sent)) for node, _, received, _, sent in rows}

    def states(self) -> dict[str, str]:
        """Of the nodes, in sinfo's words (idle, allocated, down* ...)."""
        rows = [line.split() for line in self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()]
        return dict(rows)

    def without_scontrol(self) -> Path:
        """For a PATH: a folder with all the other programs."""
        path = self.folder / "bin"
        if not path.exists():
            path.mkdir()
            for program in Path("/usr/bin").iterdir():
                if program.name != "scontrol":
                    (path / program.name).symlink_to(program)
        return path

    def mend(self) -> None:
        """No job, no slow link, every node up and idle."""
        self.run("scancel", "--user", "root,guest", check=False)
        for node in self.states():
            alive = self.verb("on", node, "true", check=False) == ""
            if not alive:
                self.boot(node)
            self.heal(node)
            self.rate(node, "none")
        wait_for(lambda: set(self.states().values()) == {"idle"}, 60, lambda: f"{self.states()} {self.run('squeue')}")

    def site(self, name: str, *, environment: dict[str, str] | None = None, **keys: str | list[str]) -> Path:
        """A site file with the tests' own keys, and these."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in {"shared": [str(self.folder)], **keys}.items()]
        lines += ["[environment]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in {**ENVIRONMENT, **(environment or {})}.items()]
        path = self.folder / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def submission(
        self, folder: Path, *overrides: str, nodes: int = 2, ranks: int = 2, minutes: int = 10, **options: Any
    ) -> list[str]:
        """The words of `python -m launch submit`; `ranks` a node; options as the command line has them, without --."""
        options = {"mem_gb": 0.9, "signal_seconds": 20, "site": self.folder / "tests.toml", **options}
        words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        asked = ["--nodes", str(nodes), "--ranks-per-node", str(ranks), "--time", str(minutes), *words]
        recipe = ["demo_cauc", "--data.store", str(self.store), "--run", str(folder), *TRAINING, *overrides]
        return [sys.executable, "-m", "launch", "submit", *recipe, *asked]

    def submit(
        self, name: str, *overrides: str, user: str = "root", env: dict[str, str] | None = None, **options: Any
    ) -> "Run":
        """`python -m launch submit demo_cauc` on the login node, in whose shell `env` is set; run folder runs/NAME.

        Options: nodes, ranks, minutes, and what `submission` takes.
        """
        folder = self.folder / "runs" / name
        self.run(*self.submission(folder, *overrides, **options), user=user, **(env or {}))
        return Run(self, folder)

    def local(self, ranks: int, *overrides: str) -> dict[int, float]:
        """Loss by step of the same training by `cauc train --ranks`, without SLURM; trained once a session."""
        key = (ranks, overrides)
        if key not in self._local:
            folder = self.folder / "local" / str(len(self._local))
            recipe = ["demo_cauc", "--data.store", str(self.store), "--run", str(folder), *TRAINING, *overrides]
            done = subprocess.run(
                [sys.executable, "-m", "cauc_dist", "train", *recipe, "--ranks", str(ranks)],
                env={**os.environ, **ENVIRONMENT},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, done.stdout
            self._local[key] = losses(folder)
        return self._local[key]


def losses(folder: Path) -> dict[int, float]:
    """By step, those that count; AssertionError where one counts twice."""
    found = [(event["step"], event["loss"]) for event in journal.read(folder) if event["event"] == "step"]
    assert len(found) == len(dict(found)), f"a step counts twice: {found}"
    return dict(found)


@dataclass
class Run:
    """A run folder, and its job."""

    cluster: Cluster
    folder: Path

    @property
    def ids(self) -> list[str]:
        """Of all jobs that the run ever was, resubmitted ones too."""
        first = [json.loads(line)["id"] for line in (self.folder / "jobs.jsonl").read_text().splitlines()]
        again = self.folder / "resubmitted"
        return first + (again.read_text().split() if again.exists() else [])

    @property
    def id(self) -> str:
        """Of the latest."""
        return self.ids[-1]

    def queue_state(self) -> str:
        """In squeue's words (PENDING, RUNNING, COMPLETING ...) of its latest job; "" once it left the queue."""
        return (
            self.cluster.run("squeue", "-h", "-j", self.id, "-o", "%T", check=False).strip() if self._queued() else ""
        )

    def _queued(self) -> bool:
        listed = self.cluster.run("squeue", "-h", "-r", "-o", "%i", check=False)  # -r: N_K of waiting tasks, not N_[K]
        return "error:" in listed or any(id in listed.split() for id in self.ids)  # a busy slurmctld gives no answer

    def nodes(self) -> list[str]:
        """Where its job runs, the batch script's first; [] where it does not."""
        listed = self.cluster.run("squeue", "-h", "-j", self.id, "-o", "%N").strip()
        return self.cluster.run("scontrol", "show", "hostnames", listed).split() if listed else []

    def attempts(self) -> list[Path]:
        """Their folders, in order."""
        return sorted((self.folder / "attempts").glob("[0-9]*"))

    def verdicts(self) -> list[str]:
        """What `end` of each attempt says; "" of one without."""
        return [(path / "end").read_text().strip() if (path / "end").exists() else "" for path in self.attempts()]

    def hosts(self, attempt: int = -1) -> list[str]:
        """Where the ranks of an attempt began, by rank; attempts count from 0."""
        paths = sorted(self.attempts()[attempt].glob("rank-*.host"), key=lambda path: int(path.stem[5:]))
        return [path.read_text().strip() for path in paths]

    def log(self, rank: int = 0, attempt: int = -1) -> str:
        """What a rank said."""
        return (self.attempts()[attempt] / f"rank-{rank}.log").read_text()

    def batch_log(self) -> str:
        """What the batch script said, over all attempts."""
        return "".join(path.read_text() for path in sorted((self.folder / "slurm").glob("*.log")))

    def steps(self) -> dict[int, float]:
        """Loss by step."""
        return losses(self.folder)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Of the journal, e.g. resume, checkpoint, stopped."""
        return [event for event in journal.read(self.folder) if event["event"] == name]

    def pids(self) -> dict[int, int]:
        """Process ids of its ranks as the host sees them, by rank."""
        found: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                env = dict(e.split("=", 1) for e in (path / "environ").read_text().split("\0") if "=" in e)
                command, parent = (
                    (path / "cmdline").read_text(),
                    (path / "stat").read_text().rsplit(")", 1)[1].split()[1],
                )
                above = Path(f"/proc/{parent}/cmdline").read_text()
            except (OSError, UnicodeDecodeError):
                continue
            ours = env.get("SLURM_JOB_ID") in self.ids and Path(env.get("SLURM_SUBMIT_DIR", "/")) == self.folder
            if ours and "slurmstepd" in above and command.split("\0")[0].rsplit("/", 1)[-1].startswith("python"):
                found[int(env["SLURM_PROCID"])] = int(path.name)
        return found

    def at_step(self, step: int, seconds: float = 120, life: int = 0) -> None:
        """Return when that step is in the journal: of any life, or of the one after so many resumes."""

        def there() -> bool:
            events = journal.read(self.folder)
            resumes = [i for i, event in enumerate(events) if event["event"] == "resume"]
            if len(resumes) < life:
                return False
            since = events[resumes[life - 1] :] if life else events
            return any(event["event"] == "step" and event["step"] >= step for event in since)

        wait_for(there, seconds, lambda: f"step {step}\n{self.told()}")

    def wait(self, seconds: float) -> None:
        """Return when it left the queue, and its last verdict is final."""
        wait_for(lambda: not self._queued(), seconds, lambda: f"out of the queue\n{self.told()}")
        wait_for(self._final, 15, lambda: f"a final verdict\n{self.told()}")

    def _final(self) -> bool:
        last = (self.verdicts() or [""])[-1]
        return last != "" and (not last.startswith("again") or "given up" in last)

    def told(self) -> str:
        """All that is known of it, for a test that fails."""
        logs = [f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("attempts/*/rank-*.log"))]
        steps = sorted(self.steps())[-1:]
        ctld = (self.cluster.folder / "site" / "log" / "slurmctld.log").read_text().splitlines()
        words = [self.cluster.run("squeue"), str(self.cluster.states()), f"verdicts {self.verdicts()}", f"step {steps}"]
        return "\n".join([*words, "--- batch", self.batch_log()[-3000:], *logs[-4:], "--- slurmctld", *ctld[-25:]])


@contextmanager
def watched(*runs: Run) -> Iterator[dict[Path, list[dict[str, Any]]]]:
    """What `launch status --watch` says of each run, every second, until none is live; there at the end."""
    cluster, said = runs[0].cluster, runs[0].folder.with_suffix(".status")
    words = [
        "exec",
        sys.executable,
        "-m",
        "launch",
        "status",
        *(str(run.folder) for run in runs),
        "--json",
        "--watch",
        "1",
    ]
    found: dict[Path, list[dict[str, Any]]] = {run.folder: [] for run in runs}
    with said.open("w") as file:
        env = {**os.environ, "SITE": str(cluster.folder / "site")}
        process = subprocess.Popen([SCRIPT, *words], env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield found
            assert process.wait(30) == 0, said.read_text()[-2000:]
        finally:
            process.kill()
    for line in said.read_text().splitlines():
        for status in json.loads(line):
            found[Path(status["folder"])].append(status)


def states(looks: list[dict[str, Any]]) -> str:
    """The states one after the other, each once while it lasts."""
    found = [look["state"] for look in looks]
    return " ".join(state for i, state in enumerate(found) if i == 0 or found[i - 1] != state)


FIRST_START = "(PENDING |CONFIGURING )*RUNNING "


def requeued(times: int) -> str:
    """A pattern of `states` of a run that goes on so often, and is never said to be anything else."""
    return FIRST_START + f"(COMPLETING )?(REQUEUED RUNNING (COMPLETING )?){{{times}}}COMPLETED"


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    why = "not root" if os.getuid() else "no SLURM (slurm/cluster/README.md has the packages)"
    if os.getuid() or shutil.which("sinfo") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the tests on a real cluster: {why}")
    folder = Path(tempfile.mkdtemp(prefix="cauc-slurm-"))
    folder.chmod(0o755)  # another user runs there, too
    (folder / "runs").mkdir()
    (folder / "runs").chmod(0o1777)
    cluster = Cluster(folder)
    make_store(cluster.store)
    cluster.site("tests")
    # cluster.sh's daemons keep the pipe of their first output open: it goes to a file.
    with (folder / "start.log").open("w") as log:
        settings = {
            "SITE": folder / "site",
            "NODES": NODES,
            "GRACE": 15,
            "OPEN": f"{ROOT}:{sys.prefix}:{sys.base_prefix}",
        }
        env = {**os.environ, **{key: str(value) for key, value in settings.items()}}
        code = subprocess.run([SCRIPT, "start"], env=env, stdout=log, stderr=log).returncode
    assert code == 0, (folder / "start.log").read_text()
    try:
        yield cluster
    finally:
        cluster.verb("stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; whatever a test has done to it, it is whole again afterwards."""
    yield slurm_cluster
    slurm_cluster.mend()


@pytest.fixture(scope="session")
def undisturbed(slurm_cluster: Cluster) -> dict[int, float]:
    """Loss by step of `TRAINING` on 4 local ranks."""
    return slurm_cluster.local(4)


def make_store(path: Path) -> None:
    """48 scans of 16^3: noise around a ball whose size follows age."""
    from cauc_dist.store.ingest import from_arrays
    from cauc_dist.store.layout import Column

    rng = np.random.default_rng(0)
    age = np.round(rng.uniform(20, 80, 48), 1)
    radius = np.linalg.norm(np.indices((16, 16, 16)) - 7.5, axis=0)
    volumes = [((radius < 3 + a / 20) + 0.1 * rng.standard_normal((16, 16, 16)))[None].astype(np.float32) for a in age]
    columns = (Column("age", "number"),)
    from_arrays(
        path, volumes, [f"sub-{i:02d}" for i in range(48)], shape=(1, 16, 16, 16), columns=columns, metadata=(age,)
    )
