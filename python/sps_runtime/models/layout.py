"""Where every weight lies in memory: planned once, the same for all ranks of a host.

Each TP rank's slice is contiguous, with q, k, v adjacent and gate, up adjacent, so that a rank that
uses its slice whole multiplies by them in one call. Weights that all TP ranks need alike (norms,
the embedding) lie there once. Weights of linear layers are packed where kernels are there to
multiply by them (`ops.packing`) and no SP rank's share would cut a panel; all others are plain. Of
packed weights whose columns SP ranks share, each rank's columns are contiguous too: read from among
the others' they arrive at half the rate. A tied head is a view of the embedding; where it is packed
without loss, and whole, the embedding has no memory of its own instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch

from sps_runtime.config.model import ModelConfig
from sps_runtime.distributed.mesh import shares
from sps_runtime.layers.placement import unit_shares
from sps_runtime.ops.packing import GROUP, Packing
from sps_runtime.ops.weight import PANEL_ROWS, column_step

ALIGNMENT = 64
Bounds = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A slice of a checkpoint's tensor.

    Attributes:
        source: the tensor's name in the checkpoint.
        source_shape: the shape it must have there.
        dim: the dim that `begin` and `end` cut.
    """

    source: str
    source_shape: tuple[int, ...]
    dim: int
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        cut = list(self.source_shape)
        cut[self.dim] = self.end - self.begin
        return tuple(cut)


@dataclass(frozen=True)
class Entry:
    """One tensor in memory: its parts one after the other along dim 0, at a byte offset.

    Attributes:
        linear: whether it is the weight of a linear layer.
        kind: what it is packed as; "" is plain.
        cuts: columns between which a packed weight lies in memory of its own.
    """

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    linear: bool
    kind: str = ""
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Attributes:
    entries: (TP rank, name) -> entry; equal entries are the same memory.
    unit: columns of the MLP's inner activation, and of the logits, that SP ranks do not part.
    packing: how packed entries are packed; None where all are plain.
    """

    tp_size: int
    dtype: torch.dtype
    nbytes: int
    entries: dict[tuple[int, str], Entry]
    unit: int
    packing: Packing | None = None

    def of(self, tp_rank: int, *, linear: bool) -> Iterator[tuple[str, Entry]]:
        """One TP rank's (name, entry): weights of linear layers, or all others."""
        for (rank, name), entry in self.entries.items():
            if rank == tp_rank and entry.linear == linear:
                yield name, entry

    def slice(self, tp_rank: int) -> Layout:
        """What one TP rank needs, without the others' slices."""
        mine = [(key, entry) for key, entry in self.entries.items() if key[0] == tp_rank]
        placed: dict[tuple[int, str], Entry] = {}
        end = 0
        for key, entry in mine:
            if entry.parts:
                placed[key] = replace(entry, offset=_aligned(end))
                end = placed[key].offset + entry.nbytes
        table = (tp_rank, "embed")
        for key, entry in mine:
            if not entry.parts:  # a tied head: rows of the embedding
                shift = placed[table].offset - self.entries[table].offset
                placed[key] = replace(entry, offset=entry.offset + shift)
        return replace(self, nbytes=end, entries=placed)

    def digest(self) -> bytes:
        """32 bytes that differ between any two different layouts."""
        text = repr((self.tp_size, str(self.dtype), self.nbytes, sorted(self.entries.items())))
        return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True)
class _Weight:
    """A weight of the model: `sources` are concatenated after each is cut as `cut` says.

    Attributes:
        unit: of a linear weight, columns (where they are cut, else rows) that SP ranks do not part.
    """

    name: str
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    cut: Literal["none", "rows", "kv_rows", "columns", "vocab"] | tuple[str, ...] = "none"
    unit: int = 0

    @property
    def linear(self) -> bool:
        """Whether a linear layer multiplies by it: matrices do, but for the embedding's table."""
        return len(self.sources[0][1]) == 2 and self.name != "embed"


def plan_layout(
    config: ModelConfig,
    tp_size: int,
    dtype: torch.dtype,
    packing: Packing | None = None,
    sp_size: int = 1,
) -> Layout:
    """Plan the memory of `config`'s weights for `tp_size` ranks (`config.model.check_degrees`).

    Args:
        packing: how linear weights are packed, None to have all plain.
        sp_size: SP ranks that may share the columns of a weight.
    """
    entries: dict[tuple[int, str], Entry] = {}
    unit = PANEL_ROWS if packing is None else packing.unit
    tied_view = config.tie_word_embeddings and packing is None
    tied_rows = config.tie_word_embeddings and tp_size == 1 and _lossless(packing)
    end = 0

    def place(weight: _Weight, rank: int) -> Entry:
        nonlocal end
        parts = _parts(config, weight, tp_size, rank)
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        cuts: tuple[int, ...] = ()
        kind, nbytes = "", prod(shape) * dtype.itemsize
        if packing is not None and weight.linear:
            kind = _packed_kind(weight, parts, packing, dtype)
        if packing is not None and kind:
            cuts = _cuts(weight, parts, sp_size)
            n, k = shape
            nbytes = packing.nbytes(n, k, kind, cuts)
        entry = Entry(_aligned(end), nbytes, shape, parts, weight.linear, kind, cuts)
        end = entry.offset + nbytes
        return entry

    for weight in _weights(config, unit):
        if weight.name == ("head" if tied_view else "embed" if tied_rows else ""):
            continue
        if weight.cut == "none":
            entry = place(weight, 0)
            entries.update({(rank, weight.name): entry for rank in range(tp_size)})
            continue
        for rank in range(tp_size):
            entries[rank, weight.name] = place(weight, rank)
    if tied_view:
        entries.update(_tied_head(config, entries[0, "embed"], tp_size, dtype))
    return Layout(tp_size, dtype, end, entries, unit, packing)


def _lossless(packing: Packing | None) -> bool:
    """Whether rows of a packed weight are those that were packed."""
    return packing is not None and packing.quantization == "none"


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _packed_kind(
    weight: _Weight, parts: tuple[Part, ...], packing: Packing, dtype: torch.dtype
) -> str:
    """What to pack a linear weight as: "" where its parts, or SP ranks' shares of it, would not
    lie in panels of their own."""
    kind = packing.kind(dtype, weight.name)
    if parts[0].dim == 1:
        fits = weight.unit % column_step(kind, GROUP) == 0
    else:
        whole_parts = all(part.shape[0] % PANEL_ROWS == 0 for part in parts[:-1])
        fits = whole_parts and weight.unit % PANEL_ROWS == 0
    return kind if fits else ""


def _cuts(weight: _Weight, parts: tuple[Part, ...], sp_size: int) -> tuple[int, ...]:
    """Columns at which the shares of SP ranks meet, where these share columns."""
    if parts[0].dim == 0:
        return ()
    shares_of_ranks = unit_shares(parts[0].shape[1], weight.unit, sp_size)
    return tuple(begin for begin, _ in shares_of_ranks[1:])


def _tied_head(
    config: ModelConfig, embed: Entry, tp_size: int, dtype: torch.dtype
) -> Iterator[tuple[tuple[int, str], Entry]]:
    """The head's slices as rows of the embedding; they have no parts to read."""
    row_bytes = config.hidden_size * dtype.itemsize
    for rank, (begin, end) in enumerate(shares(config.vocab_size, tp_size)):
        shape = (end - begin, config.hidden_size)
        offset, nbytes = embed.offset + begin * row_bytes, (end - begin) * row_bytes
        yield (rank, "head"), Entry(offset, nbytes, shape, (), linear=True)


def _parts(config: ModelConfig, weight: _Weight, tp_size: int, rank: int) -> tuple[Part, ...]:
    cuts = weight.cut if isinstance(weight.cut, tuple) else (weight.cut,) * len(weight.sources)
    parts = []
    for (source, shape), cut in zip(weight.sources, cuts, strict=True):
        dim = 1 if cut == "columns" else 0
        begin, end = _bounds(config, cut, shape[dim], tp_size, rank)
        parts.append(Part(source, shape, dim, begin, end))
    return tuple(parts)


def _bounds(config: ModelConfig, cut: str, size: int, tp_size: int, rank: int) -> Bounds:
    if cut == "none":
        return 0, size
    if cut == "vocab":
        return shares(size, tp_size)[rank]
    if cut == "kv_rows":
        heads = config.kv_heads_per_rank(tp_size)
        first = rank * config.num_kv_heads // tp_size
        return first * config.head_dim, (first + heads) * config.head_dim
    share = size // tp_size
    return rank * share, (rank + 1) * share


def _weights(config: ModelConfig, unit: int) -> Iterator[_Weight]:
    """All weights in the order in which they lie, under the names of Hugging Face checkpoints."""
    vocab, hidden = config.vocab_size, config.hidden_size
    table = "model.embed_tokens.weight"
    head = table if config.tie_word_embeddings else "lm_head.weight"
    yield _Weight("embed", ((table, (vocab, hidden)),))
    for layer in range(config.num_layers):
        yield from _layer_weights(config, layer, unit)
    yield _Weight("norm", (("model.norm.weight", (hidden,)),))
    yield _Weight("head", ((head, (vocab, hidden)),), "vocab", unit)


def _layer_weights(config: ModelConfig, layer: int, unit: int) -> Iterator[_Weight]:
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    qkv = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
    gate_up = (("gate_proj", inner), ("up_proj", inner))
    qkv_cut = ("rows", "kv_rows", "kv_rows")

    def vector(name: str, source: str, size: int) -> _Weight:
        return _Weight(f"{ours}.{name}", ((f"{theirs}.{source}", (size,)),))

    def stacked(
        name: str, block: str, parts: tuple[tuple[str, int], ...], cut: tuple[str, ...], unit: int
    ) -> _Weight:
        sources = tuple((f"{block}.{part}.weight", (size, hidden)) for part, size in parts)
        return _Weight(f"{ours}.{name}", sources, cut, unit)

    def biases(name: str, weight: _Weight) -> _Weight:
        sources = tuple(
            (f"{s.removesuffix('weight')}bias", shape[:1]) for s, shape in weight.sources
        )
        return _Weight(f"{ours}.{name}", sources, weight.cut)

    yield vector("attention_norm", "input_layernorm.weight", hidden)
    fused = stacked("qkv", attention, qkv, qkv_cut, dim)
    yield fused
    if config.qkv_bias:
        yield biases("qkv_bias", fused)
    if config.qk_norm:
        yield vector("q_norm", "self_attn.q_norm.weight", dim)
        yield vector("k_norm", "self_attn.k_norm.weight", dim)
    yield _Weight(f"{ours}.output", ((f"{attention}.o_proj.weight", (hidden, q)),), "columns", dim)
    if config.output_bias:
        yield vector("output_bias", "self_attn.o_proj.bias", hidden)
    yield vector("mlp_norm", "post_attention_layernorm.weight", hidden)
    fused = stacked("gate_up", mlp, gate_up, ("rows", "rows"), unit)
    yield fused
    if config.mlp_bias:
        yield biases("gate_up_bias", fused)
    yield _Weight(f"{ours}.down", ((f"{mlp}.down_proj.weight", (hidden, inner)),), "columns", unit)
    if config.mlp_bias:
        yield vector("down_bias", "mlp.down_proj.bias", hidden)
