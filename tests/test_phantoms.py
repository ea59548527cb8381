import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from cauc_dist import phantoms


def rows(folder: Path) -> list[list[str]]:
    return [line.split("\t") for line in (folder / "participants.tsv").read_text().splitlines()]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "b"
    phantoms.write_cohort(folder, n=160, size=32)
    return folder


def voxels(folder: Path, subject: str) -> np.ndarray:
    return np.asarray(nib.load(folder / subject / f"anat/{subject}_T1w.nii.gz").dataobj)


def test_a_cohort_is_a_bids_folder_of_ras_heads(cohort: Path) -> None:
    head, *people = rows(cohort)
    assert head == ["participant_id", "age", "sex", "site"]
    assert len(people) == 160
    assert json.loads((cohort / "dataset_description.json").read_text())["BIDSVersion"]
    image = nib.load(cohort / "sub-0000/anat/sub-0000_T1w.nii.gz")
    assert image.shape == (32, 32, 32)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == (6.0, 6.0, 6.0)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_allclose(image.affine @ [15.5, 15.5, 15.5, 1], [0, 0, 0, 1])


def test_age_sex_and_site_are_spread_as_stated(cohort: Path) -> None:
    people = rows(cohort)[1:]
    age = np.array([float(row[1]) for row in people])
    assert age.min() >= 20
    assert age.max() <= 80
    assert abs(age.mean() - 50) < 5
    assert 15 < age.std() < 20
    assert {row[2] for row in people} == {"M", "F"}
    assert {row[3] for row in people} == {"A", "B", "C"}


def test_a_head_is_zero_outside_and_fills_a_third_of_its_volume(cohort: Path) -> None:
    volume = voxels(cohort, "sub-0003")
    assert 0.15 < np.count_nonzero(volume) / volume.size < 0.45
    assert volume.min() == 0
    for axis in range(3):
        assert not np.take(volume, [0, -1], axis=axis).any()


def test_the_same_seed_gives_the_same_bytes_and_a_larger_cohort_begins_alike(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    phantoms.write_cohort(tmp_path / "a", n=3, size=16, seed=4, progress=lambda *now: seen.append(now))
    phantoms.write_cohort(tmp_path / "b", n=5, size=16, seed=4)
    phantoms.write_cohort(tmp_path / "c", n=3, size=16, seed=5)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert rows(tmp_path / "b")[:4] == rows(tmp_path / "a") != rows(tmp_path / "c")
    files = [f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*.nii.gz")]
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_ventricles_grow_and_the_ribbon_thins_with_age() -> None:
    axis = np.linspace(-1, 1, 64, dtype=np.float32)
    p = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))

    def tissue(age: float) -> list[float]:
        many = [phantoms.draw_anatomy(np.random.default_rng(i), phantoms.Person(age, "F", "A")) for i in range(20)]
        return [float(np.mean(t)) for t in np.mean([phantoms.tissues(p, a, 0.02) for a in many], axis=0)]

    young, old = tissue(25), tissue(75)
    assert old[0] > 1.3 * young[0]
    assert old[1] < 0.85 * young[1]


def test_head_size_tells_the_sexes_apart_with_overlap() -> None:
    size = {
        sex: np.array(
            [phantoms.draw_anatomy(np.random.default_rng(i), phantoms.Person(50, sex, "A")).head for i in range(300)]
        )
        for sex in "MF"
    }
    assert 1.5 < (size["M"].mean() - size["F"].mean()) / size["F"].std() < 3.5
    assert size["M"].min() < size["F"].max()


def test_each_site_has_its_own_contrast(cohort: Path) -> None:
    """Grey against white, taken as the ratio of two quantiles inside the head, differs between sites."""
    ratio: dict[str, list[float]] = {"A": [], "B": [], "C": []}
    for subject, _, _, site in rows(cohort)[1:]:
        volume = voxels(cohort, subject)
        low, high = np.quantile(volume[volume > 0], [0.1, 0.9])
        ratio[site].append(low / high)
    means = sorted(float(np.mean(r)) for r in ratio.values())
    spread = max(float(np.std(r)) for r in ratio.values())
    assert means[1] - means[0] > spread / 2
    assert means[2] - means[1] > spread / 2


def test_raw_voxels_know_the_age_better_than_the_median_and_not_well(cohort: Path) -> None:
    people = rows(cohort)[1:]
    age = np.array([float(row[1]) for row in people])
    x = np.stack([voxels(cohort, row[0]) for row in people]).reshape(len(age), -1).astype(np.float64)
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    train, test = np.arange(120), np.arange(120, 160)
    scaler = StandardScaler().fit(x[train])
    model = RidgeCV(np.logspace(1, 6, 11)).fit(scaler.transform(x[train]), age[train])
    ridge = np.abs(model.predict(scaler.transform(x[test])) - age[test]).mean()
    median = np.abs(np.median(age[train]) - age[test]).mean()
    assert 5 < ridge < 0.8 * median


def test_a_head_of_48_voxels_takes_little_time(tmp_path: Path) -> None:
    """About 12 ms alone on a core; ten times that is allowed for a busy machine."""
    started = time.process_time()
    phantoms.write_cohort(tmp_path / "b", n=10, size=48)
    assert (time.process_time() - started) / 10 < 0.12


def test_an_empty_or_tiny_cohort_is_refused(tmp_path: Path) -> None:
    for settings in ({"n": 0}, {"size": 8}):
        with pytest.raises(ValueError, match="wanted n >= 1 and size >= 16"):
            phantoms.write_cohort(tmp_path / "b", **settings)
    assert not (tmp_path / "b").exists()
