"""The command line, as a user types it: what it answers, with which code, and that bad input leaves nothing behind."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cauc_dist.cli import BENCH, COMMANDS, STORE, main
from cauc_dist.store.reader import Store

SMALL = [
    "--epochs",
    "1",
    "--optim.warmup-epochs",
    "0",
    "--batch-size",
    "6",
    "--encoder.width",
    "2",
    "--projector.hidden",
    "8",
    "--projector.out",
    "4",
]


def cauc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cauc_dist", *arguments], capture_output=True, text=True, timeout=100)


def test_help_names_every_command_and_recipe_and_imports_no_torch() -> None:
    from cauc_dist.recipes import recipes

    code = (
        "import sys; from cauc_dist.cli import main; main(['--help']);"
        "sys.exit(bool({'torch', 'zarr', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in [*COMMANDS, *recipes()])


@pytest.mark.parametrize(
    "command",
    [*sorted(COMMANDS.keys() - {"store", "bench"}), *(f"store {n}" for n in STORE), *(f"bench {n}" for n in BENCH)],
)
def test_every_command_explains_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert f"usage: cauc {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_store_lists_its_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", *arguments]) == 0
    assert all(name in capsys.readouterr().out for name in ["usage: cauc store"])


def test_an_unknown_store_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "verfy"]) == 2
    assert "no command 'store verfy'; wanted a command. Did you mean verify?" in capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from cauc_dist import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cauc-dist {__version__}\n"


def test_an_unknown_option_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "demo_cauc", "--optim.lrr", "3"])
    assert end.value.code == 2
    assert "--optim.lr FLOAT" in capsys.readouterr().err


def edited(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    return apply


def without_scan(folder: Path) -> None:
    shutil.rmtree(folder / "sub-0003")


def truncated(folder: Path) -> None:
    scan = folder / "sub-0003" / "anat" / "sub-0003_T1w.nii.gz"
    scan.write_bytes(scan.read_bytes()[:500])


def other_shape(folder: Path) -> None:
    nib.save(
        nib.Nifti1Image(np.ones((9, 9, 9), "f4"), np.eye(4) * 12), folder / "sub-0003" / "anat" / "sub-0003_T1w.nii.gz"
    )


INGEST = {
    "no participants.tsv": (lambda folder: (folder / "participants.tsv").unlink(), "participants.tsv"),
    "a text in a number column": (
        edited("participants.tsv", lambda text: text.replace(text.splitlines()[4].split("\t")[1], "old")),
        "old",
    ),
    "a scan of another shape": (other_shape, "shapes"),
}


@pytest.mark.parametrize("case", sorted(INGEST))
def test_ingest_refuses_bad_input_with_code_2_and_leaves_nothing(
    case: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, named = INGEST[case]
    shutil.copytree(cohort, tmp_path / "bids")
    spoil(tmp_path / "bids")
    assert main(["ingest", str(tmp_path / "bids"), str(tmp_path / "out" / "store.zarr")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error
    assert "; wanted " in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bids"]


ASIDE = {
    "a participant without scan": (without_scan, "no "),
    "a scan without participant": (
        edited("participants.tsv", lambda text: "\n".join(r for r in text.splitlines() if "sub-0003" not in r)),
        "no row",
    ),
    "an unreadable NIfTI": (truncated, "unreadable"),
}


@pytest.mark.parametrize("case", sorted(ASIDE))
def test_ingest_keeps_the_rest_and_says_by_code_4_that_scans_were_set_aside(
    case: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = ASIDE[case]
    shutil.copytree(cohort, tmp_path / "bids")
    spoil(tmp_path / "bids")
    assert main(["ingest", str(tmp_path / "bids"), str(tmp_path / "store.zarr")]) == 4
    said = capsys.readouterr().out
    assert "23 scans of 16x16x16" in said
    assert re.search(f"set aside: sub-0003: .*{reason}", said)
    assert "sub-0003" not in Store.open(tmp_path / "store.zarr").ids


def test_ingest_of_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ingest", str(tmp_path / "none"), str(tmp_path / "store.zarr")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ingest_prints_a_summary_and_refuses_a_taken_store(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ingest", str(cohort), str(tmp_path / "store.zarr")]
    assert main(command) == 0
    assert "24 scans of 16x16x16" in capsys.readouterr().out
    assert main(command) == 2
    assert "store.zarr" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_and_writes_nothing(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ingest", str(cohort), str(tmp_path / "store.zarr"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "24 scans of 24 subjects" in said
    assert "packed f16, codec none, 16x16x16 each, in 1 shards" in said
    assert "age (number), sex (category), site (category)" in said
    assert list(tmp_path.iterdir()) == []


def test_the_tasks_of_an_array_make_one_store_and_the_last_one_says_so(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ingest", str(cohort), str(tmp_path / "store.zarr"), "--layout", "dense", "--task"]
    assert main([*command, "1/2"]) == 0
    assert "task 1/2 has done its share" in capsys.readouterr().out
    assert not (tmp_path / "store.zarr").exists()
    assert main([*command, "0/2"]) == 0
    assert "24 scans of 16x16x16" in capsys.readouterr().out


@pytest.mark.parametrize(("task", "message"), [("2/2", "task 2/2; wanted 0/n to n-1/n"), ("1", "--task 1; wanted I/N")])
def test_a_task_that_is_none_is_refused(
    task: str, message: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ingest", str(cohort), str(tmp_path / "store.zarr"), "--task", task]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_cohort_in_two_parts_is_one_store_with_a_split_that_a_run_trains_on(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, first = str(tmp_path / "store.zarr"), tmp_path / "first"
    shutil.copytree(cohort, first)
    shutil.rmtree(first / "sub-0003")
    assert main(["ingest", str(first), store, "--layout", "dense"]) == 4
    assert main(["store", "append", str(cohort), store]) == 4  # 23 are there already
    assert len(Store.open(store)) == 24
    assert main(["store", "split", store, "--parts", "train=.75", "test=.25", "--by", "sex", "age"]) == 0
    said = capsys.readouterr().out
    assert "train: 18 subjects, 18 scans" in said
    assert "test: 6 subjects, 6 scans" in said
    run = ["train", "demo_cauc", "--data.store", store, "--data.split", "split", "--data.balance", "site"]
    run += ["--batch-size", "8", "--epochs", "3", "--run", str(tmp_path / "run"), "--no-start", "--preset", "cutout"]
    assert main(run) == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["augment"]["p_cutout"], written["augment"]["p_blur"]) == (1.0, 0.0)
    assert main(["store", "split", store]) == 2
    assert "has a column split; wanted a new one" in capsys.readouterr().err


def test_a_sound_store_is_told_and_verified_and_a_changed_byte_is_code_1(
    store: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "info", str(store), "--out", str(tmp_path / "info.html")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\b24\b", said)
    assert "age" in said
    assert "<html" in (tmp_path / "info.html").read_text()
    assert main(["store", "verify", str(store), "--sources", str(cohort)]) == 0
    assert "sound. 24 scans read" in capsys.readouterr().out
    shutil.copytree(store, tmp_path / "copy")
    shard = next(p for p in (tmp_path / "copy" / "volumes").rglob("*") if p.is_file() and p.name != "zarr.json")
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    assert main(["store", "verify", str(tmp_path / "copy")]) == 1
    assert "1 faults, 24 scans read" in capsys.readouterr().out


def test_a_montage_without_a_page_is_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "info", str(store), "--montage"]) == 2
    assert "--montage without --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "train"], "--parts train; wanted PART=SHARE"),
        (["--parts", "train=.5", "test=.2"], "wanted numbers of 0 or more that add up to 1"),
        (["--by", "agee"], "no column 'agee'"),
    ],
)
def test_a_split_that_is_none_is_refused(
    arguments: list[str], message: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "split", str(store), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_preview_shows_the_views_of_a_recipe_and_a_preset(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheets = []
    for name, chosen in (("a", ["--recipe", "demo_cauc"]), ("b", ["--preset", "cutout", "--augment.cutout", ".5"])):
        out = tmp_path / f"{name}.png"
        assert main(["augment-preview", str(store), *chosen, "--scans", "2", "--out", str(out)]) == 0
        assert f"wrote {out}" in capsys.readouterr().out
        sheets.append(out.read_bytes())
    assert all(sheet.startswith(b"\x89PNG") for sheet in sheets)
    assert sheets[0] != sheets[1]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--preset", "cutot"], "no preset 'cutot'"), (["--scans", "0"], "--scans 0")]
)
def test_a_preview_of_nothing_is_refused(
    arguments: list[str], message: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["augment-preview", str(store), *arguments]) == 2
    assert message in capsys.readouterr().err


TRAIN = {
    "no store": (["--data.store", "none.zarr"], "no store at none.zarr"),
    "a batch smaller than the world": (
        ["--batch-size", "3", "--ranks", "4"],
        "batch_size 3 over 4 ranks",
    ),
    "lars on pieces of layers": (
        ["--optim.name", "lars"],
        "optim.name lars with engine.zero_stage 1, where ZeRO cuts its layers to pieces; wanted a stage up to 0",
    ),
    "double precision that is added in single": (
        ["--engine.precision", "fp64"],
        "engine.precision fp64 with engine.zero_stage 1, where ZeRO adds gradients in fp32",
    ),
    "an average of weights that no rank holds": (
        ["--optim.ema", ".9", "--engine.zero-stage", "3"],
        "optim.ema with engine.zero_stage 3, where no rank holds all weights; wanted a stage up to 2",
    ),
    "an average that never moves": (["--optim.ema", "1"], "optim.ema 1.0; wanted in [0, 1)"),
    "a chunk of nobody": (["--engine.encode-chunk", "0"], "engine.encode_chunk 0; wanted 1 or more"),
    "a rate scaled from nowhere": (
        ["--optim.lr-scaling", "sqrt"],
        "optim.lr_scaling sqrt without optim.reference_batch",
    ),
    "no file of settings": (["--engine.deepspeed", "none.json"], "none.json: [Errno 2] No such file"),
    "a batch larger than the training part": (["--batch-size", "20"], "batch_size 20 for 18 training subjects"),
    "an unknown column": (["--objective.kernel", "ag:gaussian:5"], "no column 'ag'"),
    "a kernel that is no kernel": (["--objective.kernel", "age:gausian:5"], "gausian"),
    "no kernel": (["--objective.kernel"], "objective cauc without a kernel"),
    "no rank": (["--ranks", "0"], "--ranks 0"),
    "an encoder that does not fit": (["--encoder.name", "densenet121_3d"], "densenet121_3d"),
    "a kernel of distances on a text column": (
        ["--objective.kernel", "sex:gaussian:1"],
        "kernel sex:gaussian:1 on sex",
    ),
    "no checkpoint kept": (["--checkpoint.keep", "0"], "checkpoint.keep 0"),
    "no such split": (["--data.split", "sex"], "column sex of"),
    "weights that are not there": (["--data.weights", "nothing"], "no column 'nothing'"),
    "weights of texts": (["--data.weights", "sex"], "column sex of texts as weights"),
    "a stage that is not set": (["--data.stage", "$NOT_SET_HERE"], "data.stage $NOT_SET_HERE"),
    "no reader thread": (["--data.threads", "0"], "data.threads 0"),
    "a batch of one": (["--batch-size", "1"], "batch_size 1"),
    "a warm-up that does not end": (["--optim.warmup-epochs", "3"], "optim.warmup_epochs 3.0 of 1 epochs"),
    "a run below a file": (["--run", "pyproject.toml/x"], "Check the path"),
    "a kernel without its kind": (["--objective.kernel", "age"], "age"),
    "an objective of distances on a text column": (
        ["--objective.name", "rank_n_contrast", "--objective.kernel", "site:delta"],
        "kernel site:delta on site",
    ),
    "betas out of range": (["--optim.betas", "2", "3"], "optim.betas (2.0, 3.0)"),
    "an infinite learning rate": (["--optim.lr", "inf"], "optim.lr inf"),
    "a negative seed": (["--seed", "-1"], "seed -1"),
    "no epoch": (["--epochs", "0"], "epochs 0"),
    "a transform that does not fit": (["--augment.p-grey", "0.5"], "p_grey"),
    "a fold that is none": (["--data.fold", "4"], "fold 4 of 4"),
}


@pytest.mark.parametrize("case", sorted(TRAIN))
def test_train_refuses_bad_settings_with_code_2_and_leaves_nothing(
    case: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = TRAIN[case]
    run = tmp_path / "runs" / "x"
    assert main(["train", "demo_cauc", "--run", str(run), *SMALL, "--data.store", str(store), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_constant_column_is_refused(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(cohort, tmp_path / "bids")
    rows = (tmp_path / "bids" / "participants.tsv").read_text().splitlines()
    text = "\n".join([rows[0] + "\tscanner", *(row + "\t3" for row in rows[1:])])
    (tmp_path / "bids" / "participants.tsv").write_text(text)
    assert main(["ingest", str(tmp_path / "bids"), str(tmp_path / "store.zarr")]) == 0
    command = [
        "train",
        "demo_cauc",
        "--data.store",
        str(tmp_path / "store.zarr"),
        "--run",
        str(tmp_path / "run"),
        *SMALL,
    ]
    assert main([*command, "--objective.kernel", "scanner:gaussian:1"]) == 2
    assert "column scanner of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_version_is_refused(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(store, tmp_path / "store.zarr")
    path = tmp_path / "store.zarr" / "zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["version"] = 99
    path.write_text(json.dumps(group))
    command = ["train", "demo_cauc", "--data.store", str(tmp_path / "store.zarr"), "--run", str(tmp_path / "run")]
    assert main([*command, *SMALL]) == 2
    assert " 99 " in capsys.readouterr().err


def test_a_recipe_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "`cauc train` without a recipe" in capsys.readouterr().err


def test_a_config_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "none/config.json"]) == 2
    assert "no file none/config.json" in capsys.readouterr().err


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["probe", "report"])
def test_an_output_that_has_no_folder_is_refused_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path), "--out", str(tmp_path / "no" / "x")]) == 2
    assert f"no folder {tmp_path / 'no'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "--ranks 0"),
        (["--ranks", "33"], "batch_size 32 over 33 ranks"),
        (["--subjects", "20"], "--subjects 20"),
        (["--size", "8"], "--size 8"),
    ],
)
def test_the_demo_refuses_what_cannot_work_before_it_writes(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--folder", str(tmp_path / "demo"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(("options", "message"), [(["--ranks", "0"], "--ranks 0"), (["--ranks", "-1"], "--ranks -1")])
def test_verify_wants_a_rank(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *options]) == 2
    error = capsys.readouterr().err
    assert f"{message}; wanted 1 or more processes" in error
    assert error.count("\n") == 1


def test_verify_on_cuda_wants_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["verify", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "no CUDA device; wanted a GPU, since --device is cuda. Use --device cpu" in error
    assert error.count("\n") == 1


def test_verify_prints_a_table_and_what_was_compared() -> None:
    done = cauc("verify", "--device", "cpu", "--exchange", "ring")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert " ".join(lines[0].split()) == "objective n 2 ranks 1 process norm ratio 1 - cosine"
    assert len({line.index("ok") for line in lines[1:-1]}) == 1  # aligned
    assert "2 ranks on 1 host (CPU fp32, gloo, exchange ring, torch 2." in lines[-1]
    assert lines[-1].endswith("against 1 process (CPU float64): all equal to 1e-05")


@pytest.mark.parametrize("command", ["probe", "report"])
def test_a_command_on_runs_wants_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(tmp_path)]) == 2
    assert "no config.json in" in capsys.readouterr().err


def test_train_resume_probe_report_one_after_the_other(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    done = cauc("train", "demo_cauc", "--data.store", str(store), "--run", str(run), "--ranks", "2", *SMALL)
    assert done.returncode == 0, done.stderr
    assert f"run folder {run}" in done.stdout
    assert "batch 6 = 2 ranks x 3, 1 epochs x 3 steps, 18 scans (6 held out)" in done.stdout
    record = json.loads((run / "provenance.json").read_text())
    assert {"versions", "git", "seed", "fingerprint", "command"} <= set(record)
    assert record["versions"]["torch"].startswith("2.")

    taken = cauc("train", "demo_cauc", "--data.store", str(store), "--run", str(run), *SMALL)
    assert taken.returncode == 2
    assert f"run folder {run} exists already" in taken.stderr

    again = cauc("train", str(run / "config.json"), "--run", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    configs = [json.loads((folder / "config.json").read_text()) for folder in (run, tmp_path / "again")]
    assert {k: v for k, v in configs[0].items() if k != "run"} == {k: v for k, v in configs[1].items() if k != "run"}

    resumed = cauc("resume", str(run), "--ranks", "3")
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 3" in resumed.stdout

    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"width": 2', '"width": 4'))
    other = cauc("resume", str(run), "--ranks", "2")
    assert other.returncode == 2
    assert "holds the architecture" in other.stderr
    assert other.stderr.count("\n") == 1
    (run / "config.json").write_text(text)

    probed = cauc("probe", str(run), str(tmp_path / "again"), "--columns", "age", "sex")
    assert probed.returncode == 0, probed.stderr
    rows = [line.split()[0] for line in probed.stdout.splitlines() if "[" in line]
    assert rows.count("demo_cauc") == 2  # told apart by their folders
    assert {"untrained", "raw"} <= set(rows)

    page = tmp_path / "page.html"
    reported = cauc("report", str(run), "--out", str(page))
    assert reported.returncode == 0, reported.stderr
    assert "balanced acc." in page.read_text()
