"""The contact sheet shows the scans and the views that a run has of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cauc_dist import sheet
from cauc_dist.augment import views
from cauc_dist.config import PRESETS, Augment
from cauc_dist.errors import BadInput

NOTHING = Augment(p_intensity=0.0, p_blur=0.0, p_noise=0.0)


class Fake(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.ids)


def store_of(shape: tuple[int, ...], n: int = 3) -> Any:
    """What the sheet needs of a store; each scan has a mean and a spread of its own."""
    values = np.random.default_rng(0).uniform(0, 1, (n, *shape)) * np.arange(1, n + 1).reshape(-1, *[1] * len(shape))
    axes = tuple(range(2, values.ndim))
    return Fake(
        name="scans.zarr",
        shape=shape,
        ids=tuple(f"sub-{i}" for i in range(n)),
        keys=np.array([2**63 + 7 * i for i in range(n)], np.uint64),
        stats={"mean": values.mean(axes), "std": values.std(axes)},
        volume=lambda i: values[i],
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The lines that were drawn."""
    lines: list[Any] = []
    draw = sheet.draw

    def noting(given: Any) -> bytes:
        lines.extend(given)
        return draw(given)

    monkeypatch.setattr(sheet, "draw", noting)
    return lines


def make(store: Any, augment: Augment, out: Path, **fields: Any) -> None:
    sheet.contact_sheet(store, augment, **{"rows": [2, 0], "seed": 3, "epoch": 4, "out": out, **fields})


@pytest.mark.parametrize("shape", [(1, 12, 15, 10), (2, 12, 15, 10), (1, 20, 16), (3, 20, 16)])
def test_a_sheet_is_a_png_with_a_line_a_scan(shape: tuple[int, ...], tmp_path: Path, drawn: list[Any]) -> None:
    from matplotlib.image import imread

    make(store_of(shape), Augment(views=3), tmp_path / "new" / "sheet.png")
    assert [label for label, _ in drawn] == ["sub-2", "sub-0"]
    assert [len(cells) for _, cells in drawn] == [4, 4]
    pixels = imread(tmp_path / "new" / "sheet.png")
    assert pixels.ndim == 3
    assert pixels.std() > 0.05
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_the_views_shown_are_those_of_a_run(tmp_path: Path, drawn: list[Any]) -> None:
    store = store_of((1, 12, 15, 10))
    make(store, PRESETS["all_tf"], tmp_path / "sheet.png")
    scans = torch.from_numpy(np.stack([(v - v.mean()) / v.std() for v in map(store.volume, (2, 0))])).float()
    wanted = views(scans, store.keys[[2, 0]], seed=3, epoch=4, augment=PRESETS["all_tf"]).view(2, 2, 1, 12, 15, 10)
    for i, (_, cells) in enumerate(drawn):
        np.testing.assert_allclose(cells[0], scans[i], atol=1e-6)
        np.testing.assert_allclose(np.stack(cells[1:]), wanted[:, i], atol=1e-5)


def test_values_stay_as_they_are_where_the_run_does_not_normalise(tmp_path: Path, drawn: list[Any]) -> None:
    store = store_of((3, 32, 32))
    make(store, PRESETS["simclr_2d"], tmp_path / "sheet.png", normalise="none", rows=[0])
    np.testing.assert_allclose(drawn[0][1][0], store.volume(0), rtol=1e-6)


def test_a_constant_channel_is_drawn(tmp_path: Path) -> None:
    store = store_of((1, 8, 8))
    store.volume = lambda i: np.ones((1, 8, 8))
    store.stats = {"mean": np.ones((3, 1)), "std": np.zeros((3, 1))}
    make(store, NOTHING, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_a_volume_is_its_middle_axial_coronal_and_sagittal_slice_with_superior_and_anterior_up() -> None:
    v = np.random.default_rng(1).uniform(0, 1, (2, 4, 6, 5))
    shown = sheet.picture(v, 0.0, 1.0)
    assert shown.shape == (6, 4 + 4 + 6)
    for x, y, z in [(0, 0, 0), (3, 5, 4), (1, 2, 3)]:
        assert shown[5 - y, x] == v[0, x, y, 2]  # axial
        assert shown[4 - z, 4 + x] == v[0, x, 3, z]  # coronal
        assert shown[4 - z, 8 + y] == v[0, 2, y, z]  # sagittal


def test_an_image_is_shown_as_it_lies_in_rows_and_columns() -> None:
    image = np.random.default_rng(1).uniform(0, 1, (3, 4, 6))
    assert np.array_equal(sheet.picture(image, 0.0, 1.0), np.stack(list(image), -1))
    assert np.array_equal(sheet.picture(image[:1], 0.0, 1.0), image[0])


def test_the_window_is_that_of_the_scan_for_its_views_too() -> None:
    scan = np.arange(10_000.0).reshape(1, 100, 100)
    assert sheet.window(scan) == pytest.approx((99.99, 9899.01))
    shown = sheet.picture(scan * 2, *sheet.window(scan))
    assert shown.max() == 1.0
    assert shown[0, 0] == 0.0
    assert (shown == 1).mean() == pytest.approx(0.505, abs=0.01)


def test_table_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"scans\.zarr holds table rows of 7 features; wanted volumes or images\."):
        make(store_of((7,)), NOTHING, tmp_path / "sheet.png")


@pytest.mark.parametrize("row", [3, -1])
def test_a_row_that_is_not_there_is_refused(row: int, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"row {row} of scans\.zarr; wanted 0 to 2"):
        make(store_of((1, 8, 8)), NOTHING, tmp_path / "sheet.png", rows=[0, row])


def test_no_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no row to show; wanted one or more"):
        make(store_of((1, 8, 8)), NOTHING, tmp_path / "sheet.png", rows=[])
