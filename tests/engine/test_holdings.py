from __future__ import annotations

import pytest

from engine.holdings import Begin, Holdings, Standing, seen_before
from streams.base import Found, Positions, StreamError

P = ("data", 3)


def begin(found: Found, *, start: Positions | None = None, taken: Positions | None = None) -> Begin:
    return Holdings(start or {}, taken or {}).begin(P, found)


def test_our_own_work_goes_on_unless_somebody_else_has_committed_since() -> None:
    own = {P: 40}
    assert begin(Found(0, 50), start=own) == Begin(40, 40, anew=False)
    assert begin(Found(0, 50, theirs=True), start=own) == Begin(50, 50, anew=True)
    assert begin(Found(0, 50, True, 45), start=own) == Begin(45, 50, anew=True)


def test_work_on_a_partition_that_was_just_taken_goes_on_although_others_committed_last() -> None:
    assert begin(Found(0, 50, True, 10), start={P: 30}, taken={P: 50}) == Begin(30, 50, anew=False)
    assert begin(Found(0, 60, True, 10), start={P: 30}, taken={P: 50}) == Begin(10, 60, anew=True)


def test_what_comes_from_others_is_read_from_its_floor() -> None:
    assert begin(Found(0, 50, True, 20)) == Begin(20, 50, anew=True)
    assert begin(Found(0, 50, True)) == Begin(50, 50, anew=True)
    assert begin(Found(7)) == Begin(7, 7, anew=True)


def test_a_floor_that_the_stream_no_longer_holds_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert begin(Found(30, 50, True, 20)) == Begin(30, 50, anew=True)
    assert "joins_not_rebuilt" in capsys.readouterr().out
    # A committed position that is gone is the source's to refuse.
    assert begin(Found(60, 50, True, 20)) == Begin(50, 50, anew=True)


def test_a_partition_that_is_given_back_untouched_goes_on_where_it_was() -> None:
    holdings = Holdings({}, {})
    holdings.leave(P, Standing({P: 70}))
    assert holdings.begin(P, Found(0, 70)) == Begin(70, 70, anew=False)
    holdings.leave(P, Standing({P: 70}))
    assert holdings.begin(P, Found(0, 80)) == Begin(80, 80, anew=True), "somebody went on without saying who"
    holdings.leave(P, Standing({P: 80}))
    holdings.settle([])
    assert holdings.begin(P, Found(0, 80, False, 60)) == Begin(60, 80, anew=True), "it was somewhere else in between"
    holdings.leave(P, None)
    assert holdings.begin(P, Found(0, 80, False, 60)).anew, "nothing is known of a partition that was given up"


def test_what_an_earlier_life_had_and_this_one_was_not_given_is_begun_anew() -> None:
    other = ("data", 4)
    holdings = Holdings({P: 70, other: 30}, {P: 60, other: 30})
    assert holdings.begin(P, Found(0, 70)) == Begin(70, 70, anew=False)
    holdings.settle([P])
    assert holdings.start == {P: 70}
    assert holdings.begin(other, Found(0, 30, False, 10)) == Begin(10, 30, anew=True), "what waited of it is dropped"


def test_what_an_earlier_life_had_applied_and_not_committed_counts_as_seen_unless_others_went_on() -> None:
    holdings = Holdings({P: 70}, {})
    holdings.settle([])
    assert holdings.begin(P, Found(0, 50, False, 10)) == Begin(10, 70, anew=True)
    holdings = Holdings({P: 70}, {})
    holdings.settle([])
    assert holdings.begin(P, Found(0, 50, True, 10)) == Begin(10, 50, anew=True)
    exact = Holdings({P: 70}, {}, exact=True)
    exact.settle([])
    with pytest.raises(StreamError, match="has no offset of data-3"):
        exact.check({P: Found(0)})
    assert exact.begin(P, Found(0, 50, False, 10)) == Begin(10, 50, anew=True), "nobody has seen those answers"


def test_where_others_have_worked_on_one_partition_of_a_number_none_of_it_goes_on() -> None:
    labels, other = ("feedback", 3), ("feedback", 4)
    holdings = Holdings({P: 40, labels: 30, other: 20}, {})
    found = {P: Found(0, 60, True, 10), labels: Found(0, 28, False, 5), other: Found(0, 20, False, 5)}
    assert holdings.begin_all(found) == {
        P: Begin(10, 60, anew=True),
        labels: Begin(5, 30, anew=True),
        other: Begin(20, 20, anew=False),
    }
    idle = Holdings({P: 40}, {})
    assert idle.begin_all({P: Found(0, 40), labels: Found(0)})[P] == Begin(40, 40, anew=False), "nobody worked on it"


def test_a_partition_that_goes_in_the_middle_of_a_rebuild_commits_nothing() -> None:
    assert Standing({P: 30}, {P: 50}).done == {}
    assert Standing({P: 51}, {P: 50}).done == {P: 51}


def test_where_one_partition_is_rebuilt_the_others_of_its_number_wait_for_it() -> None:
    begins = {
        ("data", 0): Begin(5, 5, True),
        ("feedback", 0): Begin(2, 9, True),
        ("data", 1): Begin(4, 4, True),
    }
    assert seen_before(begins) == {("data", 0): 5, ("feedback", 0): 9}


@pytest.mark.parametrize(("committed", "start", "anew"), [(5, 5, True), (10, 10, False), (12, 10, False)])
def test_with_exact_positions_what_was_reached_in_a_lost_transaction_is_done_again(
    committed: int, start: int, anew: bool
) -> None:
    holdings = Holdings({P: 10}, {}, exact=True)
    assert holdings.begin(P, Found(0, committed)) == Begin(start, start, anew)


def test_with_exact_positions_a_group_that_has_forgotten_its_offsets_is_refused_with_the_choices() -> None:
    holdings = Holdings({P: 10, ("data", 4): 7, ("feedback", 3): 2}, {}, exact=True)
    holdings.check({P: Found(0, 5), ("data", 4): Found(0, 9)})
    with pytest.raises(StreamError, match="no offset of data-3, data-4 any more") as told:
        holdings.check({("feedback", 3): Found(2), ("data", 5): Found(2), ("data", 4): Found(2), P: Found(2)})
    assert "set them back (data:3 to 10, data:4 to 7 is what" in str(told.value)
    assert "--fresh" in str(told.value)
    assert holdings.start[P] == 10


def test_with_exact_positions_a_partition_of_which_nothing_was_committed_yet_is_begun_at_the_beginning() -> None:
    for start in ({}, {P: 2}):
        holdings = Holdings(start, {}, exact=True)
        holdings.check({P: Found(2)})
        assert holdings.begin(P, Found(2)).start == 2


def test_where_answers_may_come_again_a_group_that_has_forgotten_its_offsets_costs_nothing() -> None:
    holdings = Holdings({P: 10}, {})
    holdings.check({P: Found(2)})
    assert holdings.begin(P, Found(2)) == Begin(10, 10, anew=False)


def test_what_an_earlier_life_had_committed_is_not_taken_for_the_work_of_others() -> None:
    holdings = Holdings({P: 4}, {})
    found = Found(0, 10)
    assert holdings.begin(P, found) == Begin(4, 4, anew=False)
    holdings.leave(P, Standing({P: 6}))  # a rebalance before the journal was repeated
    assert holdings.begin(P, found) == Begin(6, 6, anew=False)
    holdings.leave(P, Standing({P: 8}))
    assert holdings.begin(P, Found(0, 11)) == Begin(11, 11, anew=True)
