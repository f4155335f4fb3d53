"""FlashInfer's wrappers: objects that hold a plan and the memory it lies in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from sps_runtime.attention.flashinfer.calls import Call
from sps_runtime.attention.flashinfer.shared import group_limit, places
from sps_runtime.ops.devices import Fence, Standing, upload

FLOAT_BYTES = 384 << 20
"""Workspace for partial results of split keys; one serves all wrappers, which run in order."""
INT_BYTES = 32 << 20
"""Of a plan of thousands of requests; FlashInfer's own 8 MiB suffice for others."""
MANY_REQUESTS = 512
SHARED_BACKEND = "fa2"
"""For shared prefixes: few rows over many pages. FlashInfer's fa3 neither splits keys nor gives the
query heads of a KV head to one block, so each head would read the prefix, in one block each."""
TENSOR_CORE_GROUP = 4
"""Query heads a KV head from which on decode is faster on tensor cores (SGLang's rule)."""


class Planned:
    """One wrapper, and what it was planned for last.

    Args:
        standing: the arrays on the device stay where they are.

    Attributes:
        rows: the call's rows on the device; None for all.
        back, has: of a shared call, `shared.places` on the device.
    """

    def __init__(
        self, wrapper: Any, kind: str, device: torch.device, standing: bool = False
    ) -> None:
        self._wrapper, self._kind, self._device = wrapper, kind, device
        self._fence = Fence(device)
        self._stay: dict[str, Standing] | None = {} if standing else None
        self.rows: Tensor | None = None
        self.back: Tensor | None = None
        self.has: Tensor | None = None

    def plan(
        self,
        call: Call,
        *,
        rows: int,
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
        self.rows = None if call.rows is None else self._there("rows", call.rows)
        if call.kind == "shared":
            back, has = places(call, rows)
            self.back, self.has = self._there("back", back), self._there("has", has)
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

    def _there(self, name: str, array: npt.NDArray[Any]) -> Tensor:
        if self._stay is None:
            return upload(array, self._device)
        if name not in self._stay:
            self._stay[name] = Standing(array.copy(), self._device)
        self._stay[name].array[:] = array
        self._stay[name].upload()
        return self._stay[name].tensor

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

    def standing(
        self, call: Call, group: int, kv_dtype: torch.dtype, capacity: int, rows: int
    ) -> Planned:
        """A wrapper for one decode call, or one shared call, again and again, whose plans lie where
        they lay, so that a graph may hold it.

        Args:
            capacity: pages of all requests, at most.
            rows: of the query tensor.
        """
        if call.kind == "shared":
            return self._standing_shared(capacity, rows)
        counts = (call.requests + 1, capacity, call.requests)
        buffers = [torch.zeros(n, dtype=torch.int32, device=self._device) for n in counts]
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._floats(),
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=_tensor_cores(group, kv_dtype),
            paged_kv_indptr_buffer=buffers[0],
            paged_kv_indices_buffer=buffers[1],
            paged_kv_last_page_len_buffer=buffers[2],
        )
        return Planned(wrapper, "decode", self._device, standing=True)

    def _standing_shared(self, capacity: int, rows: int) -> Planned:
        requests = group_limit(rows) + 1
        counts = (requests + 1, requests + 1, capacity + requests, requests)
        buffers = [torch.zeros(n, dtype=torch.int32, device=self._device) for n in counts]
        wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(
            self._floats(),
            "HND",
            use_cuda_graph=True,
            qo_indptr_buf=buffers[0],
            paged_kv_indptr_buf=buffers[1],
            paged_kv_indices_buf=buffers[2],
            paged_kv_last_page_len_buf=buffers[3],
            backend=SHARED_BACKEND,
        )
        return Planned(wrapper, "shared", self._device, standing=True)

    def take(self, call: Call, group: int, kv_dtype: torch.dtype) -> Planned:
        """A wrapper for a call that nobody else's plan lies in."""
        cores = _tensor_cores(group, kv_dtype)
        key = (call.kind, call.requests > MANY_REQUESTS, call.kind != "decode" or cores)
        free = self._free[key]
        planned = free.pop() if free else Planned(self._make(*key), call.kind, self._device)
        self._kept[id(planned)] = key
        return planned

    def give_back(self, planned: Iterable[Planned]) -> None:
        """These plans are not needed any more; kernels that were launched with them may still run,
        since whatever comes next is launched behind them."""
        for one in planned:
            key = self._kept.pop(id(one), None)
            if key is not None:
                self._free[key].append(one)

    def _make(self, kind: str, many: bool, cores: bool) -> Any:
        floats = self._floats()
        if kind == "decode":
            return self._library.BatchDecodeWithPagedKVCacheWrapper(
                floats, "HND", use_tensor_cores=cores
            )
        backend = SHARED_BACKEND if kind == "shared" else "auto"
        wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(floats, "HND", backend=backend)
        if many:
            room = torch.empty(INT_BYTES, dtype=torch.uint8, device=self._device)
            wrapper.reset_workspace_buffer(floats, room)
        return wrapper

    def _floats(self) -> Tensor:
        if self._workspace is None:
            self._workspace = torch.empty(FLOAT_BYTES, dtype=torch.uint8, device=self._device)
        return self._workspace


def _tensor_cores(group: int, kv_dtype: torch.dtype) -> bool:
    return group >= TENSOR_CORE_GROUP or kv_dtype == torch.float8_e4m3fn
