"""Networks from a sample to its representation: x (B, c, *spatial) -> h (B, width), fp32.

`build` makes the one that a config names, `Projector` and `Model` what is trained with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cauc_dist import config
from cauc_dist.encoders.blocks import recompute
from cauc_dist.encoders.cnn3d import CNN3d
from cauc_dist.encoders.densenet3d import DenseNet121
from cauc_dist.encoders.mlp import MLP
from cauc_dist.encoders.norm import BatchNorm, Kept, frozen
from cauc_dist.encoders.projector import Model, Projector
from cauc_dist.encoders.resnet import ResNet18
from cauc_dist.errors import BadInput, nearest

__all__ = [
    "MLP",
    "BatchNorm",
    "CNN3d",
    "DenseNet121",
    "Kept",
    "Model",
    "Network",
    "Projector",
    "ResNet18",
    "build",
    "frozen",
    "recompute",
]

Norm = Literal["batch", "group"]
Network = CNN3d | DenseNet121 | ResNet18 | MLP


def build(encoder: config.Encoder, in_shape: tuple[int, ...]) -> Network:
    """The encoder that `encoder` names, for samples of in_shape = (c, *spatial); its `.width` is the width of h.

    Weights come from torch's global generator: the same after the same torch.manual_seed.
    BadInput where the name is unknown, the width is not positive or not to be chosen, or the samples have other axes
    than the encoder takes or are too small for its strides.
    """
    if encoder.name not in _KINDS:
        raise BadInput(f"encoder {encoder.name!r}", wanted="a known encoder", do=nearest(encoder.name, _KINDS))
    kind = _KINDS[encoder.name]
    width = kind.width if encoder.width is None else encoder.width
    if width < 1:
        raise BadInput(f"encoder.width {width}", wanted="1 or more", do="Set encoder.width, e.g. 16")
    if encoder.name == "densenet121_3d" and width != kind.width:
        found, wanted = f"encoder.width {width} of {encoder.name}", f"the published {kind.width}"
        raise BadInput(found, wanted=wanted, do="Leave encoder.width out")
    if not kind.fits(in_shape):
        fitting = [name for name, other in _KINDS.items() if other.fits(in_shape)]
        raise BadInput(
            f"encoder {encoder.name} on samples of shape {in_shape}",
            wanted=kind.wants(),
            do=f"Use {' or '.join(fitting)}" if fitting else "No encoder takes such samples: ingest larger ones",
        )
    return kind.make(in_shape[0], width, kind.norm if encoder.norm == "published" else encoder.norm)


@dataclass(frozen=True)
class _Kind:
    """What an encoder takes, and how it is made."""

    axes: int
    """Spatial axes of a sample."""
    smallest: int
    """Shortest side with more than one voxel left where the last stride falls (no voxel left below it: DenseNet)."""
    width: int
    """Where none is asked for."""
    norm: Norm
    """The published one."""
    make: Callable[[int, int, Norm], Network]
    """Of c, width and norm."""

    def fits(self, in_shape: tuple[int, ...]) -> bool:
        return len(in_shape) == 1 + self.axes and all(side >= self.smallest for side in in_shape[1:])

    def wants(self) -> str:
        if self.axes == 0:
            return "table rows (c,)"
        return f"(c, {', '.join('XYZ'[: self.axes])}) with sides of {self.smallest} or more"


_KINDS = {
    "cnn3d": _Kind(3, 9, 16, "group", CNN3d),
    "densenet121_3d": _Kind(3, 29, 64, "batch", lambda c, width, norm: DenseNet121(c, norm)),
    "resnet18_3d": _Kind(3, 17, 64, "batch", lambda c, width, norm: ResNet18(3, c, norm, width)),
    "resnet18_2d": _Kind(2, 5, 64, "batch", lambda c, width, norm: ResNet18(2, c, norm, width)),
    "mlp": _Kind(0, 0, 16, "group", MLP),
}
