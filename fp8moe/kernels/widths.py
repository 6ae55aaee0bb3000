"""Between fp32 and the 16-bit types, right in Triton's interpreter too.

The interpreter truncates fp32 to bf16 instead of rounding, and misreads bf16 subnormals, so bf16 goes through its
bits; its fp16 conversions are right.
"""

import triton
import triton.language as tl


@triton.jit
def to_float32(x):
    """fp16, bf16 or fp32 to fp32; exact, NaN stays NaN."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_float32(x, dtype: tl.constexpr):
    """fp32 to `dtype` (fp16, bf16 or fp32), to nearest, ties to even; overflow is infinity, NaN stays NaN."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
