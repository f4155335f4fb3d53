"""Grammars of requests, prepared in a worker process with limits, and remembered."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections import OrderedDict

import msgspec

from sps_runtime.config.process import GrammarWorkerConfig
from sps_runtime.frontend.grammar_worker import HEADER, Prepared, Rejected, Verdict
from sps_runtime.ipc.process import Child, spawn
from sps_runtime.types.errors import EngineDead, InvalidRequest, QueueFull
from sps_runtime.types.grammar import GrammarSpec

logger = logging.getLogger(__name__)

WORKER_MODULE = "sps_runtime.frontend.grammar_worker"
MAX_GRAMMAR_CHARS = 64 << 10
MAX_WAITING = 64
CACHED_CHARS = 16 << 20
"""Text of grammars and verdicts that is remembered."""
_decoder: msgspec.msgpack.Decoder[Verdict] = msgspec.msgpack.Decoder(Verdict)


class _WorkerGone(Exception):
    """The worker did not answer: it is killed, the next grammar starts another."""


class _Worker:
    """The process and the streams to it."""

    def __init__(
        self, child: Child, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._child = child
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, config: GrammarWorkerConfig) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            fds = {"grammars": theirs.fileno()}
            child = spawn(WORKER_MODULE, config, name="grammar", fds=fds)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(child, reader, writer)

    async def answer(self) -> Verdict:
        try:
            (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            return _decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError, msgspec.MsgspecError) as error:
            raise _WorkerGone from error

    def ask(self, spec: GrammarSpec) -> None:
        body = msgspec.msgpack.encode(spec)
        self._writer.write(HEADER.pack(len(body)) + body)

    def end(self) -> int:
        """End the process if it lives; its exit status."""
        self._writer.close()
        self._child.close()
        return self._child.process.returncode


class GrammarChecker:
    """Turns what clients send into what ranks take; only the worker ever looks into a grammar.

    Args:
        config: of the worker, which is started when the first grammar comes.
        timeout_s: how long one grammar may take by the clock, its limit of computing aside.
        start_s: how long the worker may take to start.
    """

    def __init__(
        self, config: GrammarWorkerConfig, *, timeout_s: float = 30.0, start_s: float = 30.0
    ) -> None:
        self._config = config
        self._timeout_s = timeout_s
        self._start_s = start_s
        self._worker: _Worker | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._known: OrderedDict[GrammarSpec, Verdict] = OrderedDict()
        self._known_chars = 0

    async def prepare(self, spec: GrammarSpec, field: str) -> str:
        """Return the grammar as ranks are given it.

        Args:
            field: how the client calls it.

        Raises:
            InvalidRequest: the grammar is wrong, too large or takes too long.
            QueueFull: too many others wait.
            EngineDead: the worker does not start.
        """
        if len(spec.source) > MAX_GRAMMAR_CHARS:
            raise _refusal(field, f"is longer than {MAX_GRAMMAR_CHARS} characters")
        verdict = self._known.get(spec)
        if verdict is None:
            if self._waiting >= MAX_WAITING:
                raise QueueFull("too many grammars are waiting to be compiled, retry later")
            # A client that leaves must not leave half an answer in the stream.
            verdict = await asyncio.shield(asyncio.ensure_future(self._judge(spec)))
        if isinstance(verdict, Rejected):
            raise _refusal(field, f"cannot be used: {verdict.why}")
        return verdict.text

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    async def _judge(self, spec: GrammarSpec) -> Verdict:
        self._waiting += 1
        try:
            async with self._turn:
                if spec not in self._known:
                    self._remember(spec, await self._ask(spec))
                return self._known[spec]
        finally:
            self._waiting -= 1

    async def _ask(self, spec: GrammarSpec) -> Verdict:
        worker = await self._started()
        try:
            worker.ask(spec)
            async with asyncio.timeout(self._timeout_s):
                return await worker.answer()
        except TimeoutError:
            self.close()
            return Rejected(f"it takes longer than {self._timeout_s:g} s to compile")
        except (_WorkerGone, OSError):
            logger.warning("the grammar worker ended over a grammar")
            self._worker = None
            if worker.end() == -signal.SIGPROF:
                return Rejected(f"it takes longer than {self._config.cpu_s:g} s to compile")
            return Rejected("it needs too much memory, or cannot be compiled")

    async def _started(self) -> _Worker:
        if self._worker is None:
            self._worker = await _Worker.start(self._config)
            try:
                async with asyncio.timeout(self._start_s):
                    await self._worker.answer()
            except (TimeoutError, _WorkerGone):
                self.close()
                logger.error("the grammar worker does not start")
                raise EngineDead("grammars cannot be compiled now") from None
        return self._worker

    def _remember(self, spec: GrammarSpec, verdict: Verdict) -> None:
        self._known[spec] = verdict
        self._known_chars += _chars(spec, verdict)
        while self._known_chars > CACHED_CHARS:
            self._known_chars -= _chars(*self._known.popitem(last=False))


def _chars(spec: GrammarSpec, verdict: Verdict) -> int:
    told = verdict.text if isinstance(verdict, Prepared) else verdict.why
    return len(spec.source) + len(told) + 256


def _refusal(field: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {why}", field=field, code="invalid_grammar")
