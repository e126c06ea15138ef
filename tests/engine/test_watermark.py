import math
import random
from pathlib import Path

import pytest

from engine.build import build_core
from engine.core import Core
from engine.policyfile import load
from engine.watermark import CONFIRMED_BY, Watermark
from streams.base import Record
from streams.codec import Event, Feedback
from tests.engine.cores import FEATURES, rows, tiny_model
from tests.engine.policies import BASE, write

HOUR = 3600.0
START = 1_700_000_000.0


def test_it_follows_the_newest_time_and_never_goes_back() -> None:
    mark = Watermark(100)
    assert mark.value == -math.inf
    assert [mark.advance(times) for times in ([5.0], [3.0, 9.0], [4.0], [109.0])] == [5, 9, 9, 109]
    assert mark.ahead == 0


def test_a_time_too_far_ahead_does_not_move_it_and_is_counted() -> None:
    mark = Watermark(100)
    mark.advance([5.0])
    assert mark.advance([105.5, 6.0, 1e9, 7.0]) == 7
    assert mark.ahead == 2


def test_it_moves_to_the_oldest_of_many_rows_ahead_and_to_no_less_many() -> None:
    mark = Watermark(100)
    mark.advance([0.0])
    ahead = [1000.0 + n for n in range(CONFIRMED_BY)]
    assert mark.advance(ahead[: CONFIRMED_BY - 1]) == 0
    assert mark.advance([50.0]) == 50, "one that is not ahead begins the count anew"
    assert mark.advance(ahead[1:]) == 50
    assert mark.advance(ahead[:1]) == 1000
    assert mark.advance([1040.0]) == 1040
    assert mark.ahead == 2 * CONFIRMED_BY - 1


def test_the_first_rows_may_hold_one_that_is_ahead() -> None:
    assert Watermark(100).advance([1e9, 5.0, 6.0]) == 6


def test_how_rows_are_cut_into_batches_makes_no_difference_after_the_first() -> None:
    draw = random.Random(0)
    times = [START + n + draw.choice([0, 0, 0, 5 * HOUR]) for n in range(500)] + [
        START + 9 * HOUR + n for n in range(99)
    ]
    one, other = Watermark(HOUR), Watermark(HOUR)
    one.advance([START])
    other.advance([START])
    one.advance(times)
    while times:
        size = draw.randrange(1, 40)
        other.advance(times[:size])
        times = times[size:]
    assert one.state_dict() == other.state_dict()
    assert one.value == START + 9 * HOUR + 98


def test_a_restored_one_goes_on_in_the_middle_of_a_run() -> None:
    one, other = Watermark(100), Watermark(100)
    one.advance([0.0])
    one.advance([500.0 + n for n in range(20)])
    other.load_state_dict(one.state_dict())
    for mark in (one, other):
        assert mark.advance([400.0] * 11) == 0
        assert mark.advance([401.0]) == 400
    assert one.state_dict() == other.state_dict()


@pytest.fixture
def core(tmp_path: Path) -> Core:
    policy = load(write(tmp_path, BASE + "join: {window: 24h}\naudit: {share: 0}\n"), environ={}).policy
    return build_core(policy, tiny_model(), background=False, directory=None)


def serve(core: Core, times: list[float], delay: float, first: int) -> None:
    """Answer an event at each time, and give it its label so much later."""
    data = rows(0, len(times))
    assert data.shape[1] == FEATURES
    record = Record("data", 0, 0, 1, 0.0, None, b"")
    for number, (time, row) in enumerate(zip(times, data, strict=True), first):
        core.answer([Event(f"e{number}", row.tobytes(), time, None, record)])
        core.follow()
        core.feedback([Feedback(f"e{number}", 0, None, time + delay, None, record)])


def test_one_event_of_next_year_costs_no_label(core: Core) -> None:
    serve(core, [START + 60 * n for n in range(50)], 30, 0)
    core.answer(
        [Event("wrong", rows(0, 1)[0].tobytes(), START + 365 * 24 * HOUR, None, Record("d", 0, 0, 1, 0, None, b""))]
    )
    core.follow()
    serve(core, [START + 60 * n for n in range(50, 100)], 30, 50)
    assert core.counts["labels"] == 100
    assert core.clock.ahead == 1
    assert core.watermark == START + 60 * 99 + 30
    assert (core.joins.counts["late"], core.joins.counts["orphan"], core.joins.counts["expired"]) == (0, 0, 0)


def test_after_a_weekend_without_traffic_time_goes_on_and_labels_join(core: Core) -> None:
    friday, monday = START, START + 62 * HOUR
    serve(core, [friday + 60 * n for n in range(50)], 30, 0)
    core.answer([Event("unlabelled", rows(0, 1)[0].tobytes(), friday, None, Record("d", 0, 0, 1, 0, None, b""))])
    core.follow()
    serve(core, [monday + 60 * n for n in range(50)], 30, 50)
    assert core.counts["labels"] == 100
    assert core.watermark == monday + 60 * 49 + 30
    assert core.clock.ahead == CONFIRMED_BY
    assert (core.joins.pending, core.joins.counts["expired"]) == (0, 1)
