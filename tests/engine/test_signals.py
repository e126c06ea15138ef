"""A daemon that cannot drain, and is told twice to end."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from streams.codec import encode_event
from tests.crash.zygote import Zygote
from tests.engine.test_watchdog import HANGS, POLICY


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_a_daemon_that_hangs_at_once(
    zygote: Zygote, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    said = "print('hangs', file=sys.stderr, flush=True), threading.Event()"
    (tmp_path / "model.py").write_text("import sys\n" + HANGS.replace("threading.Event()", said))
    values = [encode_event(f"e{n}", np.zeros(4, np.float32), time=float(n), form="json") for n in range(200)]
    (tmp_path / "events.jsonl").write_bytes(b"".join(value + b"\n" for value in values))
    daemon = zygote.start(["run", str(tmp_path / "policy.yaml")], {}, tmp_path / "log")
    for word in ("hangs\n", '"draining"'):
        daemon.wait_until(lambda said=word: said in daemon.words)  # type: ignore[misc]
        daemon.signal(number)
    assert daemon.wait(60) == code, daemon.words
