"""Recipes on CIFAR-100: a GPU's, and small ones for CPU cores. Metadata: the 20 coarse classes, by a delta kernel.

The kernel is our choice. y-Aware InfoNCE under it is SupCon. `supcon_fine`, which is given the 100 classes, is an upper
bound of what labels can give, no competitor.
Store: `cauc ingest $CAUC_DATA/cifar-100-python stores/cifar100.zarr`; its columns `final` and `small` are made by
`cauc reproduce cifar100 --only check` and `cifar100_small --only check` (cauc_dist/studies/cifar100.py).
"""

import dataclasses

from cauc_dist.config import PRESETS, Checkpoint, Data, Encoder, Engine, Objective, Optim, Projector, RunConfig
from cauc_dist.recipes.family import Recipe, family

COARSE, FINE = "coarse:delta", "fine:delta"


def cifar100() -> RunConfig:
    """ResNet-18 with a stem for 32x32 on 45,000 images, SimCLR's augmentation, batch 512; classes by a delta kernel.

    Source: network and augmentation arXiv 2002.05709, B.9; the rest ours, tuned on nothing. Adam's steps, since these
    losses' gradients differ in size by orders of magnitude. Choose --epochs by the time that there is.
    Time: about 100 epochs in an hour of one GPU is our guess; one GPU of 24 GB or more. Result: not run yet.
    """
    return RunConfig(
        name="cifar100",
        epochs=100,
        batch_size=512,
        data=Data(store="stores/cifar100.zarr", split="final", normalise="none", threads=4, prefetch=4),
        augment=dataclasses.replace(PRESETS["simclr_2d"], white=255.0),
        encoder=Encoder(name="resnet18_2d"),
        objective=Objective(kernel=(COARSE,), lambda_align=1.5),
        optim=Optim(lr=1e-3, weight_decay=1e-2, warmup_epochs=2),
        engine=Engine(precision="bf16", channels_last=True),
        checkpoint=Checkpoint(every_epochs=20, keep=1),
    )


def cifar100_small() -> RunConfig:
    """The same on 6,000 images with 16 channels in place of 64, batch 128, in fp32: for one CPU core.

    Source: ours; width and epochs by time (docs/reproduce.md). Time: four to five minutes of one core (.8 s a step),
    with its probes below six. Result: docs/reproduce.md, study cifar100_small.
    """
    run = cifar100()
    return dataclasses.replace(
        run,
        epochs=6,
        batch_size=128,
        data=dataclasses.replace(run.data, split="small", threads=1, prefetch=2),
        encoder=Encoder(name="resnet18_2d", width=16),
        projector=Projector(hidden=256, out=128),
        optim=dataclasses.replace(run.optim, warmup_epochs=1),
        engine=Engine(device="cpu", channels_last=True, threads=1),
        checkpoint=Checkpoint(every_epochs=4, keep=1),
    )


def recipes() -> dict[str, Recipe]:
    """Those of this file by name."""
    found: dict[str, Recipe] = {}
    for base, small in ((cifar100, ""), (cifar100_small, "_small")):
        found |= family(base, "simclr", "align_uniform", "calign_unif", "align_cunif", suffix=small)
        found |= family(base, "supcon", "cauc", "ce", suffix=f"_coarse{small}")
        found |= family(base, "supcon", suffix=f"_fine{small}", kernel=(FINE,))
    return found
