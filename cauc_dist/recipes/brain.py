"""Recipes for what is at hand: the synthetic cohort, hippocampus crops, IXI's heads and its table of volumes.

`lambda_align` is 1.5 here, three quarters of the default t = 2: from random weights and on batches of tens, alignment
of weight t collapses (docs/log.md, 2026-11-24). It was chosen on the synthetic cohort alone.
"""

from cauc_dist.config import Augment, Checkpoint, Data, Encoder, Engine, Objective, Optim, Projector, RunConfig
from cauc_dist.recipes.family import Recipe, family

METHODS = ("simclr", "align_uniform", "yaware", "calign_unif", "align_cunif", "cauc")


def demo() -> RunConfig:
    """The synthetic cohort of `cauc demo`, which makes the store; Gaussian kernel on age, sigma 5 years.

    Source: ours. Time: a minute on two CPU cores. Result: the README's first table.
    """
    return RunConfig(
        name="demo",
        epochs=20,
        batch_size=32,
        data=Data(store="demo/store.zarr"),
        augment=Augment(p_flip=0.5, p_intensity=0.8, p_blur=0.3, p_noise=0.8, p_shift=0.8, scale=0.4, shift=0.3),
        encoder=Encoder(name="cnn3d", width=16),
        objective=Objective(kernel=("age:gaussian:5",), lambda_align=1.5),
        optim=Optim(lr=1e-3, warmup_epochs=2),
    )


def hippocampus() -> RunConfig:
    """260 hippocampus crops (Medical Segmentation Decathlon, Task04); Gaussian kernels on both volumes, sigma 150 mm3.

    The volumes' standard deviations are 307 (anterior) and 229 (posterior).
    Store: `cauc ingest $CAUC_DATA/hippocampus260 stores/hippocampus.zarr --shape 31 40 24`, the largest central window
    inside every scan: a scan's own crop shape predicts the volumes, so no padding may show it.
    Source: ours. Time: minutes on two CPU cores. Result: docs/reproduce.md, earlier tables.
    """
    return RunConfig(
        name="hippocampus",
        epochs=60,
        batch_size=32,
        data=Data(store="stores/hippocampus.zarr"),
        augment=Augment(p_intensity=0.8, p_blur=0.5, p_noise=0.5, p_shift=0.5, scale=0.3, shift=0.3, max_shift=2),
        encoder=Encoder(name="cnn3d", width=16),
        objective=Objective(kernel=("anterior_mm3:gaussian:150", "posterior_mm3:gaussian:150"), lambda_align=1.5),
        optim=Optim(lr=1e-3, warmup_epochs=2),
    )


def ixi50() -> RunConfig:
    """50 skull-stripped heads (IXI, 80x96x80 voxels of 2 mm); Gaussian kernel on age, sigma 5 years.

    Store: `cauc ingest $CAUC_DATA/ixi50 stores/ixi50.zarr`. 40 subjects train: a check of the chain on real heads, no
    evidence for a method.
    Source: ours. Time: minutes on two CPU cores. Result: docs/reproduce.md, earlier tables.
    """
    return RunConfig(
        name="ixi50",
        epochs=20,
        batch_size=20,
        data=Data(store="stores/ixi50.zarr", folds=5),
        augment=Augment(p_flip=0.5, p_intensity=0.8, p_blur=0.5, p_noise=0.5, p_shift=0.8, scale=0.3, shift=0.3),
        encoder=Encoder(name="cnn3d", width=8),
        objective=Objective(kernel=("age:gaussian:5",), lambda_align=1.5),
        optim=Optim(lr=1e-3, warmup_epochs=2),
    )


def ixi_roi() -> RunConfig:
    """288 regional volumes of 447 healthy adults (IXI); an MLP; Gaussian kernel on age, sigma 5 years.

    Store: `cauc ingest $CAUC_DATA/ixi_roi stores/ixi_roi.zarr --missing height=0 weight=0 --ranges height=100:230`.
    Source: ours; learning rate, epochs and order of sigma as in nidl's y-Aware example (1e-3, 60). Time: seconds on a
    CPU core. Result: docs/reproduce.md, study ixi_roi.
    """
    return RunConfig(
        name="ixi_roi",
        epochs=60,
        batch_size=64,
        data=Data(store="stores/ixi_roi.zarr", split="split", normalise="dataset", threads=1),
        augment=Augment(p_blur=0.0, p_intensity=0.5, p_noise=1.0, noise=0.5),
        encoder=Encoder(name="mlp", width=256),
        projector=Projector(hidden=256, out=64),
        objective=Objective(kernel=("age:gaussian:5",), lambda_align=1.5),
        optim=Optim(lr=1e-3, warmup_epochs=2),
        engine=Engine(device="cpu", threads=1),
        checkpoint=Checkpoint(every_epochs=60, keep=1),
    )


def recipes() -> dict[str, Recipe]:
    """Those of this file by name."""
    return {
        **family(demo, "simclr", "yaware", "cauc"),
        **family(hippocampus, *METHODS),
        **family(ixi50, *METHODS),
        **family(ixi_roi, *METHODS, "expw", "supervised"),
    }
