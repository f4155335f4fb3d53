"""Links between the ranks of one host: messages through shared memory, recordable."""

from __future__ import annotations

from collections.abc import Sequence

from sps_kernel import _core
from sps_kernel.arrays import Array


def links_region_bytes(world: int, ring_bytes: int) -> int:
    """Bytes of shared memory, zero at first, that :class:`Links` of ``world`` ranks lie in."""
    return _core.links_region_bytes(world, ring_bytes)


class Links:
    """One rank's ends of the rings of bytes between ranks, one per directed pair.

    A message longer than its ring goes in pieces. Who waits looks for ``spin_us`` microseconds and
    then sleeps on a futex that its peers wake.

    Parameters
    ----------
    memory : uint8 array or buffer
        ``links_region_bytes(world, ring_bytes)`` bytes that all ranks map; kept alive.
    rank, world : int
    ring_bytes : int
        A multiple of 64, the same on every rank.
    timeout_s : float
        How long nothing may move in one exchange.
    spin_us : float
        0 where ranks outnumber cores: a spinning rank takes the core that the awaited one needs.
    """

    def __init__(
        self,
        memory: Array,
        rank: int,
        world: int,
        *,
        ring_bytes: int = 1 << 20,
        timeout_s: float = 60.0,
        spin_us: float = 0.0,
    ) -> None:
        self._links = _core.Links(memory, rank, world, ring_bytes, timeout_s, spin_us)

    def exchange(
        self, members: Sequence[int], send: Sequence[Array], recv: Sequence[Array]
    ) -> None:
        """Give ``send[i]`` to rank ``members[i]`` and fill ``recv[i]`` with what it gave.

        Arrays are contiguous, of any dtype and perhaps empty; sizes on both sides agree, and are
        not sent. A message to oneself is copied, unless it is the same memory. Every two ranks
        make the calls that both are members of in the same order. Can be recorded.

        Raises
        ------
        ConnectionError
            Nothing moved for ``timeout_s``: a peer is gone or late.
        ValueError
            Not contiguous, or a member outside of the world.
        """
        self._links.exchange(members, send, recv)

    def take_waited(self) -> float:
        """Seconds spent waiting for peers since this was asked last."""
        return self._links.take_waited()
