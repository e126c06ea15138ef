"""From a loaded policy to a running daemon, and every way in which that fails as a sentence."""

from __future__ import annotations

import math
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import structlog

import kernels
from engine.admin import Admin, bind
from engine.affinity import Affinity
from engine.allocator import keep_freed_memory
from engine.build import build_core, build_delivery, build_sources, spec_of
from engine.checkpoint.disk import LocalDisk
from engine.checkpoint.store import CheckpointStore
from engine.collector import rare_collections
from engine.core import Core
from engine.cutter import ArrivalCutter, Cutter
from engine.daemon import Daemon
from engine.errors import PolicyFileError, StorageError
from engine.factory import build_model
from engine.floors import Floors
from engine.host import choose_device
from engine.keeper import Keeper, seed_generators
from engine.logs import configure_logs
from engine.methods import derive_seed
from engine.metrics import Metrics
from engine.outbox import CountedTransactions
from engine.policy import Model, Policy
from engine.policyfile import LoadedPolicy
from engine.preflight import check
from engine.reader import Reader
from engine.reload import Reloader, reading
from engine.runner import Runner
from engine.timecutter import TimeCutter
from engine.turns import long_turns
from engine.watchdog import Watchdog
from engine.writer import Writer
from streams.base import Positions, Source
from streams.journal import Entry, Journal, Kind

log = structlog.get_logger("adaptd")


def core_of(loaded: LoadedPolicy, *, background: bool, directory: Path | None) -> Core:
    """Build the model and the core of a policy. Raises `PolicyFileError` where they do not fit."""
    policy = loaded.policy
    keep_freed_memory()
    try:
        model = build_model(policy.model, loaded.base, policy.seed)
        seed_generators(derive_seed(policy.seed, "global"))
        kernels.self_check(choose_device(policy.model.device))
        return build_core(policy, model, background=background, directory=directory)
    except PolicyFileError as error:
        raise loaded.locate(error) from error


def assemble(loaded: LoadedPolicy, metrics: Metrics, store: CheckpointStore) -> Daemon:
    """Restore what is in the state directory, and put the daemon together.

    Args:
        loaded: The policy.
        metrics: What is exported.
        store: The state directory, locked.

    Raises:
        PolicyFileError: The policy cannot run here.
        StorageError: The state directory cannot be used, or holds no valid checkpoint.
    """
    policy = loaded.policy
    store.sweep()
    for left in store.directory.glob("spill*"):
        shutil.rmtree(left, ignore_errors=True)
    core = core_of(loaded, background=policy.in_background, directory=store.directory / "spill-0")
    keeper = Keeper(store, Journal(store.directory), loaded.digest, patience=policy.checkpoint.patience)
    try:
        positions, entries = _restore(keeper, core)
        metrics.begin(core)
        return _daemon(loaded, metrics, core, keeper, positions, entries)
    except BaseException:
        core.joins.close()
        keeper.journal.close()
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
    loaded: LoadedPolicy, metrics: Metrics, core: Core, keeper: Keeper, positions: Positions, entries: list[Entry]
) -> Daemon:
    policy = loaded.policy
    assert policy.streams is not None
    sources = build_sources(policy, loaded.resolve, keeper.store.directory)
    kinds = {stream: kind for _, carried in sources for stream, kind in carried.items()}
    readers: list[Reader] = []
    writer = _writer(loaded, metrics, readers, sources, keeper.store.directory)
    daemon = Daemon(
        runner=Runner(core, keeper, writer, metrics, positions, _floors(policy, sources)),
        cutter=_cutter(policy, kinds, entries),
        readers=readers,
        writer=writer,
        metrics=metrics,
        checkpoint_every=policy.checkpoint.every,
        affinity=Affinity(wanted=_together(policy.model, core.host.device.type)),
    )
    start, taken = _start(positions, daemon.runner.taken, entries)
    for source, carried in sources:
        reader = Reader(
            source,
            carried,
            spec_of(policy),
            start,
            hand_over=daemon.hand_over,
            revoked=daemon.handover.revoked,
            taken=taken,
            exact=writer.transactional,
            patience=policy.streams.kafka.patience if policy.streams.kafka is not None else math.inf,
            **reading(policy),
        )
        reader.retention.covered = partial(covered, keeper.store)
        readers.append(reader)
    daemon.readers = readers
    return daemon


def _together(model: Model, device: str) -> bool:
    """Whether the threads that run Python are to share a processor."""
    if model.affinity == "auto":
        return device == "cpu" and model.threads == 1
    return model.affinity == "one_processor"


def covered(store: CheckpointStore) -> Positions:
    """The positions of the newest checkpoint: a restart reads on from there, whatever is committed."""
    return {(stream, number): at for stream, number, at in store.covered}


def _writer(
    loaded: LoadedPolicy,
    metrics: Metrics,
    readers: list[Reader],
    sources: Sequence[tuple[Source, object]],
    state: Path,
) -> Writer:
    """The writer, which has what is answered committed by its transactions, or by the reader that it came from."""
    streams = loaded.policy.streams
    assert streams is not None
    predictions, letters, transactions = build_delivery(loaded.policy, sources, loaded.resolve, state)

    def flushed(reached: Positions, floors: Positions) -> None:
        for reader in readers:
            own = {p: at for p, at in reached.items() if p[0] in reader.streams}
            reader.commit(own, floors)

    return Writer(
        predictions,
        letters,
        form=streams.predictions.format,
        flushed=flushed,
        metrics=metrics,
        transactions=None if transactions is None else CountedTransactions(transactions, metrics),
    )


def _cutter(policy: Policy, kinds: dict[str, Kind], entries: list[Entry]) -> Cutter:
    size = policy.batching.max_size
    if policy.by_time:
        return TimeCutter(kinds, size, entries)
    return ArrivalCutter(kinds, size, entries, max_delay=policy.batching.max_delay)


def _start(positions: Positions, taken: Positions, entries: list[Entry]) -> tuple[Positions, Positions]:
    """Where to read on: at the first record that the journal names; elsewhere at the checkpoint's positions.

    They differ for a partition that others had read between its last record in the checkpoint and the first after it.
    The second value is, for partitions that came from others, the position up to which these had worked.
    """
    known, taken, start = dict(positions), dict(taken), Positions()
    for entry in entries:
        for run in entry.runs:
            partition = run.stream, run.partition
            if entry.kind is Kind.LEFT:
                for of in (known, taken, start):
                    of.pop(partition, None)
                continue
            start.setdefault(partition, run.first)
            if entry.kind is Kind.TAKEN:
                taken[partition] = run.end
    return known | start, taken


def _floors(policy: Policy, sources: Sequence[tuple[Source, dict[str, Kind]]]) -> Floors:
    """What notes floors, where partitions may move and anything waits that must follow them."""
    assert policy.streams is not None
    kinds = {stream: kind for _, carried in sources for stream, kind in carried.items()}
    shared = any(source.shared for source, _ in sources)
    waits = shared and policy.streams.feedback is not None and policy.join.mode == "store"
    return Floors(kinds, policy.join.window if waits else None)


def run_policy(
    loaded: LoadedPolicy,
    *,
    fresh: bool = False,
    read: Callable[[], LoadedPolicy] | None = None,
    watch: Callable[[Daemon], Any] | None = None,
) -> Daemon:
    """Run a policy until its streams end or a signal comes.

    Args:
        loaded: The policy.
        fresh: Whether to set aside what the state directory holds and start anew.
        read: Reads the policy again, at SIGHUP and when its file has changed; None never does.
        watch: An async function that is given the daemon and runs beside it until it ends.

    Raises:
        PolicyFileError: The policy cannot run here, or the port of its metrics is taken.
        StateLockedError: Another daemon holds the state directory.
        StorageError: The state directory cannot be used, or holds no valid checkpoint.
    """
    policy = loaded.policy
    if policy.streams is None:
        missing = "streams: missing; a policy without streams serves for 'adaptd backtest' alone"
        raise loaded.locate(PolicyFileError(missing))
    state = loaded.resolve(policy.state)
    try:
        _usable(state)
    except StorageError as error:
        raise StorageError(f"{loaded.origin('state')}: {error}") from error
    check(loaded)
    disk = LocalDisk(allow_network=policy.checkpoint.allow_network)
    with CheckpointStore(state, keep=policy.checkpoint.keep, disk=disk) as store, _listening(loaded) as sock:
        if fresh:
            _set_aside(store)
        daemon = assemble(loaded, Metrics(), store)
        try:
            with rare_collections(), long_turns():
                anyio.run(_run, daemon, sock, loaded, read, watch)
        finally:
            daemon.core.joins.close()
            daemon.runner.keeper.journal.close()
    return daemon


@contextmanager
def _listening(loaded: LoadedPolicy) -> Iterator[socket.socket | None]:
    """The socket of the pages, bound before anything is read; none where they are switched off."""
    metrics = loaded.policy.metrics
    if not metrics.enabled:
        yield None
        return
    try:
        sock = bind(metrics.host, metrics.port)
    except PolicyFileError as error:
        raise loaded.locate(error) from error
    with sock:
        yield sock


def _set_aside(store: CheckpointStore) -> None:
    """Move checkpoints, journal and committed offsets of files into a folder ``aside-N``, so that nothing is lost.

    Raises:
        StorageError: They cannot be moved.
    """
    state = store.directory
    aside = store.set_aside()
    try:
        rest = sorted((*state.glob("journal-*.log"), *state.glob("files-*")))
        if rest and aside is None:
            aside = state / f"aside-{1 + len([*state.glob('aside-*')])}"
            aside.mkdir(mode=0o700)
        for path in rest:
            assert aside is not None
            path.rename(aside / path.name)
    except OSError as error:
        raise StorageError(f"{state}: what is there cannot be set aside: {error}") from error
    if aside is not None:
        log.warning("set_aside", folder=str(aside))


async def _run(
    daemon: Daemon,
    sock: socket.socket | None,
    loaded: LoadedPolicy,
    read: Callable[[], LoadedPolicy] | None,
    watch: Callable[[Daemon], Any] | None,
) -> None:
    policy: dict[str, Any] = {"path": str(loaded.path), "digest": loaded.digest, "reload": None}
    admin = Admin(daemon, policy)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(daemon.handle_signals)
        if sock is not None:
            host, port = sock.getsockname()[:2]
            log.info("listening", address=f"http://{host}:{port}")
            tasks.start_soon(admin.serve, sock)
        if read is not None:
            tasks.start_soon(Reloader(daemon, loaded, read, lambda new: configure_logs(new.log), policy).run)
        if watch is not None:
            tasks.start_soon(watch, daemon)
        with Watchdog(admin.alive):
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
