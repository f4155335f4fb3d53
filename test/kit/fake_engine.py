"""An engine in memory, for tests of what lies before the scheduler.

It speaks `types.messages` and nothing else. The answer to a prompt is the prompt again, from its
first token, over and over; so whoever asked can tell whether the answer is his.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sps_runtime.types.messages import (
    Abort,
    EngineFailed,
    EngineReady,
    EngineState,
    FlushCache,
    GetState,
    RankState,
    Record,
    Reply,
    StopReason,
    ToFrontend,
    TokensBatch,
    TokensOut,
    ToScheduler,
)
from sps_runtime.types.plan import TokenLogprobs
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.tokens import unpack_ids

Answer = Callable[[GenerateRequest], Sequence[int]]


def echo(request: GenerateRequest) -> list[int]:
    """The prompt, over and over, up to max_new_tokens."""
    prompt = list(unpack_ids(request.tokens))
    count = request.sampling.max_new_tokens
    return (prompt * (count // len(prompt) + 1))[:count]


def hidden_state(request: GenerateRequest) -> bytes:
    """Four numbers that tell a prompt from others: its length, first and last id, and one."""
    prompt = unpack_ids(request.tokens)
    return array("f", [len(prompt), prompt[0], prompt[-1], 1.0]).tobytes()


@dataclass
class _Run:
    request: GenerateRequest
    answer: list[int]
    sent: int = 0


class FakeEngine:
    """Both ends of an `EngineLink`; `step` makes every running request one turn older.

    Args:
        answer: what a request is answered with.
        per_step: tokens of a request in one turn.
        delay_s: seconds between turns.
        eos: ids that end an answer.
        max_total_tokens: said to be the pool's size.
    """

    def __init__(
        self,
        answer: Answer = echo,
        *,
        per_step: int = 1,
        delay_s: float = 0.0,
        eos: Sequence[int] = (),
        max_total_tokens: int = 1 << 20,
        ready: bool = True,
    ) -> None:
        self._answer = answer
        self._per_step = per_step
        self.delay_s = delay_s
        self._eos = set(eos)
        self._outbox: asyncio.Queue[ToFrontend] = asyncio.Queue()
        self.running: dict[str, _Run] = {}
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.recorded: list[bool] = []
        self.has_timeline = True
        self.max_total_tokens = max_total_tokens
        self.held = False
        self.said_ready = False
        if ready:
            self.become_ready()

    def become_ready(self) -> None:
        self.said_ready = True
        self._outbox.put_nowait(EngineReady(self.max_total_tokens, 64))

    def fail(self, why: str = "rank 0 died") -> None:
        self._outbox.put_nowait(EngineFailed(why))

    # the link's two calls

    def send(self, message: ToScheduler) -> None:
        if isinstance(message, GenerateRequest):
            self.requests.append(message)
            self.running[message.rid] = _Run(message, list(self._answer(message)))
        elif isinstance(message, Abort):
            self.aborted.append(message.rid)
            if self.running.pop(message.rid, None):
                end = TokensOut(message.rid, finish=StopReason("abort"))
                self._outbox.put_nowait(TokensBatch((end,)))
        elif isinstance(message, FlushCache):
            self._outbox.put_nowait(Reply(message.call, ok=not self.running))
        elif isinstance(message, Record):
            self.recorded.append(message.on)
            self._outbox.put_nowait(Reply(message.call, ok=self.has_timeline, detail="no timeline"))
        elif isinstance(message, GetState):
            self._outbox.put_nowait(self.state(message.call))

    async def receive(self) -> list[ToFrontend]:
        messages = [await self._outbox.get()]
        while not self._outbox.empty():
            messages.append(self._outbox.get_nowait())
        return messages

    # the engine's life

    def state(self, call: int = 0) -> EngineState:
        ranks = (RankState(90, 6, 4, 100), RankState(95, 5, 0, 100))
        return EngineState(
            call, len(self.running), 0, self.max_total_tokens, 640, ranks, sent_bytes_total=12345
        )

    def put(self, message: ToFrontend) -> None:
        """Say something of one's own."""
        self._outbox.put_nowait(message)

    def step(self) -> None:
        """One turn: some tokens for everyone who runs."""
        news = [self._turn(run) for run in list(self.running.values())]
        if news:
            self._outbox.put_nowait(TokensBatch(tuple(news)))

    def _turn(self, run: _Run) -> TokensOut:
        new = run.answer[run.sent : run.sent + self._per_step]
        sampling = run.request.sampling
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._eos)
        finish = None
        for i, token in enumerate(new):
            if token in stops and run.sent + i + 1 > sampling.min_new_tokens:
                new, finish = new[: i + 1], StopReason("stop", token)
                break
        first = run.sent == 0
        run.sent += len(new)
        if finish is None and run.sent >= len(run.answer):
            finish = StopReason("length")
        if finish is not None:
            del self.running[run.request.rid]
        return TokensOut(
            run.request.rid,
            tuple(new),
            finish,
            logprobs=tuple(self._judge(run.request, token) for token in new),
            prompt_logprobs=self._prompt_logprobs(run.request) if first else (),
            prompt_tokens=len(run.request.tokens) // 4,
            cached_tokens=0,
            hidden_state=hidden_state(run.request) if finish and run.request.hidden_state else b"",
        )

    def _judge(self, request: GenerateRequest, token: int) -> TokenLogprobs:
        wanted = request.logprobs
        if wanted is None:
            return TokenLogprobs(token, None)
        top = tuple(((token + i) % 256, -0.5 - i) for i in range(wanted.top))
        return TokenLogprobs(token, -0.5, top, tuple((i, -float(i)) for i in wanted.token_ids))

    def _prompt_logprobs(self, request: GenerateRequest) -> tuple[TokenLogprobs, ...]:
        wanted = request.logprobs
        if wanted is None or wanted.prompt_start < 0:
            return ()
        prompt = unpack_ids(request.tokens)
        start = max(wanted.prompt_start, 1)
        return tuple(self._judge(request, token) for token in prompt[start:])

    async def live(self) -> None:
        """Run until cancelled, beating about once a second as the scheduler does."""
        loop = asyncio.get_running_loop()
        next_beat = loop.time()
        while True:
            if not self.held:
                self.step()
            if loop.time() >= next_beat:
                self._outbox.put_nowait(self.state())
                next_beat = loop.time() + 1.0
            await asyncio.sleep(self.delay_s if self.running else 0.001)
