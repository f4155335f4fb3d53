"""Changing what was chosen for some (query block, KV head): arrays only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import PageLists, Partial
from sps_runtime.attention.shard_layout import Ints, ShardLayout
from sps_runtime.attention.sparse_blocks import Mask, SparseBlocks
from sps_runtime.sparse.operators import Chosen, QueryBlocks


def page_lists(chosen: Chosen, complete: bool = False) -> PageLists:
    """The lists of all items."""
    return PageLists(chosen.items, chosen.page_ids, chosen.page_positions, complete)


def take_items(chosen: Chosen, items: Ints) -> PageLists:
    """The lists of some items."""
    lists = page_lists(chosen)
    return replace(lists, items=chosen.items[torch.from_numpy(items)].contiguous())


def take_blocks(queries: QueryBlocks, blocks: Ints) -> QueryBlocks:
    """Some query blocks, whole superblocks of them."""
    taken = queries.blocks[torch.from_numpy(blocks)].contiguous()
    numbers, taken[:, 3] = torch.unique(taken[:, 3], return_inverse=True)
    return QueryBlocks(taken, queries.page_ids, len(numbers))


def kept_pages(lists: PageLists, kept: Mask) -> PageLists:
    """The same lists without those of their `page_ids` that are not `kept`."""
    items = lists.items.clone()
    items[:, 3:5] = kept_spans(items[:, 3:5], kept)
    some = torch.from_numpy(kept)
    return replace(
        lists,
        items=items,
        page_ids=lists.page_ids[some],
        page_positions=lists.page_positions[some],
    )


def kept_spans(spans: Tensor, kept: Mask) -> Tensor:
    """First and number of entries ``[n, 2]`` once only those that are kept are left."""
    left = np.concatenate(([0], np.cumsum(kept)))
    begin, count = spans.numpy().T
    first = left[begin]
    return torch.from_numpy(np.stack((first, left[begin + count] - first), 1).astype(np.int32))


def all_pages(layout: ShardLayout, blocks: SparseBlocks, kv_heads: int) -> Chosen:
    """What exact attention reads."""
    table = blocks.queries.blocks.numpy()
    row, rows, position, _, entry, kv_len = np.repeat(table, kv_heads, axis=0).T
    pages = -(-(position + rows) // layout.page_size)
    heads = np.tile(np.arange(kv_heads), len(table))
    fields = (row, rows, position, entry, pages, kv_len, heads, np.ones_like(heads))
    nothing = torch.zeros((len(heads), 2), dtype=torch.int32)
    return Chosen(
        items=torch.from_numpy(np.stack(fields, axis=1).astype(np.int32)),
        page_ids=blocks.queries.page_ids,
        page_positions=torch.from_numpy(layout.pages.positions),
        dropped=nothing,
        dropped_ids=nothing[:0, 0],
        read_pairs=int(pages.sum()),
        causal_pairs=int(pages.sum()),
    )


def put_items(chosen: Chosen, items: Ints, other: Chosen, other_items: Ints) -> Chosen:
    """A choice with some of its items taken from another."""
    to, source = torch.from_numpy(items), torch.from_numpy(other_items)
    changed, dropped = chosen.items.clone(), chosen.dropped.clone()
    changed[to] = other.items[source]
    changed[to, 3] += len(chosen.page_ids)
    dropped[to] = other.dropped[source]
    dropped[to, 0] += len(chosen.dropped_ids)
    return Chosen(
        items=changed,
        page_ids=torch.cat((chosen.page_ids, other.page_ids)),
        page_positions=torch.cat((chosen.page_positions, other.page_positions)),
        dropped=dropped,
        dropped_ids=torch.cat((chosen.dropped_ids, other.dropped_ids)),
        read_pairs=int(changed[:, 4].sum()),
        causal_pairs=chosen.causal_pairs,
    )


def put_partial(kept: Partial, lists: PageLists, new: Partial, group: int) -> None:
    """Replace what is of the lists' (rows, KV heads of `group` query heads each), in place."""
    for row, rows, _, _, _, _, head, heads in lists.items.tolist():
        cut = (slice(row, row + rows), slice(head * group, (head + heads) * group))
        kept.o[cut], kept.lse[cut] = new.o[cut], new.lse[cut]
