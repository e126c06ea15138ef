from __future__ import annotations

from engine.floors import STEPS, Floors
from tests.engine.parts import KINDS

DATA, FEEDBACK = ("data", 0), ("feedback", 0)
WINDOW = 256.0


def floors() -> Floors:
    return Floors(KINDS, WINDOW)


def test_the_floor_is_the_first_record_that_may_still_wait() -> None:
    made = floors()
    for n in range(1000):
        made.mark(DATA, 10 * n, float(n), float(n))
    (floor,) = made.of({DATA: 10_000}, waiting=True).values()
    assert 10 * (999 - WINDOW - 2) <= floor <= 10 * (999 - WINDOW)
    assert made.of({DATA: 10_000}, waiting=False) == {DATA: 10_000}


def test_feedback_is_kept_for_two_windows_be_anything_waiting_or_not() -> None:
    made = floors()
    for n in range(1000):
        made.mark(FEEDBACK, n, float(n), float(n))
    assert 999 - 2 * WINDOW - 2 <= made.of({FEEDBACK: 1000}, waiting=False)[FEEDBACK] <= 999 - 2 * WINDOW


def test_marks_are_few_however_many_batches_there_are_and_whatever_their_times() -> None:
    made = floors()
    for n in range(50_000):
        made.mark(DATA, n, float(n % 700) + n / 100, float(n) / 100 + 700)
    ((_, _, firsts, _),) = made.state_dict()
    assert len(firsts) <= 3 * STEPS


def test_times_ahead_of_the_watermark_hold_no_floor_for_ever() -> None:
    made = floors()
    made.mark(DATA, 0, 4e9, 0.0)
    made.mark(DATA, 1, 300.0, 300.0)
    assert made.of({DATA: 2}, waiting=True) == {DATA: 1}


def test_floors_are_the_same_after_a_restart() -> None:
    made, again = floors(), floors()
    for n in range(500):
        made.mark(DATA, n, n / 3, n / 3)
    again.load_state_dict(made.state_dict())
    for one in (made, again):
        one.mark(DATA, 500, 400.0, 400.0)
    assert again.state_dict() == made.state_dict()
    made.forget([DATA])
    assert made.of({DATA: 9}, waiting=True) == {DATA: 9}
