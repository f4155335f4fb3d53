"""Packed integer vectors: how token ids and page ids travel inside messages.

A 100,000-token prompt as a msgpack list costs milliseconds to encode and to decode; as raw
little-endian int32 it is a memory copy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

if array("i").itemsize != 4 or sys.byteorder != "little":  # pragma: no cover
    raise ImportError("sps_runtime needs a little-endian machine with 4-byte C ints")


def pack_ids(ids: Iterable[int]) -> bytes:
    """Return `ids` as little-endian int32 bytes. Raises OverflowError beyond 31 bits."""
    return (ids if isinstance(ids, array) else array("i", ids)).tobytes()


def unpack_ids(packed: bytes) -> array[int]:
    """Return the ids of `pack_ids` as an ``array('i')``. Raises ValueError on a ragged length."""
    ids = array("i")
    ids.frombytes(packed)
    return ids


def count_ids(packed: bytes) -> int:
    """Return how many ids `packed` holds."""
    return len(packed) // 4
