"""What this machine has, and what each missing piece costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sps_runtime import __version__
from sps_runtime.config.environment import own_allocator_settings, weight_cache_dir
from sps_runtime.launch.binding import bind
from sps_runtime.launch.devices import Gpu, probe_gpus
from sps_runtime.launch.sizing import available_memory
from sps_runtime.launch.topology import format_cpus, read_topology

Verdict = Literal["ok", "note", "missing"]

_CPU_FEATURES = (
    ("avx2", "vector units of 8 floats", "without it nothing here is fast"),
    ("avx512f", "vector units of 16 floats", "kernels use 8 floats at a time"),
    ("avx512_bf16", "bf16 products in hardware", "bf16 is widened to fp32 before each product"),
    ("amx_bf16", "bf16 matrix tiles", "prefill multiplies with vectors instead of tiles"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        cost: what it costs when it is missing, "" when nothing is to be said.
    """

    verdict: Verdict
    subject: str
    found: str
    cost: str = ""


def examine() -> list[Finding]:
    """Look at everything; imports torch, takes a second or two."""
    return [
        Finding("ok", "sps-runtime", __version__),
        Finding("ok", "python", platform.python_version()),
        *_machine(),
        *_threads(),
        *_cpu_features(),
        _torch(),
        _kernels(),
        _weight_cache(),
        *_gpus(),
        *_backends(),
    ]


def report(findings: list[Finding]) -> str:
    """The findings as text, one line each, costs below."""
    marks = {"ok": "+", "note": ".", "missing": "-"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.verdict]} {finding.subject:<18}{finding.found}")
        if finding.cost:
            lines.append(f"  {'':<18}-> {finding.cost}")
    return "\n".join(lines)


def _machine() -> list[Finding]:
    usable = len(os.sched_getaffinity(0))
    there = os.cpu_count() or usable
    cores = f"{usable} usable of {there}, {platform.machine()}"
    cost = "ranks are not bound to cores of their own beyond this number" if usable < 2 else ""
    memory = f"{available_memory() / 2**30:.1f} GiB available"
    findings = [
        Finding("ok" if usable > 1 else "note", "cores", cores, cost),
        Finding("ok", "memory", memory),
    ]
    if platform.machine() != "x86_64":
        cost = "shared-memory ranks rely on x86's memory order: use --sp-size 1 --tp-size 1"
        findings.append(Finding("missing", "memory order", platform.machine(), cost))
    return findings


def _threads() -> list[Finding]:
    """What one and two ranks would be bound to here, and the allocator of ranks."""
    topology = read_topology()
    findings = []
    for ranks in (1, 2):
        binding = bind("auto", ranks, None, topology)
        cpus = " | ".join(map(format_cpus, binding.ranks)) or "anywhere"
        left = f", others on {format_cpus(binding.services)}" if binding.services else ""
        found = f"{binding.threads} threads each on {cpus}{left}"
        crowded = binding.spin_s == 0.0
        cost = f"{binding.why}; ranks sleep at once while they wait" if crowded else ""
        name = f"{ranks} rank{'s' * (ranks > 1)}"
        findings.append(Finding("note" if crowded else "ok", name, found, cost))
    if own := own_allocator_settings():
        cost = "ranks keep these; prefill was 5% faster where freed memory is kept"
        findings.append(Finding("note", "allocator", f"set by you: {', '.join(own)}", cost))
    else:
        findings.append(Finding("ok", "allocator", "ranks keep freed memory up to 1 GiB"))
    return findings


def _cpu_features() -> list[Finding]:
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    return [
        Finding("ok", f"cpu {name}", what)
        if name in flags
        else Finding("missing", f"cpu {name}", "not here", cost)
        for name, what, cost in _CPU_FEATURES
    ]


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("missing", "torch", str(error), "no rank can run; only --device echo")
    return Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _kernels() -> Finding:
    cost = "attention and products run as torch operators, several times slower; no --quantization"
    if importlib.util.find_spec("sps_kernel") is None:
        how = "install a C++ compiler and run `pip install ./sgl-kernel`"
        return Finding("missing", "sps-kernel", "not installed", f"{cost}; {how}")
    try:
        importlib.import_module("sps_kernel")
    except (ImportError, OSError) as error:
        return Finding("missing", "sps-kernel", f"does not load: {error}", cost)
    return Finding("ok", "sps-kernel", _version("sps-kernel"))


def _weight_cache() -> Finding:
    directory = weight_cache_dir("auto")
    if not directory:
        cost = "weights are packed anew at each start: no HOME; use --weight-cache-dir"
        return Finding("note", "weight cache", "no place for it", cost)
    sizes = [file.stat().st_size for file in Path(directory).glob("*.weights")]
    held = f"{len(sizes)} files, {sum(sizes) / 1e9:.1f} GB; remove what you like"
    return Finding("ok", "weight cache", f"{directory} ({held})")


def _gpus() -> list[Finding]:
    """The GPUs that ranks would run on, and what is there of what they need."""
    probe = probe_gpus()
    if not probe.gpus:
        return [
            Finding("note", "gpu", f"none ({probe.why or 'torch sees none'}): ranks run on CPUs")
        ]
    findings = [_gpu(gpu) for gpu in probe.gpus]
    for module, distribution, purpose, cost in _ON_GPUS:
        if importlib.util.find_spec(module):
            findings.append(Finding("ok", module, f"{_version(distribution)}, {purpose}"))
        else:
            how = f"{cost}; pip install '{distribution}' (extra [gpu])"
            findings.append(Finding("missing", module, f"not installed ({purpose})", how))
    return findings


def _gpu(gpu: Gpu) -> Finding:
    major, minor = gpu.capability
    memory = f"{gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB free"
    found = f"{gpu.name}, sm_{major}{minor}, {memory}"
    old = "compiled and tested for sm_80 and later" if major < 8 else ""
    return Finding("note" if old else "ok", f"gpu {gpu.index}", found, old)


_ON_GPUS = (
    ("flashinfer", "flashinfer-python", "attention", "attention is several times slower"),
    ("triton", "triton", "kernels beside attention", "no sparse attention, slower layers"),
)


def _backends() -> list[Finding]:
    if importlib.util.find_spec("llguidance"):
        return [Finding("ok", "llguidance", _version("llguidance"))]
    return [Finding("note", "llguidance", "not installed (constrained decoding)")]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed"
