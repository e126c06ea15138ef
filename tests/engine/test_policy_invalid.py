from pathlib import Path

import pytest

from engine.errors import PolicyFileError
from engine.policyfile import load
from tests.engine.policies import BASE, write

STREAMS = BASE + "streams:\n"
FILES = STREAMS + "  data: {file: d.jsonl}\n  predictions: {file: p.jsonl}\n"
TOPICS = STREAMS + '  kafka: {bootstrap_servers: "localhost:9092"}\n'
ONCE = (
    BASE.replace("{", "{{").replace("}", "}}")
    + 'delivery: exactly_once\nstreams:\n  kafka: {{bootstrap_servers: "localhost:9092", {}}}\n'
)
GATED = BASE + "interpolation: {method: linear}\ngate: {method: flips}\n"

YAML = [
    ("a: &here 1\n", 1, "anchors (&name) and aliases (*name) are not allowed"),
    ("version: 1\nmodel: *model\n", 2, "aliases (*name) are not allowed"),
    ("version: !!int 1\n", 1, "tags are not allowed"),
    ("version: 1\nmodel: !!python/object/apply:os.system [true]\n", 2, "tags are not allowed"),
    ("version: 1\n---\nversion: 1\n", 2, "a second document begins"),
    ("version: 1\nmodel:\n\tfactory: x\n", 3, "indent with spaces, not tabs"),
    ("version: 1\nmodel: factory: x\n", 2, "check the indentation"),
    ("version: 1\nstate: 'open\n", 2, "not valid YAML"),
    ("version: 1\nmodel: {factory: x\n", 2, "not valid YAML"),
    ("- version\n", 1, "expected a mapping"),
    ("just text\n", 1, "expected a mapping"),
    ("", 1, "version: missing"),
    ("version: 1\n" + "state: " + "[" * 100_000, 2, "nested deeper than 20 levels"),
    (BASE + "seed: 1\nseed: 2\n", 6, "seed: given twice, first at"),
    (BASE + "batching: {max_size: 1, max_size: 2}\n", 5, "batching.max_size: given twice"),
    (BASE + "[a, b]: 1\n", 5, "keys are plain words"),
    (BASE + "learning: {lr: .inf}\n", 5, "learning.lr: .inf is not a number that can be used"),
    (BASE + "learning: {lr: .nan}\n", 5, "learning.lr: .nan is not a number that can be used"),
    (BASE + "learning: {lr: 1e999}\n", 5, "learning.lr: 1e999 is too large"),
    (BASE + "state: a\x07b\n", 5, "character U+0007 is not allowed"),
]

NAMES = [
    (BASE + "bathcing: {max_size: 1}\n", 5, "unknown key 'bathcing'; did you mean 'batching'?"),
    (BASE + "batching:\n  maxsize: 1\n", 6, "batching.maxsize: unknown key 'maxsize'; did you mean 'max_size'?"),
    (BASE + "  layout: chw\n", 5, "model.layout: unknown key 'layout'"),
    (BASE + "<<: {seed: 1}\n", 5, "unknown key '<<'"),
    (BASE + "adaptation: {method: rota}\n", 5, "no adaptation method is named 'rota'; did you mean 'rotta'?"),
    (BASE + "adaptation:\n  method: ewc\n", 6, "adaptation.method: no adaptation method is named 'ewc'"),
    (
        BASE + "adaptation:\n  method: rotta\n  capcity: 3\n",
        7,
        "adaptation.capcity: unknown key 'capcity'; did you mean",
    ),
    (
        BASE + "safeguards:\n- method: finite\n- method: replay\n  capaciti: 3\n",
        8,
        "safeguards.1.capaciti: unknown key",
    ),
    (BASE + "gate: {budget: 0.01}\n", 5, "gate: 'method' is missing; it is one of flips"),
    (BASE + "log: {level: warn}\n", 5, "log.level: 'warn' is not a choice; did you mean 'warning'?"),
    (BASE + "preset: rota\n", 5, "no preset is named 'rota'; did you mean 'rotta'?"),
    (TOPICS + "  data: {kafka: d, topics: e}\n  predictions: {kafka: p}\n", 7, "streams.data.topics: unknown key"),
    (STREAMS + "  kafka: {bootstrap_server: a}\n", 6, "did you mean 'bootstrap_servers'?"),
]

TYPES = [
    ("model: {factory: x, inputs: {shape: [1]}}\n", 1, "version: missing"),
    ("version: 2\n", 1, "version: 2 is not a choice. Expected: 1"),
    ("version: 1\nmodel: {inputs: {shape: [1]}}\n", 2, "model.factory: missing"),
    ("version: 1\nmodel:\n", 2, "model: nothing (null) is not what belongs here; expected a mapping"),
    (BASE + "batching: 64\n", 5, "batching: 64 is not what belongs here; expected a mapping"),
    (BASE + "batching: {max_size: many}\n", 5, "batching.max_size: 'many' is not what belongs here; expected a whole"),
    (BASE + "batching: {max_size: 1.5}\n", 5, "expected a whole number"),
    (BASE + "batching: {max_size: '64'}\n", 5, "write the number without quotes"),
    (BASE + "batching: {max_size: 064}\n", 5, "without quotes or leading zeros"),
    (BASE + "batching: {max_size: true}\n", 5, "batching.max_size: true is not a number"),
    (BASE + "batching: {max_size: 0}\n", 5, "batching.max_size: 0: expected greater than or equal to 1"),
    (BASE + "batching: {max_delay: 20 parsecs}\n", 5, "'20 parsecs' is not a duration"),
    (BASE + "join: {max_bytes: 1XB}\n", 5, "'1XB' is not a size"),
    (BASE + "metrics: {enabled: yes}\n", 5, "metrics.enabled: 'yes' is not true or false"),
    (BASE + "metrics: {enabled: 1}\n", 5, "metrics.enabled: 1 is not true or false"),
    (BASE + "metrics: {port: 70000}\n", 5, "metrics.port: 70000: expected less than or equal to 65535"),
    (BASE + "safeguards: {method: replay}\n", 5, "safeguards: a mapping is not what belongs here; expected a list"),
    (BASE + "adaptation: [rotta]\n", 5, "adaptation: write it as {method: NAME}"),
    (BASE + "adaptation: rota\n", 5, "rotta"),
    (
        BASE + "adaptation: {method: tent, lr: fast}\n",
        5,
        "adaptation.lr: 'fast' is not what belongs here; expected a numb",
    ),
    (BASE + "adaptation: {method: tent, lr: true}\n", 5, "adaptation.lr: true is not a number"),
    (BASE + "learning: {include: ['(']}\n", 5, "learning.include.0: '(' is not a regular expression"),
    (BASE + "delivery: exactly\n", 5, "delivery: 'exactly' is not a choice"),
    (TOPICS + "  data: {kafka: 7}\n  predictions: {kafka: p}\n", 7, "streams.data.kafka: 7 is not what belongs here"),
    (STREAMS + "  kafka: {bootstrap_servers: far.example:9092}\n", 6, "streams.kafka: PLAINTEXT would carry records"),
    (
        "version: 1\nmodel: {factory: x, device: gpu, inputs: {shape: [1]}}\n",
        2,
        "model.device: 'gpu' is not a device. Expected: auto, cpu",
    ),
    ("version: 1\nmodel: {factory: x, inputs: {shape: []}}\n", 2, "model.inputs.shape: a list: expected a list of at"),
    ("version: 1\nmodel: {factory: x, inputs: {shape: [3, 0]}}\n", 2, "model.inputs.shape.1: 0: expected greater"),
    ("version: 1\nmodel: {factory: x, allowed_prefixes: ['']}\n", 2, "model.allowed_prefixes.0: '': expected text"),
]

COMBINATIONS = [
    (STREAMS + "  data: {kafka: d}\n  predictions: {file: p.jsonl}\n", 6, "nothing says where the cluster is"),
    (STREAMS + "  data: {}\n  predictions: {file: p.jsonl}\n", 6, "streams.data: names no stream"),
    (TOPICS + "  data: {kafka: d, file: d.jsonl}\n  predictions: {kafka: p}\n", 7, "has both kafka and file"),
    (
        TOPICS + "  data: {kafka: d}\n  predictions: {kafka: d}\n",
        8,
        "streams.predictions: is the same topic as streams.data",
    ),
    (STREAMS + "  data: {file: d.jsonl}\n  predictions: {file: d.jsonl}\n", 7, "is the same file as streams.data"),
    (ONCE.format("group: g") + "  data: {kafka: d}\n  predictions: {file: p.rec}\n", 9, "no transaction holds"),
    (ONCE.format("client_id: c") + "  data: {kafka: d}\n  predictions: {kafka: p}\n", 5, "name the group in streams"),
    (
        ONCE.format("group: g, isolation_level: read_uncommitted") + "  data: {kafka: d}\n  predictions: {kafka: p}\n",
        7,
        "exactly_once needs read_committed",
    ),
    (TOPICS + "  data: {kafka: d, follow: true}\n  predictions: {kafka: p}\n", 7, "no effect on a Kafka topic"),
    (TOPICS + "  data: {kafka: d}\n  predictions: {kafka: p}\norder: time\n", 9, "streams.data has no end"),
    (STREAMS + "  data: {file: d.csv}\n  predictions: {file: p.jsonl}\n", 6, "the name ends in .csv"),
    (STREAMS + "  data: {file: d}\n  predictions: {file: p}\n", 7, "the name ends in nothing; expected .jsonl or .rec"),
    (
        STREAMS + "  data: {file: d.npz, follow: true}\n  predictions: {file: p.rec}\n",
        6,
        "does not grow; remove follow",
    ),
    (
        STREAMS + "  data: {file: d.rec}\n  predictions: {file: p.jsonl, format: binary}\n",
        7,
        "binary does not fit lines",
    ),
    (FILES + "  dead_letters: {file: x.rec}\n", 8, "the name ends in .rec; expected .jsonl"),
    (FILES + "learning: {enabled: true}\n", 8, "labels cannot be learned from without feedback"),
    (FILES + "interpolation: {method: linear}\ngate: {method: flips}\n", 9, "gate: decides on labelled rows"),
    (BASE + "gate: {method: flips}\n", 5, "gate: has nothing to decide on; add interpolation"),
    (BASE + "interpolation: {method: linear}\n", 5, "interpolation: has nothing to decide on its weights; add gate"),
    (GATED + "audit: {share: 0}\n", 7, "audit.share: 0 holds out no feedback"),
    (GATED + "release: {every: 0}\n", 7, "release.every: 0 never attempts"),
    (BASE + "adaptation: {method: lame}\nbatching: {max_size: 1}\n", 6, "lame compares the rows of a batch"),
    (BASE + "safeguards:\n- method: replay\n- method: replay\n", 7, "safeguards.1: replay is listed 2 times"),
    (BASE + "join: {mode: inline, max_disk_bytes: 1GB}\n", 5, "join.max_disk_bytes: has no effect with mode inline"),
    (BASE.replace("[4]", "[4], layout: hwc"), 4, "hwc is for shapes of three dimensions"),
    (BASE.replace("[4]", "[4], scale: 0"), 4, "model.inputs.scale: 0 makes all inputs the same"),
]

CASES = [*YAML, *NAMES, *TYPES, *COMBINATIONS]


@pytest.mark.parametrize(("text", "line", "fragment"), CASES, ids=[case[2][:50] for case in CASES])
def test_a_mistake_is_told_with_file_and_line(tmp_path: Path, text: str, line: int, fragment: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(PolicyFileError) as caught:
        load(file, environ={})
    told = [one for one in str(caught.value).splitlines() if fragment in one]
    assert told, str(caught.value)
    assert told[0].startswith(f"{file}:{line}: ")
    assert caught.value.exit_code == 78


def test_all_problems_of_a_file_are_told_at_once_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = BASE + "seed: 1\nmetrics: {prot: 1}\nseed: 2\nlog: {level: loud}\nbatching: {max_size: 0}\n"
    with pytest.raises(PolicyFileError) as caught:
        load(write(tmp_path, text, "p.yaml"), environ={})
    lines = [one.rpartition("p.yaml:")[2].split(":")[0] for one in str(caught.value).splitlines()]
    assert [one.split(": ")[1] for one in str(caught.value).splitlines()] == [
        "metrics.prot",
        "seed",
        "log.level",
        "batching.max_size",
    ]
    assert lines[0] == "6"


def test_a_file_that_is_no_utf8_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_bytes(b"version: 1\nstate: \xff\n")
    with pytest.raises(PolicyFileError, match=r"policy.yaml:2: not UTF-8 text: byte 0xff"):
        load(file, environ={})


def test_a_file_above_a_megabyte_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "#" * 1_000_001)
    with pytest.raises(PolicyFileError, match="larger than 1,000,000 bytes"):
        load(file, environ={})


def test_a_missing_file_is_told_and_a_misspelt_preset_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match=r"none\.yml: no such file; 'adaptd init' writes one"):
        load(tmp_path / "none.yml", environ={})
    with pytest.raises(PolicyFileError, match=r"rota: no such file; did you mean the preset 'rotta'\?"):
        load("rota", environ={})


def test_a_directory_is_no_policy_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match=r"is a directory; name the policy file in it"):
        load(tmp_path, environ={})


def test_a_secret_is_never_shown(tmp_path: Path) -> None:
    text = STREAMS + "  kafka: {bootstrap_servers: 'localhost:9092', sasl_plain_password: [hunter2]}\n"
    with pytest.raises(PolicyFileError) as caught:
        load(write(tmp_path, text), environ={})
    assert "hunter2" not in str(caught.value)
