"""What a user may ask for when starting an engine; None means: choose for me.

`launch.sizing.settle` turns wishes into an `EngineConfig`, where every choice is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sps_runtime.config.attention import AttentionConfig, attention_config, attention_names
from sps_runtime.config.engine import DeviceLinks
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.scheduler import SchedulerConfig
from sps_runtime.types.errors import ConfigError

DeviceChoice = Literal["auto", "cpu", "cuda", "echo"]
EMBEDDED = "embedded"
"""The model path that names the model inside this package."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Attributes are those of `EngineConfig` where they have the same name; the others:

    Attributes:
        weight_cache_dir: ``auto`` is a directory of the user's, ``none`` keeps nothing.
        max_total_tokens: tokens of KV over all ranks.
        pages_per_rank: the same, told in pages of one SP rank.
        mem_fraction_static: share of this host's free memory for KV (SGLang's name).
        base_gpu_id: the first GPU that ranks of this host use (SGLang's name).
        cpu_bind: ``auto`` binds each rank to cores of its own where there are enough, ``none``
            does not, ``0-3|4-7`` tells the CPUs of each rank of this host.
        trace_file: write a timeline of steps here, for Perfetto or chrome://tracing.
        dist_key_file: file with the secret that hosts of one engine share.
    """

    model_path: str = EMBEDDED
    tokenizer_path: str = ""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: DeviceChoice = "auto"
    base_gpu_id: int = 0
    device_links: DeviceLinks = "auto"
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    quantization: Literal["none", "int8", "int4"] = "none"
    weight_cache_dir: str = "auto"
    context_length: int | None = None
    page_size: int | None = None
    max_total_tokens: int | None = None
    pages_per_rank: int | None = None
    mem_fraction_static: float | None = None
    enable_prefix_cache: bool = True
    eviction: str = "lru"
    kv_cache_dtype: str = "auto"
    threads_per_rank: int | None = None
    cpu_bind: str = "auto"
    random_seed: int = 0
    attention_backend: str = "auto"
    grammar_backend: str = "llguidance"
    disable_step_graphs: bool = False
    watchdog_timeout_s: float = 300.0
    echo_delay_s: float = 0.0
    dist_key_file: str = ""
    log_level: str = "info"
    log_format: Literal["plain", "json"] = "plain"
    trace_file: str = ""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        least_one = (
            "context_length",
            "page_size",
            "max_total_tokens",
            "pages_per_rank",
            "threads_per_rank",
        )
        for name in least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.quantization not in ("none", "int8", "int4"):
            raise ConfigError(f"quantization {self.quantization!r} is none of none, int8, int4")
        share = self.mem_fraction_static
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"mem_fraction_static must lie between 0 and 1, not {share}")
        if not self.watchdog_timeout_s > 0:
            raise ConfigError("watchdog_timeout must be positive")
        if not self.echo_delay_s >= 0:
            raise ConfigError("echo_delay must not be negative")


_PARALLEL_NAMES = {
    "sp_size": "sp_size",
    "tp_size": "tp_size",
    "sp_arch": "arch",
    "sp_strategy": "strategy",
}


def make_options(settings: dict[str, Any]) -> EngineOptions:
    """Options from flat names: those of `EngineOptions` and `SchedulerConfig`, ``sp_size``,
    ``tp_size``, ``sp_arch`` and ``sp_strategy`` (``pass-kv`` or ``pass_kv``), ``attention_mode``
    and ``csa_...`` (`config.attention.AttentionConfig`).

    Raises:
        ConfigError: for a name that does not exist, or a value that cannot be.
    """
    own = {entry.name for entry in fields(EngineOptions)} - {"parallel", "scheduler", "attention"}
    scheduler = {entry.name for entry in fields(SchedulerConfig)}
    parts: dict[str, dict[str, Any]] = {"own": {}, "parallel": {}, "scheduler": {}}
    for name, value in settings.items():
        if name in own:
            parts["own"][name] = value
        elif name in _PARALLEL_NAMES:
            value = value.replace("-", "_") if isinstance(value, str) else value
            parts["parallel"][_PARALLEL_NAMES[name]] = value
        elif name in scheduler:
            parts["scheduler"][name] = value
        elif name in attention_names():
            continue
        else:
            raise ConfigError(f"there is no setting {name!r}")
    return EngineOptions(
        **parts["own"],
        parallel=ParallelConfig(**parts["parallel"]),
        scheduler=SchedulerConfig(**parts["scheduler"]),
        attention=attention_config(settings),
    )
