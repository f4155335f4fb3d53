"""The process in which clients' grammars are compiled first: ``python -m ...grammar_worker``.

A grammar can take any time and memory to compile, and a library can crash over it. Here that ends
this process and one request; what passes is compiled again by ranks, within the same limits of the
backend. Messages are MessagePack behind four bytes of length.
"""

from __future__ import annotations

import resource
import signal
import socket
import struct

import msgspec

from sps_runtime.config.process import GrammarWorkerConfig
from sps_runtime.grammar.backends import load_vocabulary, make_backend
from sps_runtime.grammar.protocol import GrammarBackend, GrammarError
from sps_runtime.ipc.process import ChildContext, child_context
from sps_runtime.types.errors import ConfigError
from sps_runtime.types.grammar import GrammarSpec

HEADER = struct.Struct("<I")


class Prepared(msgspec.Struct, tag="prepared"):
    """What ranks are given."""

    text: str


class Rejected(msgspec.Struct, tag="rejected"):
    """Why a grammar cannot be used."""

    why: str


Verdict = Prepared | Rejected


def main() -> None:
    with child_context(GrammarWorkerConfig) as child:
        run(child)


def run(child: ChildContext[GrammarWorkerConfig]) -> None:
    """Answer grammars, one at a time, until the other side closes."""
    config = child.config
    channel = socket.socket(fileno=child.fds["grammars"])
    backend: GrammarBackend | str
    try:
        vocabulary = load_vocabulary(config.tokenizer_path, config.vocab_size, config.eos_token_ids)
        backend = make_backend(config.backend, vocabulary)
    except (GrammarError, ConfigError) as error:
        backend = str(error)
    _limit_memory(config.memory_bytes)
    _send(channel, Prepared(""))
    while (frame := _receive(channel)) is not None:
        signal.setitimer(signal.ITIMER_PROF, config.cpu_s)  # SIGPROF ends who computes longer
        _send(channel, _judge(backend, msgspec.msgpack.decode(frame, type=GrammarSpec)))


def _judge(backend: GrammarBackend | str, spec: GrammarSpec) -> Verdict:
    if isinstance(backend, str):
        return Rejected(backend)
    try:
        return Prepared(backend.prepare(spec))
    except (GrammarError, RecursionError, MemoryError) as error:
        return Rejected(str(error) or "it needs too much memory")


def _limit_memory(more: int) -> None:
    """Let this process take `more` bytes of addresses beyond what it has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _send(channel: socket.socket, message: Verdict) -> None:
    body = msgspec.msgpack.encode(message)
    channel.sendall(HEADER.pack(len(body)) + body)


def _receive(channel: socket.socket) -> bytes | None:
    header = _exactly(channel, HEADER.size)
    return None if header is None else _exactly(channel, HEADER.unpack(header)[0])


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        chunk = channel.recv(size - len(received))
        if not chunk:
            return None
        received += chunk
    return bytes(received)


if __name__ == "__main__":
    main()
