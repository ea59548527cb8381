"""A cohort of synthetic heads whose age, sex and site are known: the default data, made on the spot.

Shapes: grids are (X, Y, Z) = (size, size, size), float32; lengths are fractions of half the field of view, so
that 1 is the edge of the volume. One head of 48 voxels a side takes some 25 ms and 10 MB.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Grid = NDArray[np.float32]

FIELD_OF_VIEW = 192.0  # mm: voxels of 4 mm at size 48, 2 mm at 96


@dataclass(frozen=True)
class Person:
    """What participants.tsv says of a subject: years, M or F, one of SITES."""

    age: float
    sex: str
    site: str


@dataclass(frozen=True)
class Anatomy:
    """The subject's truth, in fractions of half the field of view; `head` multiplies all of it."""

    head: float
    ribbon: float
    sulci: float
    ventricle: float


@dataclass(frozen=True)
class Scanner:
    """Intensities of a site with white matter near 1, its gamma, and the direction of its receive bias."""

    csf: float
    grey: float
    white: float
    gamma: float
    bias: tuple[float, float, float]


SITES = {
    "A": Scanner(csf=0.25, grey=0.60, white=0.92, gamma=1.0, bias=(0.15, 0.0, 0.1)),
    "B": Scanner(csf=0.12, grey=0.72, white=0.90, gamma=1.3, bias=(-0.1, 0.2, 0.0)),
    "C": Scanner(csf=0.36, grey=0.55, white=1.00, gamma=0.8, bias=(0.0, -0.15, -0.2)),
}


def write_cohort(
    folder: Path, *, n: int = 240, size: int = 48, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write n heads as a BIDS folder: sub-*/anat/sub-*_T1w.nii.gz, participants.tsv, dataset_description.json.

    Age is uniform in 20-80 years, sex and site are fair draws, all independent. Subject i depends on (seed, i)
    alone: a larger cohort begins with the smaller one. participants.tsv comes last.
    """
    if n < 1 or size < 16:
        raise ValueError(f"n={n}, size={size}; wanted n >= 1 and size >= 16")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_description.json").write_text(
        json.dumps({"Name": f"phantoms, seed {seed}", "BIDSVersion": "1.9.0"})
    )
    lines = ["participant_id\tage\tsex\tsite"]
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        person = draw_person(rng)
        write_scan(folder / f"sub-{i:04d}" / "anat" / f"sub-{i:04d}_T1w.nii.gz", head(rng, person, size))
        lines.append(f"sub-{i:04d}\t{person.age:.1f}\t{person.sex}\t{person.site}")
        if progress:
            progress(i + 1, n)
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")


def write_scan(path: Path, volume: NDArray[np.int16]) -> None:
    """One gzip-1 NIfTI, RAS, centred on the origin; the same bytes for the same volume (no time stamp)."""
    voxel = FIELD_OF_VIEW / volume.shape[0]
    affine = np.diag([voxel, voxel, voxel, 1.0])
    affine[:3, 3] = -voxel * (volume.shape[0] - 1) / 2
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, affine)  # type: ignore[no-untyped-call]
    path.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


def draw_person(rng: np.random.Generator) -> Person:
    age = round(rng.uniform(20, 80), 1)
    return Person(age, "MF"[rng.integers(2)], "ABC"[rng.integers(3)])


def draw_anatomy(rng: np.random.Generator, person: Person) -> Anatomy:
    """With age the ventricles and sulci widen and the ribbon thins; men's heads are larger, with overlap.

    Each of the three age signs carries its own noise: together they tell the age to some 4 years at best.
    """
    a = (person.age - 50) / 30  # -1 ... 1
    e = rng.standard_normal(4)
    return Anatomy(
        head=(1.03 if person.sex == "M" else 0.97) + 0.025 * e[0],
        ribbon=0.17 - 0.030 * a + 0.007 * e[1],
        sulci=0.06 + 0.022 * a + 0.006 * e[2],
        ventricle=0.20 * float(np.exp(0.28 * a + 0.07 * e[3])),
    )


def head(rng: np.random.Generator, person: Person, size: int) -> NDArray[np.int16]:
    """The scan of a person: anatomy, pose, a smooth deformation, then what the scanner makes of it.

    int16 (X, Y, Z); exactly 0 outside the head, as after skull stripping.
    """
    anatomy = draw_anatomy(rng, person)
    csf, grey, white = tissues(_coordinates(rng, size) / np.float32(anatomy.head), anatomy, 1.5 / size)
    image = _scanned(rng, SITES[person.site], csf, grey, white)
    inside = csf + grey + white > 0.5
    gain = 600 * np.exp(0.3 * rng.standard_normal())
    return np.asarray(np.where(inside, np.clip(image * gain, 1, 32000), 0), np.int16)


def tissues(p: Grid, anatomy: Anatomy, edge: float) -> tuple[Grid, Grid, Grid]:
    """Partial volumes of fluid, grey and white matter, each (X, Y, Z), at the points p (3, X, Y, Z); sum <= 1."""
    r = np.sqrt((p[0] / 0.70) ** 2 + (p[1] / 0.86) ** 2 + (p[2] / 0.74) ** 2)
    folds = 0.025 * np.sin(21 * p[0]) * np.sin(17 * p[1]) * np.sin(19 * p[2])  # depth of the sulci
    all_ = _inside(1 - r, edge)
    brain = _inside(1 - anatomy.sulci - r + folds, edge)
    core = _inside(1 - anatomy.sulci - anatomy.ribbon - r + 2 * folds, edge)
    ventricles = _ventricles(p, anatomy.ventricle, edge)
    nuclei = _inside(0.13 - np.sqrt((np.abs(p[0]) - 0.20) ** 2 + (p[1] + 0.02) ** 2 + (p[2] + 0.12) ** 2), edge)
    grey = (brain - core + core * nuclei) * (1 - ventricles)
    white = core * (1 - nuclei) * (1 - ventricles)
    return all_ - grey - white, grey, white


def _ventricles(p: Grid, size: float, edge: float) -> Grid:
    """Two lateral horns, mirror images, that swell with `size`."""
    x, y, z = np.abs(p[0]) - 0.10, p[1] + 0.05, p[2] - 0.08
    r = np.sqrt((x / 0.45) ** 2 + (y / 1.6) ** 2 + (z / 0.7) ** 2)
    return _inside(size - r, edge)


def _inside(distance: Grid, edge: float) -> Grid:
    """1 inside, 0 outside, a logistic edge about `edge` wide."""
    return np.asarray(1 / (1 + np.exp(np.clip(distance * np.float32(-4 / edge), -40, 40))), np.float32)


def _coordinates(rng: np.random.Generator, size: int) -> Grid:
    """Where each voxel lies in the subject's own frame, (3, X, Y, Z): pose, then three smooth waves an axis."""
    axis = np.linspace(-1 + 1 / size, 1 - 1 / size, size, dtype=np.float32)
    turn = Rotation.from_euler("xyz", rng.normal(0, 4, 3), degrees=True).as_matrix().astype(np.float32)
    shift = rng.uniform(-0.08, 0.08, 3).astype(np.float32)
    p = np.stack([turn[i, 0] * axis[:, None, None] + turn[i, 1] * axis[:, None] + turn[i, 2] * axis for i in range(3)])
    p += shift[:, None, None, None]
    for i in range(3):
        p[i] += _waves(rng, axis, count=3, amplitude=0.03, frequency=3.0)
    return p


def _waves(rng: np.random.Generator, axis: Grid, *, count: int, amplitude: float, frequency: float) -> Grid:
    """A sum of `count` separable cosines (X, Y, Z) with random phases: smooth, zero mean over subjects."""
    total = np.zeros((len(axis),) * 3, np.float32)
    for _ in range(count):
        k, phase = rng.uniform(0.5, frequency, 3), rng.uniform(0, 2 * np.pi, 3)
        x, y, z = np.cos(k[:, None] * axis + phase[:, None]).astype(np.float32)
        total += np.float32(amplitude * rng.standard_normal()) * x[:, None, None] * y[:, None] * z
    return total


def _scanned(rng: np.random.Generator, site: Scanner, csf: Grid, grey: Grid, white: Grid) -> Grid:
    """Site contrast with a subject's own jitter, gamma, bias field (site and subject), noise; white near 1."""
    level = np.array([site.csf, site.grey, site.white]) * np.exp(0.04 * rng.standard_normal(3))
    image = np.float32(level[0]) * csf + np.float32(level[1]) * grey + np.float32(level[2]) * white
    image = np.power(np.maximum(image, 1e-3), np.float32(site.gamma * np.exp(0.06 * rng.standard_normal())))
    axis = np.linspace(-1, 1, len(csf), dtype=np.float32)
    b = np.asarray(site.bias, np.float32)
    log_bias = b[0] * axis[:, None, None] + b[1] * axis[:, None] + b[2] * axis
    log_bias = log_bias + _waves(rng, axis, count=2, amplitude=0.12, frequency=2.0)
    noise = rng.standard_normal(image.shape, np.float32)
    return np.asarray(image * np.exp(log_bias) + np.float32(0.05) * noise, np.float32)
