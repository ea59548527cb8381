"""An encoder trained further, end to end, to tell one column: judged as its frozen probe is, on the same subjects.

B scans of a batch, H width of h, k outputs: 1 for a number, or the classes of the training part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cauc_dist import checkpoint, probe
from cauc_dist.augment import views
from cauc_dist.checkpoint import Saved
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.prepare import check_store, load, parts
from cauc_dist.scores import Predicted
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import chunks, read_all
from cauc_dist.stream.plan import split
from cauc_dist.stream.values import Values, values
from cauc_dist.table import Score, Table
from cauc_dist.train import build_model
from cauc_dist.world import World, cores

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
PARTS = 5
"""A fifth of the training subjects chooses the number of epochs."""
TUNED, SCRATCH = "fine-tuned", "from scratch"


@dataclass(frozen=True)
class Settings:
    """AdamW at one rate, no decay on norms and biases; ours, chosen for no data set."""

    epochs: int = 30
    """The most; as many as did best on the fifth that chooses."""
    batch_size: int = 32
    lr: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0


def finetune(
    run: Path,
    target: str,
    settings: Settings | None = None,
    *,
    scratch: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Table:
    """`fine-tuned` from the run's newest checkpoint, beside frozen linear probes of it and of an untrained encoder.

    `scratch`: also trained from the weights that the run began from. BadInput where nobody is held out or the column
    cannot be probed.
    """
    settings, config = settings or Settings(), load(run)
    check(settings)
    store = Store.open(config.data.store)
    check_store(run, store)
    train, test = parts(config, store)
    if len(test) == 0:
        raise BadInput(f"{run} held nobody out", wanted="held-out subjects to judge by", do="train with --data.folds 4")
    (column,) = probe.choose(store, [target], train, test, say)
    y = store.metadata([target])[:, 0]
    saved = probe.newest(config, store, say)
    tuning = Tuning(config, store, column, y, train[~np.isnan(y[train])], settings, say)
    found, name = dict[str, Score](), config.name
    rows, n = np.concatenate([train, test]), len(train)
    for method, weights in ((name, saved), ("untrained", None)):
        h = probe.embed(config, store, rows, weights)
        found[method] = probe.score_column(column, h[:n], y[train], h[n:], y[test])
    known = test[~np.isnan(y[test])]
    starts: list[tuple[str, Saved | None]] = [(f"{name}, {TUNED}", saved)]
    for method, weights in [*starts, (SCRATCH, None)] if scratch else starts:
        epochs, answers = tuning(weights, known)
        score = probe.score_of(column, answers)
        found[method] = replace(score, detail={**score.detail, "epochs": float(epochs)})
        most = ", the most that it was given" if epochs == settings.epochs else ""
        say(f"finetune: {method}: {epochs} epochs{most}")
    chance = {target: probe.chance_of(column, y[train], y[test])}
    scores = {method: {target: score} for method, score in found.items()}
    return Table(store.name, store.fingerprint, n, len(test), (target,), chance, scores, {name: saved.step})


def check(settings: Settings) -> None:
    """BadInput for what cannot be trained with."""
    least = {"epochs": 1, "batch_size": 2, "lr": 1e-12, "weight_decay": 0}
    for field, smallest in least.items():
        if not (value := getattr(settings, field)) >= smallest:
            name = field.replace("_", "-")
            raise BadInput(f"--{name} {value}", wanted=f"{smallest:g} or more", do=f"leave --{name} out")


@dataclass(frozen=True)
class Tuning:
    """What trainings of one run on one column share. `train`: rows whose value is known."""

    config: RunConfig
    store: Store
    column: Column
    y: Array
    """(N,) of the whole store."""
    train: Rows
    settings: Settings
    say: Callable[[str], None] = lambda line: None

    def __call__(self, saved: Saved | None, test: Rows) -> tuple[int, Predicted]:
        """(epochs, answers): the epochs are chosen on a fifth of the training subjects, then all of them are used."""
        subjects = [self.store.subjects[i] for i in self.train]
        fit, choose = split(subjects, min(PARTS, len(set(subjects))), 0)
        curve = [
            self.error(model, self.train[choose])
            for model in self.trained(saved, self.train[fit], self.settings.epochs)
        ]
        epochs = int(np.argmin(curve)) + 1
        *_, model = self.trained(saved, self.train, epochs)
        return epochs, self.answers(model, test)

    def trained(self, saved: Saved | None, rows: Rows, epochs: int) -> Iterator[nn.Module]:
        """The network after each epoch on those rows; the same one, further trained."""
        model = self.start(saved)
        decays = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=self.settings.lr, weight_decay=self.settings.weight_decay)
        for epoch in range(epochs):
            self.epoch(model, optimiser, rows, epoch)
            yield model

    def start(self, saved: Saved | None) -> nn.Module:
        """Encoder and head on the device; the head starts at 0: the training mean, or even odds."""
        torch.set_num_threads(self.config.engine.threads or cores())
        model = build_model(self.config, self.store.shape)
        if saved is not None:
            checkpoint.load_module(model, saved.tensors, ema=True)
        width: int = model.encoder.width  # type: ignore[assignment]
        head = nn.Linear(width, max(1, len(self.classes)))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return nn.Sequential(model.encoder, head).to(self.device)

    def epoch(self, model: nn.Module, optimiser: torch.optim.Optimizer, rows: Rows, epoch: int) -> None:
        """All rows once, in a random order, one random view of each."""
        model.train()
        seed, size = self.settings.seed, self.settings.batch_size
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        if len(order) % size == 1:  # BatchNorm has no variance of one row
            order = order[:-1]
        torch.manual_seed(int(np.random.default_rng([seed, epoch, 1]).integers(2**62)))  # of dropout
        one = replace(self.config.augment, views=1)
        for at, x in self.read(order, size):
            v = views(x, self.store.keys[at], seed=seed, epoch=epoch, augment=one)
            loss = self.loss(self.out(model, v), self.target(at))
            if not torch.isfinite(loss):
                raise BadInput(f"a loss of {loss.item()} in epoch {epoch}", wanted="a finite one", do="lower --lr")
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()

    def out(self, model: nn.Module, x: Tensor) -> Tensor:
        """(B, k) fp32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.engine.precision == "bf16"):
            found: Tensor = model(x)
        return found.float()

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """Squared error of the standardised number, or cross-entropy; a mean over rows."""
        return F.cross_entropy(out, target) if len(self.classes) else F.mse_loss(out[:, 0], target)

    def target(self, rows: Rows) -> Tensor:
        """(B,) places among the classes, or numbers of mean 0 and deviation 1 over the training part."""
        y = self.y[rows]
        if len(self.classes):
            return torch.from_numpy(np.searchsorted(self.classes, y)).to(self.device)
        mean, sd = self.moments
        return torch.from_numpy((y - mean) / sd).float().to(self.device)

    def error(self, model: nn.Module, rows: Rows) -> float:
        """What chooses: mean absolute error of a number, cross-entropy of classes."""
        answers = self.answers(model, rows)
        if answers.probability is None:
            return float(np.abs(answers.predicted - answers.truth).mean())
        p = answers.probability[np.arange(len(rows)), np.searchsorted(self.classes, answers.truth)]
        return float(-np.log(np.maximum(p, 1e-12)).mean())

    @torch.no_grad()
    def answers(self, model: nn.Module, rows: Rows) -> Predicted:
        """Of those scans as they are, in eval mode."""
        model.eval()
        out = torch.cat([self.out(model, x).cpu() for _, x in self.read(rows, 32)]).double()
        if len(self.classes):
            p = out.softmax(1).numpy()
            return Predicted(self.y[rows], self.classes[p.argmax(1)], p, self.classes)
        mean, sd = self.moments
        return Predicted(self.y[rows], out[:, 0].numpy() * sd + mean)

    def read(self, rows: Rows, size: int) -> Iterator[tuple[Rows, Tensor]]:
        """(rows, scans on the device), in order; from memory where the store fits in it."""
        if self.whole is not None:
            for at in np.split(rows, range(size, len(rows), size)):
                yield at, self.whole[at].to(self.device)
            return
        for k, x in enumerate(chunks(self.store, rows, size, self.given)):
            yield rows[k * size : (k + 1) * size], x.to(self.device)

    @cached_property
    def given(self) -> Values:
        """Scans as pre-training saw them."""
        return values(self.store, self.config.data.normalise, parts(self.config, self.store)[0])

    @cached_property
    def whole(self) -> Tensor | None:
        """All scans of the store, where they need no more than probe.VOXEL_BYTES."""
        n = len(self.store)
        if 4 * n * int(np.prod(self.store.shape)) > probe.VOXEL_BYTES:
            return None
        return read_all(self.store, np.arange(n), self.given)

    @cached_property
    def classes(self) -> Array:
        """(k,) codes that the training part has; none of a number."""
        return np.unique(self.y[self.train]) if self.column.kind == "category" else np.empty(0)

    @cached_property
    def moments(self) -> tuple[float, float]:
        y = self.y[self.train]
        return float(y.mean()), float(y.std())

    @cached_property
    def device(self) -> torch.device:
        return World().device("cpu" if self.config.engine.device == "cpu" else "auto")
