"""From a recipe to a job in the queue: what is wrong is said before, and leaves nothing behind."""

import contextlib
import dataclasses
import fcntl
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError

from cauc_dist.config import RunConfig
from cauc_dist.durable import replace
from cauc_dist.errors import BadInput
from cauc_dist.job import Job
from cauc_dist.store.files import is_remote
from launch import script, slurm
from launch.site import Resources, Site

JOBS, LAUNCH, LOCK = "jobs.jsonl", "launch.json", "launch.lock"
LOCAL = ("tmpfs", "ramfs", "overlay", "squashfs")
"""File systems that no two nodes share. (ext4 and xfs may be exported by this very machine.)"""
Say = Callable[[str], None]


def submit(
    run: RunConfig, resources: Resources, site: Site, *, say: Say, dry_run: bool = False, test_only: bool = False
) -> Path:
    """Check, write the run folder, queue its job; the folder.

    `dry_run` says the batch script and the plan of the batch instead, and writes nothing. `test_only` checks all,
    asks SLURM, and leaves no folder. Raises BadInput for what cannot be a run, and what SLURM refuses; the folder then
    does not exist. Where sbatch gives no clear answer the folder stays: the job may be in the queue.
    """
    folder = run.folder.absolute()
    run = dataclasses.replace(run, run=folder)
    name = script.name_of(run.name, folder)
    if dry_run:
        say(script.text(script.executor(folder, resources, site, name)))
        say(plan(run, resources))
        return folder
    slurm.required()
    check_new(folder)
    check_folder(folder, site)
    check_place(run, site)
    check_times(run, resources)
    began = time.monotonic()
    from cauc_dist.prepare import prepare

    prepare(run, resources.ranks, 0)
    came_up = time.monotonic() - began
    with alone(folder):
        with whole(folder):
            check_checkpoint(run, resources)
            write(folder, resources, site)
            say(plan(run, resources))
            made = script.executor(folder, resources, site, name)
            say(asked(script.text(made), folder, site, came_up))
        if test_only:
            shutil.rmtree(folder)
            return folder
        with handed(name, say, lambda: remove(folder)):
            (id,) = queue(made, folder, site, [folder])
            record(folder, id=id, name=name)
    say(f"job {id} ({name}), run folder {folder}")
    return folder


def write(folder: Path, resources: Resources, site: Site) -> None:
    """Snapshot of the code, and what was asked for."""
    script.snapshot(folder)
    (folder / script.SLURM).mkdir()
    note(folder, resources, site)


def note(folder: Path, resources: Resources, site: Site) -> None:
    """What the latest job of a run, or of a sweep, was queued with."""
    said = {"resources": dataclasses.asdict(resources), "site": dataclasses.asdict(site)}
    replace(folder / LAUNCH, (json.dumps(said, indent=1) + "\n").encode())


def remove(folder: Path) -> None:
    """The folder of what was never queued."""
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[None]:
    """Around what is done in a new folder before sbatch: where it fails the folder goes."""
    try:
        yield
    except BaseException:
        remove(folder)
        raise


@contextlib.contextmanager
def handed(name: str, say: Say, undo: Callable[[], object]) -> Iterator[None]:
    """Around sbatch and what is noted of its answer: `undo` where it refuses the job, and only there.

    Whatever else goes wrong, from a ctrl-C to a full disk, the job may be in the queue, and nothing is undone.
    """
    look = f"the job may be queued: `squeue --name {shlex.quote(name)}` (its folder stays)"
    try:
        yield
    except slurm.Refused:
        undo()
        raise
    except Exception as error:
        why = error.found if isinstance(error, BadInput) else str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"sbatch was given {name}, then: {why}", wanted="an id that could be noted", do=look) from error
    except BaseException:
        with contextlib.suppress(OSError):
            say(look)
        raise


@contextlib.contextmanager
def alone(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Refuse where another launch checks and queues in this folder; `shared`: others may that ask so, too."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BadInput(
            f"another launch is at work on {folder}", wanted="one at a time", do="look what it has queued, then go on"
        ) from None
    except OSError:
        pass  # a file system without locks: nothing can be told
    try:
        yield
    finally:
        os.close(lock)


def queue(made: script.Executor, folder: Path, site: Site, runs: list[Path]) -> list[str]:
    """sbatch, by submitit, in the folder: one job, or an array of several runs; their ids."""
    with slurm.only(slurm.environment(site.keep)), contextlib.chdir(folder):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
                these = [Job(str(run)) for run in runs]
                jobs = made.submit_array(these) if len(these) > 1 else [made.submit(these[0])]
        except FailedJobError as error:  # of what --test-only does not know, e.g. how many jobs one may have
            if not isinstance(cause := error.__cause__, subprocess.CalledProcessError):
                raise  # what sbatch said could not be read
            if cause.returncode < 0:
                raise slurm.cut_off("sbatch", -cause.returncode) from None
            raise slurm.refused("sbatch", str(error)) from None
    return [job.job_id for job in jobs]


def asked(text: str, folder: Path, site: Site, came_up: float) -> str:
    """SLURM's own estimate of when the job starts; BadInput with its words where it would not take it."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        said = slurm.call("sbatch", "--test-only", file.name, cwd=folder, env=slurm.environment(site.keep))
    found = re.search(r"to start at (\d+)(\S+)", said)
    far = found is None or int(found[1]) > time.localtime().tm_year + 1  # SLURM's word for never
    when = "a time that it does not know yet" if far or found is None else found[1] + found[2]
    return f"SLURM would start it at {when}; the first step follows imports and checks, {came_up:.0f} s here"


def plan(run: RunConfig, resources: Resources) -> str:
    """How the global batch falls on the ranks, in words."""
    from cauc_dist.stream.plan import per_rank

    sizes = per_rank(run.batch_size, resources.ranks)
    share = f"{sizes[0]} subjects a rank" if sizes[0] == sizes[-1] else f"{sizes[-1]} or {sizes[0]} subjects a rank"
    return (
        f"{resources.nodes} nodes x {resources.ranks_a_node} ranks = {resources.ranks} ranks; "
        f"global batch {run.batch_size}, {share}, {run.augment.views} views each; {run.epochs} epochs"
    )


def check_new(folder: Path) -> None:
    """Refuse the run folder of another job, in words that `prepare` has not."""
    if not (folder / JOBS).exists():
        return
    from launch import state  # it imports this module

    (now,) = state.status([folder])
    if now.live:
        raise BadInput(f"run folder {folder} is taken: {now.where}", wanted="a new one", do="choose another with --run")
    raise BadInput(
        f"run folder {folder} exists already, its job {now.id} is {now.state}",
        wanted="a new one",
        do=f"go on with it by `python -m launch resume {folder}`, or choose another with --run",
    )


def check_folder(folder: Path, site: Site) -> None:
    """Refuse a run folder that the nodes would not see, or whose name a job cannot bear."""
    if odd := sorted({c for c in str(folder) if c in "%:\\\n"}):
        raise BadInput(
            f"run folder {folder} has {' '.join(map(repr, odd))} in its path",
            wanted="none of % : \\ (SLURM and PYTHONPATH read them otherwise)",
            do="choose another with --run",
        )
    home = next(path for path in folder.parents if path.exists())
    if site.shared:
        if (places := unseen(home, site)) is not None:
            raise BadInput(
                f"run folder {folder}",
                wanted=f"a place that all nodes see: {places}",
                do="choose another with --run, or mend `shared` in the site file",
            )
    elif (kind := file_system(home)) in LOCAL:
        raise BadInput(
            f"run folder {folder} on a file system of this machine alone ({kind})",
            wanted="one that all nodes see",
            do="choose another with --run, or name it in `shared` of the site file",
        )
    if not os.access(home, os.W_OK):
        raise BadInput(f"{home} is not to be written", wanted="a folder of yours", do="choose another with --run")


def check_place(run: RunConfig, site: Site) -> None:
    """Refuse a store that the site's nodes would not see."""
    store = run.data.store
    if is_remote(store):
        return
    if (places := unseen(Path(store), site)) is not None:
        raise BadInput(
            f"store {store}",
            wanted=f"a place that all nodes see: {places}",
            do="copy it there and set --data.store, or mend `shared` in the site file",
        )


def unseen(path: Path, site: Site) -> str | None:
    """The folders that all nodes see, where the path lies in none of them; None where it does, or no one knows them."""
    places = [Path(os.path.expandvars(place)).resolve() for place in site.shared]
    if not places or any(path.resolve().is_relative_to(place) for place in places):
        return None
    return ", ".join(map(str, places))


def file_system(path: Path) -> str:
    """The kind of file system that a folder is on, in the kernel's words; "" where that cannot be known."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
        places = {fields[1].encode().decode("unicode_escape"): fields[2] for fields in mounts}
        resolved = path.resolve()
        return places[max((place for place in places if resolved.is_relative_to(place)), key=len)]
    return ""


def check_numbers(resources: Resources) -> None:
    """Refuse counts that SLURM, or a division, would stumble over."""
    least = {
        "nodes": 1,
        "ranks_per_node": 1,
        "cpus_per_rank": 1,
        "max_tries": 1,
        "gpus_per_node": 0,
        "signal_seconds": 1,
    }
    for name, bound in least.items():
        value = getattr(resources, name)
        if value is not None and value < bound:
            option = name.replace("_", "-")
            raise BadInput(f"--{option} {value}", wanted=f"{bound} or more", do="set it to that, or leave it out")


def check_times(run: RunConfig, resources: Resources) -> None:
    """Refuse times that leave none for training."""
    check_numbers(resources)
    minutes, seconds = resources.minutes, resources.signal_seconds
    if seconds * 2 > minutes * 60:
        raise BadInput(
            f"--signal-seconds {seconds} of --time {resources.time}",
            wanted="half of the time at most",
            do="ask for more time, or set --signal-seconds to less",
        )
    if run.engine.start_minutes > minutes > 10:
        raise BadInput(
            f"engine.start_minutes {run.engine.start_minutes:g} in a job of {minutes} minutes",
            wanted="less than the job's time",
            do="set --engine.start-minutes to less: a rank that does not come ends the others after it",
        )


def check_checkpoint(run: RunConfig, resources: Resources) -> None:
    """Refuse a notice too short to write a checkpoint in, at the speed of the run folder's disk."""
    size = checkpoint_bytes(run)
    took = math.ceil(size / writes_a_second(run.folder)) * 2
    if took > resources.signal_seconds:
        raise BadInput(
            f"--signal-seconds {resources.signal_seconds} for a checkpoint of {size / 2**20:.0f} MiB: {took // 2} s",
            wanted=f"{took} or more",
            do=f"set --signal-seconds {took} (and leave time for a step), or choose a faster disk",
        )


def checkpoint_bytes(run: RunConfig) -> int:
    """Weights, moments and average in fp32."""
    import torch

    from cauc_dist import optimisers
    from cauc_dist.store.reader import Store
    from cauc_dist.train import build_model

    with torch.device("meta"):
        model = build_model(run, Store.open(run.data.store).shape)
    copies = 1 + len(optimisers.moments(run.optim)) + (run.optim.ema > 0)
    return 4 * copies * sum(p.numel() for p in model.parameters())


def writes_a_second(folder: Path, size: int = 16 * 2**20) -> float:
    """Bytes that the disk takes in a second, to its platter."""
    began = time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
    return size / (time.monotonic() - began)


def record(run: Path, **fields: Any) -> None:
    """A line of jobs.jsonl: every job that the run ever was."""
    with (run / JOBS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 3), **fields}) + "\n")
