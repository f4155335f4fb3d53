"""Recording what a GPU computes: CUDA graphs behind the interface of `ops.recording`.

All graphs share one pool of memory, since they never run at once; work is run once before it is
captured, so that libraries have what they make only once, NCCL its connections. Ranks that capture
an exchange have made it once by then, and so has a rank that replays it: they stay in step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class GraphRecording:
    """Work that was captured: `replay` computes it again over what its inputs hold then.

    Attributes:
        result: the tensor that the work returned, valid until another graph runs.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor) -> None:
        self._graph = graph
        self.result = result

    def replay(self) -> Tensor:
        """Launch it on the current stream."""
        self._graph.replay()
        return self.result


class GraphRecorder:
    """Captures on behalf of one rank.

    Args:
        device: this rank's GPU.
    """

    padded = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, GraphRecording | str]:
        """Run `work`, and capture it.

        Args:
            work: computes one tensor from inputs that were made outside of it, and asks the device
                nothing.

        Returns:
            Its result, and the recording, or why there is none.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of NCCL's look at events meanwhile: that does not concern this capture.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                captured = work()
        except (RuntimeError, ConnectionError) as reason:
            return result, f"{type(reason).__name__}: {reason}"
        return result, GraphRecording(graph, captured)
