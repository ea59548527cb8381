"""Pre-training as scikit-learn has it: `ContrastiveEncoder("demo_cauc", epochs=5).fit(store).transform(store)`.

N scans of a store, H width of h.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from cauc_dist import config, recipes
from cauc_dist.config import RunConfig
from cauc_dist.embed import check_like, represent
from cauc_dist.engine import forget_groups
from cauc_dist.errors import BadInput
from cauc_dist.export import export, load_encoder
from cauc_dist.prepare import load, parts, prepare
from cauc_dist.store.reader import Store
from cauc_dist.train import train
from cauc_dist.world import World

SEPARATOR = "__"


class ContrastiveEncoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """An encoder that is trained on a store in this process, by the loop that `cauc train` runs (one rank).

    `recipe`: a recipe's name, a config.json or a RunConfig. `run`: a new folder to keep the run in; None: a temporary
    one. `overrides`: any field, parts of the run by two underscores: epochs=5, objective__tau=.2, encoder__width=8.
    The loss reads the columns that the recipe names from the store, so that `fit` takes no y; scans that the run holds
    out (data__folds, 1: nobody) are not trained on.

    After `fit`: `encoder_` (cauc_dist.export.Pretrained), `train_rows_` (rows of the store that were trained on).
    """

    def __init__(self, recipe: str | RunConfig = "demo_cauc", run: Path | str | None = None, **overrides: Any) -> None:
        self.recipe, self.run, self.overrides = recipe, run, overrides

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What `__init__` was given, each override by its own name."""
        return {"recipe": self.recipe, "run": self.run, **self.overrides}

    def set_params(self, **params: Any) -> Self:
        """Change any of them; BadInput where an override is no field, or of a wrong type."""
        changed = {**self.get_params(), **params}
        ContrastiveEncoder(**changed).config()
        self.recipe, self.run = changed.pop("recipe"), changed.pop("run")
        self.overrides = changed
        return self

    def config(self) -> RunConfig:
        """The run that `fit` trains, but for its store and folder."""
        base = self.recipe
        if isinstance(base, str):
            base = config.read(Path(base)) if base.endswith(".json") else recipes.get(base)
        values = dataclasses.asdict(base)
        for name, value in self.overrides.items():
            *path, last = name.split(SEPARATOR)
            part = values
            for word in path:
                part = part.setdefault(word, {}) if isinstance(part, dict) else part
            if not isinstance(part, dict):
                raise BadInput(f"{name} = {value!r}", wanted="a field of a part", do=f"e.g. objective{SEPARATOR}tau=.2")
            part[last] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        return config.typed(values, RunConfig, "overrides")

    def fit(self, store: Store | Path | str, y: object = None) -> Self:
        """Train on a store; `y` is not read. BadInput, before any work, for what `cauc train` would refuse."""
        settings, opened = self.config(), _opened(store)
        _refuse_a_group()
        gpus = range(torch.cuda.device_count())
        with tempfile.TemporaryDirectory(prefix="cauc-") as folder, torch.random.fork_rng(gpus):
            run = Path(folder) / "run" if self.run is None else Path(self.run)
            data = dataclasses.replace(settings.data, store=opened.where)
            _train_here(prepare(dataclasses.replace(settings, run=run, data=data), ranks=1))
            self.encoder_ = load_encoder(export(run, Path(folder) / "encoder"))
            self.train_rows_ = parts(load(run), opened)[0]
        return self

    def transform(self, store: Store | Path | str) -> NDArray[np.float32]:
        """h (N, H) of every scan of a store, in its order; BadInput where its scans are unlike those of `fit`."""
        check_is_fitted(self, "encoder_")
        opened = _opened(store)
        check_like(self.encoder_, opened)
        return represent(self.encoder_, opened, np.arange(len(opened)))


def _opened(store: Store | Path | str) -> Store:
    return store if isinstance(store, Store) else Store.open(store)


def _refuse_a_group() -> None:
    if dist.is_initialized():
        found = f"a process group of {dist.get_world_size()} in this process"
        raise BadInput(found, wanted="none: fit makes its own", do="leave it first, or use `cauc train --ranks`")


def _train_here(folder: Path) -> None:
    """What one rank of `cauc train` does, without its signal handlers."""
    run, world, threads = load(folder), World(), torch.get_num_threads()
    try:
        torch.set_num_threads(run.engine.threads or threads)
        with world.process_group(world.device(run.engine.device), run.engine.start_minutes):
            train(run, world)
    finally:
        forget_groups()
        torch.set_num_threads(threads)
