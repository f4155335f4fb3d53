"""CPU kernels of SPS: paged attention, merge of states, small GEMM, fences.

Arrays are CPU tensors (torch, or anything with DLPack) or NumPy arrays; nothing is copied, and
torch is not needed. Every function checks shapes and dtypes and raises ``ValueError``. The GIL is
released while a kernel runs.
"""

from sps_kernel.attention import ITEM_FIELDS, KVPools, paged_attention
from sps_kernel.build import (
    available_isas,
    build_info,
    cpu_features,
    current_isa,
    set_isa,
    set_pool_spin,
)
from sps_kernel.elementwise import rms_norm, rope, rope_kv_write, silu_mul
from sps_kernel.fence import (
    fetch_add,
    fetch_max,
    load_acquire,
    publish,
    store_release,
    wait_at_least,
    wake,
)
from sps_kernel.gemm import gemv, small_gemm
from sps_kernel.links import Links, links_region_bytes
from sps_kernel.memory import map_shared, use_huge_pages
from sps_kernel.merge import merge_n_states, merge_states
from sps_kernel.moves import add, copy, look_up, rope_angles, sum_parts
from sps_kernel.packed import (
    crc32c,
    pack_weight,
    packed_linear,
    packed_nbytes,
    packed_rows,
    unpack_weight,
)
from sps_kernel.program import Program
from sps_kernel.sampling import largest, sample
from sps_kernel.sparse import (
    PageChoice,
    choose_pages,
    page_shares,
    summarise_pages,
    summary_nbytes,
    tail_attention,
)
from sps_kernel.step_loop import StepLoop

__version__ = "0.1.0"

__all__ = [
    "ITEM_FIELDS",
    "KVPools",
    "Links",
    "PageChoice",
    "Program",
    "StepLoop",
    "add",
    "available_isas",
    "build_info",
    "choose_pages",
    "copy",
    "cpu_features",
    "crc32c",
    "current_isa",
    "fetch_add",
    "fetch_max",
    "gemv",
    "largest",
    "links_region_bytes",
    "load_acquire",
    "look_up",
    "map_shared",
    "merge_n_states",
    "merge_states",
    "pack_weight",
    "packed_linear",
    "packed_nbytes",
    "packed_rows",
    "page_shares",
    "paged_attention",
    "publish",
    "rms_norm",
    "rope",
    "rope_angles",
    "rope_kv_write",
    "sample",
    "set_isa",
    "set_pool_spin",
    "silu_mul",
    "small_gemm",
    "store_release",
    "sum_parts",
    "summarise_pages",
    "summary_nbytes",
    "tail_attention",
    "unpack_weight",
    "use_huge_pages",
    "wait_at_least",
    "wake",
]
