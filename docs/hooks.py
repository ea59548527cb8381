"""What the site needs beyond Markdown: formulas as MathML, and those files of the repository that pages link to.

mkdocs calls `on_config` and `on_files` once and `on_page_markdown` for each page (mkdocs.yml, `hooks`).
"""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")
"""To a file outside of docs/: [text](../path)."""
MATH = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COPIED = "repository"


def on_config(config: Any) -> Any:
    """Pages that mkdocs.yml gives no place come last, so that none is lost."""
    placed = re.findall(r"[\w-]+\.md", str(config["nav"]))
    if rest := sorted({page.name for page in Path(config["docs_dir"]).glob("*.md")} - set(placed)):
        config["nav"].append({"More": rest})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add each linked file of the repository to the site, as it is."""
    docs = Path(config["docs_dir"])
    linked = {found[2] for page in docs.glob("*.md") for found in LINK.finditer(page.read_text(encoding="utf-8"))}
    for path in sorted(linked):
        source = docs.parent / path
        if source.is_file():
            files.append(File.generated(config, _place(path), abs_src_path=str(source)))
        elif not source.is_dir():
            raise FileNotFoundError(f"docs link to {path}, which is no file of the repository")
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Links to copied files, and ```math fences (which GitHub shows too) as MathML, for which no script is needed."""
    markdown = LINK.sub(lambda found: _link(found, Path(config["docs_dir"]).parent), markdown)
    return MATH.sub(lambda found: _formula(found[1]), markdown)


def _place(path: str) -> str:
    return f"{COPIED}/{path}.txt" if path.endswith(".md") else f"{COPIED}/{path}"  # no second page


def _link(found: re.Match[str], root: Path) -> str:
    """A folder has nothing to show on a site: its name alone."""
    text, path = found[1], found[2]
    return f"`{path}`" if (root / path).is_dir() else f"[{text}]({_place(path)})"


def _formula(latex: str) -> str:
    return f"<p>{convert(' '.join(latex.split()), display='block')}</p>"
