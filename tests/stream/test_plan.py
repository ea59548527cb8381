import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cauc_dist.errors import BadInput
from cauc_dist.stream.plan import Plan, balanced, parts, per_rank, permutation, split

ROWS = np.arange(3, 2003)


def singles(rows: Sequence[int] | np.ndarray, batch_size: int, seed: int, weights: object = None) -> Plan:
    """A plan of rows that are each the only scan of a subject."""
    return Plan(rows, [f"sub-{row}" for row in rows], batch_size, seed, weights)  # type: ignore[arg-type]


def an_epoch(plan: Plan, epoch: int = 0) -> list[list[int]]:
    first = epoch * plan.steps_per_epoch
    return [plan.batch(first + k).tolist() for k in range(plan.steps_per_epoch)]


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[str], list[int], int]:
    """(subject of each scan, whole-number weight of each scan, a batch size that these weights allow)."""
    subjects = draw(st.lists(st.sampled_from([f"sub-{i}" for i in range(40)]), min_size=1, max_size=120))
    weights = draw(st.lists(st.integers(0, 6), min_size=len(subjects), max_size=len(subjects)))
    weights[0] += 1
    mean = mean_weights(subjects, weights)
    return subjects, weights, draw(st.integers(1, floor(sum(mean.values()) / max(mean.values()))))


def mean_weights(subjects: Sequence[str], weights: Sequence[int]) -> dict[str, Fraction]:
    """Of each subject, exactly."""
    scans = Counter(subjects)
    mean = dict.fromkeys(subjects, Fraction(0))
    for subject, weight in zip(subjects, weights, strict=True):
        mean[subject] += Fraction(weight, scans[subject])
    return mean


# ---- the order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 16, 512])
def test_order_is_the_same_for_any_world_size(world_size: int) -> None:
    plan = singles(ROWS, 512, seed=7)
    for step in (0, 2, 3, 8):
        slices = [plan.rank_batch(step, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in slices} == {512 // world_size}
        assert np.array_equal(np.concatenate(slices), singles(ROWS, 512, seed=7).batch(step))


def test_the_slices_of_1_to_64_ranks_are_the_global_batch() -> None:
    for world_size in range(1, 65):
        plan = Plan(range(600), [f"sub-{i % 200}" for i in range(600)], 3 * world_size, seed=2)
        step = 2 * plan.steps_per_epoch - 1
        slices = [plan.rank_batch(step, rank, world_size).tolist() for rank in range(world_size)]
        assert [len(part) for part in slices] == [3] * world_size
        assert [row for part in slices for row in part] == plan.batch(step).tolist()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), data=st.data(), seed=st.integers(-5, 2**63))
def test_an_epoch_has_each_row_at_most_once_and_drops_only_the_tail(n: int, data: st.DataObject, seed: int) -> None:
    batch_size = data.draw(st.integers(1, n))
    rows = np.arange(10, 10 + 3 * n, 3)
    seen = [row for batch in an_epoch(singles(rows, batch_size, seed)) for row in batch]
    assert len(seen) == n - n % batch_size == len(set(seen))
    assert set(seen) <= set(rows.tolist())


def test_a_step_needs_no_step_before_it() -> None:
    subjects, weights = [f"sub-{i % 700}" for i in range(2000)], np.arange(2000) % 5 + 1
    walked = Plan(ROWS, subjects, 30, 1, weights)
    steps = [walked.batch(step) for step in range(3 * 23)]
    for step in (68, 0, 23, 22, 45):
        assert np.array_equal(Plan(ROWS, subjects, 30, 1, weights).batch(step), steps[step])
        assert np.array_equal(walked.batch(step), steps[step])


def test_threads_that_ask_for_other_epochs_at_once_get_the_same_batches() -> None:
    wanted = [singles(ROWS, 100, seed=0).batch(step).tolist() for step in range(120)]  # six epochs
    shared, asked = singles(ROWS, 100, seed=0), np.random.default_rng(0).permutation(120).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda step: shared.batch(step).tolist(), asked)) == [wanted[step] for step in asked]


def test_epochs_and_seeds_differ_and_the_epoch_of_a_step_is_told() -> None:
    plan = singles(ROWS, 100, seed=0)
    assert plan.steps_per_epoch == 20
    assert [plan.epoch(step) for step in (0, 19, 20, 41)] == [0, 0, 1, 2]
    batches = [plan.batch(0), plan.batch(20), plan.batch(40), singles(ROWS, 100, seed=1).batch(0)]
    assert len({batch.tobytes() for batch in batches}) == 4


def test_a_batch_that_is_changed_does_not_change_the_plan() -> None:
    plan = singles(ROWS, 10, seed=0)
    first = plan.batch(0).copy()
    plan.batch(0)[:] = -1
    assert np.array_equal(plan.batch(0), first)


def test_the_order_is_that_of_every_earlier_version() -> None:
    """Golden values: a run resumed under a later version must see the same batches."""
    for (seed, epoch), wanted in GOLDEN.items():
        assert permutation(10, seed, epoch).tolist() == wanted
    big = permutation(100_000, 1, 2)
    assert hashlib.sha256(big.astype("<i8").tobytes()).hexdigest()[:16] == "372ebad23bd1399d"
    subjects, weights = [f"sub-{i % 700}" for i in range(2000)], np.arange(2000) % 5 + 1
    for plan, wanted in (
        (singles(range(1000), 48, seed=5), GOLDEN_PLANS[0]),
        (Plan(ROWS, subjects, 48, 5), GOLDEN_PLANS[1]),
        (Plan(ROWS, subjects, 48, 5, weights), GOLDEN_PLANS[2]),
    ):
        order = np.concatenate([plan.batch(step) for step in range(3 * plan.steps_per_epoch)])
        assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == wanted


GOLDEN: dict[tuple[int, int], list[int]] = {
    (0, 0): [0, 2, 9, 1, 8, 5, 4, 3, 6, 7],
    (0, 1): [5, 3, 7, 8, 2, 4, 1, 0, 6, 9],
    (2**40 + 5, 3): [4, 5, 6, 0, 1, 9, 8, 7, 3, 2],
}
GOLDEN_PLANS = ["0775a5f6de1747ac", "aed133295a60e676", "f83a4df16b4cada1"]


def test_the_permutation_is_uniform() -> None:
    """Chi-square of where row 0 lands, 4000 epochs of 8 rows: 7 degrees of freedom, 99.99 % is below 30."""
    counts = Counter(int(np.flatnonzero(permutation(8, 0, epoch) == 0)[0]) for epoch in range(4000))
    assert sum((counts[i] - 500) ** 2 / 500 for i in range(8)) < 30


@pytest.mark.parametrize("weights", [None, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]])
def test_a_subject_falls_on_every_place_of_the_epoch_equally_often(weights: list[int] | None) -> None:
    """Chi-square of the slots (step and place in the batch) of row 11; 11 degrees of freedom, 99.99 % is below 37."""
    plan, counts = singles(range(12), 4, 0, weights), np.zeros((3, 4))
    for epoch in range(3000):
        counts += np.array(an_epoch(plan, epoch)) == 11
    expected = counts.sum() / 12
    assert ((counts - expected) ** 2 / expected).sum() < 37


def test_who_meets_whom_in_a_batch_is_uniform() -> None:
    """Row 0 and another of 11, in batches of 4, 4000 epochs: 10 degrees of freedom, 99.99 % is below 36."""
    plan, met = singles(range(12), 4, seed=3), np.zeros(12)
    for epoch in range(4000):
        met[next(batch for batch in an_epoch(plan, epoch) if 0 in batch)] += 1
    assert met[0] == 4000
    expected = 4000 * 3 / 11
    assert ((met[1:] - expected) ** 2 / expected).sum() < 36


def test_draws_of_one_subject_fall_on_any_two_steps_and_places() -> None:
    """Row 0 twice an epoch of 5 batches of 4, 3000 epochs. Chi-square of the pairs of steps: 9 degrees of freedom,
    99.99 % is below 34. The places are alike in a quarter (five sigma: 119).
    """
    plan, pairs, alike = singles(range(20), 4, 0, [38 / 18] + [1] * 19), Counter[tuple[int, int]](), 0
    for epoch in range(3000):
        (first, one), (second, other) = np.argwhere(np.array(an_epoch(plan, epoch)) == 0).tolist()
        pairs[first, second] += 1
        alike += one == other
    assert sum((pairs[i, j] - 300) ** 2 / 300 for j in range(5) for i in range(j)) < 34
    assert abs(alike - 750) < 119


def test_an_epoch_of_100_000_subjects_has_each_once() -> None:
    drawn = np.array(an_epoch(singles(range(100_000), 500, seed=0)))
    assert np.array_equal(np.sort(drawn, axis=None), np.arange(100_000))


# ---- subjects and weights -----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(cohort=cohorts(), seed=st.integers(0, 2**64), epoch=st.integers(0, 9))
def test_no_batch_has_two_scans_of_a_subject_and_draws_are_the_expected_rounded(
    cohort: tuple[list[str], list[int], int], seed: int, epoch: int
) -> None:
    subjects, weights, batch_size = cohort
    plan = Plan(range(len(subjects)), subjects, batch_size, seed, weights)
    batches = an_epoch(plan, epoch)
    for batch in batches:
        assert len({subjects[row] for row in batch}) == batch_size
    mean = mean_weights(subjects, weights)
    drawn = Counter(subjects[row] for batch in batches for row in batch)
    assert sum(drawn.values()) == plan.steps_per_epoch * batch_size
    for subject, weight in mean.items():
        expected, off = weight * drawn.total() / sum(mean.values()), Fraction(1, 10**6)
        assert floor(expected - off) <= drawn[subject] <= ceil(expected + off)
    assert all(weights[row] for batch in batches for row in batch)


@settings(max_examples=60, deadline=None)
@given(subjects=st.lists(st.integers(0, 30), min_size=1, max_size=90), data=st.data(), weight=st.floats(1e-300, 1e300))
def test_without_weights_or_with_equal_ones_each_subject_is_drawn_once_but_for_the_tail(
    subjects: list[int], data: st.DataObject, weight: float
) -> None:
    m = len(set(subjects))
    batch_size = data.draw(st.integers(1, m))
    plan = Plan(range(len(subjects)), subjects, batch_size, 0)
    equal = Plan(range(len(subjects)), subjects, batch_size, 0, [weight] * len(subjects))
    for epoch in range(3):
        drawn = [subjects[row] for batch in an_epoch(plan, epoch) for row in batch]
        assert len(drawn) == m - m % batch_size == len(set(drawn))
        assert an_epoch(equal, epoch) == an_epoch(plan, epoch)


def test_weights_are_kept_on_average_over_epochs() -> None:
    """4000 epochs; the deviation of a mean of draws that are either of two whole numbers, five sigma."""
    weights = np.array([0.3, 1, 1, 2, 0.05, 1.7, 1, 0.9, 0, 2])
    plan, drawn, epochs = singles(range(10), 3, 0, weights), Counter[int](), 4000
    for epoch in range(epochs):
        drawn.update(row for batch in an_epoch(plan, epoch) for row in batch)
    assert drawn[8] == 0
    for row, expected in enumerate(9 * weights / weights.sum()):
        sigma = (expected % 1 * (1 - expected % 1) / epochs) ** 0.5
        assert abs(drawn[row] / epochs - expected) <= 5 * sigma, row


@pytest.mark.parametrize("weights", [None, [0.0, 1.0, 3.0, 1.0, 1.0]])
def test_the_scan_of_a_subject_is_drawn_in_proportion_to_the_weights_of_its_scans(weights: list[float] | None) -> None:
    """Chi-square, 3000 epochs, subject `a` of rows 10 to 12: 2 degrees of freedom at most, 99.99 % is below 19."""
    plan, drawn = Plan(range(10, 15), list("aaabc"), 2, 9, weights), Counter[int]()
    for epoch in range(3000):
        drawn.update(row for batch in an_epoch(plan, epoch) for row in batch if row < 13)
    for row, share in zip((10, 11, 12), (0, 1 / 4, 3 / 4) if weights else (1 / 3,) * 3, strict=True):
        expected = drawn.total() * share
        assert (drawn[row] - expected) ** 2 <= 19 * expected, row


def test_draws_of_a_subject_in_one_epoch_take_independent_scans() -> None:
    """Subject `a` twice an epoch, of two scans: the pair is alike in half of 2000 epochs (five sigma: 112)."""
    plan = Plan(range(6), list("aabcde"), 2, 0, [2, 2, 0.5, 0.5, 0.5, 0.5])
    alike = 0
    for epoch in range(2000):
        pair = [row for batch in an_epoch(plan, epoch) for row in batch if row < 2]
        assert len(pair) == 2
        alike += pair[0] == pair[1]
    assert abs(alike - 1000) < 112


@pytest.mark.parametrize("within", [None, "random"])
def test_balanced_weights_draw_every_site_equally_often(within: str | None) -> None:
    """Four sites of 60, 25, 10 and (unknown) 5 subjects; some with scans at two sites. Four epochs' shares to 1 %."""
    rng = np.random.default_rng(0)
    subjects = [i for i in range(100) for _ in range(1 + i % 3)]
    site = np.array([np.nan if i >= 95 else np.searchsorted([60, 85], i, "right") for i in subjects])
    site[::17] = 0.0
    weights = rng.uniform(0.5, 2, len(site)) if within else None
    ours = balanced(weights, site, subjects)
    plan = Plan(range(len(site)), subjects, 10, 4, ours)
    drawn = np.array([an_epoch(plan, epoch) for epoch in range(1500)]).ravel()
    labels = np.where(np.isnan(site), 9.0, site)
    for label in (0, 1, 2, 9):
        assert (labels[drawn] == label).mean() == pytest.approx(1 / 4, abs=0.01)
        if weights is not None:  # inside a site, weights keep their ratios
            inside = labels == label
            assert np.ptp(ours[inside] / weights[inside]) < 1e-12 * ours.max()


def test_balanced_weights_have_a_closed_form() -> None:
    """Sites A: two single scans. B: one single scan of weight 3, and one scan of `c`, whose other scan is at C."""
    found = balanced([1, 1, 3, 2, 5], list("AABBC"), list("abxcc"))
    assert found.tolist() == pytest.approx([1 / 2, 1 / 2, 3 / 4, 2 / 4, 5 / (5 / 2)])
    assert balanced(None, [0.0, 0.0, np.nan, np.nan], list("abcd")).tolist() == [0.5] * 4
    assert balanced([1, 0, 0], ["A", "B", "B"], list("abc")).tolist() == [1, 0, 0]  # nothing of B is wanted


def test_a_weight_that_is_none_is_refused_and_its_row_named() -> None:
    for bad in (np.nan, -1.0, np.inf):
        with pytest.raises(
            BadInput,
            match=rf"weights {bad:g} of row 12 \(subject sub-12\); wanted finite numbers of 0 or more. Give each scan",
        ):
            singles(range(10, 14), 2, 0, [1, 1, bad, 1])
    with pytest.raises(BadInput, match=r"nan of row 7 \(subject sub-7\) and 2 more; wanted finite"):
        singles(range(10), 2, 0, [np.nan] * 10)
    with pytest.raises(BadInput, match=r"the weights of all 3 scans are 0; wanted scans to draw. Give some a weight"):
        singles(range(3), 1, 0, [0, 0, 0])
    with pytest.raises(ValueError, match=r"weights of shape \(2,\) for 3 rows; wanted one for each row"):
        singles(range(3), 1, 0, [1, 1])


def test_a_weight_that_would_draw_a_subject_twice_a_batch_is_refused_with_what_works() -> None:
    weights = [1.0] * 18 + [9.0, 5.0]
    with pytest.raises(
        BadInput,
        match=r"the weight of subject sub-18, 9, wants it 2.25 times in a batch of 8; wanted no subject twice in a "
        r"batch. Use a batch_size of 3 or less, or weights below 3\.",
    ):
        singles(range(20), 8, 0, weights)
    assert singles(range(20), 3, 0, weights).steps_per_epoch == 6
    singles(range(20), 8, 0, np.minimum(weights, 2.999))
    singles(range(4), 2, 0, [1, 1 / 3, 1 / 3, 1 / 3])  # once a batch exactly, in numbers that are not
    for too_much in (
        lambda: singles(range(20), 4, 0, weights),
        lambda: singles(range(20), 8, 0, np.minimum(weights, 3.01)),
    ):
        with pytest.raises(BadInput, match="twice in a batch"):
            too_much()
    with pytest.raises(BadInput, match=r"Use a batch_size of 2 or less\.$"):  # three of weight 0: no other cut helps
        singles(range(5), 3, 0, [1, 1, 0, 0, 0])


def test_the_fingerprint_is_of_all_that_the_order_depends_on_and_of_nothing_else() -> None:
    def of(**k: object) -> str:
        given: dict[str, object] = {"rows": [4, 5, 6, 7], "subjects": list("aabc"), "batch_size": 2, "seed": 0} | k
        return Plan(**given).fingerprint  # type: ignore[arg-type]

    changes = [
        {"rows": [4, 5, 7, 6]},
        {"subjects": list("abcd")},
        {"subjects": list("abbc")},
        {"batch_size": 1},
        {"seed": 1},
        {"weights": [1, 1, 2, 2]},
        {"weights": [1, 2, 1.5, 1.5]},  # the same weight for each subject, other scans
    ]
    assert len({of(), *(of(**change) for change in changes)}) == 1 + len(changes)
    for same in ({"weights": [3, 3, 3, 3]}, {"subjects": [7, 7, 8, 9]}, {"seed": 2**64}):
        assert of(**same) == of()
    assert of(weights=[1, 1, 2, 2]) == of(weights=[2.0, 2.0, 4.0, 4.0])


# ---- parts --------------------------------------------------------------------------------------------------------

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**40))
def test_each_part_has_its_share_of_every_stratum_and_of_the_whole(data: st.DataObject, seed: int) -> None:
    label = data.draw(st.lists(st.sampled_from(["A", "B", "C", "nan"]), min_size=40, max_size=200))
    subjects = [f"sub-{i}" for i in range(len(label))]
    for name, share in SHARES.items():
        of = [part == name for part in parts(subjects, SHARES, seed, label)]
        for stratum in set(label):
            wanted = share * label.count(stratum)
            assert abs(sum(x for x, y in zip(of, label, strict=True) if y == stratum) - wanted) < 1 - 1e-9
        assert abs(sum(of) - share * len(label)) < 2


def test_many_small_strata_do_not_starve_a_small_part() -> None:
    """200 strata of one subject: rounded one by one, each would go to train."""
    counts = Counter(parts([f"sub-{i}" for i in range(200)], SHARES, 0, [f"site-{i}" for i in range(200)]))
    assert counts == {"train": 140, "validation": 20, "test": 40}


def test_all_scans_of_a_subject_fall_in_one_part_whatever_their_order() -> None:
    subjects = [f"sub-{i % 60}" for i in range(150)]
    strata = [f"site-{(i % 60) // 20}" if i < 120 else "moved" for i in range(150)]  # some have scans at two sites
    for labels in (None, strata):
        found = parts(subjects, SHARES, 5, labels)
        part_of = dict(zip(subjects, found, strict=True))
        assert found == [part_of[name] for name in subjects]
        assert Counter(part_of.values()) == {"train": 42, "validation": 6, "test": 12}
        mixed = np.random.default_rng(0).permutation(150)
        again = parts([subjects[i] for i in mixed], SHARES, 5, labels and [labels[i] for i in mixed])
        assert again == [found[i] for i in mixed]


def test_subjects_with_the_same_set_of_labels_are_a_stratum() -> None:
    subjects, labels = [*"abcdefghij", *"abcdefghij", *"klmnopqrst"], ["A"] * 10 + ["B"] * 10 + ["A"] * 10
    for seed in range(10):
        found = parts(subjects, SHARES, seed, labels)
        assert Counter(found[:10]) == Counter(found[20:]) == {"train": 7, "validation": 1, "test": 2}


def test_parts_are_dealt_in_the_order_of_sha256_and_another_seed_deals_anew() -> None:
    subjects = [f"sub-{i}" for i in range(50)]
    order = sorted(subjects, key=lambda name: hashlib.sha256(f"3\n{name}".encode()).hexdigest())
    found = parts(subjects, {"a": 0.5, "b": 0.5}, 3)
    assert {name for name, part in zip(subjects, found, strict=True) if part == "a"} == set(order[:25])
    assert parts(subjects, {"a": 0.5, "b": 0.5}, 4) != found


def test_impossible_parts_are_refused() -> None:
    for shares in ({"train": 0.8, "test": 0.1}, {"train": 1.2, "test": -0.2}, {"train": float("nan")}, {}):
        with pytest.raises(BadInput, match=r"shares .*; wanted numbers of 0 or more that add up to 1. Mend them"):
            parts(["a", "b"], shares, 0)
    with pytest.raises(BadInput, match=r"3 subjects leave validation without one; wanted a subject in each part. Give"):
        parts(["a", "b", "c", "a"], SHARES, 0)
    third = parts(["a", "b", "c"], dict.fromkeys("xyz", 1 / 3), 0)
    assert sorted(third) == ["x", "y", "z"]


# ---- folds --------------------------------------------------------------------------------------------------------


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


def test_a_batch_that_does_not_divide_is_dealt_out_and_a_rank_without_a_subject_refused() -> None:
    plan = singles(ROWS, 100, seed=0)
    slices = [plan.rank_batch(3, rank, 16).tolist() for rank in range(16)]
    assert [len(rows) for rows in slices] == [7] * 4 + [6] * 12 == per_rank(100, 16)
    assert [row for rows in slices for row in rows] == plan.batch(3).tolist()
    with pytest.raises(BadInput, match=r"batch_size 3 over 16 ranks; wanted a subject a rank. Use 16 or more, or"):
        singles(ROWS, 3, seed=0).rank_batch(0, 0, 16)


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(
        BadInput, match=r"batch_size 11 for 10 training subjects; wanted at least one full batch. Use 1 to 10"
    ):
        Plan(range(20), [i // 2 for i in range(20)], 11, seed=0)
    with pytest.raises(ValueError, match=r"rows with repeats; wanted each row once"):
        singles([1, 2, 1], 2, seed=0)
    with pytest.raises(ValueError, match=r"1 subjects for 2 rows; wanted one for each row"):
        Plan([1, 2], ["a"], 1, seed=0)
    with pytest.raises(ValueError, match=r"rank 4 of 4; wanted 0 to 3"):
        singles(range(10), 4, seed=0).rank_batch(0, 4, 4)


def test_impossible_folds_are_refused() -> None:
    for folds, fold in ((4, 4), (4, -1), (0, 0)):
        with pytest.raises(BadInput, match=f"fold {fold} of {folds}; wanted 0 to"):
            split(["a", "b", "c", "d"], folds, fold)
    with pytest.raises(BadInput, match=r"5 folds of 2 subjects; wanted a subject in each"):
        split(["a", "b", "a"], 5, 0)


def test_the_plan_imports_no_torch() -> None:
    code = "import sys, cauc_dist.stream.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0
