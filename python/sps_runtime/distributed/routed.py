"""Several hosts: each group of ranks takes the way that its members have."""

from __future__ import annotations

from collections.abc import Sequence

from sps_runtime.distributed.communicator import Communicator, Mailroom


class RoutedMailroom:
    """Groups on one host through its shared memory, groups across hosts through the network.

    A group across hosts takes the network for all its pairs, so that a pair's messages keep one
    order within the group; TP peers are always on one host.

    Args:
        local: of this host; it is asked only for groups within this host.
        remote: of the whole world.
        hosts: host of each global rank.
    """

    def __init__(self, local: Mailroom, remote: Mailroom, hosts: Sequence[int]) -> None:
        self._local = local
        self._remote = remote
        self._hosts = hosts

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        one_host = len({self._hosts[rank] for rank in global_ranks}) == 1
        return (self._local if one_host else self._remote).group(global_ranks)
