"""From a run folder to the batch script that sbatch gets: submitit's, with the lines of a site and of slurm/attempt.sh.

submitit writes the pickle of the job, names it by the job's id and calls sbatch. What it makes of states, signals and
results is not used: those of SLURM and of the attempts' folders are right while a job is requeued, its are not
(docs/log.md, 2026-11-24).
"""

import hashlib
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import submitit

import cauc_dist
from cauc_dist.errors import BadInput
from launch.site import Resources, Site

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT, SLURM = "snapshot", "slurm"
WAIT = 30
"""Seconds that ranks have after the first of them has ended: to say whom they miss, and end by themselves."""


class Executor(submitit.SlurmExecutor):
    """submitit's, on a machine without SLURM too: a dry run needs none."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def executor(
    folder: Path, resources: Resources, site: Site, name: str, *, members: int = 1, array: str = ""
) -> Executor:
    """Of a run folder, or of a sweep's with `members` runs that its file `runs` names.

    `array`: the members that are queued, as sbatch has it (0-5%2); default: all.
    """
    made = Executor(folder=folder / SLURM, python=_command(site))
    made.update_parameters(**_parameters(folder, resources, site, name, members))
    if array:
        made.parameters["additional_parameters"]["array"] = array
    return made


def array(tasks: str, throttle: int | None) -> str:
    """sbatch's --array: `tasks` (0-5, or 1,3), at most `throttle` of them at a time."""
    if throttle is not None and throttle < 1:
        raise BadInput(f"--throttle {throttle}", wanted="1 or more at a time", do="e.g. --throttle 4")
    return tasks if throttle is None else f"{tasks}%{throttle}"


def text(made: Executor, members: int = 1) -> str:
    """The script, byte for byte as submitit will write it."""
    before = dict(made.parameters)
    if members > 1:
        made.parameters["map_count"] = members
    try:
        return made._make_submission_file_text(made._submitit_command_str, "")
    finally:
        made.parameters = before  # map_array refuses a count that it has not set itself


def name_of(run: str, folder: Path) -> str:
    """A job's name, which another run's job of the same id, on a cluster that counts from 1 again, does not have."""
    return f"{run}-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]}"


def snapshot(folder: Path) -> None:
    """The code as it is now, for every start of the job: what is edited while it waits is not what it runs."""
    away = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(Path(cauc_dist.__file__).parent, folder / SNAPSHOT / "cauc_dist", ignore=away)
    (folder / SNAPSHOT / "slurm").mkdir()
    shutil.copy(ROOT / "slurm" / "attempt.sh", folder / SNAPSHOT / "slurm")


def _command(site: Site) -> str:
    """What follows `srun`'s own options: a log of its own a rank and attempt, the container, python."""
    return f'--output="$CAUC_ATTEMPT/rank-%t.log" {python(site)}'


def python(site: Site) -> str:
    """The interpreter of the jobs as the last of srun's words: in the site's container, where there is one."""
    box = site.container
    if box is None:
        return shlex.quote(site.python or sys.executable)
    inside = shlex.quote(site.python or "python")
    if box.kind == "pyxis":  # it would begin in the image's own folder
        return f'--container-workdir="$PWD" {inside}'
    mounts = [word for mount in box.mounts for word in ("--bind", mount)]
    return f"{shlex.join(['apptainer', 'exec', *mounts, *box.options, box.image])} {inside}"


def srun_words(resources: Resources, site: Site) -> list[str]:
    """Options of srun that the resources and the site ask for."""
    words = [f"--cpus-per-task={resources.cpus_per_rank}", "--export=ALL", *site.srun]
    if site.container and site.container.kind == "pyxis":
        mounts = site.container.mounts
        words += [
            f"--container-image={site.container.image}",
            *([f"--container-mounts={','.join(mounts)}"] * bool(mounts)),
            *site.container.options,
        ]
    return words


def prelude(site: Site) -> list[str]:
    """What a batch script does first: the site's modules and variables, and the snapshot before other code."""
    return [
        *(["module purge"] if site.modules else []),
        *(f"module load {shlex.quote(module)}" for module in site.modules),
        *(f"export {key}={shlex.quote(value)}" for key, value in site.environment.items()),
        f'export PYTHONPATH="$SLURM_SUBMIT_DIR/{SNAPSHOT}"',
        *site.setup,
    ]


def _parameters(folder: Path, resources: Resources, site: Site, name: str, members: int) -> dict[str, Any]:
    r = resources
    log = "%A_%a" if members > 1 else "%j"
    others = {
        "time": r.time,
        "signal": f"USR2@{r.signal_seconds}",  # submitit's has another name where SUBMITIT_PREEMPT_SIGNAL is set
        "requeue": True,
        "export": "ALL",
        "output": f"{SLURM}/{log}.log",
        **({"mem": f"{math.ceil(r.mem_gb * 1024)}M"} if r.mem_gb else {}),
        **{key: value if value else True for key, value in site.sbatch.items()},
    }
    member = (
        '"$(sed -n $((${SLURM_ARRAY_TASK_ID:-0} + 1))p runs)"' if (folder / "runs").exists() or members > 1 else "."
    )
    return {
        "job_name": name,
        "nodes": r.nodes,
        "ntasks_per_node": r.ranks_a_node,
        "cpus_per_task": r.cpus_per_rank,
        "gpus_per_node": r.gpus_per_node or None,
        "partition": r.partition,
        "account": r.account,
        "qos": r.qos,
        "constraint": r.constraint,
        "exclude": r.exclude,
        "nodelist": r.nodelist,
        "signal_delay_s": r.signal_seconds,
        "wckey": None,
        "stderr_to_stdout": True,
        "srun_args": ["--kill-on-bad-exit=0", f"--wait={WAIT}", *srun_words(r, site)],
        "additional_parameters": others,
        "setup": [
            f". {SNAPSHOT}/slurm/attempt.sh",
            "export CAUC_SCRIPT=$0",
            f"export CAUC_MAX_TRIES={r.max_tries} CAUC_REQUEUE_ON={shlex.quote(' '.join(map(str, r.requeue_on)))}",
            *prelude(site),
            f"begin_attempt {member}",
        ],
        "teardown": ["end_attempt $?"],
    }
