from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
import torch
import yaml
from safetensors.torch import load_file

from engine import __version__, cli
from engine.admin import bind
from engine.checkpoint.store import CheckpointStore
from engine.errors import AdaptdError
from engine.launch import run_policy
from engine.policyfile import load
from engine.scaffold import EVENTS, init
from streams.base import StreamError, StreamUnavailableError
from streams.join import JoinError
from streams.journal import JournalError
from tests.engine.policies import BASE, KAFKA, write


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Adaptd = Callable[..., Outcome]


@pytest.fixture
def adaptd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Adaptd]:
    """Runs the command line in this process. No user's mistake may ever end in a stack trace."""
    handlers, level = logging.root.handlers[:], logging.root.level
    for name in [name for name in os.environ if name.startswith("ADAPTD_")]:
        monkeypatch.delenv(name)

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["adaptd", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert isinstance(code, int)
        return Outcome(code, out, err)

    yield call
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def project(tmp_path: Path, adaptd: Adaptd) -> Path:
    """What `adaptd init` writes, listening on any free port."""
    assert adaptd("init", tmp_path / "project").code == 0
    policy = tmp_path / "project" / "policy.yaml"
    policy.write_text(policy.read_text().replace("port: 9464", "port: 0"))
    return tmp_path / "project"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that was run to its end; for tests to copy."""
    place = tmp_path_factory.mktemp("finished")
    init(place)
    policy = place / "policy.yaml"
    policy.write_text(policy.read_text().replace("port: 9464", "port: 0"))
    run_policy(load(policy, environ={}))
    return place


@pytest.fixture
def ran(finished: Path, tmp_path: Path) -> Path:
    """A project that was run to its end."""
    return shutil.copytree(finished, tmp_path / "ran")


def answers(project: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (project / "predictions.jsonl").read_text().splitlines()]


# -- what works ---------------------------------------------------------------------------------------------------


def test_what_init_writes_runs_and_its_checkpoints_can_be_looked_at(project: Path, adaptd: Adaptd) -> None:
    assert adaptd("validate", project / "policy.yaml").code == 0
    ran = adaptd("run", project / "policy.yaml")
    assert ran.code == 0, ran.err
    assert answers(project) == [f"event-{number}" for number in range(EVENTS)]
    state = project / "state"
    listed = adaptd("checkpoint", "ls", state, "--json")
    rows = json.loads(listed.out)
    assert (listed.code, [row["step"] for row in rows][-1]) == (0, 0)
    assert [row["step"] for row in rows] == sorted((row["step"] for row in rows), reverse=True)
    assert rows[0]["name"] in adaptd("checkpoint", "ls", state).out
    shown = json.loads(adaptd("checkpoint", "show", state, rows[0]["name"]).out)
    assert shown["meta"]["events"] == EVENTS
    assert "model.safetensors" in shown["manifest"]["files"]
    verified = adaptd("checkpoint", "verify", state)
    assert (verified.code, verified.out.count("ckpt-")) == (0, len(rows))
    journals = sorted((project / "state").glob("journal-*.log"))
    assert verified.out.splitlines()[len(rows) :] == [f"{path.name}: good" for path in journals]
    journals[0].write_bytes(b"nothing of the kind")
    torn = adaptd("checkpoint", "verify", state)
    assert torn.code == 74
    assert f"{journals[0].name}: damaged at byte 0" in torn.out


def test_run_again_a_finished_policy_has_nothing_to_do(project: Path, adaptd: Adaptd) -> None:
    for _ in range(2):
        assert adaptd("run", project / "policy.yaml").code == 0
    assert answers(project) == [f"event-{number}" for number in range(EVENTS)]


def test_flags_override_the_file(project: Path, adaptd: Adaptd) -> None:
    shown = adaptd("validate", project / "policy.yaml", "--show", "--set", "batching.max_size=7")
    assert yaml.safe_load(shown.out)["batching"]["max_size"] == 7


def test_anew_keeps_what_there_was_and_answers_everything_again(ran: Path, adaptd: Adaptd) -> None:
    state = ran / "state"
    before = sorted(path.name for path in state.glob("ckpt-*"))
    again = adaptd("run", ran / "policy.yaml", "--fresh")
    assert again.code == 0, again.err
    assert "set_aside" in again.err
    assert answers(ran) == 2 * [f"event-{number}" for number in range(EVENTS)]
    aside = state / "aside-1"
    assert sorted(path.name for path in aside.glob("ckpt-*")) == before
    assert [*aside.glob("journal-*.log")]
    assert (aside / "files-0" / "offsets.json").exists()
    assert adaptd("checkpoint", "verify", state).code == 0


def test_anew_also_where_the_checkpoints_of_a_journal_are_gone(ran: Path, adaptd: Adaptd) -> None:
    for folder in (ran / "state").glob("ckpt-*"):
        folder.rename(ran / folder.name)
    refused = adaptd("run", ran / "policy.yaml")
    assert (refused.code, "a journal and no checkpoint" in refused.err) == (74, True)
    assert adaptd("run", ran / "policy.yaml", "--fresh").code == 0
    assert [*(ran / "state" / "aside-1").glob("journal-*.log")]


def test_anew_in_an_empty_directory_is_an_ordinary_start(project: Path, adaptd: Adaptd) -> None:
    assert adaptd("run", project / "policy.yaml", "--fresh").code == 0
    assert not [*(project / "state").glob("aside-*")]


def test_a_backtest_tells_its_figures_without_headings_that_nothing_stands_under(project: Path, adaptd: Adaptd) -> None:
    ended = adaptd("backtest", project / "policy.yaml", "--data", project / "events.jsonl")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert "events: 512" in lines
    assert "updates_by_kind:" in lines
    for heading, below in zip(lines, [*lines[1:], ""], strict=True):
        assert not heading.endswith(":") or below.startswith("  "), heading


def test_the_version_is_told(adaptd: Adaptd) -> None:
    assert adaptd("version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "command", [(), ("run",), ("validate",), ("init",), ("demo",), ("backtest",), ("checkpoint",), ("checkpoint", "ls")]
)
def test_every_command_explains_itself(adaptd: Adaptd, command: tuple[str, ...]) -> None:
    shown = adaptd(*command, "--help")
    assert shown.code == 0
    assert "Usage" in shown.out


def accepts(schema: Any, value: Any, root: dict[str, Any]) -> bool:
    """Whether a value is valid under the parts of JSON Schema that ours uses."""
    if schema is True:
        return True
    if "$ref" in schema:
        node: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            node = node[part]
        return accepts(node, value, root)
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kind = schema.get("type")
    if kind in types and not isinstance(value, types[kind]):
        return False
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in ("integer", "number") and not (number and (kind == "number" or value == int(value))):
        return False
    return (
        ("const" not in schema or value == schema["const"])
        and ("enum" not in schema or value in schema["enum"])
        and ("anyOf" not in schema or any(accepts(each, value, root) for each in schema["anyOf"]))
        and ("oneOf" not in schema or sum(accepts(each, value, root) for each in schema["oneOf"]) == 1)
        and ("allOf" not in schema or all(accepts(each, value, root) for each in schema["allOf"]))
        and ("pattern" not in schema or not isinstance(value, str) or bool(re.search(schema["pattern"], value)))
        and ("minimum" not in schema or not number or value >= schema["minimum"])
        and ("maximum" not in schema or not number or value <= schema["maximum"])
        and (not isinstance(value, list) or all(accepts(schema.get("items", True), each, root) for each in value))
        and (not isinstance(value, dict) or _accepts_keys(schema, value, root))
    )


def _accepts_keys(schema: dict[str, Any], value: dict[str, Any], root: dict[str, Any]) -> bool:
    known = schema.get("properties", {})
    rest = schema.get("additionalProperties", True)
    return set(schema.get("required", ())) <= value.keys() and all(
        accepts(known[key], each, root) if key in known else rest is not False for key, each in value.items()
    )


def test_the_schema_accepts_a_full_policy_and_refuses_mistakes(adaptd: Adaptd) -> None:
    schema = json.loads(adaptd("schema").out)
    policy = yaml.safe_load(KAFKA)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert accepts(schema, policy, schema)
    for key, wrong in (
        ("batchign", {}),
        ("version", 2),
        ("adaptation", {"method": "rota"}),
        ("safeguards", [{"method": "replay", "capacty": 1}]),
        ("delivery", "never"),
    ):
        assert not accepts(schema, {**policy, key: wrong}, schema), key


# -- mistakes in the policy ---------------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": ("batchign: {max_size: 3}\n", r"policy\.yaml:5: batchign: unknown key .*did you mean 'batching'"),
    "wrong type": ("batching: {max_size: many}\n", r"policy\.yaml:5: batching\.max_size: 'many' is not"),
    "impossible": ("gate: {method: flips}\n", r"policy\.yaml:5: gate: has nothing to decide on"),
    "unknown method": ("adaptation: {method: rota}\n", r"policy\.yaml:5: adaptation\.method: .*did you mean 'rotta'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_mistake_in_the_policy_is_told_with_file_and_line(
    tmp_path: Path, adaptd: Adaptd, mistake: str, command: str
) -> None:
    text, expected = MISTAKES[mistake]
    ended = adaptd(command, write(tmp_path, BASE + text))
    assert ended.code == 78
    assert re.search(expected, ended.err), ended.err
    assert ended.err.startswith("adaptd: ")


def test_a_policy_without_streams_does_not_run(tmp_path: Path, adaptd: Adaptd) -> None:
    ended = adaptd("run", write(tmp_path, BASE))
    assert ended.code == 78
    assert re.search(r"policy\.yaml:1: streams: missing; .*backtest", ended.err)
    assert not (tmp_path / "state").exists()


def test_a_policy_that_does_not_exist_is_told(tmp_path: Path, adaptd: Adaptd) -> None:
    ended = adaptd("run", tmp_path / "nothing.yaml")
    assert (ended.code, "no such file" in ended.err) == (78, True)


def test_a_model_file_that_is_missing_is_told_with_file_and_line(project: Path, adaptd: Adaptd) -> None:
    (project / "model.py").unlink()
    ended = adaptd("run", project / "policy.yaml")
    assert ended.code == 78
    assert re.search(r"policy\.yaml:\d+: model\.factory: .*model\.py", ended.err), ended.err


def test_weights_that_are_missing_are_told_with_the_line_or_flag_that_names_them(project: Path, adaptd: Adaptd) -> None:
    ended = adaptd("run", project / "policy.yaml", "--set", "model.weights=./w.safetensors")
    assert ended.code == 78
    assert re.search(r"--set model\.weights: there is no file", ended.err), ended.err


def test_a_model_that_does_not_fit_the_inputs_is_told(project: Path, adaptd: Adaptd) -> None:
    ended = adaptd("run", project / "policy.yaml", "--set", "model.inputs.shape=[5]")
    assert ended.code == 78
    assert "model.inputs: the model cannot take a row of shape [5]" in ended.err


def test_a_stream_that_is_missing_is_told(project: Path, adaptd: Adaptd) -> None:
    (project / "feedback.jsonl").unlink()
    ended = adaptd("run", project / "policy.yaml")
    assert ended.code == 78
    assert "feedback.jsonl" in ended.err


def test_a_port_that_is_taken_is_told_with_the_line_that_names_it(project: Path, adaptd: Adaptd) -> None:
    policy = project / "policy.yaml"
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        policy.write_text(policy.read_text().replace("port: 0", f"port: {port}"))
        ended = adaptd("run", policy)
    assert ended.code == 78
    assert re.search(rf"policy\.yaml:\d+: metrics\.port: cannot listen on 127\.0\.0\.1:{port}: .* in use", ended.err)
    assert not (project / "predictions.jsonl").exists()


def test_validate_finds_what_a_run_would_refuse_without_running_any_of_it(project: Path, adaptd: Adaptd) -> None:
    policy = project / "policy.yaml"
    (project / "model.py").write_text("raise SystemExit(99)\ndef build(): ...\ndef needy(size): ...\n")
    ended = adaptd("validate", policy)
    assert ended.code == 0
    assert "not checked: what the model's factory gives when it is called" in ended.out
    (project / "text").write_text("no tensors")
    (project / "empty").mkdir()
    cases = {
        "model.factory=./nowhere.py:build": "model.factory: there is no file",
        "model.factory=./model.py:make": "model.factory: ./model.py:make: there is no function make in model.py",
        "model.factory=./model.py:needy": "./model.py:needy needs arguments; expected a function that takes none",
        "model.factory=os.path:join": "os.path may not be imported; list its package in model.allowed_prefixes",
        "model.weights=./gone.safetensors": "model.weights: there is no file .*; check the path",
        "model.weights=./text": "model.weights: .* is not a .*; make one with safetensors.torch.save_file",
        "model.device=cuda:99": "model.device: cuda:99 is not on this machine",
        "streams.data.file=./gone.jsonl": "streams.data.file: there is no file",
        "streams.feedback.file=./empty": "streams.feedback.file: .* holds no file whose name ends in",
        "streams.predictions.file=./no/where.jsonl": "streams.predictions.file: there is no directory",
        "state=./text/state": "state: .*text is not a directory",
    }
    for override, said in cases.items():
        ended = adaptd("validate", policy, "--set", override)
        assert ended.code == 78, override
        assert re.search(rf"--set {override.partition('=')[0]}: .*{said}|--set .*{said}", ended.err), ended.err
    assert not (project / "state").exists()


def test_validate_looks_for_a_factory_in_a_package_without_importing_it(project: Path, adaptd: Adaptd) -> None:
    prefix = ("--set", "model.allowed_prefixes=[lib2to3, engine]")
    for factory, code in {
        "engine.demo.model:build_nothing": 78,
        "engine.cli:main": 0,
        "engine.nowhere:build": 78,
    }.items():
        ended = adaptd("validate", project / "policy.yaml", *prefix, "--set", f"model.factory={factory}")
        assert ended.code == code, ended.err
    assert "no module is named 'engine.nowhere'" in ended.err


def test_checkpoints_are_shown_by_number_and_the_newest_by_no_name(ran: Path, adaptd: Adaptd) -> None:
    newest = adaptd("checkpoint", "show", ran / "state")
    assert newest.code == 0
    first = adaptd("checkpoint", "show", ran / "state", "0")
    assert json.loads(first.out)["manifest"]["step"] == 0
    assert json.loads(newest.out)["manifest"]["step"] > 0


def test_of_several_checkpoints_every_one_is_verified(ran: Path, adaptd: Adaptd) -> None:
    newest = max((ran / "state").glob("ckpt-*"))
    (newest / "meta.json").write_text("{}")
    ended = adaptd("checkpoint", "verify", ran / "state")
    assert ended.code == 74
    assert "ckpt-000000000000: good" in ended.out
    assert "1 of 2 checkpoints cannot be used" in ended.err


def test_release_and_live_weights_are_exported_and_serve_as_weights_of_a_policy(ran: Path, adaptd: Adaptd) -> None:
    state, newest = ran / "state", max((ran / "state").glob("ckpt-*"))
    for which, part in (("release", "release"), ("live", "model")):
        file = ran / f"{which}.safetensors"
        ended = adaptd("checkpoint", "export", state, file, "--weights", which)
        assert (ended.code, ended.err) == (0, "")
        assert f"tensors, from {newest.name}" in ended.out
        found, kept = load_file(file), load_file(newest / f"{part}.safetensors")
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept)
        again = ("--data", ran / "events.jsonl", "--set", f"model.weights={file}")
        assert adaptd("backtest", ran / "policy.yaml", *again).code == 0
    default = adaptd("checkpoint", "export", state, ran / "first.safetensors", "--checkpoint", "0")
    assert "release 0, 9 tensors, from ckpt-000000000000" in default.out
    assert not [*ran.glob(".*")]


def test_an_export_overwrites_nothing_unless_told_to(ran: Path, adaptd: Adaptd) -> None:
    file = ran / "mine.safetensors"
    file.write_text("mine")
    ended = adaptd("checkpoint", "export", ran / "state", file)
    assert (
        ended.code,
        "exists and is left as it is; choose another name, or replace it with --force" in ended.err,
    ) == (
        2,
        True,
    )
    assert file.read_text() == "mine"
    assert adaptd("checkpoint", "export", ran / "state", file, "--force").code == 0
    assert load_file(file)


def test_an_export_that_cannot_be_made_is_told_and_leaves_nothing(project: Path, adaptd: Adaptd) -> None:
    state = project / "state"
    assert adaptd("checkpoint", "export", state, project / "a").code == 2
    state.mkdir()
    ended = adaptd("checkpoint", "export", state, project / "a")
    assert (ended.code, "holds no checkpoints" in ended.err) == (2, True)
    state.rmdir()
    assert adaptd("run", project / "policy.yaml").code == 0
    ended = adaptd("checkpoint", "export", state, project / "no" / "a")
    assert (ended.code, "cannot be written: No such file or directory; choose" in ended.err) == (74, True)
    ended = adaptd("checkpoint", "export", state, project)
    assert (ended.code, "is a directory; name a file in it" in ended.err) == (2, True)
    newest = max(state.glob("ckpt-*"))
    (newest / "release.safetensors").write_bytes(b"damaged")
    ended = adaptd("checkpoint", "export", state, project / "a")
    assert (ended.code, f"{newest.name} cannot be used: release.safetensors" in ended.err) == (74, True)
    assert not (project / "a").exists()


# -- the state directory ------------------------------------------------------------------------------------------


def test_a_state_directory_that_cannot_be_made_is_told(project: Path, adaptd: Adaptd) -> None:
    (project / "file").write_text("")
    ended = adaptd("run", project / "policy.yaml", "--set", "state=./file/state")
    assert ended.code == 74
    assert re.search(r"state: cannot use .*file/state: Not a directory; choose", ended.err)


def test_the_second_daemon_on_a_state_directory_is_told_of_the_first_even_if_both_want_one_port(
    project: Path, adaptd: Adaptd
) -> None:
    policy = project / "policy.yaml"
    with CheckpointStore(project / "state"), bind("127.0.0.1", 0) as sock:
        policy.write_text(policy.read_text().replace("port: 0", f"port: {sock.getsockname()[1]}"))
        ended = adaptd("run", policy)
    assert ended.code == 73
    assert str(os.getpid()) in ended.err
    assert not (project / "predictions.jsonl").exists()


def test_without_a_valid_checkpoint_nothing_begins_anew_by_itself(ran: Path, adaptd: Adaptd) -> None:
    for file in (ran / "state").glob("ckpt-*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    for _ in range(2):
        ended = adaptd("run", ran / "policy.yaml")
        assert ended.code == 74
        assert "--fresh" in ended.err
        assert "ckpt-000000000000: " in ended.err
    ended = adaptd("checkpoint", "verify", ran / "state")
    assert ended.code == 74
    assert len(re.findall(r"ckpt-\d+: .* cannot be used: model\.safetensors", ended.out)) == 2, ended.out
    assert "2 of 2 checkpoints cannot be used" in ended.err
    assert adaptd("run", ran / "policy.yaml", "--fresh").code == 0
    assert adaptd("checkpoint", "verify", ran / "state").code == 0


def test_past_a_damaged_checkpoint_the_run_goes_on_and_says_so(ran: Path, adaptd: Adaptd) -> None:
    newest = max((ran / "state").glob("ckpt-*"))
    (newest / "model.safetensors").write_bytes(b"")
    ended = adaptd("run", ran / "policy.yaml")
    assert ended.code == 0
    assert "checkpoint_passed_over" in ended.err
    assert answers(ran) == [f"event-{number}" for number in range(EVENTS)]
    assert max((ran / "state").glob("ckpt-*")).name == newest.name


def test_another_model_on_the_same_state_is_told(ran: Path, adaptd: Adaptd) -> None:
    model = ran / "model.py"
    model.write_text(model.read_text().replace("16", "17"))
    ended = adaptd("run", ran / "policy.yaml")
    assert ended.code == 74
    assert "belong to another model" in ended.err


def test_a_stream_that_was_replaced_is_told(ran: Path, adaptd: Adaptd) -> None:
    newest = max((ran / "state").glob("ckpt-*"))
    newest.rename(ran / "gone")
    lines = (ran / "events.jsonl").read_text().splitlines(keepends=True)
    (ran / "events.jsonl").write_text("".join(lines[:100]))
    ended = adaptd("run", ran / "policy.yaml")
    assert ended.code == 78
    assert "events.jsonl" in ended.err or "data-0" in ended.err


def test_checkpoints_that_are_not_there_are_told(project: Path, adaptd: Adaptd) -> None:
    missing = project / "nowhere"
    for command in ("ls", "verify"):
        ended = adaptd("checkpoint", command, missing)
        assert (ended.code, f"there is no state directory {missing}" in ended.err) == (2, True)
    (project / "state").mkdir()
    assert adaptd("checkpoint", "verify", project / "state").code == 2
    ended = adaptd("checkpoint", "show", project / "state", "../../etc")
    assert (ended.code, "is not the name of a checkpoint" in ended.err) == (74, True)
    ended = adaptd("checkpoint", "show", project / "state", "ckpt-000000000007")
    assert ended.code == 74


# -- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("run",),
        ("run", "p.yaml", "--fast"),
        ("run", "p.yaml", "more"),
        ("checkpoint", "eat"),
        ("backtest", "rotta"),
        ("backtest", "rotta", "--data", "x.npz", "--feedback-share", "2"),
        ("demo", "--events", "10"),
    ],
)
def test_what_the_command_line_does_not_know_is_a_mistake_of_usage(adaptd: Adaptd, arguments: tuple[str, ...]) -> None:
    ended = adaptd(*arguments)
    assert ended.code == 2
    assert ended.err


def test_init_does_not_overwrite(project: Path, adaptd: Adaptd) -> None:
    ended = adaptd("init", project)
    assert (ended.code, "exists and is left as it is" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StreamError("a"), 78),
        (StreamUnavailableError("a"), 69),
        (JournalError("a"), 74),
        (JoinError("a"), 74),
        (KeyboardInterrupt(), 130),
        (ExceptionGroup("g", [ExceptionGroup("g", [StreamError("a")])]), 78),
        (ExceptionGroup("g", [StreamUnavailableError("what it led to"), StreamError("a")]), 78),
        (ExceptionGroup("g", [StreamUnavailableError("what it led to"), ExceptionGroup("g", [JournalError("a")])]), 74),
        *[(kind("a"), kind.exit_code) for kind in AdaptdError.__subclasses__()],
    ],
)
def test_every_error_has_its_sentence_and_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._explain(error) == code
    assert capsys.readouterr().err == ("" if code == 130 else "adaptd: a\n")


@pytest.mark.parametrize(("text", "code"), [("oops", 70), ("CUDA error: device-side assert triggered", 75)])
def test_a_bug_is_told_as_one(text: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError(text)
    assert cli._explain(caught.value) == code
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "internal error; the state directory is as of the last checkpoint" in err


# -- as a process of its own --------------------------------------------------------------------------------------


def test_a_terminated_daemon_drains_and_exits_with_0(project: Path) -> None:
    policy = project / "policy.yaml"
    text = policy.read_text()
    policy.write_text(text.replace("data: {file: ./events.jsonl}", "data: {file: ./events.jsonl, follow: true}"))
    command = [sys.executable, "-m", "engine.cli", "run", str(policy)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    predictions = project / "predictions.jsonl"
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if '"listening"' in line:
                break
        while process.poll() is None and not (predictions.exists() and predictions.read_bytes().count(b"\n") >= EVENTS):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert '"drained"' in err
    assert "Traceback" not in err
    assert len(answers(project)) == EVENTS


@pytest.mark.parametrize(("set_to", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_give_up_their_core_unless_told_otherwise(set_to: str | None, found: str) -> None:
    code = (
        "import os, sys; from engine import cli; assert 'torch' not in sys.modules; sys.argv = ['adaptd', 'version'];"
        "cli.main(); print(os.environ['OMP_WAIT_POLICY'])"
    )
    environ = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if set_to is not None:
        environ["OMP_WAIT_POLICY"] = set_to
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == found


def test_commands_that_need_no_tensors_do_not_load_pytorch(tmp_path: Path) -> None:
    code = """
import sys
from engine import cli
for command in ("--help", "--version", "version", "run --help", "init " + sys.argv[1], "fly"):
    sys.argv = ["adaptd", *command.split()]
    try:
        cli.main()
    except SystemExit:
        pass
    assert "torch" not in sys.modules, command
"""
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "policy.yaml").exists()


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    nobody, output = os.pipe()
    os.close(nobody)
    command = [sys.executable, "-m", "engine.cli", "version"]
    ended = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(output)
    assert (ended.returncode, ended.stderr) == (1, "")
