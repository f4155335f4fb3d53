"""fp8 e4m3 by integer operations: sm_80 has no such conversion, and what is tested under the
interpreter is then what runs on every device.

An e4m3 number shifted into a half's exponent is 256 times too small, subnormals included; the way
back rounds to nearest even in integers. A NaN stays one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def from_e4m3(code):
    """uint8 codes as fp32."""
    wide = code.to(tl.int32)
    sign, rest = wide & 0x80, wide & 0x7F
    half = ((sign << 8) | (rest << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(rest == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def to_e4m3(x):
    """fp32 as uint8 codes; what lies beyond 448 becomes 448."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Normal numbers: keep 3 bits of the mantissa, rounded to even; the carry moves the exponent.
    even = (size >> 20) & 1
    normal = ((size + 0x7FFFF + even) >> 20) - (120 << 3)
    # Below 2^-6 steps are 2^-9: adding 2^14 leaves just those bits, rounded to even.
    shifted = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True)
    small = shifted - 0x46800000
    code = tl.where(size < (121 << 23), small, tl.minimum(normal, 0x7E))
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (sign | code).to(tl.uint8)
