"""FlashInfer's wrappers: objects that hold a plan and the memory it lies in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sps_runtime.attention.flashinfer_calls import Call
from sps_runtime.ops.devices import Fence, upload

FLOAT_BYTES = 384 << 20
"""Workspace for partial results of split keys; one serves all wrappers, which run in order."""
INT_BYTES = 32 << 20
"""Of a plan of thousands of requests; FlashInfer's own 8 MiB suffice for others."""
MANY_REQUESTS = 512
TENSOR_CORE_GROUP = 4
"""Query heads a KV head from which on decode is faster on tensor cores (SGLang's rule)."""


class Planned:
    """One wrapper, and what it was planned for last.

    Attributes:
        rows: the call's rows on the device; None for all.
    """

    def __init__(self, wrapper: Any, kind: str, device: torch.device) -> None:
        self._wrapper, self._kind, self._device = wrapper, kind, device
        self._fence = Fence(device)
        self.rows: Tensor | None = None

    def plan(
        self,
        call: Call,
        *,
        heads: int,
        kv_heads: int,
        dim: int,
        page_size: int,
        scale: float,
        window: int | None,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> None:
        """Schedule a call. Waits until the copies of this wrapper's last plan have left its pinned
        memory, which FlashInfer writes again without looking."""
        self._fence.wait()
        self.rows = None if call.rows is None else upload(call.rows, self._device)
        indptr, last = torch.from_numpy(call.kv_indptr), torch.from_numpy(call.last_page_len)
        indices = upload(call.indices, self._device)
        same: dict[str, Any] = {
            "sm_scale": scale,
            "window_left": window - 1 if window is not None and call.window else -1,
            "q_data_type": q_dtype,
            "kv_data_type": kv_dtype,
        }
        if self._kind == "decode":
            self._wrapper.plan(indptr, indices, last, heads, kv_heads, dim, page_size, **same)
        else:
            causal = self._kind == "causal"
            self._wrapper.plan(
                torch.from_numpy(call.qo_indptr), indptr, indices, last, heads, kv_heads, dim,
                page_size, causal=causal, **same,
            )  # fmt: skip
        self._fence.record()

    def run(self, q_THD: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o in q's dtype, lse fp32 to base 2."""
        o, lse = self._wrapper.run(q_THD.contiguous(), (k, v), return_lse=True)
        return o, lse


class Wrappers:
    """One rank's, used again when their plans are dropped.

    Args:
        library: `flashinfer`.
        device: of queries and pools.
    """

    def __init__(self, library: ModuleType, device: torch.device) -> None:
        self._library, self._device = library, device
        self._workspace: Tensor | None = None
        self._free: dict[tuple[str, bool, bool], list[Planned]] = defaultdict(list)
        self._kept: dict[int, tuple[str, bool, bool]] = {}

    def take(self, call: Call, group: int, kv_dtype: torch.dtype) -> Planned:
        """A wrapper for a call that nobody else's plan lies in."""
        cores = group >= TENSOR_CORE_GROUP or kv_dtype == torch.float8_e4m3fn
        key = (call.kind, call.requests > MANY_REQUESTS, call.kind != "decode" or cores)
        free = self._free[key]
        planned = free.pop() if free else Planned(self._make(*key), call.kind, self._device)
        self._kept[id(planned)] = key
        return planned

    def give_back(self, planned: Iterable[Planned]) -> None:
        """These plans are not needed any more; kernels that were launched with them may still run,
        since whatever comes next is launched behind them."""
        for one in planned:
            self._free[self._kept.pop(id(one))].append(one)

    def _make(self, kind: str, many: bool, cores: bool) -> Any:
        if self._workspace is None:
            self._workspace = torch.empty(FLOAT_BYTES, dtype=torch.uint8, device=self._device)
        if kind == "decode":
            return self._library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "HND", use_tensor_cores=cores
            )
        wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        if many:
            room = torch.empty(INT_BYTES, dtype=torch.uint8, device=self._device)
            wrapper.reset_workspace_buffer(self._workspace, room)
        return wrapper
