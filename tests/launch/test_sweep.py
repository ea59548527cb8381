"""`launch sweep`: a grid or a list as one array, whose members keep their numbers; and what failed once more."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission

from cauc_dist import config, recipes
from cauc_dist.errors import BadInput
from launch import resume
from launch import site as sites
from launch import sweep as sweeps
from launch.site import Resources
from tests.launch.conftest import SMALL, Launch, Slurm

GRID = ("--grid", "optim.lr=1e-3,1e-4", "objective.t=1,2")


@pytest.fixture
def sweep(launch: Launch, site: Path, store: Path) -> Launch:
    """`launch sweep demo_cauc`, of a network of a moment, on the tests' store and site; further words may follow."""

    def run(*words: str | Path) -> Any:
        return launch("sweep", "demo_cauc", *SMALL, "--data.store", store, "--site", site, *words)

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def jobs(run: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (run / "jobs.jsonl").read_text().splitlines()]


def ends(run: Path, verdict: str, id: str) -> None:
    """An attempt of the job, as slurm/attempt.sh leaves it."""
    folder = run / "attempts" / "001"
    folder.mkdir(parents=True)
    (folder / "job").write_text(f"id={id}\n")
    (folder / "rank-0.host").write_text("n1\n")
    (folder / "end").write_text(f"{verdict}\n")


def test_a_grid_is_the_product_of_its_axes_and_the_last_changes_first() -> None:
    base = recipes.get("demo_cauc")
    members = sweeps.grid("demo_cauc", base, ["optim.lr=1e-3,1e-4", "objective.t=1,2"], (0, 7))
    lr, t, seed = "optim.lr", "objective.t", "seed"
    wanted = [{lr: a, t: b, seed: c} for a in (1e-3, 1e-4) for b in (1.0, 2.0) for c in (0, 7)]
    assert [member.overrides for member in members] == wanted
    assert [member.run for member in members[:3]] == [
        "000-lr=0.001,t=1,seed=0",
        "001-lr=0.001,t=1,seed=7",
        "002-lr=0.001,t=2,seed=0",
    ]
    assert [member.index for member in members] == list(range(8))


def test_two_fields_of_one_last_word_keep_their_whole_names() -> None:
    members = sweeps.grid("demo_cauc", recipes.get("demo_cauc"), ["objective.name=simclr", "encoder.name=mlp"], ())
    assert [member.run for member in members] == ["000-objective.name=simclr,encoder.name=mlp"]


@pytest.mark.parametrize(
    ("axis", "wanted"),
    [
        ("optim.lr=1e-3", 0.001),
        ("engine.zero_stage=2", 2),
        ("engine.compile=true", True),
        ("objective.kernel=age:gaussian:5 sex:delta", ("age:gaussian:5", "sex:delta")),
        ("objective.lambda_align=None", None),
        ("data.split=1", "1"),
        ("engine.encode_chunk=auto", "auto"),
        ("engine.encode_chunk=4", 4),
        ("optim.betas=.9 .95", (0.9, 0.95)),
        ("data.normalise=none", "none"),
    ],
)
def test_a_value_of_a_grid_is_what_the_command_line_would_make_of_it(axis: str, wanted: object) -> None:
    (member,) = sweeps.grid("demo_cauc", recipes.get("demo_cauc"), [axis], ())
    name = axis.partition("=")[0]
    assert member.overrides[name] == wanted
    assert type(member.overrides[name]) is type(wanted)
    run: Any = sweeps.run_of(member, Path("sweep"))
    for part in name.split("."):
        run = getattr(run, part)
    assert run == wanted


def test_a_name_holds_nothing_that_a_shell_or_slurm_would_read(tmp_path: Path) -> None:
    axis = "data.store=/a b/it's%:$x.zarr"
    (member,) = sweeps.grid("demo_cauc", recipes.get("demo_cauc"), [axis], ())
    assert member.run == "000-store=-a-b-it-s-x.zarr"
    long = sweeps.numbered([sweeps.Member("x" * 300, "demo_cauc")])
    assert len(long[0].run) == 104


def test_a_dry_run_shows_the_very_script_that_is_then_queued(slurm: Slurm, sweep: Launch, tmp_path: Path) -> None:
    words = [*GRID, "--run", tmp_path / "sw", "--throttle", "2", "--nodes", "2"]
    dry = sweep(*words, "--dry-run")
    assert not (tmp_path / "sw").exists()
    assert not slurm.calls("sbatch")
    wet = sweep(*words)
    assert wet.code == 0, wet.err
    script = slurm.queue["41_0"]["script"]
    assert dry.out.startswith(f"{script}\n000-lr=0.001,t=1: 2 nodes x 1 ranks = 2 ranks; global batch 6,")
    assert "#SBATCH --array=0-3%2\n" in script
    assert f"cauc report {tmp_path}/sw/[0-9]*-* --out sweep.html" in wet.out
    assert sorted(slurm.queue) == ["41_0", "41_1", "41_2", "41_3"]


def test_a_sweep_s_folder_says_which_member_is_what(slurm: Slurm, sweep: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "sw"
    assert sweep(*GRID, "--run", folder, "--seed", "5").code == 0
    manifest = read(folder / "manifest.json")
    lines = (folder / "runs").read_text().splitlines()
    assert lines == [entry["run"] for entry in manifest]
    for i, (entry, line) in enumerate(zip(manifest, lines, strict=True)):
        run = config.read(folder / line / "config.json")
        assert (run.optim.lr, run.objective.t) == (entry["overrides"]["optim.lr"], entry["overrides"]["objective.t"])
        assert (run.seed, run.batch_size, run.run) == (5, 6, folder / line)
        assert jobs(folder / line) == [f"41_{i}"]
        assert read(folder / line / "provenance.json")["ranks"] == 1
        pickle = DelayedSubmission.load(folder / "slurm" / f"41_{i}_submitted.pkl")
        assert pickle.function.run == str(folder / line)
        assert pickle.args == ()
    assert {config.read(folder / line / "config.json").optim.lr for line in lines} == {1e-3, 1e-4}
    assert read(folder / "launch.json")["resources"]["nodes"] == 1
    assert (folder / "snapshot" / "cauc_dist" / "train.py").exists()


def test_a_manifest_makes_the_same_sweep_again(
    slurm: Slurm, sweep: Launch, launch: Launch, site: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert sweep(*GRID, "--run", one).code == 0
    assert launch("sweep", "--manifest", one / "manifest.json", "--run", two, "--site", site).code == 0
    assert read(one / "manifest.json") == read(two / "manifest.json")
    for line in (one / "runs").read_text().splitlines():
        ours, theirs = (read(folder / line / "config.json") for folder in (one, two))
        assert ours | {"run": ""} == theirs | {"run": ""}


def test_a_member_of_a_manifest_may_be_another_recipe(
    slurm: Slurm, launch: Launch, site: Path, store: Path, tmp_path: Path
) -> None:
    path = tmp_path / "list.json"
    small = {"data.store": str(store), "batch_size": 6, "objective.kernel": ["age:gaussian:5"]}
    path.write_text(json.dumps([{"name": r, "recipe": r, "overrides": small} for r in ("demo_simclr", "demo_yaware")]))
    assert launch("sweep", "--manifest", path, "--run", tmp_path / "sw", "--site", site).code == 0
    names = [read(run / "config.json")["objective"]["name"] for run in sorted((tmp_path / "sw").glob("0*"))]
    assert names == ["simclr", "y_aware"]


def test_a_task_trains_its_own_member_and_no_other(slurm: Slurm, sweep: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "it's a sweep"
    assert sweep("--seeds", "3", "4", "--run", folder).code == 0
    task = {"SLURM_JOB_ID": "99", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "1"}
    done = slurm.start("41_1", **task)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = sorted(folder.glob("0*"))
    assert not (first / "attempts").exists()
    assert (second / "attempts" / "001" / "end").read_text() == "done\n"
    assert "id=41_1\n" in (second / "attempts" / "001" / "job").read_text()
    assert list((second / "checkpoints").iterdir())


def test_a_sweep_of_one_is_an_array_of_one(slurm: Slurm, sweep: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "sw"
    assert sweep("--seeds", "3", "--run", folder).code == 0
    assert list(slurm.queue) == ["41_0"]
    assert jobs(folder / "000-seed=3") == ["41_0"]
    assert DelayedSubmission.load(folder / "slurm" / "41_0_submitted.pkl").function.run == str(folder / "000-seed=3")


def test_a_rerun_queues_what_is_neither_done_nor_live_under_its_old_numbers(
    slurm: Slurm, sweep: Launch, launch: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "sw"
    assert sweep("--seeds", "0", "1", "2", "3", "4", "--run", folder, "--nodes", "2").code == 0
    before = (folder / "runs").read_text()
    runs = sorted(folder.glob("0*"))
    for i, verdict in enumerate(["done", "failed 3", "", "cancelled", ""]):
        if i != 2:  # still in the queue
            slurm.ends(f"41_{i}")
        if verdict:
            ends(runs[i], verdict, f"41_{i}")
    (runs[3] / "cancelled").touch()
    again = launch("sweep", "--rerun", folder, "--time", "30", "--throttle", "1")
    assert again.code == 0, again.err
    assert "3 of 5 runs" in again.out
    assert {id for id in slurm.queue if id.startswith("42")} == {"42_1", "42_3", "42_4"}
    script = slurm.queue["42_1"]["script"]
    assert "#SBATCH --array=1,3,4%1\n" in script
    assert "#SBATCH --time=30\n" in script
    assert "#SBATCH --nodes=2\n" in script
    assert slurm.queue["42_1"]["name"] == slurm.queue["41_2"]["name"]
    assert (folder / "runs").read_text() == before
    assert [jobs(run) for run in runs] == [["41_0"], ["41_1", "42_1"], ["41_2"], ["41_3", "42_3"], ["41_4", "42_4"]]
    assert not (runs[3] / "cancelled").exists()
    for i in (1, 3, 4):
        assert DelayedSubmission.load(folder / "slurm" / f"42_{i}_submitted.pkl").function.run == str(runs[i])


def test_a_rerun_of_one_member_keeps_its_number(slurm: Slurm, sweep: Launch, launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "sw"
    assert sweep("--seeds", "0", "1", "--run", folder).code == 0
    slurm.ends("41_1")
    dry = launch("sweep", "--rerun", folder, "--dry-run")
    assert launch("sweep", "--rerun", folder).code == 0
    assert list(slurm.queue) == ["41_0", "42_1"]
    assert slurm.queue["42_1"]["script"] in dry.out


def test_a_rerun_where_all_is_done_queues_nothing(slurm: Slurm, sweep: Launch, launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "sw"
    assert sweep("--seeds", "0", "--run", folder).code == 0
    slurm.ends("41_0")
    ends(folder / "000-seed=0", "done", "41_0")
    again = launch("sweep", "--rerun", folder)
    assert again.code == 0
    assert "000-seed=0: COMPLETED\n" in again.out
    assert f"nothing to run again in {folder}" in again.out
    assert not slurm.queue


def test_a_rerun_of_what_cannot_be_known_is_refused(
    slurm: Slurm, sweep: Launch, launch: Launch, tmp_path: Path
) -> None:
    assert sweep("--seeds", "0", "1", "--run", tmp_path / "sw").code == 0
    slurm.breaks("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    again = launch("sweep", "--rerun", tmp_path / "sw")
    assert again.code == 2
    assert "error: what 000-seed=0 is doing cannot be known (squeue: " in again.err
    assert "what is live must not be queued twice. Try again later" in again.err
    assert len(slurm.queue) == 2


REFUSED = {
    "nothing to vary": ([], "a sweep without --grid and --seeds; wanted one of them. E.g. --grid"),
    "no values": (["--grid", "optim.lr"], "--grid optim.lr; wanted FIELD=VALUE,VALUE. E.g."),
    "an unknown field": (["--grid", "optim.rl=1"], "no field 'optim.rl'; wanted one of a run's. Did you mean optim.lr"),
    "a wrong value": (["--grid", "optim.lr=1,fast"], "--grid optim.lr=fast; wanted input should be a valid number"),
    "a field twice": (["--grid", "seed=1", "--seeds", "2"], "seed twice in a grid; wanted an axis a field"),
    "the run folder": (["--grid", "run=a,b"], "an override of `run`; wanted a folder a member"),
    "no room": (["--seeds", "1", "--throttle", "0"], "--throttle 0; wanted 1 or more at a time"),
    "a member whose batch is too small": (
        ["--grid", "batch_size=6,2", "--nodes", "3"],
        "member 001-batch_size=2: ",
    ),
    "a member with an unknown column": (
        ["--grid", "objective.kernel=age:gaussian:5,weight:gaussian:5"],
        "member 001-kernel=weight-gaussian-5: ",
    ),
    "an unknown partition": (["--seeds", "1", "2", "--partition", "mian"], "Did you mean main?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_no_folder(slurm: Slurm, sweep: Launch, tmp_path: Path, case: str) -> None:
    words, wanted = REFUSED[case]
    done = sweep(*words, "--run", tmp_path / "sw")
    assert done.code == 2
    assert wanted in done.err
    assert not (tmp_path / "sw").exists()
    assert not slurm.queue


LISTS: dict[str, tuple[Any, str]] = {
    "no JSON": ("[", "list.json is not JSON ("),
    "no list": ({"name": "x"}, "list.json holds no list of runs; wanted [{name, recipe, overrides}, ...]"),
    "an empty list": ([], "list.json holds no list of runs"),
    "an unknown key": (
        [{"name": "x", "recipe": "demo_cauc", "overide": {}}],
        "list.json[0]: no field 'overide' in Member",
    ),
    "an unknown recipe": ([{"name": "x", "recipe": "demo_cauk"}], "member 000-x: no recipe 'demo_cauk'"),
    "an unknown field": (
        [{"name": "x", "recipe": "demo_cauc", "overrides": {"optim.rl": 1}}],
        "member 000-x: no field 'optim.rl'",
    ),
    "a wrong value": (
        [{"name": "x", "recipe": "demo_cauc", "overrides": {"optim.lr": "fast"}}],
        "member 000-x: its overrides: optim.lr = 'fast'",
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_that_is_none_is_refused(slurm: Slurm, launch: Launch, tmp_path: Path, case: str) -> None:
    text, wanted = LISTS[case]
    path = tmp_path / "list.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    done = launch("sweep", "--manifest", path, "--run", tmp_path / "sw")
    assert done.code == 2
    assert wanted in done.err
    assert not (tmp_path / "sw").exists()


def test_a_folder_that_is_there_is_refused(slurm: Slurm, sweep: Launch, tmp_path: Path) -> None:
    (tmp_path / "sw").mkdir()
    done = sweep("--seeds", "1", "--run", tmp_path / "sw")
    assert done.code == 2
    assert f"sweep folder {tmp_path}/sw exists already; wanted a new one. Run what failed there again by" in done.err


def members(store: Path) -> list[sweeps.Member]:
    """Two of a network of a moment."""
    small: dict[str, Any] = {"data.store": str(store), "batch_size": 6, "encoder.width": 2, "engine.device": "cpu"}
    return sweeps.numbered([sweeps.Member(f"seed={i}", "demo_cauc", small | {"seed": i}) for i in range(2)])


def test_the_folder_of_a_queued_array_stays_where_nobody_listens(
    slurm: Slurm, site: Path, store: Path, tmp_path: Path
) -> None:
    def say(line: str) -> None:
        if line.startswith("array "):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        sweeps.sweep(members(store), tmp_path / "sw", Resources(), sites.read(str(site)), say=say)
    assert sorted(slurm.queue) == ["41_0", "41_1"]
    assert jobs(tmp_path / "sw" / "001-seed=1") == ["41_1"]


def test_of_two_sweeps_at_a_time_one_has_the_folder(slurm: Slurm, site: Path, store: Path, tmp_path: Path) -> None:
    folder, told, barrier = tmp_path / "sw", [], threading.Barrier(2)

    def another() -> None:
        barrier.wait()
        try:
            sweeps.sweep(members(store), folder, Resources(), sites.read(str(site)), say=lambda _: None)
        except BadInput as error:
            told.append(error.found)

    both = [threading.Thread(target=another) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert told == [f"sweep folder {folder} exists already"]
    assert sorted(slurm.queue) == ["41_0", "41_1"]
    assert [jobs(run) for run in sorted(folder.glob("0*"))] == [["41_0"], ["41_1"]]


def test_the_folder_of_an_array_that_may_be_queued_stays(
    slurm: Slurm, sweep: Launch, launch: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "sw"
    only_test = '[[ " $* " = *" --test-only "* ]] && exec "$SLURM" "$@"'
    slurm.instead("sbatch", only_test, '"$SLURM" "$@" > /dev/null', "echo hello")
    done = sweep("--seeds", "0", "1", "--run", folder)
    name = slurm.queue["41_0"]["name"]
    assert done.code == 2
    assert f'sbatch was given {name}, then: Could not make sense of sbatch output "hello"' in done.err
    assert f"The job may be queued: `squeue --name {name}` (its folder stays)." in done.err
    assert (folder / "manifest.json").exists()
    wanted = (
        f"({name}) is PENDING, and its launch was cut off before it noted that; wanted a run folder that no job has."
    )
    assert f"job 41_0 {wanted}" in launch("sweep", "--rerun", folder).err
    assert f"job 41_1 {wanted}" in launch("resume", folder / "001-seed=1").err
    assert sorted(slurm.queue) == ["41_0", "41_1"]


def test_a_store_that_the_nodes_do_not_see_is_refused(
    slurm: Slurm, sweep: Launch, launch: Launch, site: Path, store: Path, tmp_path: Path
) -> None:
    assert sweep("--seeds", "0", "--run", tmp_path / "seen").code == 0
    slurm.ends("41_0")
    site.write_text(f'shared = ["{tmp_path}"]\n')
    done = sweep("--seeds", "0", "--run", tmp_path / "sw")
    wanted = f"member 000-seed=0: store {store}; wanted a place that all nodes see: {tmp_path.resolve()}."
    assert wanted in done.err
    assert not (tmp_path / "sw").exists()
    assert wanted in launch("sweep", "--rerun", tmp_path / "seen", "--site", site).err


@pytest.fixture
def failed(slurm: Slurm, sweep: Launch, tmp_path: Path) -> Path:
    """A sweep of two whose second member was cancelled."""
    folder = tmp_path / "sw"
    assert sweep("--seeds", "0", "1", "--run", folder).code == 0
    slurm.ends("41_1")
    (folder / "001-seed=1" / "cancelled").touch()
    return folder


AGAIN: dict[str, tuple[list[str], str]] = {
    "no nodes": (["--nodes", "0"], "member 001-seed=1: --nodes 0; wanted 1 or more"),
    "more ranks than a batch has subjects": (
        ["--nodes", "4", "--ranks-per-node", "2"],
        "member 001-seed=1: batch_size 6",
    ),
    "a notice that is all of the time": (["--time", "2"], "member 001-seed=1: --signal-seconds 120 of --time 2"),
    "a notice too short for a checkpoint": (["--signal-seconds", "1"], "--signal-seconds 1 for a checkpoint of 0 MiB"),
    "an unknown partition": (["--partition", "mian"], "invalid partition specified: mian"),
}


@pytest.mark.parametrize("case", AGAIN)
def test_a_rerun_is_checked_as_a_sweep_is(slurm: Slurm, launch: Launch, failed: Path, case: str) -> None:
    words, wanted = AGAIN[case]
    before = (failed / "launch.json").read_bytes()
    done = launch("sweep", "--rerun", failed, *words)
    assert (done.code, wanted in done.err) == (2, True), done.err
    assert (failed / "001-seed=1" / "cancelled").exists()
    assert (failed / "launch.json").read_bytes() == before
    assert list(slurm.queue) == ["41_0"]


def test_a_rerun_that_sbatch_refuses_leaves_all_as_it_was(slurm: Slurm, launch: Launch, failed: Path) -> None:
    slurm.has("full")
    assert "QOSMaxSubmitJobPerUserLimit" in launch("sweep", "--rerun", failed).err
    assert (failed / "001-seed=1" / "cancelled").exists()
    assert jobs(failed / "001-seed=1") == ["41_1"]


def test_a_rerun_notes_what_it_asked_for(slurm: Slurm, launch: Launch, failed: Path) -> None:
    run = failed / "001-seed=1"
    (run / "launch.json").write_bytes((failed / "launch.json").read_bytes())  # as `launch resume` leaves it
    assert launch("sweep", "--rerun", failed, "--nodes", "3").code == 0
    assert read(failed / "launch.json")["resources"]["nodes"] == 3
    assert read(run / "launch.json")["resources"]["nodes"] == 3
    assert not (failed / "000-seed=0" / "launch.json").exists()


def test_a_rerun_and_another_launch_at_a_time_queue_one_array(slurm: Slurm, launch: Launch, failed: Path) -> None:
    told = []

    def say(line: str) -> None:
        if not told:
            told.extend(
                launch(*words).err for words in (["sweep", "--rerun", failed], ["resume", failed / "001-seed=1"])
            )

    was = resume.before(failed)
    sweeps.rerun(failed, was.resources, was.site, say=say)
    busy = f"error: another launch is at work on {failed}; wanted one at a time. Look what it has queued, then go on.\n"
    assert told == [busy, busy]
    assert sorted(slurm.queue) == ["41_0", "42_1"]


def test_a_rerun_of_what_is_no_sweep_is_refused(slurm: Slurm, launch: Launch, folder: Callable[..., Any]) -> None:
    done = launch("sweep", "--rerun", folder().path)
    assert done.code == 2
    assert "no manifest.json in " in done.err
    assert "wanted a sweep's folder" in done.err


def test_without_sbatch_a_sweep_can_only_be_shown(no_slurm: None, sweep: Launch, tmp_path: Path) -> None:
    assert sweep("--seeds", "1", "--run", tmp_path / "sw", "--dry-run").code == 0
    done = sweep("--seeds", "1", "--run", tmp_path / "sw")
    assert done.code == 2
    assert "no sbatch on this machine" in done.err
