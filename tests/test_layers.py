"""A module imports only from rows above its own (docs/design.md); the packages of each chapter stay in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "cauc_dist"
LAYERS = [
    ["__init__", "errors", "durable"],
    ["config"],
    [
        "recipes",
        "world",
        "kernels",
        "augment",
        "store.layout",
        "store.files",
        "store.parallel",
        "stream.plan",
        "encoders",
        "journal",
        "provenance",
        "progress",
        "optimisers",
        "watch",
        "scores",
        "stats",
    ],
    [
        "losses",
        "store.chunks",
        "store.sources",
        "store.workplace",
        "report.style",
        "spawn",
        "memory",
        "openbhb",
        "table",
    ],
    ["gather", "store.shards", "store.reader", "trackers"],
    ["store.parts", "store.rows", "store.stage", "stream.values", "study"],
    ["store.planned", "stream.loader", "studies"],
    ["store.job"],
    ["store.ingest"],
    ["store.append", "store.check", "sheet", "objective", "engine", "checkpoint", "model_card", "phantoms", "doctor"],
    ["prepare", "info", "trainer"],
    ["train", "verify"],
    ["geometry", "bench"],
    ["probe"],
    ["embeddings", "report"],
    ["demo", "export", "finetune", "job"],
    ["embed"],
    ["estimator", "reproduce"],
    ["cli"],
    ["__main__"],
]
# Which module alone may import a package, by the first word of the import.
OWNERS = {
    "deepspeed": {"engine"},
    "pytorch_optimizer": {"optimisers"},
    "psutil": {"memory", "world", "doctor"},
    "mpi4py": {"world"},
    "zarr": {"store.rows", "store.chunks", "store.files", "bench"},
    "numcodecs": {"store.shards", "store.chunks", "store.rows", "bench"},
    "obstore": {"store.files"},
    "nibabel": {"store.sources", "phantoms", "bench"},
    "sklearn": {"estimator", "openbhb", "scores", "report"},
    "matplotlib": {"reproduce", "sheet"},
    "tyro": {"cli"},
    "submitit": {"job"},
    "rich": {"progress"},
    "safetensors": {"checkpoint"},
    "wandb": {"trackers"},
    "mlflow": {"trackers"},
    "tensorboard": {"trackers"},
}
NO_TORCH = {
    "study",
    "studies",
    "__init__",
    "errors",
    "config",
    "recipes",
    "stream.plan",
    "store.layout",
    "journal",
    "provenance",
    "progress",
    "report.style",
    "doctor",
    "trackers",
    "watch",
    "spawn",
    "world",
    "scores",
    "stats",
    "openbhb",
    "table",
    "cli",
}


def name_of(path: Path) -> str:
    """`store.reader`, `losses` (a package is one module unless LAYERS names its parts), `cli`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    words = [p for p in parts if p != "__init__"] or ["__init__"]
    known = {m for row in LAYERS for m in row}
    prefixes = (".".join(words[:i]) for i in range(len(words), 0, -1))
    return next((name for name in prefixes if name in known), words[0])


def imports(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(package, dotted rest, whether at module level) of every import in a file, those in functions too."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            package, _, rest = ("" if node.level else node.module or "").partition(".")
            for alias in node.names:
                yield package, ".".join(filter(None, [rest, alias.name])), id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], alias.name.partition(".")[2], id(node) in top


def target(rest: str) -> str:
    """The module of LAYERS that `cauc_dist.<rest>` names; `from cauc_dist import __version__` is the package itself."""
    known = {m for row in LAYERS for m in row}
    words = rest.split(".")
    found = [m for m in (".".join(words[:i]) for i in range(len(words), 0, -1)) if m in known]
    return found[0] if found else "__init__"


def violations(root: Path) -> list[str]:
    level = {m: i for i, row in enumerate(LAYERS) for m in row}
    wrong = []
    for path in sorted(root.rglob("*.py")):
        me = name_of(path)
        if path.name == "__init__.py" and me in ("__init__", "store", "stream"):
            continue
        if me not in level:
            wrong.append(f"{me} has no layer")
            continue
        for package, rest, top in imports(path):
            if package == "cauc_dist" and target(rest) != me and level[target(rest)] >= level[me]:
                wrong.append(f"{me} imports {target(rest)}")
            if not package:
                wrong.append(f"{me} imports relatively")
            if package in OWNERS and me not in OWNERS[package]:
                wrong.append(f"{me} imports {package}")
            if package == "torch" and top and me in NO_TORCH:
                wrong.append(f"{me} imports torch at module level")
    return wrong


def test_every_module_imports_only_from_layers_above_its_own() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("from cauc_dist.train import train", "config imports train"),
        ("import deepspeed", "config imports deepspeed"),
        ("def f():\n    from cauc_dist.cli import main", "config imports cli"),
        ("import torch", "config imports torch at module level"),
        ("from .train import train", "config imports relatively"),
    ],
)
def test_the_layer_test_catches_an_upward_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, complaint: str
) -> None:
    (tmp_path / "config.py").write_text(line + "\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert violations(tmp_path) == [complaint]
