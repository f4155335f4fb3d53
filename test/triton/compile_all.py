"""Compile every kernel ahead of time for one GPU architecture, as its launchers would launch it.

``python -m test.triton.compile_all 80`` needs no GPU: launchers run on CPU tensors of the shapes of
an 8B Llama, what they launch is compiled by triton's own ptxas and not run. Prints one line of JSON
for each kernel: shared memory and registers. Must not run under the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sps_runtime.attention.backend import PageLists, PagePool, QueryRun
from sps_runtime.attention.triton import TritonBackend
from sps_runtime.ops.triton import kv_gather, states
from sps_runtime.ops.triton.operators import TritonOperators
from sps_runtime.ops.triton.rope import rope_kv_write, rope_table
from sps_runtime.sparse.operators import QueryBlocks, SummaryPool
from sps_runtime.sparse.triton_operators import TritonSparseOperators
from sps_runtime.types.attention import SparseSettings

HEADS, KV_HEADS, DIM, PAGE, SLOTS = 32, 8, 128, 128, 4
BF16, FP32 = torch.bfloat16, torch.float32


class Target:
    """What triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_only(capability: int, report: Callable[[str, Any], None]) -> None:
    """Make launches compile for a target; `report` gets the kernel's name and what was compiled,
    each once."""
    compiled: list[Any] = []
    triton.runtime.driver.set_active(Target(capability))
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        for name, value in zip(self.arg_names, args, strict=False):
            if name == "counts":  # the host reads what the kernel would have written
                value.zero_()
        found = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(found is not other for other in compiled):
            compiled.append(found)
            report(self.fn.__name__, found)
        return found

    JITFunction.run = warm_up  # type: ignore[method-assign]


def launch_operators(dtype: torch.dtype) -> None:
    """What layers call, for a prefill and for a decode step."""
    ops = TritonOperators()
    for tokens in (512, 4):
        x, y = (torch.zeros(tokens, 4096, dtype=dtype) for _ in range(2))
        weight, head_weight = torch.ones(4096, dtype=dtype), torch.ones(DIM, dtype=dtype)
        q, k, v = (torch.zeros(tokens, n, DIM, dtype=dtype) for n in (HEADS, KV_HEADS, KV_HEADS))
        ops.rms_norm(x, weight, 1e-5)
        ops.rms_norm(q, head_weight, 1e-5)
        ops.add_rms_norm(x, y, weight, 1e-5)
        ops.silu_mul(x, y)
        table = rope_table(torch.arange(tokens), torch.ones(DIM // 2), 1.0)
        at = torch.zeros(tokens, dtype=torch.int32)
        ops.rotation(torch.arange(tokens), torch.ones(DIM // 2), 1.0, dtype)(q, k)
        for pool in list(pools(dtype))[: 3 if tokens > 4 else 1]:
            ops.write_kv(k, v, pool, pool, at, at)
            rope_kv_write(q, k, v, table, pool, pool, at, at)


def pools(dtype: torch.dtype) -> Iterator[Tensor]:
    """A pool of each format of rows."""
    yield torch.zeros(SLOTS, KV_HEADS, PAGE, DIM, dtype=dtype)
    yield torch.zeros(SLOTS, KV_HEADS, PAGE, DIM, dtype=torch.uint8)
    yield torch.zeros(SLOTS, KV_HEADS, PAGE, DIM + 4, dtype=torch.uint8)


def launch_attention(dtype: torch.dtype) -> None:
    """Dense prefill with and without a window, sparse lists, and decode that is split."""
    backend = TritonBackend(processors=132)
    ids, starts = torch.zeros(SLOTS).int(), torch.arange(SLOTS).int() * PAGE
    for pool in pools(dtype):
        both = PagePool([pool, pool], [pool, pool], SLOTS)
        q = torch.zeros(4096, HEADS, DIM, dtype=dtype)
        prefill = [QueryRun(0, 4096, 0, ids, starts, 4096)]
        backend.partial(q, prefill, both, scale=1.0)
        many = torch.zeros(64).int()
        decode = [QueryRun(i, 1, 8000, many, many, 8001) for i in range(4)]
        backend.partial(q[:4], decode, both, scale=1.0)
    both = PagePool([pool := next(pools(dtype))], [pool], SLOTS)
    backend.partial(q, prefill, both, scale=1.0, window=512)
    items = torch.tensor([[0, 128, 0, 0, SLOTS, 128, head, 1] for head in range(KV_HEADS)])
    backend.partial_lists(q, PageLists(items.int(), ids, starts), both, scale=1.0)


def launch_states() -> None:
    for tokens in (512, 1):
        o, lse = torch.zeros(tokens, HEADS, DIM), torch.zeros(tokens, HEADS)
        sent = o.bfloat16(), lse
        states.merge_states([(o, lse), sent, sent, sent], sent[0])
        states.merge_states([(o, lse), (o, lse)], o)
        states.pack_partial(o, lse, BF16)
        states.pack_partial(o, lse, BF16, torch.arange(tokens))


def launch_sparse(dtype: torch.dtype) -> None:
    """A superblock of 1,024 tokens at the end of 128k, blocks of 128, 16 rows of each scored."""
    ops, pool = TritonSparseOperators(), next(pools(dtype))
    summaries = torch.zeros(
        SLOTS, KV_HEADS, ops.summary_nbytes(PAGE, DIM, dtype.itemsize), dtype=torch.uint8
    )
    ops.summarise(pool, pool, torch.zeros(2, dtype=torch.int32), summaries)
    start = 128 * 1024
    blocks = [(i * 128, 128, start + i * 128, 0, 0, start + 1024) for i in range(8)]
    queries = QueryBlocks(
        torch.tensor(blocks).int(), torch.zeros((start + 1024) // PAGE, dtype=torch.int32), 1
    )
    known = SummaryPool([summaries], SLOTS, PAGE, DIM)
    q = torch.zeros(1024, HEADS, DIM, dtype=dtype)
    for changes in ({}, {"tau": 0.0}):
        settings = SparseSettings(block=128, rows=16, **changes)
        chosen = ops.choose(q, queries, [pool], known, settings, 1.0)
    ops.masses(q[0], queries.page_ids, [pool], known, settings, 1.0)
    onto = ops.tail(q, queries, chosen, known, 1.0)
    ops.tail(q, queries, chosen, known, 1.0, onto)


def launch_copies() -> None:
    for pool in pools(BF16):
        at = torch.zeros(2, dtype=torch.int64)
        packed = kv_gather.gather_units(pool, at, at)
        kv_gather.scatter_units(packed, pool, at, at)
        message, few = torch.zeros(2 * pool[:2].numel(), dtype=pool.dtype), at.int()
        kv_gather.pack_pages(pool, pool, few, few, at, message, (0, KV_HEADS))
        kv_gather.spread_pages(message, few, at, pool, pool)


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack (what registers could not hold)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack": int(found[2])}


def main(capability: int) -> None:
    def report(name: str, kernel: Any) -> None:
        metadata = kernel.metadata
        line = {"kernel": name, "shared": metadata.shared, "warps": metadata.num_warps}
        print(json.dumps(line | resources(kernel)), flush=True)

    compile_only(capability, report)
    for dtype in (BF16, FP32) if capability == 90 else (BF16,):
        launch_operators(dtype)
        launch_attention(dtype)
        launch_sparse(dtype)
    launch_states()
    launch_copies()


if __name__ == "__main__":
    main(int(sys.argv[1]))
