"""The public names cost nothing until they are used, and the examples do what they say, on several ranks too."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import cauc_dist
from tests.ranks import run_ranks

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: object, cwd: Path) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dense(z: Tensor, ages: Tensor, sigma: float = 5.0, t: float = 2.0) -> Tensor:
    """Conditional alignment by rows, times t, plus conditional uniformity within views: z (V, n, D), ages (n, 1)."""
    views, n, _ = z.shape
    w, off = torch.exp(-((ages - ages.T) ** 2) / (2 * sigma**2)), 1 - torch.eye(views * n, dtype=z.dtype)
    pooled, e = w.repeat(views, views) * off, z.flatten(0, 1)
    align = ((pooled * (e[:, None] - e[None]).square().sum(-1)).sum(1) / pooled.sum(1)).mean()
    c = 1 - w
    unif = [(c * torch.exp(-t * (v[:, None] - v[None]).square().sum(-1))).sum().div(c.sum()).log() for v in z]
    return t * align + torch.stack(unif).mean()


# ---- names --------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_beyond_the_standard_library(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import cauc_dist; dir(cauc_dist)\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    assert run("-c", code, cwd=tmp_path) == "['cauc_dist']\n"


def test_recipes_and_settings_bring_no_torch(tmp_path: Path) -> None:
    code = "import sys, cauc_dist as c; c.recipes.get('demo_cauc'); c.RunConfig; assert 'torch' not in sys.modules"
    run("-c", code, cwd=tmp_path)


def test_the_public_names_are_few_and_each_is_there() -> None:
    assert cauc_dist.__all__ == [
        "AllGather",
        "ContrastiveEncoder",
        "RunConfig",
        "Store",
        "kernels",
        "load_encoder",
        "losses",
        "recipes",
    ]
    for name in cauc_dist.__all__:
        assert getattr(cauc_dist, name).__name__.removeprefix("cauc_dist.") == name
        assert name in dir(cauc_dist)


# ---- examples -----------------------------------------------------------------------------------------------------


def test_five_lines_lead_from_a_store_to_embeddings(store: Path, tmp_path: Path) -> None:
    told = run(EXAMPLES / "five_lines.py", store, "h.npy", cwd=tmp_path)
    h = np.load(tmp_path / "h.npy")
    assert f"24 scans, {h.shape[1]} numbers each; 18 of them were trained on" in told
    assert h.shape[0] == 24
    assert np.isfinite(h).all()
    assert len(np.unique(h, axis=0)) == 24


def alone(ddp: ModuleType) -> tuple[list[float], nn.Module]:
    """The training of the example in one process: no DDP, no exchange, the loss by its formula in float64."""
    people, model = ddp.People(), ddp.network().double()
    optimiser, means = torch.optim.SGD(model.parameters(), lr=0.05), []
    for epoch in range(ddp.EPOCHS):
        people.epoch, found = epoch, []
        order = torch.randperm(ddp.N, generator=torch.Generator().manual_seed(epoch))  # as DistributedSampler draws
        for rows in order.split(ddp.BATCH_SIZE):
            items = [people[int(i)] for i in rows]
            views = torch.stack([item[0] for item in items], dim=1).double()
            loss = dense(normalize(model(views), dim=-1), torch.stack([item[1] for item in items]).double())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        means.append(sum(found) / len(found))
    return means, model


def test_two_ranks_of_ddp_end_with_the_weights_of_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    told = run(*torchrun, EXAMPLES / "ddp.py", "weights.pt", cwd=tmp_path)
    means, model = alone(example("ddp"))
    np.testing.assert_allclose([float(line.split()[-1]) for line in told.splitlines()], means, atol=2e-5)
    assert means[-1] < means[0] - 0.1
    found, start = torch.load(tmp_path / "weights.pt", weights_only=True), example("ddp").network().state_dict()
    for name, wanted in model.state_dict().items():
        assert (wanted - start[name]).abs().max() > 1e-3  # it was trained
        torch.testing.assert_close(found[name].double(), wanted, rtol=0, atol=2e-6)


def test_the_lightning_style_module_trains(tmp_path: Path) -> None:
    told = run(EXAMPLES / "lightning_style.py", cwd=tmp_path)
    losses = [float(line.split()[-1]) for line in told.splitlines()]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)


class Wrapped(nn.Module):
    """As Lightning's DDP strategy has it: the forward of what is wrapped is the training step."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: object) -> Tensor:
        loss: Tensor = self.module.training_step(*arguments)  # type: ignore[operator]
        return loss


def people(n: int = 12) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(n, 2, 5, generator=draw, dtype=torch.float64), 20 + 60 * torch.rand(
        n, 1, generator=draw
    ).double()


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(5, 4, dtype=torch.float64)


def stepped() -> tuple[float, list[Tensor]]:
    """The training step's loss and gradients on one of several ranks."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    module = example("lightning_style").Pretraining(linear(), cauc_dist.kernels.gaussian(5.0))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    views, y = (x.chunk(world_size)[rank] for x in people())
    wrapped = DistributedDataParallel(Wrapped(module))  # it must live until the backward pass
    loss = wrapped((views, y), 0)
    loss.backward()
    return loss.item(), [p.grad for p in module.parameters()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_training_step_on_several_ranks_has_the_loss_and_gradient_of_one_process(world_size: int) -> None:
    network, (views, y) = linear(), people()
    wanted = dense(normalize(network(views.transpose(0, 1)), dim=-1), y)
    wanted.backward()
    for loss, grads in run_ranks(world_size, stepped):
        assert loss == pytest.approx(wanted.item(), abs=1e-9)
        for found, p in zip(grads, network.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad, rtol=0, atol=1e-9)


# ---- docs/api-python.md -------------------------------------------------------------------------------------------


def test_the_page_says_every_public_name_and_its_lines_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cauc_dist.cli import main

    text = (EXAMPLES.parent / "docs" / "api-python.md").read_text()
    table = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    assert sorted(name for line in table for name in re.findall(r"`(\w+)`", line)) == sorted(cauc_dist.__all__)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store.zarr").symlink_to(store)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "sh", "python", "python"]
    for kind, lines in blocks:
        if kind == "python":
            exec(lines, names)
        else:
            assert main(lines.split()[1:]) == 0
    assert names["h"].shape == (2, names["encoder"].width)
    assert names["network"].weight.grad.abs().max() > 0
