"""Which plans are still under way, and so which freed pages may still be touched."""

from __future__ import annotations

from collections.abc import Iterable


class Fence:
    """Counts acknowledgements of plans.

    A page freed when `sent` is E may be read or written by any plan up to E, so its slot is
    reused only once `watermark` has reached E: every plan up to E is acknowledged by every rank
    of its group.

    Attributes:
        sent: the last epoch sent, 0 before the first.
        watermark: every epoch up to this one is acknowledged by every rank that ran it.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.watermark = 0
        self._pending: dict[int, set[int]] = {}

    @property
    def idle(self) -> bool:
        """Whether no plan is under way."""
        return not self._pending

    def send(self, ranks: Iterable[int], steps: int = 1) -> int:
        """Open the next epoch, to be acknowledged by the global `ranks`; return it. A burst takes
        as many epochs as it has steps and is acknowledged as the first of them."""
        epoch = self.sent + 1
        self.sent += steps
        self._pending[epoch] = set(ranks)
        return epoch

    def expects(self, epoch: int, rank: int) -> bool:
        """Whether `rank` has yet to acknowledge `epoch`."""
        return rank in self._pending.get(epoch, ())

    def acknowledge(self, epoch: int, rank: int) -> bool:
        """Take one rank's acknowledgement; return whether it was the epoch's last.

        Raises:
            ValueError: when this rank owes no acknowledgement of this epoch.
        """
        pending = self._pending.get(epoch)
        if pending is None or rank not in pending:
            raise ValueError(f"rank {rank} owes no acknowledgement of epoch {epoch}")
        pending.remove(rank)
        if pending:
            return False
        del self._pending[epoch]
        while self.watermark < self.sent and self.watermark + 1 not in self._pending:
            self.watermark += 1
        return True
