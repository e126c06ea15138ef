"""Notes beside committed offsets come back as they were, and those of others do no harm."""

import pytest

from streams.kafka_note import Note, read_note


@pytest.mark.parametrize("note", [Note(), Note("ab"), Note("ab", 0), Note("", 7), Note("ab", 2**53)])
def test_a_note_comes_back_as_it_was(note: Note) -> None:
    assert read_note(note.pack()) == note


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"member":1,"floor":2}', '{"member":"a","floor":-1}', '{"member":"a","floor":true}', "{" * 9999],
)
def test_what_somebody_else_committed_is_an_owner_that_is_not_us(text: str) -> None:
    assert read_note(text) == Note(text)


def test_nothing_committed_names_nobody() -> None:
    assert read_note(None) == read_note("") == Note()
