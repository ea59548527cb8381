"""Representations of all scans of a store, kept: a folder of two files, one row a scan in the order of the store.

    OUT/embeddings.npz    ids, participants, h, z where a projector is there, metadata, rows of the pre-training
       /embeddings.tsv    the same without h and z as text, one line a scan

N scans, H width of h, D of z, k metadata columns.
"""

import csv
import io
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from cauc_dist.durable import sync_tree
from cauc_dist.errors import BadInput
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store

Floats = NDArray[np.float32]
NPZ, TSV = "embeddings.npz", "embeddings.tsv"
VERSION = 1


@dataclass(frozen=True)
class Embeddings:
    """One row a scan, in the order of the store; `h` before the projector, `z` after it (unit rows on the sphere)."""

    ids: tuple[str, ...]
    participants: tuple[str, ...]
    h: Floats
    """(N, H)"""
    z: Floats | None
    """(N, D); None: an exported encoder has no projector."""
    columns: tuple[Column, ...]
    metadata: NDArray[np.float64]
    """(N, k) in the order of `columns`: numbers, or codes into the column's levels; NaN is missing."""
    trained: NDArray[np.bool_] | None
    """(N,) whether the encoder was trained on the scan; None: an exported encoder does not say."""
    fingerprint: str
    """Of the store."""
    method: str
    """Name of the objective."""
    step: int

    def save(self, folder: Path) -> Path:
        """Both files in a new folder, whole or not at all; BadInput where it exists."""
        refuse_existing(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            np.savez(temporary / NPZ, allow_pickle=False, **self._arrays())
            (temporary / TSV).write_text(self._table(), encoding="utf-8", newline="")
            sync_tree(temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return folder

    def _arrays(self) -> dict[str, NDArray[Any]]:
        about = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "step": self.step,
            "columns": [asdict(column) for column in self.columns],
        }
        texts = {"ids": self.ids, "participants": self.participants, "about": json.dumps(about)}
        optional = {"z": self.z, "trained": self.trained}
        there = {name: array for name, array in optional.items() if array is not None}
        return {
            **{name: np.array(t, str) for name, t in texts.items()},
            "h": self.h,
            "metadata": self.metadata,
            **there,
        }

    def _table(self) -> str:
        text = io.StringIO()
        lines = csv.writer(text, delimiter="\t", lineterminator="\n")
        lines.writerow(["participant_id", "scan_id", "pretraining", *(column.name for column in self.columns)])
        for i, (participant, scan) in enumerate(zip(self.participants, self.ids, strict=True)):
            part = "n/a" if self.trained is None else "train" if self.trained[i] else "held-out"
            lines.writerow([participant, scan, part, *map(_text, self.columns, self.metadata[i])])
        return text.getvalue()

    @classmethod
    def load(cls, folder: Path, store: Store | None = None) -> "Embeddings":
        """What `save` wrote; no pickle is read. BadInput where it is not there or damaged, or is of another `store`."""
        try:
            with (folder / NPZ).open("rb") as file, np.load(file, allow_pickle=False) as found:
                arrays = dict(found)
            about = json.loads(str(arrays.pop("about")))
            embeddings = cls._from(arrays, about)
        except (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError, EOFError, BadZipFile) as error:
            raise BadInput(
                f"{folder} holds no sound embeddings ({type(error).__name__}: {error})",
                wanted=f"the {NPZ} that `cauc embed` wrote",
                do="check the path, or embed again",
            ) from error
        if store is not None and embeddings.fingerprint != store.fingerprint:
            raise BadInput(
                f"{folder} is of a store with the fingerprint {embeddings.fingerprint[:12]}",
                wanted=f"{store.fingerprint[:12]}, that of {store.where}",
                do="open the store that was embedded, or embed this one",
            )
        return embeddings

    @classmethod
    def _from(cls, arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> "Embeddings":
        if about.pop("version") != VERSION or len({len(array) for array in arrays.values()}) != 1:
            raise ValueError(f"not of version {VERSION}, or of different lengths")
        columns = tuple(Column(c["name"], c["kind"], tuple(c["levels"])) for c in about.pop("columns"))
        ids, participants = (tuple(arrays.pop(name).tolist()) for name in ("ids", "participants"))
        h, y, z, trained = arrays["h"], arrays["metadata"], arrays.get("z"), arrays.get("trained")
        return cls(ids, participants, h, z, columns, y, trained, **about)


def _text(column: Column, value: float) -> str:
    if np.isnan(value):
        return "n/a"
    return column.levels[int(value)] if column.kind == "category" else np.format_float_positional(value, trim="-")


def refuse_existing(out: Path) -> None:
    """BadInput before the work where OUT is taken."""
    if out.exists():
        raise BadInput(f"{out} exists already", wanted="a new folder", do="choose another, or remove it first")
