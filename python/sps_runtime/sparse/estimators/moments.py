"""A page as a cloud of keys: its mean, and how far keys lie from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.sparse.summaries import PageSummaries


def scores(q_KGRD: Tensor, k_NKD: Tensor) -> Tensor:
    """q.k of every row and every page's vector: ``[kv_heads, group, rows, pages]``."""
    return torch.einsum("kgrd,nkd->kgrn", q_KGRD, k_NKD)


@dataclass(frozen=True)
class MeanKey:
    """log n + q.mean: exact for a page of equal keys, too low for any other (Jensen)."""

    needs = frozenset({"mean_k_NKD"})

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        return scores(q_KGRD, pages.get("mean_k_NKD")) + pages.counts_N.log()


@dataclass(frozen=True)
class MeanVariance:
    """log n + q.mean + 1/2 q^2.var: exact in the limit of many independent normal channels.

    Attributes:
        limit: the variance term is at most this. Rope turns keys within a page, which spreads
            channels without any key scoring higher, so that the plain term overshoots.
    """

    limit: float | None = None
    needs = frozenset({"mean_k_NKD", "variance_NKD"})

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        spread = 0.5 * scores(q_KGRD.square(), pages.get("variance_NKD"))
        if self.limit is not None:
            spread = spread.clamp_max(self.limit)
        return MeanKey().log_mass(q_KGRD, pages) + spread


@dataclass(frozen=True)
class Deviants:
    """The page's mean, and its most deviant keys themselves, which a mean does not show.

    Attributes:
        keys: how many of those that the summaries hold.
    """

    keys: int = 1
    needs = frozenset({"mean_k_NKD", "deviant_k_NKMD"})

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        found = pages.get("deviant_k_NKMD")[:, :, : self.keys]
        deviant = torch.einsum("kgrd,nkmd->kgrnm", q_KGRD, found).logsumexp(-1)
        return torch.logaddexp(MeanKey().log_mass(q_KGRD, pages), deviant)


@dataclass(frozen=True)
class PartMeans:
    """Means of runs within the page: a needle is diluted by its run, not by its page."""

    needs = frozenset({"parts_k_NKMD"})

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        parts = pages.get("parts_k_NKMD")
        each = torch.einsum("kgrd,nkmd->kgrnm", q_KGRD, parts)
        return each.logsumexp(-1) + (pages.counts_N / parts.shape[2]).log()
