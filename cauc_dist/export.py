"""A trained encoder to give away: a folder of three files, from which `load_encoder` makes the network again.

    OUT/encoder.safetensors    parameters and buffers of the encoder alone, fp32
       /config.json            how to build it, what it takes, how a scan is normalised, what made it, sha256
       /README.md              a model card for whoever gets it, begun; nothing reads it

No projector, no optimiser, no metadata, no names of subjects and no paths. B scans, c channels, H width of h.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cauc_dist import checkpoint, config, encoders
from cauc_dist.errors import BadInput
from cauc_dist.model_card import model_card, results
from cauc_dist.prepare import PROVENANCE, check_store, load, parts
from cauc_dist.probe import newest
from cauc_dist.store.reader import Store
from cauc_dist.stream.values import Normalise, values
from cauc_dist.train import build_model

FORMAT, VERSION = "cauc_dist.encoder", 1
FILES, README = ("encoder.safetensors", "config.json"), "README.md"
NORMALISE = get_args(Normalise)


def export(run: Path, out: Path, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """The encoder of a run's newest sound checkpoint (its moving average, where that was kept) into the folder `out`.

    Whole or not at all. BadInput where `out` exists, the run has no sound checkpoint, its store is another one, or its
    probe.json is no table.
    """
    if out.exists():
        raise BadInput(f"{out} exists already", wanted="a new folder", do="choose another, or remove it first")
    settings = load(run)
    store = Store.open(settings.data.store)
    check_store(run, store)
    saved, rows = newest(settings, store, say), parts(settings, store)
    probed = results(run / "probe.json", settings, store, saved.step)
    model = build_model(settings, store.shape)
    checkpoint.load_module(model, saved.tensors, ema=True)
    made = json.loads((run / PROVENANCE).read_bytes())
    card = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": dataclasses.asdict(settings.encoder),
        "shape": list(store.shape),
        "orientation": store.attributes.get("orientation"),
        "voxel_mm": store.attributes.get("voxel_mm"),
        "outside": None if store.mask is None else 0.0,
        "width": model.encoder.width,
        "normalise": settings.data.normalise,
        "objective": settings.objective.name,
        "step": saved.step,
        "ema": settings.optim.ema if any(name.startswith("ema/") for name in saved.tensors) else 0.0,
        "versions": made["versions"],
        "git": made["git"],
    }
    if settings.data.normalise == "dataset":
        card["mean"], card["std"] = _moments(store, rows[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    readme = model_card(card, settings, store, rows, probed)
    checkpoint.write(out, model.encoder.state_dict(), card, FILES, {README: readme})
    return out


def _moments(store: Store, train: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel (feature of a table) over the training scans."""
    v = values(store, "dataset", train)
    scale, offset = (1.0, 0.0) if len(store.shape) == 1 else (store.stats["scale"][0], store.stats["offset"][0])
    std = scale / v.scale[0]
    return (offset - v.offset[0] * std).tolist(), std.tolist()


class Pretrained(nn.Module):
    """x (B, c, *spatial) -> h (B, H) fp32; `prepare` makes x of raw scans. `card`: what config.json says.

    h = encoder(encoder.prepare(scans))
    """

    def __init__(self, network: encoders.Network, card: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.card = network, card
        self.shape, self.width = tuple(card["shape"]), network.width

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.network(x)
        return h

    def prepare(self, scans: Tensor) -> Tensor:
        """Scans (B, c, *spatial) as `cauc ingest` takes them up (the card's orientation, voxels and shape; 0 outside
        of the head where it was 0 in training) -> the same, float32, normalised as in training.

        BadInput for another shape, for values that are not finite, and (`volume`) for a constant channel.
        """
        if scans.shape[1:] != self.shape:
            raise BadInput(
                f"scans of shape {tuple(scans.shape)}", wanted=f"(B, {', '.join(map(str, self.shape))})", do="resample"
            )
        x = scans.double()
        if not x.isfinite().all():
            raise BadInput("scans with NaN or infinite values", wanted="finite ones", do="leave them out")
        if self.card["normalise"] == "none":
            return x.float()
        if self.card["normalise"] == "dataset":
            ends = (-1,) + (1,) * (len(self.shape) - 1)
            mean, std = (torch.tensor(self.card[k], dtype=x.dtype, device=x.device).view(ends) for k in ("mean", "std"))
        else:
            axes = tuple(range(2, x.ndim))
            mean, std = x.mean(axes, keepdim=True), x.std(axes, correction=0, keepdim=True)
            if not std.all():
                raise BadInput("a scan with a constant channel", wanted="one that varies", do="leave it out")
        return ((x - mean) / std).float()


def load_encoder(path: Path | str) -> Pretrained:
    """The encoder that `cauc export` wrote, in eval mode on the CPU; no pickle is read.

    BadInput where the folder is none, is damaged, or was written by a version that this one does not know.
    """
    path = Path(path)
    try:
        tensors, card = checkpoint.read(path, FILES)
    except checkpoint.DAMAGE as error:
        raise BadInput(
            f"{path} holds no sound encoder ({type(error).__name__}: {error})",
            wanted=f"{' and '.join(FILES)} as `cauc export` wrote them",
            do="copy the folder again, or export the run again",
        ) from error
    if (card.get("format"), card.get("version")) != (FORMAT, VERSION) or card.get("normalise") not in NORMALISE:
        found = [card.get(key) for key in ("format", "version", "normalise")]
        raise BadInput(
            f"{path} is of {json.dumps(found)}",
            wanted=f"format {FORMAT}, version {VERSION}, a normalisation of {', '.join(NORMALISE)}",
            do="update cauc-dist, or export with this version",
        )
    try:
        network = encoders.build(config.Encoder(**card["encoder"]), tuple(card["shape"]))
        network.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise BadInput(
            f"{path} describes no encoder that is known here ({error})",
            wanted="one of this version of cauc-dist",
            do="update cauc-dist, or export with this version",
        ) from error
    return Pretrained(network, card).eval()
