"""Typed links: order, bad frames, limits, asyncio."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from sps_runtime.ipc.links import AsyncReceiver, Curve, Receiver, Sender, new_context
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
