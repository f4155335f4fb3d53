"""Typed one-way links between processes: ZMQ PUSH/PULL carrying msgpack of msgspec unions.

The receiving side binds and the sending side connects, so a sender can start first: its messages
wait in its queue. Tensors never travel here. Nothing is ever unpickled; a frame that is too long or
does not decode to the link's union is dropped and counted (FAULTS: one bad frame must not end a
loop, and no allocation follows a claimed length).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from sps_runtime.ipc.curve import Curve
from sps_runtime.ipc.peer_watch import PeerWatch

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 << 20
"""A million-token prompt is 4 MB; nothing honest comes near this."""
MAX_QUEUED_FRAMES = 100_000
COPY_BELOW_BYTES = 1 << 16


def _open(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    endpoint: str,
    *,
    bind: bool,
    curve: Curve | None,
    max_frame_bytes: int,
    watch_peer: bool = False,
) -> tuple[zmq.Socket[bytes], PeerWatch | None]:
    """Open one socket. TCP without keys is refused: plain links exist on one host only."""
    if not endpoint.startswith(("ipc://", "inproc://")) and curve is None:
        raise ValueError(f"a link beyond this host needs keys: {endpoint}")
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_FRAMES)
    socket.setsockopt(zmq.RCVHWM, MAX_QUEUED_FRAMES)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.setsockopt(zmq.RECONNECT_IVL, 10)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    if curve is not None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
        if bind:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
        else:
            socket.setsockopt(zmq.CURVE_SERVERKEY, curve.peer)
        if "[" in endpoint:
            socket.setsockopt(zmq.IPV6, 1)
    watch = PeerWatch(socket, endpoint, refusals_end=not bind) if watch_peer else None
    try:
        if bind:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket, watch


_encoder = msgspec.msgpack.Encoder()


def encode(message: Any) -> bytes:
    """The frame of a message, to be sent to several receivers by `Sender.send_encoded`."""
    return _encoder.encode(message)


class Sender(Generic[T]):
    """The sending end of a link; usable from asyncio too, because it never blocks.

    Args:
        context: the process's ZMQ context.
        endpoint: ``ipc://...``, or ``tcp://...`` with `curve`.
        bind: let the sender be the side that binds (links to other hosts). It has one peer then.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        bind: bool = False,
        curve: Curve | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self.endpoint = endpoint
        self._max = max_frame_bytes
        self._socket, self._watch = _open(
            context,
            zmq.PUSH,
            endpoint,
            bind=bind,
            curve=curve,
            max_frame_bytes=max_frame_bytes,
            watch_peer=bind and curve is not None,
        )

    def send(self, message: T) -> None:
        """Queue one message.

        Raises:
            ValueError: when it encodes to more than the frame limit; nothing is sent.
            ConnectionError: when the other side has not read for `MAX_QUEUED_FRAMES` messages, or
                (binding senders) nobody is connected.
        """
        self.send_encoded(encode(message))

    def send_encoded(self, frame: bytes) -> None:
        """`send` of what `encode` returned."""
        if len(frame) > self._max:
            raise ValueError(f"message of {len(frame)} bytes exceeds the limit of {self._max}")
        try:
            self._socket.send(frame, zmq.NOBLOCK, copy=len(frame) < COPY_BELOW_BYTES)
        except zmq.Again:
            raise ConnectionError(f"the reader of {self.endpoint} does not read") from None

    def check(self) -> None:
        """Raise ConnectionError when the peer of a link between hosts is gone."""
        if self._watch is not None:
            self._watch.check()

    def close(self, linger_ms: int = 0) -> None:
        """Close; wait up to `linger_ms` (in the background) for queued messages to leave."""
        if self._watch is not None:
            self._watch.close()
        self._socket.close(linger_ms)


class _FrameReader(Generic[T]):
    """What both receivers share: take frames without blocking, decode, drop what is bad."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        union: Any,
        *,
        bind: bool = True,
        curve: Curve | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self.endpoint = endpoint
        self.dropped = 0
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._max = max_frame_bytes
        self.socket, self._watch = _open(
            context,
            zmq.PULL,
            endpoint,
            bind=bind,
            curve=curve,
            max_frame_bytes=max_frame_bytes,
            watch_peer=not bind and curve is not None,
        )

    def take(self, limit: int = 1024) -> list[T]:
        """Return the messages that are here already, at most `limit`, without waiting."""
        messages: list[T] = []
        for _ in range(limit):
            if not self.readable:
                break
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) == 1 and len(parts[0]) <= self._max:
                self._decode_into(messages, parts[0])
            else:
                self._drop("has several parts or is too long")
        return messages

    @property
    def readable(self) -> bool:
        """Whether a frame is here. This costs less than to look for one in vain."""
        events: int = self.socket.get(zmq.EVENTS)  # type: ignore[assignment]
        return bool(events & zmq.POLLIN)

    def _decode_into(self, messages: list[T], frame: bytes) -> None:
        try:
            messages.append(self._decoder.decode(frame))
        except Exception as error:  # whatever a hostile frame provokes ends here
            self._drop(type(error).__name__)

    def _drop(self, why: str) -> None:
        self.dropped += 1
        if self.dropped.bit_count() == 1:  # 1, 2, 4, 8...: a flood must not fill the log
            logger.warning("dropped frame %d on %s: %s", self.dropped, self.endpoint, why)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self.socket.close()


class Receiver(_FrameReader[T]):
    """The receiving end of a link for a blocking loop.

    Args:
        context: the process's ZMQ context.
        endpoint: where to bind (or connect, with ``bind=False``).
        union: the union of message types, such as `types.messages.ToScheduler`.

    Attributes:
        dropped: frames thrown away so far.
        socket: the ZMQ socket, for a `zmq.Poller` over several links.
    """

    def receive(self, timeout_s: float | None = None) -> T | None:
        """Return the next message, or None when none came within `timeout_s` (None: for ever).

        Raises:
            ConnectionError: the other side of a link between hosts is gone.
        """
        timeout_ms = None if timeout_s is None else int(timeout_s * 1000)
        while True:
            if messages := self.take(1):
                return messages[0]
            if not self._wait(timeout_ms):
                return None

    def _wait(self, timeout_ms: int | None) -> bool:
        """Wait for a frame; whether there may be one."""
        if self._watch is None:
            return bool(self.socket.poll(timeout_ms))
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self._watch.monitor, zmq.POLLIN)
        ready = dict(poller.poll(timeout_ms))
        if ready and self.socket not in ready:
            self._watch.check()
        return bool(ready)


class AsyncReceiver(_FrameReader[T]):
    """The receiving end of a link for an asyncio loop; one task reads it.

    Uses the socket's file descriptor directly: a wake-up takes everything that is there, without
    one future per message. The loop goes on watching it between two calls; that is readable with
    every change of the socket, until `take` has seen it.
    """

    _waiter: asyncio.Future[list[T]] | None = None
    _watched = False

    async def receive(self) -> list[T]:
        """Wait for messages and return all that are here, at least one, in order."""
        if messages := self.take():
            return messages
        loop = asyncio.get_running_loop()
        if not self._watched:
            loop.add_reader(self.socket.fileno(), self._readable, loop)
            self._watched = True
        self._waiter = loop.create_future()
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def _readable(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._waiter is None or self._waiter.done():
            self._unwatch(loop)  # nobody waits: the next `receive` takes what is here
        elif messages := self.take():
            self._waiter.set_result(messages)

    def _unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._watched:
            loop.remove_reader(self.socket.fileno())
            self._watched = False

    def close(self) -> None:
        if self._watched:
            with suppress(RuntimeError):  # the loop has ended
                self._unwatch(asyncio.get_running_loop())
        super().close()


def new_context(cores: Iterable[int] = ()) -> zmq.Context[zmq.Socket[bytes]]:
    """The ZMQ context of a process; one I/O thread.

    Args:
        cores: logical CPUs that the thread may use; where the process may unless told. A rank is
            bound to its core, and its messages had better not take that from it.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    for core in cores:
        context.set(zmq.THREAD_AFFINITY_CPU_ADD, core)
    return context
