"""The mock cluster inside librdkafka: brokers on loopback that answer with whatever error a test asks for.

It keeps records in memory alone and knows neither transactions nor fencing, so nothing is shown with it but what a
client does when a broker answers badly, slowly or not at all. It runs on threads of librdkafka, beside Python's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.broker.node import BrokerMissingError

PRODUCE, FETCH, LIST_OFFSETS, METADATA, OFFSET_COMMIT, OFFSET_FETCH, FIND_COORDINATOR = 0, 1, 2, 3, 8, 9, 10
"""Keys of requests, as the protocol of Kafka numbers them."""

COORDINATOR_LOADING, COORDINATOR_AWAY, NOT_COORDINATOR = 14, 15, 16
UNKNOWN_TOPIC, NOT_LEADER, TOO_LARGE, TOPIC_FORBIDDEN, GROUP_FORBIDDEN = 3, 6, 10, 29, 30
"""Errors, as the protocol numbers them."""

API_VERSION = (2, 3)
"""What kafka-python has to be told of it, since the mock cluster answers questions about versions in its own way."""


def library() -> Path:
    """The librdkafka that confluent-kafka brings along."""
    found = find_spec("confluent_kafka")
    if found is None or found.origin is None:
        raise BrokerMissingError("confluent-kafka is not installed, whose librdkafka has the mock cluster")
    beside = Path(found.origin).parent
    for path in sorted([*beside.with_name("confluent_kafka.libs").glob("librdkafka-*"), *beside.glob(".dylibs/*rdk*")]):
        return path
    raise BrokerMissingError("this confluent-kafka brings no librdkafka of its own along")


class Mock:
    """Brokers 1 to ``brokers``, with topics as they are made; gone with `close`."""

    def __init__(self, brokers: int = 1) -> None:
        self._c = ctypes.CDLL(str(library()))
        self._declare()
        problem = ctypes.create_string_buffer(512)
        self._client = self._c.rd_kafka_new(0, None, problem, len(problem))
        if not self._client:
            raise BrokerMissingError(problem.value.decode())
        self._cluster = self._c.rd_kafka_mock_cluster_new(self._client, brokers)
        self.bootstrap: str = self._c.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def _declare(self) -> None:
        handle, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        shapes: dict[str, tuple[Any, list[Any]]] = {
            "new": (handle, [number, handle, text, ctypes.c_size_t]),
            "destroy": (None, [handle]),
            "mock_cluster_new": (handle, [handle, number]),
            "mock_cluster_destroy": (None, [handle]),
            "mock_cluster_bootstraps": (text, [handle]),
            "mock_topic_create": (number, [handle, text, number, number]),
            "mock_topic_set_error": (None, [handle, text, number]),
            "mock_partition_set_leader": (number, [handle, text, ctypes.c_int32, ctypes.c_int32]),
            "mock_coordinator_set": (number, [handle, text, text, ctypes.c_int32]),
            "mock_broker_set_down": (number, [handle, ctypes.c_int32]),
            "mock_broker_set_up": (number, [handle, ctypes.c_int32]),
            "mock_broker_set_rtt": (number, [handle, ctypes.c_int32, number]),
            "mock_clear_request_errors": (None, [handle, ctypes.c_int16]),
            "mock_push_request_errors_array": (
                None,
                [handle, ctypes.c_int16, ctypes.c_size_t, ctypes.POINTER(number)],
            ),
        }
        for name, (result, arguments) in shapes.items():
            function = getattr(self._c, f"rd_kafka_{name}")
            function.restype, function.argtypes = result, arguments

    def _call(self, name: str, *arguments: Any) -> None:
        failed = getattr(self._c, f"rd_kafka_mock_{name}")(self._cluster, *arguments)
        assert not failed, f"{name}{arguments} gave error {failed}"

    def topic(self, name: str, partitions: int = 1) -> str:
        """Make a topic."""
        self._call("topic_create", name.encode(), partitions, 1)
        return name

    def fail(self, request: int, errors: Sequence[int]) -> None:
        """Answer the next requests of a kind with these errors, in turn."""
        self._call("push_request_errors_array", request, len(errors), (ctypes.c_int * len(errors))(*errors))

    def heal(self, request: int) -> None:
        """Forget the errors that are left."""
        self._call("clear_request_errors", request)

    def forbid(self, topic: str, error: int) -> None:
        """Have everything about a topic answered with an error; 0 ends that."""
        self._call("topic_set_error", topic.encode(), error)

    def lead(self, topic: str, partition: int, broker: int) -> None:
        """Make a broker the leader of a partition."""
        self._call("partition_set_leader", topic.encode(), partition, broker)

    def coordinate(self, group: str, broker: int) -> None:
        """Make a broker the coordinator of a group."""
        self._call("coordinator_set", b"group", group.encode(), broker)

    def down(self, broker: int = 1) -> None:
        """Close a broker's port and connections."""
        self._call("broker_set_down", broker)

    def up(self, broker: int = 1) -> None:
        """Open them again."""
        self._call("broker_set_up", broker)

    def slow(self, seconds: float, broker: int = 1) -> None:
        """Have a broker answer so much later."""
        self._call("broker_set_rtt", broker, round(seconds * 1000))

    def close(self) -> None:
        """End all brokers."""
        self._c.rd_kafka_mock_cluster_destroy(self._cluster)
        self._c.rd_kafka_destroy(self._client)
