"""A slow rank and slow data are told once, where they begin."""

import numpy as np

from cauc_dist.watch import EVERY, Watch

NAMES = ("rank 0 (host a)", "rank 1 (host b)", "rank 2 (host c)")


def told(watch: Watch, encode: list[float], wait: list[float], steps: int = EVERY) -> list[tuple[str, dict, str]]:  # type: ignore[type-arg]
    news = [watch.add(np.array(encode), np.array(wait), 1.0) for _ in range(steps)]
    assert all(not some for some in news[:-1])
    return news[-1]


def test_ranks_of_one_speed_are_no_news() -> None:
    assert told(Watch(NAMES), [0.5, 0.55, 0.6], [0.0, 0.01, 0.0]) == []


def test_a_slow_rank_is_named_once_and_again_when_it_comes_back() -> None:
    watch = Watch(NAMES)
    ((event, fields, line),) = told(watch, [0.5, 1.1, 0.5], [0.0] * 3)
    assert (event, fields) == ("straggler", {"rank": 1, "encode_s": 1.1, "others_s": 0.5})
    assert line == (
        "rank 1 (host b) is slow: it encodes in 1.1 s, the others in 0.5 s. Every step waits for it: look at its node"
    )
    assert told(watch, [0.5, 1.1, 0.5], [0.0] * 3) == []
    assert told(watch, [0.5, 0.5, 0.5], [0.0] * 3) == []
    assert [event for event, *_ in told(watch, [0.5, 1.1, 0.5], [0.0] * 3)] == ["straggler"]


def test_one_slow_step_is_no_straggler() -> None:
    watch = Watch(NAMES)
    assert watch.add(np.array([0.5, 30.0, 0.5]), np.zeros(3), 30.0) == []
    assert told(watch, [0.5] * 3, [0.0] * 3, EVERY - 1) == []


def test_waiting_for_scans_is_told_with_what_to_do() -> None:
    ((event, fields, line),) = told(Watch(NAMES), [0.5] * 3, [0.0, 0.0, 0.25])
    assert (event, fields) == ("slow_data", {"rank": 2, "share": 0.25})
    assert line == (
        "rank 2 (host c) waits for scans 25 % of a step. "
        "Raise --data.threads, copy the store to the node by --data.stage, or pack it"
    )


def test_a_world_of_one_has_no_straggler() -> None:
    assert told(Watch(NAMES[:1]), [0.5], [0.05]) == []
