"""Between host and device without making either wait: copies from pinned memory, and events.

On a CPU all of this is nothing: arrays become tensors over the same memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CPU = torch.device("cpu")


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device, ordered before what this thread launches next on its stream.

    The pinned memory that it leaves from belongs to torch's host allocator, which uses it again
    once the copy is done.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def empty_pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory that a device copies from or to by itself; ordinary memory for a CPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def pinned(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor of the host that a device copies from by itself; over the array's own
    memory for a CPU, where recordings of steps reuse what torch allocates meanwhile."""
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host
    return empty_pinned(tuple(host.shape), host.dtype, device).copy_(host)


class Standing:
    """An array of the host whose values go to a tensor that stays where it is.

    Attributes:
        array: to be written.
        tensor: on the device; over the same memory on a CPU.
    """

    def __init__(self, array: npt.NDArray[Any], device: torch.device) -> None:
        host = pinned(array, device)
        self._host, self.array = host, host.numpy()
        self.tensor = host if device.type == "cpu" else host.to(device)

    def upload(self) -> None:
        """Copy, in the order of the current stream; `array` stays as it is until that is done."""
        if self.tensor is not self._host:
            self.tensor.copy_(self._host, non_blocking=True)


class Fence:
    """A moment on the current stream that the host can wait for.

    Args:
        device: nothing is waited for unless it is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        """All that this thread has launched so far on its stream."""
        if self._event is not None:
            self._event.record()

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Return when what was recorded last is done; at once where nothing was."""
        if self._event is not None:
            self._event.synchronize()
