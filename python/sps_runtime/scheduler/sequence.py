"""What the scheduler knows of a request, and of the run it is having on the ranks."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from sps_runtime.kvcache.directory import PageTable
from sps_runtime.kvcache.radix_tree import Namespace
from sps_runtime.scheduler.chunking import chunk_end, sparse_chunk_end
from sps_runtime.scheduler.history import History
from sps_runtime.scheduler.sparsity import Sparsity
from sps_runtime.types.attention import EXACT, AttentionSpec, SparseSettings
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
        awaited: the run whose pages it waits for before it is admitted; None when it does not.
        awaits: how many times it began to wait so.
        sparsity: what became of its wish for csa; None for a request that asked for exact.
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
    awaited: PrefixWait | None = None
    awaits: int = 0
    prompt_logprobs_due: bool = False
    sparsity: Sparsity | None = None

    @property
    def attention(self) -> AttentionSpec:
        """How its prompt is computed: what was asked for, or exact where csa cannot be or pay."""
        return EXACT if self.sparsity is None else self.sparsity.attention

    @property
    def sparse(self) -> SparseSettings | None:
        """The settings of csa; None where it runs exact."""
        return self.attention.sparse

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
        return self.aligned(limit)

    @property
    def commit_limit(self) -> int:
        """Tokens whose pages may serve others: under csa the prompt's whole superblocks."""
        return len(self.tokens) if self.sparse is None else self.sparse.align(self.prompt_len)

    def aligned(self, position: int) -> int:
        """A position under csa cut down to its superblock's first; any position when exact."""
        return position if self.sparse is None else self.sparse.align(position)

    def run_exact(self, reason: str) -> None:
        """Give up csa: from its next run on the sequence is computed and cached as exact."""
        assert self.sparsity is not None
        self.sparsity.give_up(reason)
        self.namespace = (*self.namespace[:2], EXACT.fidelity)

    def append(self, token: int) -> None:
        """Take a generated token."""
        self.tokens.append(token)
        if self.history is not None:
            self.history.generated(token)

    def packed_tokens(self) -> bytes:
        """All tokens, packed."""
        return self.tokens.tobytes() if self.generated else self.request.tokens

    def packed_generated(self) -> bytes:
        """Generated tokens, packed."""
        return self.tokens[self.prompt_len :].tobytes()

    @property
    def needs_history(self) -> bool:
        """Whether sampling depends on every generated token."""
        sampling = self.request.sampling
        return sampling.penalized or bool(sampling.grammar)


@dataclass(eq=False)
class Flight:
    """One sequence's part of a plan under way.

    Attributes:
        end: positions below it are in the pages once every rank has answered.
        samples: how many tokens the plan samples for it; of a burst's, those that came when its end
            is known.
        tokens: the sampled tokens, when their rank has answered.
        taken: how many of them were given out (or thrown away).
        complete: every rank has answered.
        sparse: it prefills under csa.
        burst: the plan is for several steps.
    """

    epoch: int
    end: int
    samples: int
    tokens: list[SampledToken] = field(default_factory=list)
    taken: int = 0
    complete: bool = False
    sparse: bool = False
    burst: bool = False

    @property
    def due(self) -> int:
        """Tokens that were not taken yet."""
        return self.samples - self.taken


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
        sparse_end: positions below it are prefilled under csa, 0 for none.
        summarised: under csa, rank -> the summaries of pages below this position have reached it in
            plans sent.
        short: no rank of its last group had room for its next superblock.
        hidden_state: of the prompt's last token, once its rank has said it.
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
    sparse_end: int = 0
    summarised: dict[int, int] = field(default_factory=dict)
    short: bool = False
    hidden_state: bytes = b""

    @property
    def sparse_now(self) -> SparseSettings | None:
        """The settings under which its next chunk is prefilled; None where that is exact."""
        return self.sequence.sparse if self.sent < self.sparse_end else None

    @property
    def attention_now(self) -> AttentionSpec:
        """How its next tokens attend: generated ones exactly, unless sparse decode is asked for."""
        sparse = self.sequence.sparse
        decodes_sparsely = sparse is not None and sparse.decode == "sparse"
        return self.sequence.attention if self.sparse_now or decodes_sparsely else EXACT

    def chunk_end(self, page_size: int, limit: int | None, room_pages: int | None = None) -> int:
        """Where its next chunk ends; `chunking` says how. A csa chunk knows no room."""
        if self.sparse_now is not None:
            return sparse_chunk_end(self.sparse_now, self.sent, self.sparse_end, limit)
        return chunk_end(self.sent, self.target, page_size, limit, room_pages)

    @property
    def prefilling(self) -> bool:
        return self.sent < self.target

    @property
    def will_cache(self) -> int:
        """Known tokens below it will be in the radix tree when the plans that write them are
        answered: all of its prompt, and of a run that has ended what it has in plans sent."""
        if self.live:
            return min(self.target, self.sequence.commit_limit)
        return min(self.sent, self.known)

    @property
    def decodes(self) -> bool:
        """Whether there is a token to compute after the prefill."""
        sequence = self.sequence
        return self.sent >= self.target and sequence.generated + self.unknown < sequence.max_new


@dataclass(frozen=True, eq=False)
class PrefixWait:
    """A request's wait for the pages of a run: until positions below `until` are cached."""

    run: Run
    until: int

    @property
    def over(self) -> bool:
        """Whether the pages are in the tree, or will never be this run's work."""
        return not self.run.acked < self.until <= self.run.will_cache


def new_sequence(
    request: GenerateRequest,
    arrival: int,
    *,
    kv_dtype: str,
    context_length: int,
    eos_ids: frozenset[int],
    sparsity: Sparsity | None = None,
) -> Sequence:
    """A fresh sequence. `max_new` is cut to what the context has room for."""
    tokens = unpack_ids(request.tokens)
    sampling = request.sampling
    stop_ids = frozenset(sampling.stop_token_ids)
    ignores_eos = sampling.ignore_eos and not sampling.grammar
    wants = request.logprobs
    attention = EXACT if sparsity is None else sparsity.attention
    return Sequence(
        request=request,
        arrival=arrival,
        namespace=(request.tenant, kv_dtype, attention.fidelity),
        tokens=tokens,
        prompt_len=len(tokens),
        max_new=max(0, min(sampling.max_new_tokens, context_length - len(tokens))),
        stop_ids=stop_ids if ignores_eos else stop_ids | eos_ids,
        history=History(tokens) if sampling.penalized else None,
        prompt_logprobs_due=wants is not None and wants.prompt_start >= 0,
        sparsity=sparsity,
    )
