"""A projection is arithmetic that can be done by hand, and a fit finds what made the steps."""

import math
from dataclasses import replace

import pytest

from cauc_dist.bench.projection import Link, Model, Point, error, fit, project

MODEL = Model(
    fixed=0.01,
    each=0.002,
    pair=1e-6,
    gradient_bytes=4e6,
    z_bytes=1024,
    zero_stage=0,
    small=3,
    ring=True,
    inner=Link(1e9, 1e-5),
    network=Link(1e8, 1e-4),
    ranks_per_node=2,
)


def test_a_step_on_four_ranks_of_two_nodes_by_hand() -> None:
    row = project(MODEL, 4, 32, seen=3200, price=2.0)
    compute = 0.01 + 8 * 0.002 + 8 * 32 * 1e-6  # eight subjects a rank, against all 32
    sent = 2 * 3 / 4 * 4e6 + 3 / 4 * 32 * 1024
    messages = 3 * (2 + 1 + 2 * 3)  # three hops: reduce is twice round, z once, three small all-reduces
    step = compute + sent / 1e8 + messages * 1e-4
    assert row.share == 8
    assert row.compute_s == pytest.approx(compute)
    assert row.sent_bytes == pytest.approx(sent)
    assert row.step_s == pytest.approx(step)
    assert row.samples_per_s == pytest.approx(32 / step)
    assert row.efficiency == pytest.approx(32 / step * (0.01 + 8 * 0.002 + 64 * 1e-6) / (4 * 8))
    assert row.hours == pytest.approx(100 * step / 3600)
    assert row.cost == pytest.approx(100 * step / 3600 * 4 * 2.0)


def test_one_rank_sends_nothing() -> None:
    row = project(MODEL, 1, 32)
    assert (row.communication_s, row.sent_bytes, row.efficiency) == (0, 0, 1)


def test_ranks_of_one_node_meet_by_the_inner_link() -> None:
    within, beyond = (project(MODEL, world, 8 * world) for world in (2, 4))
    assert within.communication_s == pytest.approx((2 * 1 / 2 * 4e6 + 1 / 2 * 16 * 1024) / 1e9 + 9e-5)
    assert beyond.communication_s > 10 * within.communication_s


def test_a_fast_network_does_not_help_beyond_a_slow_inner_link() -> None:
    fast = replace(MODEL, network=Link(1e12, 0.0))
    assert fast.link(1024) == MODEL.inner


def test_zero_gathers_the_weights_too() -> None:
    sharded = replace(MODEL, zero_stage=1)
    assert sharded.traffic(2, 0) == pytest.approx(1.5 * MODEL.traffic(2, 0))


def test_messages_of_a_ring_grow_with_ranks_and_of_a_tree_with_their_logarithm() -> None:
    tree = replace(MODEL, ring=False)
    assert MODEL.messages(1024) == 1023 * MODEL.messages(2)
    assert tree.messages(1024) == 10 * tree.messages(2)
    assert tree.messages(1) == 0


def test_an_uneven_batch_takes_as_long_as_its_largest_share() -> None:
    assert project(MODEL, 4, 13).share == 4
    assert project(MODEL, 4, 13).compute_s == pytest.approx(0.01 + 4 * 0.002 + 4 * 13 * 1e-6)


def test_with_the_same_batch_efficiency_is_that_over_one_rank_alone() -> None:
    row = project(MODEL, 4, 32, alone=32)
    assert row.efficiency == pytest.approx(project(MODEL, 1, 32).step_s / (4 * row.step_s))


def steps(model: Model) -> list[Point]:
    return [Point(w, n, project(model, w, n).step_s) for w in (1, 2, 4) for n in (32, 16)]


def test_a_fit_finds_what_made_the_steps() -> None:
    found = fit(replace(MODEL, fixed=0.0, each=0.0), steps(MODEL))
    assert (found.fixed, found.each) == (pytest.approx(0.01), pytest.approx(0.002))
    assert all(abs(error(found, point)) < 1e-9 for point in steps(MODEL))


@pytest.mark.parametrize(("fixed", "each"), [(-0.01, 0.01), (0.5, -0.005)])
def test_a_fit_has_no_negative_seconds(fixed: float, each: float) -> None:
    found = fit(MODEL, steps(replace(MODEL, fixed=fixed, each=each)))
    assert found.fixed >= 0
    assert found.each >= 0
    assert math.isfinite(found.fixed + found.each)


def test_steps_of_one_share_say_nothing_of_a_steps_own_time() -> None:
    found = fit(MODEL, [Point(1, 16, 0.1)])
    assert (found.fixed, found.each) == (0, pytest.approx((0.1 - 256e-6) / 16))


def test_an_error_is_relative_to_what_was_measured() -> None:
    assert error(MODEL, Point(1, 32, project(MODEL, 1, 32).step_s / 1.25)) == pytest.approx(0.25)
