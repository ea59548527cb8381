"""A store by the tasks of a SLURM array, each of which runs `cauc ingest ... --task I/N`.

STORE.ingest beside the store holds the script, a snapshot of the code and a log a task. What is killed goes on where it
was when the same command is given again.
"""

import contextlib
import dataclasses
import re
import shlex
import shutil
from pathlib import Path

from cauc_dist.cli import data
from cauc_dist.errors import SET_ASIDE, BadInput
from launch import script, slurm, submit
from launch.site import Resources, Site
from launch.submit import Say

SCRIPT = "script.sh"
LATE = "the store is made, nothing was left to do"


def ingest(
    asked: data.Ingest,
    tasks: int,
    resources: Resources,
    site: Site,
    *,
    throttle: int | None = None,
    say: Say,
    dry_run: bool = False,
) -> Path:
    """Check, write STORE.ingest, queue the array; the folder. What is refused leaves no folder behind.

    A task has one process group on one node, `cpus_per_rank` workers, no GPU. `dry_run` says script and estimate.
    """
    asked, folder = absolute(asked), folder_of(asked.store)
    _refuse(asked, tasks)
    text = batch(asked, tasks, resources, site, throttle)
    if dry_run:
        say(text)
        say(_estimate(asked))
        return folder
    slurm.required()
    submit.check_folder(folder, site)
    name = _name(asked.store)
    say(_estimate(asked))
    new = _made(folder)
    with submit.alone(folder):
        with submit.whole(folder) if new else contextlib.nullcontext():
            _refuse_live(name)
            _write(folder, text)
        with submit.handed(name, say, lambda: submit.remove(folder) if new else None):
            said = slurm.call("sbatch", "--parsable", SCRIPT, cwd=folder, env=slurm.environment(site.keep))
            array = _id(said)
            submit.record(folder, id=array, name=name, tasks=tasks)
    say(f"array {array} ({name}) of {tasks} tasks, logs {folder}/{script.SLURM}/{array}_*.log")
    say("the last one makes the store. Where one fails, the same command again goes on")
    return folder


def _made(folder: Path) -> bool:
    """Whether the folder was not there before: of two that begin at a time, it is one's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _id(said: str) -> str:
    """N, of `N` or `N;cluster`, which warnings may precede."""
    words = said.strip().splitlines()
    if not words or not (found := re.fullmatch(r"(\d+)(;.*)?", words[-1])):
        raise ValueError(f"sbatch said {said.strip()!r}")
    return found[1]


def _refuse_live(name: str) -> None:
    """Two arrays would do the same work."""
    if live := [job.id for job in slurm.queue() if job.name == name]:
        raise BadInput(
            f"this store is being made by {len(live)} tasks ({live[0]} ...)",
            wanted="one array at a time",
            do=f"wait for it, or end it first: scancel --name {shlex.quote(name)}",
        )


def batch(asked: data.Ingest, tasks: int, resources: Resources, site: Site, throttle: int | None) -> str:
    """The batch script."""
    r = dataclasses.replace(resources, nodes=1, gpus_per_node=0, ranks_per_node=1)
    if asked.workers is None:
        asked = dataclasses.replace(asked, workers=r.cpus_per_rank)
    folder = folder_of(asked.store)
    array = script.array(f"0-{tasks - 1}", throttle)
    made = script.executor(folder, r, site, _name(asked.store), members=2, array=array)
    # submitit's own srun is unbuffered, by a terminal: a bar would fill the log.
    made.parameters |= {
        "use_srun": False,
        "setup": [
            *script.prelude(site),
            f"if [ -e {shlex.quote(str(asked.store))} ]; then echo {LATE}; exit 0; fi",
        ],
        "teardown": [f"rc=$?; [ $rc = {SET_ASIDE} ] && rc=0 # scans were set aside: its log names them", "exit $rc"],
    }
    srun = shlex.join(["srun", f"--output={script.SLURM}/%A_%a.log", "--open-mode=append", *script.srun_words(r, site)])
    mine = f'--task "$SLURM_ARRAY_TASK_ID/{tasks}"'
    command = f"{srun} {script.python(site)} -u -m cauc_dist ingest {shlex.join(words(asked))} {mine}"
    return made._make_submission_file_text(command, "")


def words(asked: data.Ingest) -> list[str]:
    """The command line of these options: what is not as it is by default."""
    metadata = asked.metadata
    pairs = [(f.name, getattr(metadata, f.name), f.default) for f in dataclasses.fields(metadata)]
    pairs += [(f.name, getattr(asked, f.name), f.default) for f in dataclasses.fields(asked)]
    found = [str(asked.source), str(asked.store)]
    for name, value, default in pairs:
        if name in ("source", "store", "metadata", "dry_run", "task") or value == default:
            continue
        found.append(f"--{name.replace('_', '-')}")
        if value is not True:
            found += map(str, value) if isinstance(value, tuple) else [str(value)]
    return found


def absolute(asked: data.Ingest) -> data.Ingest:
    """The same from anywhere."""
    m = asked.metadata
    table, features = (path and path.absolute() for path in (m.table, m.features))
    return dataclasses.replace(
        asked,
        source=asked.source.absolute(),
        store=asked.store.absolute(),
        metadata=dataclasses.replace(m, table=table, features=features),
    )


def folder_of(store: Path) -> Path:
    """Where script and logs are."""
    return store.with_name(f"{store.name}.ingest")


def _name(store: Path) -> str:
    return script.name_of(f"ingest-{re.sub(r'[^A-Za-z0-9._-]+', '-', store.name)}", store)


def _refuse(asked: data.Ingest, tasks: int) -> None:
    if tasks < 1:
        raise BadInput(f"--tasks {tasks}", wanted="1 or more", do="e.g. --tasks 16")
    if asked.task != data.Ingest(asked.source, asked.store).task:
        raise BadInput(f"--task {asked.task}", wanted="--tasks N, of which each takes its own", do="leave --task out")
    if asked.store.exists():
        raise BadInput(
            f"{asked.store} exists already", wanted="a new path", do="name another store, or remove this one first"
        )


def _estimate(asked: data.Ingest) -> str:
    """What `cauc ingest --dry-run` says, and BadInput for what it refuses."""
    from cauc_dist.store.ingest import estimate
    from cauc_dist.store.planned import Settings

    settings = Settings(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(Settings)})
    return str(estimate(asked.source, settings, workers=asked.workers, **dataclasses.asdict(asked.metadata)))


def _write(folder: Path, text: str) -> None:
    """Script and snapshot, anew; earlier logs stay."""
    shutil.rmtree(folder / script.SNAPSHOT, ignore_errors=True)
    script.snapshot(folder)
    (folder / script.SLURM).mkdir(exist_ok=True)
    (folder / SCRIPT).write_text(text, encoding="utf-8")
