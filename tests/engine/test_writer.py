from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from engine import writer as module
from engine.coretypes import Answers
from engine.cutter import Bad
from engine.metrics import Metrics
from engine.writer import QUEUE_BATCHES, Outgoing, Writer
from streams.base import Message, Positions, Record, RefusedMessageError, StreamError, StreamUnavailableError
from streams.codec import BadRecord, Events, Reason
from streams.memory import MemorySink
from tests.engine.cores import CLASSES, events

Log = list[tuple[str, object]]


class Sink(MemorySink):
    """Notes what is asked of it, and fails as often as it is told."""

    def __init__(self, name: str, log: Log) -> None:
        super().__init__(name)
        self.log = log
        self.failures: dict[str, list[Exception]] = {"send": [], "flush": []}

    def _fail(self, call: str) -> None:
        if self.failures[call]:
            raise self.failures[call].pop(0)

    def send(self, messages: Sequence[Message]) -> None:
        self._fail("send")
        self.log.append((f"{self.name}.send", len(messages)))
        super().send(messages)

    def flush(self, timeout: float) -> None:
        self._fail("flush")
        self.log.append((f"{self.name}.flush", None))
        super().flush(timeout)

    def close(self) -> None:
        self.log.append((f"{self.name}.close", None))
        self._open = False


class Harness:
    def __init__(self, *, letters: bool = True) -> None:
        self.log: Log = []
        self.predictions, self.letters = Sink("predictions", self.log), Sink("letters", self.log)
        self.metrics = Metrics(CollectorRegistry())
        self.writer = Writer(
            self.predictions,
            self.letters if letters else None,
            form="json",
            flushed=self.flushed,
            metrics=self.metrics,
        )
        self.writer.open()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def flushed(self, positions: Positions, floors: Positions) -> None:
        self.log.append(("flushed", dict(positions)))

    def run(self) -> None:
        """Write everything that was put, on this thread."""
        self.writer.stop()
        self.writer.run()

    def begin(self) -> None:
        """Write beside the test."""
        self.thread = threading.Thread(target=self.writer.run, daemon=True)
        self.thread.start()

    def join(self) -> None:
        assert self.thread is not None
        self.thread.join(60)
        assert not self.thread.is_alive(), "the writer hangs"

    @property
    def calls(self) -> list[str]:
        return [name for name, _ in self.log]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", (0.0,))
    made = Harness()
    yield made
    made.writer.abort()
    if made.thread is not None:
        made.join()


def answers(start: int, count: int) -> Outgoing:
    rows = events(start, count)
    probabilities = np.full((count, CLASSES), 1 / CLASSES, dtype=np.float32)
    given = Answers(Events.of(rows), np.arange(start, start + count) % CLASSES, probabilities, release=2, step=7)
    return Outgoing(given, positions={("data", 0): start + count})


def bad(offset: int) -> Bad:
    record = Record("data", 0, offset, offset + 1, 0.0, b"k", b"\xff")
    return Bad(record, BadRecord(Reason.NOT_JSON, "no JSON"))


def ids(sink: MemorySink) -> list[str]:
    return [json.loads(message.value)["id"] for message in sink.messages]


def test_positions_are_passed_on_only_after_everything_before_them_is_flushed(harness: Harness) -> None:
    harness.writer.put(answers(0, 2))
    harness.writer.put(Outgoing(bad=[bad(2)], positions={("data", 0): 3, ("feedback", 0): 9}))
    harness.run()
    assert harness.calls == [
        "predictions.send",
        "letters.send",
        "predictions.flush",
        "letters.flush",
        "flushed",
        "predictions.close",
        "letters.close",
    ]
    assert ("flushed", {("data", 0): 3, ("feedback", 0): 9}) in harness.log


def test_answers_hold_what_was_answered(harness: Harness) -> None:
    harness.writer.put(answers(3, 2))
    harness.run()
    assert ids(harness.predictions) == ["e3", "e4"]
    first = json.loads(harness.predictions.messages[0].value)
    assert (first["label"], first["model"]) == (0, {"release": 2, "step": 7})
    assert first["probabilities"] == pytest.approx([1 / 3] * 3)
    assert harness.writer.sent == 2


@pytest.mark.parametrize(("answered", "sent"), [(0, 6), (2, 4), (3, 3), (6, 0), (9, 0)])
def test_rows_that_were_answered_before_are_not_answered_again(harness: Harness, answered: int, sent: int) -> None:
    harness.writer.answered = {("data", 0): answered}
    harness.writer.put(answers(0, 3))
    harness.writer.put(answers(3, 3))
    harness.run()
    assert ids(harness.predictions) == [f"e{number}" for number in range(6 - sent, 6)]
    labels = [json.loads(message.value)["label"] for message in harness.predictions.messages]
    assert labels == [number % CLASSES for number in range(6 - sent, 6)]
    expected: Positions = {("data", 0): 6} if sent else {}
    assert ("flushed", expected) in harness.log, "what was committed before is not taken back"


def test_dead_letters_tell_where_they_come_from_and_are_not_repeated(harness: Harness) -> None:
    harness.writer.answered = {("data", 0): 5}
    harness.writer.put(Outgoing(bad=[bad(4), bad(5)], positions={("data", 0): 6}))
    harness.run()
    (letter,) = harness.letters.messages
    assert (letter.key, letter.value) == (b"k", b"\xff")
    headers = dict(letter.headers)
    assert headers["__adaptd.errors.offset"] == b"5"
    assert headers["__adaptd.errors.reason"] == b"not_json"
    assert harness.metrics.registry.get_sample_value("adaptd_dead_letters_total", {"reason": "not_json"}) == 1


def test_without_a_stream_for_them_dead_letters_are_counted() -> None:
    harness = Harness(letters=False)
    harness.writer.put(Outgoing(bad=[bad(0)], positions={("data", 0): 1}))
    harness.run()
    assert harness.metrics.registry.get_sample_value("adaptd_dead_letters_total", {"reason": "not_json"}) == 1
    assert ("flushed", {("data", 0): 1}) in harness.log


def test_what_is_refused_for_now_is_tried_again_until_it_is_taken(harness: Harness) -> None:
    harness.predictions.failures["send"] = [StreamUnavailableError("full")] * 3
    harness.predictions.failures["flush"] = [StreamUnavailableError("slow")] * 2
    harness.writer.put(answers(0, 2))
    harness.run()
    assert ids(harness.predictions) == ["e0", "e1"]
    assert harness.calls.count("flushed") == 1
    assert harness.calls.index("predictions.flush") < harness.calls.index("flushed")
    assert harness.writer.waiting_for == ""


def test_the_waits_between_attempts_grow_and_what_is_waited_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    waits, told, available = [], [], []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        told.append(harness.writer.waiting_for)
        available.append(harness.writer.available)
        return False

    monkeypatch.setattr(harness.writer._abort, "wait", wait)
    harness.predictions.failures["send"] = [StreamUnavailableError("no broker answers")] * 8
    harness.writer.put(answers(0, 1))
    harness.run()
    assert waits == [*module.BACKOFF_SECONDS, 5.0, 5.0]
    assert set(told) == {"predictions: no broker answers"}
    assert all(each == {"predictions": False, "letters": True} for each in available)
    assert harness.writer.available == {"predictions": True, "letters": True}


def test_what_was_answered_before_is_looked_at_until_it_is_passed_and_again_once_partitions_come(
    harness: Harness,
) -> None:
    writer, others = harness.writer, {("data", 1): 9}
    writer.answered = {("data", 0): 2, **others}
    assert writer._answered_of(answers(0, 1)) == {("data", 0): 2}
    assert writer._answered_of(answers(1, 3)) == {("data", 0): 2}
    assert writer._answered_of(answers(4, 3)) == {}
    writer.answered = {**writer.answered, ("data", 0): 12}
    writer.put(answers(10, 3))
    harness.run()
    assert ids(harness.predictions) == ["e12"]
    assert writer._ahead == others


def test_a_barrier_is_passed_once_everything_before_it_is_flushed(harness: Harness) -> None:
    harness.begin()
    harness.writer.put(answers(0, 2))
    harness.writer.wait_flushed()
    assert harness.predictions.flushed == 2
    assert ("flushed", {("data", 0): 2}) in harness.log
    harness.writer.wait_flushed()
    harness.writer.stop()
    harness.join()


class Ticking:
    """A clock by which everything takes 0.3 seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += 0.3
        return self.now


def test_where_there_is_always_something_to_write_answers_wait_for_a_flush_every_two_seconds_only(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOCK", Ticking())
    for number in range(10):
        harness.writer.put(answers(number, 1))
    harness.run()
    assert [what for name, what in harness.log if name == "flushed"] == [{("data", 0): 7}, {("data", 0): 10}]


def test_what_was_written_is_flushed_once_there_is_nothing_to_write(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.writer, "_interval", math.inf)
    harness.begin()
    harness.writer.put(answers(0, 2))
    deadline = time.monotonic() + 60
    while "flushed" not in harness.calls and time.monotonic() < deadline:
        time.sleep(0.001)
    assert ("flushed", {("data", 0): 2}) in harness.log


class Stubborn(Sink):
    """Never takes anything."""

    def __init__(self, name: str, log: Log) -> None:
        super().__init__(name, log)
        self.asked = threading.Event()

    def send(self, messages: Sequence[Message]) -> None:
        self.asked.set()
        raise StreamUnavailableError("down")


def test_an_abort_ends_the_retries_and_passes_on_nothing_that_is_not_out(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    harness.predictions = Stubborn("predictions", harness.log)
    harness.writer._predictions = harness.predictions
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.0)
    harness.begin()
    harness.writer.put(answers(0, 2))
    assert harness.predictions.asked.wait(60)
    harness.writer.abort()
    harness.join()
    assert "flushed" not in harness.calls
    assert "predictions.close" in harness.calls


@pytest.mark.parametrize("call", [lambda writer: writer.put(Outgoing()), lambda writer: writer.stop()])
def test_nobody_waits_for_a_writer_that_has_ended(harness: Harness, call: Callable[[Writer], None]) -> None:
    for _ in range(QUEUE_BATCHES):
        harness.writer.put(Outgoing())
    assert harness.writer.depth == QUEUE_BATCHES
    harness.writer.abort()
    call(harness.writer)
    with pytest.raises(StreamUnavailableError, match="closed before everything was written"):
        harness.writer.wait_flushed()


def test_an_error_that_retrying_does_not_help_ends_the_writer_and_closes_the_sinks(harness: Harness) -> None:
    harness.predictions.failures["send"] = [StreamError("too large")]
    harness.writer.put(answers(0, 2))
    harness.writer.stop()
    with pytest.raises(StreamError, match="too large"):
        harness.writer.run()
    assert "flushed" not in harness.calls
    assert harness.calls[-2:] == ["predictions.close", "letters.close"]
    with pytest.raises(StreamUnavailableError):
        harness.writer.wait_flushed()


def test_a_letter_that_its_stream_cannot_hold_goes_without_its_value(harness: Harness) -> None:
    harness.letters.failures["send"] = [RefusedMessageError("too large")]
    harness.writer.put(Outgoing(bad=[bad(0)], positions={("data", 0): 1}))
    harness.run()
    (letter,) = harness.letters.messages
    assert (letter.value, dict(letter.headers)["__adaptd.errors.omitted"]) == (b"", b"1")


def test_the_refusal_of_an_earlier_letter_takes_no_value_from_the_next_one_and_ends_the_writer(
    harness: Harness,
) -> None:
    harness.writer.put(Outgoing(bad=[bad(0)], positions={("data", 0): 1}))
    harness.writer.put(Outgoing(bad=[bad(1)], positions={("data", 0): 2}))
    send = harness.letters.send

    def send_and_hear_later(messages: Sequence[Message]) -> None:
        send(messages)
        harness.letters.failures["send"] = [StreamError("topic letters refuses a message of 9 bytes")]

    harness.letters.send = send_and_hear_later  # type: ignore[method-assign]
    with pytest.raises(StreamError, match="refuses a message of 9 bytes"):
        harness.run()
    assert [letter.value for letter in harness.letters.messages] == [b"\xff"]
    assert "flushed" not in harness.calls


def test_which_rows_were_answered_before_is_looked_up_once_for_a_batch(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Positions] = [{("data", 0): 1}]
    monkeypatch.setattr(Writer, "answered", property(lambda _: told.pop()), raising=False)
    item = answers(0, 3)
    assert item.answers is not None
    (messages, _) = harness.writer._encode(item.answers, harness.writer._answered_of(item))
    assert [json.loads(message.value)["id"] for message in messages] == ["e1", "e2"]
