"""The batch script: what a site adds is in it, bash reads it, and an array is shown as it is queued."""

import dataclasses
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import cauc_dist
from launch import script
from launch.site import Container, Resources, Site
from launch.submit import queue
from tests.launch.conftest import Slurm

ODD = Site(
    python="/opt/my env/bin/python",
    modules=("cuda/12", "odd name"),
    setup=("ulimit -n 65536",),
    environment={"NCCL_SOCKET_IFNAME": "ib0", "ODD": "it's $HOME"},
    sbatch={"hint": "nomultithread", "exclusive": ""},
    srun=("--cpu-bind=none",),
)


def text(folder: Path, resources: Resources = Resources(), site: Site = Site()) -> str:  # noqa: B008 (frozen)
    return script.text(script.executor(folder, resources, site, "mine-0badcafe"))


def test_what_is_asked_for_is_what_sbatch_reads(tmp_path: Path) -> None:
    asked = Resources(
        nodes=2,
        gpus_per_node=4,
        cpus_per_rank=8,
        mem_gb=1.5,
        time="20:00:00",
        partition="gpu",
        account="me@v100",
        qos="long",
        constraint="v100",
        exclude="n[3-4]",
        nodelist="n1",
        signal_seconds=90,
        max_tries=5,
        requeue_on=(5, 137),
    )
    lines = text(tmp_path, asked).splitlines()
    for line in (
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--mem=1536M"),
        *("--time=20:00:00", "--partition=gpu", "--account=me@v100", "--qos=long", "--constraint=v100"),
        *("--exclude='n[3-4]'", "--nodelist=n1", "--signal=USR2@90", "--requeue", "--open-mode=append"),
        *("--job-name=mine-0badcafe", "--output=slurm/%j.log", "--export=ALL"),
    ):
        assert f"#SBATCH {line}" in lines
    assert "export CAUC_MAX_TRIES=5 CAUC_REQUEUE_ON='5 137'" in lines
    assert not [line for line in lines if "wckey" in line or "gres" in line]


def test_what_is_not_asked_for_is_left_to_the_cluster(tmp_path: Path) -> None:
    said = text(tmp_path)
    for option in ("mem", "gpus-per-node", "partition", "account", "qos", "constraint", "exclude", "nodelist"):
        assert f"--{option}" not in said


def test_a_site_s_lines_stand_before_the_ranks(tmp_path: Path) -> None:
    lines = text(tmp_path, site=ODD).splitlines()
    order = [
        ". snapshot/slurm/attempt.sh",
        "module purge",
        "module load cuda/12",
        "module load 'odd name'",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export ODD='it'\"'\"'s $HOME'",
        'export PYTHONPATH="$SLURM_SUBMIT_DIR/snapshot"',
        "ulimit -n 65536",
        "begin_attempt .",
    ]
    assert [line for line in lines if line in order] == order
    assert "#SBATCH --hint=nomultithread" in lines
    assert "#SBATCH --exclusive" in lines
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--cpu-bind=none" in srun
    assert "--kill-on-bad-exit=0" in srun
    assert "'/opt/my env/bin/python' -u -m submitit.core._submit" in srun
    assert lines[-1] == "end_attempt $?"
    assert lines.index(srun) > lines.index("begin_attempt .")


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_in_a_container_only_the_ranks_run(tmp_path: Path, kind: str) -> None:
    box = Container(kind, "an image.sif", ("/work:/work", "/data:/data"), ("--nv",))  # type: ignore[arg-type]
    said = text(tmp_path, site=dataclasses.replace(ODD, python=None, container=box))
    (srun,) = [line for line in said.splitlines() if line.startswith("srun ")]
    words = shlex.split(srun)
    if kind == "apptainer":
        inside = [
            "apptainer",
            "exec",
            "--bind",
            "/work:/work",
            "--bind",
            "/data:/data",
            "--nv",
            "an image.sif",
            "python",
        ]
        at = words.index("apptainer")
        assert words[at : at + len(inside)] == inside
    else:
        assert {"--container-image=an image.sif", "--container-mounts=/work:/work,/data:/data", "--nv"} <= set(words)
        assert words[words.index("-u") - 1] == "python"
    assert said.count("image") == 1 + (kind == "pyxis")


@pytest.mark.parametrize("site", [Site(), ODD])
def test_bash_reads_it_whatever_the_folder_is_called(tmp_path: Path, site: Site) -> None:
    folder = tmp_path / 'it\'s "a" run'
    said = text(folder, site=site)
    done = subprocess.run(["bash", "-n"], input=said, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (srun,) = [line for line in said.splitlines() if line.startswith("srun ")]
    assert shlex.split(srun)[-1] == str(folder / "slurm")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_attempt_sh_is_clean() -> None:
    done = subprocess.run(["shellcheck", str(script.ROOT / "slurm" / "attempt.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_an_array_is_shown_as_it_is_queued(slurm: Slurm, tmp_path: Path) -> None:
    runs = [tmp_path / f"00{i}-x" for i in range(3)]
    (tmp_path / "runs").write_text("".join(f"{run.name}\n" for run in runs))
    (tmp_path / "slurm").mkdir(exist_ok=True)
    made = script.executor(tmp_path, Resources(nodes=2), Site(), "sweep-0badcafe", members=3)
    shown = script.text(made, 3)
    assert queue(made, tmp_path, Site(), runs) == ["41_0", "41_1", "41_2"]
    assert {job["script"] for job in slurm.queue.values()} == {shown}
    assert set(slurm.queue) == {"41_0", "41_1", "41_2"}
    assert "#SBATCH --output=slurm/%A_%a.log" in shown.splitlines()
    (tmp_path / "001-x").mkdir()
    (begin,) = [line for line in shown.splitlines() if line.startswith("begin_attempt ")]
    done = subprocess.run(
        ["bash", "-c", f'begin_attempt() {{ cd -- "$1" && pwd; }}\n{begin}'],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{tmp_path / '001-x'}\n"


def test_the_snapshot_is_the_code_and_nothing_else(tmp_path: Path) -> None:
    script.snapshot(tmp_path)
    here = Path(cauc_dist.__file__).parent
    found = {path.relative_to(tmp_path / "snapshot") for path in (tmp_path / "snapshot").rglob("*") if path.is_file()}
    wanted = {Path("cauc_dist") / path.relative_to(here) for path in here.rglob("*") if path.is_file()}
    wanted = {path for path in wanted if "__pycache__" not in path.parts} | {Path("slurm/attempt.sh")}
    assert found == wanted
    for path in found:
        assert (tmp_path / "snapshot" / path).read_bytes() == (script.ROOT / path).read_bytes()


def test_two_runs_of_one_name_have_jobs_of_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.name_of("mine", tmp_path / "a") != script.name_of("mine", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert script.name_of("mine", Path("a")) == script.name_of("mine", tmp_path / "a")
