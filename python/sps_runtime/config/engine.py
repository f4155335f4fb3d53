"""All settings of the engine: what every process of it may need to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sps_runtime.config.attention import AttentionConfig
from sps_runtime.config.cache import CacheConfig
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.scheduler import SchedulerConfig

Device = Literal["cpu", "cuda", "echo"]
DType = Literal["auto", "bfloat16", "float32"]
DeviceLinks = Literal["auto", "nccl", "ipc", "host"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Attributes:
    model_path: a Hugging Face directory.
    tokenizer_path: where tokenizer.json and the chat template are; the model's directory unless
        told.
    dtype: of weights and activations; ``auto`` takes the checkpoint's where this device has it.
    device: ``echo`` runs no model at all: ranks that store (token, position) as "KV" and answer
        with hashes of what they read back through the page tables. For tests.
    gpus: the GPU of each local rank, in rank order; several ranks may share one.
    device_links: how ranks on GPUs of one host exchange tensors: ``nccl`` (a GPU each), ``ipc``
        (memory that they map from one another), ``host`` (through pinned host memory).
    quantization: ``int8`` or ``int4`` rounds the weights of linear layers when they are loaded.
    weight_cache_dir: where packed weights are kept for the next start; "": nowhere.
    load_format: ``auto`` or ``safetensors`` reads weights, ``dummy`` makes random ones.
    context_length: longest prompt plus answer.
    threads_per_rank: compute threads of one rank.
    cores: logical CPUs of each local rank, in rank order; empty: not bound.
    service_cores: logical CPUs of the other processes; empty: not bound.
    spin_s: how long a rank that waits for another polls before it sleeps; 0 where ranks outnumber
        cores.
    seed: of dummy weights and of seeds drawn for requests without one.
    attention_backend: name of the attention backend, or ``auto``.
    grammar_backend: name of the grammar backend, or ``none``.
    disable_step_graphs: compute every decode step through the model's code; record none to replay.
    watchdog_timeout_s: plans without any result for this long end the engine.
    echo_delay_s: seconds that an echo rank takes for a step.
    """

    model_path: str
    tokenizer_path: str = ""
    dtype: DType = "auto"
    device: Device = "cpu"
    gpus: tuple[int, ...] = ()
    device_links: DeviceLinks = "auto"
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    quantization: Literal["none", "int8", "int4"] = "none"
    weight_cache_dir: str = ""
    context_length: int = 32768
    threads_per_rank: int = 1
    cores: tuple[tuple[int, ...], ...] = ()
    service_cores: tuple[int, ...] = ()
    spin_s: float = 0.0
    seed: int = 0
    attention_backend: str = "auto"
    grammar_backend: str = "llguidance"
    disable_step_graphs: bool = False
    watchdog_timeout_s: float = 300.0
    echo_delay_s: float = 0.0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    @property
    def max_total_tokens(self) -> int:
        """Tokens of KV that all SP ranks hold together."""
        return self.parallel.sp_size * self.cache.pages_per_rank * self.cache.page_size
