"""Steps whose sequences are computed by stride attention, and its definition in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
from test.dist.step_case import SLOTS, StepCase
from torch import Tensor

from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.types.attention import AttentionSpec, SparseSettings


def spec(stride: int, levels: tuple[tuple[int, int], ...] = ()) -> AttentionSpec:
    """Superblocks of one token: a step may begin anywhere."""
    settings = SparseSettings(estimator="stride", stride=stride, levels=levels, superblock=1)
    return AttentionSpec("csa", settings)


@dataclass
class StrideCase(StepCase):
    """A step whose sequences are computed as `specs` say (the last one also stands for the rest),
    and its definition in plain torch: layer 0 runs exact where it has a window."""

    specs: Sequence[AttentionSpec] = (spec(4),)

    def __post_init__(self) -> None:
        super().__post_init__()
        specs = [*self.specs, *[self.specs[-1]] * len(self.sequences)][: len(self.sequences)]
        sequences = [
            msgspec.structs.replace(sequence, attention=how)
            for sequence, how in zip(self.plan.sequences, specs, strict=True)
        ]
        self.plan = msgspec.structs.replace(self.plan, sequences=tuple(sequences))
        self.layout = ShardLayout(self.plan, page_size=self.page, pages_per_rank=SLOTS)

    def truth(self, layer: int, window: int | None) -> Tensor:
        if window is not None or len(self.group) == 1:
            return super().truth(layer, window)
        outs = []
        for index, ((start, count), q, k, v) in enumerate(
            zip(self.sequences, self.q, self.k, self.v, strict=True)
        ):
            keys, values = self._read(k[layer]), self._read(v[layer])
            seen = torch.stack([self._seen(index, kv, start, count) for kv in range(self.kv_heads)])
            seen = seen.repeat_interleave(self.heads // self.kv_heads, 0)
            group = self.heads // self.kv_heads
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            score = torch.einsum("thd,shd->hts", q[layer].double(), keys.double()) * self.dim**-0.5
            weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hts,shd->thd", weight, values.double()).float())
        return torch.cat(outs)

    def _seen(self, index: int, kv_head: int, start: int, count: int) -> Tensor:
        """Which keys each new token's head sees: bool ``[new tokens, tokens]``."""
        queries, keys = torch.arange(start, start + count), torch.arange(start + count)
        causal = keys[None] <= queries[:, None]
        settings = self.plan.sequences[index].attention.sparse
        if settings is None or count == 1:
            return causal
        owners = torch.tensor(self.page_lists[index])[keys // self.page] // SLOTS
        member = torch.full((self.sp,), -1)
        member[list(self.group)] = torch.arange(len(self.group))
        at = member[owners]
        seen = at[None] == at[start:, None]
        inner = 1
        levels = [pair for pair in settings.levels if 1 < pair[0] < len(self.group)]
        for ranks, stride in [*levels, (len(self.group), settings.stride)]:
            top = ranks == len(self.group)
            together = (at[None] // ranks == at[start:, None] // ranks) | (top & (at < 0))[None]
            below = (at[None] // inner == at[start:, None] // inner) & (at >= 0)[None]
            phase = kv_head % stride
            kept = (keys % stride == phase)[None] & (queries % stride == phase)[:, None]
            seen |= together & ~below & kept
            inner = ranks
        return seen & causal
