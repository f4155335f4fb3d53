"""One sequence on its way: what came from the engine and has not been taken yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sps_runtime.frontend.detokenizer import TextStream
from sps_runtime.frontend.observer import RequestObserver, RequestSummary
from sps_runtime.types.attention import AttentionReport
from sps_runtime.types.messages import StopReason, TokensOut
from sps_runtime.types.plan import TokenLogprobs
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.tokens import count_ids

MAX_PENDING_CHARS = 256 << 10
MAX_PENDING_LOGPROBS = 4096
CLIENT_CLOSED = 499


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ended.

    Attributes:
        kind: ``error`` is the engine's failure, ``abort`` somebody's wish.
        matched: the stop token id or stop string for ``stop``.
        message, status: for ``abort`` and ``error``.
    """

    kind: Literal["stop", "length", "abort", "error"]
    matched: int | str | None = None
    message: str = ""
    status: int = 200


@dataclass(slots=True)
class Output:
    """News of one sequence since the last: several engine messages may be joined in one.

    Attributes:
        state: the sequence, for its figures so far.
        text, tokens, logprobs: what is new.
        finish: set in the last output alone.
    """

    state: RequestState
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish: Finish | None


@dataclass(slots=True)
class _Pending:
    text: list[str] = field(default_factory=list)
    chars: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class RequestState:
    """Figures and pending output of one sequence.

    Args:
        request: what was sent to the engine.
        index: its number in its group.
        label: what the client calls it.
        text: its text stream.
        keep_stop: show a stop token's text as well.
        observer, clock: for figures.

    Attributes:
        prefilled: prompt tokens computed so far, as far as the engine tells.
        prompt_logprobs: of positions from the wanted start, once known.
        attention: what became of its wish for sparse attention, once known.
        hidden_state: of the prompt's last token, once known where it is wanted: fp32 bytes.
        finish: set when it has ended.
    """

    def __init__(
        self,
        request: GenerateRequest,
        index: int,
        label: str,
        text: TextStream,
        *,
        keep_stop: bool,
        observer: RequestObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self.rid = request.rid
        self.index = index
        self.label = label or request.rid
        self.prompt_tokens = count_ids(request.tokens)
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.retractions = 0
        self.attention: AttentionReport | None = None
        self.prefilled = 0
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.hidden_state = b""
        self.finish: Finish | None = None
        self._text = text
        self._keep_stop = keep_stop
        self._pending = _Pending()
        self._received = 0
        self._ahead: dict[int, TokensOut] = {}
        self._observer = observer
        self._clock = clock
        self._created = self._last = clock()
        self._first_token_s: float | None = None
        self.total_s = 0.0

    @property
    def phase(self) -> str:
        """What happens to it: ``waiting`` (or in its first step), ``prefill``, ``decode``."""
        if self.completion_tokens or self.prefilled >= self.prompt_tokens:
            return "decode"
        return "prefill" if self.prefilled else "waiting"

    @property
    def pending_tokens(self) -> int:
        return len(self._pending.tokens)

    @property
    def overfull(self) -> bool:
        """Whether its reader has let more pile up than one request may hold."""
        pending = self._pending
        return pending.chars > MAX_PENDING_CHARS or len(pending.logprobs) > MAX_PENDING_LOGPROBS

    def feed(self, news: TokensOut) -> None:
        """Take what the engine says. `finish` is set when the sequence has ended by it.

        Tokens of a burst are said twice, by the rank that samples them and by the scheduler, and
        the two may overtake each other: what is known already is passed over, and what comes before
        its time is kept.
        """
        self.cached_tokens = max(self.cached_tokens, news.cached_tokens)
        self.retractions = max(self.retractions, news.retractions)
        self.prompt_logprobs = news.prompt_logprobs or self.prompt_logprobs
        self.attention = news.attention or self.attention
        self.hidden_state = news.hidden_state or self.hidden_state
        known = 0 if news.first < 0 else self._received - news.first
        if known < 0:
            self._ahead[news.first] = news
            return
        tokens, logprobs = news.tokens[known:], news.logprobs[known:]
        if not tokens and news.tokens and news.finish is None:
            return
        if tokens:
            self._received += len(tokens)
            self.prefilled = self.prompt_tokens
            self._time_tokens(len(tokens))
        stop_token = _stop_token(news)
        hidden = 0 if stop_token is None or self._keep_stop else 1
        delta = self._text.push(tokens[: len(tokens) - hidden])
        used = delta.used if delta.matched is not None else len(tokens)
        self._add(delta.text, tokens[:used], logprobs[:used])
        if delta.matched is not None:
            self._end(Finish("stop", delta.matched))
        elif news.finish is not None:
            self._add(self._text.finish(), (), ())
            self._end(_finish_of(news.finish))
        elif self._ahead and (follows := self._ahead.pop(self._received, None)) is not None:
            self.feed(follows)

    def fail(self, finish: Finish) -> None:
        """End it here, whatever the engine does."""
        if self.finish is None:
            self._end(finish)

    def take(self) -> Output:
        """Return what is pending and forget it."""
        pending, self._pending = self._pending, _Pending()
        return Output(self, "".join(pending.text), pending.tokens, pending.logprobs, self.finish)

    def _add(self, text: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        pending = self._pending
        if text:
            pending.text.append(text)
            pending.chars += len(text)
        pending.tokens.extend(tokens)
        pending.logprobs.extend(logprobs)
        self.completion_tokens += len(tokens)

    def _time_tokens(self, count: int) -> None:
        now = self._clock()
        if self._first_token_s is None:
            self._first_token_s = now - self._created
            self._observer.first_token(self._first_token_s)
        else:
            self._observer.more_tokens(count, now - self._last)
        self._last = now

    def _end(self, finish: Finish) -> None:
        self.finish = finish
        self.total_s = self._clock() - self._created
        self._observer.finished(
            RequestSummary(
                rid=self.rid,
                label=self.label,
                reason=finish.kind,
                status=finish.status,
                prompt_tokens=self.prompt_tokens,
                cached_tokens=self.cached_tokens,
                completion_tokens=self.completion_tokens,
                first_token_s=self._first_token_s,
                total_s=self.total_s,
                attention=self.attention,
            )
        )


def _stop_token(news: TokensOut) -> int | None:
    """The stop token that ends `news.tokens`, whose text is not part of the answer."""
    reason = news.finish
    if reason is None or reason.kind != "stop" or not news.tokens:
        return None
    return reason.matched if news.tokens[-1] == reason.matched else None


def _finish_of(reason: StopReason) -> Finish:
    if reason.kind == "abort":
        return Finish("abort", None, reason.message or "aborted", reason.status)
    return Finish(reason.kind, reason.matched)
