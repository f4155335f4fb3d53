"""What all benchmarks share: the machine, its floors, a server under test, one result file."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streams import Stream, read_stream, stream_together

ROOT = Path(__file__).resolve().parent.parent

PROBES = 5
READS = """
import mmap, torch
def reads_of(rows):
    room = mmap.mmap(-1, rows * 16384 * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    m = torch.frombuffer(room, dtype=torch.float32).view(rows, 16384).fill_(1.0)
    v = torch.ones(16384)
    return m.numel() * 4, [lambda: m @ v, lambda: m.amax(), lambda: m.sum()]
"""
"""Source of `reads_of`: a size in bytes, and ways to read as much from huge pages."""
_FLOORS = (
    READS
    + """
import json, sys, time
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
rate, (nbytes, reads) = 0.0, reads_of(8192)
for read in reads:
    read()
    rate = max(rate, nbytes / best(read))
print(json.dumps({"gemm_flops_per_s": flops, "read_bytes_per_s": rate}))
"""
)


def machine() -> dict[str, Any]:
    """Describe the machine: processor, features that matter, cores, memory, versions."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "features": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def commit() -> str:
    """Return the checkout's commit, with ``+`` when the tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return head.stdout.strip()[:12] + ("+" if dirty.stdout.strip() else "")


def floors(threads: int) -> dict[str, float]:
    """Best of five bf16 GEMMs (FLOP/s; plain and prepacked) and of five reads of 512 MB (bytes/s;
    three ways), in a process of their own. What is read lies in huge pages, as our weights do."""
    command = [sys.executable, "-c", _FLOORS, str(threads), str(PROBES)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def best_floors(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The better of two measurements, name by name."""
    return {name: max(before[name], after[name]) for name in before}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`sps_runtime.launch_server` with given flags, as a context manager.

    `watch_memory` samples the proportional set size of the whole process tree. Reading it walks
    page tables for tens of milliseconds, which ranks that fill the cores would pay for: never while
    something is timed.
    """

    def __init__(self, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.flags = flags
        self.environment = environment or {}
        self.peak_pss_bytes = 0
        self._stop = threading.Event()

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "sps_runtime.launch_server", "--port", str(self.port)]
        paths = [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.environment}
        self.started = time.perf_counter()
        self.process = subprocess.Popen([*command, *self.flags], env=env)
        self._wait_ready(120)
        self.ready_s = time.perf_counter() - self.started
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        self.process.kill()
        self.process.wait()

    def _wait_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}")
            with contextlib.suppress(OSError):
                if self.get("/health")[0] == 200:
                    return
            time.sleep(0.05)
        raise TimeoutError("the server did not become healthy")

    @contextlib.contextmanager
    def watch_memory(self) -> Iterator[None]:
        """Sample every 0.2 s while the body runs; the peak is in `peak_pss_bytes`."""
        self._stop.clear()
        sampler = threading.Thread(target=self._sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            self._stop.set()
            sampler.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.2):
            self.peak_pss_bytes = max(self.peak_pss_bytes, tree_pss(self.process.pid))

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def state(self) -> dict[str, Any]:
        """The engine's counters, fresh."""
        return dict(json.loads(self.get("/server_info")[1])["internal_states"][0])

    def stream(
        self,
        input_ids: list[int],
        max_new_tokens: int,
        attention: dict[str, Any] | None = None,
        timeout: float = 600,
    ) -> Stream:
        """Generate greedily from token ids, ignoring EOS, and time every token.

        Args:
            attention: the request's field of that name; the server's default unless told.
            timeout: seconds without a byte.
        """
        return self.ask(greedy(input_ids, max_new_tokens, attention), timeout)

    def streams(self, prompts: list[list[int]], max_new_tokens: int) -> list[Stream]:
        """The same of several prompts at once, by one thread."""
        return stream_together(self.port, [greedy(ids, max_new_tokens) for ids in prompts])

    def ask(self, body: dict[str, Any], timeout: float = 600) -> Stream:
        """Send one streamed request of SGLang's API, and time every token."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        encoded = json.dumps(body)
        start = time.perf_counter()
        connection.request("POST", "/generate", encoded, {"Content-Type": "application/json"})
        result = read_stream(connection.getresponse(), start)
        connection.close()
        return result


def greedy(
    input_ids: list[int], max_new_tokens: int, attention: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The body of a streamed request of SGLang's API that ends after so many tokens."""
    body: dict[str, Any] = {
        "input_ids": input_ids,
        "stream": True,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": max_new_tokens,
            "ignore_eos": True,
        },
    }
    return body if attention is None else {**body, "attention": attention}


def tree_pss(pid: int) -> int:
    """Sum the proportional set sizes (bytes) of a process and its descendants."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    for child in children(pid):
        total += tree_pss(child)
    return total


def children(pid: int) -> Iterator[int]:
    """Direct children of a process, by all its threads."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from map(int, task.read_text().split())


def quantile(values: list[float], q: float) -> float:
    """The q-quantile by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def median(values: list[float]) -> float:
    return statistics.median(values)


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="under two minutes on two cores")
    parser.add_argument("--json", type=Path, help="where the result goes")
    return parser


def report(path: Path | None, figures: dict[str, float], raw: Any) -> None:
    """Print the figures and write the result file."""
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.6g}")
    if path:
        result = {"machine": machine(), "commit": commit(), "figures": figures, "raw": raw}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
