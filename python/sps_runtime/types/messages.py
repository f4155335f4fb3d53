"""The messages between processes. Each link carries one tagged union, encoded as msgpack.

frontend  -> scheduler : ToScheduler
scheduler -> frontend  : ToFrontend
scheduler -> rank      : ToRank
rank      -> scheduler : FromRank
rank      -> frontend  : TokensBatch, of bursts
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sps_runtime.types.attention import AttentionReport
from sps_runtime.types.plan import StepPlan, StepResult, TokenLogprobs
from sps_runtime.types.request import GenerateRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End a request now. Unknown or finished ids are ignored (aborts race with ends)."""

    rid: str


class FlushCache(msgspec.Struct, frozen=True, tag="flush"):
    """Drop every cached page; answered by `Reply`, `ok` false while requests run or wait."""

    call: int


class GetState(msgspec.Struct, frozen=True, tag="state"):
    """Ask for a fresh `EngineState`."""

    call: int


class Record(msgspec.Struct, frozen=True, tag="record"):
    """Go on with the timeline, or pause it; answered by `Reply`, `ok` false where there is none."""

    call: int
    on: bool


class EndBurst(msgspec.Struct, frozen=True, tag="end_burst"):
    """End the burst that runs, if one does, after its current step."""


class StopEngine(msgspec.Struct, frozen=True, tag="stop"):
    """End the process in good order."""


class StopReason(msgspec.Struct, frozen=True):
    """Why a request ended.

    Attributes:
        kind: ``stop`` (a stop token), ``length`` (max_new_tokens or no room left), ``abort``.
        matched: the stop token id for ``stop``.
        message, status: for ``abort``: what to tell the client.
    """

    kind: Literal["stop", "length", "abort"]
    matched: int | None = None
    message: str = ""
    status: int = 499


class TokensOut(msgspec.Struct, frozen=True, tag="tokens"):
    """News of one request. Exactly one message per accepted request has `finish` set, its last.

    Attributes:
        tokens: newly generated ids, in order (may be empty on the last message).
        first: how many the request had generated before these; -1: these follow the last. Of a
            burst, the leading rank tells tokens as it samples them, and the scheduler tells them
            again at its end.
        logprobs: one entry per token where wanted, else empty.
        prompt_logprobs: sent once, with or before the first token, where wanted.
        cached_tokens, prompt_tokens, retractions: the request's figures so far.
        attention: of a request that asked for csa: once its prefill is counted (a client's stop
            string may end it before the last message), and on the last message.
        hidden_state: of a request that asked for it, on the last message: little-endian fp32.
    """

    rid: str
    tokens: tuple[int, ...] = ()
    finish: StopReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    attention: AttentionReport | None = None
    hidden_state: bytes = b""
    first: int = -1


class TokensBatch(msgspec.Struct, frozen=True, tag="batch"):
    """All news of one scheduler turn in one frame."""

    items: tuple[TokensOut, ...]


class PrefillProgress(msgspec.Struct, frozen=True, tag="progress"):
    """How far a long prompt's prefill has come: `done` of `total` tokens."""

    rid: str
    done: int
    total: int


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    """The answer to a call that carried a number."""

    call: int
    ok: bool
    detail: str = ""


class RankState(msgspec.Struct, frozen=True):
    """One SP rank's pages: free + cached + in use = total."""

    free_pages: int
    cached_pages: int
    used_pages: int
    total_pages: int


class EngineState(msgspec.Struct, frozen=True, tag="engine_state"):
    """A snapshot for /metrics and /server_info, sent on demand and about once a second.

    Counters (``*_total``) grow from the engine's start. Seconds and bytes are summed over ranks.
    """

    call: int = 0
    running: int = 0
    waiting: int = 0
    max_total_tokens: int = 0
    used_tokens: int = 0
    ranks: tuple[RankState, ...] = ()
    steps_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    retractions_total: int = 0
    aborts_total: int = 0
    prefix_waits_total: int = 0
    sent_bytes_total: int = 0
    physical_bytes_total: int = 0
    linear_bytes_total: int = 0
    exposed_seconds_total: float = 0.0
    compute_seconds_total: float = 0.0
    step_age_s: float = 0.0


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot go on; every waiting request is answered with an error."""

    message: str


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    """All ranks are loaded and warm; requests may be sent."""

    max_total_tokens: int
    page_size: int


class LinkCost(msgspec.Struct, frozen=True):
    """What crossing ranks costs here, measured at start: seconds = latency + bytes / bandwidth.

    `zero_copy`: peers' pages are read in place, so pass-KV has no transfer at all.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    zero_copy: bool = False


class DecodeCost(msgspec.Struct, frozen=True):
    """Seconds of the linear part of one layer in a decode step, measured at start by all SP ranks
    at once with the products and exchanges that they decode with.

    Attributes:
        rows: tokens, ascending; empty where nothing was measured.
        sharded_s: every rank multiplies all its weights by that many tokens of its own.
        replicated_s: every rank multiplies its slice by that many tokens of all, and the ranks sum.
        ranks: SP ranks that measured.
    """

    rows: tuple[int, ...] = ()
    sharded_s: tuple[float, ...] = ()
    replicated_s: tuple[float, ...] = ()
    ranks: int = 1


class RankReady(msgspec.Struct, frozen=True, tag="rank_ready"):
    """A rank is loaded and warm.

    Attributes:
        rank: global rank.
        pages: pages in its KV pool.
        link: measured between the ranks, the same on all.
        decode: measured between the ranks, the same on all.
        flops_per_s: measured rate of this rank's products with many rows of a layer's weights.
        no_sparse: why this rank cannot run sparse attention; empty where it can.
        bursts: whether it runs bursts.
        detail: what serves this rank, for logs and `sps doctor` (kernels, dtype, threads).
    """

    rank: int
    pages: int
    link: LinkCost = LinkCost()
    decode: DecodeCost = DecodeCost()
    flops_per_s: float = 0.0
    no_sparse: str = ""
    detail: str = ""
    bursts: bool = False


ToScheduler = GenerateRequest | Abort | FlushCache | GetState | Record | StopEngine
ToFrontend = TokensBatch | PrefillProgress | Reply | EngineState | EngineFailed | EngineReady
ToRank = StepPlan | Record | EndBurst | StopEngine
FromRank = StepResult | RankReady
