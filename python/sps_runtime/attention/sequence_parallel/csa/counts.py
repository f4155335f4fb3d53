"""What a step's sparse attention read, and what of it came from other ranks (contract 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints
from sps_runtime.attention.sparse_blocks import Mask, SparseBlocks, pairs, summaries_due
from sps_runtime.sparse.audit import RECORD
from sps_runtime.sparse.operators import Chosen
from sps_runtime.types.attention import SparseCounters


class SparseCounts:
    """Counts over the layers of one step, by sequence; layers with a window are not in them.

    A page of another rank counts once a layer for each KV head that some query block reads, its
    summary once a layer for each KV head in the step in which it comes (`summaries_due`).

    Args:
        need: pages of the layout's table that exact attention of the sparse rows would read.
        alone: `sparse_blocks.alone_pages`; they count as pairs, and what is remote of them is
            counted by whoever reads them.
        due: pages whose summaries come in this step, where those are not `summaries_due` of `need`.
    """

    def __init__(self, step: StepState, need: Mask, alone: Ints, due: Mask | None = None) -> None:
        layout, context = step.layout, step.context
        self._step = step
        self._first = layout.pages.first
        remote = layout.pages.owners != context.mesh.sp_rank
        self._remote = remote
        self._remote_pages = self._by_sequence(need & remote)
        self._near = step.readable()
        due = summaries_due(layout, need) if due is None else due
        self._new_summaries = due & remote
        shape, sparse = context.store.shape, context.sparse
        self._kv_heads = shape.kv_heads
        self._alone = alone * shape.kv_heads
        self._page_bytes = shape.token_bytes * shape.page_size // shape.kv_heads
        self._summary_bytes = 0 if sparse is None else sparse.store.nbytes
        names = ("read", "causal", "fetched", "remote", "bytes", "fallbacks")
        self._sums = {name: np.zeros(len(layout.counts), dtype=np.int64) for name in names}
        self._audits = [bytearray() for _ in layout.counts]

    def begin_layer(self) -> None:
        """Count what every sparse layer costs whatever is chosen."""
        self._sums["read"] += self._alone
        self._sums["causal"] += self._alone
        self._sums["remote"] += self._remote_pages * self._kv_heads
        self._receive(self._new_summaries[:, None], self._kv_heads * self._summary_bytes)

    def add(self, blocks: SparseBlocks, chosen: Chosen, wanted: Mask, read: Mask) -> None:
        """Count a choice.

        Args:
            wanted: ``[pages of the layout's table, kv_heads]`` that attention read.
            read: that attention or an audit read, from here or fetched.
        """
        page_size = self._step.layout.page_size
        for name, count in zip(
            ("read", "causal"), pairs(blocks, chosen, page_size, self._kv_heads), strict=True
        ):
            np.add.at(self._sums[name], blocks.sequences, count)
        fetched = self._by_sequence((wanted & self._remote[:, None]).sum(1))
        self._sums["fetched"] += fetched
        self._receive(read & self._remote[:, None], self._page_bytes)

    def fall_back(self, sequences: Sequence[int]) -> None:
        """Superblocks and heads of these sequences, one each, read all their pages."""
        np.add.at(self._sums["fallbacks"], sequences, 1)

    def route(self, sequence: int, nbytes: int) -> None:
        """Bytes that an exchange of the group sent for a sequence, and counted as traffic."""
        self._sums["bytes"][sequence] += nbytes

    def ask(self, places: Ints) -> None:
        """Count a question about pages at `places` of the layout's table, ascending: a bit for each
        KV head (`far_pages.pack_bits`)."""
        of = np.searchsorted(self._first, places, side="right") - 1
        bits = np.bincount(of, minlength=len(self._first) - 1) * self._kv_heads
        self._sums["bytes"] += np.diff(-(-np.cumsum(bits) // 8), prepend=0)

    def weigh(self, sequences: Ints, q_AHD: Tensor) -> None:
        """Count audited rows that owners weighed: queries like these travel there, and the fp32
        weight of each head back."""
        _, heads, dim = q_AHD.shape
        nbytes = heads * (dim * q_AHD.itemsize + 4)
        rows = np.bincount(sequences, minlength=len(self._first) - 1)
        self._sums["bytes"] += rows * nbytes

    def read_in_place(self, sequence: int, pages: int) -> None:
        """Pages of one KV head that an audit read on ranks outside of the group."""
        self.route(sequence, pages * self._page_bytes)
        self._step.context.traffic.attention_bytes += pages * self._page_bytes

    def record(
        self, sequence: int, layer: int, head: int, position: int, mean: float, most: float
    ) -> None:
        """Keep what was measured (`sparse.audit.RECORD`)."""
        self._audits[sequence] += RECORD.pack(layer, head, position, mean, most)

    def of_sequences(self) -> tuple[SparseCounters, ...]:
        """Those of the sequences that this rank computed sparse rows of, or got summaries of."""
        found = {name: sums.tolist() for name, sums in self._sums.items()}
        return tuple(
            SparseCounters(
                slot=self._step.layout.board_slots[sequence],
                read_pairs=found["read"][sequence],
                causal_pairs=causal,
                fetched_units=found["fetched"][sequence],
                remote_units=found["remote"][sequence],
                remote_bytes=found["bytes"][sequence],
                fallbacks=found["fallbacks"][sequence],
                audits=bytes(self._audits[sequence]),
            )
            for sequence, causal in enumerate(found["causal"])
            if causal or found["bytes"][sequence]
        )

    def _receive(self, units: Mask, nbytes: int) -> None:
        """Units ``[pages, any]`` of so many bytes; those of other hosts are traffic of who sends
        them."""
        each = units.sum(1)
        self._sums["bytes"] += self._by_sequence(each) * nbytes
        near = int(each[self._near].sum()) * nbytes
        self._step.context.traffic.attention_bytes += near

    def _by_sequence(self, of_pages: Mask | Ints) -> Ints:
        """Sums over each sequence's pages."""
        before = np.concatenate(([0], np.cumsum(of_pages)))
        sums: Ints = np.diff(before[self._first])
        return sums


class BlockCounts:
    """The counts of one block of a step's rows, whose page table is the beginning of the step's.

    Args:
        counted: ``[2, pages of the step's table, kv_heads]`` that other blocks have wanted, and
            have read, in this layer: they cross once.
    """

    def __init__(self, counts: SparseCounts, counted: Mask) -> None:
        self._counts, self._counted = counts, counted

    def add(self, blocks: SparseBlocks, chosen: Chosen, wanted: Mask, read: Mask) -> None:
        """As `SparseCounts.add`."""
        before = self._counted[:, : len(wanted)]
        masks = np.stack((wanted, read))
        fresh = np.zeros_like(self._counted)
        fresh[:, : len(wanted)] = masks & ~before
        before |= masks
        self._counts.add(blocks, chosen, *fresh)

    def fall_back(self, sequences: Sequence[int]) -> None:
        """As `SparseCounts.fall_back`."""
        self._counts.fall_back(sequences)

    def record(
        self, sequence: int, layer: int, head: int, position: int, mean: float, most: float
    ) -> None:
        """As `SparseCounts.record`."""
        self._counts.record(sequence, layer, head, position, mean, most)
