"""From the objective's settings to a loss of (z, y), with the geometry that is watched beside it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cauc_dist import kernels, losses
from cauc_dist.config import Objective as Settings
from cauc_dist.errors import BadInput
from cauc_dist.losses.batch import Batch, Exchange

SUPERVISED = ("cross_entropy", "squared_error")
CONDITIONAL = ("cauc", "calign_unif", "align_cunif")
NEEDS_KERNEL = (*CONDITIONAL, *SUPERVISED, "y_aware", "supcon", "threshold", "expw", "rank_n_contrast")
READERS = {
    "normalise": ("y_aware",),
    "normalise_align": ("cauc", "calign_unif"),
    "normalise_unif": ("cauc", "align_cunif"),
    "views": (*CONDITIONAL, "align_uniform"),
    "within": ("cauc", "align_cunif"),
}
"""Which losses read a setting that changes what is pulled or repelled."""


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
        _refuse_kinds(settings)
        self._settings = settings
        self._k = len(settings.kernel)
        self._answers = _answers(settings, y_train[:, : self._k]) if settings.name in SUPERVISED else None
        self._kernel = None
        if settings.kernel:
            self._kernel = kernels.parse(settings.kernel, settings.combine).fit(y_train[:, : self._k])

    @property
    def outputs(self) -> int:
        """Columns of z that a supervised loss reads: the classes of training, or the kernel's columns; else 0."""
        return 0 if self._answers is None else self._answers.outputs

    def try_out(self, y: Tensor, width: int | None = None) -> None:
        """BadInput where the loss cannot be had on metadata like y (n, k): found before training, not in it.

        `width`: that of z, projector.out; default: wide enough.
        """
        width = width or max(8, self.outputs)
        self._check_width(width)
        draw = torch.Generator().manual_seed(0)
        z = torch.nn.functional.normalize(torch.randn(2, len(y), width, generator=draw), dim=-1)
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
        self._check_width(z.shape[-1])
        return _LOSSES[self._settings.name](self, z, y, exchange)

    @torch.no_grad()
    def geometry(self, z: Tensor, y: Tensor, exchange: Exchange = Batch) -> Mapping[str, float]:
        """Alignment and uniformity of a batch, and their conditional forms where there is a kernel.

        Of a supervised loss also `labelled`: how many values of y it learns from, the missing ones left out.
        """
        if not self._settings.on_sphere:
            z = torch.nn.functional.normalize(z, dim=-1)
        columns = y[:, : self._k] if self._k else None
        found = losses.geometry(z, columns, self._kernel, self._settings.t, self._settings.alpha, exchange)
        if self._answers is not None and columns is not None:
            found["labelled"] = float((~columns.isnan()).sum())
        return found

    def _of_two_terms(self, z: Tensor, y: Tensor, exchange: Exchange) -> Tensor:
        """cauc, or a half of it, with those of the settings that it reads."""
        s = self._settings
        read = [field for field in ("normalise_align", "normalise_unif", "views") if s.name in READERS[field]]
        options = {field: getattr(s, field) for field in read}
        if s.within is not None:
            options["within"] = y[:, -1]
        loss: Tensor = getattr(losses, s.name)(
            z,
            y[:, : self._k],
            self._kernel_,
            t=s.t,
            alpha=s.alpha,
            lambda_align=s.lambda_align,
            lambda_unif=s.lambda_unif,
            exchange=exchange,
            **options,
        )
        return loss

    def _answer(self, y: Tensor) -> Tensor:
        assert self._answers is not None
        return self._answers(y[:, : self._k])

    def _check_width(self, width: int) -> None:
        if width < self.outputs:
            raise BadInput(
                f"objective {self._settings.name} of {self.outputs} outputs with embeddings of width {width}",
                wanted=f"projector.out of at least {self.outputs}",
                do=f"set --projector.out {self.outputs}",
            )

    @property
    def _kernel_(self) -> kernels.Kernel:
        assert self._kernel is not None  # __init__ refused the settings that lack one
        return self._kernel


def _or_one(weight: float | None) -> float:
    return 1.0 if weight is None else weight


def _refuse_unread(settings: Settings) -> None:
    """A setting that changes what is repelled, given to a loss that does not read it, would be ignored in silence."""
    for field, readers in READERS.items():
        if getattr(settings, field) != getattr(Settings(), field) and settings.name not in readers:
            raise BadInput(
                f"objective.{field} {getattr(settings, field)} with objective {settings.name}",
                wanted=f"objective {' or '.join(readers)}, which alone read{'s' * (len(readers) == 1)} it",
                do=f"leave --objective.{field} out",
            )


def _refuse_kinds(settings: Settings) -> None:
    """Classes want one column that is compared for equality; a regression wants numbers."""
    kinds = [spec.split(":")[1] if ":" in spec else "" for spec in settings.kernel]
    if settings.name in ("supcon", "cross_entropy") and kinds != ["delta"]:
        raise BadInput(
            f"objective {settings.name} with the kernel {' '.join(settings.kernel)}",
            wanted="one column of classes",
            do="e.g. --objective.kernel site:delta",
        )
    if settings.name == "squared_error" and "delta" in kinds:
        raise BadInput(
            f"objective squared_error with the kernel {' '.join(settings.kernel)}",
            wanted="columns of numbers; a delta kernel says that they are classes",
            do="e.g. --objective.kernel age:gaussian:5, or --objective.name cross_entropy",
        )


class _Classes:
    """Values of one column -> their places among those of training, ascending; NaN stays NaN."""

    def __init__(self, y_train: Tensor) -> None:
        self._values: Tensor = torch.unique(y_train[~y_train.isnan()])
        self.outputs = len(self._values)

    def __call__(self, y: Tensor) -> Tensor:
        """(n, 1) -> (n,)."""
        values, y = self._values.to(y), y[:, 0].contiguous()
        places = torch.searchsorted(values, y).clamp(max=self.outputs - 1)
        unknown = (values[places] != y) & ~y.isnan()
        if bool(unknown.any()):
            raise ValueError(f"class {y[unknown][0].item():g} is none of the {self.outputs} of the training metadata")
        return places.to(y).masked_fill(y.isnan(), torch.nan)


class _Standardised:
    """Columns less their mean over training, over their standard deviation there (of the population); NaN stays NaN."""

    def __init__(self, y_train: Tensor) -> None:
        self._mean = y_train.nanmean(0)
        self._sd = (y_train - self._mean).square().nanmean(0).sqrt()
        self.outputs = y_train.shape[1]

    def __call__(self, y: Tensor) -> Tensor:
        """(n, k) -> (n, k)."""
        return (y - self._mean.to(y)) / self._sd.to(y)


def _answers(settings: Settings, y_train: Tensor) -> _Classes | _Standardised:
    """What a supervised loss compares z with, of training metadata (N, k); BadInput where there is nothing to learn."""
    for name, column in zip(settings.columns, y_train.T, strict=False):
        if len(torch.unique(column[~column.isnan()])) < 2:
            raise BadInput(
                f"objective {settings.name} of column {name}, without two different values in training",
                wanted="at least two classes, or numbers that vary",
                do="name another column",
            )
    return _Classes(y_train) if settings.name == "cross_entropy" else _Standardised(y_train)


_Loss = Callable[[Objective, Tensor, Tensor, Exchange], Tensor]
_LOSSES: dict[str, _Loss] = {
    "simclr": lambda o, z, y, e: losses.ntxent(z, o._settings.tau, exchange=e),
    "align_uniform": lambda o, z, y, e: losses.align_uniform(
        z,
        o._settings.alpha,
        o._settings.t,
        _or_one(o._settings.lambda_align),
        o._settings.lambda_unif,
        o._settings.views,
        exchange=e,
    ),
    "decoupled_uniformity": lambda o, z, y, e: losses.decoupled_uniformity(
        z, y[:, : o._k], o._kernel, o._settings.t, exchange=e
    ),
    "supcon": lambda o, z, y, e: losses.supcon(z, y[:, 0], o._settings.tau, exchange=e),
    "y_aware": lambda o, z, y, e: losses.y_aware_infonce(
        z, y[:, : o._k], o._kernel_, o._settings.tau, o._settings.normalise, exchange=e
    ),
    **dict.fromkeys(CONDITIONAL, Objective._of_two_terms),
    "threshold": lambda o, z, y, e: losses.threshold(z, y[:, : o._k], o._kernel_, o._settings.tau, exchange=e),
    "expw": lambda o, z, y, e: losses.expw(z, y[:, : o._k], o._kernel_, o._settings.tau, exchange=e),
    "rank_n_contrast": lambda o, z, y, e: losses.rank_n_contrast(z, y[:, : o._k], o._settings.tau, exchange=e),
    "cross_entropy": lambda o, z, y, e: losses.cross_entropy(z, o._answer(y), exchange=e),
    "squared_error": lambda o, z, y, e: losses.squared_error(z, o._answer(y), exchange=e),
}
