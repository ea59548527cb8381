import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cauc_dist.errors import BadInput
from cauc_dist.stream.plan import Plan, per_rank, permutation, split

ROWS = np.arange(3, 2003)


@pytest.mark.parametrize("world_size", [1, 2, 16, 512])
def test_order_is_the_same_for_any_world_size(world_size: int) -> None:
    plan = Plan(ROWS, 512, seed=7)
    for step in (0, 2, 3, 8):
        slices = [plan.rank_batch(step, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in slices} == {512 // world_size}
        assert np.array_equal(np.concatenate(slices), Plan(ROWS, 512, seed=7).batch(step))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), data=st.data(), seed=st.integers(-5, 2**63))
def test_an_epoch_has_each_row_at_most_once_and_drops_only_the_tail(n: int, data: st.DataObject, seed: int) -> None:
    batch_size = data.draw(st.integers(1, n))
    rows = np.arange(10, 10 + 3 * n, 3)
    plan = Plan(rows, batch_size, seed)
    seen = np.concatenate([plan.batch(step) for step in range(plan.steps_per_epoch)])
    assert len(seen) == n - n % batch_size == len(set(seen.tolist()))
    assert set(seen.tolist()) <= set(rows.tolist())


def test_a_step_needs_no_step_before_it() -> None:
    walked = Plan(ROWS, 30, seed=1)
    steps = [walked.batch(step) for step in range(200)]
    for step in (199, 0, 66, 65, 133):
        assert np.array_equal(Plan(ROWS, 30, seed=1).batch(step), steps[step])
        assert np.array_equal(walked.batch(step), steps[step])


def test_epochs_and_seeds_differ_and_the_epoch_of_a_step_is_told() -> None:
    plan = Plan(ROWS, 100, seed=0)
    assert plan.steps_per_epoch == 20
    assert [plan.epoch(step) for step in (0, 19, 20, 41)] == [0, 0, 1, 2]
    batches = [plan.batch(0), plan.batch(20), plan.batch(40), Plan(ROWS, 100, seed=1).batch(0)]
    assert len({batch.tobytes() for batch in batches}) == 4


def test_a_batch_that_is_changed_does_not_change_the_plan() -> None:
    plan = Plan(ROWS, 10, seed=0)
    first = plan.batch(0).copy()
    plan.batch(0)[:] = -1
    assert np.array_equal(plan.batch(0), first)


def test_the_order_is_that_of_every_earlier_version() -> None:
    """Golden values: a run resumed under a later version must see the same batches."""
    assert permutation(10, 0, 0).tolist() == GOLDEN[0, 0]
    assert permutation(10, 0, 1).tolist() == GOLDEN[0, 1]
    assert permutation(10, 2**40 + 5, 3).tolist() == GOLDEN[2**40 + 5, 3]
    big = permutation(100_000, 1, 2)
    assert hashlib.sha256(big.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN_BIG
    assert Plan(range(100, 110), 4, seed=0).batch(3).tolist() == [100 + i for i in GOLDEN[0, 1][4:8]]


GOLDEN: dict[tuple[int, int], list[int]] = {
    (0, 0): [0, 2, 9, 1, 8, 5, 4, 3, 6, 7],
    (0, 1): [5, 3, 7, 8, 2, 4, 1, 0, 6, 9],
    (2**40 + 5, 3): [4, 5, 6, 0, 1, 9, 8, 7, 3, 2],
}
GOLDEN_BIG = "372ebad23bd1399d"


def test_the_permutation_is_uniform() -> None:
    """Chi-square of where row 0 lands, 4000 epochs of 8 rows: 7 degrees of freedom, 99.99 % is below 30."""
    counts = Counter(int(np.flatnonzero(permutation(8, 0, epoch) == 0)[0]) for epoch in range(4000))
    assert sum((counts[i] - 500) ** 2 / 500 for i in range(8)) < 30


def test_every_subject_is_in_exactly_one_fold_and_parts_are_near_equal() -> None:
    subjects = [f"sub-{i % 103}" for i in range(250)]  # up to 3 scans a subject
    held = [split(subjects, 5, fold)[1] for fold in range(5)]
    assert sorted(np.concatenate(held).tolist()) == list(range(250))
    parts = [{subjects[row] for row in rows} for rows in held]
    assert sum(map(len, parts)) == 103
    assert {len(part) for part in parts} == {20, 21}
    for fold in range(5):
        train, out = split(subjects, 5, fold)
        assert sorted([*train, *out]) == list(range(250))
        assert (np.diff(train) > 0).all()
        assert (np.diff(out) > 0).all()
        assert not {subjects[row] for row in train} & parts[fold]


def test_folds_are_dealt_in_the_order_of_sha256() -> None:
    subjects = ["anna", "bert", "cara", "dora", "emil"]
    order = sorted(subjects, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    for fold in range(2):
        assert {subjects[row] for row in split(subjects, 2, fold)[1]} == {
            s for k, s in enumerate(order) if k % 2 == fold
        }
    assert [subjects[row] for row in split(subjects, 2, 0)[1]] == GOLDEN_FOLD


GOLDEN_FOLD = ["anna", "cara", "emil"]


def test_the_split_does_not_depend_on_the_order_of_scans() -> None:
    subjects = [f"sub-{i}" for i in range(50)]
    mixed = [subjects[i] for i in np.random.default_rng(0).permutation(50)]
    assert {subjects[i] for i in split(subjects, 4, 1)[1]} == {mixed[i] for i in split(mixed, 4, 1)[1]}


def test_one_fold_trains_on_everybody() -> None:
    train, held = split(["a", "b", "a"], 1, 0)
    assert train.tolist() == [0, 1, 2]
    assert held.shape == (0,)
    assert held.dtype == np.int64


def test_a_batch_that_does_not_divide_suggests_the_nearest_two() -> None:
    with pytest.raises(BadInput, match=r"batch_size 100 does not divide over 16 ranks.*Use 96 or 112"):
        Plan(ROWS, 100, seed=0).rank_batch(0, 0, 16)
    with pytest.raises(
        BadInput, match=r"batch_size 3 does not divide over 16 ranks; wanted a multiple of 16. Use 16\."
    ):
        per_rank(3, 16)
    assert per_rank(96, 16) == 6


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(
        BadInput, match=r"batch_size 11 for 10 training scans; wanted at least one full batch. Use 1 to 10"
    ):
        Plan(range(10), 11, seed=0)
    with pytest.raises(ValueError, match=r"rows with repeats; wanted each row once"):
        Plan([1, 2, 1], 2, seed=0)
    with pytest.raises(ValueError, match=r"rank 4 of 4; wanted 0 to 3"):
        Plan(range(10), 4, seed=0).rank_batch(0, 4, 4)


def test_impossible_folds_are_refused() -> None:
    for folds, fold in ((4, 4), (4, -1), (0, 0)):
        with pytest.raises(BadInput, match=f"fold {fold} of {folds}; wanted 0 to"):
            split(["a", "b", "c", "d"], folds, fold)
    with pytest.raises(BadInput, match=r"5 folds of 2 subjects; wanted a subject in each"):
        split(["a", "b", "a"], 5, 0)


def test_the_plan_imports_no_torch() -> None:
    code = "import sys, cauc_dist.stream.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0
