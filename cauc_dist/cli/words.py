"""What each command is, in a line, and how it is used: said by --help, by the completion and by docs/cli.md."""

from collections.abc import Sequence
from typing import TypeVar

from cauc_dist.cli import voice

COMMANDS = {
    "demo": "the whole chain on a synthetic cohort: data, store, three trainings, probes, report",
    "doctor": "this machine, line by line: versions, GPUs, network, disk, SLURM, a store; each fault with its mend",
    "ingest": "scans and their metadata (BIDS, OpenBHB, .npy, tables, CIFAR-100) -> a Zarr store",
    "store": "info, verify, append, split: what is in a store, whether it is sound, more scans, a split by subject",
    "augment-preview": "a contact sheet of random views of a store's scans, as PNG",
    "train": "pre-train an encoder: a recipe (or a run's config.json), any field overridden, on --ranks processes",
    "resume": "go on with a run from its newest sound checkpoint",
    "probe": "linear probes of frozen features on held-out subjects, beside an untrained encoder",
    "finetune": "a run's encoder trained further, end to end, to tell one column; beside its frozen probe",
    "embed": "the representations of every scan of a store, by a run or an exported encoder, as npz and tsv",
    "export": "the encoder of a run's newest sound checkpoint, alone, for cauc_dist.load_encoder",
    "report": "one HTML page: what was run, the curves, the maps and the probe table of one or several runs",
    "reproduce": "a study: methods x seeds x splits, each run once, then one table with intervals, tests and figures",
    "verify": "on this machine, every objective on --ranks processes against one: value and gradient",
    "bench": "data, loss, step, scale: what limits a run on this machine, and what more ranks would give",
    "completion": "a script for the shell that completes commands, options and recipes",
}
STORE = {
    "info": "what a store holds: its form, sources, metadata with histograms; --out PAGE.html for a page",
    "verify": "read every byte: checksums of chunks, statistics, and with --sources the files that it was made from",
    "append": "add the scans of another source to a store, in the store's own form",
    "split": "deal the subjects into train, validation, test ..., kept as a column of the store",
}
BENCH = {
    "data": "scans a second from a store, beside copies in memory and the disk; --made: beside other libraries",
    "loss": "what the objective of a recipe costs at its batch, beside its bare products of matrices",
    "step": "where the seconds of a step go, on --ranks processes",
    "scale": "steps on the ranks of this machine, and a projection of speed and cost to 1 ... 1,024 ranks",
}
EXAMPLES = {
    "demo": ["cauc demo --folder demo/first", "cauc demo --quick --folder demo/quick"],
    "doctor": ["cauc doctor", "cauc doctor --store stores/mine.zarr --json"],
    "ingest": [
        "cauc ingest my_bids stores/mine.zarr --dry-run",
        "cauc ingest my_bids stores/mine.zarr --shape 121 145 121 --missing 'age=-1'",
        "cauc ingest roi.tsv stores/roi.zarr --table participants.tsv",
    ],
    "store info": ["cauc store info stores/mine.zarr", "cauc store info stores/mine.zarr --out info.html --montage"],
    "store verify": ["cauc store verify stores/mine.zarr --sources my_bids"],
    "store append": ["cauc store append second_site stores/mine.zarr"],
    "store split": ["cauc store split stores/mine.zarr --parts train=.8 test=.2 --by age sex"],
    "augment-preview": ["cauc augment-preview stores/mine.zarr --recipe cauc_bhb --out views.png"],
    "train": [
        "cauc train demo_cauc --data.store stores/mine.zarr --run runs/mine --ranks 2",
        "cauc train demo_cauc --data.store stores/mine.zarr --objective.kernel age:gaussian:5 sex:delta",
        "cauc train runs/mine/config.json --seed 1 --run runs/again",
    ],
    "resume": ["cauc resume runs/mine", "cauc resume runs/mine --ranks 8"],
    "probe": ["cauc probe runs/mine runs/other", "cauc probe runs/mine --few-labels 100 300 --geometry"],
    "finetune": ["cauc finetune runs/mine --target age --scratch"],
    "embed": ["cauc embed runs/mine features/mine --ranks 2"],
    "export": ["cauc export runs/mine encoders/mine"],
    "report": ["cauc report runs/mine runs/other --out compared.html", "cauc report runs/mine --serve"],
    "reproduce": ["cauc reproduce ixi_roi --seeds 1", "cauc reproduce ixi_roi --only tables"],
    "verify": ["cauc verify --ranks 3"],
    "bench data": ["cauc bench data stores/mine.zarr", "cauc bench data --made --quick"],
    "bench loss": ["cauc bench loss demo_cauc --data.store stores/mine.zarr --batch-size 512"],
    "bench step": ["cauc bench step demo_cauc --data.store stores/mine.zarr --ranks 2"],
    "bench scale": ["cauc bench scale demo_cauc --data.store stores/mine.zarr --gbits 25 --latency-us 20"],
    "completion": ["source <(cauc completion bash)", "cauc completion fish > ~/.config/fish/completions/cauc.fish"],
}
CODES = {
    0: "done",
    1: "a fault that `store verify`, `verify` or `doctor` found, or one of cauc-dist itself",
    2: "bad input, or a file that cannot be read or written",
    3: "a loss that is not a number: stopped, the newest checkpoint holds",
    4: "done, some scans set aside",
    5: "stopped by a signal, after a checkpoint: `cauc resume` goes on",
    6: "another rank is gone: `cauc resume` goes on",
    130: "interrupted",
}
T = TypeVar("T")


def parse(kind: type[T], command: str, arguments: Sequence[str], default: T | None = None) -> T:
    """The options of `cauc COMMAND`; its --help ends with examples."""
    group, _, name = command.partition(" ")
    text = {"store": STORE, "bench": BENCH}[group][name] if name else COMMANDS[command]
    text = "\n".join([text, "", *(f"$ {example}" for example in EXAMPLES[command])])
    return voice.options(kind, f"cauc {command}", text, arguments, default)
