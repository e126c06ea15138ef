"""The process that starts daemons for tests."""

import os
import signal
import time
from pathlib import Path

from tests.crash.zygote import Zygote


def test_a_signal_to_a_life_that_has_just_ended_does_nothing(zygote: Zygote, tmp_path: Path) -> None:
    life = zygote.start([], {}, tmp_path / "first", before="raise SystemExit(3)")
    gone = False
    while not gone:  # reaped by the zygote, and not yet asked for here
        try:
            os.kill(life.pid, 0)
        except ProcessLookupError:
            gone = True
        time.sleep(0.001)
    life.signal(signal.SIGTERM)
    assert life.wait(60) == 3
    assert zygote.start([], {}, tmp_path / "second", before="raise SystemExit(4)").wait(60) == 4


def test_a_life_is_signalled(zygote: Zygote, tmp_path: Path) -> None:
    life = zygote.start([], {}, tmp_path / "log", before="import time\ntime.sleep(600)")
    life.signal(signal.SIGKILL)
    assert life.wait(60) == -signal.SIGKILL
