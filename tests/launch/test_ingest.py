"""`launch ingest`: a store by the tasks of an array, the same bytes as from one process."""

import json
import subprocess
import threading
from pathlib import Path

import pytest

from cauc_dist import cli as cauc
from cauc_dist.cli import data
from cauc_dist.cli.words import parse
from cauc_dist.errors import BadInput
from launch import cli
from launch import ingest as ingests
from launch import site as sites
from launch.site import Container, Resources, Site
from tests.launch.conftest import Launch, Slurm


@pytest.fixture
def ingest(launch: Launch, site: Path, cohort: Path) -> Launch:
    """`launch ingest COHORT` on the tests' site; further words may follow."""
    return lambda *words: launch("ingest", cohort, "--site", site, *words)


def task(slurm: Slurm, number: int, store: Path) -> subprocess.CompletedProcess[str]:
    """Run one task of the array, as slurmd would; its log is left in .stdout."""
    here = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_NTASKS": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    folder = store.with_name(f"{store.name}.ingest")
    env = {**slurm.queue[f"41_{number}"]["env"], **here, "SLURM_SUBMIT_DIR": str(folder)}
    done = subprocess.run(["bash", "script.sh"], cwd=folder, env=env, capture_output=True, text=True)
    log = folder / "slurm" / "%A_%a.log"
    done.stdout += log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return done


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_the_tasks_of_an_array_make_the_store_that_one_process_makes(
    slurm: Slurm, ingest: Launch, cohort: Path, tmp_path: Path
) -> None:
    store = tmp_path / "it's a store.zarr"
    layout = ("--layout", "dense", "--dtype", "f32")
    done = ingest(store, *layout, "--tasks", "2", "--cpus-per-rank", "1", "--time", "20", "--throttle", "1")
    assert done.code == 0, done.err
    assert "24 scans of 24 subjects" in done.out
    script = slurm.queue["41_0"]["script"]
    assert "#SBATCH --array=0-1%1\n" in script
    assert "#SBATCH --time=20\n" in script
    (line,) = map(json.loads, (tmp_path / f"{store.name}.ingest" / "jobs.jsonl").read_text().splitlines())
    assert (line["id"], line["tasks"], line["name"]) == ("41", 2, slurm.queue["41_0"]["name"])
    told = [task(slurm, number, store) for number in (0, 1)]
    assert [one.returncode for one in told] == [0, 0], told
    assert store.exists()
    alone = tmp_path / "alone.zarr"
    assert cauc.main(["ingest", str(cohort), str(alone), *layout, "--workers", "1"]) == 0
    assert files(store) == files(alone)
    late = task(slurm, 0, store)  # a task that starts when the others have done its share
    assert (late.returncode, late.stdout) == (0, "the store is made, nothing was left to do\n")


def test_scans_that_are_set_aside_make_no_failed_job(
    slurm: Slurm, ingest: Launch, cohort: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    for path in cohort.iterdir():
        (tmp_path / "broken" / path.name).symlink_to(path)
    scan = next((tmp_path / "broken").glob("sub-*"))
    scan.unlink()
    (scan / "anat").mkdir(parents=True)
    (scan / "anat" / f"{scan.name}_T1w.nii.gz").write_bytes(b"no image")
    store = tmp_path / "store.zarr"
    site = tmp_path / "site.toml"
    assert cli.main(["ingest", str(tmp_path / "broken"), str(store), "--tasks", "1", "--site", str(site)]) == 0
    done = task(slurm, 0, store)
    assert done.returncode == 0
    assert f"set aside: {scan.name}" in done.stdout


def test_a_task_that_fails_fails_its_job_and_the_same_command_goes_on(
    slurm: Slurm, ingest: Launch, tmp_path: Path
) -> None:
    store = tmp_path / "store.zarr"
    words = (store, "--tasks", "1", "--layout", "dense")
    assert ingest(*words).code == 0
    blocked = tmp_path / ".store.zarr.partial"
    blocked.write_text("a file where the work's folder should be")
    assert task(slurm, 0, store).returncode != 0
    blocked.unlink()
    refused = ingest(*words)
    assert refused.code == 2
    assert "this store is being made by 1 tasks (41_0 ...); wanted one array at a time" in refused.err
    assert f"scancel --name {slurm.queue['41_0']['name']}" in refused.err
    slurm.ends("41_0", "FAILED")
    assert ingest(*words).code == 0
    assert list(slurm.queue) == ["42_0"]


def test_a_dry_run_writes_nothing_and_shows_the_script(no_slurm: None, ingest: Launch, tmp_path: Path) -> None:
    done = ingest(tmp_path / "store.zarr", "--tasks", "4", "--dry-run")
    assert done.code == 0, done.err
    assert "#SBATCH --array=0-3\n" in done.out
    assert "would be stored as" in done.out
    assert not (tmp_path / "store.zarr.ingest").exists()


OPTIONS = (
    [],
    ["--shape", "8", "8", "8", "--pad", "--fresh"],
    ["--missing", "height=0", "*=-9999", "--ranges", "height=100:230", "--table", "/t.csv", "--features", "/f.csv"],
    ["--layout", "packed", "--dtype", "i16", "--codec", "zstd", "--suffix", "T1w", "T2w", "--workers", "3"],
    ["--resample", "1.5", "1.5", "1.5", "--wait-minutes", "5"],
)


@pytest.mark.parametrize("words", OPTIONS)
def test_a_task_is_given_every_option_of_cauc_ingest(words: list[str]) -> None:
    asked = parse(data.Ingest, "ingest", ["/a", "/b", *words])
    assert parse(data.Ingest, "ingest", ingests.words(asked)) == asked


def test_a_site_s_nodes_gpus_and_ranks_are_not_asked_for() -> None:
    gpus = Resources(nodes=4, gpus_per_node=8, ranks_per_node=8, cpus_per_rank=5)
    text = ingests.batch(data.Ingest(Path("/a"), Path("/b")), 2, gpus, Site(), None)
    assert "gpus" not in text
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n" in text
    assert "#SBATCH --cpus-per-task=5\n" in text
    assert "--workers 5 --task" in text


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("apptainer", "--export=ALL apptainer exec --bind /d:/d --nv /i.sif python -u -m cauc_dist ingest"),
        ("pyxis", '--container-image=/i.sif --container-mounts=/d:/d --nv --container-workdir="$PWD" python -u -m'),
    ],
)
def test_a_task_runs_in_the_site_s_container(kind: str, wanted: str) -> None:
    site = Site(container=Container(kind, "/i.sif", ("/d:/d",), ("--nv",)))  # type: ignore[arg-type]
    assert wanted in ingests.batch(data.Ingest(Path("/a"), Path("/b")), 2, Resources(), site, None)


REFUSED: dict[str, tuple[list[str], str]] = {
    "no task": (["--tasks", "0"], "--tasks 0; wanted 1 or more. E.g. --tasks 16."),
    "no room": (["--throttle", "0"], "--throttle 0; wanted 1 or more at a time"),
    "a task of its own": (["--task", "1/4"], "--task 1/4; wanted --tasks N, of which each takes its own"),
    "what cauc ingest refuses": (["--missing", "weight=0"], "no column weight in the table"),
    "an unknown partition": (["--partition", "mian"], "invalid partition specified: mian"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_no_folder(slurm: Slurm, ingest: Launch, tmp_path: Path, case: str) -> None:
    words, wanted = REFUSED[case]
    done = ingest(tmp_path / "store.zarr", *words)
    assert done.code == 2
    assert wanted in done.err
    assert sorted(path.name for path in tmp_path.glob("*store*")) == []
    assert not slurm.queue


def test_what_sbatch_refuses_leaves_a_folder_that_was_there(slurm: Slurm, ingest: Launch, tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    assert ingest(store, "--tasks", "1").code == 0
    slurm.ends("41_0", "FAILED")
    assert ingest(store, "--tasks", "1", "--partition", "mian").code == 2
    assert (tmp_path / "store.zarr.ingest" / "jobs.jsonl").exists()


UNCLEAR: dict[str, tuple[str, str]] = {
    "sbatch says what has no id in it": ("echo hello", "sbatch said 'hello'"),
    "sbatch says nothing": ("exit 0", "sbatch said ''"),
    "it gives no answer in time": ("exec sleep 30", "sbatch gave no answer in a minute"),
    "sbatch is killed": ("kill -KILL $$", "sbatch was ended by signal 9"),
    "its answer cannot be noted": ("mkdir jobs.jsonl; echo 41", "[Errno 21] Is a directory: '"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_the_folder_of_an_array_that_may_be_queued_stays(
    slurm: Slurm, ingest: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    line, words = UNCLEAR[case]
    monkeypatch.setattr("launch.slurm.PATIENCE", 3.0)
    slurm.instead("sbatch", '"$SLURM" "$@" > /dev/null', line)
    done = ingest(tmp_path / "store.zarr", "--tasks", "1")
    name = slurm.queue["41_0"]["name"]
    assert done.code == 2
    assert f"error: sbatch was given {name}, then: {words}" in done.err
    assert f"The job may be queued: `squeue --name {name}` (its folder stays)." in done.err
    assert (tmp_path / "store.zarr.ingest" / "script.sh").exists()


def test_two_ingests_at_a_time_are_one(slurm: Slurm, ingest: Launch, cohort: Path, site: Path, tmp_path: Path) -> None:
    """Both find no array in the queue: what is between the look and sbatch is one's alone."""
    asked, told = data.Ingest(cohort, tmp_path / "store.zarr"), []

    def another() -> None:
        barrier.wait()
        try:
            ingests.ingest(asked, 1, Resources(), sites.read(str(site)), say=lambda _: None)
        except BadInput as error:
            told.append(str(error))

    barrier = threading.Barrier(2)
    slurm.instead("squeue", '"$SLURM" "$@"', "sleep 1")
    both = [threading.Thread(target=another) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    folder = tmp_path / "store.zarr.ingest"
    assert told == [
        f"another launch is at work on {folder}; wanted one at a time. Look what it has queued, then go on."
    ]
    assert list(slurm.queue) == ["41_0"]
    assert (folder / "script.sh").exists()


def test_a_store_that_is_there_is_refused(slurm: Slurm, ingest: Launch, tmp_path: Path) -> None:
    (tmp_path / "store.zarr").mkdir()
    done = ingest(tmp_path / "store.zarr")
    assert done.code == 2
    assert "store.zarr exists already; wanted a new path" in done.err


def test_a_store_that_the_nodes_would_not_see_is_refused(
    slurm: Slurm, launch: Launch, cohort: Path, site: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    done = launch("ingest", cohort, tmp_path_factory.mktemp("elsewhere") / "store.zarr", "--site", site)
    assert done.code == 2
    assert "wanted a place that all nodes see: " in done.err


def test_without_sbatch_it_says_so(no_slurm: None, ingest: Launch, tmp_path: Path) -> None:
    done = ingest(tmp_path / "store.zarr")
    assert done.code == 2
    assert "no sbatch on this machine" in done.err
