"""A picture of what a run trains on: scans, and the views that it makes of them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cauc_dist import durable
from cauc_dist.augment import views
from cauc_dist.config import Augment
from cauc_dist.errors import BadInput
from cauc_dist.report.style import need_matplotlib
from cauc_dist.store.reader import Store

Floats = NDArray[Any]
CELL = 2.0  # inches: the height of a scan


def contact_sheet(
    store: Store,
    augment: Augment,
    *,
    rows: Sequence[int],
    seed: int,
    epoch: int,
    out: Path,
    normalise: Literal["volume", "none"] = "volume",
) -> None:
    """Write a PNG, one line a scan: the scan itself, then the V views that a run of this seed has of it in that epoch.

    A volume is shown by its middle axial, coronal and sagittal slice (first channel), an image whole. The grey window
    of a line is that of the scan: from its 1st to its 99th percentile.
    """
    if len(store.shape) not in (3, 4):
        raise BadInput(
            f"store {store.name} holds table rows of {store.shape[0]} features",
            wanted="volumes or images",
            do="give a store of those",
        )
    if wrong := [row for row in rows if not 0 <= row < len(store)]:
        raise BadInput(f"row {wrong[0]} of {store.name}", wanted=f"0 to {len(store) - 1}", do="choose other rows")
    if not len(rows):
        raise BadInput("no row to show", wanted="one or more", do="name some")
    need_matplotlib()
    lines = [(store.ids[row], _line(store, row, augment, seed, epoch, normalise)) for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(out, draw(lines))


def _line(
    store: Store, row: int, augment: Augment, seed: int, epoch: int, normalise: Literal["volume", "none"]
) -> list[Floats]:
    """The scan and its views, (c, *spatial) each."""
    volume = store.volume(row)
    if normalise == "volume":
        mean, std = (store.stats[name][row].reshape(-1, *[1] * (volume.ndim - 1)) for name in ("mean", "std"))
        volume = (volume - mean) / np.where(std > 0, std, 1)
    x = torch.from_numpy(volume)[None].float()
    made = views(x, store.keys[row : row + 1], seed=seed, epoch=epoch, augment=augment)
    return list(torch.cat([x, made]).numpy())


def draw(lines: Sequence[tuple[str, Sequence[Floats]]]) -> bytes:
    """The PNG of (label, [scan, view, view ...]) a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = [[picture(cell, *window(cells[0])) for cell in cells] for _, cells in lines]
    height, width = pictures[0][0].shape[:2]
    columns = len(pictures[0])
    figure = Figure(figsize=(columns * CELL * width / height, len(lines) * CELL * 1.15), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for i, (label, _) in enumerate(lines):
        for j, one in enumerate(pictures[i]):
            axes[i, j].imshow(one, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[i, j].set_axis_off()
            axes[i, j].set_title(f"view {j}" if j else label, fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100, metadata={"Software": None})
    return image.getvalue()


def window(scan: Floats) -> tuple[float, float]:
    """The 1st and the 99th percentile of what is shown."""
    low, high = np.percentile(scan if scan.ndim == 3 else scan[0], [1, 99])
    return float(low), float(high)


def picture(scan: Floats, low: float, high: float) -> Floats:
    """(rows, columns) grey or (rows, columns, 3) of 0...1: an image, or three middle slices of a volume side by side.

    RAS volumes: left is left, up is anterior (axial) or superior.
    """
    scan = np.clip((scan - low) / max(high - low, 1e-12), 0, 1)
    if scan.ndim == 3:
        return np.moveaxis(scan, 0, -1) if len(scan) == 3 else scan[0]
    v = scan[0]
    x, y, z = (side // 2 for side in v.shape)
    slices = [plane.T[::-1] for plane in (v[:, :, z], v[:, y, :], v[x, :, :])]
    height = max(len(plane) for plane in slices)
    padded = [np.pad(plane, ((0, height - len(plane)), (0, 0))) for plane in slices]
    joined: Floats = np.concatenate(padded, axis=1)
    return joined
