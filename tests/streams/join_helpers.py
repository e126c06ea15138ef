from __future__ import annotations

import io
from typing import NamedTuple

from streams.base import Record
from streams.join import Joined, JoinStore, Waiting

ENDINGS = ("joined", "duplicate", "late", "orphan", "overflow")


class Feedback(NamedTuple):
    id: str
    label: int | None = 1
    reward: float | None = None
    time: float = 0.0
    inputs: bytes | None = None
    record: Record = Record("feedback", 0, 0, 1, 0.0, None, b"")


def event(name: str, time: float = 0.0, *, inputs: bytes = b"x", group: str | None = None, step: int = 7) -> Waiting:
    return Waiting(name, inputs, time, group, 3, step)


def counted(store: JoinStore) -> dict[str, int]:
    return {kind: count for kind, count in store.counts.items() if count}


def names(joined: list[Joined]) -> list[str]:
    return [item.id for item in joined]


def saved(store: JoinStore) -> bytes:
    file = io.BytesIO()
    store.snapshot().write(file)
    return file.getvalue()
