"""What a daemon is doing and what it waits for, for people: the body of ``/status``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from streams.seams import CLOCK

if TYPE_CHECKING:
    from engine.daemon import Daemon


def outage(daemon: Daemon) -> str:
    """What keeps events from being answered that the daemon cannot mend, in words; empty while nothing does."""
    reading = next((reader.trouble for reader in daemon.readers if reader.trouble), "")
    return daemon.writer.waiting_for or daemon.runner.keeper.trouble or reading


def waiting_for(daemon: Daemon) -> str:
    """What the daemon waits for at this instant, in words; empty while nothing is in its way."""
    away = outage(daemon)
    if away:
        return away
    partitions, records = daemon.handover.rebuilding
    if partitions:
        return f"rebuilding joins of {partitions} partitions, {records} records left"
    paused = [stream for reader in daemon.readers for stream in reader.paused]
    if paused:
        return f"paused until the backlog is worked off: {', '.join(paused)}"
    return daemon.state if daemon.state.startswith(("starting", "waiting")) else ""


def status(daemon: Daemon) -> dict[str, Any]:
    """What the daemon is doing, as JSON values. Called on the event loop."""
    core, now = daemon.core, CLOCK.monotonic()
    age = None if daemon.saver.saved_at is None else round(now - daemon.saver.saved_at, 1)
    return {
        "state": daemon.state,
        "waiting_for": waiting_for(daemon),
        "uptime_seconds": round(now - daemon.started, 1),
        "processor": daemon.affinity.processor,
        "events": core.counts["events"],
        "labels": core.counts["labels"],
        "dead_letters": daemon.runner.dead_letters,
        "model": {"release": core.release, "step": core.step, "alpha": core.alpha, "frozen": core.freeze.on},
        "accuracy": core.audit.accuracies(),
        "audited": len(core.audit),
        "counts": dict(sorted(dict(core.counts).items())),
        "joins": {"pending": core.joins.pending, "bytes": core.joins.bytes, **core.joins.counts},
        "waiting": {
            "events": core.joins.pending,
            "feedback": core.joins.early,
            "bytes": core.joins.bytes,
            "disk_bytes": core.joins.disk_bytes,
        },
        "partitions": [f"{s}-{n}" for reader in daemon.readers for s, n in reader.partitions],
        "positions": {f"{s}-{n}": at for (s, n), at in sorted(dict(daemon.runner.positions).items())},
        "lag": {f"{s}-{n}": lag for reader in daemon.readers for (s, n), lag in sorted(dict(reader.lag).items())},
        "retention": {
            f"{s}-{n}": {
                "records": margin.records,
                "seconds": None if math.isnan(margin.seconds) else round(margin.seconds),
                "near": margin.near,
            }
            for reader in daemon.readers
            for (s, n), margin in sorted(dict(reader.retention.margins).items())
        },
        "rebuilding": dict(zip(("partitions", "records"), daemon.handover.rebuilding, strict=True)),
        "replaying": daemon.cutter.replaying,
        "replayed": daemon.runner.replayed,
        "checkpoint": {"step": daemon.runner.keeper.saved_step, "age_seconds": age},
        "background_job": core.job is not None,
    }
