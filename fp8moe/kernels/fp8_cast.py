"""fp32 to FP8 e4m3fn in integer arithmetic, so that the bits are the same on every device and in the interpreter.

A cast instruction would do on the GPU; the cast of Triton's interpreter neither saturates, carries nor rounds
subnormals. The code of a float is found from its bits: e4m3fn keeps 3 of the 23 mantissa bits, its exponent bias is
7 where fp32's is 127, and its subnormals are the multiples of 2^-9 below 2^-6.
"""

import triton
import triton.language as tl


@triton.jit
def float32_to_e4m3(x):
    """The uint8 codes of fp32 values: to nearest, ties to the even code, saturating at +-448, NaN is 0x7f.

    Infinities saturate as finite values do, and the sign of zero stays.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    magnitude = tl.where(bits < 0x43E00000, bits, 0x43E00000)  # the bits of 448

    # From 2^-6 on: round away the low 20 mantissa bits, carry into the exponent, and move the bias from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)

    # Below: 1.mantissa is an integer times 2^(exponent - 150), and the code counts multiples of 2^-9. From a shift of
    # 26 on the result is 0, fp32 subnormals (which have no leading 1) included.
    shift = 141 - (magnitude >> 23)
    shift = tl.where(shift < 1, 1, tl.where(shift > 26, 26, shift))
    mantissa = (magnitude & 0x7FFFFF) | 0x800000
    subnormal = (mantissa + (1 << (shift - 1)) - 1 + ((mantissa >> shift) & 1)) >> shift

    code = sign | tl.where(magnitude < 0x3C800000, subnormal, normal)  # the bits of 2^-6
    return tl.where(bits > 0x7F800000, 0x7F, code).to(tl.uint8)
