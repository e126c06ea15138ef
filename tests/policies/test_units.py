from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from policies.interfaces import MethodParams
from policies.units import Duration, PositiveDuration, Size


class Wait(MethodParams):
    delay: Duration = 1.0
    cap: Size = 0


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("20ms", 0.02), ("250us", 0.00025), ("1h", 3600.0), ("24h", 86400.0), ("7d", 604800.0), ("1.5 m", 90.0), (3, 3.0)],
)
def test_a_duration_reads_as_seconds(written: object, seconds: float) -> None:
    assert TypeAdapter(Duration).validate_python(written) == pytest.approx(seconds, rel=1e-15)


@pytest.mark.parametrize(
    ("written", "count"), [("256MB", 256_000_000), ("64MiB", 67_108_864), ("1.5kB", 1500), (12, 12), (12.0, 12)]
)
def test_a_size_reads_as_bytes(written: object, count: int) -> None:
    assert TypeAdapter(Size).validate_python(written) == count


@pytest.mark.parametrize("written", ["5 parsecs", "h", "-1s", -1, True, None, float("nan"), float("inf"), "1h30", ""])
def test_what_is_no_duration_is_refused_with_an_example(written: object) -> None:
    with pytest.raises(ValidationError, match="such as 20ms or 24h"):
        Wait.model_validate({"delay": written})


@pytest.mark.parametrize("written", ["3 bytes", "1.5", 1.5, True, -3, "MB"])
def test_what_is_no_size_is_refused_with_an_example(written: object) -> None:
    with pytest.raises(ValidationError, match="such as 256MB or 64MiB"):
        Wait.model_validate({"cap": written})


def test_a_positive_duration_refuses_zero() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        TypeAdapter(PositiveDuration).validate_python("0s")


def test_editors_are_told_both_ways_of_writing() -> None:
    kinds = [one["type"] for one in Wait.model_json_schema()["properties"]["delay"]["anyOf"]]
    assert kinds == ["number", "string"]
