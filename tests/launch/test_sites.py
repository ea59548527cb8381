"""The site files that come along: each can be read, the example has every key, and what never ran says so."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from launch import script, site
from launch.site import Container, Resources, Site

FILES = sorted(site.SITES.glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_site_file_makes_a_script_that_bash_would_read(path: Path, tmp_path: Path) -> None:
    found = site.read(path.stem)
    assert found.resources.minutes > 0
    text = script.text(script.executor(tmp_path, found.resources, found, "name"))
    assert f"#SBATCH --ntasks-per-node={found.resources.ranks_a_node}\n" in text
    assert site.read(str(path)) == found


@pytest.mark.parametrize("kind", [Site, Resources, Container])
def test_the_example_has_every_key_and_explains_it(kind: type) -> None:
    path = site.SITES / "example.toml"
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    there = {Site: values, Resources: values["resources"], Container: values["container"]}[kind]
    assert set(there) == {field.name for field in dataclasses.fields(kind)}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"[a-z_]+ = |\[", line):
            said = "#" in line or lines[number - 1].startswith("#")
            assert said, f"line {number + 1} of the example is not explained: {line}"


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "example"], ids=lambda path: path.stem)
def test_a_site_on_which_nothing_ran_says_so_in_its_first_line(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# UNTESTED")


def test_what_the_example_asks_for_stands_in_the_script(tmp_path: Path) -> None:
    found = site.read("example")
    text = script.text(script.executor(tmp_path, found.resources, found, "name"))
    for line in (
        "#SBATCH --hint=nomultithread",
        "#SBATCH --exclusive",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --exclude='n[13-14]'",
        "module purge\nmodule load cuda/12.4\nmodule load gcc/12",
        "export NCCL_SOCKET_IFNAME=ib0",
        "ulimit -n 65536",
        "--cpu-bind=cores",
        "apptainer exec --bind /scratch:/scratch --nv /scratch/me/cauc.sif /scratch/me/venv/bin/python -u -m submitit",
    ):
        assert line in text, line
