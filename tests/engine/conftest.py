"""What every test of this folder gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """A command run by one test configures logs for the whole process, on a stream that ends with that test."""
    yield
    structlog.reset_defaults()
