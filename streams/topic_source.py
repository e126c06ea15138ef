"""What a source of Kafka topics is, whichever client reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

from streams.base import Partition, Positions, StreamError
from streams.group_commits import GroupCommits
from streams.kafka_client import Topic
from streams.kafka_settings import KafkaSettings
from streams.seams import CLOCK

PLACING_TIMEOUT = 2.0
"""Seconds that one `poll` may take to find out where newly assigned partitions start; the next one tries again."""

GROWTH_INTERVAL = 60.0
"""Seconds between two looks for partitions that were added to a topic."""

BEGINNINGS_TIMEOUT = 2.0
"""Seconds that asking for the first offsets that are left may take."""

ENDS_INTERVAL, ENDS_TIMEOUT, ENDS_BACKOFF = 2.0, 1.0, 10.0
"""Seconds between two questions for the ends of partitions, that one may take, and until the next if it is in vain."""


class TopicSource(ABC):
    """Reads topics through one consumer.

    With ``assignment="static"`` all partitions of all topics are read, also those added later, and nobody else is
    asked; ``group`` is then only the name under which offsets are committed. With ``"group"`` the members of the
    group share the partitions by range, so that partition 3 of every topic is with the same member; therefore the
    topics must have equally many partitions.

    With ``member`` a process that was killed gets its partitions back as soon as it is there again, instead of after
    the group has missed it (45 s), and its commits can be told from those of others: where another member has worked on
    a partition since, `Assignment.assigned` is told.

    `poll` calls `Assignment`, in group mode and where a topic grows. Leaving by `close` is no revocation: whoever
    closes has finished already. Outages are the client's business: `poll` returns nothing until they end, and
    `last_error` tells about them.
    """

    _commits_kind: ClassVar[type[GroupCommits]]
    _failures: ClassVar[type[Exception]]
    """What the client raises where it refuses to commit."""

    def __init__(
        self,
        topics: Sequence[str],
        settings: KafkaSettings,
        *,
        group: str | None = None,
        assignment: Literal["static", "group"] = "static",
        member: str | None = None,
    ) -> None:
        """Prepare; nothing is connected before `open`.

        Args:
            topics: What to read.
            settings: How to reach the cluster.
            group: Where offsets are committed; none commits nothing.
            assignment: Whether to take all partitions or to share them.
            member: Name of this reader among the members of the group, the same after a restart.

        Raises:
            StreamError: ``topics`` or ``group`` make no sense.
        """
        if not topics or len(set(topics)) < len(topics):
            raise StreamError(f"topics must be named, each once; got {list(topics)}")
        if assignment == "group" and group is None:
            raise StreamError("partitions can be shared only in a group: name it in streams.kafka.group")
        self.settings = settings
        self.last_error: str | None = None
        """What the client last reported and got over by itself."""
        self.commits = self._commits_kind(settings.timeout, member or "")
        """How committing goes: failures and the last error."""
        self._topics = tuple(topics)
        self._group = group
        self._member = member
        self._shared = assignment == "group"
        self._consumer: Any = None
        self._identities: dict[str, str] = {}
        self._paused: set[str] = set()
        self._told: dict[Partition, int | None] = {}
        self._ends: Positions = {}
        self._next_ends = 0.0
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Make what the client needs beside its consumer."""

    @property
    @abstractmethod
    def trouble(self) -> str:
        """See `streams.base.Source.trouble`."""

    @abstractmethod
    def _reached(self) -> Mapping[Partition, tuple[int, int | None]]:
        """Where `poll` goes on in each partition, and its end as of its last fetch; None where there was none."""

    @abstractmethod
    def _ask_ends(self, partitions: Collection[Partition]) -> Positions:
        """Ask the cluster where partitions end, for `ENDS_TIMEOUT` seconds at most; empty if it does not tell."""

    @property
    def streams(self) -> tuple[str, ...]:
        """The topics."""
        return self._topics

    @property
    def bounded(self) -> bool:
        """Never: a topic has no end."""
        return False

    @property
    def shared(self) -> bool:
        """Whether the members of a group share the partitions."""
        return self._shared

    def ended(self) -> frozenset[Partition]:
        """No topic ever ends."""
        return frozenset()

    def commit(self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None = None) -> None:
        """Commit in the background; positions of partitions that are not ours any more are left out.

        One commit is under way at a time; what comes meanwhile goes out together with the next `poll` after it.
        One that fails is counted and tried again. Without a group this does nothing.
        """
        if self._group is not None and self._consumer is not None:
            self.commits.want(positions, floors)
            self._send_commits(self._consumer)

    def _send_commits(self, consumer: Any) -> None:
        try:
            self.commits.send(consumer)
        except self._failures as error:
            self.commits.failed(error)

    def committed(self) -> Positions:
        """The positions last committed for the partitions now assigned, as the cluster has confirmed them."""
        return dict(self.commits.stored)

    def lag(self) -> dict[Partition, int]:
        """Records between the position of `poll` and the end of each partition, if known.

        A client hears of the end with each fetch, and makes none of a partition that is paused, or of which it holds
        enough. Where more may have come, and the end has stayed the same for `ENDS_INTERVAL` seconds, it is asked for.
        """
        reached = self._reached()
        self._look_for_ends(reached)
        lags = {}
        for partition, (at, end) in reached.items():
            known = [it for it in (end, self._ends.get(partition)) if it is not None]
            if known:
                lags[partition] = max(0, max(known) - at)
        return lags

    def _look_for_ends(self, reached: Mapping[Partition, tuple[int, int | None]]) -> None:
        now = CLOCK.monotonic()
        if now < self._next_ends or self.trouble:
            return
        behind = [p for p, (at, end) in reached.items() if end is None or end > at or p[0] in self._paused]
        silent = [p for p in behind if p in self._told and self._told[p] == reached[p][1]]
        asked = self._ask_ends(silent) if silent else {}  # waits behind a fetch under way
        self._ends.update(asked)
        self._told = {p: end for p, (_, end) in reached.items()}
        self._next_ends = now + (ENDS_INTERVAL if asked or not silent else ENDS_BACKOFF)

    def identities(self) -> dict[str, str]:
        """The ids that the cluster gave the topics when they were made; known once open."""
        return dict(self._identities)

    def _opened(self) -> Any:
        if self._consumer is None:
            raise StreamError(f"the source of {', '.join(self._topics)} is not open")
        return self._consumer

    def _meet(self, described: Mapping[str, Topic]) -> None:
        """Take what the cluster says of the topics.

        Raises:
            StreamError: A group reads them together, and one has more partitions than another.
        """
        if self._shared and len({found.partitions for found in described.values()}) > 1:
            told = ", ".join(f"{topic} has {found.partitions}" for topic, found in described.items())
            raise StreamError(
                f"topics that a group reads together need equally many partitions, but {told}: add partitions to the"
                " smaller one, or read with static assignment"
            )
        self._identities = {topic: found.identity for topic, found in described.items() if found.identity}

    def _fenced(self) -> StreamError:
        return StreamError(
            f"another process reads as member {self._member} of group {self._group}: its state directory is a copy of"
            " this one. Remove the file 'member' from the copy and start it again"
        )
