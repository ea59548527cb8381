"""A checkpoint is whole or absent: one folder, checked by sha256, independent of world size and ZeRO stage.

    RUN/checkpoints/step-00000120/state.safetensors    parameters, buffers, optimiser moments, full fp32 tensors
                                 /checkpoint.json      step, architecture, plan (seed, batch size, fold, store), sha256

The tensors are the FULL ones (gathered from ZeRO's partitions), so that any number of ranks can go on from them, and
there is no pickle in it. No metadata and no subject ids either.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cauc_dist.durable import sync, sync_tree
from cauc_dist.errors import BadInput

FOLDER, STATE, CARD = "checkpoints", "state.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint: `tensors` by name (CPU), `card` what is written beside them."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    card: dict[str, Any]


def save(run: Path, step: int, tensors: Mapping[str, Tensor], card: Mapping[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `step` (steps done) atomically, then drop all but the newest `keep` (1 or more).

    Files are written into a temporary folder, fsynced, and the folder renamed: kill -9 at any moment leaves the
    previous checkpoint, or this one whole.
    """
    target = run / FOLDER / name_of(step)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / STATE)
    text = json.dumps({**card, "step": step, "sha256": _sha256(temporary / STATE)}, indent=1)
    (temporary / CARD).write_text(text, encoding="utf-8")
    sync_tree(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    sync(target.parent)
    found = _found(run)
    at = found.index(target)
    # Newer ones than this were damaged, or of a life of the run that was given up: they would hide this one.
    for other in [*found[:at], *found[at + keep :]]:
        shutil.rmtree(other)
    return target


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
            saved = _load(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            broken.append(f"checkpoint {path.name} is damaged ({type(error).__name__}: {error}) and left out")
            continue
        for key, value in (expected or {}).items():
            if saved.card.get(key) != value:
                raise BadInput(
                    f"{path} holds the {key} {json.dumps(saved.card.get(key))}",
                    wanted=json.dumps(value),
                    do="use the configuration that made it (the run's config.json), or another run folder",
                )
        return saved, broken
    if broken:
        raise BadInput(
            "; ".join(broken),
            wanted="one that is sound",
            do=f"restore one, or remove {run / FOLDER} to train from scratch",
        )
    return None, []


def load_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Parameters and buffers of a bare module from the tensors of a checkpoint; every name must be there."""
    state = {name.split("/", 1)[1]: t for name, t in tensors.items() if name.startswith(("parameter/", "buffer/"))}
    module.load_state_dict(state)


def _load(path: Path) -> Saved:
    card = json.loads((path / CARD).read_text(encoding="utf-8"))
    if path.name != name_of(card["step"]):
        raise ValueError(f"its card says step {card['step']}")
    found = _sha256(path / STATE)
    if found != card["sha256"]:
        raise ValueError(f"sha256 of {STATE} is {found[:12]}, its card says {card['sha256'][:12]}")
    return Saved(path, int(card["step"]), load_file(path / STATE), card)


def _found(run: Path) -> list[Path]:
    """Complete checkpoint folders, newest first; a temporary one begins with a dot and is none."""
    return sorted((run / FOLDER).glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
