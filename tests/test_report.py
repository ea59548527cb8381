"""The page is one file that needs no other, shows what was run, and names no subject unless asked to."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cauc_dist import config, recipes
from cauc_dist.errors import BadInput
from cauc_dist.journal import Journal
from cauc_dist.provenance import without_secrets
from cauc_dist.report import report
from cauc_dist.report.curves import curves, planes
from cauc_dist.report.hidden import Hidden
from cauc_dist.report.incidents import incidents
from cauc_dist.report.probes import scores

FACTS = {
    "ranks": 2, "device": "cpu", "batch_size": 8, "scans": 30, "held_out": 10,
    "steps_per_epoch": 3, "epochs": 1, "parameters": 123456, "zero_stage": 1,
}  # fmt: skip
VOID = {"meta", "img", "br", "link"}


class Tags(HTMLParser):
    """Every opened tag, and whether each is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def a_run(folder: Path, steps: int = 3, name: str = "<b>bold</b>") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"name": name}))
    with Journal(folder) as journal:
        journal.write("start", **FACTS)
        for step in range(steps):
            journal.write("step", step=step, loss=1.0 / (step + 1), uniformity=-1.0, lr=1e-3, samples_per_s=9.0)
    return folder


def page_of(runs: list[Path], out: Path, **options: Any) -> str:
    report(runs, out, maps=False, **options)
    return out.read_text()


def data_of(text: str) -> dict[str, Any]:
    """The page's JSON block."""
    block = re.search(r"<script type=application/json id=data>(.*?)</script>", text, re.S)
    assert block is not None
    found: dict[str, Any] = json.loads(block[1])
    return found


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    text = page_of([a_run(tmp_path / "a"), a_run(tmp_path / "b")], tmp_path / "page.html")
    tags = Tags(text)
    assert tags.open == []
    assert not [attrs for tag, attrs in tags.found if "src" in attrs]
    links = [str(attrs["href"]) for tag, attrs in tags.found if "href" in attrs]
    assert all(link.startswith("#") or link == "data:," for link in links)
    policy = next(attrs["content"] for tag, attrs in tags.found if attrs.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert [c["name"] for c in data_of(text)["curves"]] == ["loss", "uniformity", "lr", "samples_per_s"]


def test_text_of_a_run_is_escaped_in_tables_and_in_the_json(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><!--"
    text = page_of([a_run(tmp_path / "<img src=x onerror=alert(1)>", name=hostile)], tmp_path / "page.html")
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "<img" not in text
    assert "<!--" not in text
    assert "&lt;/script&gt;&lt;script&gt;" in text
    assert data_of(text)["runs"] == ["<img src=x onerror=alert(1)>"]


def test_what_was_run_is_told_with_its_differences_to_the_recipe_and_between_runs(tmp_path: Path) -> None:
    runs = []
    for name, epochs in (("one", 7), ("two", 9)):
        run = a_run(tmp_path / name)
        told = json.loads(config.to_json(recipes.get("demo_cauc")))
        (run / "config.json").write_text(json.dumps({**told, "epochs": epochs}))
        git = {"git": {"commit": "0123456789abcdef", "dirty": True}, "fingerprint": "f" * 64, "store": "/x/heads.zarr"}
        (run / "provenance.json").write_text(json.dumps({**git, "versions": {"torch": "9.9"}}))
        runs.append(run)
    text = page_of(runs, tmp_path / "page.html")
    for told in ("0123456789ab, with changes that were not committed", "heads.zarr", "f" * 16, "torch 9.9", "123,456"):
        assert text.count(f"<td>{told}</td>") == 2
    recipe = recipes.get("demo_cauc").epochs
    assert "<th scope=row>epochs</th><td>7</td><td>9</td>" in text
    assert f"<th scope=row>epochs</th><td>{recipe}</td><td>7</td>" in text
    assert f"<th scope=row>epochs</th><td>{recipe}</td><td>9</td>" in text


def test_without_a_script_the_numbers_of_the_last_step_are_a_table(tmp_path: Path) -> None:
    text = page_of([a_run(tmp_path / "a", steps=4)], tmp_path / "page.html")
    assert "<th scope=row>loss (its own scale for each objective)</th><td>0.25</td>" in text
    assert text.count("<noscript>") == 5


def test_the_probe_table_of_a_run_is_shown(tmp_path: Path) -> None:
    from tests.test_probe import table

    run = a_run(tmp_path / "a")
    (run / "probe.json").write_text(table(ours=[1.0, 2.5]).to_json())
    text = page_of([run], tmp_path / "page.html")
    assert "1.75 [0, 1]" in text
    assert "30 scans to fit the probes, 4 held out" in text


def test_few_labels_and_geometry_are_shown_where_the_table_has_them(tmp_path: Path) -> None:
    from tests.test_probe import table

    run = a_run(tmp_path / "a")
    found = json.loads(table(ours=[1.0, 2.5]).to_json())
    column = found["columns"][0]
    found["few"] = {"ours": {column: {"100": [5.25, 0.5]}}}
    found["geometry"] = {"ours": {"held-out": {"alignment": 0.125, "effective_rank": 17.5}}}
    (run / "probe.json").write_text(json.dumps(found))
    text = page_of([run], tmp_path / "page.html")
    assert "<th scope=row>ours</th><td>5.25 ± 0.5</td>" in text
    assert "<th scope=row>ours, held-out</th><td>0.125</td><td>17.5</td>" in text


# ---- what is refused, what is told ----------------------------------------------------------------------------------


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no step in .*journal.jsonl; wanted a run that was trained"):
        page_of([a_run(tmp_path / "a", steps=0)], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no table .*t.json; wanted a file that `cauc probe --out` wrote"):
        page_of([a_run(tmp_path / "a")], tmp_path / "page.html", table=tmp_path / "t.json")


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("not a table")
    with pytest.raises(BadInput, match=r"t.json is no table"):
        page_of([a_run(tmp_path / "a")], tmp_path / "page.html", table=tmp_path / "t.json")
    assert not (tmp_path / "page.html").exists()


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed1").mkdir()
    runs = [a_run(tmp_path / "seed0" / "r"), a_run(tmp_path / "seed1" / "r")]
    assert data_of(page_of(runs, tmp_path / "page.html"))["runs"] == [str(run) for run in runs]


def test_a_run_at_work_with_a_torn_last_line_and_no_checkpoint_has_a_page_that_says_why(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    with (run / "journal.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 3, "lo')
    report([run], tmp_path / "page.html")
    found = data_of((tmp_path / "page.html").read_text())
    assert [point[0] for point in found["curves"][0]["lines"][0]] == [0, 1, 2]
    assert "store.zarr" in found["maps"][0]["why"]


# ---- numbers --------------------------------------------------------------------------------------------------------


def steps(values: list[float]) -> list[dict[str, Any]]:
    return [{"event": "step", "time": 1.0, "step": k, "loss": v} for k, v in enumerate(values)]


def test_a_long_run_is_thinned_and_keeps_its_spikes_and_both_ends() -> None:
    values = [float(k % 7) for k in range(50_000)]
    values[31_234], values[777] = 1e6, -5.0
    (line,) = curves([steps(values)])[0]["lines"]
    assert len(line) <= 1202
    assert [31_234, 1e6] in line
    assert [777, -5.0] in line
    assert (line[0], line[-1]) == ([0, 0.0], [49_999, float(49_999 % 7)])


def test_a_number_that_only_one_run_has_is_drawn_for_it_alone() -> None:
    events = [
        steps([1.0]),
        [{"event": "step", "step": 0, "loss": None, "novel_term": 3, "data_wait_s": 1, "step_s": 4}],
    ]
    found = {c["name"]: c["lines"] for c in curves(events)}
    assert found["loss"] == [[[0, 1.0]], []]
    assert found["novel_term"] == [[], [[0, 3.0]]]
    assert found["data_wait_share"] == [[], [[0, 0.25]]]


def test_the_path_in_the_plane_is_of_means_and_ends_at_the_last_step() -> None:
    events = [{"event": "step", "step": k, "uniformity": -float(k), "alignment": 2.0 * k} for k in range(120)]
    (plane,) = planes([events])
    (path,) = plane["lines"]
    assert len(path) == 60
    assert path[0] == [-0.5, 1.0, 1]
    assert path[-1] == [-118.5, 237.0, 119]


def test_incidents_tell_restarts_and_faults_and_hide_scans() -> None:
    hidden = Hidden()
    told = incidents(
        [
            {"event": "start", "time": 0.0, "step": 0, "ranks": 1, "device": "cpu"},
            {"event": "stopped", "time": 10.0, "step": 5, "signal": 12},
            {"event": "resume", "time": 100.0, "step": 5, "ranks": 2},
            {"event": "skip", "time": 101.0, "step": 6, "scans": ["sub-7"], "skipped": 1},
            {"event": "non_finite", "time": 102.0, "step": 7, "message": "embeddings of sub-9", "left_out": 1},
            {"event": "slow_data", "time": 103.0, "step": 20, "rank": 1, "share": 0.25},
            {"event": "resume", "time": 163.0, "step": 10, "ranks": 1},
            {"event": "invented", "time": 164.0, "scans": ["sub-7"], "count": 3, "who": "sub-7"},
        ],
        hidden,
    )
    words = [each["words"] for each in told]
    assert words[0] == "1 rank, cpu"
    assert words[1] == "asked to by SIGUSR2; checkpoint written"
    assert words[2] == "went on from step 5 on 2 ranks, after it was stopped 90 s later"
    assert words[3] == f"damaged, left out: {hidden('sub-7')} (1 so far)"
    assert words[5] == "rank 1 waits for scans 25 % of a step"
    assert words[6].startswith("went on from step 10 on 1 rank, after it broke off without a word")
    assert words[7] == "count 3"
    assert not re.search("sub-[79]", json.dumps(told))
    assert [each["step"] for each in told] == [0, 5, 5, 6, 7, 20, 10, 10]


# ---- who is who -----------------------------------------------------------------------------------------------------


def test_a_hash_is_the_same_within_a_page_and_another_on_the_next() -> None:
    one, two = Hidden(), Hidden()
    assert one("sub-01") == one("sub-01") != two("sub-01")
    assert re.fullmatch("[0-9a-f]{12}", one("sub-01"))
    assert Hidden(show_ids=True)("sub-01") == "sub-01"


def test_ids_are_found_as_words_in_paths_and_json_and_numbers_of_settings_stay() -> None:
    hidden = Hidden()
    hidden.knows("store", ["sub-01", "1234567", "64", "an odd/id"])
    text = 'at /data/sub-01.zarr, "1234567", batch 64, sub-011, an odd/id.'
    a, b, c = map(hidden, ("sub-01", "1234567", "an odd/id"))
    assert hidden.scrub(text) == f'at /data/{a}.zarr, "{b}", batch 64, sub-011, {c}.'


@pytest.mark.parametrize(
    "text",
    [
        "runs/sub-X0017_pilot",
        "/d/sub-X0017_ses-1_T1w.nii.gz",
        "without-sub-X0017",
        "sub-X0017.",
        "a name: M\u00fcller-7!",
        "sub-X0017_sub-X0017",
    ],
)
def test_an_id_is_hidden_where_it_is_a_part_of_a_name(text: str) -> None:
    hidden = Hidden()
    hidden.knows("store", ["sub-X0017", "M\u00fcller-7"])
    found = hidden.scrub(text)
    assert "X0017" not in found
    assert "ller" not in found


def test_what_is_no_id_stays() -> None:
    hidden = Hidden()
    hidden.knows("store", ["sub-X0017", "12"])
    for text in ("sub-X00170", "runs/sub_X0017", "optim.lr 0.12", "12"):
        assert hidden.scrub(text) == text


def test_urls_lose_what_opens_a_store(tmp_path: Path) -> None:
    url = "https://user:SECRET@host/mine.zarr?X-Signature=SIGNED#x"
    for show in (False, True):
        assert Hidden(show_ids=show).scrub(f'"{url}", run') == '"https://host/mine.zarr", run'
    assert without_secrets("s3://bucket/a/b.zarr and /a/b") == "s3://bucket/a/b.zarr and /a/b"


def test_a_table_names_no_run_by_an_id(tmp_path: Path) -> None:
    hidden = Hidden()
    hidden.knows("store", ["sub-X0017"])
    score = {"metric": "MAE", "value": 1.0, "low": 0.5, "high": 2.0, "detail": {}}
    table = {"columns": ["age"], "chance": {"age": 3.0}, "n_train": 9, "n_test": 3}
    (tmp_path / "t.json").write_text(json.dumps({**table, "scores": {"sub-X0017": {"age": score}}}))
    assert "X0017" not in scores(tmp_path / "t.json", hidden.scrub)
    assert "sub-X0017" in scores(tmp_path / "t.json")
