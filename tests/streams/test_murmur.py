"""Hashing many keys at once gives what Kafka's clients give one by one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2 as one_by_one

from streams.murmur import murmur2


def test_known_hashes() -> None:
    # those of the tests of Kafka's own clients, as unsigned numbers
    keys = [b"21", b"foobar", b"a-little-bit-long-string", b"a-little-bit-longer-string", b"abc"]
    known = [-973932308, -790332482, -985981536, -1486304829, 479470107]
    assert murmur2(keys).tolist() == [value % 2**32 for value in known]


def test_keys_go_to_the_partition_that_other_clients_choose() -> None:
    assert ((murmur2([b"21", b"foobar", b""]) & 0x7FFFFFFF) % 7).tolist() == [
        1173551340 % 7,
        1357151166 % 7,
        275646681 % 7,
    ]


@given(st.lists(st.binary(max_size=40), max_size=30))
def test_any_keys_hash_as_they_do_alone(keys: list[bytes]) -> None:
    hashes = murmur2(keys)
    assert hashes.dtype == np.uint32
    assert hashes.tolist() == [one_by_one(key) for key in keys]
