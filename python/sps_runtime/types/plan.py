"""The plan: one step of one group of ranks, complete in itself (docs/design.md, contract 1).

A rank needs nothing but a `StepPlan`, its weights, its KV pool and the token board to execute a
step, so a recording of plans and boards drives a runner alone, and a fake runner drives the
scheduler alone. Ranks hold no policy and no state of a sequence.

**Ranks.** The mesh is (sp, tp); a *rank* here is an SP rank in [0, sp), and its TP peers do the
same on their heads. Global rank = sp_rank * tp + tp_rank.

**Pages.** KV lies in pages of `page_size` tokens. A *page id* is global:
``page_id = sp_rank * pages_per_rank + slot``. Logical page i of a sequence holds positions
[i * page_size, (i + 1) * page_size); the sequence's list names a page id for each, in order.

**Where a token is computed.** With the `sharded` placement a token is computed by the rank that
owns its page, so its KV is written where it was made. With the `replicated` placement every rank
of the group computes every token with a slice of the weights, and the owner writes the KV.

**Order.** Plans carry an epoch that grows by one with every plan the scheduler sends; each rank
executes the plans it is in, in the order of their epochs. There is no global step. A group contains
every owner of pages that the plan writes, and every owner of pages it reads, save committed pages
(acknowledged in an earlier epoch) on a rank of the same host, which are read in place.

**Tokens not yet known.** A plan may name a board slot instead of a token id: the rank that samples
writes (epoch, token) to the slot, and a later plan reads it there (`SequencePlan.board_epoch`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sps_runtime.types.attention import EXACT, AttentionSpec, SparseCounters
from sps_runtime.types.sampling import SamplingParams

Placement = Literal["sharded", "replicated"]
Strategy = Literal["pass_kv", "pass_q", "ulysses"]


class SamplePlan(msgspec.Struct, frozen=True):
    """Sample one token from the logits of a sequence's last planned token.

    The position of the sampled token is ``start + count`` of the sequence's plan; it is the
    counter of the random generator.

    Attributes:
        params: the request's sampling parameters.
        forbid_stop: ids that may not be sampled now (EOS and stop ids below min_new_tokens).
        history_ids, history_counts: packed int32, equally long; what penalties see: every distinct
            id of prompt and output known when planning, with its count among *generated* tokens (0:
            only in the prompt). Empty unless `params.penalized`. A token that this plan reads from
            the board is generated and not counted here: the sampler adds it.
        logprobs: None for none; otherwise how many top alternatives (0: the chosen token only).
        logprob_ids: ids whose logprob is wanted too.
        generated: packed int32; under `params.grammar` every token generated so far, but one that
            this plan reads from the board. Empty without a grammar.
    """

    params: SamplingParams
    forbid_stop: tuple[int, ...] = ()
    history_ids: bytes = b""
    history_counts: bytes = b""
    logprobs: int | None = None
    logprob_ids: tuple[int, ...] = ()
    generated: bytes = b""


class SequencePlan(msgspec.Struct, frozen=True):
    """What a step does for one sequence: compute tokens [start, start + count), perhaps sample.

    Attributes:
        slot: the sequence's board slot, its own as long as it runs.
        start: absolute position of the first token computed in this step; positions below are in
            the pages already.
        count: tokens computed in this step, >= 1.
        tokens: packed int32 ids of these tokens; of length count - 1 when the last one is read
            from the board.
        pages: packed int32 page ids covering positions [0, start + count).
        board_epoch: -1, or the epoch whose sampled token is this plan's last token.
        sample: None when nothing is sampled (a chunk before the last, or prefill only).
        prompt_logprobs_from: -1, or: the logits at position p of this step judge the prompt token
            at p + 1; report its logprob for every p + 1 >= prompt_logprobs_from.
        next_token: the prompt's id at position start + count, judged by this step's last logits
            when prompt logprobs are wanted; -1 when the prompt ends with this step.
        attention: how attention is computed.
        prompt_top, prompt_ids: what prompt logprobs carry beside the prompt's own ids: how many top
            alternatives, and which ids.
        summaries_from: under csa, the summaries of pages below this position have reached every
            member of the group in earlier steps of this sequence; those of later pages travel in
            this step. A multiple of the page.
        hidden_state: report the hidden state of the last of these tokens. Such a sequence is
            prefilled and samples nothing.

    A step that prefills under csa begins with a superblock and ends with one or with the prompt,
    and the new pages of a superblock lie on one rank (`SparseSettings.align`).
    """

    slot: int
    start: int
    count: int
    tokens: bytes
    pages: bytes
    board_epoch: int = -1
    sample: SamplePlan | None = None
    prompt_logprobs_from: int = -1
    next_token: int = -1
    attention: AttentionSpec = EXACT
    prompt_top: int = 0
    prompt_ids: tuple[int, ...] = ()
    summaries_from: int = 0
    hidden_state: bool = False


class Burst(msgspec.Struct, frozen=True):
    """How a decode plan goes on by itself: step after step, each from the token of the one before,
    as plans of their own would that have the epochs after the plan's.

    One rank leads, the first of the group (and of its TP peers), which samples. After every step it
    says whether there is another one: not when `steps` are done, when a sequence sampled one of its
    stop ids, when a message from the scheduler waits, or when it has been long enough. All ranks
    then answer the plan, once, with the number of steps that were run.

    Attributes:
        steps: at most so many, >= 2. The sequences' `pages` cover them all.
        stops: for each sequence, the ids that end it.
        rids: for each sequence, the request whose tokens the leading rank tells the front end as it
            samples them, all but stop ids and the last step's; "" for none.
        firsts: for each sequence, how many tokens it has generated before this plan.
    """

    steps: int
    stops: tuple[tuple[int, ...], ...]
    rids: tuple[str, ...]
    firsts: tuple[int, ...]


class StepPlan(msgspec.Struct, frozen=True, tag="step"):
    """One step of one group, or a burst of steps.

    Attributes:
        epoch: grows by one with every step that the scheduler plans, from 1; of a burst, its first
            step's.
        group: the SP ranks that run it, ascending.
        sequences: at least one.
        placement: how tokens and linear layers lie on the group.
        strategy: how attention crosses ranks; without meaning in a group of one. With the
            `replicated` placement it is always `pass_q` (each owner attends to its own pages).
        phase: a name for telemetry alone; nothing is decided by it.
        burst: of decode steps alone that run on one rank or replicated, on one host.
    """

    epoch: int
    group: tuple[int, ...]
    sequences: tuple[SequencePlan, ...]
    placement: Placement = "sharded"
    strategy: Strategy = "pass_kv"
    phase: Literal["prefill", "decode", "mixed"] = "mixed"
    burst: Burst | None = None

    @property
    def steps(self) -> int:
        """Steps at most, and epochs taken."""
        return 1 if self.burst is None else self.burst.steps


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Logprobs at one position. `top` and `wanted` are (id, logprob) pairs, best first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    wanted: tuple[tuple[int, float], ...] = ()


class SampledToken(msgspec.Struct, frozen=True):
    """A token sampled in a step, for the sequence in board slot `slot`.

    Attributes:
        failure: None, or why the sequence's grammar has no next token: the request ends, the token
            means nothing.
    """

    slot: int
    token: int
    logprobs: TokenLogprobs | None = None
    failure: str | None = None


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Logprobs of prompt positions [start, start + len(values)) of the sequence in `slot`."""

    slot: int
    start: int
    values: tuple[TokenLogprobs, ...]


class HiddenState(msgspec.Struct, frozen=True):
    """The hidden state of the last planned token of the sequence in `slot`, after the last norm.

    Attributes:
        values: little-endian fp32 ``[hidden]``.
    """

    slot: int
    values: bytes


class StepCounters(msgspec.Struct, frozen=True):
    """What a step cost on one rank (contract 5). Bytes are logical: every non-owner read or
    transfer counts once, zero-copy reads too; physical bytes are what was really copied.

    Attributes:
        sent_bytes, physical_bytes: attention traffic that this rank sent or read remotely.
        linear_bytes: traffic of linear layers (TP, SP-TP).
        exposed_s: seconds this rank waited for others with nothing to compute.
        compute_s: the rest of the step's seconds.
        token_layers: (query token, layer) pairs of this rank, to divide bytes by.
    """

    sent_bytes: int = 0
    physical_bytes: int = 0
    linear_bytes: int = 0
    exposed_s: float = 0.0
    compute_s: float = 0.0
    token_layers: int = 0


class StepResult(msgspec.Struct, frozen=True, tag="result"):
    """One global rank's acknowledgement of one plan: its KV is written, its reads are over.

    Every rank of the group answers each plan once; only the rank that sampled a sequence names its
    token, and only the rank that computed prompt logprobs or a hidden state names them.

    Attributes:
        rank: global rank, sp_rank * tp + tp_rank.
        sampled: of a burst, of all its steps in order.
        sparse: one entry for each sequence under csa that this rank computed tokens of.
        error: None, or why the step failed: the engine stops (ranks may have diverged).
        steps: how many were run, the same on all ranks; 1 but for a burst.
    """

    epoch: int
    rank: int
    sampled: tuple[SampledToken, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    counters: StepCounters = StepCounters()
    sparse: tuple[SparseCounters, ...] = ()
    error: str | None = None
    hidden_states: tuple[HiddenState, ...] = ()
    steps: int = 1
