"""On an NVIDIA GPU: samples/s, memory, data wait and loss share of DenseNet121-3D at 121x145x121; the largest batch.

    python benchmarks/train_gpu.py --out benchmarks/results/DATE-train-gpu.json     # eight minutes, 2 GB of disk
    python benchmarks/train_gpu.py --table benchmarks/results/DATE-train-gpu.json   # its table again

steps   a step of `Trainer` from a store (read, expand, augment, encode, loss, update), beside a plain PyTorch loop: the
        same network with torch's BatchNorm and AdamW, autocast, the same loss by n x n matrices, one batch that lies on
        the GPU already, nothing augmented, watched or kept. In turn; ratios are of neighbours.
loss    seconds of the loss alone, forward and backward, of the embeddings of that batch.
largest from the memory of two batches the one that should just fit, and one that should not; then chunks (GradCache).
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.loss_gpu import seconds_of
from benchmarks.step import LR, cohort, training
from cauc_dist import optimisers
from cauc_dist.bench import peers as bench
from cauc_dist.config import PRESETS, Augment, Encoder, Objective, Optim, RunConfig
from cauc_dist.config import Engine as Settings
from cauc_dist.encoders import recompute
from cauc_dist.encoders.norm import BatchNorm
from cauc_dist.engine import Engine
from cauc_dist.losses.batch import Batch
from cauc_dist.objective import Objective as Loss
from cauc_dist.provenance import provenance
from cauc_dist.store.reader import Store
from cauc_dist.train import build_model
from cauc_dist.world import World

SHAPE = (121, 145, 121)
GIB = 2**30
NOTHING = Augment(p_intensity=0.0, p_blur=0.0, p_noise=0.0)
KERNEL = ("age:gaussian:5", "sex:delta")


@dataclass(frozen=True)
class Setting:
    name: str
    batch: int
    precision: str = "bf16"
    channels_last: bool = False
    compile: bool = False
    recompute: bool = False
    chunk: int = 0
    augment: str = ""
    """A preset; or nothing."""
    steps: int = 6

    def run(self, threads: int) -> RunConfig:
        engine = Settings(
            device="cuda",
            precision=self.precision,  # type: ignore[arg-type]
            channels_last=self.channels_last,
            compile=self.compile,
            recompute=self.recompute,
        )
        run = RunConfig(
            name="gpu",
            batch_size=self.batch,
            augment=PRESETS[self.augment] if self.augment else NOTHING,
            encoder=Encoder(name="densenet121_3d"),
            objective=Objective(name="cauc", kernel=KERNEL),
            optim=Optim(name="adamw", lr=LR),
            engine=engine,
        )
        return replace(run, data=replace(run.data, threads=threads))


SETTINGS = [
    Setting("fp32", 16, "fp32"),
    Setting("bf16", 32),
    Setting("bf16, channels last", 32, channels_last=True),
    Setting("bf16, channels last, y-Aware's views", 32, channels_last=True, augment="all_tf"),
    Setting("bf16, channels last, recompute", 32, channels_last=True, recompute=True),
    Setting("bf16, channels last, chunks of 8", 32, channels_last=True, chunk=8),
]


def plain(run: RunConfig, shape: tuple[int, ...], y: Tensor) -> Callable[[], Tensor]:
    """A step of plain PyTorch on a batch that stays where it is."""
    model = with_torchs_norm(build_model(run, shape)).cuda().train()
    optimizer = optimisers.make(run.optim, model, LR, fused=True)
    x = torch.randn(2 * run.batch_size, *shape, device="cuda")
    y = y.cuda()

    def step() -> Tensor:
        z = model(x).float()
        loss = dense_cauc(z.view(2, run.batch_size, -1), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def with_torchs_norm(model: nn.Module) -> nn.Module:
    """nn.BatchNorm3d in the place of ours."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchNorm):
                setattr(module, name, nn.BatchNorm3d(child.num_features))
    return model


def opened(run: RunConfig, store: Store, world: World) -> Engine:
    """As `cauc_dist.train` opens it."""
    model = build_model(run, store.shape).train()
    if run.engine.recompute:
        recompute(model)
    if run.engine.compile:
        model.encoder.compile()
    return Engine(model, run, world, world.device("cuda"))


def dense_cauc(z: Tensor, y: Tensor) -> Tensor:
    """The equation with n x n matrices, alignment pooled over views, uniformity a view at a time."""
    age, sex = y.float().T
    w = torch.exp(-((age[:, None] - age) ** 2) / 50) * (sex[:, None] == sex)
    x = z.flatten(0, 1)
    everyones = w.repeat(2, 2).fill_diagonal_(0)
    d = 2 - 2 * x @ x.T
    alignment = (everyones / everyones.sum(1, keepdim=True) * d).sum() / len(x)
    c = 1 - w
    within = 2 - 2 * z @ z.mT
    return 2 * alignment + ((c * torch.exp(-2 * within)).sum((1, 2)) / c.sum()).log().mean()


def measure(setting: Setting, store: Store, world: World, threads: int) -> dict[str, Any]:
    """Ours and plain in turn; each one's peak memory is of the two together unless `alone`."""
    run = setting.run(threads)
    y = torch.from_numpy(store.metadata(run.objective.columns))
    found: dict[str, Any] = {"setting": asdict(setting), "ours": [], "plain": [], "wait": []}
    with ExitStack() as stack:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine, objective = opened(run, store, world), Loss(run.objective, y)
        step = stack.enter_context(training(run, engine, world, store, setting.chunk, objective))
        for k in range(2):
            step(k)
        found["ours_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
        other = None if setting.chunk or setting.recompute else plain(run, store.shape, y[: run.batch_size])
        for k in range(-1, setting.steps):
            torch.cuda.synchronize()
            began = time.perf_counter()
            record = step(k + 3)
            torch.cuda.synchronize()
            took = time.perf_counter() - began
            if k >= 0:
                found["ours"].append(took)
                found["wait"].append(record["data_wait_s"])
            if other:
                began = time.perf_counter()
                other()
                torch.cuda.synchronize()
                if k >= 0:
                    found["plain"].append(time.perf_counter() - began)
        z = torch.nn.functional.normalize(torch.randn(2, run.batch_size, 128, device="cuda"), dim=-1).requires_grad_()
        metadata = y[: run.batch_size].cuda()
        found["loss"] = seconds_of(lambda: torch.autograd.grad(objective.loss(z, metadata, Batch), z), 9)
    if other:
        del engine, step
        clean()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        again = plain(run, store.shape, y[: run.batch_size])
        again()
        found["plain_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
    return found


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def alone(setting: Setting, store: Store, world: World, threads: int) -> dict[str, Any]:
    """Seconds of the last step, and the peak; or that it does not fit."""
    clean()
    torch.cuda.reset_peak_memory_stats()
    run = setting.run(threads)
    try:
        engine = opened(run, store, world)
        objective = Loss(run.objective, torch.from_numpy(store.metadata(run.objective.columns)))
        with training(run, engine, world, store, setting.chunk, objective) as step:
            for k in range(setting.steps):
                record = step(k)
    except torch.cuda.OutOfMemoryError:
        return {"setting": asdict(setting), "fits": False}
    peak = torch.cuda.max_memory_allocated() / GIB
    return {
        "setting": asdict(setting),
        "fits": True,
        "gib": peak,
        "step_s": record["step_s"],
        "wait": record["data_wait_s"],
    }


def largest(store: Store, world: World, threads: int, say: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Two batches, the one that should just fit by their memory, one that should not; then chunks."""
    base = Setting("bf16, channels last", 16, channels_last=True, steps=2)
    found = [alone(replace(base, batch=n), store, world, threads) for n in (16, 48)]
    each = (found[1]["gib"] - found[0]["gib"]) / 32
    room = torch.cuda.get_device_properties(0).total_memory / GIB
    most = int((0.96 * room - found[0]["gib"]) / each) + 16
    for n in (most, int(1.08 * most)):
        found.append(alone(replace(base, batch=n), store, world, threads))
        say(found[-1])
    for n in (128, min(1024, len(store))):
        found.append(alone(replace(base, batch=n, chunk=32, steps=1), store, world, threads))
        say(found[-1])
    return found


def table(record: dict[str, Any]) -> str:
    lines = ["| setting | n | scans/s | over plain | GiB | plain GiB | data wait | loss |", "|" + "---|" * 8]
    for p in record["steps"]:
        took, n = median(p["ours"]), p["setting"]["batch"]
        ratio = f"{median(a / b for a, b in zip(p['ours'], p['plain'], strict=True)):.3f}" if p["plain"] else ""
        lines.append(
            f"| {p['setting']['name']} | {n} | {n / took:.1f} | {ratio} | {p['ours_gib']:.1f} "
            f"| {p.get('plain_gib', float('nan')):.1f} | {sum(p['wait']) / sum(p['ours']):.2%} "
            f"| {median(p['loss']) / took:.2%} |"
        )
    for p in record.get("largest", []):
        s = p["setting"]
        facts = f"{p['gib']:.1f} GiB, {p['step_s']:.2f} s, wait {p['wait']:.2f} s" if p["fits"] else "does not fit"
        lines.append(f"n = {s['batch']}, chunk {s['chunk'] or 'none'}: {facts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--threads", type=int, default=8, help="that read scans")
    parser.add_argument("--scans", type=int, default=1024)
    parser.add_argument("--side", type=int, default=0, help="cubes instead, for a try")
    a = parser.parse_args()
    if a.table:
        print(table(json.loads(a.table.read_text())))
        return
    record: dict[str, Any] = {**provenance(), "device": torch.cuda.get_device_name(), "steps": [], "largest": []}

    def keep(what: str, found: dict[str, Any]) -> None:
        record[what].append(found)
        if a.out:
            bench.save(record, a.out)
        print(json.dumps({k: v for k, v in found.items() if k != "setting"})[:300], flush=True)

    with tempfile.TemporaryDirectory(prefix="cauc-gpu-") as folder:
        began = time.perf_counter()
        store = Store.open(str(cohort(Path(folder), a.scans, a.side or SHAPE)))
        print(f"{a.scans} scans written in {time.perf_counter() - began:.0f} s", flush=True)
        world = World.from_env()
        with world.process_group(world.device("cuda"), 30.0):
            for setting in SETTINGS:
                clean()
                print(setting.name, flush=True)
                keep("steps", measure(setting, store, world, a.threads))
            clean()
            largest(store, world, a.threads, lambda found: keep("largest", found))
    print(table(record))


if __name__ == "__main__":
    main()
