"""The store of a study: ingested where it is missing, with the columns that the study makes from it."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput
from cauc_dist.store.append import add_columns
from cauc_dist.store.ingest import ingest
from cauc_dist.store.planned import Settings
from cauc_dist.store.reader import Store
from cauc_dist.study import Source, Study

Say = Callable[[str], None]


def store_of(study: Study, path: Path, data: Path | None, say: Say) -> Store:
    """The study's store at `path`, made from `data` (default: $CAUC_DATA) where there is none yet.

    Raises BadInput where it is missing and there is nothing to make it from.
    """
    if not path.exists():
        say(f"ingesting {study.source.about}")
        path.parent.mkdir(parents=True, exist_ok=True)
        say(str(_ingested(study.source, path, _found(study.source, path, data))))
    store = Store.open(path)
    if study.source.columns is not None:
        made = study.source.columns(store)
        known = {column.name for column in store.columns}
        for name in sorted(known & set(made)):
            _same(store, name, made[name])
        lacking = {name: entries for name, entries in made.items() if name not in known}
        if lacking:
            say(f"{len(lacking)} columns of splits and labels are added to {path}")
            add_columns(path, lacking)
            store = Store.open(path)
    return store


def _same(store: Store, name: str, entries: Sequence[str] | NDArray[np.float64]) -> None:
    """BadInput where the store's column of that name has other entries than the study makes now."""
    codes, levels = store.metadata([name])[:, 0], store.column(name).levels
    there = codes if not levels else ["" if np.isnan(code) else levels[int(code)] for code in codes]
    equal = np.array_equal(there, entries, equal_nan=True) if not levels else list(there) == list(entries)
    if not equal:
        raise BadInput(
            f"column {name} of {store.where} is not what the study makes now",
            wanted="the splits and labels of one version of the study",
            do="make a new store (another --folder), or run the version that made this one",
        )


def _found(source: Source, path: Path, data: Path | None) -> Path:
    data = data or (Path(os.environ["CAUC_DATA"]) if os.environ.get("CAUC_DATA") else None)
    if data is None:
        raise BadInput(f"no store {path}", wanted="it, or the data to make it from", do="give --data or set $CAUC_DATA")
    folder = data / source.folder
    if not folder.exists():
        do = f"put the data there ({source.about}), or give --store"
        raise BadInput(f"no {source.folder} in {data}", wanted="the study's data", do=do)
    return folder


def _ingested(source: Source, path: Path, folder: Path) -> object:
    settings = Settings(shape=source.shape)
    return ingest(folder, path, settings, missing=source.missing, ranges=source.ranges)
