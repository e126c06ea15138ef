import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from engine.errors import PolicyFileError
from engine.policy import Policy
from engine.policyfile import digest, effective, json_schema, load, presets
from engine.problems import model_in
from policies import registry
from policies.adaptation.rotta import RoTTA
from tests.engine.policies import BASE, KAFKA, write

KEYS = """
version preset state seed
model.factory model.weights model.device model.threads model.affinity model.allowed_prefixes
model.inputs.shape model.inputs.dtype model.inputs.scale model.inputs.offset model.inputs.layout
streams.kafka
streams.data.kafka streams.data.file streams.data.follow
streams.feedback.kafka streams.feedback.file streams.feedback.follow
streams.predictions.kafka streams.predictions.file streams.predictions.format
streams.dead_letters.kafka streams.dead_letters.file
delivery order
batching.max_size batching.max_delay
join.window join.keep join.max_bytes join.max_disk_bytes join.mode
adaptation reweighting safeguards interpolation gate
learning.enabled learning.optimizer learning.lr learning.clip_norm learning.weight_decay learning.momentum
learning.batch_size
learning.max_delay learning.parameters learning.include learning.exclude learning.mode
audit.share audit.window
release.every
release.freeze_after
checkpoint.every checkpoint.keep checkpoint.patience checkpoint.allow_network
metrics.enabled metrics.host metrics.port
log.level log.format
"""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        below = model_in(field.annotation)
        if below is not None and below.__module__ == "engine.policy":
            yield from keys_of(below, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_keys_of_a_policy_are_those_promised() -> None:
    assert sorted(keys_of(Policy)) == sorted(KEYS.split())


def test_a_full_policy_on_kafka_loads(tmp_path: Path) -> None:
    policy = load(write(tmp_path, KAFKA), environ={}).policy
    assert policy.model.inputs.shape == (3, 32, 32)
    assert policy.batching.max_delay == 0.02
    assert policy.join.max_bytes == 256_000_000
    assert policy.streams is not None
    assert policy.streams.kafka is not None
    assert policy.streams.kafka.bootstrap_servers == ("127.0.0.1:9092",)
    assert [(kind, name) for kind, name, _ in policy.methods()] == [
        ("adaptation", "rotta"),
        ("reweighting", "age"),
        ("safeguard", "replay"),
        ("interpolation", "linear"),
        ("gate", "flips"),
    ]
    assert isinstance(policy.adaptation.params, RoTTA.Params)
    assert policy.reweighting[0].params.model_dump()["half_life"] == 3600.0


def test_the_same_policy_loads_with_files_in_place_of_topics(tmp_path: Path) -> None:
    text = KAFKA
    for topic in ("events", "feedback", "predictions", "dead-letters"):
        text = text.replace(f"kafka: {topic}}}", f"file: {topic}.jsonl}}")
    policy = load(write(tmp_path, text), environ={}).policy
    assert policy.bounded
    assert policy.by_time


def test_the_least_policy_has_defaults_for_the_rest(tmp_path: Path) -> None:
    policy = load(write(tmp_path, BASE), environ={}).policy
    assert policy.adaptation.method == "auto"
    assert policy.streams is None
    assert policy.learns
    assert policy.state == Path("state")


def test_a_policy_cannot_be_changed(tmp_path: Path) -> None:
    policy = load(write(tmp_path, BASE), environ={}).policy
    with pytest.raises(ValidationError):
        policy.batching.max_size = 3


@pytest.mark.parametrize(
    ("streams", "by_time"),
    [
        ("data: {file: d.jsonl}", True),
        ("data: {file: d.jsonl, follow: true}", False),
        ("data: {file: d.jsonl}\n  feedback: {file: f.jsonl, follow: true}", False),
        ("data: {kafka: d}\n  kafka: {bootstrap_servers: 'localhost:1'}", False),
    ],
)
def test_records_merge_by_time_where_every_stream_ends(tmp_path: Path, streams: str, by_time: bool) -> None:
    text = BASE + f"streams:\n  predictions: {{file: p.jsonl}}\n  {streams}\n"
    assert load(write(tmp_path, text), environ={}).policy.by_time is by_time


def test_labels_are_learned_from_where_feedback_comes_unless_said_otherwise(tmp_path: Path) -> None:
    text = BASE + "streams:\n  predictions: {file: p.jsonl}\n  data: {file: d.jsonl}\n"
    assert not load(write(tmp_path, text), environ={}).policy.learns
    with_feedback = write(tmp_path, text + "  feedback: {file: f.jsonl}\n")
    assert load(with_feedback, environ={}).policy.learns
    assert not load(with_feedback, ["learning.enabled=false"], {}).policy.learns


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0", 0),
        ("+7", 7),
        ("012", "012"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("True", True),
        ("~", None),
        ("'1'", "1"),
        ('"true"', "true"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    from engine.strictyaml import parse

    problems: list[str] = []
    found = parse(f"key: {text}".encode(), "p", problems).plain()
    assert found == {"key": value}
    assert type(found["key"]) is type(value)
    assert problems == []


def test_flags_outrank_the_environment_which_outranks_the_file_which_outranks_the_preset(tmp_path: Path) -> None:
    file = write(tmp_path, BASE + "preset: rotta\nadaptation: {interval: 10, capacity: 10, nu: 0.5}\n")
    environ = {"ADAPTD_ADAPTATION__CAPACITY": "20", "ADAPTD_ADAPTATION__NU": "0.25"}
    loaded = load(file, ["adaptation.nu=0.125"], environ)
    params = loaded.policy.adaptation.params
    assert isinstance(params, RoTTA.Params)
    assert (params.interval, params.capacity, params.nu) == (10, 20, 0.125)
    assert loaded.origins["adaptation.interval"] == f"{file}:6"
    assert loaded.origins["adaptation.capacity"] == "ADAPTD_ADAPTATION__CAPACITY"
    assert loaded.origins["adaptation.nu"] == "--set adaptation.nu"
    assert loaded.origins["adaptation.method"].startswith("preset rotta:")


def test_a_method_of_another_name_replaces_the_one_below_with_its_parameters(tmp_path: Path) -> None:
    file = write(tmp_path, BASE + "adaptation: {method: rotta, capacity: 3}\n")
    policy = load(file, ["adaptation.method=tent", "adaptation.lr=1e-4"], {}).policy
    assert policy.adaptation.method == "tent"
    assert policy.adaptation.params.model_dump()["lr"] == 1e-4


def test_a_file_replaces_a_topic(tmp_path: Path) -> None:
    policy = load(write(tmp_path, KAFKA), ["streams.data.file=d.jsonl"], {}).policy
    assert policy.streams is not None
    assert policy.streams.data.place == ("file", "d.jsonl")


def test_a_flag_changes_one_item_of_a_list_or_all_of_it(tmp_path: Path) -> None:
    file = write(tmp_path, KAFKA)
    one = load(file, ["safeguards.0.capacity=7"], {}).policy
    assert one.safeguards[0].params.model_dump()["capacity"] == 7
    other = load(file, ["safeguards=[{method: finite}, {method: collapse}]"], {}).policy
    assert [spec.method for spec in other.safeguards] == ["finite", "collapse"]


def test_a_flag_where_text_belongs_is_text(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, KAFKA), ["streams.kafka.group=007"], {"ADAPTD_STREAMS__KAFKA__CLIENT_ID": "1e3"})
    assert loaded.policy.streams is not None
    assert loaded.policy.streams.kafka is not None
    assert loaded.policy.streams.kafka.group == "007"
    assert loaded.policy.streams.kafka.client_id == "1e3"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("batching.maxsize=1", "--set batching.maxsize: unknown key 'maxsize'; did you mean"),
        ("batching.max_size=lots", "--set batching.max_size: 'lots' is not what belongs here"),
        ("batching", "--set batching: expected KEY=VALUE"),
        ("=1", "--set : expected KEY=VALUE"),
        ("safeguards.4.capacity=1", "--set safeguards.4.capacity: there is no item 4"),
        ("seed=[1", "--set seed: not valid YAML"),
        ("seed=*x", "--set seed: anchors (&name) and aliases (*name) are not allowed"),
    ],
)
def test_a_mistake_in_a_flag_names_the_flag(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(PolicyFileError) as caught:
        load(write(tmp_path, KAFKA), [override], {})
    assert str(caught.value).startswith(told)


def test_a_mistake_in_a_variable_names_the_variable(tmp_path: Path) -> None:
    environ = {"ADAPTD_METRICS__PROT": "1", "ADAPTD_BATCHNG__MAX_SIZE": "1"}
    with pytest.raises(PolicyFileError) as caught:
        load(write(tmp_path, BASE), environ=environ)
    assert "ADAPTD_METRICS__PROT: metrics.prot: unknown key 'prot'; did you mean 'port'?" in str(caught.value)
    assert "ADAPTD_BATCHNG__MAX_SIZE: a policy has no section 'batchng'; did you mean 'batching'?" in str(caught.value)


def test_variables_of_other_meaning_are_left_alone(tmp_path: Path) -> None:
    assert load(write(tmp_path, BASE), environ={"ADAPTD_TEST_BOOTSTRAP": "x", "SEED": "9"}).policy.seed == 0


@pytest.mark.parametrize("name", presets())
def test_a_preset_runs_with_a_model_of_ones_own(name: str) -> None:
    loaded = load(name, ["model.factory=./model.py:build", "model.inputs.shape=[3, 32, 32]"], {})
    assert loaded.path is None
    assert loaded.base == Path.cwd()
    for kind, method, params in loaded.policy.methods():
        assert isinstance(params, registry.find(kind, method).Params)


@pytest.mark.parametrize("text", [KAFKA, BASE, BASE + "preset: guarded\n"])
def test_the_policy_in_force_loads_as_itself(tmp_path: Path, text: str) -> None:
    loaded = load(write(tmp_path, text), environ={})
    again = load(write(tmp_path, effective(loaded.policy), "again.yaml"), environ={})
    assert again.policy == loaded.policy
    assert again.digest == loaded.digest


def test_the_digest_depends_on_values_and_not_on_how_they_are_written(tmp_path: Path) -> None:
    one = load(write(tmp_path, BASE + "batching: {max_size: 64, max_delay: 20ms}\n"), environ={})
    two = load(write(tmp_path, BASE + "# the default\nbatching:\n  max_delay: 0.02\n", "two.yaml"), environ={})
    assert one.digest == two.digest == digest(two.policy)
    assert len(one.digest) == 64
    assert load(two.path or "", ["seed=1"], {}).digest != two.digest


def test_secrets_are_masked_in_what_is_shown(tmp_path: Path) -> None:
    from engine.policyfile import _masked

    assert _masked({"sasl_password": "a", "sasl_plain_password_file": "f", "x": [{"api_token": 3}]}) == {
        "sasl_password": "********",
        "sasl_plain_password_file": "f",
        "x": [{"api_token": "********"}],
    }


def test_a_later_error_gets_the_line_of_its_key(tmp_path: Path) -> None:
    file = write(tmp_path, BASE)
    located = load(file, environ={}).locate(PolicyFileError("model.inputs: the model cannot take it\nsomething else"))
    assert str(located) == f"{file}:4: model.inputs: the model cannot take it\n{file}: something else"


def test_paths_start_from_the_directory_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", BASE)
    monkeypatch.chdir(tmp_path)
    loaded = load("deep/policy.yaml", environ={})
    assert loaded.resolve(loaded.policy.state) == tmp_path / "deep" / "state"
    assert loaded.resolve(Path("/elsewhere")) == Path("/elsewhere")


def test_the_schema_holds_every_method_with_its_parameters() -> None:
    schema: dict[str, Any] = json.loads(json.dumps(json_schema()))
    for key, kind in (("AdaptationSpec", "adaptation"), ("SafeguardSpec", "safeguard"), ("GateSpec", "gate")):
        names, *branched = schema["$defs"][key]["oneOf"]
        assert names == {"enum": sorted(registry.known(kind))}
        branches = {branch["title"]: branch for branch in branched}
        assert sorted(branches) == sorted(registry.known(kind))
        for name, branch in branches.items():
            assert set(branch["properties"]) == {"method", *registry.find(kind, name).Params.model_fields}
            assert branch["additionalProperties"] is False
            assert "$ref" not in json.dumps(branch)


def test_a_method_without_parameters_may_be_written_as_its_name(tmp_path: Path) -> None:
    policy = load(write(tmp_path, BASE + "adaptation: auto\nsafeguards: [finite]\n"), environ={}).policy
    assert [(kind, name) for kind, name, _ in policy.methods()] == [("adaptation", "auto"), ("safeguard", "finite")]


def test_a_method_that_cannot_be_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "gate", {"broken": "policies.gates.nowhere:Gone"})
    registry.known.cache_clear()
    try:
        with pytest.raises(
            PolicyFileError, match=r"policy.yaml:6: gate.method: gate method 'broken' cannot be imported"
        ):
            load(write(tmp_path, BASE + "gate:\n  method: broken\n"), environ={})
    finally:
        registry.known.cache_clear()


def test_inline_joins_need_nothing_said_about_disk(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("version: 1\nmodel: {factory: ./m.py:f, inputs: {shape: [2]}}\njoin: {mode: inline}\n")
    assert load(str(file), (), {}).policy.join.mode == "inline"


def test_a_variable_that_means_nothing_is_told_with_the_nearest_that_does(tmp_path: Path) -> None:
    file = write(tmp_path, KAFKA)
    with pytest.raises(PolicyFileError, match=r"^ADAPTD_SED: no such variable; did you mean ADAPTD_SEED\?"):
        load(file, environ={"ADAPTD_SED": "3"})
    assert load(file, environ={"ADAPTD_CRASH_SEED": "3", "ADAPTD_TEST_X": "1", "OTHER": "2"}).policy.seed == 0
    secret = "sasl_mechanism: PLAIN, sasl_plain_username: me, sasl_plain_password_env: ADAPTD_PASS, security_protocol"
    text = KAFKA.replace("group: digits", f"group: digits, {secret}: SASL_SSL")
    assert load(write(tmp_path, text), environ={"ADAPTD_PASS": "x"}).policy.seed == 0


def test_what_a_flag_changed_in_a_stream_is_told_with_the_flag(tmp_path: Path) -> None:
    text = BASE + "streams:\n  data: {file: d.jsonl}\n  predictions: {file: p.jsonl}\n"
    with pytest.raises(PolicyFileError, match=r"^--set streams\.data\.kafka: streams\.data: is a Kafka topic"):
        load(write(tmp_path, text), ["streams.data.kafka=abc"], {})
