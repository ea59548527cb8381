"""The pages say what a store holds, are safe to open, and warn where a picture would show a face."""

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cauc_dist import phantoms
from cauc_dist.errors import BadInput
from cauc_dist.info import page, shows_face, text
from cauc_dist.store.append import append
from cauc_dist.store.ingest import from_arrays, ingest
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from tests.browser import opened
from tests.store import cohorts

HOSTILE = "<script>document.title='taken'</script>\"'&\x1b[31m\n"


def store_of(
    folder: Path, columns: dict[str, Any], n: int = 20, shape: tuple[int, ...] = (1, 6, 5, 4), **options: Any
) -> Store:
    """n scans; `columns` by name: numbers, or texts."""
    described, values = [], []
    for name, given in columns.items():
        levels = tuple(sorted({x for x in given if isinstance(x, str)}))
        described.append(Column(name, "category" if levels else "number", levels))
        values.append(np.array([levels.index(x) if isinstance(x, str) else x for x in given], float))
    volumes = [np.random.default_rng(i).normal(100, 20, shape).astype(np.float32) for i in range(n)]
    ids = [f"sub-{i:02d}" for i in range(n)]
    from_arrays(folder, volumes, ids, shape=shape, columns=described, metadata=values, **options)
    return Store.open(folder)


def edited(store: Store, **attributes: Any) -> Store:
    """The same store with other words in its attributes."""
    cohorts.change(Path(store.where) / "zarr.json", lambda told: told["attributes"].update(attributes))
    return Store.open(store.where)


class Page(HTMLParser):
    """Every tag with its attributes, all text, and whether each tag is closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.open = "", list[str]()
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def written(store: Store, out: Path, montage: bool = False) -> tuple[Page, list[str]]:
    said: list[str] = []
    page(store, out, montage=montage, say=said.append)
    return Page(out), said


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_the_text_says_what_the_store_holds(tmp_path: Path) -> None:
    ages = [20.0, 21.0, 22.0, 40.0, *[30.0] * 14, np.nan, np.nan]
    store = store_of(tmp_path / "s.zarr", {"age": ages, "site": ["a"] * 15 + ["b"] * 5}, dtype="i16", codec="zstd")
    said = text(store)
    assert f"s.zarr: {tmp_path / 's.zarr'}" in said
    assert "20 of 20 subjects, 1 a subject; 0 set aside" in said
    assert "dense int16, codec zstd, 1x6x5x4" in said
    assert store.fingerprint in said
    assert re.search(r"age +number +2 missing  ▂▁      █      ▁  20 to 40, median 30\n", said)
    assert re.search(r"site +category +0 missing +█▃ +a 15, b 5$", said)
    assert re.search(r"error +at most [\d.e-]+ of a scan's range, PSNR \d+\.\d dB \(sub-\d\d\)", said)


def test_the_size_is_that_of_the_files(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", {})
    size = sum(len(path.read_bytes()) for path in (tmp_path / "s.zarr").rglob("*") if path.is_file())
    assert f"{size / 1000:.1f} kB on disk, {size / 20:.0f} bytes a scan" in text(store).replace(".0 bytes", " bytes")
    assert "metadata: none" in text(store)


def test_a_store_behind_a_url_says_what_a_scan_takes(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", {})
    object.__setattr__(store, "where", "https://host/s.zarr")
    assert "240 bytes a scan before compression" in text(store)


def test_space_source_and_licence_come_from_what_was_ingested(tmp_path: Path) -> None:
    source = cohorts.bids(tmp_path / "bids", [cohorts.blob(i) for i in range(4)])
    (source / "dataset_description.json").write_text('{"Name": "Heads", "License": "CC0"}')
    cohorts.scan(source, "sub-00", cohorts.blob(7), name="{}_ses-2_T1w.nii.gz")
    ingest(source, tmp_path / "s.zarr")
    said = text(Store.open(tmp_path / "s.zarr"))
    assert f"BIDS Heads, licence CC0, {source}" in said
    assert "5 of 4 subjects, 1 to 2 a subject" in said
    assert re.search(r"packed float16, codec none, 1x8x9x7, voxels of 2x2x2 mm, RAS, \d+% of the box kept", said)


def test_exact_values_and_several_sources_are_said(tmp_path: Path) -> None:
    first = cohorts.bids(tmp_path / "a", [np.rint(cohorts.noise(i)) for i in range(3)])
    ingest(first, tmp_path / "s.zarr")
    append(
        cohorts.bids(tmp_path / "b", [np.rint(cohorts.noise(i + 5)) for i in range(2)], first=5), tmp_path / "s.zarr"
    )
    said = text(Store.open(tmp_path / "s.zarr"))
    assert "none: stored values equal the source exactly" in said
    assert [line.split(",")[0] for line in said.splitlines() if line.startswith("  source ")] == [
        "  source      BIDS"
    ] * 2
    assert said.count("licence not stated") == 2


def test_reasons_that_differ_in_numbers_alone_are_grouped(tmp_path: Path) -> None:
    aside = [[f"sub-{i}", f"the same voxels as sub-0{i + 2}"] for i in range(7)]
    aside += [["sub-x", "constant (4 everywhere)"], ["sub-y", "constant (4 everywhere)"]]
    store = edited(
        store_of(tmp_path / "s", {}), set_aside=aside, counted={"age": {"code -9": 3, "empty": 2}, "sex": {}}
    )
    said = text(store)
    assert "9 set aside" in said
    assert "  7 the same voxels as sub-…: sub-0, sub-1, sub-2, sub-3, sub-4, and 2 more\n" in said
    assert "  2 constant (4 everywhere): sub-x, sub-y\n" in said
    assert said.endswith("made missing:\n  age: 3 code -9, 2 empty")
    words = written(store, tmp_path / "page.html")[0].words
    assert all(reason in words for _, reason in aside)


def test_however_much_there_is_the_text_fits_a_screen(tmp_path: Path) -> None:
    many = {f"a column of a long name {i}": [f"level {j} {'x' * 30}" for j in range(20)] for i in range(60)}
    store = store_of(tmp_path / "s", many)
    store = edited(
        store,
        sources=[{"kind": "BIDS", "name": "n" * 200}] * 9,
        set_aside=[[f"s{i}", f"reason {'abcdefghij'[i]} {'w' * 90}"] for i in range(10)],
        counted={f"c{i}": {"empty": 1} for i in range(10)},
    )
    lines = text(store).splitlines()
    assert len(lines) == 40
    assert max(map(len, lines)) == 120
    assert sum("  and " in line and line.endswith(" more") for line in lines) == 4
    words = written(store, tmp_path / "page.html")[0].words
    assert all(name in words for name in many)  # the page has room


@pytest.mark.parametrize(
    ("values", "figures"),
    [
        ([np.nan] * 20, "no value"),
        ([7.0] * 20, "7 to 7, median 7"),
        ([1e16, *[1e16 + 2] * 19], "1e+16 to 1e+16, median 1e+16"),
    ],
)
def test_columns_of_hardly_any_spread_are_shown_too(tmp_path: Path, values: list[float], figures: str) -> None:
    store = store_of(tmp_path / "s", {"x": values})
    assert figures in text(store)
    assert figures in written(store, tmp_path / "page.html")[0].words


def test_bars_count_every_scan_of_a_column(tmp_path: Path) -> None:
    numbers = [*np.linspace(0, 1, 18), np.nan, 0.5]
    store = store_of(tmp_path / "s", {"x": numbers, "level": [f"l{i}" for i in range(20)], "two": ["a", "b"] * 10})
    marks = re.findall(
        r"<title>([^<]*): (\d+)</title>", (written(store, tmp_path / "p"), (tmp_path / "p").read_text())[1]
    )
    assert [sum(int(count) for _, count in marks[a:b]) for a, b in ((0, 16), (16, 32), (32, 34))] == [19, 20, 20]
    assert marks[31] == ("5 others", "5")
    assert marks[32:] == [("a", "10"), ("b", "10")]


# ---- the page as a file ---------------------------------------------------------------------------------------------


def hostile(folder: Path) -> Store:
    store = store_of(folder, {HOSTILE: [1.0, 2.0] * 10, "site": [HOSTILE, "b"] * 10})
    return edited(
        store,
        set_aside=[[HOSTILE, HOSTILE]],
        counted={HOSTILE: {HOSTILE: 1}},
        sources=[{"kind": HOSTILE, "name": HOSTILE, "license": HOSTILE, "folder": HOSTILE}],
    )


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    store = hostile(tmp_path / "s.zarr")
    found, _ = written(store, tmp_path / "page.html")
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "div", "figure",
        "figcaption", "svg", "rect", "text", "details", "summary",
    }  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert found.words.count("<script>") >= 8
    assert "\x1b" not in (tmp_path / "page.html").read_text()
    assert all(line.isprintable() for line in text(store).splitlines())
    assert len(text(store).splitlines()) < 20


def test_without_a_montage_no_image_is_on_the_page(tmp_path: Path) -> None:
    found, said = written(store_of(tmp_path / "s", {"age": np.arange(20.0)}), tmp_path / "page.html")
    assert said == []
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert "data:" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("shape", [(1, 12, 14, 10), (2, 12, 14, 10), (3, 9, 8)])
def test_a_montage_has_a_picture_of_twelve_scans_inside_the_page(tmp_path: Path, shape: tuple[int, ...]) -> None:
    store = store_of(tmp_path / "s", {}, shape=shape)
    found, said = written(store, tmp_path / "page.html", montage=True)
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 12
    assert len({image["src"] for image in images}) == 12
    assert images[0]["alt"] == "middle slices of sub-00"
    assert images[-1]["alt"] == "middle slices of sub-19"
    for image in images:
        kind, data = str(image["src"]).split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert len(said) == (len(shape) == 4)  # noise fills the box, whose size is unknown; an image is no head
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", (tmp_path / "page.html").read_text())


def test_few_scans_are_all_shown(tmp_path: Path) -> None:
    found, _ = written(store_of(tmp_path / "s", {}, n=5), tmp_path / "page.html", montage=True)
    assert len([tag for tag, _ in found.tags if tag == "img"]) == 5


def test_a_montage_of_a_table_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", {}, shape=(7,), dtype="f32")
    with pytest.raises(BadInput, match=r"a montage of s, a table; wanted volumes or images. Leave --montage out"):
        written(store, tmp_path / "page.html", montage=True)
    assert not (tmp_path / "page.html").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "s", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="no matplotlib; wanted the extra `report`"):
        written(store, tmp_path / "page.html", montage=True)
    written(store, tmp_path / "page.html")


def test_a_browser_shows_the_page_and_runs_nothing_of_it(tmp_path: Path) -> None:
    page(hostile(tmp_path / "s.zarr"), tmp_path / "page.html", montage=True, say=print)
    script = "<script>document.title=JSON.stringify([document.title, [...document.images].filter(i=>i.naturalWidth>99)"
    script += ".length, [...document.querySelectorAll('rect')].filter(r=>r.getBoundingClientRect().height>1).length,"
    script += "document.documentElement.scrollWidth<=innerWidth])</script>"
    (tmp_path / "asked.html").write_text((tmp_path / "page.html").read_text() + script)
    done = opened((tmp_path / "asked.html").as_uri(), tmp_path, window="1000,800")
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    # two bars of two values, two of two levels; all twelve pictures; nothing wider than the window
    assert json.loads(title[1].replace("&quot;", '"')) == ["s.zarr", 12, 4, True]


# ---- faces ----------------------------------------------------------------------------------------------------------


def head(voxel: float = 3.0, *, defaced: bool = False, stripped: bool = False, noise: float = 0.0) -> np.ndarray:
    """A head in RAS, from a description of one in mm: 240 mm a side, the brain's centre in the middle.

    Skull and scalp 13 mm round the brain, a face down to the chin 100 mm below the middle with a nose, and a neck.
    """
    axis = np.arange(-120, 120, voxel) + voxel / 2
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    brain = (x / 68) ** 2 + (y / 85) ** 2 + ((z - 5) / 65) ** 2 < 1
    skull = (x / 81) ** 2 + (y / 98) ** 2 + ((z - 5) / 78) ** 2 < 1
    face = (np.abs(x) < 60) & (y > 0) & (y < 88) & (z > -100) & (z < 0)
    nose = (np.abs(x) < 12) & (y > 80) & (y < 112) & (z > -65) & (z < -35)
    neck = (x / 60) ** 2 + ((y + 20) / 60) ** 2 < 1
    tissue = skull | face | nose | (neck & (z < 0))
    if defaced:
        tissue &= ~((y > 20) & (z < -30))
    volume = np.where(brain, 700.0, np.where(tissue, 500.0, 0.0))
    if stripped:
        volume = np.where(brain, volume, 0)
    return volume + (np.random.default_rng(0).rayleigh(noise, volume.shape) if noise else 0)


@pytest.mark.parametrize("voxel", [2.0, 3.0])
@pytest.mark.parametrize("noise", [0.0, 15.0])
def test_a_head_with_its_face_is_told_from_one_without(voxel: float, noise: float) -> None:
    sides = [voxel] * 3
    assert shows_face(head(voxel, noise=noise), sides)
    assert not shows_face(head(voxel, noise=noise, defaced=True), sides)
    assert not shows_face(head(voxel, noise=noise, stripped=True), sides)


def test_the_scale_and_the_background_play_no_part() -> None:
    assert shows_face(head() / 1e6 - 3, [3.0] * 3)
    assert not shows_face(head(stripped=True) / 1e6 - 3, [3.0] * 3)


def test_without_a_voxel_size_a_whole_head_is_told_from_a_brain() -> None:
    assert shows_face(head(), None)
    assert not shows_face(head(stripped=True), None)


def test_a_box_that_ends_above_the_face_shows_none() -> None:
    assert not shows_face(head()[:, :, 40:], [3.0] * 3)


def test_crops_and_volumes_without_tissue_show_no_face() -> None:
    assert not shows_face(cohorts.noise(1, (35, 51, 35)), [1.0] * 3)
    assert not shows_face(np.zeros((60, 70, 60)), [3.0] * 3)


def test_phantoms_are_as_after_skull_stripping(tmp_path: Path) -> None:
    for i in range(20):
        rng = np.random.default_rng([5, i])
        volume = phantoms.head(rng, phantoms.draw_person(rng), 48)
        assert not shows_face(volume, [phantoms.FIELD_OF_VIEW / 48] * 3)


@pytest.mark.real
@pytest.mark.skipif("CAUC_DATA" not in os.environ, reason="CAUC_DATA does not name the real data")
@pytest.mark.parametrize(("name", "side"), [("ixi50", 2.0), ("hippocampus260", 1.0)])
def test_real_stripped_scans_and_crops_raise_no_warning(name: str, side: float) -> None:
    paths = sorted((Path(os.environ["CAUC_DATA"]) / name).rglob("*_T1w.nii*"))[:50]
    assert len(paths) == 50
    for path in paths:
        image: Any = nib.load(path)
        assert not shows_face(nib.as_closest_canonical(image).get_fdata(), [side] * 3), path


def test_page_and_terminal_warn_of_faces_by_name(tmp_path: Path) -> None:
    source = cohorts.bids(
        tmp_path / "b", [head(4.0) + i for i in range(2)] + [head(4.0, stripped=True)], np.diag([4, 4, 4, 1])
    )
    ingest(source, tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr")
    found, said = written(store, tmp_path / "page.html", montage=True)
    warning = (
        "2 of the 3 scans shown do not look skull-stripped or defaced (sub-00, sub-01): people can be recognised by "
        "their faces. Do not share this page, nor the store"
    )
    assert said == [f"warning: {warning}"]
    assert warning in found.words
    assert ("p", {"class": "warning", "role": "alert"}) in found.tags
    found, said = written(store, tmp_path / "plain.html")
    assert said == []
    assert "warning" not in found.words.replace(".warning", "")
