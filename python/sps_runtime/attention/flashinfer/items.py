"""Runs and page lists as the arrays that calls are planned from, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sps_runtime.attention.backend import PageLists, QueryRun
from sps_runtime.attention.flashinfer.calls import Ints, Items


def of_runs(runs: Sequence[QueryRun]) -> Items:
    """Runs as items; entries lie run by run."""
    fields = [(run.row, run.count, run.position, run.kv_len, len(run.page_ids)) for run in runs]
    row, count, position, kv_len, pages = np.array(fields, dtype=np.int64).T
    return Items(
        row,
        count,
        position,
        kv_len,
        begin=np.cumsum(pages) - pages,
        pages=pages,
        ids=torch.cat([run.page_ids for run in runs]).cpu().numpy().astype(np.int64),
        positions=torch.cat([run.page_positions for run in runs]).cpu().numpy().astype(np.int64),
    )


def as_runs(items: Items) -> list[QueryRun]:
    """Items as runs, for backends that take these."""
    runs = []
    for i in range(len(items)):
        at = slice(int(items.begin[i]), int(items.begin[i] + items.pages[i]))
        ids = torch.from_numpy(items.ids[at].astype(np.int32))
        positions = torch.from_numpy(items.positions[at].astype(np.int32))
        row, count, position = (int(x[i]) for x in (items.row, items.count, items.position))
        runs.append(QueryRun(row, count, position, ids, positions, int(items.kv_len[i])))
    return runs


def of_lists(lists: PageLists, items: Ints) -> Items:
    """Page lists as items.

    Args:
        items: `lists.items`.
    """
    row, count, position, begin, pages, kv_len = items[:, :6].T
    ids, positions = (
        x.cpu().numpy().astype(np.int64) for x in (lists.page_ids, lists.page_positions)
    )
    return Items(row, count, position, kv_len, begin, pages, ids, positions)


def by_head(found: Items, fields: Ints, kv_heads: int, tokens: int) -> Items:
    """An item for each KV head; page ids count heads of pages.

    Args:
        fields: `PageLists.items`.
        tokens: of the query tensor; row ``head * tokens + row`` is a query's heads of one KV head.
    """
    first, count = fields[:, 6], fields[:, 7]
    item = np.repeat(np.arange(len(found)), count)
    head = first[item] + np.arange(len(item)) - np.repeat(np.cumsum(count) - count, count)
    pages = found.pages[item]
    begin = np.cumsum(pages) - pages
    place = np.repeat(found.begin[item] - begin, pages) + np.arange(int(pages.sum()))
    return Items(
        row=head * tokens + found.row[item],
        count=found.count[item],
        position=found.position[item],
        kv_len=found.kv_len[item],
        begin=begin,
        pages=pages,
        ids=found.ids[place] * kv_heads + np.repeat(head, pages),
        positions=found.positions[place],
    )
