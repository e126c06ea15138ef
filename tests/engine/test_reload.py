"""Reloading the policy of a daemon that serves files as they grow."""

from __future__ import annotations

import json
import random
import signal
import threading
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from engine import reload
from engine.core import Core
from engine.daemon import Daemon
from engine.errors import PolicyFileError
from engine.launch import run_policy
from engine.learner import Job, Learner
from engine.policyfile import LoadedPolicy, load
from engine.reload import Reloader, reading
from engine.scaffold import EVENTS, LABEL_EVERY, init
from engine.status import status
from policies.interfaces import Action
from tests.crash.zygote import Life, Zygote
from tests.engine.parts import resting, until
from tests.engine.policies import BASE, write
from tests.engine.test_policy_invalid import CASES

FOLLOW = {
    "{file: ./events.jsonl} #": "{file: ./events.jsonl, follow: true} #",
    "{file: ./feedback.jsonl}": "{file: ./feedback.jsonl, follow: true}",
    "port: 9464": "port: 0",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    init(tmp_path)
    change(tmp_path, FOLLOW)
    return tmp_path


def change(project: Path, words: dict[str, str]) -> None:
    """Write the policy file anew, under another inode, as editors do."""
    file = project / "policy.yaml"
    text = file.read_text()
    for old, new in words.items():
        assert old in text
        text = text.replace(old, new)
    (project / "new").write_text(text)
    (project / "new").rename(file)


class Running:
    """A daemon with a reloader that the test drives."""

    def __init__(self, daemon: Daemon, loaded: LoadedPolicy, applied: list[str]) -> None:
        self.daemon = daemon
        self.shown: dict[str, Any] = {}
        assert loaded.path is not None
        path = loaded.path
        self.reloader = Reloader(
            daemon, loaded, lambda: load(path, environ={}), lambda new: applied.append(new.log.level), self.shown
        )

    async def reload(self) -> str:
        return await self.reloader.reload("the test")

    @property
    def error(self) -> str:
        error = self.shown["reload"]["error"]
        assert isinstance(error, str)
        return error

    def count(self, result: str) -> float:
        found = self.daemon.metrics.registry.get_sample_value("adaptd_reload_total", {"result": result})
        assert found is not None
        return found


def drive(project: Path, script: Callable[[Running], Awaitable[None]], events: int = EVENTS) -> Daemon:
    """Run the daemon until it has answered so many events and done with their labels, then the script, then stop it."""
    loaded = load(project / "policy.yaml", environ={})

    def idle(daemon: Daemon) -> bool:
        core = daemon.core
        labelled = core.counts["feedback"] * LABEL_EVERY >= events
        return core.counts["events"] >= events and labelled and resting(daemon)

    async def beside(daemon: Daemon) -> None:
        with anyio.fail_after(60):
            await until(lambda: idle(daemon))
            await script(Running(daemon, loaded, []))
        daemon.stop()

    return run_policy(loaded, watch=beside)


def answers(project: Path) -> list[str]:
    *whole, _ = (project / "predictions.jsonl").read_text().split("\n")
    return [json.loads(line)["id"] for line in whole]


def append_events(project: Path, count: int) -> None:
    lines = (project / "events.jsonl").read_text().splitlines()[:count]
    fresh = [json.dumps({**json.loads(line), "id": f"more-{n}"}) + "\n" for n, line in enumerate(lines)]
    with (project / "events.jsonl").open("a") as file:
        file.write("".join(fresh))


def append_labels(project: Path, count: int) -> None:
    events = (project / "events.jsonl").read_text().splitlines()[-count:]
    lines = [
        json.dumps({"id": f"more-{n}", "label": 1, "time": json.loads(events[n])["time"]}) + "\n" for n in range(count)
    ]
    with (project / "feedback.jsonl").open("a") as file:
        file.write("".join(lines))


# -- what is taken over -------------------------------------------------------------------------------------------


def test_a_changed_policy_is_in_force_from_the_next_batch_on_with_all_that_was_learned(project: Path) -> None:
    async def script(running: Running) -> None:
        daemon, old = running.daemon, running.daemon.core
        change(project, {"lr: 0.01": "lr: 0.02", "every: 60s": "every: 1h", "keep: 3": "keep: 5"})
        change(
            project, {"max_size: 64, max_delay: 20ms": "max_size: 8, max_delay: 1ms", "half_life: 1h": "half_life: 2h"}
        )
        assert await running.reload() == "applied"
        core = daemon.core
        assert core is not old
        assert daemon.runner.core is core
        learned = old.host.live.state_dict()
        assert [n for n, t in core.host.live.state_dict().items() if not bool((t == learned[n]).all())] == []
        assert (core.counts, core.step, core.watermark) == (old.counts, old.step, old.watermark)
        assert len(core.audit) == len(old.audit) > 0
        assert core.joins.pending == old.joins.pending > 0
        assert core.methods.safeguards[1].state_dict().keys() == old.methods.safeguards[1].state_dict().keys()
        assert core.learner.optimizer.param_groups[0]["lr"] == 0.02
        assert len(core.learner.optimizer.state) == len(old.learner.optimizer.state) > 0
        assert (daemon.saver.every, daemon.runner.keeper.store.keep) == (3600.0, 5)
        batches = daemon.runner.batches
        append_events(project, 64)
        await until(lambda: core.counts["events"] == EVENTS + 64)
        await until(lambda: daemon.runner.batches - batches >= 8)  # counted once a batch is through

    drive(project, script)
    assert sorted(answers(project)) == sorted([f"event-{n}" for n in range(EVENTS)] + [f"more-{n}" for n in range(64)])


def test_methods_may_come_go_and_be_exchanged(project: Path) -> None:
    async def script(running: Running) -> None:
        change(project, {"adaptation: auto": "adaptation: tent", "{method: finite}, ": ""})
        change(project, {"interpolation: {method: linear}\n": "", "gate: {method: flips, budget: 0.01}\n": ""})
        change(project, {"optimizer: adam": "optimizer: sgd", "max_bytes: 256MB": "max_bytes: 1MB"})
        assert await running.reload() == "applied"
        core = running.daemon.core
        assert core.methods.adaptation.name == "tent"
        assert [guard.name for guard in core.methods.safeguards] == ["replay"]
        assert core.methods.gate is None
        append_events(project, 64)
        await until(lambda: core.counts["updates.adaptation"] > 0)

    drive(project, script)


@pytest.mark.parametrize(("keep", "lost"), [("needed", 64), ("all", 0)])
def test_what_was_answered_before_learning_began_is_learned_from_only_if_all_inputs_are_kept(
    project: Path, keep: str, lost: int
) -> None:
    change(project, {"adaptation: auto": "adaptation: none", "{method: finite}, ": ""})
    change(project, {"interpolation: {method: linear}\n": "", "gate: {method: flips, budget: 0.01}\n": ""})
    text = (project / "policy.yaml").read_text()
    safeguards = next(line for line in text.splitlines() if line.startswith("safeguards:"))
    change(project, {safeguards: "safeguards: []", "learning: {": "learning: {enabled: false, "})
    change(project, {"join: {": f"join: {{keep: {keep}, "})

    async def script(running: Running) -> None:
        daemon = running.daemon
        assert daemon.core.counts["labels"] > len(daemon.core.audit) > 0
        assert (daemon.core.audit.evidence > 0) == (keep == "all")
        append_events(project, 64)
        await until(lambda: daemon.core.counts["events"] == EVENTS + 64)
        change(project, {"enabled: false": "enabled: true"})
        assert await running.reload() == "applied", running.error
        labels = daemon.core.counts["labels"]
        append_labels(project, 64)
        await until(lambda: daemon.core.counts["labels"] == labels + 64)
        await until(lambda: resting(daemon))
        assert daemon.core.counts["labels_without_inputs"] == lost
        daemon.export()
        assert daemon.metrics.registry.get_sample_value("adaptd_labels_without_inputs_total") == lost

    drive(project, script)


def test_the_metrics_and_the_status_tell_of_every_reload(project: Path) -> None:
    async def script(running: Running) -> None:
        metrics, first = running.daemon.metrics, running.reloader.loaded.digest
        assert metrics.registry.get_sample_value("adaptd_policy_info", {"digest": first}) == 1
        assert await running.reload() == "unchanged"
        change(project, {"lr: 0.01": "lr: 0.02"})
        assert await running.reload() == "applied"
        second = running.reloader.loaded.digest
        assert second != first
        assert running.shown["digest"] == second
        assert running.shown["reload"]["error"] is None
        assert metrics.registry.get_sample_value("adaptd_policy_info", {"digest": second}) == 1
        assert metrics.registry.get_sample_value("adaptd_policy_info", {"digest": first}) is None
        change(project, {"lr: 0.02": "lr: fast"})
        assert await running.reload() == "rejected"
        assert running.shown["digest"] == second
        assert "learning.lr: 'fast' is not what belongs here" in running.error
        assert [running.count(result) for result in ("applied", "rejected", "unchanged")] == [1, 1, 1]

    drive(project, script)


def test_a_changed_policy_thaws_what_was_frozen(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(running: Running) -> None:
        daemon = running.daemon
        for _ in range(2 * daemon.core.settings.freeze_after):
            daemon.core.freeze.see(Action.ROLL_BACK)
        append_events(project, 64)
        await until(lambda: daemon.core.counts["events"] == EVENTS + 64)
        daemon.export()
        assert daemon.metrics.registry.get_sample_value("adaptd_frozen") == 1
        assert status(daemon)["model"]["frozen"]
        assert await running.reload() == "unchanged"
        assert daemon.core.freeze.on
        change(project, {"lr: 0.01": "lr: 0.001"})
        assert await running.reload() == "applied"
        daemon.export()
        assert daemon.metrics.registry.get_sample_value("adaptd_frozen") == 0
        assert not status(daemon)["model"]["frozen"]

    drive(project, script)
    assert capsys.readouterr().out.count("] frozen ") == 1, "said once, not with every batch"


def test_a_background_job_under_way_is_finished_first(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, begun, go_on = Learner.run, threading.Event(), threading.Event()

    async def script(running: Running) -> None:
        daemon, before = running.daemon, running.daemon.core.counts["updates.learning"]
        serving = daemon.core.learner

        def run(learner: Learner, job: Job) -> None:
            if learner is serving:  # and not the one that the reload tries the policy with
                begun.set()
                assert go_on.wait(30)
            own(learner, job)

        monkeypatch.setattr(Learner, "run", run)
        append_events(project, 64)
        append_labels(project, 64)
        await until(begun.is_set)
        change(project, {"batch_size: 16": "batch_size: 17"})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(running.reload)
            await until(lambda: running.reloader._refusal is not None)  # it has the turn, and waits for the job
            assert daemon.turn.locked()
            assert running.daemon.core.counts["updates.learning"] == before
            go_on.set()
        assert running.count("applied") == 1
        assert running.daemon.core.counts["updates.learning"] > before

    drive(project, script, events=64)


# -- what is refused ----------------------------------------------------------------------------------------------


def test_of_more_than_sixty_broken_documents_none_disturbs_the_policy_in_force(project: Path) -> None:
    assert len(CASES) > 60

    async def script(running: Running) -> None:
        core, digest = running.daemon.core, running.reloader.loaded.digest
        for text, line, fragment in CASES:
            (project / "policy.yaml").write_text(text, encoding="utf-8")
            assert await running.reload() == "rejected"
            assert f"policy.yaml:{line}: " in running.error
            assert fragment in running.error
        assert running.daemon.core is core
        assert running.reloader.loaded.digest == digest
        assert running.count("rejected") == len(CASES)
        append_events(project, 10)
        await until(lambda: core.counts["events"] == EVENTS + 10)

    drive(project, script)


RESTARTS: tuple[tuple[dict[str, str], str], ...] = (
    ({"device: auto": "device: cpu"}, "policy.yaml:16: model.device: cannot change while the daemon runs"),
    (
        {"dtype: float32} # what": "dtype: float64} # what"},
        "model.inputs.dtype: cannot change while the daemon runs",
    ),
    ({"state: ./state": "state: ./elsewhere"}, "policy.yaml:11: state: cannot change while the daemon runs"),
    ({"./predictions.jsonl": "./other.jsonl"}, "streams.predictions.file: cannot change while the daemon runs"),
    ({"port: 0": "port: 9999"}, "metrics.port: cannot change while the daemon runs; put it back, or restart"),
    ({"version: 1\n": "version: 1\nseed: 7\n"}, "policy.yaml:11: seed: cannot change while the daemon runs"),
    ({"version: 1\n": "version: 1\norder: arrival\n"}, "order: cannot change while the daemon runs"),
    ({"join: {window": "join: {mode: inline, window"}, "join.mode: cannot change while the daemon runs"),
)


def test_what_needs_a_restart_is_refused_by_name(project: Path) -> None:
    async def script(running: Running) -> None:
        for words, said in RESTARTS:
            change(project, words)
            assert await running.reload() == "rejected"
            assert said in running.error
            change(project, {new: old for old, new in words.items()})
            assert await running.reload() == "unchanged"

    drive(project, script, events=1)


def test_a_policy_that_does_not_fit_the_model_is_refused_with_its_line(project: Path) -> None:
    async def script(running: Running) -> None:
        core = running.daemon.core
        change(project, {"batch_size: 16}": "batch_size: 16, include: [nowhere]}"})
        assert await running.reload() == "rejected"
        assert "policy.yaml:36: learning: no parameter of the model matches" in running.error
        assert running.daemon.core is core

    drive(project, script, events=1)


def test_a_method_that_does_not_know_its_old_state_leaves_the_old_policy_running(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(running: Running) -> None:
        core = running.daemon.core
        monkeypatch.setattr(type(core.methods.adaptation), "load_state_dict", lambda *_: 1 / 0)
        change(project, {"lr: 0.01": "lr: 0.02"})
        assert await running.reload() == "rejected"
        assert running.error == "ZeroDivisionError: division by zero"
        assert running.daemon.core is core
        append_events(project, 10)
        await until(lambda: core.counts["events"] == EVENTS + 10)

    drive(project, script)


# -- a real process -----------------------------------------------------------------------------------------------


def begin(zygote: Zygote, project: Path, **variables: str) -> Life:
    command = ["run", str(project / "policy.yaml"), "--set", "log.format=json"]
    return zygote.start(command, variables, project / "log")


def logged(life: Life, event: str) -> dict[str, Any]:
    """The line of the log that tells of an event, once it is there."""

    def found() -> list[dict[str, Any]]:
        *whole, _ = life.words.split("\n")
        lines = [json.loads(line) for line in whole if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    life.wait_until(lambda: bool(found()))
    return found()[-1]


def page(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        text: bytes = answer.read()
    return text.decode()


def test_a_process_reloads_at_a_signal_and_when_its_file_changes(zygote: Zygote, project: Path) -> None:
    process = begin(zygote, project)
    address = logged(process, "listening")["address"]
    logged(process, "checkpoint")
    change(project, {"lr: 0.01": "lr: 0.02"})
    process.signal(signal.SIGHUP)
    digest = logged(process, "policy_applied")["digest"]
    (project / "policy.yaml").write_text("version: 1\nmodle: {}\n")
    refused = logged(process, "policy_rejected")
    assert "policy.yaml:2: modle: unknown key 'modle'; did you mean 'model'?" in refused["error"]
    status, metrics = json.loads(page(f"{address}/status")), page(f"{address}/metrics")
    assert status["policy"]["digest"] == digest
    assert status["policy"]["reload"]["result"] == "rejected"
    assert f'adaptd_policy_info{{digest="{digest}"}} 1.0' in metrics
    process.signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_killed_in_the_middle_of_a_reload_the_next_process_goes_on_under_the_new_policy(
    zygote: Zygote, project: Path
) -> None:
    first = begin(zygote, project, ADAPTD_FAILPOINT="reload.take:1")
    logged(first, "checkpoint")
    change(project, {"lr: 0.01": "lr: 0.02", "batch_size: 16": "batch_size: 8"})
    first.signal(signal.SIGHUP)
    assert first.wait(60) == -signal.SIGKILL
    append_events(project, 100)
    second = begin(zygote, project)
    logged(second, "policy_changed")
    second.wait_until(lambda: len(set(answers(project))) == EVENTS + 100)
    second.signal(signal.SIGTERM)
    assert second.wait(60) == 0


@pytest.mark.parametrize("mode", ["background", "inline"])
def test_trying_a_policy_leaves_the_generators_alone_that_a_model_may_draw_from(
    project: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    exclusive: list[bool] = []

    def state() -> tuple[object, object, list[int]]:
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()

    async def script(running: Running) -> None:
        own = reload._try

        def draw(core: Core) -> None:
            exclusive.append(running.daemon.turn.statistics().locked)
            torch.rand(3), np.random.rand(3), random.random()
            own(core)
            if core.learner.optimizer.param_groups[0]["lr"] == 0.03:
                raise PolicyFileError("learning: no")

        monkeypatch.setattr(reload, "_try", draw)
        for lr, result in (("0.02", "applied"), ("0.03", "rejected")):
            change(project, {"lr: 0.01" if lr == "0.02" else "lr: 0.02": f"lr: {lr}"})
            before = state()
            assert await running.reload() == result
            assert state() == before

    text = (project / "policy.yaml").read_text()
    assert "mode:" not in text.split("learning:")[1].splitlines()[0]
    change(project, {"lr: 0.01": f"mode: {mode}, lr: 0.01"})
    drive(project, script)
    if mode == "inline":
        assert exclusive == [True, True], "serving would draw from them at the same time"


@pytest.mark.parametrize(("client", "size"), [("kafka-python", 0), ("confluent", 48)])
def test_only_what_a_client_fetches_ahead_is_gathered(tmp_path: Path, client: str, size: int) -> None:
    kafka = {"bootstrap_servers": "localhost:9092", "group": "g", "client": client}
    streams = {"kafka": kafka, "data": {"kafka": "events"}, "predictions": {"kafka": "answers"}}
    text = f"{BASE}streams: {json.dumps(streams)}\nbatching: {{max_size: 48, max_delay: 5ms}}\n"
    policy = load(write(tmp_path, text), environ={}).policy
    assert reading(policy) == {"high": 16 * 48, "max_size": size, "max_delay": 0.005}
