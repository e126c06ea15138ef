"""Records a second through a real broker, beside what else could be run; what each part of adaptd costs; and latency.

    python -m benchmarks.kafka [--peers PYTHON] [--records N] [--repeats N] [--turns N] [--parts NAMES] [--quick]

Each contestant is a process of its own with one thread for tensor operations. It finds a backlog in a topic of four
partitions (64 numbers a record, about 0.7 KB in JSON), multiplies by a 64 x 10 matrix, and writes id, label and
probabilities to another topic, acknowledged by all replicas, idempotent. The broker runs as Kafka's own scripts start
it. Contestants take turns on the same backlog, and ratios are taken within a turn. A rate is answers over the time from
the moment when the first record was read to the broker's own stamp of the last answer. Every event must have its
answer, or there is no result.

Part ``rates`` holds adaptd with each of its clients against the bare loop with that client (`benchmarks.kafka_loops`),
Quix Streams and Bytewax. All of them leave their client as it comes; ``confluent_tuned`` is the bare loop with
librdkafka that fetches on as soon as there is room, where by default it pauses for a second whenever 100,000 records
wait. Backlogs of the binary form are longer, so that such pauses, and the start, are a small share. The loops neither
join nor journal nor checkpoint nor measure, check nothing that they read, and commit offsets without waiting for their
answers; adaptd does all of that, with up to 1 GB of events that wait for labels, one in a hundred labelled, and a
checkpoint every five seconds, in batches of up to 512, as the loops poll, or of what 5 ms bring. The loops parse JSON
with the standard library, but for those whose names end in ``_orjson``; adaptd and Quix Streams with orjson. Part
``costs`` takes away, or adds, one thing at a time. Part ``latency`` writes records at half of each of adaptd's rates
(or at ``--rate``), for adaptd and for the bare loop with its client in turn, and compares the broker's stamps of record
and answer.

Quix Streams and Bytewax need an interpreter that has them: ``--peers``. What is missing is skipped, and the result
says why.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.kafka_arena import PATIENCE, Arena, Records, arena, fill, running
from benchmarks.kafka_latency import TARGET_P99_MS, latency
from benchmarks.results import Report, parser
from tests.broker.node import BrokerMissingError, kafka_version

FORMS = ("json", "binary")
CLIENTS = {"kafka_python": "kafka-python", "confluent": "confluent"}
BARE = {
    "kafka_python": ("kafka_python", "kafka_python_orjson"),
    "confluent": ("confluent", "confluent_tuned", "confluent_orjson"),
}
"""The bare loops with each client, the one of the target first."""
PEERS = ("quix", "bytewax")
PARTS = ("rates", "costs", "latency")
TARGET_SHARE = 0.8
LABEL_EVERY = 100
RECORDS = {"json": 300_000, "binary": 500_000}
"""Of a backlog: several of librdkafka's pauses, which one turn may meet and the next one not."""

MODEL = """\
from torch import nn


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def normed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
"""

POLICY = """\
version: 1
state: ./{state}
model: {{factory: "./model.py:{model}", threads: 1, inputs: {{shape: [64]}}}}
streams:
  kafka: {{bootstrap_servers: "{bootstrap}", group: {state}{client}}}
  data: {{kafka: {data}}}
{feedback}
  predictions: {{kafka: {answers}, format: {form}}}
batching: {{max_size: 512, max_delay: 5ms}}
join: {{mode: {join}, max_bytes: {memory}}}
adaptation: {{method: {adaptation}}}
learning: {{enabled: {learning}}}
checkpoint: {{every: {checkpoint}}}
metrics: {{enabled: {metrics}, port: 0}}
"""

COSTS: dict[str, dict[str, str]] = {
    "as_in_rates": {},
    "no_joins": {"join": "inline"},
    "all_inputs_kept": {"join": "store, keep: all"},
    "joins_mostly_on_disk": {"join": "store, keep: all", "memory": "32MB"},
    "no_metrics": {"metrics": "false"},
    "no_checkpoints": {"checkpoint": "1h"},
    "none_of_these": {"join": "inline", "metrics": "false", "checkpoint": "1h"},
    "ten_times_the_labels": {"labels": "many"},
    "ten_times_the_labels_learned": {"labels": "many", "learning": "true"},
    "model_with_norm": {"model": "normed"},
    "bn": {"model": "normed", "adaptation": "bn"},
    "tent": {"model": "normed", "adaptation": "tent"},
    "rotta": {"model": "normed", "adaptation": "rotta"},
    "lame": {"model": "normed", "adaptation": "lame"},
    "auto": {"model": "normed", "adaptation": "auto"},
}
"""What differs from the policy of the part ``rates``; the methods are to be held against ``model_with_norm``."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of one contestant."""

    rate: float
    """Records a second."""
    cpu: float
    """Microseconds of the processor for each record, all threads, without the start."""


@dataclass(slots=True)
class Bench:
    """Everything that the parts share."""

    arena: Arena
    directory: Path
    options: argparse.Namespace
    data: dict[str, str] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    runs: int = 0
    stood_still: list[str] = field(default_factory=list)
    """Loops that gave nothing for a minute, and were begun anew; a daemon that does so ends the benchmark."""

    def prepare(self, forms: Sequence[str]) -> None:
        """Write the model and fill the topics."""
        (self.directory / "model.py").write_text(MODEL)
        for form in forms:
            records, count = Records(form), self.count(form)
            self.data[form] = self.arena.topic(f"data-{form}")
            fill(self.arena.bootstrap, self.data[form], map(records.data, range(count)))
            self.labels[form] = {}
            for name, every in (("few", LABEL_EVERY), ("many", LABEL_EVERY // 10)):
                topic = self.labels[form][name] = self.arena.topic(f"labels-{name}-{form}")
                fill(self.arena.bootstrap, topic, map(records.feedback, range(0, count, every)))

    def count(self, form: str) -> int:
        """Records of a backlog."""
        return int(self.options.records or (10_000 if self.options.quick else RECORDS[form]))

    def policy(self, client: str, form: str, data: str, answers: str, changes: Mapping[str, str]) -> Path:
        """Write a policy with a state directory and a group of its own."""
        self.runs += 1
        values = {"model": "build", "join": "store", "adaptation": "none", "learning": "false", "metrics": "true"}
        values |= {"checkpoint": "5s", "labels": "few", "memory": "1GB"} | changes
        topic = self.labels[form].get(values["labels"])
        path = self.directory / f"run-{self.runs}.yaml"
        values |= {
            "state": path.stem,
            "bootstrap": self.arena.bootstrap,
            "client": "" if client == "kafka_python" else f", client: {client}",
            "data": data,
            "answers": answers,
            "form": form,
            "feedback": f"  feedback: {{kafka: {topic}}}" if topic else "",
        }
        path.write_text(POLICY.format(**values))
        return path

    def daemon(self, client: str, form: str, answers: str, changes: Mapping[str, str] | None = None) -> list[str]:
        """The command of a daemon on the backlog."""
        policy = self.policy(client, form, self.data[form], answers, changes or {})
        return [sys.executable, "-m", "benchmarks.kafka_daemon", str(policy)]

    def loop(self, name: str, form: str, answers: str, data: str | None = None) -> list[str]:
        """The command of a loop, on the backlog unless another topic is named."""
        python = self.options.peers if name in PEERS else sys.executable
        script = Path(__file__).with_name("kafka_loops.py")
        return [python, "-P", str(script), name, self.arena.bootstrap, data or self.data[form], answers, form]

    def turn(self, name: str, form: str, changes: Mapping[str, str] | None = None) -> Turn:
        """Run a contestant to the end of the backlog."""
        answers = self.arena.topic("answers")
        kind, _, client = name.rpartition("/")
        command = self.daemon(client, form, answers, changes) if kind else self.loop(name, form, answers)
        log, count = self.directory / "log.txt", self.count(form)
        with running(command, log) as process:
            self.arena.wait(answers, count, lambda: process.poll() is None, PATIENCE)
            spent = cpu(psutil.Process(process.pid))
        found = self.arena.answered(answers)
        self.arena.drop(answers)
        if found.count != count:
            raise RuntimeError(f"{name} answered {found.count} of {count} events of form {form}")
        moment, before = map(float, log.with_suffix(".start").read_text().split())
        return Turn(found.count / (found.last - moment), 1e6 * (spent - before) / found.count)

    def turn_of(self, name: str, form: str, changes: Mapping[str, str]) -> Turn:
        """As `turn`; a loop, not a daemon, that gave nothing for a minute is begun anew once, and noted."""
        try:
            return self.turn(name, form, changes)
        except RuntimeError as error:
            if name.startswith("adaptd/"):
                raise
            self.stood_still.append(f"{form} {name}: {error}")
            return self.turn(name, form, changes)


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def missing(bench: Bench) -> dict[str, str]:
    """Contestants that cannot take part, and why."""
    found: dict[str, str] = {}
    probe = bench.policy("confluent", bench.options.forms[0], "data", "answers", {})
    checked = subprocess.run(
        [sys.executable, "-m", "engine.cli", "validate", str(probe)], capture_output=True, text=True, check=False
    )
    if checked.returncode:
        found["adaptd/confluent"] = (checked.stderr or checked.stdout).strip()[-300:]
    if subprocess.run([sys.executable, "-c", "import confluent_kafka"], capture_output=True, check=False).returncode:
        found |= dict.fromkeys(BARE["confluent"], "confluent-kafka is not installed")
    if subprocess.run([sys.executable, "-c", "import orjson"], capture_output=True, check=False).returncode:
        found |= dict.fromkeys(("kafka_python_orjson", "confluent_orjson"), "orjson is not installed")
    for name, module in zip(PEERS, ("quixstreams", "bytewax"), strict=True):
        if bench.options.peers is None:
            found[name] = "no interpreter was given with --peers"
        elif subprocess.run(
            [bench.options.peers, "-c", f"import {module}"], capture_output=True, check=False
        ).returncode:
            found[name] = f"{bench.options.peers} has no {module}"
    return {name: why for name, why in found.items() if name in bench.options.contestants}


CONTESTANTS = (*BARE["kafka_python"], "adaptd/kafka_python", *BARE["confluent"], "adaptd/confluent", *PEERS)


def take_turns(bench: Bench, names: Mapping[str, tuple[str, Mapping[str, str]]], form: str) -> dict[str, list[Turn]]:
    """Every contestant so often, in turn."""
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for number in range(bench.options.repeats):
        order = list(names) if number % 2 == 0 else list(reversed(names))
        for name in order:
            contestant, changes = names[name]
            turns[name].append(bench.turn_of(contestant, form, changes))
            last = turns[name][-1]
            sys.stderr.write(f"{form} {name}: {last.rate:.0f} records/s, {last.cpu:.1f} us of processor\n")
    return turns


def figures(turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "records_per_second": round(statistics.median(turn.rate for turn in turns)),
        "records_per_second_of_runs": [round(turn.rate) for turn in turns],
        "cpu_microseconds_per_record": round(statistics.median(turn.cpu for turn in turns), 1),
    }


def share(turns: Sequence[Turn], of: Sequence[Turn]) -> dict[str, float]:
    """Median, least and most of the ratios of rates within one turn, and the median ratio of processor time."""
    ratios = sorted(a.rate / b.rate for a, b in zip(turns, of, strict=True))
    return {
        "median": round(statistics.median(ratios), 3),
        "least": round(ratios[0], 3),
        "most": round(ratios[-1], 3),
        "by_cpu_time": round(statistics.median(b.cpu / a.cpu for a, b in zip(turns, of, strict=True)), 3),
    }


def rates(bench: Bench, names: Sequence[str], form: str) -> dict[str, Any]:
    """All contestants, and adaptd's share of the others' rates."""
    names = [name for name in names if form == "json" or not name.endswith("_orjson")]
    turns = take_turns(bench, {name: (name, {}) for name in names}, form)
    out: dict[str, Any] = {name: figures(runs) for name, runs in turns.items()}
    for client in CLIENTS:
        own = turns.get(f"adaptd/{client}")
        if own is None:
            continue
        others = (*BARE[client], *PEERS) if client == "confluent" else BARE[client]
        shares = {name: share(own, turns[name]) for name in others if name in turns}
        out[f"adaptd/{client}"]["share_of"] = shares
        if client in shares:
            out[f"adaptd/{client}"]["reaches_target"] = shares[client]["median"] >= TARGET_SHARE
    return out


def costs(bench: Bench, client: str, form: str) -> dict[str, Any]:
    """What each part costs, as a share of the rate with everything and as processor time."""
    chosen = {name: COSTS[name] for name in bench.options.costs}
    turns = take_turns(bench, {name: (f"adaptd/{client}", changes) for name, changes in chosen.items()}, form)
    out = {}
    for name, runs in turns.items():
        base = "model_with_norm" if COSTS[name].get("adaptation") else "as_in_rates"
        out[name] = figures(runs)
        if base in turns and base != name:
            out[name]["share_of"] = {base: share(runs, turns[base])}
    return out


ASK = """
import importlib.metadata as found, sys
print(*(f"{name} {found.version(name)}" for name in sys.argv[1:] if list(found.distributions(name=name))), sep="\\n")
"""


def versions(peers: str | None) -> dict[str, str]:
    """Versions of the broker, the clients, the parser of JSON and the peers, as far as they are there."""
    found = {"apache-kafka": kafka_version()}
    for python, packages in (
        (sys.executable, ("kafka-python", "confluent-kafka", "orjson")),
        (peers, ("quixstreams", "bytewax")),
    ):
        if python is not None:
            told = subprocess.run([python, "-c", ASK, *packages], capture_output=True, text=True, check=False).stdout
            found |= dict(line.split() for line in told.splitlines())
    return found


def measure(bench: Bench) -> dict[str, Any]:
    options = bench.options
    bench.prepare(options.forms)
    skipped = missing(bench)
    names = [name for name in options.contestants if name not in skipped]
    results: dict[str, Any] = {
        "of": versions(options.peers),
        "records": {form: bench.count(form) for form in options.forms},
        "labelled_one_in": LABEL_EVERY,
        "target_share": TARGET_SHARE,
        "target_p99_ms": TARGET_P99_MS,
        "skipped": skipped,
    }
    found = {form: rates(bench, names, form) for form in options.forms} if "rates" in options.parts else {}
    results["rates"] = found
    if "costs" in options.parts:
        client = "confluent" if "adaptd/confluent" in names else "kafka_python"
        results["costs"] = {"client": client} | {form: costs(bench, client, form) for form in options.forms}
    if "latency" in options.parts:
        chosen = [(form, name) for form in options.forms for name in names if name.startswith("adaptd/")]
        results["latency"] = {
            f"{name} {form}": latency(bench, name, form, options.rate or found[form][name]["records_per_second"] / 2)
            for form, name in chosen
        }
    return results | {"stood_still": bench.stood_still}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--peers", help="a Python interpreter that has quixstreams and bytewax")
    made.add_argument("--records", type=int)
    made.add_argument("--repeats", type=int)
    made.add_argument("--seconds", type=float, help="length of a turn of the part latency")
    made.add_argument("--turns", type=int, help="turns of the part latency, each of them --seconds long")
    made.add_argument("--rate", type=float, help="records a second of the part latency, where rates are not measured")
    made.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    made.add_argument("--costs", nargs="+", choices=list(COSTS), default=list(COSTS))
    options = made.parse_args()
    options.repeats = options.repeats or (1 if options.quick else 3)
    options.turns = options.turns or (1 if options.quick else 5)
    options.seconds = options.seconds or (4.0 if options.quick else 10.0)
    if "latency" in options.parts and "rates" not in options.parts and not options.rate:
        made.error("the part latency goes by half of each rate: add the part rates, or give --rate")
    report = Report("kafka", options)
    try:
        with tempfile.TemporaryDirectory() as name, arena() as running_arena:
            results = measure(Bench(running_arena, Path(name), options))
    except BrokerMissingError as error:
        report.skip(f"no Kafka: {error}")
        return
    report.write(results)


if __name__ == "__main__":
    main()
