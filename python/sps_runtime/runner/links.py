"""A rank's two links: plans in, results out, on its own host or to the scheduler's."""

from __future__ import annotations

from contextlib import suppress

import zmq

from sps_runtime.config.process import RankConfig
from sps_runtime.ipc.curve import Curve
from sps_runtime.ipc.links import Receiver, Sender
from sps_runtime.types.messages import FromRank, ToFrontend, TokensBatch, ToRank


def open_links(
    context: zmq.Context[zmq.Socket[bytes]], config: RankConfig
) -> tuple[Receiver[ToRank], Sender[FromRank]]:
    """Open both. Between hosts the rank connects, and sees when the scheduler is gone."""
    endpoints = config.endpoints
    address, keys = endpoints.ranks[config.rank], endpoints.keys
    remote = address.startswith("tcp://")
    curve = Curve.from_text(keys.public, keys.secret, keys.peer) if remote and keys else None
    plans: Receiver[ToRank] = Receiver(context, address, ToRank, bind=not remote, curve=curve)
    results: Sender[FromRank] = Sender(context, endpoints.results, curve=curve)
    return plans, results


class Inbox:
    """Messages from the scheduler, of which a running burst must know whether there are any."""

    def __init__(self, plans: Receiver[ToRank]) -> None:
        self._plans = plans

    def next(self) -> ToRank:
        """The next message; waits for it."""
        while (message := self._plans.receive()) is None:
            continue
        return message

    @property
    def descriptor(self) -> int:
        """A file descriptor that is readable from when a message comes, unless `waiting` said so
        already, until `waiting` is asked (ZMQ's own, which tells of changes)."""
        return self._plans.socket.FD

    def waiting(self) -> bool:
        """Whether a message is here."""
        return self._plans.readable


class Teller:
    """Tells this host's front end a burst's tokens. Its link is opened when it is first used."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._context = context
        self._endpoint = endpoint
        self._link: Sender[ToFrontend] | None = None

    def tell(self, news: TokensBatch) -> None:
        """Send; what cannot be sent is left to the scheduler, who says it again."""
        if self._link is None:
            self._link = Sender(self._context, self._endpoint)
        with suppress(ConnectionError, ValueError):
            self._link.send(news)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
