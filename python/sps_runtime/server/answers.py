"""From an output group to answers, whole or streamed, for every route alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.requests import Request

from sps_runtime.frontend.output_group import OutputGroup
from sps_runtime.frontend.query import Query
from sps_runtime.frontend.request_state import CLIENT_CLOSED, Finish, Output, RequestState
from sps_runtime.server.error_handlers import AnswerFailed
from sps_runtime.server.service import Call
from sps_runtime.types.plan import TokenLogprobs


@dataclass(slots=True)
class Answer:
    """One sequence's output so far.

    Attributes:
        state: its figures.
        text, tokens, logprobs: everything generated.
        finish: None while it runs.
    """

    state: RequestState
    _pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def text(self) -> str:
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def add(self, output: Output) -> None:
        self._pieces.append(output.text)
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.finish = output.finish


def raise_failure(finish: Finish | None) -> None:
    """Raise `AnswerFailed` unless a sequence ended in a way that is an answer."""
    if finish is None or finish.kind in ("stop", "length"):
        return
    if finish.kind == "abort" and finish.status == CLIENT_CLOSED:
        return
    raise AnswerFailed(finish.message or "the request failed", finish.status)


@asynccontextmanager
async def aborted_with_client(request: Request, group: OutputGroup) -> AsyncIterator[None]:
    """End the group's sequences when the client goes away, or when the block is left early."""
    watcher = asyncio.create_task(_abort_on_disconnect(request, group))
    try:
        yield
    finally:
        watcher.cancel()
        group.abort()


async def _abort_on_disconnect(request: Request, group: OutputGroup) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    group.abort()


async def complete(call: Call, queries: Sequence[Query]) -> list[Answer]:
    """Run queries to their ends.

    Returns one answer per sequence, in order.

    Raises:
        InvalidRequest, EngineDead: nothing was run.
        AnswerFailed: it was, and failed.
    """
    group = await call.service.manager.submit(queries, live=False)
    answers = [Answer(state) for state in group.states]
    async with aborted_with_client(call.request, group):
        async for output in group:
            raise_failure(output.finish)
            answers[output.state.index].add(output)
    return answers


async def complete_many(call: Call, queries: Sequence[Query]) -> list[Answer]:
    """`complete` for any number of queries, as many at a time as one batch may have. Nothing is run
    when one of them is seen to be wrong before it is tokenized."""
    manager = call.service.manager
    for query in queries:
        manager.gate.check(query)
    batch, answers = manager.limits.max_prompts, list[Answer]()
    for begin in range(0, len(queries), batch):
        answers += await complete(call, queries[begin : begin + batch])
    return answers
