"""Estimators that look at every key of a page, rounded or whole, and at its box."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.sparse.estimators.moments import scores
from sps_runtime.sparse.summaries import PageSummaries


@dataclass(frozen=True)
class MinMax:
    """log n + the greatest q.k of any key in the page's box: Quest's score (Tang et al. 2024).

    An upper bound of the log mass, loose in many dims. max(q low, q high) of a channel is
    q+ high - q- low, so that all pages are two matrix products.
    """

    needs = frozenset({"low_NKD", "high_NKD"})

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        best = scores(q_KGRD.clamp_min(0), pages.get("high_NKD"))
        return best + scores(q_KGRD.clamp_max(0), pages.get("low_NKD")) + pages.counts_N.log()


@dataclass(frozen=True)
class SketchedKeys:
    """Every key of the page, rounded to a few bits a channel: each still looks like itself, so that
    the one that a query wants is seen among others like it. Means and extremes see the crowd.

    Attributes:
        basis_KDR: what the sketch was made in; None for the channels themselves.
    """

    basis_KDR: Tensor | None = None
    needs = frozenset({"sketch_NKBR"})

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        if self.basis_KDR is not None:
            q_KGRD = torch.einsum("kgrd,kdx->kgrx", q_KGRD, self.basis_KDR)
        return _mass(q_KGRD, pages.get("sketch_NKBR"), pages.counts_N)


@dataclass(frozen=True)
class ExactMass:
    """The true log mass, from all keys: the oracle that estimators are measured against."""

    needs = frozenset({"keys_NKBD"})

    def log_mass(self, q_KGRD: Tensor, pages: PageSummaries) -> Tensor:
        return _mass(q_KGRD, pages.get("keys_NKBD"), pages.counts_N)


def _mass(q_KGRD: Tensor, k_NKBD: Tensor, counts_N: Tensor) -> Tensor:
    heads, group, rows, _ = q_KGRD.shape
    pages, _, size, _ = k_NKBD.shape
    each = q_KGRD.flatten(1, 2) @ k_NKBD.transpose(0, 1).flatten(1, 2).transpose(1, 2)
    absent = torch.arange(size)[None] >= counts_N[:, None]
    each = each.view(heads, group, rows, pages, size).masked_fill_(absent, -torch.inf)
    return each.logsumexp(-1)
