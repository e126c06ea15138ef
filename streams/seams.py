"""Where tests get between the code and the machine: the clock, and places at which a process can be made to die.

``ADAPTD_FAILPOINT=name:n`` in the environment kills this process with SIGKILL when it comes to the failpoint ``name``
for the n-th time; several are separated by commas. Without it a failpoint costs one look at an empty dictionary.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Protocol

FAILPOINTS = (
    "reader.polled",
    "reader.decoded",
    "reader.handed",
    "reader.commit",
    "reader.committed",
    "cut",
    "replay",
    "journal.append",
    "journal.appended",
    "journal.begun",
    "journal.drop",
    "answered",
    "answers.put",
    "followed",
    "feedback.joined",
    "learn.begin",
    "learn.end",
    "job.take",
    "job.taken",
    "writer.encoded",
    "writer.sent",
    "writer.flushed",
    "writer.passed",
    "transaction.begun",
    "transaction.offsets",
    "transaction.committed",
    "snapshot",
    "checkpoint.saved",
    "restore.loaded",
    "restore.applied",
    "drain",
    "reload.take",
    "files.written",
    "files.renamed",
    "disk.mkdir",
    "disk.create",
    "disk.write",
    "disk.fsync",
    "disk.rename",
    "disk.sync_dir",
    "disk.unlink",
    "disk.rmdir",
)
"""Every failpoint there is, for those who sweep them. None is passed more than a few times for one batch of records."""


class Clock(Protocol):
    """What tells the time."""

    def monotonic(self) -> float:
        """Seconds since some instant; never goes back."""
        ...

    def time(self) -> float:
        """Seconds since the epoch; may jump."""
        ...


class SystemClock:
    """The clocks of this machine."""

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic()

    def time(self) -> float:
        """See `Clock.time`."""
        return time.time()


CLOCK = SystemClock()


def _parse(text: str) -> dict[str, int]:
    armed: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, count = part.partition(":")
        if name not in FAILPOINTS or not (count.isascii() and count.isdigit()) or int(count) < 1:
            raise ValueError(f"ADAPTD_FAILPOINT={text}: write name:n, the name one of {', '.join(FAILPOINTS)}")
        armed[name] = int(count)
    return armed


_armed = _parse(os.environ.get("ADAPTD_FAILPOINT", ""))


def arm(text: str) -> None:
    """Arm failpoints as ``ADAPTD_FAILPOINT`` does when the process starts; those armed before are forgotten.

    Raises:
        ValueError: There is no such failpoint, or the count is none.
    """
    armed = _parse(text)
    _armed.clear()
    _armed.update(armed)


def failpoint(name: str) -> None:
    """Die here if this is where and when it was asked for."""
    if _armed and name in _armed:
        _armed[name] -= 1
        if not _armed[name]:
            os.kill(os.getpid(), signal.SIGKILL)
