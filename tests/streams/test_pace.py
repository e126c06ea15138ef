from __future__ import annotations

import threading
import time

from streams.pace import Hurry, Pace


def work(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_rests_follow_work_and_are_longer_than_it() -> None:
    rests: list[float] = []
    pace = Pace(rests.append)
    pace.rest()
    assert rests == [], "nothing was done yet"
    work(0.003)
    pace.rest()
    pace.rest()
    assert len(rests) == 1
    assert rests[0] >= 0.006


def test_parts_pass_and_are_looked_at_after_so_many() -> None:
    rests: list[float] = []
    done = []
    for part in Pace(rests.append).over("abcdefg", 3):
        work(0.002)
        done.append((part, len(rests)))
    assert done == [("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 1), ("f", 1), ("g", 2)]


def test_without_a_pause_nothing_rests() -> None:
    pace = Pace(None)
    work(0.002)
    pace.rest()
    assert list(pace.over([1, 2])) == [1, 2]


def test_a_hurry_ends_the_rest_under_way_and_those_after_it() -> None:
    hurry = Hurry()
    ended: list[bool] = []
    worker = threading.Thread(target=lambda: ended.append(hurry.pause(60)))
    worker.start()
    with hurry.while_waiting():
        worker.join()
        with hurry.while_waiting():
            pass
        assert hurry.pause(60), "the other one still waits"
    assert ended == [True]
    assert not hurry.pause(0.001)


def test_a_hurry_may_be_for_good() -> None:
    hurry = Hurry()
    hurry.begin()
    with hurry.while_waiting():
        pass
    assert hurry.pause(60)
