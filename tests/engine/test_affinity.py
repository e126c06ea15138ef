"""Where threads run. Real threads and the real calls; only how busy processors are is told by the test."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
import torch

from engine import affinity
from engine.affinity import LOOKS, Affinity, busy_seconds
from engine.daemon import Daemon
from engine.launch import run_policy
from engine.policyfile import load
from engine.status import status
from tests.engine.test_restarts import MODEL

POLICY = """\
version: 1
state: ./state
model: {factory: "./model.py:build", device: cpu, inputs: {shape: [4]}}
streams:
  data: {file: ./events.jsonl, follow: true}
  predictions: {file: ./answers.jsonl}
adaptation: {method: none}
metrics: {enabled: false}
"""

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="threads can be moved on Linux alone, and need two processors",
)


class Machine:
    """A clock, and what takes the processors, as the test says; a look takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.others = dict.fromkeys(os.sched_getaffinity(0), 0.0)
        """The share of each processor that others take."""
        self.apart = 0
        """How many of our threads compute apart."""
        self.own = 0.0
        """The share of its processor that each of our threads takes."""
        monkeypatch.setattr(affinity, "CLOCK", self)
        monkeypatch.setattr(affinity, "_spent", lambda thread: self.now * self.own)
        self.together = Affinity(wanted=True, busy=self.busy)

    def monotonic(self) -> float:
        return self.now

    def busy(self) -> dict[int, float]:
        ours = {self.together.processor: (len(threading.enumerate()) - self.apart) * self.own}
        return {p: self.now * (share + ours.get(p, 0.0)) for p, share in self.others.items()}

    def looks(self, count: int) -> list[int | None]:
        """Where we are after each of some looks."""
        found = []
        for _ in range(count):
            self.now += 1.0
            self.together.look()
            found.append(self.together.processor)
        return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, allowed: set[int]) -> Iterator[Machine]:
    made = Machine(monkeypatch)
    yield made
    made.together.release()


@pytest.fixture
def allowed() -> Iterator[set[int]]:
    before, tensors = os.sched_getaffinity(0), torch.get_num_threads()
    yield before
    after = os.sched_getaffinity(0)
    for name in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(name), before)
    torch.set_num_threads(tensors)
    assert after == before, "the test has left this thread on some processors alone"


@pytest.fixture
def thread() -> Iterator[Callable[[Callable[[], None]], int]]:
    """Starts threads that wait for the end of the test; gives their numbers."""
    end = threading.Event()
    started = list[threading.Thread]()

    def start(begin: Callable[[], None]) -> int:
        ready = threading.Event()

        def run() -> None:
            begin()
            ready.set()
            end.wait()

        started.append(threading.Thread(target=run))
        started[-1].start()
        ready.wait()
        assert started[-1].native_id is not None
        return started[-1].native_id

    yield start
    end.set()
    for one in started:
        one.join()


def test_threads_that_run_python_share_one_processor_until_released(
    allowed: set[int], thread: Callable[[Callable[[], None]], int]
) -> None:
    other = thread(lambda: None)
    together = Affinity(wanted=True)

    together.look()

    assert together.processor in allowed
    assert os.sched_getaffinity(0) == os.sched_getaffinity(other) == {together.processor}
    together.release()
    assert os.sched_getaffinity(other) == allowed


def test_threads_that_run_no_python_are_free(allowed: set[int]) -> None:
    number, end, over = list[int](), threading.Event(), threading.Event()

    def unknown() -> None:  # to `threading`, as a thread of a library in C is
        number.append(threading.get_native_id())
        end.wait()
        over.set()

    together = Affinity(wanted=True)
    together.look()
    _thread.start_new_thread(unknown, ())
    while not number:
        os.sched_yield()
    inherited = os.sched_getaffinity(number[0])

    together.look()
    freed = os.sched_getaffinity(number[0])
    together.release()
    end.set()
    over.wait()

    assert inherited != allowed
    assert freed == allowed


def test_what_is_not_wanted_changes_nothing(allowed: set[int]) -> None:
    apart = Affinity(wanted=False)

    apart.look()

    assert apart.processor is None
    assert os.sched_getaffinity(0) == allowed
    assert apart.apart(os.sched_getaffinity, 0) == allowed


def test_others_that_take_our_processor_for_long_make_us_move_to_one_that_is_free(machine: Machine) -> None:
    machine.own = 0.1
    (first,) = machine.looks(1)
    assert first is not None
    machine.others[first] = 0.5

    where = machine.looks(LOOKS + 1)

    assert where[: LOOKS - 1] == [first] * (LOOKS - 1), "one look is not enough"
    assert where[-1] not in (None, first)
    assert os.sched_getaffinity(0) == {where[-1]}


def test_others_are_seen_also_while_something_computes_apart(machine: Machine) -> None:
    machine.own = 0.5
    (first,) = machine.looks(1)
    assert first is not None
    machine.others[first], machine.apart = 0.5, 1

    where = machine.together.apart(machine.looks, LOOKS + 2)  # this thread's half of a processor is taken elsewhere

    assert where[-1] not in (None, first)


@pytest.mark.parametrize(
    ("own", "others", "elsewhere"),
    [(0.9, 0.0, 0.0), (0.1, 0.2, 0.0), (0.1, 0.5, 0.45), (0.1, 0.5, 0.9)],
    ids=["all of it is ours", "others take little", "hardly better elsewhere", "worse elsewhere"],
)
def test_nobody_moves_without_need(own: float, others: float, elsewhere: float, machine: Machine) -> None:
    machine.own = own
    (first,) = machine.looks(1)
    assert first is not None
    machine.others = dict.fromkeys(machine.others, elsewhere) | {first: others}

    assert machine.looks(2 * LOOKS + 2) == [first] * (2 * LOOKS + 2)


def test_where_the_system_refuses_threads_are_left_where_they_are(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, allowed: set[int]
) -> None:
    monkeypatch.setattr(affinity, "_run_on", lambda thread, where: None)

    assert machine.looks(2) == [None, None]
    assert os.sched_getaffinity(0) == allowed


def test_a_thread_of_a_library_that_has_chosen_its_place_keeps_it(allowed: set[int], machine: Machine) -> None:
    (processor,) = machine.looks(1)
    places, end, over = list[int](), threading.Event(), threading.Event()
    chosen = min(allowed - {processor})

    def unknown() -> None:
        os.sched_setaffinity(0, {chosen})
        places.append(threading.get_native_id())
        end.wait()
        over.set()

    _thread.start_new_thread(unknown, ())
    while not places:
        os.sched_yield()
    machine.looks(1)
    place = os.sched_getaffinity(places[0])
    end.set()
    over.wait()

    assert place == {chosen}


def test_what_computes_for_long_may_run_anywhere_meanwhile(allowed: set[int]) -> None:
    together = Affinity(wanted=True)
    together.look()

    def compute(value: int) -> tuple[int, set[int]]:
        together.look()  # which another thread does, meanwhile
        return value, os.sched_getaffinity(0)

    found = together.apart(compute, 7)
    after = os.sched_getaffinity(0)
    together.release()

    assert found == (7, allowed)
    assert len(after) == 1


async def test_threads_are_looked_at_again_and_again(
    allowed: set[int], thread: Callable[[Callable[[], None]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "LOOK_SECONDS", 0.001)
    together = Affinity(wanted=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(together.keep)
        while together.processor is None:
            await anyio.sleep(0)
        later = thread(lambda: os.sched_setaffinity(0, allowed))
        with anyio.fail_after(60):
            while os.sched_getaffinity(later) == allowed:
                await anyio.sleep(0.001)
        together.release()  # and with that nobody looks any more


async def test_nobody_looks_after_a_release_in_the_moment_in_which_a_sleep_ends(
    allowed: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Affinity(wanted=True)
    looks: list[float] = []

    async def sleep(seconds: float) -> None:
        looks.append(seconds)
        assert len(looks) < 3
        together.release()

    monkeypatch.setattr(anyio, "sleep", sleep)
    await together.keep()
    assert len(looks) == 1
    assert (together.processor, os.sched_getaffinity(0)) == (None, allowed)


def test_processors_have_been_busy_since_the_machine_started() -> None:
    assert busy_seconds().keys() >= os.sched_getaffinity(0)
    assert all(spent > 0 for spent in busy_seconds().values())


@pytest.mark.parametrize(
    ("flags", "shared"),
    [
        (["model.threads=1"], True),
        (["model.threads=1", "model.affinity=any"], False),
        (["model.threads=2"], False),
        (["model.affinity=one_processor"], True),
        ([], False),
    ],
)
def test_a_daemon_shares_one_processor_where_its_model_computes_on_one_thread_or_where_told(
    flags: list[str], shared: bool, tmp_path: Path, allowed: set[int]
) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "events.jsonl").write_text(json.dumps({"id": "e", "inputs": [0, 0, 0, 0], "time": 1}) + "\n")
    seen = list[tuple[object, set[int]]]()

    async def look(daemon: Daemon) -> None:
        with anyio.fail_after(60):
            while not daemon.writer.sent:
                await anyio.sleep(0.001)
        model = await daemon.on_model(os.sched_getaffinity, 0)
        seen.append((status(daemon)["processor"], model))
        daemon.stop()

    run_policy(load(str(tmp_path / "policy.yaml"), flags, {}), watch=look)

    ((processor, model),) = seen
    assert (processor in allowed) == shared
    assert len(model) == (1 if shared else len(allowed))
    assert os.sched_getaffinity(0) == allowed, "free again once it has ended"
