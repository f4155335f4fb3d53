"""Recording what kernels compute, to replay it: torch is watched while a `sps_kernel.Program`
records, since what torch computes would be missing from the replay.

The idea is CUDA graphs': work of a fixed shape is run once through ordinary code while its kernel
calls are noted, and again without that code. As there, the memory of intermediate results comes
from a pool of the recording's own, and all recordings share the pool: they never run at once.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK_BYTES = 1 << 20
_ALIGN = 64
_aten: Any = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format,
    _aten.new_empty.default,
    _aten.empty_like.default,
}
_NOTHING_COMPUTED = {_aten._unsafe_view.default, _aten.detach.default}


class Workspace:
    """Memory for intermediate results of recordings, used again as soon as a result is dropped.

    A tensor's memory is known to be free when its storage lets go of the NumPy array under it.
    """

    def __init__(self) -> None:
        self.blocks: list[npt.NDArray[np.uint8]] = []
        self._recording = 0
        self._block, self._used = 0, 0
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

    @property
    def nbytes(self) -> int:
        return sum(len(block) for block in self.blocks)

    def begin(self) -> None:
        """Forget what earlier recordings used: their results are not read any more."""
        self._recording += 1
        self._block, self._used = 0, 0
        self._free.clear()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        nbytes = shape.numel() * dtype.itemsize
        size = max(_ALIGN, -(-nbytes // _ALIGN) * _ALIGN)
        free = self._free[size]
        memory = free.pop() if free else self._cut(size)
        held = memory[:]  # a fresh view, which lives as long as the tensor's storage
        weakref.finalize(held, self._release, self._recording, memory)
        return torch.from_numpy(held)[:nbytes].view(dtype).view(shape)

    def _cut(self, size: int) -> npt.NDArray[np.uint8]:
        while self._block < len(self.blocks):
            if self._used + size <= len(self.blocks[self._block]):
                begin, self._used = self._used, self._used + size
                return self.blocks[self._block][begin : self._used]
            self._block, self._used = self._block + 1, 0
        room = np.empty(max(BLOCK_BYTES, size) + _ALIGN, dtype=np.uint8)
        skip = -room.ctypes.data % _ALIGN
        self.blocks.append(room[skip : len(room) - _ALIGN + skip])
        return self._cut(size)

    def _release(self, recording: int, memory: npt.NDArray[np.uint8]) -> None:
        if recording == self._recording:
            self._free[len(memory)].append(memory)


class _Watch(TorchDispatchMode):
    """Lets views through, gives fresh tensors from a workspace, and notes the first operator that
    computes; everything runs as always."""

    def __init__(self, workspace: Workspace, program: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._workspace = workspace
        self._program = program
        self._blocks = 0
        self.computed: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's hook: nothing here is compiled, and telling the compiler to skip this would
        import it, which takes a second of every start."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            return self._empty(out)
        if self.computed is None and func not in _NOTHING_COMPUTED and not _is_view(func):
            self.computed = str(func)
        return out

    def _empty(self, like: Tensor) -> Tensor:
        out = self._workspace.empty(like.shape, like.dtype)
        for block in self._workspace.blocks[self._blocks :]:
            self._program.add_workspace(block)
        self._blocks = len(self._workspace.blocks)
        return out


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )


class Replayable(Protocol):
    """Work that was recorded (`Recording`, `ops.cuda_graphs`)."""

    def replay(self) -> Tensor:
        """Compute it again over what its inputs hold now."""
        ...


class StepRecorder(Protocol):
    """Records on behalf of one rank: `Recorder` on CPUs, `ops.cuda_graphs` on GPUs.

    Attributes:
        padded: steps had better be padded to few shapes.
    """

    padded: bool

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Replayable | str]:
        """Run `work`; return its result, and the recording or why there is none."""
        ...


class Recording:
    """Work that was recorded: `replay` computes it again over what its inputs hold then.

    Attributes:
        result: the tensor that the work returned, valid until another recording of the same
            `Recorder` is made or replayed.
    """

    def __init__(self, program: Any, result: Tensor, kernels: ModuleType) -> None:
        self._program = program
        self._kernels = kernels
        self.result = result

    def __len__(self) -> int:
        return len(self._program)

    @property
    def names(self) -> list[str]:
        """What each call computes."""
        return list(self._program.names)

    def replay(self, clock_ns: Tensor | None = None) -> Tensor:
        """Run it natively, with the GIL released.

        Args:
            clock_ns: int64 ``[len + 1]`` for the monotonic clock before, between and after calls.

        Raises:
            ConnectionError: from an exchange, as when it was recorded.
            ValueError: an index among the inputs is out of its bounds.
        """
        if clock_ns is None:
            self._program.run()
        else:
            self._program.run(clock_ns)
        return self.result

    def loop(self, *arguments: Any, **options: Any) -> Any:
        """It run again and again natively, its result being the logits of a step, each from what
        the step before sampled (`sps_kernel.StepLoop`, whose other arguments these are)."""
        return self._kernels.StepLoop(self._program, self.result, *arguments, **options)


class Recorder:
    """Records on behalf of one rank.

    Args:
        kernels: the package (`ops.dispatch`).
    """

    padded = False

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels
        self.workspace = Workspace()

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Recording | str]:
        """Run `work`, and keep it if all that it computed went through the kernels.

        Args:
            work: computes one contiguous tensor from inputs that were made outside of it.

        Returns:
            Its result, and the recording, or why there is none.
        """
        self.workspace.begin()
        program = self._kernels.Program()
        watch = _Watch(self.workspace, program)
        result: Tensor | None = None
        try:
            with program.recording():
                with watch:
                    result = work()
                if watch.computed is not None:
                    raise RuntimeError(f"{watch.computed} was computed by torch")
        except RuntimeError as reason:
            if result is None:
                raise
            return result, str(reason)
        return result, Recording(program, self._alias(result), self._kernels)

    def _alias(self, result: Tensor) -> Tensor:
        """The same memory, without a claim on it: it is free for the next recording."""
        address, nbytes = result.data_ptr(), result.nbytes
        for block in self.workspace.blocks:
            begin = address - block.ctypes.data
            if 0 <= begin < len(block):
                flat = torch.from_numpy(block[begin : begin + nbytes])
                return flat.view(result.dtype).view(result.shape)
        return result
