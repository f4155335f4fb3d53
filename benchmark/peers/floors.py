"""The machine's floors, as fast as torch's own code reaches them, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys

from peers.maths import Floor

PROBES = 5
_PROBE = """
import json, mmap, sys, time, torch
threads, probes = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
def best(run):
    times = []
    for _ in range(probes):
        start = time.perf_counter(); run(); times.append(time.perf_counter() - start)
    return min(times)
flops = 0.0
x, w = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
products = [lambda: x @ w]
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    packed = torch.ops.mkldnn._reorder_linear_weight(w, 2048)
    products.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
for product in products:
    product()
    flops = max(flops, 2 * 2048**3 / best(product))
room = mmap.mmap(-1, 8192 * 16384 * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
room.madvise(mmap.MADV_HUGEPAGE)
m, v = torch.frombuffer(room, dtype=torch.float32).view(8192, 16384).fill_(1.0), torch.ones(16384)
reads = [lambda: m @ v, lambda: m.sum(), lambda: m.amax()]
rate = 0.0
for read in reads:
    read()
    rate = max(rate, m.numel() * 4 / best(read))
print(json.dumps({"gemm_flops_per_s": flops, "read_bytes_per_s": rate}))
"""


def measure(threads: int) -> Floor:
    """Best of five bf16 GEMMs (plain and prepacked) and of five reads of 512 MB (three ways).

    What is read lies in huge pages, as some engines' weights do: plain ones are 10-20% slower.
    """
    command = [sys.executable, "-c", _PROBE, str(threads), str(PROBES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Floor(**json.loads(done.stdout.splitlines()[-1]))
