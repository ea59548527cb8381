"""What the docs show as Python runs, and the tutorials do, line by line, what they say."""

import contextlib
import io
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cauc_dist.cli import main
from tests.test_docs import FENCE, ROOT, commands

Names = dict[str, Any]
ELSEWHERE = {"api-python.md": "tests/test_api.py", "bench.md": "tests/test_bench_scale.py"}
"""Pages whose blocks another test runs; of bench.md its functions, since they measure for most of a minute."""


def blocks(page: str, kind: str = "python") -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8") if page != "README.md" else (ROOT / page).read_text()
    return [lines for found, lines in FENCE.findall(text) if found == kind]


def run(lines: str, names: Names) -> None:
    exec(compile(lines, "docs", "exec"), names)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Path) -> Path:
    """An empty folder to work in, with a small store under the names that pages give it."""
    monkeypatch.chdir(tmp_path)
    for name in ("stores/mine.zarr", "stores/train.zarr", "stores/test.zarr"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(store)
    return tmp_path


# ---- blocks of Python ---------------------------------------------------------------------------------------------


def batch(_: Path) -> Names:
    """Embeddings and metadata of a batch, by the names that pages use."""
    torch.manual_seed(0)
    y = torch.stack([20 + 60 * torch.rand(12), torch.randint(0, 2, (12,)).float()], dim=1)
    z = normalize(torch.randn(2, 12, 8), dim=-1).requires_grad_()
    return {"z": z, "z_own": z, "y": y, "y_all": y, "y_train": y, "n": 12}


def one_column(_: Path) -> Names:
    names = batch(_)
    return {**names, "y": names["y"][:, :1], "y_train": names["y"][:, :1]}


def scans(folder: Path) -> Names:
    from cauc_dist import Store

    store = Store.open(str(folder / "stores/mine.zarr"))
    rows = np.arange(2)
    x = torch.stack([torch.from_numpy(store.volume(int(i))).float() for i in rows])
    return {"store": store, "rows": rows, "x": x}


def people(_: Path) -> Names:
    """What the first block of probes.md scores: x (n, 6) to fit and to test, with age, sex, site and a confound."""
    from cauc_dist import scores

    draw = np.random.default_rng(0)

    def made(n: int) -> tuple[Any, ...]:
        age, sex, site = draw.uniform(20, 80, n), np.arange(n) % 2.0, np.arange(n) % 3.0
        x = np.stack([age / 20, sex, site, *draw.normal(size=(3, n))], axis=1) + 0.1 * draw.normal(size=(n, 6))
        return x, age, sex, site

    (x, age, sex, site), (x_test, age_test, sex_test, _) = made(60), made(45)
    names = {"x": x, "age": age, "site": site, "sites": site, "x_test": x_test, "age_test": age_test}
    names |= {"tiv": age[:, None], "tiv_test": age_test[:, None], "p_sex": scores.logistic(x, sex, x_test, sex_test)}
    (x_in, _, _, site_in), (x_out, age_out, _, _) = made(30), made(30)
    return names | {"x_internal": x_in, "site_internal": site_in, "x_external": x_out, "age_external": age_out}


def nothing(_: Path) -> Names:
    return {}


ALONE: dict[str, Callable[[Path], Names]] = {
    "README.md": batch,
    "losses.md": batch,
    "running.md": one_column,
    "augment.md": scans,
    "choosing.md": nothing,
    "extending.md": nothing,
}
"""Pages whose blocks run in order, after these names are there."""


@pytest.mark.parametrize("page", ALONE)
def test_the_python_of_a_page_runs(page: str, here: Path) -> None:
    from cauc_dist.world import World

    names = ALONE[page](here)
    with World().process_group(torch.device("cpu"), 1.0):  # AllGather asks for one, of one process too
        for lines in blocks(page):
            run(lines, names)


def test_every_page_with_python_is_run_by_a_test() -> None:
    with_python = {path.name for path in (ROOT / "docs").glob("*.md") if blocks(path.name)}
    told = {*ALONE, *ELSEWHERE, "quickstart.md", "tutorial-bids.md", "training.md", "probes.md"}
    assert with_python <= told


def test_the_scores_of_the_page_on_probes_are_computed() -> None:
    names = people(Path())
    run(blocks("probes.md")[0], names)
    assert names["p"].truth.shape == (45,)


def test_the_estimator_of_the_page_on_probes_trains(here: Path) -> None:
    from cauc_dist.phantoms import write_cohort
    from cauc_dist.store.ingest import ingest

    write_cohort(here / "more", n=32, size=16, seed=1)
    (here / "stores/train.zarr").unlink()
    ingest(here / "more", here / "stores/train.zarr")
    names: Names = {}
    run(blocks("probes.md")[2], names)
    assert names["h"].shape[0] == 24


def test_what_one_brings_oneself_takes_less_than_thirty_lines() -> None:
    assert max(lines.count("\n") for lines in blocks("extending.md")) < 30


def test_the_kernel_and_loss_of_the_page_are_what_their_formulas_say(here: Path) -> None:
    names: Names = {}
    for lines in blocks("extending.md"):
        run(lines, names)
    ages, z = names["ages"].double(), normalize(names["z"].detach().double(), dim=-1)
    w = np.exp(-np.abs(ages.numpy() - ages.numpy().T) / 5)
    np.testing.assert_allclose(names["w"].numpy(), w, rtol=1e-5)
    found = names["losses"].conditional_uniformity(z, ages, names["laplacian"]).item()
    c, far = 1 - w, [((v[:, None] - v[None]) ** 2).sum(-1) for v in z.numpy()]
    assert found == pytest.approx(np.mean([np.log((c * np.exp(-2 * d)).sum() / c.sum()) for d in far]), rel=1e-9)


# ---- tutorials ----------------------------------------------------------------------------------------------------


def follow(page: str, names: Names, *, without: tuple[str, ...] = ()) -> list[str]:
    """Do what the page says, in order, in this folder; the commands."""
    done = []
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for kind, lines in FENCE.findall(text):
        if kind == "python":
            run(lines, names)
        for command in commands(f"```{kind}\n{lines}```"):
            if command.startswith(without or ("\n",)):
                continue
            words = command.split()
            assert words[0] == "cauc"
            assert main(words[1:]) == 0, command
            done.append(command)
    return done


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> tuple[Path, list[str], str]:
    """tutorial-bids.md, followed on the small cohort: its folder, the commands, what was printed."""
    folder, out = tmp_path_factory.mktemp("tutorial"), io.StringIO()
    (folder / "ixi50").symlink_to(cohort)
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        done = follow("tutorial-bids.md", {})
    return folder, done, out.getvalue()


def test_the_tutorial_on_a_bids_folder_does_what_it_says(tutorial: tuple[Path, list[str], str]) -> None:
    folder, done, out = tutorial
    assert len(done) == 10
    assert re.search(r"\(24, \d+\) of which 18 were trained on", out)
    assert "the same features: True" in out
    assert (folder / "views.png").stat().st_size > 1000
    assert "<html" in (folder / "ixi50.html").read_text(encoding="utf-8")


def test_names_of_subjects_are_where_the_page_on_privacy_says_and_nowhere_else(
    tutorial: tuple[Path, list[str], str], cohort: Path
) -> None:
    ids = {path.name.encode() for path in cohort.glob("sub-*")}
    assert len(ids) == 24

    def naming(place: str) -> set[str]:
        root = tutorial[0] / place
        files = [path for path in root.rglob("*") if path.is_file()] if root.is_dir() else [root]
        assert files
        return {path.name for path in files if any(name in path.read_bytes() for name in ids)}

    assert "participants.tsv" in naming("stores/ixi50.zarr")
    assert naming("runs/ixi50") == naming("encoders/ixi50") == naming("ixi50.html") == set()
    assert "embeddings.tsv" in naming("features/ixi50")


def test_the_embeddings_of_the_page_on_probes_are_read(
    tutorial: tuple[Path, list[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings/mine").symlink_to(tutorial[0] / "features/ixi50")
    names: Names = {"Path": Path}
    run(blocks("probes.md")[1], names)
    assert names["x"].shape[0] == 18


def test_the_quick_start_does_what_it_says(here: Path, cohort: Path) -> None:
    """But for `cauc demo`, which tests/test_demo.py runs."""
    shutil.copytree(cohort, here / "demo" / "first" / "cohort")
    names: Names = {}
    done = follow("quickstart.md", names, without=("cauc demo",))
    assert "cauc export runs/first encoders/first" in done
    assert names["h"].shape == (1, names["encoder"].width)
    assert names["h"].isfinite().all()
    (here / "exported").symlink_to(here / "encoders" / "first")
    more = {"scans": names["scans"]}
    for lines in blocks("training.md"):  # the same encoder, as that page says it
        run(lines, more)
    assert torch.equal(more["h"], names["h"])


# ---- pictures -----------------------------------------------------------------------------------------------------


def test_figures_without_a_training_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    make = runpy.run_path(str(ROOT / "docs" / "pictures" / "make.py"))
    for name in ("kernel", "circle", "repulsion"):
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").is_file()
        for copy in ("a", "b"):
            with plt.rc_context(make["STYLE"]):
                figure, axes = plt.subplots(layout="constrained")
                make[name](axes)
                make["save"](figure, tmp_path / f"{copy}.svg")
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
