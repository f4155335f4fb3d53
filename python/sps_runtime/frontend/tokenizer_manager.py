"""The way into the engine and back: tokenize, send, receive, detokenize, deliver.

The server and the offline `Engine` both talk to this class alone. It runs on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec

from sps_runtime.frontend.detokenizer import TextStream
from sps_runtime.frontend.engine_calls import EngineCalls
from sps_runtime.frontend.engine_link import EngineLink
from sps_runtime.frontend.grammar_checker import GrammarChecker
from sps_runtime.frontend.health import Health
from sps_runtime.frontend.labels import LabelTable
from sps_runtime.frontend.limits import Limits
from sps_runtime.frontend.observer import NullObserver, RequestObserver
from sps_runtime.frontend.output_group import OutputGroup
from sps_runtime.frontend.prompt_encoder import PromptEncoder
from sps_runtime.frontend.query import Query
from sps_runtime.frontend.regex_program import compile_patterns
from sps_runtime.frontend.request_state import CLIENT_CLOSED, Finish, RequestState
from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.frontend.validation import Gate
from sps_runtime.types.errors import EngineDead, InvalidRequest, QueueFull
from sps_runtime.types.messages import (
    Abort,
    EngineFailed,
    EngineReady,
    EngineState,
    PrefillProgress,
    Reply,
    ToFrontend,
    TokensBatch,
    TokensOut,
)
from sps_runtime.types.request import GenerateRequest

logger = logging.getLogger(__name__)

FRESH_STATE_S = 0.25


class TokenizerManager:
    """Requests in, outputs out.

    Args:
        link: the scheduler.
        tokenizer: of the model.
        gate: makes requests; the engine's pool lowers its context length once it is ready.
        max_inflight: sequences here at once, waiting ones included; more are refused before they
            are tokenized.
        stream_interval: tokens between two outputs of a sequence.
        grammars: prepares grammars; None where this server takes none.
        health, observer, clock: for probes, metrics and tests.

    Attributes:
        calls: cache flush and engine state.
        health: the engine's state.
        ready: what the engine said when it was ready, None before.
    """

    def __init__(
        self,
        link: EngineLink,
        tokenizer: Tokenizer,
        gate: Gate,
        *,
        max_inflight: int = 1280,
        stream_interval: int = 1,
        grammars: GrammarChecker | None = None,
        health: Health | None = None,
        observer: RequestObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self.tokenizer = tokenizer
        self.gate = gate
        self._max_inflight = max_inflight
        self._interval = max(1, stream_interval)
        self.health = health or Health(clock=clock)
        self._observer: RequestObserver = observer or NullObserver()
        self._clock = clock
        self.calls = EngineCalls(link)
        self._encoder = PromptEncoder(tokenizer)
        self._grammars = grammars
        self._labels = LabelTable()
        self._running: dict[str, tuple[RequestState, OutputGroup]] = {}
        self._reserved = 0
        self.ready: EngineReady | None = None
        self._ready_event = asyncio.Event()

    @property
    def limits(self) -> Limits:
        return self.gate.limits

    @property
    def inflight(self) -> int:
        """Sequences that have not ended, those being tokenized included."""
        return len(self._running) + self._reserved

    # ------------------------------------------------------------------------ into the engine

    async def submit(self, queries: Sequence[Query], *, live: bool = True) -> OutputGroup:
        """Send all of `queries`, or none. Unless `live`, tokens may come later, together.

        Returns a group whose sequences are numbered query by query, choice by choice.

        Raises:
            InvalidRequest: naming the field; `QueueFull` when too many are waiting.
            EngineDead: the engine is gone or not there yet.
        """
        try:
            requests = await self._admit(queries)
        except InvalidRequest as error:
            self._observer.rejected(error.code or "invalid")
            raise
        except EngineDead:
            self._observer.rejected(self.health.state)
            raise
        return self._send_all(
            requests if live else [(query, _patient(request)) for query, request in requests]
        )

    async def _admit(self, queries: Sequence[Query]) -> list[tuple[Query, GenerateRequest]]:
        """Check, reserve, tokenize. A slot is reserved before the first character is tokenized."""
        self._refuse_unless_serving()
        sequences = self._count_sequences(queries)
        labels = [(query.owner, query.label) for query in queries]
        self._labels.refuse_duplicates(labels)
        for query in queries:
            self.gate.check(query)
        if self.inflight + sequences > self._max_inflight:
            raise QueueFull()
        self._reserved += sequences
        try:
            grammars = [await self._grammar(query) for query in queries]
            prompts = await self._encoder.encode(queries, self.limits)
        finally:
            self._reserved -= sequences
        self._refuse_unless_serving()
        self._labels.refuse_duplicates(labels)  # another may have come while this one tokenized
        return [
            (query, request)
            for query, tokens, grammar in zip(queries, prompts, grammars, strict=True)
            for request in self.gate.requests(query, tokens, grammar)
        ]

    async def _grammar(self, query: Query) -> str:
        """A query's grammar as ranks are given it; "" without one."""
        if query.grammar is None:
            return ""
        field = query.names.get("grammar", "grammar")
        if self._grammars is None:
            raise InvalidRequest(
                f"{field} is not supported: this server was started without grammars",
                field=field,
                code="unsupported_option",
            )
        return await self._grammars.prepare(query.grammar, field)

    def _refuse_unless_serving(self) -> None:
        if not self.health.serving:
            raise EngineDead(f"the engine is {self.health.state}")

    def _count_sequences(self, queries: Sequence[Query]) -> int:
        limits = self.limits
        field = queries[0].names.get("prompt", "prompt") if queries else "prompt"
        if not 1 <= len(queries) <= limits.max_prompts:
            raise InvalidRequest(
                f"{field} must hold 1 to {limits.max_prompts} prompts", field=field
            )
        sequences = sum(map(self.gate.choices, queries))
        if sequences > limits.max_sequences:
            raise InvalidRequest(
                f"prompts times n is {sequences}, at most {limits.max_sequences} are allowed",
                field="n",
            )
        return sequences

    async def tokenize(self, query: Query) -> Sequence[int]:
        """Return the ids of a query's prompt, without sending it."""
        return (await self._encoder.encode([query], self.limits))[0]

    def _send_all(self, requests: Sequence[tuple[Query, GenerateRequest]]) -> OutputGroup:
        states = [
            self._new_state(query, request, index)
            for index, (query, request) in enumerate(requests)
        ]
        group = OutputGroup(states, self._abort_states, self._interval)
        for (query, _), state in zip(requests, states, strict=True):
            self._running[state.rid] = (state, group)
            self._labels.add(state.rid, query.owner, query.label)
        try:
            for state in states:
                self._link.send(state.request)
                self._observer.accepted(state.prompt_tokens)
        except (ConnectionError, ValueError) as error:
            group.abort("the engine does not take requests")
            raise EngineDead("the engine does not take requests") from error
        return group

    def _new_state(self, query: Query, request: GenerateRequest, index: int) -> RequestState:
        options, sampling = query.options, request.sampling
        regexes = compile_patterns(sampling.stop_regex) if sampling.stop_regex else None
        keep_stop = bool(options.no_stop_trim)
        decoder = self.tokenizer.decoder(
            skip_special_tokens=options.skip_special_tokens is not False
        )
        return RequestState(
            request,
            index,
            query.label,
            TextStream(decoder, sampling.stop, keep_stop=keep_stop, regexes=regexes),
            keep_stop=keep_stop,
            observer=self._observer,
            clock=self._clock,
        )

    def find(self, owner: str, name: str, *, any_owner: bool = False) -> list[RequestState]:
        """Return the running sequences that `owner` calls `name`, or the one of that engine id."""
        rids = self._labels.rids(owner, name)
        if not rids and self._labels.owned(name, None if any_owner else owner):
            rids = [name]
        return [self._running[rid][0] for rid in rids]

    # ---------------------------------------------------------------------- ending it earlier

    def abort_label(self, owner: str, label: str) -> int:
        """End the running request that `owner` calls `label`; return how many sequences ended."""
        return self._abort_rids(self._labels.rids(owner, label))

    def abort_all(self, owner: str | None = None) -> int:
        """End everything, or everything of one owner; return how many sequences ended."""
        return self._abort_rids(
            list(self._running) if owner is None else self._labels.of_owner(owner)
        )

    def _abort_rids(self, rids: Iterable[str]) -> int:
        states = [self._running[rid][0] for rid in rids]
        self._abort_states(states, "aborted by request")
        return len(states)

    def _abort_states(self, states: Sequence[RequestState], why: str) -> None:
        for state in states:
            if state.rid in self._running:
                self._end_here(state, Finish("abort", None, why, CLIENT_CLOSED))

    def _end_here(self, state: RequestState, finish: Finish) -> None:
        """End a sequence on this side and tell the engine, whose last message is then ignored."""
        state.fail(finish)
        self._tell_abort(state.rid)
        self._deliver(state)

    def _tell_abort(self, rid: str) -> None:
        try:
            self._link.send(Abort(rid))
        except (ConnectionError, ValueError):
            logger.warning("an abort could not be sent")

    # --------------------------------------------------------------------- out of the engine

    async def run(self) -> str:
        """Receive until the engine fails; return why. Every waiting request is answered then."""
        while not self.health.failure:
            try:
                messages = await self._link.receive()
            except ConnectionError:
                messages = [EngineFailed("the engine closed its link")]
            self.health.beat()
            for message in messages:
                self._handle(message)
        return self.health.failure

    def _handle(self, message: ToFrontend) -> None:
        if isinstance(message, TokensBatch):
            for news in message.items:
                self._handle_tokens(news)
        elif isinstance(message, EngineState):
            self.health.beat(message)
            self.calls.answer(message)
        elif isinstance(message, Reply):
            self.calls.answer(message)
        elif isinstance(message, PrefillProgress):
            self._handle_progress(message)
        elif isinstance(message, EngineReady):
            self._handle_ready(message)
        else:
            self.fail_all(message.message)

    def _handle_progress(self, message: PrefillProgress) -> None:
        running = self._running.get(message.rid)
        if running is not None:
            state, group = running
            state.prefilled = min(message.done, state.prompt_tokens)
            group.notify_progress()

    def _handle_ready(self, message: EngineReady) -> None:
        context = min(self.limits.context_length, message.max_total_tokens)
        self.gate.limits = replace(self.limits, context_length=context)
        self.ready = message
        self.health.ready()
        self._ready_event.set()

    async def fresh_state(self) -> EngineState:
        """Return the engine's state as it is now; the last one known when it is slow to answer."""
        with suppress(TimeoutError, EngineDead):
            async with asyncio.timeout(FRESH_STATE_S):
                return await self.calls.fetch_state()
        return self.health.engine

    async def wait_ready(self) -> None:
        """Wait until requests may be sent."""
        await self._ready_event.wait()

    def _handle_tokens(self, news: TokensOut) -> None:
        running = self._running.get(news.rid)
        if running is None:
            self._observer.late_message()
            return
        state = running[0]
        try:
            state.feed(news)
        except Exception:  # this request's trouble, nobody else's
            logger.exception("output of a request could not be decoded")
            self._end_here(state, Finish("error", None, "internal error", 500))
            return
        if state.finish is None and state.overfull:
            self._end_here(state, Finish("error", None, "the client reads too slowly", 408))
            return
        if state.finish is not None and news.finish is None:  # a stop string
            self._tell_abort(state.rid)
        self._deliver(state)

    def _deliver(self, state: RequestState) -> None:
        group = self._running[state.rid][1]
        if state.finish is not None:
            del self._running[state.rid]
            self._labels.remove(state.rid)
        group.notify(state)

    def fail_all(self, why: str) -> None:
        """The engine is gone: answer everyone who waits, refuse whoever comes."""
        self.health.crash(why)
        logger.error("the engine failed: %s", why)
        for state, _ in list(self._running.values()):
            state.fail(Finish("error", None, "the engine failed", 503))
            self._deliver(state)
        self.calls.fail_all("the engine failed")

    def close(self) -> None:
        """Give threads and processes back."""
        self._encoder.close()
        if self._grammars is not None:
            self._grammars.close()


def _patient(request: GenerateRequest) -> GenerateRequest:
    """A request whose tokens may come late; not where their text decides when it ends."""
    watched = request.sampling.stop or request.sampling.stop_regex
    return request if watched else msgspec.structs.replace(request, live=False)
