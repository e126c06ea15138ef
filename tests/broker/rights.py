"""A user who may do only what a test grants, and how a daemon that may not says so."""

from __future__ import annotations

from kafka import KafkaAdminClient
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourceType,
)

from tests.broker.daemons import Process, Topics
from tests.broker.node import GUEST


def refused(life: Process, code: int, *told: str) -> None:
    """It ends with an exit code and a sentence, not with a stack trace."""
    assert life.wait() == code, life.words
    last = life.words.strip().splitlines()[-1]
    assert last.startswith("adaptd: "), life.words
    assert all(part in last for part in told), last
    assert "Traceback" not in life.words


class Rights:
    """What the guest may do."""

    def __init__(self, admin: KafkaAdminClient, topics: Topics) -> None:
        self._admin = admin
        topic, group = ResourceType.TOPIC, ResourceType.GROUP
        self.acls = {
            "data": self._acl(topic, topics.data, ACLOperation.READ),
            "feedback": self._acl(topic, topics.feedback, ACLOperation.READ),
            "predictions": self._acl(topic, topics.predictions, ACLOperation.WRITE),
            "dead_letters": self._acl(topic, topics.dead_letters, ACLOperation.WRITE),
            "group": self._acl(group, topics.group, ACLOperation.READ),
        }
        self.transactions = [
            self._acl(ResourceType.TRANSACTIONAL_ID, f"{topics.group}-", operation, ACLResourcePatternType.PREFIXED)
            for operation in (ACLOperation.WRITE, ACLOperation.DESCRIBE)
        ]

    def _acl(
        self,
        kind: ResourceType,
        name: str,
        operation: ACLOperation,
        pattern: ACLResourcePatternType = ACLResourcePatternType.LITERAL,
    ) -> ACL:
        return ACL(f"User:{GUEST}", "*", operation, ACLPermissionType.ALLOW, ResourcePattern(kind, name, pattern))

    def grant(self, *names: str) -> None:
        assert not self._admin.create_acls([self.acls[name] for name in names])["failed"]

    def withdraw(self, name: str) -> None:
        acl = self.acls[name]
        pattern = acl.resource_pattern
        found = ACLFilter(acl.principal, acl.host, acl.operation, acl.permission_type, pattern)
        self._admin.delete_acls([found])

    def grant_transactions(self) -> None:
        """What `exactly_once` needs beside the others."""
        assert not self._admin.create_acls(self.transactions)["failed"]
