from __future__ import annotations

import gc
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.join import JoinStore
from streams.join_format import JoinError, Waiting
from streams.join_ids import Ids
from streams.join_pack import Packed, WaitingRows, payload_of
from streams.join_size import event_bytes
from tests.streams.join_helpers import Feedback, event, saved

_texts = st.sampled_from(["", "a", "event-1", "Zürich", "日本", "\ud800", "\udc00x"])
_events = st.lists(
    st.builds(
        Waiting, _texts, st.sampled_from([b"", b"xyz", b"12345678"]), st.floats(allow_nan=False), st.none() | _texts,
        st.integers(-1, 9), st.integers(-1, 1 << 40), st.integers(-1, 1 << 30),
    ),
    max_size=20,
)  # fmt: skip


def packed(events: list[Waiting]) -> Packed:
    return Packed.of(WaitingRows.of(events))


@given(_events, st.lists(st.booleans(), min_size=20, max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_packed_events_are_the_events(events: list[Waiting], kept: list[bool], first: int, end: int) -> None:
    all_of = packed(events)
    assert list(all_of.rows) == events
    assert [(all_of.ids[at], *all_of.fields(at)) for at in range(len(events))] == events
    assert all_of.sizes.tolist() == [event_bytes(one.id, len(one.inputs), one.group) for one in events]
    mask = np.array(kept[: len(events)], np.bool_)
    assert list(all_of.kept(mask).rows) == [one for one, keep in zip(events, kept, strict=False) if keep]
    assert list(all_of.between(first, end).rows) == events[first:end]
    assert list(Packed.joined([all_of, packed(events[:3])]).rows) == events + events[:3]
    payload = payload_of([all_of, packed(events[:3])])
    assert payload == payload_of([packed(events + events[:3])])
    assert list(Packed.read(payload).rows) == events + events[:3]


@pytest.mark.parametrize("payload", [b"\1\0\0\0", b"\0\0\0\0x", payload_of([packed([event("id")])])[:-1]])
def test_a_payload_that_does_not_end_with_its_events_is_refused(payload: bytes) -> None:
    with pytest.raises((JoinError, ValueError)):
        Packed.read(payload)


def test_the_garbage_collector_follows_no_reference_for_an_event() -> None:
    store, count = JoinStore(window=1e6, max_bytes=1 << 30), 40_960
    gc.collect()
    before = {id(one) for one in gc.get_objects()}
    for first in range(0, count, 512):
        events = [event(f"e{n}", float(n), inputs=bytes(64)) for n in range(first, first + 512)]
        store.answered(WaitingRows.of(events), first)
    del events
    gc.collect()
    new = [one for one in gc.get_objects() if id(one) not in before and type(one) not in {dict, set}]
    assert store.pending == count
    assert sum(len(gc.get_referents(one)) for one in new) < count // 16, "each pass over them stops every thread"


def test_no_table_of_ids_holds_more_than_few_of_them() -> None:
    ids = Ids()
    assert ids.add([f"event-{n}" for n in range(64_000)], list(range(64_000))) == []
    assert max(map(len, ids._tables)) < 64_000 // 16, "one that grows is made anew at once"


def test_ids_are_added_all_or_none() -> None:
    ids = Ids()
    assert ids.add(["a", "b"], [1, 2]) == []
    assert ids.add(["c", "a", "d", "c"], [3, 4, 5, 6]) == [1, 3]
    assert (len(ids), "c" in ids, "d" in ids, ids.get("a"), ids.get("c")) == (2, False, False, 1, None)
    assert ids.pop("a") == 1
    ids.remove(["b"])
    assert len(ids) == 0
    with pytest.raises(KeyError):
        ids.pop("a")


def test_what_is_written_tells_nothing_of_how_it_came_to_be() -> None:
    sizes = [3, 900, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    events = [event(f"e{n}", 1.0, inputs=bytes(size)) for n, size in enumerate(sizes * 40)]
    at_once, by_and_by = (JoinStore(window=10.0, max_bytes=1 << 20) for _ in range(2))
    at_once.answered(events, 1.0)
    for one in events:
        by_and_by.answered([one], 1.0)
    for store in (at_once, by_and_by):
        store.feedback([Feedback(one.id, time=1.0) for one in events if len(one.inputs) > 3], 1.0)
    assert saved(at_once) == saved(by_and_by)
    other = JoinStore(window=10.0, max_bytes=1 << 20)
    other.restore(io.BytesIO(saved(at_once)))
    assert saved(other) == saved(at_once)
    assert other.bytes == at_once.bytes == by_and_by.bytes
