from collections.abc import Sequence
from typing import Any

compiler: str
sanitized: bool

def cpu_features() -> dict[str, bool]: ...
def available_isas() -> list[str]: ...
def current_isa() -> str: ...
def set_isa(name: str) -> None: ...
def set_pool_spin(seconds: float, /) -> None: ...

class KVPools:
    """K and V of one layer in every pool, as :func:`sps_kernel.paged_attention` reads them.

    ``k`` and ``v`` list one array [slots, kv_heads, page, d] per pool (float32 or bfloat16, the
    last dim contiguous, equal shapes and strides; page a multiple of 16, d a multiple of 8 up to
    512). With ``format`` ``"int8"`` or ``"fp8_e4m3"`` they are uint8, [slots, kv_heads, page, row]:
    d signed bytes and the float32 that they are multiplied by, or d bytes; each row is read as q's
    dtype, rounded once. The arrays are not copied, and kept alive. Raises ``ValueError``.
    """

    def __init__(self, k: Sequence[Any], v: Sequence[Any], format: str = "native") -> None: ...
    @property
    def format(self) -> str: ...
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
def packed_nbytes(n: int, k: int, kind: str, group: int, cuts: Sequence[int], /) -> int: ...
def pack_weight(
    weight: Any, kind: str, out: Any, group: int, threads: int, cuts: Sequence[int], /
) -> None: ...
def unpack_weight(packed: Any, kind: str, group: int, out: Any, cuts: Sequence[int], /) -> None: ...
def packed_linear(
    x: Any,
    packed: Any,
    n: int,
    k: int,
    kind: str,
    bias: Any | None,
    out: Any,
    rows: tuple[int, int] | None,
    columns: tuple[int, int] | None,
    group: int,
    threads: int,
    cuts: Sequence[int],
) -> None: ...
def packed_rows(ids: Any, packed: Any, n: int, k: int, kind: str, out: Any, /) -> None: ...
def map_shared(fd: int, nbytes: int, writable: bool, /) -> Any: ...
def use_huge_pages(array: Any, /) -> bool: ...
def crc32c(buffer: Any, threads: int, /) -> int: ...
def crc32c_generic(buffer: Any, /) -> int: ...
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
    kv_format: str,
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
def largest(logits: Any, out: Any, /) -> None: ...
def store_release(buf: Any, index: int, value: int, /) -> None: ...
def load_acquire(buf: Any, index: int, /) -> int: ...
def fetch_max(buf: Any, index: int, value: int, /) -> int: ...
def fetch_add(buf: Any, index: int, value: int, /) -> int: ...
def publish(buf: Any, index: int, value: int, /) -> None: ...
def wait_at_least(
    buf: Any, index: int, value: int, spin_us: float, timeout_s: float, /
) -> bool: ...
def wake(buf: Any, index: int, /) -> None: ...

class Program:
    """See :class:`sps_kernel.Program`."""

    def __init__(self) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def discard(self) -> None: ...
    def run(self, clock_ns: Any | None = None) -> None: ...
    def add_workspace(self, array: Any, /) -> None: ...
    @property
    def recorded(self) -> bool: ...
    def __len__(self) -> int: ...

class StepLoop:
    """See :class:`sps_kernel.StepLoop`."""

    def __init__(
        self,
        program: Program,
        logits: Any,
        tokens: Any,
        feeds: Sequence[tuple[Any, Any]],
        board: Any,
        slots: Any,
        epoch: int,
        verdict: int,
        spin_us: float,
        /,
    ) -> None: ...
    def lead(
        self,
        first: int,
        last: int,
        each: bool,
        sampled: Any | None,
        stops: Any | None,
        seconds: float,
        descriptor: int,
    ) -> int: ...
    @property
    def goes_on(self) -> bool: ...
    def follow(self, first: int, last: int, timeout_s: float, /) -> int: ...
    @property
    def waited_s(self) -> float: ...

class Links:
    """See :class:`sps_kernel.Links`."""

    def __init__(
        self,
        memory: Any,
        rank: int,
        world: int,
        ring_bytes: int,
        timeout_s: float,
        spin_us: float,
    ) -> None: ...
    def exchange(
        self, members: Sequence[int], send: Sequence[Any], recv: Sequence[Any], /
    ) -> None: ...
    def take_waited(self) -> float: ...

def links_region_bytes(world: int, ring_bytes: int, /) -> int: ...
def copy(src: Any, out: Any, /) -> None: ...
def add(src: Any, out: Any, /) -> None: ...
def look_up(ids: Any, table: Any, out: Any, /) -> None: ...
def sum_parts(parts: Any, out: Any, /) -> None: ...
def rope_angles(positions: Any, frequencies: Any, scale: float, out: Any, /) -> None: ...
def summary_nbytes(page: int, d: int, itemsize: int, /) -> int: ...
def summarise_pages(k: Any, v: Any, slots: Any, out: Any, threads: int, /) -> None: ...
def page_shares(
    q: Any,
    blocks: Any,
    page_ids: Any,
    summaries: Sequence[Any],
    k_pools: Sequence[Any],
    slots: int,
    out: Any,
    rows: Any,
    scale: float,
    threads: int,
    /,
) -> None: ...
def select_pages(
    shares: Any,
    blocks: Any,
    page_ids: Any,
    page: int,
    kv_heads: int,
    settings: tuple[float, float, int, int, int, int, bool],
    out: tuple[Any, ...],
    threads: int,
    /,
) -> None: ...
def tail_attention(
    q: Any,
    blocks: Any,
    dropped: Any,
    dropped_ids: Any,
    summaries: Sequence[Any],
    slots: int,
    page: int,
    out: Any,
    lse: Any,
    scale: float,
    accumulate: bool,
    threads: int,
    /,
) -> None: ...
