"""The KV cache's size and shape."""

from __future__ import annotations

from dataclasses import dataclass

from sps_runtime.types.errors import ConfigError

KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "bf16", "int8", "fp8_e4m3")
"""What `--kv-cache-dtype` takes; bf16 is bfloat16."""
_ROWS = {"float32": (4, 0), "bfloat16": (2, 0), "int8": (1, 4), "fp8_e4m3": (1, 0)}


def kv_row(kv_dtype: str) -> tuple[int, int]:
    """(bytes of an element, bytes behind a row) of K or V of one token and head."""
    return _ROWS[kv_dtype]


def resolve_kv_dtype(wanted: str, model_dtype: str) -> str:
    """What `auto` and aliases mean in a model of `model_dtype`.

    Raises:
        ConfigError: a float dtype that is not the model's.
    """
    kv_dtype = {"auto": model_dtype, "bf16": "bfloat16"}.get(wanted, wanted)
    if kv_dtype not in (model_dtype, "int8", "fp8_e4m3"):
        raise ConfigError(f"--kv-cache-dtype {wanted} does not go with a model in {model_dtype}")
    return kv_dtype


@dataclass(frozen=True)
class CacheConfig:
    """Attributes:
    page_size: tokens in a page.
    pages_per_rank: pages in each SP rank's pool.
    enable_prefix_cache: keep and share finished prefixes.
    eviction: name of the eviction policy.
    kv_dtype: how K and V lie in pages: the model's dtype, or int8 (with a scale a row and head) or
        fp8_e4m3; part of every radix key.
    """

    page_size: int = 64
    pages_per_rank: int = 1024
    enable_prefix_cache: bool = True
    eviction: str = "lru"
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.pages_per_rank < 1:
            raise ConfigError("page_size and pages_per_rank must be at least 1")
