"""`make cluster-demo`: a training by submitit on a real SLURM cluster on this machine; a node dies on the way.

    python slurm/cluster/demo.py [FOLDER]       default: demo/cluster-DATE-TIME; root, and the packages of README.md

2 nodes x 2 ranks of the 4 nodes train demo_cauc. The second node of the job dies at step `FALL`; SLURM notices, queues
the job again, and the run goes on from its newest checkpoint on other nodes.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cauc_dist import journal  # noqa: E402
from cauc_dist.phantoms import write_cohort  # noqa: E402
from cauc_dist.store.ingest import ingest  # noqa: E402

SCRIPT = ROOT / "slurm" / "cluster" / "cluster.sh"
SUBJECTS, SIZE = 96, 16
EPOCHS, FALL = 40, 25  # 80 steps, a checkpoint each 10
LINK = "30mbit"  # until the node dies: a step takes a second and more then, long enough to watch
LONGEST, LOOK = 600, 4
"""Seconds: after which something is wrong, and between two looks at the run."""
RESOURCES = ("--nodes", "2", "--ranks-per-node", "2", "--time", "60", "--mem-gb", "0.9", "--signal-seconds", "30")
Say = Callable[[str], None]


def demo(folder: Path) -> int:
    """All of it; 0 where the run has survived."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    site, run, store = Path(tempfile.mkdtemp(prefix="slurm-demo-")), folder / "run", folder / "store.zarr"
    with cluster(site):
        folder.mkdir(parents=True)
        say(f"a SLURM cluster of 4 nodes on this machine ({site})")
        say(f"{SUBJECTS} synthetic heads of {SIZE}^3, and their store")
        write_cohort(folder / "cohort", n=SUBJECTS, size=SIZE, seed=0)
        ingest(folder / "cohort", store)
        told = folder / "site.toml"
        told.write_text(
            f'shared = [{json.dumps(str(folder))}]\n[environment]\nOMP_NUM_THREADS = "1"\n', encoding="utf-8"
        )
        recipe = ("--data.store", str(store), "--run", str(run), "--epochs", str(EPOCHS))
        command = ("-m", "launch", "submit", "demo_cauc", *recipe, *RESOURCES, "--site", str(told))
        say("$ python " + " ".join(command))
        print(verb(site, "exec", sys.executable, *command), end="", flush=True)
        for number in range(1, 5):
            verb(site, "rate", f"n{number}", LINK)
        watch(site, run, say)
        for path in sorted(run.glob("attempts/*")):
            end = path / "end"
            say(f"attempt {path.name}: {end.read_text(encoding='utf-8').strip() if end.exists() else 'cut off'}")
        return verdict(run, say)


def watch(site: Path, run: Path, say: Say) -> None:
    """Say what `launch status` says until the run left the queue, and power a node off on the way."""
    (job,) = [json.loads(line)["id"] for line in (run / "jobs.jsonl").read_text(encoding="utf-8").splitlines()]
    fallen, titled, deadline = "", False, time.monotonic() + LONGEST
    while verb(site, "exec", "squeue", "-h", "-j", job).strip() and time.monotonic() < deadline:
        table = verb(site, "exec", sys.executable, "-m", "launch", "status", str(run)).splitlines()
        if not titled:
            print(" " * 9 + table[0])
        titled = True
        say(table[-1])
        if not fallen and steps(run) >= FALL:
            nodes = verb(site, "exec", "squeue", "-h", "-j", job, "-o", "%N").strip()
            fallen = verb(site, "exec", "scontrol", "show", "hostnames", nodes).split()[-1]
            verb(site, "kill", fallen)
            say(f"{fallen} is powered off: SLURM misses it in 10 to 20 s")
            for number in range(1, 5):
                verb(site, "rate", f"n{number}", "none")
        time.sleep(LOOK)
    say("it left the queue" if time.monotonic() < deadline else f"not over after {LONGEST} s")


def verdict(run: Path, say: Say) -> int:
    """0 where the run was finished after it had been resumed."""
    events = journal.read(run)
    again = [event["step"] for event in events if event["event"] == "resume"]
    ended = any(event["event"] == "end" for event in events)
    if ended and again:
        say(f"finished: {steps(run)} steps, gone on at step {again[0]} without the node; {run} has it all")
        say(f"`cauc report {run}` makes a page of it, `cauc export` a network")
        return 0
    say(f"it did not survive: steps {steps(run)}, resumed at {again}, ended {ended}; look into {run}")
    return 1


def steps(run: Path) -> int:
    """How many are in the journal, and count."""
    return sum(event["event"] == "step" for event in journal.read(run))


@contextlib.contextmanager
def cluster(site: Path) -> Iterator[None]:
    """A cluster in that folder; it is stopped, and the folder removed, whatever happens."""
    log = site.with_suffix(".log")  # a file: the daemons keep what they were given open
    try:
        with log.open("w") as file:
            started = subprocess.run([SCRIPT, "start"], env=_env(site), stdout=file, stderr=subprocess.STDOUT)
        if started.returncode:
            raise SystemExit(log.read_text(encoding="utf-8").strip())
        try:
            yield
        finally:
            verb(site, "stop")
    finally:
        log.unlink()
        shutil.rmtree(site, ignore_errors=True)


def verb(site: Path, *words: str) -> str:
    """What cluster.sh prints."""
    done = subprocess.run([SCRIPT, *words], env=_env(site), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def _env(site: Path) -> dict[str, str]:
    opened = f"{ROOT}:{sys.prefix}:{sys.base_prefix}"
    return {**os.environ, "SITE": str(site), "NODES": "4", "CPUS": "2", "OPEN": opened}


if __name__ == "__main__":
    named = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo" / f"cluster-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        sys.exit(demo(named.absolute()))
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(error.returncode)
