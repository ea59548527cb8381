"""What runs are doing, from what is certain: squeue, the attempts that slurm/attempt.sh left, sacct, the journal.

squeue goes first: what it lists is not over, whatever an attempt or the accounting says of it (SLURM starts a job again
after the end of a node, and a verdict `again` is followed by another attempt). Of a job that it does not list the last
attempt's verdict says most, and where there is none sacct; a journal that has come to the last step is the end,
whoever came there. A job counts only under the name that it was queued by: a cluster that counts ids from 1 again has
others under the same id. (Of a batch script of the user's own only the ids are known, from its attempts.)
"""

import contextlib
import fcntl
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cauc_dist import config, journal
from cauc_dist.errors import BAD_INPUT, NON_FINITE, BadInput
from launch import slurm
from launch.submit import JOBS

CONFIG, RUNS, ATTEMPTS, CANCELLED, RESUBMITTED = "config.json", "runs", "attempts", "cancelled", "resubmitted"
UNKNOWN = "UNKNOWN"
RECENT = 20
"""Steps whose median says how fast a run is."""
MEANS = {BAD_INPUT: "bad input", NON_FINITE: "a loss or gradient that is not finite"}


@dataclass(frozen=True)
class Status:
    """What a run is doing. The keys of `launch status --json` are these fields."""

    folder: Path
    name: str
    """The run's, from its configuration."""
    id: str
    """Its latest job: N, or N_K of an array; "" where it never had one."""
    state: str
    """squeue's word for a job that it lists (REQUEUED: it was at work and waits to go on), else COMPLETED, FAILED,
    CANCELLED, STOPPED (by a signal, outside of SLURM), NEW, GONE, sacct's word, or UNKNOWN."""
    reason: str
    step: int | None
    """Steps done; those that a resume took back do not count."""
    steps: int | None
    loss: float | None
    samples_per_s: float | None
    restarts: int
    nodes: str
    eta_s: float | None
    """Seconds of training left, at the speed of the last steps; where it is RUNNING."""
    source: str
    """squeue, sacct, attempts or journal: what `state` is known from."""

    @property
    def live(self) -> bool:
        """Whether a job of it is in the queue, or a training at work in its folder."""
        return self.source == "squeue" or self.state == "RUNNING"

    @property
    def where(self) -> str:
        """Of a live run, in words."""
        if self.source != "squeue":
            return "a training holds its lock, in no job that squeue lists"
        return f"job {self.id} is {self.state}" + (f" on {self.nodes}" if self.nodes else "")


@dataclass(frozen=True)
class Attempt:
    """One start of a job's ranks: RUN/attempts/NNN."""

    path: Path

    @property
    def number(self) -> int:
        """NNN."""
        return int(self.path.name)

    @cached_property
    def job(self) -> dict[str, str]:
        """Who and where: id, nodes, tasks, restarts, began; {} in the moment before it is written."""
        return dict(line.partition("=")[::2] for line in _lines(self.path / "job"))

    @property
    def id(self) -> str:
        """The job's."""
        return self.job.get("id", "")

    @cached_property
    def verdict(self) -> str:
        """done, failed CODE, cancelled, again HOW CHECKPOINT; "" while it is at work, and where it was cut off."""
        return next(iter(_lines(self.path / "end")), "")

    @property
    def followed(self) -> str:
        """After `again`: requeued, resubmitted as ID, given up: WHY."""
        return next(iter(_lines(self.path / "end")[1:]), "")

    def log(self, rank: int) -> Path:
        """What a rank said."""
        return self.path / f"rank-{rank}.log"

    def last_words(self, code: str = "") -> str:
        """The last error line of the ranks that ended with `code` (default: of all), else the last line of one."""
        ended = [path.name[5:-5] for path in self.path.glob("rank-*.exit") if code in ("", *_lines(path))]
        said = [line for rank in sorted(ended, key=int) for line in _lines(self.path / f"rank-{rank}.log") if line]
        return next((line for line in reversed(said) if line.startswith("error: ")), said[-1] if said else "")


def attempts(run: Path) -> list[Attempt]:
    """Of every job that the run had, in order."""
    folder = run / ATTEMPTS
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [Attempt(path) for path in paths if re.fullmatch(r"\d{3,}", path.name)]
    return sorted(found, key=lambda attempt: attempt.number)


@dataclass(frozen=True)
class Jobs:
    """The jobs of a run, as its folder knows them."""

    name: str
    """Their name in SLURM; "" where launch did not queue them: any."""
    ids: tuple[str, ...]
    """Every id, oldest launch first."""
    chain: tuple[str, ...]
    """Those since the last launch: the one that was queued, and what it was resubmitted as, one after the other."""


def jobs(run: Path) -> Jobs:
    """From jobs.jsonl, RUN/resubmitted and the attempts; no ids where there never was a job."""
    told = []
    for line in _lines(run / JOBS):
        with contextlib.suppress(json.JSONDecodeError):  # cut off
            told.append(json.loads(line))
    tried = attempts(run)
    if not told:  # by a batch script of the user's own
        told = [{"id": attempt.id, "name": ""} for attempt in tried if attempt.id]
    if not told:
        return Jobs("", (), ())
    again = {a.id: a.followed.split()[2] for a in tried if a.followed.startswith("resubmitted as ")}
    chain = [told[-1]["id"]]
    while following := again.pop(chain[-1], None):
        chain.append(following)
    ids = dict.fromkeys([*(job["id"] for job in told), *_lines(run / RESUBMITTED), *chain])
    return Jobs(told[-1]["name"], tuple(ids), tuple(chain))


def status(runs: Sequence[Path]) -> list[Status]:
    """Of each run, in order: one squeue for all, one sacct for those that it does not list. It never guesses."""
    asked: list[Jobs] = []
    queue: list[slurm.Job] = []
    silent = ""
    while (known := [jobs(run) for run in runs]) != asked:  # a job that was queued meanwhile is asked for again
        queue, silent = _queue(runs, known)
        asked = known
    looks = [
        Look(run, jobs, _listed(jobs, queue), silent, attempts(run)) for run, jobs in zip(runs, known, strict=True)
    ]
    ids = [look.jobs.chain[-1] for look in looks if look.open]
    remembered = slurm.accounted(ids) if ids else []
    return [look.status(remembered) for look in looks]


def _queue(runs: Sequence[Path], known: Sequence[Jobs]) -> tuple[list[slurm.Job], str]:
    """What squeue lists of the runs' owners, and why it says nothing."""
    if not any(jobs.ids for jobs in known):
        return [], ""
    try:
        return slurm.queue({run.stat().st_uid for run in runs}), ""
    except BadInput as error:
        return [], error.found


def _listed(jobs: Jobs, queue: Sequence[slurm.Job]) -> slurm.Job | None:
    """The run's latest job that squeue lists."""
    mine = {job.id: job for job in queue if jobs.name in ("", job.name)}
    return next((mine[id] for id in reversed(jobs.ids) if id in mine), None)


@dataclass(frozen=True)
class Look:
    """A run at one moment: its folder was read after squeue had answered."""

    run: Path
    jobs: Jobs
    queued: slurm.Job | None
    silent: str
    """Why squeue said nothing."""
    attempts: list[Attempt]

    @property
    def last(self) -> Attempt | None:
        """The latest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def tried(self) -> Attempt | None:
        """The latest attempt, where it belongs to the latest launch: an earlier one's verdict says nothing of it."""
        return self.last if self.last and self.last.id in self.jobs.chain else None

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Of the journal."""
        return journal.read(self.run)

    @property
    def open(self) -> bool:
        """Whether only the accounting may know how it ended."""
        return bool(self.jobs.ids) and not (self.queued or self.silent or self._known())

    def status(self, remembered: Sequence[slurm.Job]) -> Status:
        """All of it, where sacct remembers some jobs."""
        state, reason, source = self._state(remembered)
        nodes = self.queued.nodes if self.queued else ""
        latest = self.jobs.chain[-1] if self.jobs.ids else self.last.id if self.last else ""
        return Status(
            folder=self.run,
            name=_name(self.run),
            id=self.queued.id if self.queued else latest,
            state=state,
            reason=reason,
            **_progress(self.events, running=state == "RUNNING"),
            restarts=len(self.attempts) - 1 if self.attempts else sum(e["event"] == "resume" for e in self.events),
            nodes=nodes or (self.last.job.get("nodes", "") if self.last else ""),
            source=source,
        )

    def _state(self, remembered: Sequence[slurm.Job]) -> tuple[str, str, str]:
        """State, reason, source."""
        if self.queued:
            return *self._in_queue(self.queued), "squeue"
        if self.jobs.ids:
            return self._out_of_queue(remembered)
        return self._outside()

    def _in_queue(self, job: slurm.Job) -> tuple[str, str]:
        reason = "" if job.reason == "None" else job.reason
        before = "; ".join(filter(None, [_again(self.tried), reason])) if self.tried else reason
        if job.state == "PENDING" and self.tried:
            return "REQUEUED", before
        if job.state == "COMPLETING" and self.tried and self.tried.id == job.id and _goes_on(self.tried):
            return "REQUEUED", before
        if job.state not in slurm.LIVE:  # e.g. NODE_FAIL, in the moment before it is requeued
            return "COMPLETING", job.state
        if job.state == "SIGNALING":  # for a moment, with the notice of --signal
            return "RUNNING", reason
        return job.state, reason

    def _out_of_queue(self, remembered: Sequence[slurm.Job]) -> tuple[str, str, str]:
        if held(self.run):
            return "RUNNING", "by no job of its own that squeue lists", "journal"
        if known := self._known():
            return known
        if self.silent:
            return UNKNOWN, self.silent, "journal"
        id, name = self.jobs.chain[-1], self.jobs.name
        words = next((job.state for job in remembered if job.id == id and name in ("", job.name)), "")
        cut = "no verdict; `launch logs` shows its last words" if self.tried else "not one rank began"
        if set(_lines(self.run / CANCELLED)) & set(self.jobs.chain):
            return "CANCELLED", "", "attempts"
        if words and words not in slurm.LIVE:
            return words, _again(self.tried) or cut, "sacct"
        if words:  # one of the two is wrong, and the job may start or go on
            return UNKNOWN, f"squeue does not list job {id}, and sacct still has it {words}", "sacct"
        nobody = f"squeue does not list job {id}, and sacct knows nothing"
        return "GONE", "; ".join(filter(None, [nobody, _again(self.tried)])), "attempts"

    def _outside(self) -> tuple[str, str, str]:
        """Of a run that never had a job: started by `cauc train`."""
        if held(self.run):
            return "RUNNING", "", "journal"
        if self.last:
            return UNKNOWN, f"attempt {self.last.path.name} does not say yet which job it is of", "attempts"
        states = {
            "": ("NEW", "no rank has begun"),
            "end": ("COMPLETED", ""),
            "stopped": ("STOPPED", "by a signal, after a checkpoint"),
            "non_finite": ("FAILED", MEANS[NON_FINITE]),
        }
        return *states.get(self._journal_ends, ("GONE", "ended without a word")), "journal"

    @property
    def _journal_ends(self) -> str:
        return self.events[-1]["event"] if self.events else ""

    def _known(self) -> tuple[str, str, str] | None:
        """State, reason and source, where the run's own folder says how it has ended."""
        ended = self._ended()
        if self._journal_ends == "end" and (ended is None or ended[0] != "COMPLETED"):  # e.g. by a local `cauc resume`
            return "COMPLETED", "", "journal"
        return (*ended, "attempts") if ended else None

    def _ended(self) -> tuple[str, str] | None:
        """How the latest job ended for good, where its last attempt says it."""
        return _verdict(self.last) if self.last and self.last.id == self.jobs.chain[-1] else None


def _verdict(attempt: Attempt) -> tuple[str, str] | None:
    """State and reason of a verdict that is final; None of others."""
    kind, _, rest = attempt.verdict.partition(" ")
    if kind == "done":
        return "COMPLETED", ""
    if kind == "cancelled":
        return "CANCELLED", ""
    if kind == "failed":
        return "FAILED", _failure(attempt, rest)
    if attempt.followed.startswith("given up"):
        return "FAILED", "; ".join(filter(None, [attempt.followed, _again(attempt), attempt.last_words()]))
    return None


def _failure(attempt: Attempt, code: str) -> str:
    """What an exit code means, in the words of a rank that ended with it."""
    if not list(attempt.path.glob("rank-*.host")):
        return f"not one rank began (srun's exit code {code}); `launch logs` shows why"
    means = MEANS.get(int(code), f"exit code {code}")
    return ": ".join(filter(None, [means, attempt.last_words(code).removeprefix("error: ")]))


def _goes_on(attempt: Attempt) -> bool:
    return attempt.verdict.startswith("again") and not attempt.followed.startswith("given up")


def _again(attempt: Attempt | None) -> str:
    """Why an attempt was not the last one."""
    if attempt is None:
        return ""
    if not attempt.verdict.startswith("again"):
        return "" if attempt.verdict else f"attempt {attempt.path.name} was cut off"
    _, how, checkpoint = attempt.verdict.split()
    return f"{how}, newest checkpoint {checkpoint}"


def held(run: Path) -> bool:
    """Whether a training is at work in the folder: cauc_dist.train.own has its lock.

    To ask is to hold it for an instant, shared; `own` waits that long.
    """
    with contextlib.suppress(OSError):
        lock = os.open(run / "lock", os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
    return False


def _progress(events: Sequence[Mapping[str, Any]], *, running: bool) -> dict[str, Any]:
    """step, steps, loss, samples_per_s, eta_s by the journal."""
    began = next((event for event in reversed(events) if event["event"] in journal.BEGINNINGS), None)
    done = [event for event in events if event["event"] == "step"]
    recent = done[-RECENT:]
    step = done[-1]["step"] + 1 if done else began["step"] if began else None
    steps = began["steps_per_epoch"] * began["epochs"] if began else None
    left = steps - step if running and recent and steps is not None and step is not None else None
    return {
        "step": step,
        "steps": steps,
        "loss": done[-1]["loss"] if done else None,
        "samples_per_s": round(_median(recent, "samples_per_s"), 1) if recent else None,
        "eta_s": None if left is None else round(left * _median(recent, "step_s"), 1),
    }


def _median(steps: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(statistics.median(step[key] for step in steps))


def _name(run: Path) -> str:
    with contextlib.suppress(BadInput, OSError):
        return config.read(run / CONFIG).name
    return run.name


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def expand(paths: Sequence[Path]) -> list[Path]:
    """Run folders: the given ones, and of a sweep's folder its members. Without any: all that are in ./runs."""
    if not paths:
        here = Path(RUNS)
        paths = sorted(path.parent for name in (CONFIG, RUNS) for path in here.glob(f"*/{name}") if path.is_file())
        if not paths:
            raise BadInput(f"no run folder in {here.absolute()}", wanted="one or several", do="name them")
    found: list[Path] = []
    for path in paths:
        if (path / RUNS).is_file():
            found += [path / line for line in _lines(path / RUNS) if line]
        elif (path / CONFIG).is_file():
            found.append(path)
        else:
            raise BadInput(
                f"no {CONFIG} in {path}", wanted="a run folder, or a sweep's", do="give what `launch submit` printed"
            )
    return found


def table(found: Sequence[Status]) -> str:
    """Aligned columns for people."""
    rows = [("RUN", "JOB", "STATE", "STEP", "LOSS", "SCANS/S", "RESTARTS", "NODES", "LEFT", "REASON")]
    rows += [
        (
            str(s.folder),
            s.id or "-",
            s.state,
            "-" if s.step is None else f"{s.step}/{s.steps}",
            "-" if s.loss is None else f"{s.loss:.4f}",
            "-" if s.samples_per_s is None else f"{s.samples_per_s:.1f}",
            str(s.restarts),
            s.nodes or "-",
            "-" if s.eta_s is None else _clock(s.eta_s),
            s.reason,
        )
        for s in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"
