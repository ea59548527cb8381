"""What is released: the sdist holds what makes the wheel, the wheel holds the package alone, and runs anywhere.

Nothing is downloaded. The venv of these tests is new and empty but for the wheel, and a .pth file that lets it see the
packages that are installed here: those of the lock, without the editable cauc_dist, whose .pth is not read there.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from cauc_dist import __version__

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
NAME = f"cauc_dist-{__version__}"

TYPED = """
from pathlib import Path

import torch

import cauc_dist
from cauc_dist import AllGather, ContrastiveEncoder, RunConfig, Store, kernels, load_encoder, losses, recipes

run: RunConfig = recipes.get("demo_cauc")
store = Store.open("store.zarr")
encoder = ContrastiveEncoder(run, epochs=5).fit(store)
z = torch.rand(2, 8, 4)
reveal_type(encoder.transform(store))
reveal_type(load_encoder(Path("encoder")).prepare(z))
reveal_type(losses.cauc(z, torch.rand(8, 1), kernels.gaussian(5.0), exchange=AllGather(8)))
reveal_type(cauc_dist.kernels.delta())
reveal_type(store.ids)
"""
REVEALED = [
    "numpy.ndarray",
    "torch._tensor.Tensor",
    "torch._tensor.Tensor",
    "cauc_dist.kernels.Kernel",
    "tuple[str, ...]",
]
WRONG = """
import cauc_dist
from cauc_dist import Store, kernels

cauc_dist.load_model("encoder")
Store.open(3)
kernels.gaussian("five")
cauc_dist.RunConfig(name="a", epochs="all")
"""


def run(*command: object, cwd: Path, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    """In an environment that does not know of this checkout."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    line = [str(word) for word in command]
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def checked(*command: object, cwd: Path, timeout: float = 110) -> str:
    done = run(*command, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git keeps, or would: setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("tree") / "checkout"
    names = checked("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    """The unpacked source distribution."""
    checked(sys.executable, "-c", BUILD, "sdist", tree.parent, cwd=tree)
    with tarfile.open(tree.parent / f"{NAME}.tar.gz") as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4
        archive.extractall(tree.parent / "sdist", **safe)
    return tree.parent / "sdist" / NAME


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the sdist alone."""
    checked(sys.executable, "-c", BUILD, "wheel", sdist.parent, cwd=sdist)
    return sdist.parent / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv") / "venv"
    checked(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "installed-here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python")
    checked(*pip, "install", "--no-index", "--no-deps", "--ignore-installed", wheel, cwd=folder.parent)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def top(names: set[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"{NAME}.dist-info/{name}").decode()


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(read(wheel, "METADATA"))


# ---- contents -----------------------------------------------------------------------------------------------------


def test_the_sdist_has_the_package_and_what_goes_with_it(sdist: Path, tree: Path) -> None:
    assert top(files(sdist)) == {
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "cauc_dist",
        "cauc_dist.egg-info",
        "pyproject.toml",
        "setup.cfg",
    }
    assert files(sdist / "cauc_dist") ^ files(tree / "cauc_dist") == set()


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path, tree: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert top(names) == {"cauc_dist", f"{NAME}.dist-info"}
    package = {name for name in names if name.startswith("cauc_dist/")}
    assert package ^ {f"cauc_dist/{name}" for name in files(tree / "cauc_dist")} == set()  # else: package-data
    assert "cauc_dist/py.typed" in names
    assert {name for name in names if ".dist-info/" in name} == {
        f"{NAME}.dist-info/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    }


def test_nothing_released_names_the_machine_that_built_it(wheel: Path, sdist: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents |= {str(path): path.read_bytes() for path in sdist.rglob("*") if path.is_file()}
    assert len(contents) > 200
    for name, data in contents.items():
        for place in (str(ROOT), str(Path.home()) + "/", str(sdist.parents[1])):
            assert place.encode() not in data, f"{name} names {place}"


def test_the_metadata_say_what_it_is_and_under_which_licence(wheel: Path) -> None:
    told = metadata(wheel)
    wanted = {
        "Name": "cauc-dist",
        "Version": __version__,
        "License-Expression": "Apache-2.0",
        "License-File": "LICENSE",
        "Requires-Python": ">=3.11",
        "Description-Content-Type": "text/markdown",
    }
    assert {name: told[name] for name in wanted} == wanted
    assert told.get_payload() == (ROOT / "README.md").read_text()
    assert "Apache License" in read(wheel, "licenses/LICENSE")
    assert "[console_scripts]\ncauc = cauc_dist.cli:main\n" in read(wheel, "entry_points.txt")


def test_what_a_plain_install_brings_is_what_a_worker_needs(wheel: Path) -> None:
    """A new one is a decision: change this list with it."""
    plain = [line for line in metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in plain} == {
        "deepspeed",
        "google-crc32c",
        "nibabel",
        "numcodecs",
        "numpy",
        "packaging",
        "psutil",
        "pydantic",
        "pytorch-optimizer",
        "rich",
        "safetensors",
        "scikit-learn",
        "scipy",
        "tensorboard",
        "torch",
        "tyro",
        "zarr",
    }


def test_who_cites_finds_the_paper_and_the_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["license"] == "Apache-2.0"
    assert cited["preferred-citation"]["url"] == "https://arxiv.org/abs/2111.05643"
    assert cited.get("version", __version__) == __version__


# ---- installed ----------------------------------------------------------------------------------------------------


def test_the_installed_package_is_the_wheels_and_has_its_version(venv: Path, tmp_path: Path) -> None:
    code = "import cauc_dist, importlib.metadata as m; print(cauc_dist.__file__, m.version('cauc-dist'))"
    place, version = checked(venv / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert Path(place).is_relative_to(venv)
    assert version == __version__
    assert "usage: cauc COMMAND" in checked(venv / "bin" / "cauc", "--help", cwd=tmp_path)
    assert checked(venv / "bin" / "cauc", "--version", cwd=tmp_path) == f"cauc-dist {__version__}\n"


@pytest.mark.timeout(400)
def test_the_installed_command_runs_the_whole_chain(venv: Path, tmp_path: Path) -> None:
    told = checked(venv / "bin" / "cauc", "demo", "--quick", "--folder", "first", cwd=tmp_path, timeout=390)
    assert "[5/5] cauc report" in told
    assert (tmp_path / "first" / "report.html").is_file()
    exported = checked(venv / "bin" / "cauc", "export", "first/demo_cauc", "encoder", cwd=tmp_path)
    assert "cauc_dist.load_encoder opens it" in exported
    assert str(tmp_path) not in (tmp_path / "encoder" / "README.md").read_text()


@pytest.mark.timeout(500)
def test_a_typed_script_of_a_user_passes_mypy_strict_and_a_wrong_one_does_not(
    venv: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Its cache is kept with pytest's: the first time, mypy reads torch, whose `backward` has no types."""
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(WRONG)
    for path in (ROOT / "examples").glob("*.py"):
        shutil.copy(path, tmp_path)
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("mypy-release")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", venv / "bin" / "python")
    done = run(*mypy, "--untyped-calls-exclude=torch", "--cache-dir", cache, ".", cwd=tmp_path, timeout=490)
    errors = [line.partition(": error: ") for line in done.stdout.splitlines() if ": error: " in line]
    assert [(place.partition(":")[0], code.rpartition("  ")[2]) for place, _, code in errors] == [
        ("wrong.py", "[attr-defined]"),
        ("wrong.py", "[arg-type]"),
        ("wrong.py", "[arg-type]"),
        ("wrong.py", "[arg-type]"),
    ], done.stdout
    found = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert [kind.partition("[")[0] if "numpy" in kind else kind for kind in found] == REVEALED
