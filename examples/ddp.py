"""Our objective in a plain PyTorch DDP loop: each rank has a share of the batch, the loss is that of all of it.

    torchrun --nproc-per-node 2 examples/ddp.py [WEIGHTS.pt]

1, 2 or 4 ranks print the same losses and end with the same weights, but for rounding.

WHY NO FACTOR STANDS BEFORE THE LOSS. L depends on the n rows z_i of all ranks. Rank r back-propagates into its own rows
alone, and `AllGather` hands these W dL/dz_i rather than dL/dz_i. DDP averages what the ranks find:

    1/W sum_r (sum_i of r  W dL/dz_i dz_i/dtheta) = sum_i of all  dL/dz_i dz_i/dtheta = dL/dtheta

So step as with any DDP loss: neither times W nor over W, and no average of the loss, which is the same on every rank. A
loop that SUMS gradients over ranks itself divides by W.

V views, b subjects of this rank, W ranks, n = b W subjects in the global batch, D width of z.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cauc_dist import AllGather, kernels, losses

N, FEATURES, BATCH_SIZE, EPOCHS = 96, 16, 24, 4


class People(Dataset[tuple[Tensor, Tensor]]):
    """Made-up people: features that turn with age, and two noisy views of them, the same on whichever rank."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.ages = 20 + 60 * torch.rand(N, 1, generator=draw)
        self.features = torch.sin(self.ages / 20 + 3 * torch.rand(FEATURES, generator=draw))
        self.epoch = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Views (V, FEATURES) and metadata (1,)."""
        draw = torch.Generator().manual_seed(self.epoch * N + i)
        return self.features[i] + 0.1 * torch.randn(2, FEATURES, generator=draw), self.ages[i]


def network() -> nn.Module:
    """No BatchNorm: its statistics would be those of a rank's share (or wrap it by SyncBatchNorm)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 8))


def train() -> tuple[list[float], nn.Module]:
    """The mean loss of each epoch, the same on every rank, and the trained network."""
    world_size = dist.get_world_size()
    people, model = People(), DistributedDataParallel(network())
    sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(people, seed=0, drop_last=True)
    loader = DataLoader(people, BATCH_SIZE // world_size, sampler=sampler, drop_last=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)  # Adam would hide a wrong factor
    kernel = kernels.gaussian(5.0)  # years
    exchange = AllGather(BATCH_SIZE)
    means = []
    for epoch in range(EPOCHS):
        people.epoch = epoch
        sampler.set_epoch(epoch)
        found = []
        for views, y in loader:  # (b, V, FEATURES), (b, 1)
            z = normalize(model(views.transpose(0, 1)), dim=-1)  # (V, b, D), one forward pass for all views
            y_all = exchange(z).everyone(y)  # (n, 1), in the order of the ranks
            loss = losses.cauc(z, y_all, kernel, exchange=exchange)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        means.append(sum(found) / len(found))
    return means, model.module


def main() -> None:
    dist.init_process_group("gloo")  # on GPUs "nccl", with model, views and y on this rank's device
    means, model = train()
    if dist.get_rank() == 0:
        for epoch, loss in enumerate(means):
            print(f"epoch {epoch}: loss {loss:.5f}")
        if len(sys.argv) > 1:
            torch.save(model.state_dict(), sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
