"""Which GPUs ranks run on, and how many pages fit there."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sps_runtime.config.cache import kv_row
from sps_runtime.config.model import ModelConfig
from sps_runtime.config.options import EngineOptions
from sps_runtime.types.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_STATIC_SHARE = 0.85
RANK_RESERVE = 1536 << 20
"""Of a GPU, for each rank beside weights and KV: CUDA's context, libraries' workspaces, graphs."""
PROBE_S = 120.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it.

    Attributes:
        capability: (major, minor) of its compute capability.
    """

    index: int
    name: str
    free_bytes: int
    total_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Probe:
    """What a process that imported torch found.

    Attributes:
        why: why there are no GPUs; empty where there are.
    """

    gpus: tuple[Gpu, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Placed:
    """Where this host's ranks run.

    Attributes:
        gpus: of each local rank; empty on CPUs.
        found: the GPUs that there are.
    """

    device: Literal["cpu", "cuda", "echo"]
    gpus: tuple[int, ...] = ()
    found: tuple[Gpu, ...] = ()


def probe_gpus(dev: Path = Path("/dev")) -> Probe:
    """Ask torch for GPUs, in a process of its own: CUDA takes half a gigabyte of a GPU for as long
    as a process has looked at one. Machines without a driver are not asked."""
    if not any(dev.glob("nvidia*")) and not (dev / "dxg").exists():
        return Probe(why="no NVIDIA driver")
    command = [sys.executable, "-m", "sps_runtime.launch.gpu_probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=True)
        return _read(done.stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"status {error.returncode}"])[-1]
        return Probe(why=last)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Probe(why=f"{type(error).__name__}: {error}")


def _read(text: str) -> Probe:
    said = json.loads(text.strip().splitlines()[-1])
    gpus = tuple(
        Gpu(
            index,
            str(each["name"]),
            int(each["free"]),
            int(each["total"]),
            (int(each["capability"][0]), int(each["capability"][1])),
        )
        for index, each in enumerate(said["gpus"])
    )
    return Probe(gpus, str(said["why"]))


def choose_device(options: EngineOptions, ranks: int) -> Placed:
    """``auto`` takes GPUs where torch sees one.

    Args:
        ranks: of this host.

    Raises:
        ConfigError: what was asked for cannot be.
    """
    if options.device == "echo":
        if options.parallel.nnodes > 1:
            raise ConfigError("device echo runs on one host: its ranks read one another's memory")
        return Placed("echo")
    if options.device == "cpu":
        return Placed("cpu")
    probe = probe_gpus()
    usable = len(probe.gpus) > options.base_gpu_id
    if options.device == "auto" and not usable:
        return Placed("cpu")
    if not usable:
        why = probe.why or f"there are {len(probe.gpus)}, the first to use is {options.base_gpu_id}"
        raise ConfigError(f"device cuda: no GPU to run on ({why})")
    _check(options)
    room = len(probe.gpus) - options.base_gpu_id
    gpus = tuple(options.base_gpu_id + rank % room for rank in range(ranks))
    for gpu in sorted(set(gpus)):
        found, count = probe.gpus[gpu], gpus.count(gpu)
        logger.info("GPU %d, %s: %d rank%s", gpu, found.name, count, "s" * (count > 1))
    if options.device_links == "nccl" and len(set(gpus)) < ranks:
        raise ConfigError("--device-links nccl needs a GPU for each rank: NCCL shares none")
    return Placed("cuda", gpus, probe.gpus)


def _check(options: EngineOptions) -> None:
    if options.quantization != "none":
        raise ConfigError(
            f"--quantization {options.quantization} is for CPUs; use bfloat16 on GPUs"
        )
    if options.attention_backend == "sps_kernel":
        raise ConfigError("--attention-backend sps_kernel is for CPUs")


def weight_bytes(model: ModelConfig, tp_size: int, itemsize: int) -> int:
    """Bytes of one TP rank's weights, within a percent: norms and biases are left out."""
    heads, kv_heads = model.heads_per_rank(tp_size), model.kv_heads_per_rank(tp_size)
    attention = model.hidden_size * model.head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * model.hidden_size * model.intermediate_size // tp_size
    table = model.vocab_size * model.hidden_size
    head = 0 if model.tie_word_embeddings else table // tp_size
    return itemsize * (model.num_layers * (attention + mlp) + table + head)


def page_bytes(model: ModelConfig, tp_size: int, kv_dtype: str, page_size: int) -> int:
    """Bytes of one page on one rank, its summaries (`sparse.blob`) included."""
    itemsize, scale_bytes = kv_row(kv_dtype)
    dim = model.head_dim
    pages = 2 * page_size * (dim * itemsize + scale_bytes)
    summary = 4 * dim * itemsize + page_size * dim // 4 if itemsize > 1 else 0
    return model.num_layers * model.kv_heads_per_rank(tp_size) * (pages + summary)


def pages_on_gpus(
    options: EngineOptions, model: ModelConfig, kv_dtype: str, page_size: int, placed: Placed
) -> int:
    """Pages of each rank: of a GPU's free memory a share is for weights and KV of its ranks
    (`--mem-fraction-static`), the rest for activations.

    Raises:
        ConfigError: not even a page fits.
    """
    tp_size = options.parallel.tp_size
    share = options.mem_fraction_static or DEFAULT_STATIC_SHARE
    itemsize = 2 if model.resolve_dtype(options.dtype) == "bfloat16" else 4
    fixed = weight_bytes(model, tp_size, itemsize) + RANK_RESERVE
    each = page_bytes(model, tp_size, kv_dtype, page_size)
    pages = min(
        int(placed.found[gpu].free_bytes * share / count - fixed) // each
        for gpu, count in Counter(placed.gpus).items()
    )
    if pages < 1:
        free = min(placed.found[gpu].free_bytes for gpu in placed.gpus) >> 20
        raise ConfigError(
            f"{fixed >> 20} MiB of weights and workspace a rank leave no room for KV in {share:g} "
            f"of {free} MiB of free GPU memory"
        )
    return pages
