"""A checkpoint is whole or absent: one folder, checked by sha256, independent of world size and ZeRO stage.

    RUN/checkpoints/step-00000120/state.safetensors    parameters, buffers, optimiser moments, full fp32 tensors
                                 /checkpoint.json      step, loss, architecture, plan (seed, batch size, fold, store)

The tensors are the FULL ones (gathered from ZeRO's partitions), so that any number of ranks can go on from them, and
there is no pickle in it. No metadata and no subject ids either. The card holds the sha256 of the tensors' file and of
itself: a bit that flips anywhere is found.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from cauc_dist.durable import sync, sync_tree
from cauc_dist.errors import BadInput

FOLDER, STATE, CARD = "checkpoints", "state.safetensors", "checkpoint.json"
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""What `read` raises where a folder is not as it was written."""


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint: `tensors` by name (CPU), `card` what is written beside them."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    card: dict[str, Any]


class Writer:
    """Writes the checkpoints of a run, on one rank; `card` is what they belong to. A context manager.

    `keep` (1 or more) newest ones stay, with `best` also the one with the smallest loss. With `background` a thread
    writes: memory holds the tensors of two checkpoints where a save finds the one before unfinished. BadInput where a
    checkpoint cannot be written: at once, or from the thread at the next `save` or `close`. Others stay as they are.
    """

    def __init__(
        self, run: Path, card: Mapping[str, Any], *, keep: int, best: bool = False, background: bool = False
    ) -> None:
        self._run, self._card, self._keep, self._best = run, card, keep, best
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], loss: float) -> None:
        """The checkpoint of `step` (steps done); `loss` is the mean since the one before, NaN where there is none.

        `tensors` are on the CPU; with `background` nobody may change them after this.
        """
        self._wait()
        if self._thread is None:
            self._write(step, tensors, loss)
        else:
            self._pending = self._thread.submit(self._write, step, tensors, loss)

    def close(self) -> None:
        """Wait for what is being written; nothing can be saved after it."""
        try:
            self._wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self.close()
        except BadInput as failure:
            if not isinstance(raised[1], BaseException):
                raise
            raised[1].add_note(str(failure))  # what ended the run comes first

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, tensors: Mapping[str, Tensor], loss: float) -> None:
        try:
            self._put(step, tensors, loss)
        except OSError as error:
            raise self._refused(step, tensors, error) from error

    def _put(self, step: int, tensors: Mapping[str, Tensor], loss: float) -> None:
        target = self._run / FOLDER / name_of(step)
        if not target.parent.exists():
            target.parent.mkdir(parents=True)
            sync(self._run)
        for rest in target.parent.glob(".step-*"):  # of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)
        if target.exists():
            _drop(target)  # damaged: else the run would have gone on from it
        card = {**self._card, "step": step, "loss": loss if math.isfinite(loss) else None}
        write(target, tensors, card, (STATE, CARD))
        found = _found(self._run)
        at = found.index(target)
        stay = found[at : at + self._keep] + (_smallest_loss(found[at:]) if self._best else [])
        # Newer ones than this were damaged, or of a life of the run that was given up: they would hide this one.
        for other in set(found) - set(stay):
            _drop(other)

    def _refused(self, step: int, tensors: Mapping[str, Tensor], error: OSError) -> BadInput:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        size = sum(t.nbytes for t in tensors.values()) / 2**20
        newest = [int(path.name.removeprefix("step-")) for path in _found(self._run)][:1]
        left = f"the newest checkpoint is step {newest[0]}" if newest else "there is no checkpoint yet"
        return BadInput(
            f"checkpoint of step {step} could not be written: {error.strerror or error}",
            wanted=f"room for {size:.0f} MiB" if full else f"a disk that takes files in {self._run / FOLDER}",
            do=f"{'free space' if full else 'mend that'}, then `cauc resume {self._run}`: {left}",
        )


def name_of(step: int) -> str:
    """The folder of a checkpoint: names sort as steps do."""
    return f"step-{step:08d}"


def latest(run: Path, expected: Mapping[str, Any] | None = None) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that did not; (None, []) without any.

    Raises BadInput where its card differs from `expected` in one of its keys (another architecture, another seed), and
    where checkpoints are there but none is sound: a run never starts from scratch in silence.
    """
    broken: list[str] = []
    for path in _found(run):
        try:
            tensors, card = read(path, (STATE, CARD))
            if path.name != name_of(card["step"]):
                raise ValueError(f"its card says step {card['step']}")
        except DAMAGE as error:
            broken.append(f"checkpoint {path.name} is damaged ({type(error).__name__}: {error}) and left out")
            continue
        for key, value in (expected or {}).items():
            if card.get(key) != value:
                raise BadInput(
                    f"{path} holds the {key} {json.dumps(card.get(key))}",
                    wanted=json.dumps(value),
                    do="use the configuration that made it (the run's config.json), or another run folder",
                )
        return Saved(path, card["step"], tensors, card), broken
    if broken:
        raise BadInput(
            "; ".join(broken),
            wanted="one that is sound",
            do=f"restore one, or remove {run / FOLDER} to train from scratch",
        )
    return None, []


def weights(tensors: Mapping[str, Tensor], *, ema: bool = False) -> dict[str, Tensor]:
    """The state dict of the bare module; `ema`: with the moving average of its parameters, where that was kept."""
    state: dict[str, Tensor] = {}
    for kind in ("buffer/", "parameter/", "ema/")[: 3 if ema else 2]:
        state |= {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
    return state


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], *, ema: bool = False) -> None:
    """Parameters and buffers of a bare module from the tensors of a checkpoint; every name must be there."""
    module.load_state_dict(weights(tensors, ema=ema))


def write(
    target: Path,
    tensors: Mapping[str, Tensor],
    card: Mapping[str, Any],
    names: tuple[str, str],
    texts: Mapping[str, str] | None = None,
) -> None:
    """The folder `target`, which is not there yet: a file of tensors and a card, by `names`. OSError leaves nothing.

    They are written into a temporary folder, fsynced, and the folder renamed: kill -9 at any moment leaves none of
    them under that name, or all whole. `texts`: other files beside them, by name, which `read` does not look at.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary / names[0])
        body = {**card, "sha256": _sha256(temporary / names[0])}
        text = json.dumps({**body, "seal": _seal(body)}, indent=1, allow_nan=False)
        for name, content in {**(texts or {}), names[1]: text}.items():
            (temporary / name).write_text(content, encoding="utf-8")
        sync_tree(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


def read(folder: Path, names: tuple[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote, verified, without its seal; one of DAMAGE where a bit of it is another one."""
    card = json.loads((folder / names[1]).read_text(encoding="utf-8"))
    if card.pop("seal") != _seal(card):
        raise ValueError(f"{names[1]} is not what was written")
    data = (folder / names[0]).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != card["sha256"]:
        raise ValueError(f"sha256 of {names[0]} is {found[:12]}, its card says {card['sha256'][:12]}")
    return from_bytes(data), card


def _seal(card: Mapping[str, Any]) -> str:
    """sha256 of what a card says, however it is spaced."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors puts the disk's errors into a class and a sentence of its own."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _drop(path: Path) -> None:
    """Take a checkpoint away, whole or not at all; what a disk refuses to remove is tried again at the next save."""
    aside = path.with_name(f".{path.name}.old")
    with contextlib.suppress(OSError):
        path.rename(aside)
        shutil.rmtree(aside)


def _smallest_loss(found: list[Path]) -> list[Path]:
    """The one whose card has the smallest loss, the newest of equals; a card that cannot be read has none."""
    losses: dict[Path, float] = {}
    for path in found:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            losses[path] = float(json.loads((path / CARD).read_text(encoding="utf-8"))["loss"])
    return sorted(losses, key=lambda path: losses[path])[:1]


def _found(run: Path) -> list[Path]:
    """Complete checkpoint folders, newest first; a temporary one begins with a dot and is none."""
    folder = run / FOLDER
    paths = folder.iterdir() if folder.is_dir() else ()  # a glob would say nothing of a folder it may not read
    return sorted((path for path in paths if re.fullmatch(r"step-\d{8,}", path.name)), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
