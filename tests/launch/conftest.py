"""SLURM without a cluster: its commands as small programs on PATH (fake_slurm.py), run folders, a site that sees all.

slurm               the fake cluster: .queue, .set(id, state=...), .ends(id, state), .breaks(command, words), .calls
launch(*words)      python -m launch in this process: .code, .out, .err
folder(name)        a run folder with a configuration, as `submit` leaves it; tests add jobs, attempts, a journal
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cauc_dist import config, recipes
from cauc_dist.journal import Journal
from launch import cli, script
from launch.submit import record

COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol", "sinfo")
PROGRAM = Path(__file__).with_name("fake_slurm.py")
SMALL = (
    *("--epochs", "1", "--optim.warmup-epochs", "0", "--batch-size", "6", "--encoder.width", "2"),
    *("--projector.hidden", "8", "--projector.out", "4", "--engine.device", "cpu"),
)


@dataclass
class Slurm:
    """The fake cluster, as a test sees it."""

    state: Path
    bin: Path

    @property
    def cluster(self) -> dict[str, Any]:
        path = self.state / "cluster.json"
        return json.loads(path.read_text()) if path.exists() else {"next": 41, "queue": {}, "accounted": {}}

    @property
    def queue(self) -> dict[str, Any]:
        """Jobs by id, as sbatch got them: name, state, asked, script, cwd, env."""
        return self.cluster["queue"]

    def _write(self, cluster: dict[str, Any]) -> None:
        temporary = self.state / f"cluster.{threading.get_ident()}"
        temporary.write_text(json.dumps(cluster))
        temporary.replace(self.state / "cluster.json")

    def set(self, id: str, **fields: str) -> None:
        """State, reason, nodes, name of a job in the queue; one that is not there comes."""
        cluster = self.cluster
        job = cluster["queue"].get(id, {"name": "another", "state": "PENDING", "reason": "None", "nodes": ""})
        cluster["queue"][id] = job | fields
        self._write(cluster)

    def ends(self, id: str, state: str = "", name: str = "") -> None:
        """The job leaves the queue; sacct remembers its state, where one is given."""
        cluster = self.cluster
        job = cluster["queue"].pop(id, {"name": name, "nodes": ""})
        if state:
            cluster["accounted"][id] = {**job, "state": state}
        self._write(cluster)

    def instead(self, command: str, *lines: str) -> None:
        """From now on the command is this bash script; $SLURM is the command as it was."""
        program = self.bin / command
        was = self.bin / f".{command}" / command
        was.parent.mkdir()
        program.rename(was)
        program.write_text("\n".join(["#!/bin/bash", f"SLURM={was}", *lines]) + "\n")
        program.chmod(0o755)

    def breaks(self, command: str, words: str) -> None:
        """From now on the command fails with these words."""
        (self.state / f"broken-{command}").write_text(words)

    def has(self, what: str, words: str = "") -> None:
        """full, never, stuck, asks, no-accounting, returns (as which id): see fake_slurm.py."""
        (self.state / what).write_text(words)

    def calls(self, *commands: str) -> list[dict[str, Any]]:
        """Arguments and environment of every call of some commands."""
        path = self.state / "calls.jsonl"
        every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in every if call["name"] in commands]

    def start(self, id: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the batch script of a job as slurmd would: its spooled copy, in its folder, one task a node."""
        job = self.queue[id]
        spooled = self.state / f"job{id}" / "slurm_script"
        spooled.parent.mkdir(exist_ok=True)
        spooled.write_text(job["script"])
        nodes, tasks = int(job["asked"]["nodes"]), int(job["asked"]["ntasks-per-node"])
        here = {
            "SLURM_JOB_ID": id,
            "SLURM_NTASKS": str(nodes * tasks),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_SUBMIT_DIR": job["cwd"],
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        self.set(id, state="RUNNING", nodes="localhost", reason="None")
        done = subprocess.run(
            ["bash", str(spooled)], cwd=job["cwd"], env={**job["env"], **here, **env}, capture_output=True, text=True
        )
        (Path(job["cwd"]) / job["asked"]["output"].replace("%j", id)).write_text(done.stdout + done.stderr)
        return done


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Its commands come first on PATH."""
    fake = Slurm(tmp_path / "slurm", tmp_path / "bin")
    fake.state.mkdir()
    fake.bin.mkdir()
    for name in COMMANDS:
        program = fake.bin / name
        program.write_text(f"#!{sys.executable} -IS\nSTATE = {str(fake.state)!r}\n{PROGRAM.read_text()}")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any of its commands."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@dataclass
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


Launch = Callable[..., Said]


@pytest.fixture
def launch(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launch:
    """`python -m launch WORDS`, in an empty folder."""
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")

    def run(*words: str | Path) -> Said:
        capfd.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture
def site(tmp_path: Path, cohort: Path) -> Path:
    """A site file that says that all nodes see the test's folder, and that of the tests' store."""
    path = tmp_path / "site.toml"
    path.write_text(f'shared = ["{tmp_path}", "{cohort.parent}"]\n')
    return path


@pytest.fixture
def submit(launch: Launch, site: Path, store: Path) -> Launch:
    """`launch submit demo_cauc`, of a network of a moment, on the tests' store and site; further words may follow."""

    def run(*words: str | Path) -> Said:
        return launch("submit", "demo_cauc", *SMALL, "--data.store", store, "--site", site, *words)

    return run


@dataclass
class Folder:
    """A run folder, and what a test writes into it in place of a job."""

    path: Path

    @property
    def name(self) -> str:
        """Its job's."""
        return script.name_of(self.path.name, self.path)

    def job(self, id: str, name: str = "") -> "Folder":
        """As `submit` records it."""
        record(self.path, id=id, name=name or self.name)
        return self

    def attempt(
        self, id: str, *end: str, nodes: str = "n1", exits: dict[int, int] | None = None, logs: tuple[str, ...] = ("",)
    ) -> Path:
        """The next attempt: a log a rank; the ranks' exit codes; the lines of its verdict, none while it is at work."""
        folder = self.path / "attempts" / f"{len(list(self.path.glob('attempts/*'))) + 1:03}"
        folder.mkdir(parents=True)
        (folder / "job").write_text(
            f"id={id}\nnodes={nodes}\ntasks={max(1, len(logs))}\nrestarts=0\nbegan=1764000000\n"
        )
        for rank, text in enumerate(logs):
            (folder / f"rank-{rank}.log").write_text(text)
            (folder / f"rank-{rank}.host").write_text("n1\n")
        for rank, code in (exits or {}).items():
            (folder / f"rank-{rank}.exit").write_text(f"{code}\n")
        if end:
            (folder / "end").write_text("\n".join(end) + "\n")
        return folder

    def journal(self, *events: tuple[str, dict[str, Any]]) -> "Folder":
        """Events of it, appended."""
        with Journal(self.path) as journal:
            for event, fields in events:
                journal.write(event, **fields)
        return self

    def steps(self, *numbers: int, event: str = "start", at: int = 0, seconds: float = 2.0) -> "Folder":
        """A life of the run: 6 subjects a step, 10 steps an epoch, 10 epochs; the loss of step i is i / 10."""
        began = {"step": at, "steps_per_epoch": 10, "epochs": 10, "ranks": 1, "launcher": "slurm"}
        step = {"step_s": seconds, "samples_per_s": 6 / seconds}
        return self.journal((event, began), *(("step", {"step": i, "loss": i / 10, **step}) for i in numbers))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Folder]:
    """`folder(name)`: tmp_path/runs/NAME with its config.json."""

    def make(name: str = "mine") -> Folder:
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        run = dataclasses.replace(recipes.get("demo_cauc"), name=name, run=path)
        (path / "config.json").write_text(config.to_json(run))
        return Folder(path)

    return make
