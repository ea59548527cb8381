"""Two real runs of a hostile store in a real browser: all is drawn, and nothing of theirs runs."""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cauc_dist import recipes, spawn
from cauc_dist.config import Encoder, Projector
from cauc_dist.journal import Journal
from cauc_dist.prepare import load, prepare
from cauc_dist.report import report
from cauc_dist.report.hidden import Hidden
from cauc_dist.report.maps import maps, weights
from cauc_dist.report.serve import opened
from cauc_dist.store.ingest import from_arrays
from cauc_dist.store.layout import Column
from cauc_dist.store.reader import Store
from tests import browser
from tests.test_report import data_of

HOSTILE = "</script><img src=x onerror=\"parent.document.title='taken'\">"
POINT = (
    "const point = (svg, dot) => { const b = dot.getBoundingClientRect(), over = {clientX: b.x + b.width / 2,"
    " clientY: b.y + b.height / 2}; svg.dispatchEvent(new view.PointerEvent('pointermove', over)); };"
)
N = 24
IDS = [f"sub-{i:02d}{HOSTILE if i % 2 else ''}" for i in range(N)]
BMI = [float("nan") if i % 5 == 0 else 20 + i / 7 for i in range(N)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One with a kernel and one without; in the journal of the first a restart, a skipped scan and a slow rank."""
    folder = tmp_path_factory.mktemp("runs")
    columns = [Column("age", "number", ()), Column("bmi", "number", ()), Column("site", "category", (HOSTILE, "b"))]
    metadata = [np.arange(20.0, 20 + N), np.array(BMI), np.array([0.0, 1.0] * (N // 2))]
    volumes = [np.random.default_rng(i).normal(100 + i, 20, (1, 16, 16, 16)).astype(np.float32) for i in range(N)]
    from_arrays(folder / "s.zarr", volumes, IDS, shape=(1, 16, 16, 16), columns=columns, metadata=metadata)
    made = []
    for recipe, name in (("demo_cauc", "<img src=x onerror=alert(1)>"), ("demo_simclr", "plain")):
        run = dataclasses.replace(recipes.get(recipe), run=folder / name, epochs=2, batch_size=6)
        data = dataclasses.replace(run.data, store=str(folder / "s.zarr"))
        run = dataclasses.replace(run, data=data, encoder=Encoder(width=2), projector=Projector(8, 4))
        made.append(prepare(run, 1))
        assert spawn.start(1, str(made[-1])) == 0
    with Journal(made[0]) as journal:
        journal.write("skip", step=3, scans=IDS[:2], skipped=2)
        journal.write("straggler", step=4, rank=1, encode_s=3.0, others_s=1.0)
        journal.write("non_finite", step=4, message=f"embeddings of {IDS[1]}, {IDS[2]} are not finite", left_out=1)
    return made


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    said: list[str] = []
    report(runs, runs[0].parent / "page.html", say=said.append)
    assert sum(line.startswith("report: embedding 24 scans with") for line in said) == 2
    return runs[0].parent / "page.html"


def test_a_browser_draws_every_chart_and_its_console_stays_silent(page: Path, runs: list[Path]) -> None:
    seen = browser.ask(
        page,
        "return [[...page.querySelectorAll('#curves svg')].map(s => [s.querySelectorAll('polyline').length,"
        " s.querySelectorAll('circle').length, s.querySelectorAll('text').length > 6]), page.images.length,"
        " page.querySelectorAll('#plane svg .end').length, page.querySelectorAll('#curves svg .sign').length,"
        " page.querySelectorAll('#curves .legend button').length, page.querySelectorAll('noscript').length]",
    )
    charts, images, ends, signs, named, _ = seen.value
    assert seen.complaints == []
    assert images == 0
    assert len(charts) == len(data_of(page.read_text())["curves"]) >= 9
    steps = len((runs[0] / "journal.jsonl").read_text().split('"event": "step"')) - 1
    assert charts[0] == [2, 2 * steps, True]
    assert ends == 4  # two runs, in the plane and in the conditional one
    assert signs == 3 * len(charts)
    assert named == 2


def test_the_console_of_a_page_that_breaks_its_own_policy_is_heard(tmp_path: Path) -> None:
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; script-src 'unsafe-inline'\">"
    (tmp_path / "bad.html").write_text(policy + "<img src='http://127.0.0.1:9/x.png'><script>nothing.at.all</script>")
    heard = browser.ask(tmp_path / "bad.html", "return 1").complaints
    assert any("Content Security Policy" in line for line in heard)
    assert any("nothing is not defined" in line for line in heard)


def test_the_pointer_over_a_curve_shows_both_runs_values_at_that_step(page: Path) -> None:
    seen = browser.ask(
        page,
        "const svg = page.querySelector('#curves svg'), dot = svg.querySelectorAll('circle')[2];"
        f"svg.scrollIntoView(); const tip = page.getElementById('tip'); {POINT} point(svg, dot);"
        "const shown = tip.hidden ? '' : tip.textContent, right = tip.getBoundingClientRect().right;"
        "svg.dispatchEvent(new view.PointerEvent('pointerleave'));"
        "return [shown, right <= view.innerWidth, tip.hidden]",
    )
    told, inside, gone = seen.value
    loss = data_of(page.read_text())["curves"][0]["lines"]
    lines = told.split("\n")
    assert lines[0] == "step 2"
    assert lines[1].startswith("<img src=x onerror=alert(1)>: ")
    assert [float(line.rsplit(": ", 1)[1]) for line in lines[1:3]] == pytest.approx([of[2][1] for of in loss], rel=1e-3)
    assert inside
    assert gone


def test_a_run_can_be_taken_off_the_charts(page: Path) -> None:
    script = "page.querySelectorAll('#curves .legend button')[1].click();"
    script += "return page.querySelectorAll('#curves svg')[0].querySelectorAll('polyline').length"
    assert browser.ask(page, script).value == 1


def test_the_map_is_recoloured_by_the_chosen_column_and_tells_hash_and_values(page: Path) -> None:
    seen = browser.ask(
        page,
        "const dots = () => [...page.querySelectorAll('#map svg.chart')].map(s => [...s.querySelectorAll('.dot')]);"
        "const fills = () => dots()[0].map(d => d.style.fill), out = [dots().map(d => d.length), fills()];"
        "for (const k of [1, 2]) { const s = page.querySelectorAll('#map select')[1]; s.value = k;"
        "  s.dispatchEvent(new view.Event('change')); out.push(fills()); }"
        f"{POINT} const dot = dots()[0][5]; point(dot.ownerSVGElement, dot);"
        "return [...out, page.getElementById('tip').textContent,"
        " page.querySelectorAll('#map .held').length, page.querySelector('#map .legend.scale') === null]",
    )
    counts, age, bmi, site, told, ringed, no_scale = seen.value
    assert seen.complaints == []
    assert counts == [N, N]
    assert len(set(age)) > 20
    assert [fill == "var(--missing)" for fill in bmi] == [np.isnan(v) for v in BMI]
    assert set(site) == {"var(--c0)", "var(--c1)"}
    assert re.match(r"subject [0-9a-f]{12} \((training|held out)\)\nage: \d+\nbmi: [\w.]+\nsite: ", told)
    assert ringed == 2 * 6
    assert no_scale  # categories have names, no ramp


def test_the_matrix_shows_the_kernel_and_a_run_that_does_not_learn_from_it_says_so(page: Path) -> None:
    seen = browser.ask(
        page,
        "const c = page.querySelector('canvas'), b = c.getBoundingClientRect(), p = c.getContext('2d');"
        "const at = (x, y) => [...p.getImageData(x, y, 1, 1).data].slice(0, 3);"
        "const over = {clientX: b.x + 1, clientY: b.y + b.height / 4};"  # the second row, the first column
        "c.dispatchEvent(new view.PointerEvent('pointermove', over));"
        "const out = [c.width, at(0, 0), at(5, 0), page.getElementById('tip').textContent];"
        "const s = page.querySelectorAll('#map select')[0]; s.value = 1; s.dispatchEvent(new view.Event('change'));"
        "return [...out, page.querySelector('#weights .drawn').textContent]",
    )
    width, same, far, told, other = seen.value
    assert width == 6
    assert same == [253, 231, 37]  # w = 1: the ramp's end
    assert far != same
    kernel = data_of(page.read_text())["maps"][0]["kernel"]
    first, second = kernel["values"][:2]
    said = re.fullmatch(rf"w = ([\d.]+)\nage: {second}, {first}", told)
    assert said is not None
    assert float(said[1]) == pytest.approx(np.exp(-((float(second) - float(first)) ** 2) / (2 * 5.0**2)), abs=1 / 255)
    assert "of the first batch of plain" in other
    assert "This objective does not learn from it" in other


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(page: Path, width: int) -> None:
    seen = browser.ask(
        page,
        "return [view.innerWidth, page.documentElement.scrollWidth,"
        " Math.min(...[...page.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width))]",
        width=width,
    )
    inner, scroll, narrowest = seen.value
    assert inner == width
    assert scroll <= width
    assert narrowest > 250


def test_dark_is_another_page_than_light(page: Path) -> None:
    script = "const of = s => view.getComputedStyle(page.querySelector(s));"
    script += "return [of('body').backgroundColor, of('body').color, of('#curves polyline').stroke]"
    light, dark = (browser.ask(page, script, dark=dark).value for dark in (False, True))
    assert light[0] == "rgb(255, 255, 255)"
    assert all(a != b for a, b in zip(light, dark, strict=True))


def test_without_scripts_tables_are_there_and_a_line_says_what_is_not(page: Path) -> None:
    seen = browser.ask(page, "return [page.body.innerText, page.querySelectorAll('table').length]", runs=False)
    told, tables = seen.value
    assert tables >= 4
    assert told.count("Drawn by a script, which this browser does not run.") == 5
    assert "effective rank" in told


def test_hostile_names_run_nothing(page: Path) -> None:
    script = "for (const s of page.querySelectorAll('#map select')) for (const o of s.options) {"
    script += " s.value = o.value; s.dispatchEvent(new view.Event('change')); }"
    script += "return [page.images.length, parent.document.title, page.querySelectorAll('script').length]"
    seen = browser.ask(page, script)
    assert seen.value == [0, "", 2]
    assert page.read_text().count("</script") == 2


# ---- who is on it ---------------------------------------------------------------------------------------------------


def test_no_id_is_in_the_file_unless_asked_for(page: Path, runs: list[Path]) -> None:
    text = page.read_text()
    assert not re.search(r"sub-\d\d", text)
    assert "damaged, left out: " in text
    report(runs[:1], runs[0].parent / "ids.html", show_ids=True)
    named = (runs[0].parent / "ids.html").read_text()
    assert all(f"sub-{i:02d}" in named for i in range(N))
    assert "This page names subjects by their ids" in named


def test_an_id_in_a_folder_or_a_configuration_is_hidden_without_maps_too(runs: list[Path]) -> None:
    here = runs[1].parent / "sub-02"
    runs[1].rename(here)
    try:
        report([here], here.parent / "named.html", maps=False)
    finally:
        here.rename(runs[1])
    assert "sub-02" not in (here.parent / "named.html").read_text()


# ---- maps -----------------------------------------------------------------------------------------------------------


def test_maps_are_the_same_each_time_and_of_what_they_say(runs: list[Path]) -> None:
    one, two = (maps(runs[0], Hidden(salt=b"s"), lambda line: None) for _ in range(2))
    assert one == two
    assert (one["whole"], len(one["hashes"]), len(one["pca"]), len(one["tsne"])) == (N, N, N, N)
    assert [c["name"] for c in one["columns"]] == ["age", "bmi", "site"]
    assert one["columns"][0]["values"] == [float(20 + i) for i in range(N)]
    assert one["hashes"] == [Hidden(salt=b"s")(str(s)) for s in Store.open(runs[0].parent / "s.zarr").subjects]


def test_an_objective_without_a_kernel_has_no_matrix_and_says_so(runs: list[Path]) -> None:
    run = load(runs[1])
    store = Store.open(run.data.store)
    run = dataclasses.replace(run, objective=dataclasses.replace(run.objective, kernel=()))
    found = weights(run, store, np.arange(18), Hidden())
    assert found == {"why": "The objective simclr weighs by no metadata: it has no kernel."}


def test_a_served_page_gets_its_maps_in_the_background_and_keeps_them(runs: list[Path]) -> None:
    said: list[str] = []
    server, background = opened(runs[1:], "127.0.0.1", 0, said.append)
    assert server.told.gather()["maps"] == [{"why": "Being made: this takes some seconds."}]
    background.start()
    try:
        deadline = time.monotonic() + 90
        while "why" in server.told.gather()["maps"][0] and time.monotonic() < deadline:
            time.sleep(0.2)
        found = server.told.gather()["maps"][0]
    finally:
        background.stop()
        server.server_close()
    assert len(found["pca"]) == N
    assert not re.search(r"sub-\d\d", json.dumps(server.told.gather()))
    assert sum("embedding" in line for line in said) == 1


def test_pairs_of_held_out_subjects_are_all_counted(runs: list[Path]) -> None:
    found = maps(runs[0], Hidden(), lambda line: None)
    held = found["parts"].count("held out")
    pairs: dict[str, Any] = {p["column"]: p for p in found["pairs"]}
    assert held == 6
    assert sum(b["n"] for b in pairs["age"]["bins"]) == held * (held - 1) // 2
    assert [b["x"] for b in pairs["site"]["bins"]] == ["same", "different"]
    assert all(-1 <= b["mean"] <= 1 for p in found["pairs"] for b in p["bins"])
    assert [b["x"] for b in pairs["age"]["bins"]] == sorted(b["x"] for b in pairs["age"]["bins"])


def test_a_store_that_was_moved_leaves_a_page_without_maps_that_says_why(runs: list[Path]) -> None:
    store, away = runs[0].parent / "s.zarr", runs[0].parent / "away.zarr"
    store.rename(away)
    try:
        report(runs[1:], runs[0].parent / "moved.html")
    finally:
        away.rename(store)
    text = (runs[0].parent / "moved.html").read_text()
    assert "s.zarr" in data_of(text)["maps"][0]["why"]
    assert not re.search(r"sub-\d\d", text)
    seen = browser.ask(runs[0].parent / "moved.html", "return page.querySelector('#map').innerText")
    assert "s.zarr" in seen.value
    assert seen.complaints == []
    assert json.dumps(data_of(text)["curves"])
