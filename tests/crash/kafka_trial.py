"""A trial of the kill sweep on a real Kafka: topics of its own, lives that end when everything is committed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from kafka import KafkaAdminClient, KafkaProducer

from streams.base import Partition
from streams.kafka import KafkaSettings
from tests.broker.daemons import MISSED_SOON, Topics, committed, ends, everything, extra_of
from tests.broker.helpers import LIMIT
from tests.crash import verifier, workload
from tests.crash.verifier import Findings, truth_of
from tests.crash.workload import Workload
from tests.crash.zygote import Life, Zygote

LOOK_SECONDS = 0.1


class KafkaTrial:
    """Two partitions of events and feedback, answers in two more.

    Args:
        zygote: Starts the lives.
        directory: An empty folder.
        topics: Empty topics.
        delivery: The policy's.
        work: What to send; all of it lies in the topics before the first life.
        settings: Of the broker.
        admin: Asks for committed offsets.
    """

    def __init__(
        self,
        zygote: Zygote,
        directory: Path,
        topics: Topics,
        delivery: str,
        work: Workload,
        settings: KafkaSettings,
        admin: KafkaAdminClient,
    ) -> None:
        self.zygote, self.directory, self.topics, self.delivery = zygote, directory, topics, delivery
        self.settings, self.admin = settings, admin
        self.truth = truth_of(work)
        self.lives = self.reloads = 0
        self.reloading = False
        workload.write_kafka(directory)
        _send(settings, topics, work)
        self.ends = {p: end for p, end in ends(settings, topics.data, topics.feedback).items() if end}

    def start(self, armed: str) -> Life:
        self.lives += 1
        self.reloading = armed.startswith("reload.")
        flags = [
            *self.topics.flags(self.settings.bootstrap_servers[0], self.settings.client),
            extra_of(self.settings.client, MISSED_SOON),
            f"delivery={self.delivery}",
        ]
        arguments = [part for flag in flags for part in ("--set", flag)]
        return self.zygote.start(
            ["run", str(self.directory / "policy.yaml"), *arguments],
            {"ADAPTD_FAILPOINT": armed},
            self.directory / f"log-{self.lives}",
        )

    def wait(self, life: Life, kill_after: float | None) -> bool:
        """A life has done its work when the group has committed everything; it is asked to leave then."""
        deadline = time.monotonic() + (LIMIT if kill_after is None else kill_after)
        asked = listening = False
        while (code := life.wait(LOOK_SECONDS)) is None:
            if not asked and listening and self._done():
                life.signal(signal.SIGTERM)
                asked = True
            elif self.reloading and not asked and listening:
                self._reload(life)
            listening = "listening" in life.words  # at the next look, signals are heard as well
            if time.monotonic() >= deadline:
                assert kill_after is not None, self._stuck(life)
                life.signal(signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), f"{code}: {life.words[-3000:]}"
        return code != 0

    def _reload(self, life: Life) -> None:
        """Change a delay that changes no answer, and say so."""
        self.reloads += 1
        policy, fresh = self.directory / "policy.yaml", self.directory / "policy.new"
        fresh.write_text(workload.KAFKA.replace("max_delay: 5ms", f"max_delay: {5 + self.reloads % 2}ms"))
        fresh.replace(policy)
        life.signal(signal.SIGHUP)

    def _done(self) -> bool:
        """Whether everything is committed and applied: after a kill, what is committed is applied again in silence."""
        reached, covered = committed(self.admin, self.topics.group), self._covered()
        return all(min(reached.get(p, 0), covered.get(p, 0)) >= end for p, end in self.ends.items())

    def _covered(self) -> dict[Partition, int]:
        """The positions of the newest checkpoint."""
        for folder in sorted((self.directory / "state").glob("ckpt-*"), reverse=True):
            try:
                rows = json.loads((folder / "meta.json").read_text())["positions"]
            except OSError:
                continue  # it was deleted meanwhile
            return {(stream, number): offset for stream, number, offset in rows}
        return {}

    def _stuck(self, life: Life) -> str:
        reached = committed(self.admin, self.topics.group)
        return f"not done in {LIMIT} s: {reached} of {self.ends}: {life.words[-2000:]}"

    def _places(self) -> dict[str, str]:
        """Where each event lies, by its id; what nobody can decode has the key ``bad``."""
        lie = {}
        for record in everything(self.settings, self.topics.data):
            lie[record.key.decode()] = f"{record.topic}-{record.partition}-{record.offset}"
        return lie

    def judge(self) -> Findings:
        found = Findings()
        answers = everything(self.settings, self.topics.predictions)
        verifier.check_answers(found, self.truth, [record.value for record in answers])
        verifier.check_headers(found, self._places(), [(record.headers, record.value) for record in answers])
        letters = [record.value for record in everything(self.settings, self.topics.dead_letters)]
        verifier.check_letters(found, self.truth, letters)
        verifier.check_state(found, self.truth, self.directory / "state", self.ends)
        if self.delivery == "exactly_once":
            found.say("different", found.duplicates, f"{found.duplicates} answers came twice")
            again = len(letters) - self.truth.bad.total()
            found.say("different", again, f"{again} dead letters came twice")
        return found


def _send(settings: KafkaSettings, topics: Topics, work: Workload) -> None:
    """Send every line, keyed by its event, so that an event and its feedback share a partition's number."""
    producer = KafkaProducer(bootstrap_servers=list(settings.bootstrap_servers), acks="all")
    try:
        for topic, lines in ((topics.data, work.events), (topics.feedback, work.feedback)):
            for line in lines:
                try:
                    key = json.loads(line)["id"].encode()
                except ValueError:
                    key = b"bad"
                producer.send(topic, key=key, value=line)
        producer.flush(LIMIT)
    finally:
        producer.close()
