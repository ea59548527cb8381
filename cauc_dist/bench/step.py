"""`cauc bench step`: a step of a recipe on W ranks of this machine, what its seconds go to, what limits it."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cauc_dist import config, memory, prepare, spawn
from cauc_dist.bench.projection import Link
from cauc_dist.bench.rank import ASKED, FOUND, Measured
from cauc_dist.bench.record import keep
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.world import cores

Say = Callable[[str], None]
WORDS = {
    "data": "waiting for scans",
    "augment": "augmenting",
    "encode": "encoding, forward",
    "loss": "the loss and what is watched",
    "backward": "the backward pass",
    "communication": "communication",
    "update": "the update",
    "other": "all else",
}


def ask(folder: Path, run: RunConfig, batches: Sequence[int], count: int, threads: int) -> None:
    """Write what ranks read: into a folder that all of them see."""
    (folder / prepare.CONFIG).write_text(config.to_json(replace(run, run=folder)), encoding="utf-8")
    (folder / ASKED).write_text(json.dumps({"batches": list(batches), "steps": count, "threads": threads}))


def answer(folder: Path) -> list[Measured]:
    """What rank 0 has written."""
    found = json.loads((folder / FOUND).read_text())
    return [Measured(**{**one, "step_s": tuple(one["step_s"]), "link": Link(**one["link"])}) for one in found]


def on_ranks(run: RunConfig, ranks: int, batches: Sequence[int], count: int, threads: int) -> list[Measured]:
    """`steps` on `ranks` processes of this machine; BadInput where they fail, after what they say themselves."""
    with tempfile.TemporaryDirectory(prefix="cauc-bench-") as temporary:
        ask(Path(temporary), run, batches, count, threads)
        code = spawn.start(ranks, temporary, module="cauc_dist.bench.rank", threads=threads)
        if code:
            raise BadInput(
                f"{ranks} ranks ended with code {code}",
                wanted="a step of the recipe",
                do="mend what they say above; where memory is short, set --engine.encode-chunk auto",
            )
        return answer(Path(temporary))


def threads_of(run: RunConfig, ranks: int) -> int:
    """Threads of each of `ranks` ranks on this machine, as in training."""
    return run.engine.threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or max(1, cores() // ranks)


def step(run: RunConfig, ranks: int, *, quick: bool, out: Path | None, say: Say) -> Measured:
    """Measure a step of the run on local ranks and say where its time goes; the last line says what limits it."""
    run = without_folder(run)
    prepare.check(run, ranks)
    (found,) = on_ranks(run, ranks, [run.batch_size], 4 if quick else 15, threads_of(run, ranks))
    for line in table(found):
        say(line)
    verdict = limits(found)
    say(verdict)
    keep(found, verdict, out)
    return found


def without_folder(run: RunConfig) -> RunConfig:
    """The run from scratch, its store named from anywhere."""
    return replace(run, run=None, data=dataclasses.replace(run.data, store=prepare.absolute(run.data.store)))


def table(found: Measured) -> list[str]:
    """The numbers of a step, for people."""
    head = f"{found.run}: batch {found.batch} = {found.ranks} ranks x {found.share}, {found.device}, {found.precision}"
    parts = [f"  {WORDS[part]:<30}{s:>10.4f} s {100 * found.shares[part]:>5.1f} %" for part, s in found.seconds.items()]
    return [
        head,
        f"  {'a step':<30}{found.median_s:>10.4f} s   {found.samples_per_s:,.1f} subjects/s",
        *parts,
        f"  {'peak memory of a rank':<30}{found.peak_bytes / memory.GIB:>10.2f} GiB",
        f"  {'arithmetic of a rank':<30}{found.flop / 1e9:>10.2f} GFLOP, at {100 * found.efficiency:.0f} % of the "
        f"{found.gemm / 1e9:,.0f} GFLOP/s of a bare matrix product",
    ]


def limits(found: Measured) -> str:
    """What limits the step and what to change, in plain words."""
    part = max(found.shares, key=lambda part: found.shares[part])
    arithmetic = found.shares["encode"] + found.shares["backward"]
    if found.shares["data"] > 0.1:
        part = "data"
    elif arithmetic > 0.5:
        part = "encode"
    share = 100 * (arithmetic if part == "encode" else found.shares[part])
    return f"What limits this run: {ADVICE[part].format(share=share, efficiency=100 * found.efficiency)}"


ADVICE = {
    "data": "waiting for scans, {share:.0f} % of a step. Raise --data.threads, copy the store to the node's disk by "
    "--data.stage, or pack it; `cauc bench data STORE` says which.",
    "augment": "augmenting, {share:.0f} % of a step. Turn off the dearest transforms (docs/augment.md), or give a rank "
    "more cores or a GPU.",
    "encode": "the encoder's arithmetic, {share:.0f} % of a step, at {efficiency:.0f} % of the rate of bare matrix "
    "products. More ranks share it (`cauc bench scale`); on GPUs try --engine.precision bf16 and "
    "--engine.channels-last; a narrower encoder or smaller volumes need less of it.",
    "loss": "the loss, {share:.0f} % of a step. It grows with the square of the batch: `cauc bench loss` holds it "
    "against bare matrix products; more ranks share it.",
    "communication": "communication between ranks, {share:.0f} % of a step. More subjects a rank (a larger "
    "--batch-size) send as much for more work; --engine.wire fp16 halves what z takes; check which network is used "
    "(`cauc doctor`).",
    "update": "the optimiser's update, {share:.0f} % of a step. On few ranks --engine.zero-stage 0 is faster.",
    "other": "what is neither encoder nor loss, {share:.0f} % of a step: a batch this small is mostly calls. Raise "
    "--batch-size, or use fewer ranks.",
}
ADVICE["backward"] = ADVICE["encode"]
