"""fp32 to FP8 e4m3fn, the same bits on every device and in the interpreter; and the division before it.

Where the device has a cast instruction, that is used. Elsewhere the code of a float is found from its bits by integer
arithmetic, since the cast of Triton's interpreter neither saturates, carries nor rounds subnormals: e4m3fn keeps 3 of
the 23 mantissa bits, its exponent bias is 7 where fp32's is 127, and its subnormals are the multiples of 2^-9 below
2^-6.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from fp8moe.kernels.interpreter import INTERPRETED

LEAST_CAPABILITY = 89
"""Of CUDA devices that have the instruction."""


def has_cast(device: torch.device) -> bool:
    """Whether kernels launched there cast by the instruction."""
    return device.type == "cuda" and not INTERPRETED and _has_cast(device.index)


@cache
def _has_cast(index: int | None) -> bool:
    major, minor = torch.cuda.get_device_capability(index)
    return torch.version.hip is None and 10 * major + minor >= LEAST_CAPABILITY


@triton.jit
def float32_to_e4m3(x, HAS_CAST: tl.constexpr):
    """The uint8 codes of fp32 values: to nearest, ties to the even code, saturating at +-448, NaN is 0x7f.

    Infinities saturate as finite values do, and the sign of zero stays.
    """
    if HAS_CAST:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        bits = bits & 0x7FFFFFFF
        magnitude = tl.where(bits < 0x43E00000, bits, 0x43E00000)  # the bits of 448

        # From 2^-6 on: round away the low 20 mantissa bits, carry into the exponent, and move the bias from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)

        # Below: 1.mantissa is an integer times 2^(exponent - 150), and the code counts multiples of 2^-9. From a shift
        # of 26 on the result is 0, fp32 subnormals (which have no leading 1) included.
        shift = 141 - (magnitude >> 23)
        shift = tl.where(shift < 1, 1, tl.where(shift > 26, 26, shift))
        mantissa = (magnitude & 0x7FFFFF) | 0x800000
        subnormal = (mantissa + (1 << (shift - 1)) - 1 + ((mantissa >> shift) & 1)) >> shift

        code = sign | tl.where(magnitude < 0x3C800000, subnormal, normal)  # the bits of 2^-6
        return tl.where(bits > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def quotient(x, scale):
    """x / scale, the bits of an IEEE division, for (rows, columns) and a positive scale of each row, (rows,).

    By the reciprocal, rounded to nearest, and two corrections (Markstein, IBM J. Res. Dev. 34(1), 1990: the second one
    rounds right, as the first one's result is within an ulp), in a third of a division's instructions. A quotient above
    1024 in magnitude is 1024; one below 2^-11, which has the code of 0, may have other bits, of the same sign.

    Args:
        scale: from 2^-80 to 2^80, so that nothing that counts leaves fp32's normal numbers.
    """
    reciprocal = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None], x.shape)
    negative = tl.broadcast_to((scale * -1.0)[:, None], x.shape)
    most = tl.broadcast_to((scale * 1024.0)[:, None], x.shape)
    within = tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL)
    within = tl.maximum(within, most * -1.0, propagate_nan=tl.PropagateNan.ALL)
    found = within * reciprocal
    found = tl.fma(tl.fma(found, negative, within), reciprocal, found)
    found = tl.fma(tl.fma(found, negative, within), reciprocal, found)
    # Of -0 the corrections make 0.
    bits = (found.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scaled_to_e4m3(x, scale, HAS_CAST: tl.constexpr):
    """The codes of x / scale, an IEEE division, for (rows, columns) and a scale of each row, (rows,)."""
    plain = (scale >= 2.0**-80) & (scale <= 2.0**80)
    if tl.min(plain.to(tl.int32), axis=0) == 1:
        value = quotient(x, scale)
    else:
        value = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    return float32_to_e4m3(value, HAS_CAST)
