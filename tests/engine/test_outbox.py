from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from engine import outbox as outbox_module
from engine import writer as module
from engine.coretypes import Answers
from engine.cutter import Bad
from engine.metrics import Metrics
from engine.outbox import CountedTransactions
from engine.writer import Outgoing, Writer
from streams.base import Message, Partition, Positions, Record, RefusedMessageError, StreamError, StreamUnavailableError
from streams.codec import BadRecord, Events, Reason
from tests.engine.cores import CLASSES, events

P = ("data", 0)
STEPS = ("begin", "predictions.send", "letters.send", "predictions.flush", "letters.flush", "commit")


class Cluster:
    """A cluster with one transaction at a time: what is sent is seen once it is committed, or never.

    ``failing`` names the calls that fail, with how often each has been called before, and whether after their effect.
    """

    def __init__(self, failing: Mapping[tuple[str, int], bool] | None = None) -> None:
        self.failing = dict(failing or {})
        self.calls: dict[str, int] = {}
        self.visible: list[tuple[str, Message]] = []
        self.committed: Positions = {}
        self.floors: dict[Partition, int] = {}
        self.pending: list[tuple[str, Message]] | None = None
        self.broken = True
        self.recoveries = 0
        self.replaced = False

    def step(self, call: str) -> bool:
        """Count a call; raise where it fails before its effect, and tell whether it is to fail after it."""
        at = call, self.calls.get(call, 0)
        self.calls[call] = at[1] + 1
        after = self.failing.pop(at, None)
        if after is False:
            self.broken = True
            raise StreamUnavailableError(f"{call} failed")
        return after is True

    def fail(self, call: str, after: bool) -> None:
        if after:
            self.broken = True
            raise StreamUnavailableError(f"{call} failed after its effect")

    def open(self) -> Positions:
        self.broken, self.pending = False, None
        return dict(self.committed)

    def begin(self) -> None:
        assert not self.broken
        after = self.step("begin")
        assert self.pending is None
        self.pending = []
        self.fail("begin", after)

    def commit(
        self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None, timeout: float
    ) -> None:
        assert not self.broken
        after = self.step("commit")
        assert self.pending is not None
        self.visible += self.pending
        self.committed |= positions
        self.floors |= floors or {}
        self.pending = None
        self.fail("commit", after)

    def recover(self) -> Positions:
        if self.replaced:
            raise StreamError("another process writes as g-m")
        after = self.step("recover")
        self.recoveries += 1
        self.broken, self.pending = False, None
        self.fail("recover", after)
        return dict(self.committed)

    def close(self) -> None:
        self.pending = None


class Sink:
    def __init__(self, name: str, cluster: Cluster, largest: int = 10_000) -> None:
        self.name = name
        self._cluster = cluster
        self._largest = largest

    def open(self) -> None: ...

    def send(self, messages: Sequence[Message]) -> None:
        if any(len(message.value) > self._largest for message in messages):
            raise RefusedMessageError(f"a message is too large for {self.name}")
        assert not self._cluster.broken
        after = self._cluster.step(f"{self.name}.send")
        assert self._cluster.pending is not None, "sent outside of a transaction"
        self._cluster.pending += [(self.name, message) for message in messages]
        self._cluster.fail(f"{self.name}.send", after)

    def flush(self, timeout: float) -> None:
        assert not self._cluster.broken
        self._cluster.fail(f"{self.name}.flush", self._cluster.step(f"{self.name}.flush"))

    def close(self) -> None: ...


def writer_on(cluster: Cluster, largest_letter: int = 10_000, metrics: Metrics | None = None) -> Writer:
    def flushed(positions: Positions, floors: Positions) -> None:
        raise AssertionError("positions are passed on beside the transactions")

    metrics = metrics or Metrics(CollectorRegistry())
    writer = Writer(
        Sink("predictions", cluster),
        Sink("letters", cluster, largest_letter),
        form="json",
        flushed=flushed,
        metrics=metrics,
        transactions=CountedTransactions(cluster, metrics),
    )
    writer.open()
    return writer


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", (0.0,))


def answers(start: int, count: int) -> Outgoing:
    rows = events(start, count)
    probabilities = np.full((count, CLASSES), 1 / CLASSES, dtype=np.float32)
    given = Answers(Events.of(rows), np.arange(start, start + count) % CLASSES, probabilities, release=2, step=7)
    return Outgoing(given, positions={P: start + count})


def letters(offset: int, size: int = 1) -> Outgoing:
    record = Record("data", 0, offset, offset + 1, 0.0, b"k", b"\xff" * size)
    return Outgoing(bad=[Bad(record, BadRecord(Reason.NOT_JSON, "no JSON"))], positions={P: offset + 1})


def story() -> list[Outgoing]:
    """Offsets 0 to 9 in several transactions; 2 and 7 cannot be decoded."""
    return [answers(0, 2), letters(2), answers(3, 2), Outgoing(positions={("feedback", 0): 4}), answers(5, 2),
            letters(7), answers(8, 2)]  # fmt: skip


def run(writer: Writer, items: Sequence[Outgoing], monkeypatch: pytest.MonkeyPatch, every: int = 2) -> None:
    """Write everything, with a commit after each few items and at the end."""
    monkeypatch.setattr(writer, "_interval", float("inf"))
    for index, item in enumerate(items):
        writer._write(item)
        if index % every == every - 1:
            writer._flush()
    writer._flush()


def check(cluster: Cluster) -> None:
    answered = [json.loads(message.value)["id"] for name, message in cluster.visible if name == "predictions"]
    assert answered == [f"e{n}" for n in (0, 1, 3, 4, 5, 6, 8, 9)]
    buried = [dict(m.headers)["__adaptd.errors.offset"] for name, m in cluster.visible if name == "letters"]
    assert buried == [b"2", b"7"]
    assert cluster.committed == {P: 10, ("feedback", 0): 4}
    assert cluster.pending is None


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("call", "nth"), list(itertools.product(STEPS, range(3))))
def test_whatever_fails_each_answer_becomes_visible_once(
    call: str, nth: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({(call, nth): after})
    run(writer_on(cluster), story(), monkeypatch)
    check(cluster)
    assert cluster.recoveries == 1 - len(cluster.failing)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_fails_again_and_again_each_answer_becomes_visible_once(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    calls = (*STEPS, "recover")
    failing = {(calls[rng.integers(len(calls))], int(rng.integers(6))): bool(rng.integers(2)) for _ in range(10)}
    cluster = Cluster(failing)
    run(writer_on(cluster), story(), monkeypatch, every=int(rng.integers(1, 4)))
    check(cluster)


@pytest.mark.parametrize(("call", "after"), [("predictions.send", False), ("commit", False), ("commit", True)])
def test_transactions_are_counted_by_their_end_and_commits_are_timed(
    call: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(CollectorRegistry())
    cluster = Cluster({(call, 1): after, ("recover", 0): False})
    run(writer_on(cluster, metrics=metrics), [answers(start, 2) for start in range(0, 8, 2)], monkeypatch, every=1)

    def count(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"adaptd_transaction{name}", labels)

    heard = cluster.calls["commit"] - (call == "commit")
    assert count("s_total", result="committed") == count("_commit_duration_seconds_count") == heard >= 3
    assert count("s_total", result="given_up") == 1


def test_a_commit_whose_outcome_was_lost_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster({("commit", 0): True})
    run(writer_on(cluster), [answers(0, 3)], monkeypatch)
    assert cluster.calls["predictions.send"] == 1
    assert (cluster.calls["commit"], cluster.recoveries) == (1, 1)
    assert len(cluster.visible) == 3


def test_what_was_committed_in_an_earlier_life_is_not_answered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.committed = {P: 4}
    writer = writer_on(cluster)
    run(writer, story(), monkeypatch)
    assert [json.loads(m.value)["id"] for n, m in cluster.visible if n == "predictions"] == [
        f"e{n}" for n in (4, 5, 6, 8, 9)
    ]
    assert writer.sent == 5


def test_positions_alone_are_committed_and_none_that_are_committed_already(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.committed = {P: 4}
    writer = writer_on(cluster)
    run(writer, [Outgoing(positions={P: 3})], monkeypatch)
    assert "begin" not in cluster.calls
    run(writer, [Outgoing(positions={("feedback", 0): 9}, floors={("feedback", 0): 2, P: 1})], monkeypatch)
    assert cluster.committed == {P: 4, ("feedback", 0): 9}
    assert cluster.floors == {("feedback", 0): 2}


def test_nothing_of_partitions_that_are_lost_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    writer = writer_on(cluster)
    monkeypatch.setattr(writer, "_interval", float("inf"))
    writer._write(answers(0, 2))
    writer._write(Outgoing(positions={("feedback", 0): 4}))
    writer.lose([P])
    writer._write(answers(2, 2))  # it waited in the queue while its partition went
    writer._flush()
    assert cluster.visible == []
    assert cluster.committed == {("feedback", 0): 4}
    writer._write(Outgoing(gone=[P], lost=True))
    writer._write(answers(8, 2))  # the partition is back
    writer._flush()
    assert len(cluster.visible) == 2
    assert cluster.committed == {P: 10, ("feedback", 0): 4}


def test_what_was_sent_of_a_lost_partition_is_not_committed_though_its_loss_has_come_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    writer = writer_on(cluster)
    monkeypatch.setattr(writer, "_interval", float("inf"))
    writer._write(answers(0, 2))
    writer.lose([P])
    writer._write(Outgoing(gone=[P], lost=True))
    writer._flush()
    assert (cluster.visible, cluster.committed) == ([], {})
    writer._write(answers(8, 2))
    writer._flush()
    assert (len(cluster.visible), cluster.committed) == (2, {P: 10})


def test_partitions_that_are_lost_while_a_commit_is_refused_are_left_out_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster({("commit", 0): False})
    writer = writer_on(cluster)
    monkeypatch.setattr(writer._abort, "wait", lambda _: writer.lose([P]))  # called between two attempts
    run(writer, [answers(0, 2), Outgoing(positions={("feedback", 0): 4})], monkeypatch)
    assert cluster.visible == []
    assert cluster.committed == {("feedback", 0): 4}


def test_a_partition_that_is_lost_twice_stays_lost_until_both_losses_have_come_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    writer = writer_on(cluster)
    writer.lose([P])
    writer.lose([P])
    run(writer, [Outgoing(gone=[P], lost=True), answers(0, 2)], monkeypatch)
    assert cluster.committed == {}
    run(writer, [Outgoing(gone=[P], lost=True), answers(2, 2)], monkeypatch)
    assert cluster.committed == {P: 4}


def test_where_another_process_has_taken_our_place_the_writer_ends_and_writes_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster({("commit", 0): False})
    cluster.replaced = True
    writer = writer_on(cluster)
    with pytest.raises(StreamError, match="another process writes as g-m"):
        run(writer, [answers(0, 2)], monkeypatch)
    assert cluster.visible == []
    assert "recover" not in cluster.calls


def test_a_dead_letter_that_is_too_large_goes_without_its_value_in_the_same_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    run(writer_on(cluster, largest_letter=100), [answers(0, 2), letters(2, size=500), answers(3, 1)], monkeypatch, 9)
    values = [message.value for name, message in cluster.visible if name == "letters"]
    assert values == [b""]
    assert (cluster.calls["commit"], cluster.recoveries) == (1, 0)
    assert cluster.committed == {P: 4}


def test_a_dead_letter_that_is_too_large_is_told_from_those_that_are_sent_again_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster({("commit", 0): True, ("letters.send", 1): False})
    items = [letters(0), letters(1), letters(2, size=500), letters(3)]
    run(writer_on(cluster, largest_letter=100), items, monkeypatch)
    assert [message.value for _, message in cluster.visible] == [b"\xff", b"\xff", b"", b"\xff"]
    assert cluster.committed == {P: 4}


def test_a_commit_is_due_where_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_MESSAGES", 5)
    cluster = Cluster()
    writer = writer_on(cluster)
    monkeypatch.setattr(writer, "_interval", float("inf"))
    found = []
    for start, count in ((0, 4), (4, 1)):
        writer._write(answers(start, count))
        found.append(writer._full)
    writer._flush()
    found.append(writer._full)
    monkeypatch.setattr(outbox_module, "MAX_BYTES", 5)
    writer._write(answers(5, 1))
    assert [*found, writer._full] == [False, True, False, True]


def test_sinks_are_open_before_the_transactions_that_their_limits_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(Sink, "open", lambda sink: opened.append(sink.name))
    cluster = Cluster()

    def open_transactions() -> Positions:
        opened.append("transactions")
        return {}

    monkeypatch.setattr(cluster, "open", open_transactions)
    writer_on(cluster)
    assert opened == ["predictions", "letters", "transactions"]


def test_a_transaction_that_is_left_with_nothing_is_not_used_for_what_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    writer = writer_on(cluster)
    really = cluster.begin

    def begin() -> None:
        really()
        if cluster.calls["begin"] == 1:
            writer.lose([P])  # the group has missed the member that this transaction is of

    monkeypatch.setattr(cluster, "begin", begin)
    run(writer, [answers(0, 2)], monkeypatch)
    assert (cluster.visible, cluster.committed) == ([], {})
    run(writer, [Outgoing(gone=[P], lost=True), answers(8, 2)], monkeypatch)
    assert (cluster.calls["begin"], cluster.recoveries) == (2, 1)
    assert (len(cluster.visible), cluster.committed) == (2, {P: 10})


def test_positions_that_are_lost_while_a_transaction_begins_are_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    writer = writer_on(cluster)
    really = cluster.begin

    def begin() -> None:
        really()
        writer.lose([("feedback", 0)])

    monkeypatch.setattr(cluster, "begin", begin)
    run(writer, [Outgoing(positions={("feedback", 0): 4})], monkeypatch)
    assert ("commit" in cluster.calls, cluster.committed) == (False, {})
