"""Who is in a consumer group, asked through kafka-python whichever client reads and writes.

librdkafka 2.16 aborts the process (``rd_kafka_enq_once_del_source_return``) when it is asked for the members of a group
while the group's coordinator is away for longer than some seconds, which is when this question comes up. Topics and
their settings can be asked for through it meanwhile. What `extra` holds for librdkafka does not go along.
"""

from __future__ import annotations

import re

from kafka import KafkaAdminClient, errors

from streams.kafka_client import as_stream_error, connect
from streams.kafka_settings import KafkaSettings


def members_named(settings: KafkaSettings, group: str, name: str) -> set[str]:
    """Ask a group for the ids of those who are in it under a name.

    Raises:
        StreamUnavailableError: No answer, or none yet that can be relied on.
        StreamError: We may not ask.
    """
    what = f"asking for the members of group {group}"
    admin = connect(KafkaAdminClient, settings.admin_config())
    try:
        found = admin.describe_groups([group])[group]
    except errors.KafkaError as error:
        raise as_stream_error(error, what) from error
    finally:
        admin.close()
    refused = _refusal(found["error"])
    if refused is not None:
        raise as_stream_error(refused, what)
    return {member["member_id"] for member in found["members"] if member.get("group_instance_id") == name}


def _refusal(told: str | None) -> errors.KafkaError | None:
    """The error behind the text that kafka-python makes of one; a group that is not there has no members."""
    code = re.match(r"\[Error (-?\d+)\]", told or "")
    if code is None:
        return None
    kind = errors.for_code(int(code[1]))
    return None if issubclass(kind, errors.GroupIdNotFoundError) else kind()
