"""The KV cache's size and shape."""

from __future__ import annotations

from dataclasses import dataclass

from sps_runtime.types.errors import ConfigError


@dataclass(frozen=True)
class CacheConfig:
    """Attributes:
    page_size: tokens in a page.
    pages_per_rank: pages in each SP rank's pool.
    enable_prefix_cache: keep and share finished prefixes.
    eviction: name of the eviction policy.
    kv_dtype: part of every radix key.
    """

    page_size: int = 64
    pages_per_rank: int = 1024
    enable_prefix_cache: bool = True
    eviction: str = "lru"
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.pages_per_rank < 1:
            raise ConfigError("page_size and pages_per_rank must be at least 1")
