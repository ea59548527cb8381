"""What an ingest will do, from headers alone: one window and one form for all. What can be refused is refused here."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cauc_dist.errors import BadInput
from cauc_dist.store import layout, sources
from cauc_dist.store.layout import Codec, DType, Layout
from cauc_dist.store.parts import Survey, coverage, or_reason
from cauc_dist.store.shards import Form
from cauc_dist.store.sources import Cohort, Header, Item, Refused, by, some

SAMPLE = 16
"""Scans that tell whether a survey of all is worth while."""
ROTATED = 5.0
"""Degrees between the axes of two scans from which on they are not taken for one space."""

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Settings:
    """What is asked for; see `ingest`."""

    shape: tuple[int, ...] | None = None
    pad: bool = False
    layout: Layout | Literal["auto"] = "auto"
    dtype: DType | Literal["auto"] = "auto"
    codec: Codec | Literal["auto"] = "auto"
    suffix: tuple[str, ...] = ("T1w",)
    resample: Spacing | None = None

    @staticmethod
    def of(told: dict[str, Any]) -> "Settings":
        """From JSON's types."""
        return Settings(**_tuples(told))


def _tuples(told: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where ours are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}


def refuse_settings(settings: Settings, task: tuple[int, int]) -> None:
    shape, resample = settings.shape, settings.resample
    if shape and min(shape) < 1:
        raise BadInput(f"shape {by(shape)}", wanted="positive numbers of voxels", do="Give e.g. 96 112 96")
    if resample is not None and not all(0 < side < math.inf for side in resample):
        raise BadInput(f"resample {by(resample)}", wanted="three lengths in mm", do="Give e.g. 1.5 1.5 1.5")
    if not 0 <= task[0] < task[1]:
        raise BadInput(f"task {task[0]}/{task[1]}", wanted="0/n to n-1/n", do="Count tasks from 0")


@dataclass(frozen=True)
class Plan:
    """All that a part needs to know, and that every process and task must agree on."""

    items: tuple[Item, ...]
    at: tuple[int, ...]
    """Place of each item in the cohort."""
    shape: tuple[int, ...]
    """(c, *spatial) of every stored scan."""
    layout: Layout | Literal["survey"]
    """survey: packed if the voxels that any scan uses are few enough."""
    dtype: DType
    codec: Codec | Literal["auto"]
    resample: Spacing | None
    voxel: Spacing | None
    shapes: int
    set_aside: tuple[Refused, ...]

    @staticmethod
    def of(told: dict[str, Any], cohort: Cohort) -> "Plan":
        """From JSON's types; items are taken from the cohort."""
        told = _tuples(told)
        told["set_aside"] = tuple((name, reason) for name, reason in told["set_aside"])
        return Plan(**told | {"items": tuple(cohort.items[i] for i in told["at"])})

    def form(self, mask: NDArray[np.bool_] | None) -> Form:
        codec = default_codec(mask, self.shape) if self.codec == "auto" else self.codec
        return Form(self.shape, self.dtype, codec, mask)

    def form_of(self, union: NDArray[np.uint8]) -> Form:
        """The same, where the scans together use the voxels `union` (bits)."""
        part = coverage(union, self.shape)
        if not part or (self.layout == "survey" and part > layout.PACKS_BELOW):  # 0: no scan is usable
            return self.form(None)
        bits = np.unpackbits(union, count=math.prod(self.shape))
        return self.form(bits.astype(bool).reshape(self.shape))


def default_codec(mask: NDArray[np.bool_] | None, shape: tuple[int, ...]) -> Codec:
    """lz4 for the background of dense volumes and images; what is left in a mask, or in tables, does not shrink."""
    return "none" if mask is not None or len(shape) == 1 else "lz4"


def make_plan(cohort: Cohort, settings: Settings) -> Plan:
    """Headers, one window for all, and (layout auto) a look at a few scans."""
    heads = _headers(cohort.items, settings)
    bad = [(item.id, head) for item, head in zip(cohort.items, heads, strict=True) if isinstance(head, str)]
    good = [(i, head) for i, head in enumerate(heads) if isinstance(head, Header)]
    refuse_nothing(len(good), [*cohort.set_aside, *bad])
    good, odd = _alike(cohort.items, good)
    heads_only = [head for _, head in good]
    _one_space(heads_only, settings.resample)
    window = _window([head.shape[1:] for head in heads_only], settings.shape, settings.pad)
    volumes = len(window) == 3
    chosen = settings.layout if settings.layout != "auto" else "survey" if volumes else "dense"
    if chosen == "packed" and not volumes:
        raise BadInput("layout packed for images or tables", wanted="volumes", do="Leave the layout to auto")
    if not window and settings.dtype not in ("auto", "f32"):
        raise BadInput(f"dtype {settings.dtype} for tables", wanted="f32", do="Leave the dtype to auto")
    voxels = [head.voxel for head in heads_only if head.voxel]
    plan = Plan(
        items=(),  # taken from the cohort, see `of`
        at=tuple(i for i, _ in good),
        shape=(heads_only[0].shape[0], *window),
        layout=chosen,
        dtype=settings.dtype if settings.dtype != "auto" else "f16" if window else "f32",
        codec=settings.codec,
        resample=settings.resample,
        voxel=tuple(np.median(voxels, axis=0).tolist()) if voxels else None,
        shapes=len({head.shape for head in heads_only}),
        set_aside=(*cohort.set_aside, *bad, *odd),
    )
    if settings.layout == "auto" and volumes:
        few = sample([cohort.items[i] for i in plan.at], SAMPLE)
        union = Survey("", few, plan.shape, plan.resample).do()["union"]
        if coverage(union, plan.shape) > layout.PACKS_BELOW:  # more scans can only use more voxels
            return replace(plan, layout="dense")
    return plan


def _headers(items: Sequence[Item], settings: Settings) -> list[Header | str]:
    def one(item: Item) -> Header | str:
        return or_reason(lambda: sources.header(item, settings.resample))

    if all(item.index is not None for item in items):
        return [one(item) for item in items]
    with ThreadPoolExecutor(8) as pool:  # waiting for files, mostly
        return list(pool.map(one, items))


def _alike(items: Sequence[Item], good: list[tuple[int, Header]]) -> tuple[list[tuple[int, Header]], list[Refused]]:
    """Scans with as many channels and axes as most have; the others with the reason."""
    kinds = [(head.shape[0], len(head.shape)) for _, head in good]
    usual = max(sorted(set(kinds)), key=kinds.count)
    odd = [
        (items[i].id, f"{c} channels and {axes - 1} axes; most scans have {usual[0]} and {usual[1] - 1}")
        for (i, _), (c, axes) in zip(good, kinds, strict=True)
        if (c, axes) != usual
    ]
    return [pair for pair, kind in zip(good, kinds, strict=True) if kind == usual], odd


def _one_space(heads: Sequence[Header], resample: Spacing | None) -> None:
    """Refuse what only resampling could bring together, unless it was asked for."""
    if resample is not None:
        return
    voxels = np.array([head.voxel for head in heads if head.voxel])
    if len(voxels) and (voxels.max(0) > 1.01 * voxels.min(0)).any():
        found = f"voxel sizes from {by(voxels.min(0).round(3))} to {by(voxels.max(0).round(3))} mm"
        do = f"Ask for resample, e.g. {' '.join(f'{side:g}' for side in np.median(voxels, axis=0).round(2))}"
        raise BadInput(found, wanted="one voxel size within 1 %", do=do)
    axes = np.array([head.affine for head in heads if head.affine])
    if len(axes) < 2:
        return
    axes = axes[:, :3, :3] / np.linalg.norm(axes[:, :3, :3], axis=1, keepdims=True)
    cosine = (np.einsum("nij,ij->n", axes, axes[0]) - 1) / 2
    if (angle := np.degrees(np.arccos(cosine.clip(-1, 1))).max()) > ROTATED:
        do = "Register the scans to one template, or ask for resample to turn them to the scanner's axes"
        raise BadInput(f"scans turned by up to {angle:.0f} degrees against each other", wanted="one space", do=do)


def _window(shapes: Sequence[tuple[int, ...]], shape: tuple[int, ...] | None, pad: bool) -> tuple[int, ...]:
    """The spatial shape all scans get; refuses what would need guessing or unasked zeros."""
    sides = np.array(shapes)
    least: list[int] = sides.min(0).tolist() if sides.size else []
    if shape is None:
        if sides.size and (sides != sides[0]).any():
            median = " ".join(map(str, np.median(sides, axis=0).astype(int).tolist()))
            found = f"{len(set(shapes))} shapes, from {by(least)} to {by(sides.max(0))}"
            do = f"Give shape {' '.join(map(str, least))}, the largest window that lies inside every scan (it is cut "
            do += f"from the centre), or another one, e.g. their median {median} with pad"
            raise BadInput(found, wanted="one shape", do=do)
        return tuple(least)
    if len(shape) != len(least):
        do = f"Give {len(least)} numbers" if least else "Leave the shape out"
        raise BadInput(f"shape {by(shape)} for scans of {len(least)} axes", wanted="a side for each axis", do=do)
    if (small := (sides < shape).any(1)).any() and not pad:
        inside = " ".join(str(min(a, b)) for a, b in zip(least, shape, strict=True))
        found = f"{small.sum()} of {len(shapes)} scans are smaller than {by(shape)}"
        do = f"Give shape {inside}, or ask for pad to add zeros"
        raise BadInput(found, wanted="a window inside every scan", do=do)
    return shape


def sample(items: Sequence[Item], n: int) -> tuple[Item, ...]:
    """At most n of them, evenly spread."""
    return tuple(items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(n, len(items))).astype(int)))


def refuse_nothing(kept: int, bad: Sequence[Refused]) -> None:
    """BadInput where not one scan is left."""
    if not kept:
        found = f"no scan can be used ({some([f'{name}: {why}' for name, why in bad], '; ')})"
        raise BadInput(found, wanted="one at least", do="Mend what is named, then ingest again")
