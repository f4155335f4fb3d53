"""Typed links: order, bad frames, limits, asyncio."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from sps_runtime.ipc.curve import Curve, derive_keys
from sps_runtime.ipc.links import AsyncReceiver, Receiver, Sender, new_context
from sps_runtime.types.messages import Abort, GetState, ToScheduler
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = new_context()
    yield context
    context.destroy(linger=0)


def request(rid: str, length: int = 3) -> GenerateRequest:
    return GenerateRequest(
        rid=rid, tokens=pack_ids(range(length)), sampling=SamplingParams(seed=2**64 - 1)
    )


def test_messages_arrive_in_order_though_the_sender_came_first(
    context: zmq.Context, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/a.ipc"
    sender: Sender[ToScheduler] = Sender(context, endpoint)
    sent: list[ToScheduler] = [request("r", 50_000), Abort("r"), GetState(7)]
    for message in sent:
        sender.send(message)
    receiver: Receiver[ToScheduler] = Receiver(context, endpoint, ToScheduler)
    assert [receiver.receive(5.0) for _ in sent] == sent
    assert receiver.receive(0.01) is None


def test_bad_frames_are_dropped_and_counted(context: zmq.Context, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/a.ipc"
    receiver: Receiver[ToScheduler] = Receiver(context, endpoint, ToScheduler)
    raw = context.socket(zmq.PUSH)
    raw.connect(endpoint)
    good = msgspec.msgpack.encode(request("r"))
    rng = random.Random(5)
    frames = [b"", b"\xc1", good[:-1], good + b"x", msgspec.msgpack.encode({"type": "nothing"})]
    frames += [b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000]  # claimed length; deep nesting
    frames += [rng.randbytes(rng.randrange(1, 200)) for _ in range(500)]
    for frame in frames:
        raw.send(frame)
    raw.send_multipart([good, good])
    raw.send(msgspec.msgpack.encode(Abort("end")))
    assert receiver.receive(5.0) == Abort("end")
    assert receiver.dropped == len(frames) + 1


def test_a_frame_beyond_the_limit_reaches_nobody(context: zmq.Context, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/a.ipc"
    receiver: Receiver[ToScheduler] = Receiver(context, endpoint, ToScheduler, max_frame_bytes=1000)
    sender: Sender[ToScheduler] = Sender(context, endpoint, max_frame_bytes=1000)
    with pytest.raises(ValueError, match="exceeds the limit"):
        sender.send(request("big", 5000))
    careless: Sender[ToScheduler] = Sender(context, endpoint)
    careless.send(request("big", 5000))
    sender.send(Abort("small"))
    assert receiver.receive(5.0) == Abort("small")
    assert receiver.receive(0.05) is None


def test_asyncio_receiver_takes_bursts_and_single_messages(
    context: zmq.Context, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/a.ipc"

    async def scenario() -> None:
        receiver: AsyncReceiver[ToScheduler] = AsyncReceiver(context, endpoint, ToScheduler)
        sender: Sender[ToScheduler] = Sender(context, endpoint)
        got: list[ToScheduler] = []

        async def read() -> None:
            while len(got) < 3300:
                got.extend(await receiver.receive())

        reader = asyncio.create_task(read())
        for number in range(3000):
            sender.send(GetState(number))
        for number in range(3000, 3300):  # one at a time: each must wake the loop
            await asyncio.sleep(0)
            sender.send(GetState(number))
        await asyncio.wait_for(reader, 10)
        assert got == [GetState(number) for number in range(3300)]
        receiver.close()
        sender.close()

    asyncio.run(scenario())


def test_a_reader_that_never_reads_is_an_error_and_not_a_hang(context: zmq.Context) -> None:
    sender: Sender[ToScheduler] = Sender(context, "inproc://nobody", bind=True)
    with pytest.raises(ConnectionError, match="does not read"):
        sender.send(Abort("x"))


def test_tcp_without_keys_is_refused_and_with_keys_works(context: zmq.Context) -> None:
    with pytest.raises(ValueError, match="needs keys"):
        Receiver(context, "tcp://127.0.0.1:0", ToScheduler)
    server, client = zmq.curve_keypair(), zmq.curve_keypair()
    receiver: Receiver[ToScheduler] = Receiver(
        context, "tcp://127.0.0.1:*", ToScheduler, curve=Curve(*server, peer=client[0])
    )
    address = receiver.socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
    sender: Sender[ToScheduler] = Sender(context, address, curve=Curve(*client, peer=server[0]))
    sender.send(Abort("x"))
    assert receiver.receive(5.0) == Abort("x")
    stranger: Sender[ToScheduler] = Sender(
        context, address, curve=Curve(*client, peer=zmq.curve_keypair()[0])
    )
    stranger.send(Abort("forged"))
    assert receiver.receive(0.2) is None


def test_between_hosts_both_sides_see_the_other_go(context: zmq.Context) -> None:
    """And knocking strangers are no reason to think so."""
    server, client = derive_keys(b"a secret of some length")
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    sender: Sender[ToScheduler] = Sender(context, address, bind=True, curve=server)
    elsewhere = new_context()
    receiver: Receiver[ToScheduler] = Receiver(
        elsewhere, address, ToScheduler, bind=False, curve=client
    )
    send_when_connected(sender, GetState(1))
    assert receiver.receive(5.0) == GetState(1)
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03" + bytes(53)):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(greeting)
            time.sleep(0.1)
    wrong: Receiver[ToScheduler] = Receiver(
        elsewhere, address, ToScheduler, bind=False, curve=derive_keys(b"another secret")[1]
    )
    with pytest.raises(ConnectionError, match="is the secret the same"):
        wrong.receive(5.0)
    wrong.close()
    time.sleep(0.1)
    sender.check()
    sender.send(GetState(2))
    assert receiver.receive(5.0) == GetState(2)
    receiver.close()
    elsewhere.term()
    with pytest.raises(ConnectionError, match="is gone"):
        for _ in range(100):
            time.sleep(0.02)
            sender.check()


def test_a_rank_sees_the_scheduler_go_though_it_only_waits(context: zmq.Context) -> None:
    server, client = derive_keys(b"a secret of some length")
    address = f"tcp://127.0.0.1:{free_port()}"
    elsewhere = new_context()
    sender: Sender[ToScheduler] = Sender(elsewhere, address, bind=True, curve=server)
    receiver: Receiver[ToScheduler] = Receiver(
        context, address, ToScheduler, bind=False, curve=client
    )
    send_when_connected(sender, GetState(1))
    assert receiver.receive(5.0) == GetState(1)
    closing = threading.Timer(0.2, sender.close)
    closing.start()
    with pytest.raises(ConnectionError, match="is gone"):
        receiver.receive(5.0)
    closing.join()
    elsewhere.term()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def send_when_connected(sender: Sender[ToScheduler], message: ToScheduler) -> None:
    for _ in range(250):
        try:
            sender.send(message)
            return
        except ConnectionError:
            time.sleep(0.02)
    raise AssertionError("nobody connects")


def test_the_io_thread_runs_where_it_is_told() -> None:
    core = max(os.sched_getaffinity(0))
    context = new_context([core])
    before = set(os.listdir("/proc/self/task"))
    socket = context.socket(zmq.PULL)  # threads start with the first socket, and then bind
    try:
        deadline = time.monotonic() + 5.0
        bound: list[set[int]] = []
        while {core} not in bound and time.monotonic() < deadline:
            fresh = set(os.listdir("/proc/self/task")) - before
            bound = [os.sched_getaffinity(int(task)) for task in fresh]
        assert {core} in bound
    finally:
        socket.close()
        context.term()
