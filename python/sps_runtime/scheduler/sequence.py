"""What the scheduler knows of a request, and of the run it is having on the ranks."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from sps_runtime.kvcache.directory import PageTable
from sps_runtime.kvcache.radix_tree import Namespace
from sps_runtime.scheduler.history import History
from sps_runtime.types.plan import PromptLogprobs, SampledToken
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.tokens import unpack_ids


@dataclass(eq=False)
class Sequence:
    """A request from acceptance to its final message, through any number of runs.

    Attributes:
        arrival: order of acceptance; nothing ever changes it.
        tokens: prompt and output so far.
        max_new: tokens to generate at most, within the context length.
        stop_ids: ids that end it.
        cached: prompt tokens found in the cache when it first ran.
        overtaken: how many later requests were admitted before it.
    """

    request: GenerateRequest
    arrival: int
    namespace: Namespace
    tokens: array[int]
    prompt_len: int
    max_new: int
    stop_ids: frozenset[int]
    history: History | None = None
    cached: int = 0
    first_run: bool = True
    retractions: int = 0
    overtaken: int = 0
    prompt_logprobs_due: bool = False

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def match_limit(self) -> int:
        """Tokens that may come from the cache: all but the last, whose logits are needed, and
        none from the position whose logits judge the first wanted prompt token."""
        limit = len(self.tokens) - 1
        if self.prompt_logprobs_due and self.request.logprobs is not None:
            limit = min(limit, max(0, self.request.logprobs.prompt_start - 1))
        return limit

    def append(self, token: int) -> None:
        """Take a generated token."""
        self.tokens.append(token)
        if self.history is not None:
            self.history.generated(token)

    def packed_tokens(self) -> bytes:
        """All tokens, packed."""
        return self.tokens.tobytes() if self.generated else self.request.tokens


@dataclass(eq=False)
class Flight:
    """One sequence's part of a plan under way.

    Attributes:
        end: positions below it are in the pages once every rank has answered.
        samples: whether the plan samples a token for it.
        token: the sampled token, when its rank has answered.
        taken: the token was given out (or thrown away).
        complete: every rank has answered.
    """

    epoch: int
    end: int
    samples: bool
    token: SampledToken | None = None
    taken: bool = False
    complete: bool = False


@dataclass(eq=False)
class Run:
    """A sequence's stay on the ranks: from admission to its end or retraction.

    Attributes:
        handle: its name in the page directory, never used again.
        slot: its slot of the token board.
        target: tokens to prefill: all that were known when the run began.
        sent: positions below it are in plans sent.
        acked: positions below it are written, as every rank of their steps has said.
        unknown: tokens sampled by plans under way.
        mask: the group of its last plan, 0 before the first.
        live: false once the sequence has ended or was retracted: what still comes is thrown away.
        known: tokens known when it died; nothing beyond is committed.
    """

    sequence: Sequence
    handle: int
    slot: int
    table: PageTable
    target: int
    sent: int
    acked: int
    unknown: int = 0
    mask: int = 0
    live: bool = True
    known: int = 0
    flights: deque[Flight] = field(default_factory=deque)
    prompt_pieces: list[PromptLogprobs] = field(default_factory=list)

    @property
    def prefilling(self) -> bool:
        return self.sent < self.target

    @property
    def decodes(self) -> bool:
        """Whether there is a token to compute after the prefill."""
        sequence = self.sequence
        return self.sent >= self.target and sequence.generated + self.unknown < sequence.max_new


def new_sequence(
    request: GenerateRequest,
    arrival: int,
    *,
    kv_dtype: str,
    context_length: int,
    eos_ids: frozenset[int],
) -> Sequence:
    """A fresh sequence. `max_new` is cut to what the context has room for."""
    tokens = unpack_ids(request.tokens)
    sampling = request.sampling
    stop_ids = frozenset(sampling.stop_token_ids)
    wants = request.logprobs
    return Sequence(
        request=request,
        arrival=arrival,
        namespace=(request.tenant, kv_dtype, request.attention.fidelity),
        tokens=tokens,
        prompt_len=len(tokens),
        max_new=max(0, min(sampling.max_new_tokens, context_length - len(tokens))),
        stop_ids=stop_ids if sampling.ignore_eos else stop_ids | eos_ids,
        history=History(tokens) if sampling.penalized else None,
        prompt_logprobs_due=wants is not None and wants.prompt_start >= 0,
    )
