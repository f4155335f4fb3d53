"""Layer fences of ranks on GPUs: the host says that KV was launched, an event that it is there."""

from __future__ import annotations

import torch

from sps_runtime.distributed.fences import LayerFence


class DeviceFence:
    """A `LayerFence` whose waits are of streams.

    A rank marks an event behind its KV write, then publishes on the host. A reader that saw the
    host's word lets its stream wait for the event as it is then: it was marked for that layer or
    for a later one, whose work stands behind.

    Args:
        host: of this rank.
        mine: this rank's event.
        theirs: by global rank.
    """

    def __init__(
        self, host: LayerFence, mine: torch.cuda.Event, theirs: dict[int, torch.cuda.Event]
    ) -> None:
        self._host, self._mine, self._theirs = host, mine, theirs

    def publish(self, epoch: int, layer: int) -> None:
        self._mine.record()
        self._host.publish(epoch, layer)

    def wait(self, global_rank: int, epoch: int, layer: int) -> float:
        waited = self._host.wait(global_rank, epoch, layer)
        torch.cuda.current_stream().wait_event(self._theirs[global_rank])
        return waited
