"""From the objective's settings to a loss of (z, y), with the geometry that is watched beside it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cauc_dist import kernels, losses
from cauc_dist.config import Objective as Settings
from cauc_dist.errors import BadInput
from cauc_dist.losses.batch import Batch, Exchange

NEEDS_KERNEL = ("y_aware", "cauc", "supcon", "threshold", "expw", "rank_n_contrast")


class Objective:
    """loss(z, y, exchange) of the settings, z of this process and y of the whole batch.

    The kernel is fitted to the training metadata, `y_train` (N, k) float, NaN = missing, of `settings.columns`.
    """

    def __init__(self, settings: Settings, y_train: Tensor) -> None:
        if settings.name in NEEDS_KERNEL and not settings.kernel:
            raise BadInput(
                f"objective {settings.name} without a kernel",
                wanted="at least one metadata column",
                do="add e.g. --objective.kernel age:gaussian:5",
            )
        _refuse_unread(settings)
        self._settings = settings
        self._k = len(settings.kernel)
        self._kernel = None
        if settings.kernel:
            self._kernel = kernels.parse(settings.kernel, settings.combine).fit(y_train[:, : self._k])

    def try_out(self, y: Tensor) -> None:
        """BadInput where the loss cannot be had on metadata like y (n, k): found before training, not in it."""
        z = torch.nn.functional.normalize(torch.randn(2, len(y), 8, generator=torch.Generator().manual_seed(0)), dim=-1)
        try:
            self.loss(z, y)
        except ValueError as error:
            raise BadInput(
                f"objective {self._settings.name}: {error}",
                wanted="a loss that this metadata allows",
                do="change --objective or its kernel",
            ) from None

    def loss(self, z: Tensor, y: Tensor, exchange: Exchange = Batch) -> Tensor:
        """z (V, b, D) of this process, y (n, k) of the whole global batch -> scalar, the same on every process."""
        return _LOSSES[self._settings.name](self, z, y, exchange)

    @torch.no_grad()
    def geometry(self, z: Tensor, y: Tensor, exchange: Exchange = Batch) -> Mapping[str, float]:
        """Alignment and uniformity of a batch, and their conditional forms where there is a kernel."""
        if self._settings.name == "rank_n_contrast":  # the others' rows are of unit length already
            z = torch.nn.functional.normalize(z, dim=-1)
        columns = y[:, : self._k] if self._k else None
        return losses.geometry(z, columns, self._kernel, self._settings.t, self._settings.alpha, exchange)

    def _cauc(self, z: Tensor, y: Tensor, exchange: Exchange) -> Tensor:
        s = self._settings
        return losses.cauc(
            z,
            y[:, : self._k],
            self._kernel_,
            t=s.t,
            alpha=s.alpha,
            lambda_align=s.lambda_align,
            lambda_unif=s.lambda_unif,
            views=s.views,
            within=None if s.within is None else y[:, -1],
            exchange=exchange,
        )

    @property
    def _kernel_(self) -> kernels.Kernel:
        assert self._kernel is not None  # __init__ refused the settings that lack one
        return self._kernel


def _or_one(weight: float | None) -> float:
    return 1.0 if weight is None else weight


def _refuse_unread(settings: Settings) -> None:
    """A setting that changes what is repelled, given to a loss that does not read it, would be ignored in silence."""
    for field, reader in (("within", "cauc"), ("views", "cauc"), ("normalise", "y_aware")):
        if getattr(settings, field) != getattr(Settings(), field) and settings.name != reader:
            raise BadInput(
                f"objective.{field} {getattr(settings, field)} with objective {settings.name}",
                wanted=f"objective {reader}, the only one that reads it",
                do=f"leave --objective.{field} out",
            )
    if settings.name == "supcon" and [spec.split(":")[1:2] for spec in settings.kernel] != [["delta"]]:
        raise BadInput(
            f"objective supcon with the kernel {' '.join(settings.kernel)}",
            wanted="one column of classes",
            do="e.g. --objective.kernel site:delta",
        )


_Loss = Callable[[Objective, Tensor, Tensor, Exchange], Tensor]
_LOSSES: dict[str, _Loss] = {
    "simclr": lambda o, z, y, e: losses.ntxent(z, o._settings.tau, exchange=e),
    "align_uniform": lambda o, z, y, e: losses.align_uniform(
        z, o._settings.alpha, o._settings.t, _or_one(o._settings.lambda_align), o._settings.lambda_unif, exchange=e
    ),
    "decoupled_uniformity": lambda o, z, y, e: losses.decoupled_uniformity(
        z, y[:, : o._k], o._kernel, o._settings.t, exchange=e
    ),
    "supcon": lambda o, z, y, e: losses.supcon(z, y[:, 0], o._settings.tau, exchange=e),
    "y_aware": lambda o, z, y, e: losses.y_aware_infonce(
        z, y[:, : o._k], o._kernel_, o._settings.tau, o._settings.normalise, exchange=e
    ),
    "cauc": Objective._cauc,
    "threshold": lambda o, z, y, e: losses.threshold(z, y[:, : o._k], o._kernel_, o._settings.tau, exchange=e),
    "expw": lambda o, z, y, e: losses.expw(z, y[:, : o._k], o._kernel_, o._settings.tau, exchange=e),
    "rank_n_contrast": lambda o, z, y, e: losses.rank_n_contrast(z, y[:, : o._k], o._settings.tau, exchange=e),
}
