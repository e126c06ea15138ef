"""What the verifier says of answers and their headers."""

import pytest

from tests.crash.verifier import Findings, Headers, check_headers

PLACES = {"e0": "events-0-0", "e1": "events-1-0"}
FIRST, SECOND = b'{"id": "e0", "value": 1}', b'{"id": "e1", "value": 2}'


def told(name: bytes) -> Headers:
    return (("adaptd-id", name),)


def different(*more: tuple[Headers, bytes]) -> int:
    found = Findings()
    check_headers(found, PLACES, [(told(b"events-0-0"), FIRST), (told(b"events-1-0"), SECOND), *more])
    assert bool(found.problems) == bool(found.different)
    return found.different


def test_an_answer_that_comes_again_under_its_id_is_none_too_many() -> None:
    assert different() == 0
    assert different((told(b"events-0-0"), FIRST), (told(b"events-1-0"), SECOND)) == 0


@pytest.mark.parametrize(
    ("headers", "value"),
    [
        (told(b"events-0-1"), FIRST),
        (told(b"events-1-0"), FIRST),
        (told(b"events-0-0"), SECOND),
        (told(b"events-0-0"), FIRST.replace(b"1", b"3")),
        ((*told(b"events-0-0"), ("more", b"")), FIRST),
        ((*told(b"events-0-0"), *told(b"events-0-0")), FIRST),
        ((), FIRST),
    ],
    ids=["other id", "id of another", "id for two", "other bytes", "other headers", "two ids", "no id"],
)
def test_an_answer_that_readers_could_not_tell_by_its_id_is_found(headers: Headers, value: bytes) -> None:
    assert different((headers, value)) > 0
