from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import watchdog
from engine.watchdog import EXIT_CODE, LOOKS, Watchdog
from streams.codec import encode_event
from tests.crash.zygote import Zygote

POLICY = """\
version: 1
state: ./state
model: {factory: "./model.py:build", inputs: {shape: [4], dtype: float32}}
streams:
  data: {file: ./events.jsonl, follow: true}
  predictions: {file: ./answers.jsonl}
batching: {max_size: 8, max_delay: 5ms}
adaptation: {method: none}
metrics: {enabled: false}
"""

HANGS = """\
import threading

from torch import nn


class Hangs(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        self.calls += 1
        if len(x) == 8 and self.calls > 2:
            threading.Event().wait()
        return self.layer(x)


def build():
    return Hangs()
"""

QUICK = "import engine.admin, engine.watchdog as w; engine.admin.STUCK_SECONDS = 1.0; w.LOOK_SECONDS, w.LOOKS = 0.1, 5"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.0005)


def looks(lives: Iterator[bool]) -> list[str]:
    """What the watchdog said at the end of a process that had life as ``lives`` says, and then for ever."""
    told: list[str] = []
    seen = threading.Event()

    def alive() -> tuple[bool, str]:
        good = next(lives, None)
        if good is None:
            seen.set()
        return good is not False, "nothing moves"

    def end(why: str) -> None:
        told.append(why)
        seen.set()

    with Watchdog(alive, end):
        assert seen.wait(60)
    return told


def test_many_looks_in_a_row_without_life_end_the_process_and_say_why() -> None:
    assert looks(iter([True] * 3 + [False] * LOOKS)) == ["nothing moves"]


def test_a_sign_of_life_between_them_begins_the_count_anew() -> None:
    assert looks(iter(([False] * (LOOKS - 1) + [True]) * 3)) == []


def test_a_daemon_whose_model_hangs_writes_its_stacks_and_exits_with_70(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "model.py").write_text(HANGS)
    rows = np.zeros((200, 4), np.float32)
    values = [encode_event(f"e{n}", row, time=float(n), form="json") for n, row in enumerate(rows)]
    (tmp_path / "events.jsonl").write_bytes(b"".join(value + b"\n" for value in values))
    daemon = zygote.start(["run", str(tmp_path / "policy.yaml")], {}, tmp_path / "log", before=QUICK)
    assert daemon.wait(100) == EXIT_CODE, daemon.words
    assert '"event": "stuck"' in daemon.words
    assert "no batch was applied" in daemon.words
    assert "in forward" in daemon.words
