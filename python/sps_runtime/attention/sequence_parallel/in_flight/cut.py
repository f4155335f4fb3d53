"""A long prefill cut into blocks of positions, which fly as micro-batches (`flight`)."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np

from sps_runtime.attention.shard_layout import Ints, ShardLayout
from sps_runtime.types.plan import StepPlan

MIN_TOKENS = 256
"""New tokens of a block, at least: smaller ones cost more calls, and reads of weights, than they
hide."""
BLOCKS = 8
"""Blocks of a rank, or of all ranks where every rank computes a part of each."""


def cut(plan: StepPlan, layout: ShardLayout) -> list[StepPlan]:
    """The plan of a single sequence as consecutive blocks of positions, each a plan whose sequence
    ends with the block. Where tokens stay with their owners (pass-KV), blocks are parts of the
    stretches that owners hold; where every rank attends to all tokens (Ulysses), or owners change
    too often, they are equally long. Under csa they end with superblocks.

    Returns:
        One plan where there is nothing to gain.
    """
    (sequence,) = plan.sequences
    size, end = layout.page_size, sequence.start + sequence.count
    first = sequence.start // size
    owners = layout.pages.owners[first:]
    least = -(-MIN_TOKENS // size)
    if plan.strategy == "ulysses":
        edges = _even(len(owners), min(BLOCKS, len(owners) // least))
    else:
        edges = _by_owner(owners, len(plan.group), least)
    positions, sparse = {int(at) for at in (first + edges) * size}, layout.sparse[0]
    if sparse is not None:
        positions = {sparse.align(at) for at in positions}
    stops = [at for at in sorted(positions) if sequence.start < at < end] + [end]
    starts = [sequence.start, *stops[:-1]]
    return [
        msgspec.structs.replace(
            plan,
            sequences=(msgspec.structs.replace(sequence, start=start, count=stop - start),),
        )
        for start, stop in zip(starts, stops, strict=True)
    ]


def _by_owner(owners: Ints, ranks: int, least: int) -> Ints:
    """Pages at which stretches of one owner, and parts of them, begin."""
    target = max(least, len(owners) // (ranks * BLOCKS))
    changes = np.flatnonzero(np.diff(owners)) + 1
    if len(changes) >= ranks * BLOCKS or len(changes) * least > len(owners):
        return _even(len(owners), len(owners) // target)
    bounds = [0, *changes.tolist(), len(owners)]
    parts = [
        begin + _even(end - begin, (end - begin) // target)
        for begin, end in itertools.pairwise(bounds)
    ]
    return np.concatenate([changes, *parts]).astype(np.int64)


def _even(length: int, parts: int) -> Ints:
    """Where all parts but the first begin."""
    return np.arange(1, parts, dtype=np.int64) * length // max(1, parts)
