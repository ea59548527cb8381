"""Our objective in the shape of a LightningModule: `python examples/lightning_style.py`.

Lightning is not needed here. With it: derive `Pretraining` from `lightning.LightningModule`, and give it to
`Trainer(strategy="ddp", devices=...)` in place of `fit`. Nothing else changes: Lightning's DDP averages gradients over
ranks, for which the gradient of our loss is made (examples/ddp.py says why).

V views, b subjects of this process, n subjects in the global batch, D width of z.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from cauc_dist import AllGather, kernels, losses
from cauc_dist.losses.batch import Batch, Exchange


class Pretraining(nn.Module):
    """A network with the objective that trains it; a batch is (views (b, V, ...), y (b, k))."""

    def __init__(self, network: nn.Module, kernel: kernels.Kernel, lr: float = 1e-2) -> None:
        super().__init__()
        self.network, self.kernel, self.lr = network, kernel, lr

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) -> z (B, D) of unit rows."""
        return normalize(self.network(x), dim=-1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of the global batch, the same on every process; b is the same on all of them."""
        views, y = batch
        z = self(views.transpose(0, 1).flatten(0, 1)).unflatten(0, (views.shape[1], -1))  # (V, b, D)
        exchange: Exchange = AllGather(len(y) * dist.get_world_size()) if dist.is_initialized() else Batch
        y_all = exchange(z).everyone(y)  # (n, k)
        return losses.cauc(z, y_all, self.kernel, exchange=exchange)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def fit(module: Pretraining, batches: list[tuple[Tensor, Tensor]], epochs: int) -> list[float]:
    """What Lightning's Trainer does on one process; the mean loss of each epoch."""
    optimiser, means = module.configure_optimizers(), []
    for _ in range(epochs):
        found = []
        for i, batch in enumerate(batches):
            loss = module.training_step(batch, i)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        means.append(sum(found) / len(found))
    return means


def main() -> None:
    torch.manual_seed(0)
    ages = 20 + 60 * torch.rand(4, 24, 1)
    views = (ages / 20)[:, :, None] * torch.randn(16) + 0.3 * torch.randn(4, 24, 2, 16)  # (batches, b, V, features)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    means = fit(Pretraining(network, kernels.gaussian(5.0)), list(zip(views, ages, strict=True)), epochs=5)
    for epoch, loss in enumerate(means):
        print(f"epoch {epoch}: loss {loss:.5f}")


if __name__ == "__main__":
    main()
