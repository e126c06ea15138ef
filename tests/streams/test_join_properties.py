from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import Record
from streams.join import Joined, JoinStore, Waiting
from tests.streams.join_helpers import ENDINGS, Feedback, saved

Call = (
    tuple[Literal["answered", "seen"], list[Waiting], float]
    | tuple[Literal["feedback", "seen_feedback"], list[Feedback], float]
    | tuple[Literal["drop"], set[int], float]
)

MAX_BYTES = 12_000
MAX_DISK_BYTES = 9_000

_ids = st.integers(0, 25).map(lambda number: f"é{number}" if number % 5 == 0 else f"id-{number}")
_times = st.integers(0, 60).map(lambda tick: tick / 2)
_events = st.builds(
    Waiting, _ids, st.sampled_from([b"", b"x" * 300, b"y" * 900]), _times, st.sampled_from([None, "eu"]),
    st.integers(0, 9), st.integers(0, 99), st.integers(0, 3),
)  # fmt: skip
_rewards = st.none() | st.just(0.5)
_own_inputs = st.sampled_from([None, None, None, None, b"i"])
_records = st.sampled_from([Record("feedback", n, 0, 1, 0.0, None, b"") for n in range(4)])
_feedbacks = st.builds(Feedback, _ids, st.none() | st.integers(-1, 9), _rewards, _times, _own_inputs, _records)
_calls: st.SearchStrategy[list[Call]] = st.lists(
    st.one_of(
        st.tuples(st.just("answered"), st.lists(_events, max_size=8), _times),
        st.tuples(st.just("feedback"), st.lists(_feedbacks, max_size=8), _times),
    ),
    max_size=25,
)
_moves = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["answered", "seen"]), st.lists(_events, max_size=8), _times),
        st.tuples(st.sampled_from(["feedback", "seen_feedback"]), st.lists(_feedbacks, max_size=8), _times),
        st.tuples(st.just("drop"), st.sets(st.integers(0, 3)), _times),
    ),
    max_size=25,
)


@contextmanager
def opened(*, on_disk: bool) -> Iterator[JoinStore]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) if on_disk else None
        store = JoinStore(window=10.0, max_bytes=MAX_BYTES, max_disk_bytes=MAX_DISK_BYTES, directory=directory)
        try:
            yield store
        finally:
            store.close()


def apply(store: JoinStore, call: Call) -> list[Joined]:
    if call[0] == "answered":
        return store.answered(call[1], call[2])
    if call[0] == "feedback":
        return store.feedback(call[1], call[2])
    if call[0] == "seen":
        return store.seen(call[1], call[2])
    if call[0] == "seen_feedback":
        store.seen_feedback(call[1], call[2])
        return []
    store.drop(call[1], call[1])
    return []


@settings(max_examples=60, deadline=None)
@given(calls=_calls, on_disk=st.booleans())
def test_every_feedback_ends_as_exactly_one_kind_and_every_event_is_accounted_for(
    calls: list[Call], on_disk: bool
) -> None:
    fed = came = given_out = with_event = 0
    with opened(on_disk=on_disk) as store:
        for call in calls:
            joined = apply(store, call)
            given_out += len(joined)
            with_event += sum(item.step >= 0 for item in joined)
            fed += len(call[1]) if call[0] == "feedback" else 0
            came += len(call[1]) if call[0] == "answered" else 0
            assert fed == sum(store.counts[kind] for kind in ENDINGS) + store.early
            assert given_out == store.counts["joined"]
            over = store.counts["expired"] + store.counts["evicted"] + store.counts["redelivered"]
            # An event whose feedback brought the inputs along, before it, is the only one without a count.
            assert 0 <= came - (store.pending + with_event + over) <= given_out - with_event
            assert store.bytes <= MAX_BYTES
            assert store.disk_bytes <= MAX_DISK_BYTES


@settings(max_examples=60, deadline=None)
@given(calls=_calls | _moves, on_disk=st.booleans(), data=st.data())
def test_restored_store_goes_on_as_if_nothing_had_happened(
    calls: list[Call], on_disk: bool, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(calls)), label="restored after")
    with opened(on_disk=on_disk) as first, opened(on_disk=on_disk) as second:
        for call in calls[:at]:
            apply(first, call)
        state = saved(first)
        second.restore(io.BytesIO(state))
        assert saved(second) == state
        for call in calls[at:]:
            assert apply(first, call) == apply(second, call)
            assert (first.counts, first.pending, first.early) == (second.counts, second.pending, second.early)
            assert (first.bytes, first.disk_bytes) == (second.bytes, second.disk_bytes)
        assert saved(first) == saved(second)


@settings(max_examples=60, deadline=None)
@given(number=st.integers(1, 15), data=st.data())
def test_any_order_of_arrival_within_the_window_joins_the_same(number: int, data: st.DataObject) -> None:
    events = [Waiting(f"e{i}", bytes([i]), i / 4, None, 1, i) for i in range(number)]
    feedbacks = [Feedback(f"e{i}", i, None, i / 4 + 1.0) for i in range(number)]
    arrivals: list[Waiting | Feedback] = [*events, *feedbacks]
    order = data.draw(st.permutations(arrivals))
    store = JoinStore(window=10.0, max_bytes=1 << 20)
    joined: list[Joined] = []
    watermark = 0.0
    for item in order:
        watermark = max(watermark, item.time)
        joined += store.answered([item], watermark) if isinstance(item, Waiting) else store.feedback([item], watermark)
    assert sorted(joined, key=lambda item: item.step) == [
        Joined(*one[:6], other.label, other.reward, other.time) for one, other in zip(events, feedbacks, strict=True)
    ]
    assert (store.pending, store.early) == (0, 0)
