"""SLURM's commands as one small program, installed under each of their names: a cluster that lives in a folder.

It says what SLURM 22.05 says, where it refuses (tried on a real cluster, 2026-11-24), and remembers every call. Jobs do
not run by themselves: a test sets their states, or runs the batch script with `srun` below, which starts real ranks.
conftest.py writes STATE, the folder, above this text.
"""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(globals()["STATE"])  # written above, not taken from the environment: a job gets a scrubbed one
NAME, ARGUMENTS = Path(sys.argv[0]).name, sys.argv[1:]
LIMITS = {"main": (4, 600), "urgent": (2, 60)}
"""Partition: nodes, and the longest time in minutes."""


def end(words: str = "", code: int = 1) -> None:
    print(words, file=sys.stderr)
    sys.exit(code)


def load() -> dict:
    path = STATE / "cluster.json"
    return json.loads(path.read_text()) if path.exists() else {"next": 41, "queue": {}, "accounted": {}}


def save(cluster: dict) -> None:
    temporary = STATE / f"cluster.{os.getpid()}"
    temporary.write_text(json.dumps(cluster, indent=1))
    temporary.replace(STATE / "cluster.json")


def options(words: list[str]) -> tuple[dict, str]:
    """Long options by name, and the script."""
    found, script = {}, ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name] = value
        else:
            script = word
    return found, script


def minutes(text: str) -> float:
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        parts = [*parts, 0, 0][:3]
        return int(days) * 1440 + parts[0] * 60 + parts[1]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1] / 60 if len(parts) == 2 else parts[0] * 60 + parts[1]


def sbatch() -> None:
    asked, script = options(ARGUMENTS)
    test = "test-only" in asked
    if not script or not Path(script).exists():
        end(f"sbatch: error: Unable to open file {script}")
    text = Path(script).read_text()
    lines = [shlex.split(line[8:])[0] for line in text.splitlines() if line.startswith("#SBATCH ")]
    o = {**options(lines)[0], **asked}
    refuse = "allocation failure: " if test else "sbatch: error: Batch job submission failed: "
    partition = o.get("partition", "main")
    if partition not in LIMITS:
        print(f"sbatch: error: invalid partition specified: {partition}", file=sys.stderr)
        end(refuse + "Invalid partition name specified")
    nodes, longest = LIMITS[partition]
    if int(o["nodes"]) > nodes:
        end(refuse + "More processors requested than permitted")
    if minutes(o["time"]) > longest:
        end(refuse + "Requested time limit is invalid (missing or exceeds some limit)")
    if o.get("account", "mine") != "mine":
        end(refuse + "Invalid account or account/partition combination specified")
    if not test and (STATE / "full").exists():
        print("sbatch: error: QOSMaxSubmitJobPerUserLimit", file=sys.stderr)
        end(refuse + "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)")
    cluster = load()
    id = str(cluster["next"])
    if test:
        when = "3047-03-26T14:12:46" if (STATE / "never").exists() else "2026-11-24T23:46:08"
        end(f"sbatch: Job {id} to start at {when} using 1 processors on nodes n1 in partition main", 0)
    cluster["next"] += 1
    array = [*expand(o["array"].partition("%")[0])] if "array" in o else [None]
    for task in array:
        cluster["queue"][id if task is None else f"{id}_{task}"] = {
            "name": o["job-name"],
            "state": "PENDING",
            "reason": "Dependency" if "dependency" in o else "Priority",
            "nodes": "",
            "asked": o,
            "script": text,
            "cwd": str(Path.cwd()),
            "env": dict(os.environ),
        }
    save(cluster)
    print(id if "parsable" in asked else f"Submitted batch job {id}")


def expand(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def squeue() -> None:
    wanted = ARGUMENTS[ARGUMENTS.index("-j") + 1] if "-j" in ARGUMENTS else None
    jobs = load()["queue"]
    if wanted and wanted not in jobs:
        end("slurm_load_jobs error: Invalid job id specified")
    for id, job in jobs.items():
        if wanted in (None, id):
            values = {"i": id, "j": job["name"], "T": job["state"], "r": job["reason"], "N": job["nodes"], "S": "N/A"}
            asked = job.get("asked", {})
            values |= {"L": job.get("left", "30:00"), "l": asked.get("time", "30:00"), "b": "N/A"}
            values |= {"f": asked.get("constraint", "(null)"), "v": asked.get("reservation", "(null)")}
            values["x"] = asked.get("exclude", "")
            if "-O" in ARGUMENTS:
                what = ARGUMENTS[ARGUMENTS.index("-O") + 1]
                print(job.get("restarts", "0") if what == "RestartCnt" else f"{asked.get('output', '')}   ")
                continue
            form = ARGUMENTS[ARGUMENTS.index("-o") + 1]
            print("".join(values[part[0]] + part[1:] for part in form.split("%")[1:]))


def sacct() -> None:
    if (STATE / "no-accounting").exists():
        end("Slurm accounting storage is disabled")
    for id in ARGUMENTS[ARGUMENTS.index("-j") + 1].split(","):
        if id in (jobs := load()["accounted"]):
            print("|".join([id, jobs[id]["state"], jobs[id]["nodes"], jobs[id]["name"]]))


def scancel() -> None:
    cluster = load()
    for id in ARGUMENTS:
        for own in [own for own in cluster["queue"] if own == id or own.startswith(f"{id}_")]:
            if (STATE / "stuck").exists():
                cluster["queue"][own]["state"] = "COMPLETING"
                continue
            job = cluster["queue"].pop(own)
            cluster["accounted"][own] = {**job, "state": f"CANCELLED by {os.getuid()}"}
            if (STATE / "returns").exists():  # its script was queueing it again: it comes back, once
                cluster["queue"][(STATE / "returns").read_text()] = {**job, "state": "PENDING", "reason": "BeginTime"}
                (STATE / "returns").unlink()
    save(cluster)


def scontrol() -> None:
    if ARGUMENTS[0] != "requeue":
        end(f"invalid keyword: {ARGUMENTS[0]}")
    cluster = load()
    if ARGUMENTS[1] not in cluster["queue"]:
        end(f"Invalid job id specified for job {ARGUMENTS[1]}")
    cluster["queue"][ARGUMENTS[1]] |= {"state": "PENDING", "reason": "BeginTime", "nodes": ""}
    save(cluster)


def sinfo() -> None:
    form = ARGUMENTS[ARGUMENTS.index("-o") + 1]
    for name, (nodes, _) in LIMITS.items():
        print(form.replace("%R", name).replace("%D", str(nodes)).replace("%c", "2").replace("%G", "(null)"))


def srun() -> None:
    """As many processes as the step has tasks, a log each; the largest of their exit codes."""
    begin = 0
    while ARGUMENTS[begin].startswith("-"):
        begin += 2 if ARGUMENTS[begin] == "--output" else 1
    log = [word.partition("=")[2] for word in ARGUMENTS[:begin] if word.startswith("--output=")][-1]
    tasks, ranks = int(os.environ["SLURM_NTASKS"]), []
    for rank in range(tasks):
        here = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_STEP_ID": 0}
        here |= {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_STEP_NODELIST": "localhost"}
        env = os.environ | {name: str(value) for name, value in here.items()}
        with Path(log.replace("%t", str(rank))).open("ab") as file:
            ranks.append(subprocess.Popen(ARGUMENTS[begin:], env=env, stdout=file, stderr=subprocess.STDOUT))
    if (STATE / "asks").exists():  # the end of the time is near, once: the ranks hear SIGTERM when they have begun
        (STATE / "asks").unlink()
        while any(
            rank.poll() is None and not Path(log.replace("%t.log", f"{i}.host")).exists()
            for i, rank in enumerate(ranks)
        ):
            time.sleep(0.05)
        for rank in ranks:
            rank.send_signal(15)
    sys.exit(max(rank.wait() if rank.wait() >= 0 else 128 - rank.wait() for rank in ranks))


def main() -> None:
    with (STATE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (STATE / "calls.jsonl").open("a") as file:
            call = {"name": NAME, "arguments": ARGUMENTS, "env": dict(os.environ), "time": time.time()}
            file.write(json.dumps(call) + "\n")
        broken = STATE / f"broken-{NAME}"
        if broken.exists():
            end(broken.read_text())
        if NAME != "srun":
            globals()[NAME]()
            return
    srun()


main()
