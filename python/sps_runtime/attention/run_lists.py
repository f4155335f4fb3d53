"""Runs as arrays, made once for the layers of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.attention.backend import PageLists, QueryRun

_REMEMBERED = 8


@dataclass(frozen=True)
class RunLists:
    """Runs as lists. Holds on to `runs`, so that no other sequence gets its identity.

    Attributes:
        lists: an item for each run.
        rows: query rows in all runs.
        longest: rows of the longest run.
        pages: pages of the longest list.
    """

    runs: Sequence[QueryRun]
    lists: PageLists
    rows: int
    longest: int
    pages: int


class RunListCache:
    """The lists of the last few sequences of runs: a step's layers pass the same one."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, str], RunLists] = {}

    def get(
        self, runs: Sequence[QueryRun], kv_heads: int, device: torch.device | str = "cpu"
    ) -> RunLists:
        """At least one run; arrays on `device`."""
        key = (id(runs), kv_heads, str(device))
        made = self._made.get(key)
        if made is None:
            if len(self._made) >= _REMEMBERED:
                del self._made[next(iter(self._made))]
            made = self._made[key] = _make(runs, kv_heads, device)
        return made


def _make(runs: Sequence[QueryRun], kv_heads: int, device: torch.device | str) -> RunLists:
    items, at = [], 0
    for run in runs:
        pages = len(run.page_ids)
        items.append((run.row, run.count, run.position, at, pages, run.kv_len, 0, kv_heads))
        at += pages

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    lists = PageLists(
        there(torch.tensor(items, dtype=torch.int32)),
        there(torch.cat([run.page_ids for run in runs])),
        there(torch.cat([run.page_positions for run in runs])),
    )
    rows = [run.count for run in runs]
    return RunLists(runs, lists, sum(rows), max(rows), max(len(run.page_ids) for run in runs))
