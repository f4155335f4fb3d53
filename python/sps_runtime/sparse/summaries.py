"""What is known of a page without its keys: computed once, when the page has been written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Field = str
MEANS = frozenset({"mean_k_NKD", "mean_v_NKD"})


@dataclass(frozen=True)
class PageSummaries:
    """Summaries of N pages of one layer; fp32, absent where nothing needs them.

    Attributes:
        counts_N: int64, tokens in each page.
        mean_k_NKD, mean_v_NKD: means of keys (rope applied) and of values.
        variance_NKD: diagonal variance of keys around their mean.
        deviant_k_NKMD, deviant_v_NKMD: the M keys farthest from their page's mean, their values.
        parts_k_NKMD, parts_v_NKMD: means of M equal runs of a page's tokens.
        low_NKD, high_NKD: the least and greatest of each channel (Quest, Tang et al. 2024).
        sketch_NKBR: the keys rounded to a few bits a channel between the page's least and greatest
            (KIVI's per-channel form, Liu et al. 2024), as the numbers that the codes stand for;
            with a basis, the keys' coordinates in it (Loki, Singhania et al. 2024).
        keys_NKBD: the keys themselves, for estimators that read all of them.
    """

    counts_N: Tensor
    mean_k_NKD: Tensor | None = None
    mean_v_NKD: Tensor | None = None
    variance_NKD: Tensor | None = None
    deviant_k_NKMD: Tensor | None = None
    deviant_v_NKMD: Tensor | None = None
    parts_k_NKMD: Tensor | None = None
    parts_v_NKMD: Tensor | None = None
    low_NKD: Tensor | None = None
    high_NKD: Tensor | None = None
    sketch_NKBR: Tensor | None = None
    keys_NKBD: Tensor | None = None

    @property
    def pages(self) -> int:
        return self.counts_N.shape[0]

    def first(self, pages: int) -> PageSummaries:
        """Those of the first pages."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t[:pages] for n, t in found.items() if t is not None})

    def get(self, name: Field) -> Tensor:
        """A field that must be there.

        Raises:
            ValueError: when it was not computed.
        """
        found = getattr(self, name)
        if not isinstance(found, Tensor):
            raise ValueError(f"page summaries lack {name}")
        return found


def summarise(
    k_NKBD: Tensor,
    v_NKBD: Tensor,
    counts_N: Tensor,
    needs: Iterable[Field] = MEANS,
    *,
    deviants: int = 2,
    parts: int = 4,
    sketch_bits: int = 2,
    basis_KDR: Tensor | None = None,
) -> PageSummaries:
    """Summaries of pages as the pool keeps them; tokens from ``counts_N`` on are not looked at.

    Args:
        k_NKBD, v_NKBD: ``[pages, kv_heads, page_size, head_dim]``, any float dtype.
        counts_N: tokens that each page holds, 1 to page_size.
        needs: the names of the fields to fill.
        deviants, parts: how many deviant keys, and how many runs, of a page.
        sketch_bits: bits a channel of the sketch.
        basis_KDR: orthonormal columns that the sketch keeps of a key; None for all channels.
    """
    wanted = set(needs)
    size = k_NKBD.shape[2]
    there_NB = torch.arange(size)[None] < counts_N[:, None]
    there = there_NB[:, None, :, None]
    k, v = k_NKBD.float() * there, v_NKBD.float() * there
    count = counts_N.float()[:, None, None]
    mean_k, mean_v = k.sum(2) / count, v.sum(2) / count
    made: dict[str, Tensor] = {"mean_k_NKD": mean_k, "mean_v_NKD": mean_v}
    away = (k - mean_k[:, :, None]) * there
    if "variance_NKD" in wanted:
        made["variance_NKD"] = away.square().sum(2) / count
    if wanted & {"deviant_k_NKMD", "deviant_v_NKMD"}:
        at = away.square().sum(-1).topk(deviants, dim=-1).indices
        index = at[..., None].expand(-1, -1, -1, k.shape[-1])
        made["deviant_k_NKMD"], made["deviant_v_NKMD"] = k.gather(2, index), v.gather(2, index)
    if wanted & {"parts_k_NKMD", "parts_v_NKMD"}:
        share = part_counts(counts_N, size, parts).clamp_min(1).float()[:, None, :, None]
        made["parts_k_NKMD"] = k.unflatten(2, (parts, -1)).sum(3) / share
        made["parts_v_NKMD"] = v.unflatten(2, (parts, -1)).sum(3) / share
    if wanted & {"low_NKD", "high_NKD"}:
        made["low_NKD"] = k.masked_fill(~there, torch.inf).amin(2)
        made["high_NKD"] = k.masked_fill(~there, -torch.inf).amax(2)
    if "sketch_NKBR" in wanted:
        seen = k if basis_KDR is None else torch.einsum("nkbd,kdr->nkbr", k, basis_KDR)
        made["sketch_NKBR"] = sketch(seen, there, sketch_bits)
    if "keys_NKBD" in wanted:
        made["keys_NKBD"] = k
    return PageSummaries(counts_N, **{n: t for n, t in made.items() if n in wanted})


def sketch(k_NKBR: Tensor, there: Tensor, bits: int) -> Tensor:
    """Keys rounded to ``2 ** bits`` levels from low to high of each page's channel, the ends in."""
    low = k_NKBR.masked_fill(~there, torch.inf).amin(2, keepdim=True)
    high = k_NKBR.masked_fill(~there, -torch.inf).amax(2, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-9)
    rounded: Tensor = low + ((k_NKBR - low) / step).round().clamp(0, 2**bits - 1) * step
    return rounded


def part_counts(counts_N: Tensor, size: int, parts: int) -> Tensor:
    """Tokens in each of a page's runs ``[pages, parts]``; 0 in those that a short page lacks."""
    run = size // parts
    return (counts_N[:, None] - torch.arange(parts) * run).clamp(0, run)


def paged(x_SKD: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[tokens, kv_heads, head_dim]`` as pages ``[pages, kv_heads, page_size, head_dim]``
    (the last filled up with zeros), and how many tokens each page holds."""
    tokens = x_SKD.shape[0]
    pages = -(-tokens // page_size)
    full = torch.nn.functional.pad(x_SKD, (0, 0, 0, 0, 0, pages * page_size - tokens))
    counts = (tokens - torch.arange(pages) * page_size).clamp(max=page_size)
    return full.unflatten(0, (pages, page_size)).transpose(1, 2), counts


def share_of_kv(
    needs: Iterable[Field],
    page_size: int,
    *,
    deviants: int = 2,
    parts: int = 4,
    sketch_bits: int = 2,
    rank_share: float = 1.0,
) -> float:
    """Bytes of a page's summaries over those of its keys and values, all in the pool's 2-byte dtype
    but the sketch, which is packed and brings the ends of each channel along.

    Args:
        rank_share: channels of the sketch over head_dim.
    """
    vectors = {
        "deviant_k_NKMD": deviants,
        "deviant_v_NKMD": deviants,
        "parts_k_NKMD": parts,
        "parts_v_NKMD": parts,
        "sketch_NKBR": (page_size * sketch_bits / 16 + 2) * rank_share,
        "keys_NKBD": page_size,
    }
    return sum(vectors.get(name, 1) for name in set(needs)) / (2 * page_size)
