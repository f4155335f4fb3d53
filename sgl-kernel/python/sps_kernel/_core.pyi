from collections.abc import Sequence
from typing import Any

compiler: str
sanitized: bool

def cpu_features() -> dict[str, bool]: ...
def available_isas() -> list[str]: ...
def current_isa() -> str: ...
def set_isa(name: str) -> None: ...

class KVPools:
    """K and V of one layer in every pool, as :func:`sps_kernel.paged_attention` reads them.

    ``k`` and ``v`` list one array [slots, kv_heads, page, d] per pool (float32 or bfloat16, the
    last dim contiguous, equal shapes and strides; page a multiple of 16, d a multiple of 8 up to
    512). The arrays are not copied, and kept alive. Raises ``ValueError``.
    """

    def __init__(self, k: Sequence[Any], v: Sequence[Any]) -> None: ...
    @property
    def pools(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...

def paged_attention(
    q: Any,
    kv: KVPools,
    items: Any,
    page_ids: Any,
    page_pos: Any,
    out: Any,
    lse: Any,
    scale: float,
    causal: bool,
    window: int,
    accumulate: bool,
    threads: int,
    /,
) -> None: ...
def merge_states(
    os: Sequence[Any], lses: Sequence[Any], out: Any, lse_out: Any, threads: int, /
) -> None: ...
def small_gemm(x: Any, w: Any, bias: Any | None, out: Any, threads: int) -> None: ...
def rms_norm(
    x: Any, weight: Any, eps: float, residual: Any | None, out: Any, threads: int
) -> None: ...
def silu_mul(gate: Any, up: Any, out: Any, threads: int, /) -> None: ...
def rope(q: Any, k: Any, positions: Any, cos_sin: Any, threads: int, /) -> None: ...
def rope_kv_write(
    q: Any,
    k: Any,
    v: Any,
    positions: Any,
    cos_sin: Any,
    k_pool: Any,
    v_pool: Any,
    slots: Any,
    offsets: Any,
    threads: int,
    /,
) -> None: ...
def sample(
    logits: Any,
    uniform: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    /,
) -> int: ...
def store_release(buf: Any, index: int, value: int, /) -> None: ...
def load_acquire(buf: Any, index: int, /) -> int: ...
def fetch_max(buf: Any, index: int, value: int, /) -> int: ...
def fetch_add(buf: Any, index: int, value: int, /) -> int: ...
def publish(buf: Any, index: int, value: int, /) -> None: ...
def wait_at_least(
    buf: Any, index: int, value: int, spin_us: float, timeout_s: float, /
) -> bool: ...
def wake(buf: Any, index: int, /) -> None: ...
