"""The one thing that crosses ranks: an exchange of tensors inside a group.

Every collective of the runtime (`distributed.collectives`) is built on `Communicator.exchange`, so
a new transport implements one method. Shapes are never sent: a plan is complete, and each side
computes from it what it will receive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

Kind = Literal["attention", "linear", "control"]


@dataclass
class Traffic:
    """What crossed since the last `take`, on one rank (docs/design.md, contract 5).

    Attributes:
        attention_bytes: logical bytes of attention sent, or read in place from a peer's pool.
        linear_bytes: logical bytes of linear layers sent.
        physical_bytes: bytes that were really copied.
        exposed_s: seconds spent waiting for peers.
        meters: asked by `take` for further seconds of waiting, counted outside of Python.
    """

    attention_bytes: int = 0
    linear_bytes: int = 0
    physical_bytes: int = 0
    exposed_s: float = 0.0
    meters: list[Callable[[], float]] = field(default_factory=list, compare=False, repr=False)

    def take(self) -> Traffic:
        """Return the counts and start again from zero."""
        exposed_s = self.exposed_s + sum(meter() for meter in self.meters)
        taken = Traffic(self.attention_bytes, self.linear_bytes, self.physical_bytes, exposed_s)
        self.attention_bytes = self.linear_bytes = self.physical_bytes = 0
        self.exposed_s = 0.0
        return taken


class Pending(Protocol):
    """An exchange that was begun."""

    def wait(self) -> float:
        """Return when `recv` is filled and `send` may be written again, with the seconds that this
        took. Whether they were exposed is the caller's to know, and to count.

        Raises:
            ConnectionError: when a member is gone or does not answer in time.
        """
        ...


class Communicator(Protocol):
    """A group of ranks as one of its members sees it.

    Attributes:
        rank: this member's index in the group, not its global rank.
        size: members.
        traffic: the rank's counters, shared by all its communicators.
        recordable: whether exchanges and sums are kernel calls, which a recording replays.
    """

    rank: int
    size: int
    traffic: Traffic
    recordable: bool

    def exchange(self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind) -> None:
        """Give `send[i]` to member i and fill `recv[i]` with what member i gave.

        A collective call: all members make it, in the same order. `send[i]` on one side and
        `recv[self.rank]` on side i agree in shape and dtype; tensors are contiguous and may be
        empty, and may differ in shape from one another. `send[self.rank]` is copied to
        `recv[self.rank]` unless they are the same tensor, and counts no bytes. When the call
        returns, `recv` is filled and `send` may be written again.

        Raises:
            ConnectionError: when a member is gone or does not answer in time.
        """
        ...

    def start(
        self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind, tag: int = 0
    ) -> Pending:
        """Begin an `exchange`, to compute while it is under way; `wait` ends it.

        Until then `recv` is not read, and neither is written. A transport that has nothing to hide
        (memory that is shared) does it all here.

        Args:
            tag: messages of one pair of ranks keep their order within a tag; between hosts,
                exchanges of different tags may be begun in another order by every member.

        Raises:
            ConnectionError: as `exchange`.
        """
        ...

    def sum(self, parts: Tensor) -> Tensor:
        """Sum over dim 0 of contiguous parts, one after another in fp32, in the parts' dtype: the
        same bits on every member, whatever computes it."""
        ...


class Mailroom(Protocol):
    """Makes communicators for groups of one rank's world; groups are cached."""

    def group(self, global_ranks: tuple[int, ...]) -> Communicator:
        """The communicator of `global_ranks` (ascending), this rank among them."""
        ...
