"""Hidden states as clients want them: of length one or as they are, as numbers or as base64."""

from __future__ import annotations

import base64
import math
from array import array

from sps_runtime.types.errors import EngineDead


def vector_of(hidden_state: bytes, *, normalize: bool) -> array[float]:
    """The vector of an answer.

    Args:
        hidden_state: little-endian fp32.
        normalize: divide by the Euclidean length, as SGLang and OpenAI do.

    Raises:
        EngineDead: the engine answered without one.
    """
    values = array("f", hidden_state)
    if not values:
        raise EngineDead("the engine gave no hidden state")
    length = math.hypot(*values) if normalize else 1.0
    return array("f", [value / length for value in values]) if length not in (0.0, 1.0) else values


def as_base64(vector: array[float]) -> str:
    """The vector's little-endian fp32 bytes."""
    return base64.b64encode(vector.tobytes()).decode()
