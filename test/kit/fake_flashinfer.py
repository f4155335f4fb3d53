"""FlashInfer's interface without FlashInfer: calls are recorded, checked against the signatures of
the versions we support, and computed from nothing but what was planned.

What a kernel would do wrong in silence is an error here: pages outside the pool, lengths beyond a
page, dtypes that differ from the plan's, a request whose rows see no key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIGNATURES = Path(__file__).parents[1] / "data" / "flashinfer_signatures.json"


@cache
def signatures() -> dict[str, Any]:
    """version -> class -> method -> names, as the published packages have them."""
    found: dict[str, Any] = json.loads(SIGNATURES.read_text())
    return found


def check_call(path: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Every supported version takes these arguments."""
    for version, found in signatures().items():
        for name in path:
            found = found[name]
        assert len(args) <= len(found["positional"]), (version, path)
        free = [*found["positional"][len(args) :], *found["keyword"]]
        assert set(kwargs) <= set(free), (version, path, set(kwargs) - set(free))


def checked(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_call((type(self).__name__, method.__name__), args, kwargs)
        return method(self, *args, **kwargs)

    return call


class _Wrapper:
    """What both wrappers have in common.

    Attributes:
        plans: arguments of all plans of this module, in order.
    """

    plans: list[dict[str, Any]]
    runs: list[int]

    def _keep(self, **planned: Any) -> None:
        assert planned["page_size"] > 0 and planned["heads"] % planned["kv_heads"] == 0
        indptr, last = planned["kv_indptr"], planned["last_page_len"]
        assert indptr.dtype == last.dtype == planned["indices"].dtype == torch.int32
        assert indptr[0] == 0 and (indptr.diff() > 0).all(), "a request without pages"
        assert planned["qo_indptr"][0] == 0 and len(planned["qo_indptr"]) == len(indptr)
        assert int(indptr[-1]) == len(planned["indices"]) and len(last) == len(indptr) - 1
        assert ((last >= 1) & (last <= planned["page_size"])).all()
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in planned.items()}
        self.planned = copies
        self.plans.append(copies)

    def _run(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.planned
        self.runs.append(id(self))
        assert q.is_contiguous() and q.dtype == plan["q_data_type"]
        assert k.dtype == v.dtype == plan["kv_data_type"] and k.stride() == v.stride()
        rows, heads, dim = q.shape
        assert k.shape[1:] == (plan["kv_heads"], plan["page_size"], plan["dim"])
        assert (heads, dim) == (plan["heads"], plan["dim"]) and rows == plan["qo_indptr"][-1]
        assert (plan["indices"] >= 0).all() and (plan["indices"] < len(k)).all()
        o, lse = torch.empty_like(q), torch.empty(rows, heads)
        bounds = zip(plan["qo_indptr"].tolist(), plan["qo_indptr"].tolist()[1:], strict=False)
        for request, (begin, end) in enumerate(bounds):
            if begin == end:
                continue
            part = self._attend(q[begin:end].float(), k, v, request)
            o[begin:end], lse[begin:end] = part[0].to(q.dtype), part[1] / math.log(2.0)
        return o, lse

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, request: int) -> tuple[Tensor, Tensor]:
        plan = self.planned
        begin, end = plan["kv_indptr"][request : request + 2].tolist()
        pages = plan["indices"][begin:end].long()
        length = (end - begin - 1) * plan["page_size"] + int(plan["last_page_len"][request])
        group = q.shape[1] // k.shape[1]
        keys, values = (
            side[pages].transpose(1, 2).flatten(0, 1)[:length].float().repeat_interleave(group, 1)
            for side in (k, v)
        )
        at = length - len(q) + torch.arange(len(q))[:, None]  # a row's own place among the keys
        key = torch.arange(length)[None]
        seen = torch.ones(len(q), length, dtype=torch.bool)
        if plan["causal"]:
            seen &= key <= at
        if plan["window_left"] >= 0:
            seen &= at - key <= plan["window_left"]
        assert seen.any(1).all(), "a row that sees no key"
        scores = torch.einsum("thd,shd->hts", q, keys) * plan["sm_scale"]
        scores = scores.masked_fill(~seen, -torch.inf)
        o = torch.einsum("hts,shd->thd", scores.softmax(-1), values)
        return o, scores.logsumexp(-1).T


def _check_workspace(workspace: Tensor, kv_layout: str) -> None:
    assert workspace.dtype == torch.uint8 and workspace.data_ptr() % 16 == 0
    assert workspace.numel() >= 128 << 20 and kv_layout == "HND"


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    @checked
    def __init__(
        self, workspace: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None, paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        _check_workspace(workspace, kv_layout)
        assert backend in ("auto", "fa2", "fa3")
        self.graph, self.backend = use_cuda_graph, backend
        self.buffers = (
            qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf
        )  # fmt: skip
        assert all((b is not None) == use_cuda_graph for b in self.buffers)
        self.most_rows = 0

    @checked
    def reset_workspace_buffer(self, floats: Tensor, ints: Tensor) -> None:
        assert floats.dtype == ints.dtype == torch.uint8

    @checked
    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, indices: Tensor, last: Tensor,
        heads: int, kv_heads: int, dim: int, page_size: int, *, causal: bool,
        sm_scale: float, window_left: int, q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert qo_indptr.dtype == torch.int32
        least = 0 if self.graph else 1
        assert (qo_indptr.diff() >= least).all(), "a request without rows"
        if self.graph:
            rows, kv_indptr_room, room, lengths = self.buffers
            assert len(qo_indptr) == len(rows) == len(kv_indptr_room) and len(last) == len(lengths)
            assert len(indices) <= len(room), "more pages than the graph has room for"
            # The first plan fixes the grid: rows at most, and tiles by the longest request.
            self.most_rows = self.most_rows or int(qo_indptr[-1])
            assert len(last) <= self.most_rows and int(qo_indptr[-1]) <= self.most_rows
        self._keep(
            kind="prefill", qo_indptr=qo_indptr, kv_indptr=kv_indptr, indices=indices,
            last_page_len=last, heads=heads, kv_heads=kv_heads, dim=dim,
            page_size=page_size, causal=causal, sm_scale=sm_scale,
            window_left=window_left, q_data_type=q_data_type, kv_data_type=kv_data_type,
        )  # fmt: skip

    @checked
    def run(self, q: Tensor, kv: tuple[Tensor, Tensor], *, return_lse: bool) -> Any:
        assert return_lse
        return self._run(q, *kv)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    @checked
    def __init__(
        self, workspace: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:  # fmt: skip
        _check_workspace(workspace, kv_layout)
        self.tensor_cores, self.graph = use_tensor_cores, use_cuda_graph
        self.buffers = (
            paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        )  # fmt: skip
        assert all((b is not None) == use_cuda_graph for b in self.buffers)

    @checked
    def plan(
        self, indptr: Tensor, indices: Tensor, last: Tensor, heads: int, kv_heads: int,
        dim: int, page_size: int, *, sm_scale: float, window_left: int,
        q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert self.tensor_cores or kv_data_type != torch.float8_e4m3fn
        if self.graph:
            kv_indptr, room, lengths = self.buffers
            assert len(indptr) == len(kv_indptr) and len(last) == len(lengths)
            assert len(indices) <= len(room), "more pages than the graph has room for"
        self._keep(
            kind="decode", qo_indptr=torch.arange(len(last) + 1), kv_indptr=indptr,
            indices=indices, last_page_len=last, heads=heads, kv_heads=kv_heads,
            dim=dim, page_size=page_size, causal=False, sm_scale=sm_scale,
            window_left=window_left, q_data_type=q_data_type, kv_data_type=kv_data_type,
        )  # fmt: skip

    @checked
    def run(self, q: Tensor, kv: tuple[Tensor, Tensor], *, return_lse: bool) -> Any:
        assert return_lse
        return self._run(q, *kv)


class FakeFlashInfer:
    """The module: an object with what we use of it."""

    __version__ = "0.7.2"

    def __init__(self) -> None:
        plans: list[dict[str, Any]] = []
        runs: list[int] = []
        self.plans, self.runs = plans, runs
        self.merges = 0
        recording: dict[str, Any] = {"plans": plans, "runs": runs}
        for wrapper in (BatchPrefillWithPagedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper):
            setattr(self, wrapper.__name__, type(wrapper.__name__, (wrapper,), recording))

    def merge_state(self, v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> Any:
        check_call(("merge_state",), (v_a, s_a, v_b, s_b), {})
        assert v_a.dtype == v_b.dtype and v_a.dtype in (torch.bfloat16, torch.float16)
        assert s_a.dtype == s_b.dtype == torch.float32
        assert all(x.is_contiguous() for x in (v_a, s_a, v_b, s_b))
        assert v_a.shape[1] * v_a.shape[2] <= 8192, "more threads than a block has"
        self.merges += 1
        most = torch.maximum(s_a, s_b)
        a, b = (s_a - most).exp2(), (s_b - most).exp2()  # NaN where both are -inf, as the kernel's
        o = (v_a.float() * a[..., None] + v_b.float() * b[..., None]) / (a + b)[..., None]
        return o.to(v_a.dtype), most + (a + b).log2()

    def merge_state_in_place(
        self, v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None
    ) -> None:
        check_call(("merge_state_in_place",), (v, s, v_other, s_other, mask), {})
        assert v.shape == v_other.shape and s.shape == s_other.shape == v.shape[:2]
        assert mask is None or (mask.dtype == torch.bool and mask.shape == s.shape[:1])
        there = slice(None) if mask is None else mask
        o, lse = self.merge_state(v, s, v_other, s_other)
        v[there], s[there] = o[there], lse[there]
