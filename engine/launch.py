"""From a loaded policy to a running daemon, and every way in which that fails as a sentence."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import structlog

import kernels
from engine.admin import Admin, bind
from engine.build import build_core, build_sink, build_sources, spec_of
from engine.checkpoint.disk import LocalDisk
from engine.checkpoint.store import CheckpointStore
from engine.core import Core
from engine.cutter import ArrivalCutter, Cutter, TimeCutter
from engine.daemon import Daemon
from engine.errors import PolicyFileError, StorageError
from engine.factory import build_model
from engine.host import choose_device
from engine.keeper import Keeper
from engine.metrics import Metrics
from engine.policy import Log, Policy
from engine.policyfile import LoadedPolicy
from engine.reader import Reader
from engine.runner import Runner
from engine.writer import Writer
from streams.base import Positions
from streams.journal import Entry, Journal, Kind

log = structlog.get_logger("adaptd")

HIGH_BATCHES = 16
"""Full batches of one stream that may wait before the stream is paused."""


def configure_logs(settings: Log) -> None:
    """Write logs to standard error: one JSON object a line, or text for people."""
    text = settings.format == "text" or (settings.format == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if text else structlog.processors.JSONRenderer()
    level = getattr(logging, settings.level.upper())
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer], foreign_pre_chain=shared
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def core_of(loaded: LoadedPolicy, *, background: bool, directory: Path | None) -> Core:
    """Build the model and the core of a policy. Raises `PolicyFileError` where they do not fit."""
    policy = loaded.policy
    try:
        model = build_model(policy.model, loaded.base, policy.seed)
        return build_core(policy, model, background=background, directory=directory)
    except PolicyFileError as error:
        raise loaded.locate(error) from error


def assemble(loaded: LoadedPolicy, metrics: Metrics) -> Daemon:
    """Take the state directory, restore what is there, and put the daemon together.

    Raises:
        PolicyFileError: The policy cannot run here.
        StateLockedError: Another daemon holds the state directory.
        StorageError: The state directory cannot be used, or holds no valid checkpoint.
    """
    policy = loaded.policy
    if policy.streams is None:
        raise PolicyFileError("streams: missing; a policy without streams serves for 'adaptd backtest' alone")
    state = loaded.resolve(policy.state)
    disk = LocalDisk(allow_network=policy.checkpoint.allow_network)
    store = CheckpointStore(state, keep=policy.checkpoint.keep, disk=disk)
    store.lock()
    try:
        store.sweep()
        kernels.self_check(choose_device(policy.model.device))
        background = policy.learning.mode == "background" and not policy.by_time
        core = core_of(loaded, background=background, directory=state / "spill")
        keeper = Keeper(store, Journal(state), loaded.digest)
        positions, entries = _restore(keeper, core)
        metrics.begin(core)
        return _daemon(loaded, metrics, core, keeper, positions, entries, state)
    except BaseException:
        store.close()
        raise


def _restore(keeper: Keeper, core: Core) -> tuple[Positions, list[Entry]]:
    restored = keeper.restore(core)
    if restored is None:
        log.info("fresh_start")
        return {}, []
    positions, entries = restored
    log.info("restored", step=keeper.saved_step, replay=len(entries), release=core.release)
    return positions, entries


def _daemon(
    loaded: LoadedPolicy,
    metrics: Metrics,
    core: Core,
    keeper: Keeper,
    positions: Positions,
    entries: list[Entry],
    state: Path,
) -> Daemon:
    policy = loaded.policy
    streams = policy.streams
    assert streams is not None
    sources = build_sources(policy, loaded.resolve, state)
    kinds = {stream: kind for _, carried in sources for stream, kind in carried.items()}
    readers: list[Reader] = []

    def flushed(reached: Positions) -> None:
        for reader in readers:
            own = {p: at for p, at in reached.items() if p in set(reader.partitions)}
            reader.commit(own)

    writer = Writer(
        build_sink(policy, streams.predictions, loaded.resolve, letters=False),
        build_sink(policy, streams.dead_letters, loaded.resolve, letters=True),
        form=streams.predictions.format,
        flushed=flushed,
        metrics=metrics,
    )
    start = _start(positions, entries)
    daemon = Daemon(
        runner=Runner(core, keeper, writer, metrics, positions),
        cutter=_cutter(policy, kinds, entries),
        readers=[],
        writer=writer,
        metrics=metrics,
        checkpoint_every=policy.checkpoint.every,
    )
    high = HIGH_BATCHES * policy.batching.max_size
    for source, carried in sources:
        reader = Reader(
            source,
            carried,
            spec_of(policy),
            start,
            hand_over=daemon.hand_over,
            revoked=daemon.revoked,
            high=high,
        )
        readers.append(reader)
    daemon.readers = readers
    return daemon


def _cutter(policy: Policy, kinds: dict[str, Kind], entries: list[Entry]) -> Cutter:
    size = policy.batching.max_size
    if policy.by_time:
        return TimeCutter(kinds, size, entries)
    return ArrivalCutter(kinds, size, entries, max_delay=policy.batching.max_delay)


def _start(positions: Positions, entries: list[Entry]) -> Positions:
    """Where to read on: the checkpoint's positions, and the first record that the journal names elsewhere."""
    start = dict(positions)
    for entry in entries:
        for run in entry.runs:
            start.setdefault((run.stream, run.partition), run.first)
    return start


def run_policy(loaded: LoadedPolicy, *, watch: Callable[[Daemon], Any] | None = None) -> Daemon:
    """Run a policy until its streams end or a signal comes.

    Args:
        loaded: The policy.
        watch: An async function that is given the daemon and runs beside it until it ends.
    """
    policy = loaded.policy
    _usable(loaded.resolve(policy.state))
    sock = bind(policy.metrics.host, policy.metrics.port) if policy.metrics.enabled else None
    try:
        metrics = Metrics()
        daemon = assemble(loaded, metrics)
        try:
            anyio.run(_run, daemon, sock, loaded, watch)
        finally:
            daemon.core.joins.close()
            daemon.runner.keeper.store.close()
        return daemon
    finally:
        if sock is not None:
            sock.close()


async def _run(daemon: Daemon, sock: Any, loaded: LoadedPolicy, watch: Callable[[Daemon], Any] | None) -> None:
    policy = {"path": str(loaded.path), "digest": loaded.digest}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(daemon.handle_signals)
        if sock is not None:
            host, port = sock.getsockname()[:2]
            log.info("listening", address=f"http://{host}:{port}")
            tasks.start_soon(Admin(daemon, policy).serve, sock)
        if watch is not None:
            tasks.start_soon(watch, daemon)
        await daemon.run()
        tasks.cancel_scope.cancel()


def _usable(state: Path) -> None:
    """Refuse a state directory that cannot be made or written, before anything else is tried.

    Raises:
        StorageError: With what to do about it.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"state: cannot use {state}: {error.strerror}; choose a directory that can be written"
        ) from error
