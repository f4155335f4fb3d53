"""See at once when the other side of a link between hosts is gone.

A dead process closes its connections; a dead host stops answering ZMTP heartbeats, which ZMQ sends
and expects in its own thread. Both end as a "disconnected" event of the socket's monitor.
"""

from __future__ import annotations

from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

HEARTBEAT_EVERY_MS = 1000
HEARTBEAT_TIMEOUT_MS = 5000
HANDSHAKE_MS = 5000
MAX_REFUSALS = 3

_OPENED = (zmq.EVENT_ACCEPTED, zmq.EVENT_CONNECTED)
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)
_WATCHED = (*_OPENED, *_FAILED, zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED)


class PeerWatch:
    """Watches one socket with one peer.

    ZMQ does not tell which connection's handshake succeeded, and strangers may knock on a bound
    socket. So the peer is gone when there was a handshake and no connection at all is left; a
    stranger who just holds one open is thrown out after `HANDSHAKE_MS`.

    Args:
        socket: not yet bound or connected.
        refusals_end: give up when the other side keeps refusing the handshake (connecting side).

    Attributes:
        monitor: readable when there is something to `check`.
    """

    def __init__(self, socket: zmq.Socket[bytes], name: str, *, refusals_end: bool) -> None:
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_EVERY_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        events = 0
        for event in _WATCHED:
            events |= event
        self.monitor: zmq.Socket[bytes] = socket.get_monitor_socket(events)
        self._socket = socket
        self._name = name
        self._refusals_end = refusals_end
        self._open: set[int] = set()
        self._met = False
        self._gone = False
        self._refusals = 0

    def check(self) -> None:
        """Take what happened so far.

        Raises:
            ConnectionError: the peer was here and is gone, or it refuses us.
        """
        while self.monitor.poll(0):
            event: dict[str, Any] = dict(recv_monitor_message(self.monitor, zmq.NOBLOCK))
            self._take(event["event"], event["value"])
        if self._gone:
            raise ConnectionError(f"the other side of {self._name} is gone")
        if self._refusals_end and self._refusals >= MAX_REFUSALS:
            raise ConnectionError(f"{self._name} refuses the handshake: is the secret the same?")

    def _take(self, event: int, value: int) -> None:
        if event in _OPENED:
            self._open.add(value)
        elif event in _FAILED:
            self._refusals += 1
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._met = True
        else:
            self._open.discard(value)
            self._gone = self._gone or (self._met and not self._open)

    def close(self) -> None:
        self._socket.disable_monitor()
        self.monitor.close(0)
