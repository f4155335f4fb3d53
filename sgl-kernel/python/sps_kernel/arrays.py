"""What the wrappers know of arrays: how to make one like another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# A CPU torch.Tensor, a numpy.ndarray, or any array with DLPack or the buffer protocol.
Array = Any


def is_torch(array: Array) -> bool:
    """Whether ``array`` is a torch tensor, told without importing torch."""
    return any(c.__module__.startswith("torch") for c in type(array).__mro__[:-1])


def empty_like(array: Array, shape: Sequence[int]) -> Array:
    """An uninitialised array of ``array``'s kind and dtype."""
    if is_torch(array):
        return array.new_empty(tuple(shape))
    return np.empty(tuple(shape), dtype=array.dtype)


def empty_float32(array: Array, shape: Sequence[int]) -> Array:
    """An uninitialised float32 array of ``array``'s kind."""
    if is_torch(array):
        import torch

        return array.new_empty(tuple(shape), dtype=torch.float32)
    return np.empty(tuple(shape), dtype=np.float32)
