"""docker/: what can be held without an engine. docker/README.md says what was tried by hand, and what never ran."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
BUILD = {"TORCH_INDEX": ""}


def instructions() -> list[tuple[str, str, str]]:
    """(stage, word, the rest) of the Dockerfile."""
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text(encoding="utf-8"))
    found, stage = [], ""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, rest = line.split(maxsplit=1)
        stage = rest.split()[-1] if word == "FROM" else stage
        found.append((stage, word, " ".join(rest.split())))
    return found


def post() -> list[str]:
    """The lines of %post in cauc.def."""
    text = (DOCKER / "cauc.def").read_text(encoding="utf-8")
    return [line.strip() for line in text.split("%post\n")[1].split("\n\n")[0].splitlines()]


def tool(name: str) -> str:
    """The path of a linter: beside this python, or on PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {name}")
    return str(found)


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8")))


def test_whatever_an_image_is_made_of_is_there_and_is_let_through() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    copied = {source for _, word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert "*" in ignored
    assert copied == set(allowed)
    packed = (DOCKER / "cauc.def").read_text(encoding="utf-8").split("%files\n")[1].split("\n\n")[0]
    for source in [*copied, *(line.split()[0] for line in packed.splitlines())]:
        assert (ROOT / source).exists(), source


def test_no_key_and_no_data_can_get_into_an_image() -> None:
    text = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    allowed = [line[1:] for line in text.splitlines() if line.startswith("!")]
    for name in (".git", ".env", "demo", "runs", "stores", "docker", "tests", ".venv"):
        assert not any(fnmatch(name, pattern) for pattern in allowed), name
    for _, word, rest in instructions():
        assert word not in ("ADD",), rest
        assert not re.search(r"(?i)token|password|secret|BEGIN .*KEY", rest), rest


def test_every_image_but_the_cluster_s_runs_as_another_than_root() -> None:
    users = {stage: rest for stage, word, rest in instructions() if word == "USER"}
    assert users == {"cuda": "1000", "cpu": "1000", "cluster": "0"}


def test_the_versions_of_an_image_are_those_of_the_lock(tmp_path: Path) -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    names = {line.partition("==")[0].lower() for line in lock}
    for text in [rest for _, word, rest in instructions() if word == "RUN"] + post():
        pinned = re.findall(r"([A-Za-z][\w-]*)==[\d.]", text)
        assert not {name.lower() for name in pinned} & names, f"a version of its own: {text}"
    cpu = next(rest for stage, word, rest in instructions() if (stage, word) == ("cpu", "RUN"))
    fake = tmp_path / "pip"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> calls\n')
    fake.chmod(0o755)
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    for index in ("", "https://example.org/a b"):
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_INDEX": index}
        subprocess.run(["sh", "-euc", cpu], cwd=tmp_path, env=env, check=True)
    (torch,) = [line for line in lock if line.startswith("torch==")]
    first, rest = f"install --no-cache-dir {torch}", "install --no-cache-dir --requirement requirements.lock"
    with_index = f"install --no-cache-dir --index-url https://example.org/a b {torch}"
    assert (tmp_path / "calls").read_text().splitlines() == [first, rest, with_index, rest]


def test_the_images_python_is_one_that_the_package_takes() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    froms = [rest for _, word, rest in instructions() if word == "FROM"]
    froms += re.findall(r"^From: (.*)", (DOCKER / "cauc.def").read_text(encoding="utf-8"), re.MULTILINE)
    versions = {found[1] for text in froms if (found := re.search(r"python:(\d+\.\d+)", text))}
    assert {f">={version}" for version in versions} == {wanted}


def test_apptainer_s_image_is_made_by_the_same_commands() -> None:
    made = " && ".join(rest for stage, word, rest in instructions() if word == "RUN" and stage in ("base", "cpu"))
    docker = [step for step in made.split(" && ") if not step.startswith("useradd")]
    theirs = [line for line in post() if re.match(r"apt-get|rm|python|pip", line)]
    assert theirs == docker


def test_the_cluster_s_image_has_the_packages_that_the_cluster_needs() -> None:
    made = next(rest for stage, word, rest in instructions() if (stage, word) == ("cluster", "RUN"))
    asked = set(made.split("--no-install-recommends ")[1].split(" && ")[0].split())
    made_by = re.search(r"^SLURM_PACKAGES := (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert made_by is not None
    assert asked == set(made_by[1].split()) - {"shellcheck"}
    command = [rest for stage, word, rest in instructions() if (stage, word) == ("cluster", "ENTRYPOINT")]
    assert (ROOT / yaml.safe_load(command[0])[0]).exists()


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), "--no-color", "Dockerfile"], cwd=DOCKER, capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["Dockerfile", "cauc.def"])
def test_the_commands_that_make_an_image_are_shellcheck_clean(name: str) -> None:
    commands = (
        [rest for _, word, rest in instructions() if word == "RUN"] if name == "Dockerfile" else ["\n".join(post())]
    )
    variables = "".join(f"{key}={shlex.quote(value)}\n" for key, value in BUILD.items())
    for command in commands:
        script = f"#!/bin/sh\n{variables}export TORCH_INDEX\n{command}\n"
        done = subprocess.run([tool("shellcheck"), "-"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_compose_builds_what_the_dockerfile_has() -> None:
    stages = {stage for stage, _, _ in instructions()}
    services = compose()["services"]
    assert set(services) == {"cauc", "gpu", "cluster"}
    for service in services.values():
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
        assert build["target"] in stages
        assert service["image"] == f"cauc-dist:{build['target']}"
        assert set(build.get("args", {})) <= set(BUILD)
    assert [name for name, service in services.items() if service.get("privileged")] == ["cluster"]


def test_the_documented_builds_are_those_that_there_are() -> None:
    text = "".join((DOCKER / name).read_text(encoding="utf-8") for name in ("Dockerfile", "README.md"))
    targets = set(re.findall(r"--target (\w+)", text))
    assert targets == {stage for stage, _, _ in instructions()} - {"base"}
    for argument in re.findall(r"--build-arg (\w+)=", text):
        assert f"ARG {argument}" in text
