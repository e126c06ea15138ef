"""Errors that end the daemon with a sentence and an exit code instead of a stack trace."""

from __future__ import annotations

from typing import ClassVar


class AdaptdError(Exception):
    """Base of all errors a user may meet; the message says what is wrong, where, and what to do."""

    exit_code: ClassVar[int] = 70


class UsageError(AdaptdError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = 2


class UnreachableError(AdaptdError):
    """A broker did not answer within the start deadline."""

    exit_code = 69


class LockedError(AdaptdError):
    """Another process holds the state directory."""

    exit_code = 73


class StorageError(AdaptdError):
    """The state directory cannot be read or written, or holds no valid checkpoint."""

    exit_code = 74


class RestartError(AdaptdError):
    """The process cannot go on, a new one can (a lost device)."""

    exit_code = 75


class PolicyFileError(AdaptdError):
    """The policy file is wrong."""

    exit_code = 78
