"""Every tracker's own reader finds the numbers of the journal; a resumed run goes on in its own; none ends a run."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from cauc_dist import journal, trackers
from cauc_dist.config import Checkpoint, Data, Encoder, Objective, Projector, RunConfig, Trackers
from cauc_dist.errors import BadInput
from cauc_dist.journal import Journal
from cauc_dist.prepare import prepare
from cauc_dist.trackers import mlflow, tensorboard
from cauc_dist.trackers.tracker import End, Point
from tests import ranks as forked

ALL = Trackers(wandb=True, mlflow=True, project="heads")
SECRET = "hunter2-of-the-environment"


@pytest.fixture(autouse=True)
def _no_word_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOUSE_SECRET", SECRET)


def config(folder: Path, which: Trackers, **changes: Any) -> RunConfig:
    return RunConfig(name="n", run=folder, trackers=which, **changes)


def curves_of_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def records_of_wandb(file: Path) -> Iterator[Any]:
    """W&B's transaction log: 7 bytes, then LevelDB's log format, blocks of 32 KiB (crc, length, part of a record)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def files_of_wandb(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)


def curves_of_wandb(file: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records_of_wandb(file):
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for key, value in items.items():
                if not key.startswith("_"):
                    curves.setdefault(key, []).append((int(items["_step"]), value))
    return curves


def mlflow_of(run: Path) -> tuple[Any, str]:
    """Its client and the run's id there."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in mlflow.DEFAULTS.items():
            patch.setenv(variable, value)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=(run / "mlruns").absolute().as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "heads"]
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found.info.run_id


def curves_of_mlflow(run: Path) -> dict[str, list[tuple[int, float]]]:
    client, name = mlflow_of(run)
    keys = client.get_run(name).data.metrics
    return {key: [(m.step, m.value) for m in client.get_metric_history(name, key)] for key in keys}


def told(folder: Path, which: Trackers, steps: Sequence[int], end: End = "finished") -> list[str]:
    """A life of a run of which the trackers hear; returns what was said."""
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    run = config(folder, which)
    with Journal(folder) as events, trackers.Trackers(run, events, said.append, quiet=False) as live:
        live.start(steps[0])
        for step in steps:
            live.step(step, step // 3, {"loss": 1.0 / (step + 1), "broken": float("nan"), "name": "sub-01", "on": True})
        live.close(end)
    return said


EXPECTED = {
    "loss": [(s, pytest.approx(1 / (s + 1))) for s in range(6)],
    "epoch": [(s, float(s // 3)) for s in range(6)],
}


def test_tensorboards_reader_finds_each_finite_number_of_each_step_and_its_epoch(tmp_path: Path) -> None:
    assert told(tmp_path, Trackers(), range(6)) == []
    assert curves_of_tensorboard(tmp_path) == EXPECTED


def test_wandbs_file_holds_each_finite_number_of_each_step_and_its_epoch(tmp_path: Path) -> None:
    told(tmp_path, Trackers(tensorboard=False, wandb=True), range(6))
    (file,) = files_of_wandb(tmp_path)
    assert curves_of_wandb(file) == EXPECTED


def test_mlflows_client_finds_each_finite_number_of_each_step_and_its_epoch(tmp_path: Path) -> None:
    told(tmp_path, Trackers(tensorboard=False, mlflow=True, project="heads"), range(6))
    assert curves_of_mlflow(tmp_path) == EXPECTED
    client, name = mlflow_of(tmp_path)
    run = client.get_run(name)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "n")
    assert run.data.params["optim.lr"] == "0.001"
    assert set(run.data.params) == set(trackers.settings(config(tmp_path, ALL)))


def test_wandb_is_offline_and_one_line_says_how_to_upload(tmp_path: Path) -> None:
    (line,) = told(tmp_path, Trackers(tensorboard=False, wandb=True), range(2))
    name = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    (folder,) = tmp_path.glob(f"wandb/offline-run-*-{name}")
    command = line.split("`")[1]
    assert command == f"wandb sync {tmp_path}/wandb/offline-run-*-{name}"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    asked = {"shell": True, "capture_output": True, "text": True, "check": True}
    listed = subprocess.run(f"{command} --dry-run", cwd=tmp_path, env=env, **asked)
    assert folder.name in listed.stdout + listed.stderr


def test_a_resumed_runs_curves_have_one_value_a_step(tmp_path: Path) -> None:
    """Killed after step 3, it goes on from step 2: TensorBoard takes back, MLflow has it already."""
    told(tmp_path, ALL, range(4), "failed")
    kept = (tmp_path / "trackers.json").read_text()
    told(tmp_path, ALL, range(2, 6))
    assert (tmp_path / "trackers.json").read_text() == kept
    assert curves_of_tensorboard(tmp_path) == EXPECTED
    assert curves_of_mlflow(tmp_path) == EXPECTED
    first, second = files_of_wandb(tmp_path)
    assert first.name == second.name == f"run-{json.loads(kept)['wandb']}.wandb"
    assert [step for step, _ in curves_of_wandb(first)["loss"]] == [0, 1, 2, 3]
    assert [step for step, _ in curves_of_wandb(second)["loss"]] == [2, 3, 4, 5]


def test_a_run_that_is_killed_has_told_all_but_its_last_steps_and_goes_on_in_the_same(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal, time; from pathlib import Path; from cauc_dist import trackers;"
        "from cauc_dist.journal import Journal; from tests.test_trackers import ALL, config;"
        "folder = Path(sys.argv[1]);"
        "live = trackers.Trackers(config(folder, ALL), Journal(folder), print, quiet=False);"
        "live.start(0); [(live.step(s, s // 3, {'loss': 1 / (s + 1)}), time.sleep(0.05)) for s in range(40)];"
        "time.sleep(3); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1], timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert len(curves_of_tensorboard(tmp_path)["loss"]) > 35
    assert len(curves_of_mlflow(tmp_path)["loss"]) > 35
    (file,) = files_of_wandb(tmp_path)
    assert len(curves_of_wandb(file)["loss"]) > 35
    client, name = mlflow_of(tmp_path)
    assert client.get_run(name).info.status == "RUNNING"
    told(tmp_path, ALL, range(30, 45))
    for found in (curves_of_tensorboard(tmp_path), curves_of_mlflow(tmp_path)):
        assert found["loss"] == [(s, pytest.approx(1 / (s + 1))) for s in range(45)]
    assert client.get_run(name).info.status == "FINISHED"


@pytest.mark.parametrize(("end", "status", "code"), [("stopped", "KILLED", 0), ("failed", "FAILED", 1)])
def test_how_a_life_ended_is_told(tmp_path: Path, end: End, status: str, code: int) -> None:
    told(tmp_path, ALL, range(2), end)
    client, name = mlflow_of(tmp_path)
    assert client.get_run(name).info.status == status
    (file,) = files_of_wandb(tmp_path)
    assert [r.exit.exit_code for r in records_of_wandb(file) if r.WhichOneof("record_type") == "exit"] == [code]


def test_a_run_told_to_another_mlflow_before_begins_anew_in_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = Trackers(tensorboard=False, mlflow=True, project="heads")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "else" / "mlruns").as_uri())
    told(tmp_path, which, range(2))
    assert curves_of_mlflow(tmp_path / "else")["loss"] == [(0, 1.0), (1, 0.5)]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    told(tmp_path, which, range(2, 4))
    assert [step for step, _ in curves_of_mlflow(tmp_path)["loss"]] == [2, 3]


def test_nothing_of_the_environment_no_name_and_no_password_of_a_url_is_written(tmp_path: Path) -> None:
    store = "https://reader:pass-of-reader@disk.example/heads.zarr?sig=signature-of-url#part"
    run = config(tmp_path / "run", ALL, data=Data(store=store))
    assert trackers.settings(run)["data.store"] == "https://disk.example/heads.zarr"
    run.folder.mkdir()
    with Journal(run.folder) as events, trackers.Trackers(run, events, lambda line: None, quiet=False) as live:
        live.start(0)
        live.step(0, 0, {"loss": 1.0, "skipped": ["sub-01"], "note": "sub-02"})
        live.close("finished")
    text = b"".join(path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    assert b"disk.example" in text
    for word in (SECRET, "pass-of-reader", "signature-of-url", "sub-01", "sub-02", "HOUSE_SECRET"):
        assert word.encode() not in text, word
    (file,) = files_of_wandb(run.folder)
    (own,) = [r.run for r in records_of_wandb(file) if r.WhichOneof("record_type") == "run"]
    assert (own.host, own.git.commit, own.project) == ("", "", "heads")
    assert not [p for p in run.folder.rglob("*") if p.name in ("wandb-metadata.json", "requirements.txt")]


def test_settings_are_flat_and_plain(tmp_path: Path) -> None:
    flat = trackers.settings(config(tmp_path, ALL, objective=Objective(kernel=("age:gaussian:5", "sex:delta"))))
    assert flat["optim.lr"] == 1e-3
    assert flat["encoder.width"] == "none"
    assert flat["objective.kernel"] == '["age:gaussian:5", "sex:delta"]'
    assert flat["augment.order"].startswith('["flip", ')  # type: ignore[union-attr]
    assert flat["run"] == str(tmp_path)
    assert flat["trackers.mlflow"] is True


class Breaks:
    """A tracker that fails at its step 2."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.step == 2:
                raise ConnectionError("nobody\n  there")
            self.told.append(point.step)

    def close(self, end: End) -> None:
        raise AssertionError("closed, though it had failed")


def with_tensorboard_as(monkeypatch: pytest.MonkeyPatch, tracker: Any) -> None:
    monkeypatch.setattr(tensorboard, "open_tracker", lambda run, settings, start: (tracker, ""))


def lost(folder: Path) -> list[tuple[str, str]]:
    return [(e["tracker"], e["message"]) for e in journal.read(folder) if e["event"] == "tracker_lost"]


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, said = Breaks(), []
    with_tensorboard_as(monkeypatch, broken)
    run = config(tmp_path, Trackers(mlflow=True, project="heads"))
    with Journal(tmp_path) as events, trackers.Trackers(run, events, said.append, quiet=False) as live:
        live.start(0)
        for step in range(6):
            live.step(step, step // 3, {"loss": 1 / (step + 1)})
            deadline = time.monotonic() + 20
            while step == 2 and not lost(tmp_path) and time.monotonic() < deadline:
                live.step(2, 0, {"loss": 1 / 3})  # MLflow: the same again
                time.sleep(0.01)
        live.close("finished")
    assert broken.told == [0, 1]
    assert lost(tmp_path) == [("tensorboard", "ConnectionError: nobody there")]
    line = "tensorboard is told no more, the run goes on without (ConnectionError: nobody there)"
    assert said.count(line) == 1
    assert dict(curves_of_mlflow(tmp_path)["loss"]) == dict(EXPECTED["loss"])


def test_a_journal_without_room_hides_no_other_error(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file in its place")
    (tmp_path / journal.FILE).symlink_to("/dev/full")
    said: list[str] = []
    with (
        Journal(tmp_path) as events,
        trackers.Trackers(config(tmp_path, Trackers()), events, said.append, quiet=False) as live,
    ):
        live.start(0)
    assert len(said) == 1


class Hangs:
    def __init__(self) -> None:
        self.free = threading.Event()

    def log(self, points: Sequence[Point]) -> None:
        self.free.wait()

    def close(self, end: End) -> None:
        pass


def hung_for(steps: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of a tracker that hangs through so many steps of a run."""
    hung, said = Hangs(), list[str]()
    with_tensorboard_as(monkeypatch, hung)
    with (
        Journal(folder) as events,
        trackers.Trackers(config(folder, Trackers()), events, said.append, quiet=False) as live,
    ):
        live.start(0)
        for step in range(steps):
            live.step(step, 0, {"loss": 1.0})
        live.close("finished")
    hung.free.set()
    return said


def test_a_tracker_that_hangs_delays_no_step_and_the_end_by_its_patience_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    said = hung_for(1000, tmp_path, monkeypatch)
    assert said == ["tensorboard is told no more, the run goes on without (TimeoutError: not done 0 s after the end)"]


def test_a_tracker_that_falls_far_behind_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "BEHIND", 8)
    hung_for(20, tmp_path, monkeypatch)
    assert lost(tmp_path) == [("tensorboard", "BlockingIOError: 8 steps late")]


def test_a_folder_that_cannot_be_written_ends_tensorboard_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file in its place")
    (line,) = told(tmp_path, Trackers(), range(3))
    assert line.startswith("tensorboard is told no more, the run goes on without (")
    assert len(lost(tmp_path)) == 1


def test_without_the_package_tensorboard_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import raises
    (line,) = told(tmp_path, Trackers(), range(3))
    assert line.startswith("tensorboard is told no more, the run goes on without (ModuleNotFoundError: ")


def test_a_server_that_is_away_ends_mlflow_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (line,) = told(tmp_path, Trackers(tensorboard=False, mlflow=True), range(3))
    assert line.startswith("mlflow is told no more, the run goes on without (MlflowException: ")


@pytest.mark.parametrize(
    ("mode", "why"), [("online", "UsageError: No API key"), ("offlin", "ValidationError: .*offlin")]
)
def test_wandb_without_a_key_or_with_a_wrong_mode_asks_nothing_and_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, why: str
) -> None:
    """On a terminal, where W&B by itself waits for an answer."""
    code = (
        "import sys; from pathlib import Path; from tests.test_trackers import told, Trackers;"
        "print(*told(Path(sys.argv[1]), Trackers(tensorboard=False, wandb=True), range(2)))"
    )
    ours, theirs = os.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        text=True,
        timeout=90,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "HOME": str(tmp_path), "WANDB_MODE": mode, "WANDB_BASE_URL": "http://127.0.0.1:9"},
    )
    os.close(ours)
    os.close(theirs)
    assert re.match(rf"wandb is told no more, the run goes on without \({why}", done.stdout), done.stdout


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        Journal(tmp_path, quiet=True) as events,
        trackers.Trackers(config(tmp_path, ALL), events, said.append, quiet=True) as live,
    ):
        live.start(0)
        live.step(0, 0, {"loss": 1.0})
        live.close("finished")
    assert said == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_an_extra_that_is_not_installed_is_refused_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    trackers.check(config(tmp_path, ALL))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(BadInput, match=rf"trackers.{package} is asked for .*pip install 'cauc-dist\[{package}\]'"):
        trackers.check(config(tmp_path, ALL))
    trackers.check(config(tmp_path, Trackers()))


def test_no_tracker_and_no_torch_is_imported_with_the_module() -> None:
    code = (
        "import sys, cauc_dist.trackers; print(sorted({'torch', 'tensorboard', 'wandb', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wandb_leaves_the_signals_of_a_run_alone_and_no_process_behind(tmp_path: Path) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]

    def services() -> list[int]:
        return [child.pid for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]

    before, during = handlers(), []
    with Journal(tmp_path) as events:
        run = config(tmp_path, Trackers(tensorboard=False, wandb=True))
        with trackers.Trackers(run, events, lambda line: None, quiet=False) as live:
            live.start(0)
            during = services()
    assert handlers() == before
    assert during != []
    assert services() == []


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = RunConfig(
        name="test",
        run=tmp_path_factory.mktemp("runs") / "run",
        epochs=2,
        batch_size=6,
        data=Data(store=str(store)),
        encoder=Encoder(width=2),
        projector=Projector(16, 8),
        objective=Objective(kernel=("age:gaussian:5",)),
        checkpoint=Checkpoint(every_epochs=1),
        trackers=ALL,
    )
    folder = prepare(run, 2)
    assert forked.train(folder, 2) == [0, 0]
    return folder


def test_a_training_on_two_ranks_has_its_journal_in_every_tracker(trained: Path) -> None:
    steps = [e for e in journal.read(trained) if e["event"] == "step"]
    names = [k for k, v in steps[-1].items() if isinstance(v, float | int) and k not in ("time", "step")]
    assert {"loss", "grad_norm", "lr", "samples_per_s", "data_wait_s", "epoch", "uniformity"} <= set(names)
    assert lost(trained) == []
    (file,) = files_of_wandb(trained)
    for found in (curves_of_tensorboard(trained), curves_of_wandb(file), curves_of_mlflow(trained)):
        for name in names:
            wanted = [(s["step"], pytest.approx(s[name], rel=1e-6)) for s in steps if s.get(name) is not None]
            assert found[name] == wanted, name
    assert len(list((trained / "tensorboard").iterdir())) == 1  # rank 0 alone
    assert mlflow_of(trained)[0].get_run(mlflow_of(trained)[1]).info.status == "FINISHED"


def test_no_subject_of_the_store_is_in_what_the_trackers_wrote(trained: Path, store: Path) -> None:
    from cauc_dist.store.reader import Store

    opened = Store.open(store)
    written = [p for folder in ("tensorboard", "wandb", "mlruns") for p in (trained / folder).rglob("*") if p.is_file()]
    text = b"".join(p.read_bytes() for p in written)
    assert len(text) > 1000
    assert [s for s in {*opened.ids, *opened.subjects} if s.encode() in text] == []


def test_a_training_whose_trackers_all_fail_ends_as_any_other(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "provenance.json"):
        text = (trained / name).read_text().replace(str(trained), str(run))
        (run / name).write_text(text)
    for name in ("tensorboard", "wandb", "mlruns"):
        (run / name).write_text("a file in its place")
    assert forked.train(run, 2) == [0, 0]
    assert [name for name, _ in lost(run)] == ["tensorboard", "wandb", "mlflow"]
    assert [e["loss"] for e in journal.read(run) if e["event"] == "step"] == [
        e["loss"] for e in journal.read(trained) if e["event"] == "step"
    ]


def test_a_training_resumed_before_its_last_steps_has_one_value_a_step(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    (run / "config.json").write_text((trained / "config.json").read_text().replace(str(trained), str(run)))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert forked.train(run, 2) == [0, 0]
    assert [e["step"] for e in journal.read(run) if e["event"] == "resume"] == [3]
    for found in (curves_of_tensorboard(run), curves_of_mlflow(run)):
        assert [step for step, _ in found["loss"]] == list(range(6))
        assert found["loss"] == [
            (e["step"], pytest.approx(e["loss"], rel=1e-6)) for e in journal.read(run) if e["event"] == "step"
        ]
    assert mlflow_of(run)[0].get_run(mlflow_of(run)[1]).info.status == "FINISHED"
    before, after = files_of_wandb(run)
    assert [step for step, _ in curves_of_wandb(after)["loss"]] == [3, 4, 5]
    assert before.name == after.name
