"""Steps of one rank (or of TP peers in threads) with plain torch: what models are tested in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sps_runtime.layers.step import LinearPlacement, StepContext
from sps_runtime.models.decoder import Decoder
from sps_runtime.ops.operators import TORCH, Operators
from sps_runtime.ops.weight import Weight


class PlainPlacement(LinearPlacement):
    """One rank, full weights. `whole` may be switched off to take the layers' other path."""

    def __init__(self, whole: bool = True, ops: Operators = TORCH) -> None:
        self._whole = whole
        self.ops = ops

    @property
    def whole(self) -> bool:
        return self._whole

    def enter(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def column(
        self, x_TD: Tensor, weight_ND: Weight, bias_N: Tensor | None = None, unit: int = 1
    ) -> Tensor:
        return self.ops.linear(x_TD, weight_ND, bias_N)

    def row(self, y_TN: Tensor, weight_DN: Weight, unit: int = 1) -> Tensor:
        return self.ops.linear(y_TN, weight_DN)

    def leave(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def to_tokens(self, y_TN: Tensor, columns: int, unit: int = 1) -> Tensor:
        assert y_TN.shape[1] == columns
        return y_TN

    def to_columns(self, y_TN: Tensor, unit: int = 1) -> Tensor:
        return y_TN

    def gather_vocab(self, y_RN: Tensor, vocab: int) -> Tensor:
        assert y_RN.shape[1] == vocab
        return y_RN


class Meeting:
    """Where the threads of a TP group lay what they exchange."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.items: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, item: Tensor) -> list[Tensor]:
        self.items[rank] = item
        self.barrier.wait()
        everyone = list(self.items)
        self.barrier.wait()
        return everyone


class ThreadTPPlacement(PlainPlacement):
    """One TP rank among threads; every thread has all tokens."""

    def __init__(self, rank: int, meeting: Meeting, ops: Operators) -> None:
        super().__init__(ops=ops)
        self.rank, self.meeting = rank, meeting

    def leave(self, x_TD: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, x_TD)).sum(0)

    def gather_vocab(self, y_RN: Tensor, vocab: int) -> Tensor:
        y_RV = torch.cat(self.meeting.exchange(self.rank, y_RN), dim=1)
        assert y_RV.shape[1] == vocab
        return y_RV


@dataclass
class OneSequence:
    """Attention over one sequence whose keys and values it keeps, layer by layer."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    length: int = 0

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        if layer in self.keys:
            k_TKD = torch.cat((self.keys[layer], k_TKD))
            v_TKD = torch.cat((self.values[layer], v_TKD))
        self.keys[layer], self.values[layer] = k_TKD, v_TKD
        key = torch.arange(len(k_TKD))
        query = key[len(key) - len(q_THD) :, None]
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        o_HTD = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1),
            k_TKD.transpose(0, 1),
            v_TKD.transpose(0, 1),
            attn_mask=seen,
            scale=scale,
            enable_gqa=True,
        )
        return o_HTD.transpose(0, 1)


def logits_of(
    model: Decoder,
    tokens: Sequence[int],
    chunks: Sequence[int] | None = None,
    make_placement: Callable[[], LinearPlacement] = PlainPlacement,
) -> Tensor:
    """Logits ``[len(tokens), vocab]``, computed in chunks of the given sizes (one unless told)."""
    attend, placement = OneSequence(), make_placement()
    rows, start = [], 0
    for count in chunks or [len(tokens)]:
        ids_T = torch.tensor(tokens[start : start + count], dtype=torch.int64)
        step = StepContext(torch.arange(start, start + count), placement, attend)
        rows.append(model.logits(model.forward(ids_T, step), placement))
        start += count
    assert start == len(tokens)
    return torch.cat(rows)


def tp_logits_of(models: Sequence[Decoder], tokens: Sequence[int], ops: Operators) -> list[Tensor]:
    """What each TP rank's model gives, all run together in threads."""
    meeting, results = Meeting(len(models)), [torch.empty(0)] * len(models)

    def run(rank: int) -> None:
        with torch.inference_mode():
            results[rank] = logits_of(
                models[rank], tokens, make_placement=lambda: ThreadTPPlacement(rank, meeting, ops)
            )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
