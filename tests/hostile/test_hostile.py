"""At least a hundred hostile inputs each for records, policies, checkpoints and pages: none crashes, none passes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.admin import Admin, bind
from engine.checkpoint import Loaded
from engine.daemon import Daemon
from engine.errors import PolicyFileError, StorageError
from engine.factory import build_model
from engine.policyfile import load
from tests.engine import test_admin as pages
from tests.engine.parts import memory
from tests.engine.test_checkpoint_store import open_store, save
from tests.hostile import checkpoints, policies, records, requests

CORPORA = {
    "records": records.corpus,
    "policies": policies.corpus,
    "checkpoints": checkpoints.corpus,
    "requests": requests.corpus,
}


def test_every_corpus_holds_a_hundred_different_inputs() -> None:
    counts = {}
    for name, corpus in CORPORA.items():
        cases = dict(corpus())
        counts[name] = len({repr(value) for value in cases.values()})
    print(f"hostile inputs: {counts}")
    assert min(counts.values()) >= 100


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
    first = open_store(tmp_path / "good")
    first.lock()
    save(first, 1)
    first.close()
    passed = []
    for number, (name, harm) in enumerate(checkpoints.corpus()):
        state = tmp_path / f"state-{number}"
        shutil.copytree(tmp_path / "good", state)
        folder = next(state.glob("ckpt-*"))
        shutil.copytree(folder, state / "copy")
        harm(folder)
        store = open_store(state)
        store.lock()
        try:
            store.load(whole)
        except StorageError as error:
            if name.startswith("forged_tensors") and "its hash differs" in str(error):
                passed.append(f"{name}: it was to have a hash that fits")
        else:
            passed.append(name)
        store.close()
        shutil.rmtree(state)
    assert not passed


def whole(loaded: Loaded) -> None:
    """Read what the tensors of a checkpoint are, as a start does."""
    for part in ("model", "policy"):
        loaded.state(part)


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
