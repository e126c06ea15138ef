"""MurmurHash2 as Kafka's clients use it for keys, of many keys at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SEED = 0x9747B28C
_M = np.uint32(0x5BD1E995)


def murmur2(keys: Sequence[bytes]) -> NDArray[np.uint32]:
    """Return the hash of each key.

    Source: Austin Appleby's MurmurHash2, 32 bits, with the seed of Kafka's ``org.apache.kafka.common.utils.Utils``.

    Args:
        keys: Any bytes; keys of one length are hashed together, so the fewer lengths the better.
    """
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    hashes = np.empty(len(keys), np.uint32)
    for length in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == length)
        joined = b"".join(keys if len(rows) == len(keys) else [keys[row] for row in rows.tolist()])
        hashes[rows] = _equally_long(np.frombuffer(joined, np.uint8).reshape(len(rows), length))
    return hashes


def _equally_long(data: NDArray[np.uint8]) -> NDArray[np.uint32]:
    count, length = data.shape
    whole = length // 4
    words = np.ascontiguousarray(data[:, : 4 * whole]).view("<u4").astype(np.uint32, copy=False)
    h = np.full(count, _SEED ^ length, np.uint32)
    for column in range(whole):
        k = words[:, column] * _M
        k ^= k >> np.uint32(24)
        h = h * _M ^ k * _M
    rest = data[:, 4 * whole :].astype(np.uint32)
    for column in range(length % 4):
        h ^= rest[:, column] << np.uint32(8 * column)
    if length % 4:
        h *= _M
    h ^= h >> np.uint32(13)
    h *= _M
    h ^= h >> np.uint32(15)
    return h
