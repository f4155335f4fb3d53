"""What became of a request's wish for block-sparse attention: whether it runs, and its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sps_runtime.scheduler.chunking import superblock_pages
from sps_runtime.sparse.audit_summary import summarize
from sps_runtime.types.attention import (
    EXACT,
    AttentionReport,
    AttentionSpec,
    SparseCounters,
    SparseSettings,
)


@dataclass(frozen=True)
class SparseRules:
    """Where csa can run and pays.

    Attributes:
        refusal: why this server runs no csa at all; empty where it does.
        page_size, ranks, pages_per_rank: of the KV cache.
        pays: whether a prompt of so many tokens is not computed sooner exactly.
        min_tokens: shorter prompts run exact, all others do not, whatever `pays` says; None: it
            decides.
    """

    refusal: str
    page_size: int
    ranks: int
    pages_per_rank: int
    pays: Callable[[SparseSettings, int], bool]
    min_tokens: int | None = None

    def decide(self, wanted: AttentionSpec, prompt_len: int) -> Sparsity | None:
        """How a request of so many tokens is computed; None when it asked for exact attention."""
        if wanted.sparse is None:
            return None
        settings = wanted.sparse.for_prompt(prompt_len, self.page_size)
        reason = self._refusal(settings, prompt_len)
        return Sparsity(EXACT if reason else AttentionSpec(wanted.mode, settings), reason)

    def _refusal(self, settings: SparseSettings, prompt_len: int) -> str:
        """Why csa cannot run or does not pay; empty when it runs."""
        if self.refusal:
            return self.refusal
        if settings.superblock % self.page_size:
            return f"superblocks are no multiple of the page of {self.page_size} tokens"
        if settings.estimator == "stride" and self.page_size % settings.stride:
            return f"a stride of {settings.stride} does not divide pages of {self.page_size} tokens"
        if self.min_tokens is None:
            if not self.pays(settings, prompt_len):
                return f"exact attention is sooner for a prompt of {prompt_len} tokens"
        elif prompt_len < self.min_tokens:
            return f"the prompt is shorter than {self.min_tokens} tokens"
        if not self._fits(settings, prompt_len):
            return "the KV cache is too small for superblocks"
        return ""

    def _fits(self, settings: SparseSettings, prompt_len: int) -> bool:
        """Whether an empty pool surely has room for all superblocks, each on one rank.

        In units of the smallest superblock; where larger ones come later, each rank may be left
        with one unit that is no use to them.
        """
        unit = settings.superblock // self.page_size
        units = [-(-pages // unit) for pages in self._superblocks(settings, prompt_len)]
        lost = self.ranks if max(units) > 1 else 0
        return sum(units) + lost <= self.ranks * (self.pages_per_rank // unit)

    def _superblocks(self, settings: SparseSettings, prompt_len: int) -> list[int]:
        return superblock_pages(settings, 0, prompt_len, self.page_size)


@dataclass(eq=False)
class Sparsity:
    """A request that asked for csa.

    Attributes:
        attention: how its prompt is computed.
        reason: why that is exact; empty where it is not.
        counters: what ranks counted so far.
        reported: the client's side knows.
    """

    attention: AttentionSpec
    reason: str = ""
    counters: list[SparseCounters] = field(default_factory=list)
    reported: bool = False

    def give_up(self, reason: str) -> None:
        """Run exact after all."""
        self.attention, self.reason = EXACT, reason

    def report(self) -> AttentionReport:
        """What is known so far."""
        causal = sum(part.causal_pairs for part in self.counters)
        remote = sum(part.remote_units for part in self.counters)
        read = sum(part.read_pairs for part in self.counters)
        fetched = sum(part.fetched_units for part in self.counters)
        taus = summarize(b"".join(part.audits for part in self.counters))
        return AttentionReport(
            mode=self.attention.mode,
            density=read / causal if causal else 1.0,
            union_share=fetched / remote if remote else 0.0,
            remote_bytes=sum(part.remote_bytes for part in self.counters),
            fallbacks=sum(part.fallbacks for part in self.counters),
            tau_samples=taus.samples,
            tau_mean=taus.mean,
            tau_p95=taus.p95,
            tau_max=taus.maximum,
            tau_last=taus.last,
            tau_worst=taus.worst,
            reason=self.reason,
        )
