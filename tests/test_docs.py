"""The site builds without a warning, its links lead somewhere, its commands are commands, its messages are said."""

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import tyro

from cauc_dist import recipes
from cauc_dist.cli import completion, runs, words
from launch import cli as launch
from launch.site import Resources

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


# ---- the site -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "WARNING" not in told
    return out


class Page(HTMLParser):
    """What a page links to, fetches, and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.anchors: set[str] = set()
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links |= {given["href"]} if tag in ("a", "link") and "href" in given else set()
        self.fetched |= {given["src"]} if "src" in given else set()
        if tag == "link" and given.get("rel") != "canonical" and "href" in given:
            self.fetched.add(given["href"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def is_remote(link: str) -> bool:
    return re.match(r"[a-z]+:|//", link) is not None


def test_every_link_and_anchor_of_the_site_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of a server's root
            continue
        for link in sorted(page.links | page.fetched):
            if is_remote(link):
                continue
            where, anchor = urldefrag(link)
            target = (path.parent / unquote(where)).resolve() if where else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file() or (anchor and target in pages and unquote(anchor) not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken
    assert len(pages) > 20


def test_a_page_fetches_nothing_from_the_network(site: Path, pages: dict[Path, Page]) -> None:
    assert {link for page in pages.values() for link in page.fetched if is_remote(link)} == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*|@import[^;]*", styles) == []


def test_formulas_are_mathml_in_the_page(site: Path) -> None:
    text = (site / "mathematics.html").read_text(encoding="utf-8")
    assert text.count("<math ") == (ROOT / "docs" / "mathematics.md").read_text().count("```math") == 4
    assert "<mfrac>" in text


def test_the_reference_has_the_docstrings_and_types_of_what_is_public(pages: dict[Path, Page]) -> None:
    import cauc_dist
    from cauc_dist import kernels, losses

    page = next(page for path, page in pages.items() if path.name == "api.html")
    named = {anchor.rpartition(".")[2] for anchor in page.anchors}
    assert set(losses.__all__) <= named
    assert {name for name in cauc_dist.__all__ if name[0].isupper()} <= named
    assert {"gaussian", "cauchy", "delta", "product", "mean", "load_encoder"} <= named
    assert (kernels.delta.__doc__ or "").split(":")[0] in page.text


# ---- commands -----------------------------------------------------------------------------------------------------

KINDS = completion.KINDS
TEMPLATE = re.compile(r"\.\.\.|…|\b[A-Z]{3,}\b")
"""A line with a place to fill in (RUN, STORE ...) is no command yet."""


def commands(text: str) -> Iterator[str]:
    """Each command of cauc or launch in the fences of a page that are to be typed."""
    for kind, lines in FENCE.findall(text):
        if kind not in ("", "bash", "sh", "console"):
            continue
        for line in re.sub(r"\\\n\s*", "", lines).splitlines():
            line = re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
            for part in re.split(r"\s(?:&&|\|)\s|\s2?>\s", line):
                if re.match(r"cauc |python -m launch ", part) and not TEMPLATE.search(part.replace("$SLURM_", "")):
                    yield part


def parse(command: str) -> None:
    """Read the command as the program does, up to where its work would begin; SystemExit or BadInput if it cannot."""
    given = shlex.split(command)
    if given[0] == "python":
        parse_launch(given[3], given[4:])
        return
    _, name, *rest = (word for word in given if word not in ("--json", "--quiet", "--debug"))
    if name in ("store", "bench"):
        name, *rest = (f"{name} {rest[0]}", *rest[1:])
    if name in ("--version", "--help"):
        assert not rest
    elif name == "completion":
        assert completion.completion(rest) == 0
    elif name == "train":
        recipe = recipes.get("demo_cauc" if rest[0].endswith(".json") else rest[0])
        words.parse(runs.Train, "train", rest[1:], runs.Train(recipe))
    elif name in ("bench loss", "bench step", "bench scale"):
        words.parse(KINDS[name], name, rest[1:], KINDS[name](config=recipes.get(rest[0])))
    else:
        words.parse(KINDS[name], name, rest)


def parse_launch(name: str, rest: list[str]) -> None:
    asked = Resources()
    if name == "submit":
        launch._parse(launch.Submit, name, rest[1:], launch.Submit(recipes.get(rest[0]), asked))
    elif name == "sweep" and rest[0] == "--rerun":
        launch._parse(launch.Rerun, name, rest, launch.Rerun(rerun=Path(rest[1]), resources=asked))
    elif name == "sweep":
        launch._parse(launch.Sweep, name, rest[1:], launch.Sweep(config=recipes.get(rest[0]), resources=asked))
    elif name == "ingest":
        default = launch.Ingest(source=tyro.MISSING, store=tyro.MISSING, resources=asked)
        launch._parse(launch.Ingest, name, rest, default)
    elif name == "reproduce":
        launch._parse(launch.Reproduce, name, rest, launch.Reproduce(study=tyro.MISSING, resources=asked))
    elif name == "resume":
        launch._parse(launch.Resume, name, rest, launch.Resume(Path(rest[0]), asked))
    else:
        launch._parse({"status": launch.Status, "logs": launch.Logs, "cancel": launch.Cancel}[name], name, rest)


def said() -> dict[str, list[str]]:
    """Each different command -> the pages that it is on."""
    found = defaultdict(list)
    for page in PAGES:
        for command in commands(page.read_text(encoding="utf-8")):
            found[command].append(page.name)
    return found


@pytest.mark.parametrize("command", sorted(said()))
def test_a_command_of_the_docs_is_one(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        parse(command)
    except SystemExit:
        pytest.fail(f"on {said()[command]}: {capfd.readouterr().err or capfd.readouterr().out}")


def test_commands_are_found_on_the_pages_and_a_wrong_option_is_seen() -> None:
    assert len(said()) > 50
    with pytest.raises(SystemExit):
        parse("cauc ingest bids store.zarr --no-such-option")


# ---- what the pages say of the code -------------------------------------------------------------------------------


def source() -> str:
    """The library's text, as one line: strings that are broken over lines are joined."""
    files = [*(ROOT / "cauc_dist").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_message_that_the_faq_quotes_is_in_the_code() -> None:
    text, known, missing = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), source(), []
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    for message in quoted:
        pieces = [re.escape(piece) for piece in message.split("…") if piece]
        if not re.search(r"\{[^{}\n]*\}".join(pieces), known):
            missing.append(message)
    assert len(quoted) > 20
    assert not missing


def test_readme_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if not is_remote(link)]
    assert len(local) > 8
    assert [link for link in local if not (ROOT / link).exists()] == []
