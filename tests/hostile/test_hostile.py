"""At least a hundred hostile inputs each for records, policies, checkpoints and pages: none crashes, none passes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engine.admin import Admin, bind
from engine.checkpoint import CheckpointStore, Loaded
from engine.daemon import Daemon
from engine.errors import PolicyFileError, StorageError
from engine.factory import build_model
from engine.keeper import Keeper
from engine.policyfile import load
from streams.join import JoinStore
from streams.join_format import read_frames
from streams.journal import Journal, JournalError
from tests.engine import test_admin as pages
from tests.engine.cores import make_core
from tests.engine.parts import memory
from tests.engine.test_checkpoint_store import open_store, save
from tests.hostile import checkpoints, policies, records, requests, states

CORPORA: dict[str, Callable[[], Iterator[tuple[str, str | bytes]]]] = {
    "records": records.corpus,
    "policies": policies.corpus,
    "requests": requests.corpus,
}


def test_every_corpus_holds_a_hundred_different_inputs(tmp_path: Path) -> None:
    counts = {name: len({value for _, value in corpus()}) for name, corpus in CORPORA.items()}
    harmed = set()
    for folder, _, harm in harmed_states(tmp_path):
        harm(folder)
        harmed.add(checkpoints.found(folder))
    counts["checkpoints"] = len(harmed)
    counts["states"] = len({(file, content) for _, file, content in states.corpus(*good_state(tmp_path / "made"))})
    print(f"hostile inputs: {counts}")
    assert min(counts.values()) >= 100


def harmed_states(tmp_path: Path) -> Iterator[tuple[Path, str, checkpoints.Harm]]:
    """The folder of a checkpoint in a state directory of its own, and what is to be done to it."""
    first = open_store(tmp_path / "good")
    first.lock()
    save(first, 1)
    first.close()
    for number, (name, harm) in enumerate(checkpoints.corpus()):
        state = tmp_path / f"state-{number}"
        shutil.copytree(tmp_path / "good", state)
        folder = next(state.glob("ckpt-*"))
        shutil.copytree(folder, state / "copy")
        yield folder, name, harm
        shutil.rmtree(state)


DECODE = """\
import math, resource, sys
import numpy as np
from streams.base import Record
from streams.codec import InputSpec, decode_events, decode_feedback
from tests.hostile.records import corpus

spec = InputSpec((4,), np.dtype("<f4"))
cases = [(name, Record("s", 0, 0, 1, math.nan, None, value)) for name, value in corpus()]
with open("/proc/self/statm") as memory:
    used = int(memory.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for name, record in cases:
    for decode in (decode_events, decode_feedback):
        good, bad = decode([record], spec)
        if good or len(bad) != 1 or not bad[0][1].message:
            print(decode.__name__, name, record.value[:60])
"""


def test_no_hostile_record_becomes_an_event_or_takes_memory_for_what_it_claims() -> None:
    done = subprocess.run([sys.executable, "-c", DECODE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_hostile_policy_runs_and_each_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text("import os\nsecret = 1\ndef build(): raise LookupError('ran')\n")
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    path, passed, slowest = tmp_path / "policy.yaml", [], (0.0, "")
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    modules = set(sys.modules)
    for name, text in policies.corpus():
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        started = time.process_time()
        try:
            loaded = load(str(path), [], {})
            build_model(loaded.policy.model, tmp_path)
        except PolicyFileError as error:
            if "ran" in str(error):
                passed.append(name)
        else:
            passed.append(name)
        slowest = max(slowest, (time.process_time() - started, name))
    print(f"slowest hostile policy: {slowest[1]} took {slowest[0]:.3f} s of CPU")
    assert not passed
    assert not {"pty", "code", "this", "antigravity"} & (set(sys.modules) - modules)


def test_no_hostile_checkpoint_is_loaded_or_starts_anything_anew(tmp_path: Path) -> None:
    passed = []
    for folder, name, harm in harmed_states(tmp_path):
        harm(folder)
        store = open_store(folder.parent)
        store.lock()
        try:
            store.load(whole)
        except StorageError as error:
            if name.startswith("forged_tensors") and "its hash differs" in str(error):
                passed.append(f"{name}: it was to have a hash that fits")
        else:
            passed.append(name)
        store.close()
    assert not passed


def whole(loaded: Loaded) -> None:
    """Read what the tensors of a checkpoint are, as a start does."""
    for part in ("model", "policy"):
        loaded.state(part)


def good_state(state: Path) -> tuple[bytes, bytes, bytes]:
    """Make a state directory; its waiting joins, its ``meta.json`` and its journal."""
    with CheckpointStore(state, reserve_bytes=0) as store:
        keeper = Keeper(store, Journal(state), "0" * 64)
        states.write(keeper, state / "spill-0")
        keeper.journal.close()
    (folder,), (journal,) = state.glob("ckpt-*"), state.glob("journal-*.log")
    return (folder / "join.bin").read_bytes(), (folder / "meta.json").read_bytes(), journal.read_bytes()


def take_over(state: Path) -> JoinStore:
    """Restore what is in a state directory, as a start does."""
    core = make_core()
    core.joins = states.keep_joins(state / "spill-0")
    with CheckpointStore(state, reserve_bytes=0) as store:
        keeper = Keeper(store, Journal(state), "0" * 64)
        try:
            keeper.restore(core)
        finally:
            core.joins.close()
            keeper.journal.close()
    return core.joins


def test_the_state_that_hostile_ones_are_made_of_has_something_of_every_kind(tmp_path: Path) -> None:
    joins, _, _ = good_state(tmp_path)
    assert [kind for kind, _ in read_frames(io.BytesIO(joins))] == [b"S", b"R", b"D", b"B", b"F"]
    restored = take_over(tmp_path)
    assert (restored.early, restored.counts["joined"]) == (3, 2)


def test_no_hostile_state_is_taken_over_or_takes_memory_for_what_it_claims(tmp_path: Path) -> None:
    made = good_state(tmp_path / "good")
    passed = []
    tracemalloc.start()
    for name, file, content in states.corpus(*made):
        state = tmp_path / "state"
        shutil.copytree(tmp_path / "good", state)
        if file == "journal":
            next(state.glob("journal-*.log")).write_bytes(content)
        else:
            checkpoints.resigned(file, content)(next(state.glob("ckpt-*")))
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        try:
            take_over(state)
        except Exception as error:  # noqa: BLE001 - all others are told together
            told = isinstance(error, StorageError | JournalError) and file in str(error)
            if not told or "its hash differs" in str(error):
                passed.append(f"{name}: {error!r}")
        else:
            passed.append(name)
        if tracemalloc.get_traced_memory()[1] - before > 32 << 20:
            passed.append(f"{name}: {tracemalloc.get_traced_memory()[1] - before} bytes")
        shutil.rmtree(state)
    tracemalloc.stop()
    assert not passed


async def speak(port: int, request: bytes) -> bytes:
    """Send bytes, and what comes back until the other side is done or has nothing to say."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        if writer.can_write_eof():
            writer.write_eof()
        async with asyncio.timeout(5):
            return await reader.read()
    except (ConnectionError, TimeoutError):
        return b""
    finally:
        writer.transport.abort()


async def test_no_hostile_request_is_answered_with_a_page_and_the_pages_stay_there(tmp_path: Path) -> None:
    sockets: list[int] = []

    def noting(host: str, port: int) -> socket.socket:
        sock = bind(host, port)
        sockets.append(sock.getsockname()[1])
        return sock

    async def attack(daemon: Daemon, admin: Admin, get: pages.Get) -> None:
        (port,) = sockets
        descriptors = psutil.Process().num_fds()
        for name, request in requests.corpus():
            answer = await speak(port, request)
            if answer.startswith(b"HTTP/1.1 2"):
                passed.append((name, request[:60]))
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(200)]
        for _, writer in idle[::2]:
            writer.write(b"GET /status HTTP/1.1\r\nX: ")
        for page in ("/metrics", "/livez", "/readyz", "/status"):
            code, _, _ = await get(page)
            assert code == 200
        gone = [await asyncio.wait_for(reader.read(), 60) for reader, _ in idle]
        assert len(gone) == 200
        for _, writer in idle:
            writer.transport.abort()
        assert json.loads((await get("/livez"))[2])["ok"]
        assert psutil.Process().num_fds() <= descriptors + 10

    passed: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "bind", noting)
        patch.setattr("engine.admin.CONNECTION_SECONDS", 0.5)
        await pages.served(tmp_path, memory(20, bounded=False), attack)
    assert not passed
