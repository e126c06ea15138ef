"""Logs: one line an event on standard error, and what the client libraries say among them."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import structlog

from engine.policy import Log

REPEAT_SECONDS = 60.0
"""Time after which a library's message is written again."""

CLIENTS = ("kafka", "librdkafka")
"""Loggers of the client libraries."""


def configure_logs(settings: Log) -> None:
    """Write logs to standard error: one JSON object a line, or text for people."""
    text = settings.format == "text" or (settings.format == "auto" and sys.stderr.isatty())
    # The renderer for people shows what was raised by itself.
    renderers: list[Any] = (
        [structlog.dev.ConsoleRenderer()]
        if text
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    level = getattr(logging, settings.level.upper())
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Clients(level))
    handler.addFilter(_Seldom())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


class _Clients(logging.Filter):
    """Makes details of what the client libraries take for errors: each attempt to reach a broker that is away, say.

    What is in the way of a stream the daemon says itself, once. Failures of the libraries themselves stay as they are.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write a record."""
        if record.name.partition(".")[0] not in CLIENTS or record.levelno >= logging.CRITICAL or _is_bug(record):
            return True
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        if record.exc_info:  # a line for what a broker or a network did, no stack
            record.msg, record.args = f"{record.getMessage()} ({record.exc_info[1]!r})", ()
            record.exc_info = None
        return self._level <= logging.DEBUG


def _is_bug(record: logging.LogRecord) -> bool:
    """Whether a library raised what neither a network, nor a broker, nor its own closing brings about."""
    from kafka.errors import KafkaError

    error = record.exc_info[1] if record.exc_info else None
    return error is not None and not isinstance(error, OSError | KafkaError) and not _is_of_closed(record)


def _is_of_closed(record: logging.LogRecord) -> bool:
    """Whether a record tells of a connection of kafka-python that is closed: one just closed may be read once more."""
    from kafka.net.transport import KafkaTCPTransport

    told = record.args if isinstance(record.args, tuple) else ()
    return any(isinstance(of, KafkaTCPTransport) and of.is_closing() for of in told)


class _Seldom(logging.Filter):
    """Lets a library say the same thing once in a while only: during an outage, clients repeat it many times a second.

    The same thing is what comes from the same line of code.
    """

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write a record."""
        place = record.pathname, record.lineno
        if record.created < self._quiet_until.get(place, -math.inf):
            return False
        self._quiet_until[place] = record.created + REPEAT_SECONDS
        return True
