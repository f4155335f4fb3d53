"""What one layer of one document shows: true page shares, what estimators say, what tails miss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.ops.merge_state import merge_state
from sps_runtime.sparse.estimators.bounds import ExactMass, MinMax, SketchedKeys
from sps_runtime.sparse.estimators.mixtures import Largest
from sps_runtime.sparse.estimators.moments import Deviants, MeanKey, MeanVariance, PartMeans
from sps_runtime.sparse.estimators.patterns import Antidiagonal, VerticalSlash
from sps_runtime.sparse.estimators.protocol import Estimator
from sps_runtime.sparse.reference import kept_partial, own_block
from sps_runtime.sparse.selection import (
    SelectionSettings,
    page_shares,
    representative_rows,
    select,
)
from sps_runtime.sparse.summaries import PageSummaries, paged, summarise
from sps_runtime.sparse.tail import tail_partial

PAGE = 64
NEEDS = (
    *("mean_k_NKD", "mean_v_NKD", "variance_NKD", "deviant_k_NKMD", "deviant_v_NKMD"),
    *("parts_k_NKMD", "parts_v_NKMD", "low_NKD", "high_NKD", "sketch_NKBR", "keys_NKBD"),
)
TAILS = ("none", "mean", "variance", "deviants", "parts")


@dataclass(frozen=True)
class Layer:
    """One layer of one document, in pages; q is scaled, ``[kv_heads, group, tokens, d]``."""

    q_KGTD: Tensor
    k_NKBD: Tensor
    v_NKBD: Tensor
    counts_N: Tensor
    pages: PageSummaries
    four_bits: PageSummaries
    low_rank: PageSummaries

    @property
    def blocks(self) -> int:
        """Query blocks of one page each, the last, partial one left out."""
        return self.q_KGTD.shape[2] // PAGE

    def block(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of a block, and its own partial (o, lse)."""
        q = self.q_KGTD[:, :, number * PAGE : (number + 1) * PAGE]
        own = slice(number, number + 1)
        return q, *own_block(q, self.k_NKBD[own], self.v_NKBD[own], self.counts_N[own])


def layer_of(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, scale: float, basis: Tensor) -> Layer:
    """`basis` is of `key_basis`, from another document."""
    k, counts = paged(k_SKD.float(), PAGE)
    v, _ = paged(v_SKD.float(), PAGE)
    q = q_THD.float().unflatten(1, (k_SKD.shape[1], -1)).permute(1, 2, 0, 3) * scale
    sketch = ["sketch_NKBR"]
    return Layer(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        counts,
        summarise(k, v, counts, NEEDS),
        summarise(k, v, counts, sketch, sketch_bits=4),
        summarise(k, v, counts, sketch, sketch_bits=4, basis_KDR=basis),
    )


def key_basis(k_SKD: Tensor, rank: int = 16) -> Tensor:
    """The directions ``[kv_heads, head_dim, rank]`` in which keys are largest."""
    k = k_SKD.float().transpose(0, 1)
    return torch.linalg.eigh(k.transpose(1, 2) @ k).eigenvectors[..., -rank:]


def estimators(layer: Layer, basis: Tensor) -> Mapping[str, tuple[Estimator, PageSummaries, int]]:
    """Name -> estimator, the summaries that it reads, and rows scored of a block (0: all)."""
    last = layer.q_KGTD[:, :, -PAGE:]
    probe = VerticalSlash.probe(last, layer.k_NKBD, layer.counts_N, slashes=False)
    slash = VerticalSlash(probe.vertical_KN, probe.slash_KN)
    mixture = Largest((MeanVariance(1.0), Deviants(2)))
    pages = layer.pages
    return {
        "oracle": (ExactMass(), pages, 0),
        "mean": (MeanKey(), pages, 0),
        "mean 4 rows": (MeanKey(), pages, 4),
        "mean+variance": (MeanVariance(), pages, 0),
        "mean+variance<=1": (MeanVariance(1.0), pages, 0),
        "mean+1 deviant": (Deviants(1), pages, 0),
        "mean+2 deviants": (Deviants(2), pages, 0),
        "min-max (Quest)": (MinMax(), pages, 0),
        "4 part means": (PartMeans(), pages, 0),
        "mean+var, 2 deviants": (mixture, pages, 0),
        "last-block probe": (probe, pages, 0),
        "vertical-slash": (slash, pages, 0),
        "antidiagonal 8": (Antidiagonal(8), pages, 0),
        "antidiagonal 16": (Antidiagonal(16), pages, 0),
        "sketch 2 bits": (SketchedKeys(), pages, 0),
        "sketch 2 bits 16 rows": (SketchedKeys(), pages, 16),
        "sketch 2 bits 4 rows": (SketchedKeys(), pages, 4),
        "sketch 4 bits": (SketchedKeys(), layer.four_bits, 0),
        "sketch rank 16, 4 bits": (SketchedKeys(basis), layer.low_rank, 0),
        "oracle 4 rows": (ExactMass(), pages, 4),
        "oracle 16 rows": (ExactMass(), pages, 16),
    }


def true_shares(layer: Layer) -> tuple[Tensor, Tensor]:
    """Mean and largest share over a block's rows and heads: ``[kv_heads, blocks, pages]`` each.

    The diagonal holds the block's own page.
    """
    heads, blocks = layer.k_NKBD.shape[1], layer.blocks
    mean, largest = torch.zeros(heads, blocks, blocks), torch.zeros(heads, blocks, blocks)
    for number in range(blocks):
        q, _, own = layer.block(number)
        mass = ExactMass().log_mass(q, layer.pages.first(number + 1))[..., :number]
        mass = torch.cat((mass, own[..., None]), -1)
        share = mass.softmax(-1).flatten(1, 2)
        mean[:, number, : number + 1] = share.mean(1)
        largest[:, number, : number + 1] = share.amax(1)
    return mean, largest


def estimated_shares(layer: Layer, estimator: Estimator, pages: PageSummaries, rows: int) -> Tensor:
    """Largest shares that an estimator gives: ``[kv_heads, blocks, pages]``, 0 on the diagonal."""
    found = torch.zeros(layer.k_NKBD.shape[1], layer.blocks, layer.blocks)
    for number in range(1, layer.blocks):
        q, _, own = layer.block(number)
        at = representative_rows(q.shape[2], rows)
        mass = estimator.log_mass(q[:, :, at], pages.first(number))
        found[:, number, :number] = page_shares(mass, own[:, :, at], "max")
    return found


@dataclass
class BlockTruth:
    """One query block: everything that estimators are compared with."""

    number: int
    q: Tensor
    own: tuple[Tensor, Tensor]
    mass: Tensor
    share: Tensor
    exact: Tensor


def truth(layer: Layer, number: int) -> BlockTruth:
    q, own_o, own_lse = layer.block(number)
    everything = torch.ones(layer.k_NKBD.shape[1], number, dtype=torch.bool)
    rest = kept_partial(q, layer.k_NKBD, layer.v_NKBD, everything)
    exact, lse = merge_state(own_o, own_lse, *rest)
    mass = ExactMass().log_mass(q, layer.pages.first(number))
    return BlockTruth(number, q, (own_o, own_lse), mass, torch.exp(mass - lse[..., None]), exact)


def judge(
    layer: Layer, block: BlockTruth, found: tuple[Estimator, PageSummaries, int], budget: float
) -> Iterator[tuple[int, dict[str, float]]]:
    """(KV head, figures) of one estimator on one block at an equal budget of pages."""
    estimator, pages, count = found
    rows = representative_rows(PAGE, count)
    mass = estimator.log_mass(block.q[:, :, rows], pages.first(block.number))
    own_lse = block.own[1][:, :, rows]
    settings = SelectionSettings(tau=0.0, budget=budget)
    kept = select(page_shares(mass, own_lse, "max"), 1, settings)
    best = select(block.share.flatten(1, 2).amax(1), 1, settings)
    wanted = block.share.flatten(1, 2).amax(1)
    error = mass - block.mass[:, :, rows] if mass.shape[2] == len(rows) else None
    o, lse = merge_state(*block.own, *kept_partial(block.q, layer.k_NKBD, layer.v_NKBD, kept))
    tail = tail_partial(block.q, layer.pages.first(block.number), kept, "mean")
    with_tail = merge_state(o, lse, *tail)[0]
    for head in range(len(kept)):
        share = block.share[head].flatten(0, 1)
        top, at = share.max(-1)
        needle = top > 0.25
        figures = {
            "recall": float((kept & best)[head].sum() / best[head].sum()),
            "share_recall": float(wanted[head, kept[head]].sum() / wanted[head, best[head]].sum()),
            "kept_mass": float(share[:, kept[head]].sum(-1).mean() / share.sum(-1).mean()),
            "error": relative(o[head], block.exact[head]),
            "error_tail": relative(with_tail[head], block.exact[head]),
            "needles": float(needle.sum()),
            "needles_kept": float(kept[head, at[needle]].sum()),
        }
        if error is not None:
            figures["bias"] = float(error[head].mean())
            figures["spread"] = float(error[head].std())
        yield head, figures


def tails(layer: Layer, block: BlockTruth, budget: float) -> dict[str, list[float]]:
    """Relative output error of each tail beside the oracle's pages, by KV head."""
    share = block.share.flatten(1, 2).amax(1)
    kept = select(share, 1, SelectionSettings(tau=0.0, budget=budget))
    o, lse = merge_state(*block.own, *kept_partial(block.q, layer.k_NKBD, layer.v_NKBD, kept))
    pages = layer.pages.first(block.number)
    found = {}
    for kind in TAILS:
        out = o
        if kind != "none":
            out = merge_state(o, lse, *tail_partial(block.q, pages, kept, kind))[0]
        found[kind] = [relative(out[h], block.exact[h]) for h in range(len(kept))]
    return found


def relative(o: Tensor, exact: Tensor) -> float:
    """Mean over rows of |o - exact| / |exact|."""
    return float(((o - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-6)).mean())
