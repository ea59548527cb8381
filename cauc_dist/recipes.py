"""A recipe is a function that returns a whole RunConfig; `cauc train NAME` runs one.

Imports no torch. The first of each family says where its numbers come from and how to make its store.

`lambda_align` is 1.5 here, three quarters of the default t = 2: from random weights and on batches of tens, alignment
of weight t collapses (docs/log.md, 2026-11-24). It was chosen on the synthetic cohort alone.
"""

import dataclasses
from collections.abc import Callable

from cauc_dist.config import Augment, Data, Encoder, Objective, Objectives, Optim, RunConfig
from cauc_dist.errors import BadInput, nearest


def _under(method: Objectives, base: RunConfig) -> RunConfig:
    """The same run under another loss; SimCLR keeps the kernel, by which its journal's geometry is judged."""
    suffix = {"y_aware": "yaware"}.get(method, method)
    return dataclasses.replace(
        base, name=f"{base.name}_{suffix}", objective=dataclasses.replace(base.objective, name=method)
    )


def _demo() -> RunConfig:
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


def demo_simclr() -> RunConfig:
    """SimCLR (NT-Xent) on the synthetic cohort of `cauc demo`, which makes the store; metadata has no part in the loss.

    Our configuration, for two CPU cores.
    """
    return _under("simclr", _demo())


def demo_yaware() -> RunConfig:
    """y-Aware InfoNCE (arXiv 2106.08808) on the synthetic cohort, Gaussian kernel on age, sigma 5 years."""
    return _under("y_aware", _demo())


def demo_cauc() -> RunConfig:
    """Conditional alignment and conditional uniformity on the synthetic cohort, the same kernel."""
    return _under("cauc", _demo())


def _hippocampus() -> RunConfig:
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


def hippocampus_simclr() -> RunConfig:
    """SimCLR on 260 hippocampus crops (Medical Segmentation Decathlon, Task04).

    Store: `cauc ingest $CAUC_DATA/hippocampus260 stores/hippocampus.zarr --shape 31 40 24`, the largest central window
    inside every scan: a scan's own crop shape predicts the volumes, so no padding may show it. Our configuration.
    """
    return _under("simclr", _hippocampus())


def hippocampus_yaware() -> RunConfig:
    """y-Aware InfoNCE on the hippocampus crops, Gaussian kernels on both volumes, sigma 150 mm3.

    The volumes' standard deviations are 307 (anterior) and 229 (posterior).
    """
    return _under("y_aware", _hippocampus())


def hippocampus_cauc() -> RunConfig:
    """Conditional alignment and uniformity on the hippocampus crops, the same kernel."""
    return _under("cauc", _hippocampus())


def _ixi50() -> RunConfig:
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


def ixi50_simclr() -> RunConfig:
    """SimCLR on 50 skull-stripped heads (IXI, 80x96x80 voxels of 2 mm).

    Store: `cauc ingest $CAUC_DATA/ixi50 stores/ixi50.zarr`. 40 subjects train: a check of the chain on real heads, no
    evidence for a method. Our configuration.
    """
    return _under("simclr", _ixi50())


def ixi50_yaware() -> RunConfig:
    """y-Aware InfoNCE on the 50 heads, Gaussian kernel on age, sigma 5 years."""
    return _under("y_aware", _ixi50())


def ixi50_cauc() -> RunConfig:
    """Conditional alignment and uniformity on the 50 heads, the same kernel."""
    return _under("cauc", _ixi50())


def recipes() -> dict[str, Callable[[], RunConfig]]:
    """All recipes by name."""
    found = [
        *(demo_simclr, demo_yaware, demo_cauc),
        *(hippocampus_simclr, hippocampus_yaware, hippocampus_cauc),
        *(ixi50_simclr, ixi50_yaware, ixi50_cauc),
    ]
    return {recipe.__name__: recipe for recipe in found}


def get(name: str) -> RunConfig:
    """The recipe of that name; BadInput with the nearest names where there is none."""
    known = recipes()
    if name not in known:
        raise BadInput(f"no recipe {name!r}", wanted="a recipe's name or a config.json", do=nearest(name, known))
    return known[name]()
