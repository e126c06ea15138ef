import sys
from collections.abc import Iterator

import pytest

from engine.turns import SECONDS, long_turns


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def test_turns_are_long_inside_and_as_before_outside() -> None:
    sys.setswitchinterval(0.005)
    with long_turns():
        assert sys.getswitchinterval() == pytest.approx(SECONDS)
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_longer_ones_are_kept() -> None:
    sys.setswitchinterval(0.5)
    with long_turns():
        assert sys.getswitchinterval() == pytest.approx(0.5)
