"""Make every choice that a user left open: dtype, pages, cores, threads."""

from __future__ import annotations

import logging
from pathlib import Path

from sps_runtime.config.cache import CacheConfig, kv_row, resolve_kv_dtype
from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.environment import weight_cache_dir
from sps_runtime.config.model import ModelConfig
from sps_runtime.config.options import EngineOptions
from sps_runtime.kvcache.eviction import make_eviction
from sps_runtime.launch.binding import bind
from sps_runtime.launch.claims import claimed_cpus
from sps_runtime.launch.devices import Placed, choose_device, pages_on_gpus
from sps_runtime.launch.topology import read_topology
from sps_runtime.scheduler.policies import make_policy
from sps_runtime.types.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_PAGE_SIZE = 64
GPU_PAGE_SIZE = 128
DEFAULT_KV_SHARE = 0.5
DEFAULT_TOKENS_CAP = 1 << 20
"""Tokens of KV at most unless told: more helps few, and holds memory that others may need."""
ECHO_BYTES_PER_TOKEN = 8


def settle(options: EngineOptions, model: ModelConfig, model_dir: Path) -> EngineConfig:
    """Turn wishes into settings, on the machine that this runs on.

    Raises:
        ConfigError: when they do not fit together, or not into this machine.
    """
    make_policy(options.scheduler.policy)  # an unknown name ends the start here
    make_eviction(options.eviction)
    parallel = options.parallel
    placed = choose_device(options, parallel.world_size // parallel.nnodes)
    dtype = model.resolve_dtype(options.dtype)
    kv_dtype = resolve_kv_dtype(options.kv_cache_dtype, dtype)
    local_ranks = parallel.world_size // parallel.nnodes
    binding = bind(
        options.cpu_bind, local_ranks, options.threads_per_rank, read_topology(), claimed_cpus()
    )
    logger.info("%d threads a rank, %s", binding.threads, binding.why)
    on_gpus = placed.device == "cuda"
    page_size = options.page_size or (GPU_PAGE_SIZE if on_gpus else DEFAULT_PAGE_SIZE)
    return EngineConfig(
        model_path=str(model_dir),
        tokenizer_path=options.tokenizer_path or str(model_dir),
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        device=placed.device,
        gpus=placed.gpus,
        device_links=options.device_links,
        load_format=options.load_format,
        quantization=options.quantization,
        weight_cache_dir=weight_cache_dir(options.weight_cache_dir),
        context_length=options.context_length or model.context_length,
        threads_per_rank=binding.threads,
        cores=binding.ranks,
        service_cores=binding.services,
        spin_s=binding.spin_s,
        seed=options.random_seed,
        attention_backend=options.attention_backend,
        grammar_backend=options.grammar_backend,
        disable_step_graphs=options.disable_step_graphs,
        watchdog_timeout_s=options.watchdog_timeout_s,
        echo_delay_s=options.echo_delay_s,
        parallel=parallel,
        scheduler=options.scheduler,
        attention=options.attention,
        cache=CacheConfig(
            page_size=page_size,
            pages_per_rank=_pages_per_rank(options, model, kv_dtype, page_size, placed),
            enable_prefix_cache=options.enable_prefix_cache,
            eviction=options.eviction,
            kv_dtype=kv_dtype,
        ),
    )


def kv_bytes_per_token(model: ModelConfig, tp_size: int, kv_dtype: str) -> int:
    """Bytes of one token's K and V on all TP peers of its SP rank together."""
    heads = model.kv_heads_per_rank(tp_size) * tp_size
    itemsize, scale_bytes = kv_row(kv_dtype)
    return 2 * model.num_layers * heads * (model.head_dim * itemsize + scale_bytes)


def _pages_per_rank(
    options: EngineOptions, model: ModelConfig, kv_dtype: str, page_size: int, placed: Placed
) -> int:
    """Pages of one SP rank: as told, else a share of what is free, within reason."""
    sp_size, tp_size = options.parallel.sp_size, options.parallel.tp_size
    if options.pages_per_rank is not None:
        return options.pages_per_rank
    if options.max_total_tokens is not None:
        return -(-options.max_total_tokens // (sp_size * page_size))
    per_token = kv_bytes_per_token(model, tp_size, kv_dtype)
    if options.device == "echo":
        per_token = ECHO_BYTES_PER_TOKEN
    if options.parallel.nnodes > 1:  # all hosts must choose the same, whatever memory they have
        return DEFAULT_TOKENS_CAP // (sp_size * page_size)
    if placed.device == "cuda":
        return pages_on_gpus(options, model, kv_dtype, page_size, placed)
    free = available_memory()
    share = options.mem_fraction_static or DEFAULT_KV_SHARE
    tokens = int(free * share) // per_token
    if options.mem_fraction_static is None:
        tokens = min(tokens, DEFAULT_TOKENS_CAP)
    pages = tokens // (sp_size * page_size)
    if pages < 1:
        raise ConfigError(f"{free >> 20} MiB of free memory hold no page of {page_size} tokens")
    return pages


def available_memory() -> int:
    """Bytes that this process may still use: the machine's, or its control group's if less."""
    available = _meminfo("MemAvailable")
    for limit, used in _CGROUP_FILES:
        try:
            room = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # not mounted, or "max"
            continue
        available = min(available, max(room, 0))
    return available


_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key == name:
            return int(rest.split()[0]) * 1024
    raise OSError(f"/proc/meminfo has no {name}")
