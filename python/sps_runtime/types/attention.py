"""How a request's attention is computed, and what became of it."""

from __future__ import annotations

from typing import Literal

import msgspec


class SparseSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Block-sparse attention ("csa"), as ADR 9 chose its defaults; every field but `decode` is part
    of the fidelity of pages written under it.

    A *query block* is `block` tokens at a multiple of it (a page, where pages are longer). A
    *superblock* is a stretch of query blocks that choose from one set of the pages before it, so
    that what a rank fetches is bounded. Which pages a block reads is a pure function of the
    superblock's queries, the summaries of the pages before it and these settings: a superblock is
    therefore computed in one step by one rank (`align`).

    Attributes:
        estimator: a name of `sparse.estimators`.
        tau: pages leave the budget while their estimated shares sum to less; 0 selects all pages.
        max_tau: measured dropped mass (95% upper bound) above which the budget is widened, then
            attention is exact, for a superblock and head; 1 measures only.
        budget: at most this share of the pages before a block.
        minimum, sink, window: as `sparse.selection.SelectionSettings` has them.
        rows, end_rows, end: of a query block that are scored (`scored_rows`), 0 for all: `rows`,
            and at least `end_rows` in a prompt's last, shorter superblock and in the last `end`
            tokens of any other, for a prompt's end, where its question is, may lie in both. A block
            that is not whole is scored by all of its rows.
        superblock: tokens, below position `wide_from`; twice as many from there.
        short_to, short_minimum, short_superblock: a prompt of fewer than `short_to` tokens has at
            least that minimum and at most that superblock (`for_prompt`): a tenth of few pages, in
            common with fifteen other blocks, is less than a question wants.
        tail: what stands for dropped pages: their means, or nothing.
        decode: whether generated tokens read all pages or chosen ones.
        stride, levels: of the estimator ``stride`` (CSPS as published), which chooses no pages: one
            token in `stride` crosses the group. `levels` are inner ones, (ranks, stride) each, from
            small to large: ranks that are near one another may exchange more.

    Raises:
        ValueError: a stride below 1, or levels that do not lie in one another.
    """

    estimator: str = "block"
    tau: float = 0.02
    max_tau: float = 1.0
    budget: float = 0.10
    minimum: int = 16
    sink: int = 1
    window: int = 2
    rows: int = 6
    end_rows: int = 32
    end: int = 128
    block: int = 64
    superblock: int = 1024
    wide_from: int = 16384
    short_to: int = 12288
    short_minimum: int = 48
    short_superblock: int = 64
    tail: Literal["mean", "none"] = "mean"
    decode: Literal["exact", "sparse"] = "exact"
    stride: int = 4
    levels: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        inner = 1
        for ranks, stride in (*self.levels, (0, self.stride)):
            if stride < 1 or ranks % inner or (ranks and ranks <= inner):
                raise ValueError("each level is a multiple of the one before, strides at least 1")
            inner = ranks or inner

    def for_prompt(self, tokens: int, page_size: int = 1) -> SparseSettings:
        """What these settings mean for a prompt of so many tokens: settled when a request is
        admitted, and part of its pages' fidelity. Pages that were written for a short prompt do not
        serve a long one, so a conversation that grows past `short_to` is computed anew once. A
        superblock is a page at least."""
        if tokens >= self.short_to or self.estimator in ("stride", "random"):
            return self
        return msgspec.structs.replace(
            self,
            minimum=max(self.minimum, self.short_minimum),
            superblock=min(self.superblock, max(self.short_superblock, page_size)),
        )

    def scored_rows(self, position: int, tokens: int) -> int:
        """Rows that are scored of the whole block at a position, whose superblock has so many
        tokens; 0 for all."""
        whole = tokens >= self.superblock_at(position)
        if not self.rows or (whole and position < self.superblock_end(position) - self.end):
            return self.rows
        return max(self.rows, self.end_rows)

    def superblock_at(self, position: int) -> int:
        """Tokens of the superblock that holds a position."""
        return self.superblock * (1 if position < self.wide_from else 2)

    def align(self, position: int) -> int:
        """First position of the superblock that holds `position`."""
        return position - position % self.superblock_at(position)

    def superblock_end(self, position: int) -> int:
        """First position behind the superblock that holds `position`."""
        return self.align(position) + self.superblock_at(position)


class AttentionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a request's attention is computed. `fidelity` names it in radix keys.

    Attributes:
        mode: ``exact``, or ``csa`` with its settings.
        sparse: None for exact.
    """

    mode: Literal["exact", "csa"] = "exact"
    sparse: SparseSettings | None = None

    @property
    def fidelity(self) -> str:
        """A string equal for pages that may serve one another, ``exact`` for exact pages. Under csa
        only prompts' pages serve others, so decode is no part of it."""
        if self.sparse is None:
            return self.mode
        names = (name for name in self.sparse.__struct_fields__ if name != "decode")
        return ",".join([self.mode, *(f"{name}={getattr(self.sparse, name)}" for name in names)])


EXACT = AttentionSpec()


class SparseCounters(msgspec.Struct, frozen=True):
    """What one step's sparse attention did for one sequence on one rank (all layers and heads).

    A *pair* is (query block, page, KV head); a *unit* is (page, KV head, layer) of another rank.

    Attributes:
        slot: the sequence's board slot.
        read_pairs, causal_pairs: pairs that were read, and that a causal mask allows.
        fetched_units, remote_units: units that some query block of this rank reads, each once, and
            that exact attention would: their ratio is the union share u.
        remote_bytes: logical bytes that came from other ranks for this sequence: pages, summaries,
            ids, outputs, audits.
        fallbacks: (layer, superblock, KV head) that became exact because of max_tau.
        audits: packed records of `sparse.audit.RECORD` (16 bytes each): what was measured on which
            block.
    """

    slot: int
    read_pairs: int = 0
    causal_pairs: int = 0
    fetched_units: int = 0
    remote_units: int = 0
    remote_bytes: int = 0
    fallbacks: int = 0
    audits: bytes = b""


class AttentionReport(msgspec.Struct, frozen=True):
    """What became of a request's attention, for `meta_info` (counters summed over its prefill).

    Attributes:
        mode: what ran; ``exact`` where csa did not pay.
        density: read over causal pairs, fallbacks included.
        union_share: fetched over remote units; 0 where nothing is remote.
        remote_bytes: logical bytes that crossed ranks for its attention.
        fallbacks: (layer, superblock, KV head) that became exact.
        tau_samples: audited (layer, query block, KV head).
        tau_mean, tau_p95, tau_max, tau_last: measured dropped mass: over all samples, and of the
            last audited query block; None without samples.
        tau_worst: (layer, KV head) with the largest mean.
        reason: why csa did not run; empty where it did.
    """

    mode: str
    density: float = 1.0
    union_share: float = 0.0
    remote_bytes: int = 0
    fallbacks: int = 0
    tau_samples: int = 0
    tau_mean: float | None = None
    tau_p95: float | None = None
    tau_max: float | None = None
    tau_last: float | None = None
    tau_worst: tuple[int, int] | None = None
    reason: str = ""
