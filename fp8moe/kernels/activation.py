"""The activations, on fp32 and rounded once at the end; with an exponential and an error function of our own.

Every function is a list of steps, each one fp32 operation rounded to nearest, ties to even: products, sums, `fma` and
divisions are IEEE, and a step that says so is exact. Carried out elsewhere they give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.activations import GATED, NON_GATED
from fp8moe.kernels.interpreter import rows_of_program
from fp8moe.kernels.widths import round_float32, to_float32

ROWS = 4
BLOCK = 256
"""Rows and columns of one program on a device: eight elements to a thread, 16 bytes of a 16-bit type."""
LARGEST_ARGUMENT = tl.constexpr(88.72283172607422)
"""The largest fp32 x whose e^x is finite in fp32."""


@triton.jit
def exponential(x):
    """e^x in fp32, the same bits everywhere: x = n ln 2 + r, a polynomial in r of six fma steps, then times 2^n.

    Within 1 ulp (subnormal results included); 0 and infinity where e^x rounds to them; NaN stays NaN. `tl.exp` is an
    approximation of the device's own. The constants are fp32 numbers.

    1. c = x, clamped to [-104, 88.72283172607422]; 0 for NaN
    2. s = fma(c, 1.4426950216293335, 12582912)
    3. n = s - 12582912, exact: an integer
    4. r = fma(n, -0.693145751953125, c)
    5. r = fma(n, -1.428606765330187e-06, r)
    6. p = fma(0.0013814598787575960, r, 0.008368717506527901)
    7. p = fma(p, r, k) for k in 0.04166838899254799, 0.16666521131992340, 0.49999994039535522, 1, 1
    8. p * 2^floor(n / 2), exact, then times 2^(n - floor(n / 2)), which rounds only where the result is subnormal
    9. infinity where x > 88.72283172607422; x where it is NaN
    """
    clamped = tl.where(x > LARGEST_ARGUMENT, LARGEST_ARGUMENT, tl.where(x < -104.0, -104.0, x))
    p, shifted = exponential_parts(clamped)
    # 2^n in two factors, so that neither leaves the range; the first product is exact, the second rounds once.
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000  # n, from the low bits; the bits of 1.5 * 2^23
    half = exponent >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    finite = p * low * high
    return tl.where(x == x, tl.where(x > LARGEST_ARGUMENT, float("inf"), finite), x)


@triton.jit
def exponential_parts(clamped):
    """Steps 2 to 7 of `exponential`: p, and s, whose low bits are n."""
    ones = tl.full(clamped.shape, 1.0, tl.float32)
    # Adding 1.5 * 2^23 leaves n = x / ln 2 rounded to an integer in the low bits.
    shifted = tl.fma(clamped, ones * 1.4426950216293335, ones * 12582912.0)
    n = shifted - 12582912.0
    # ln 2 in two parts; n times the first is exact, as that has 15 bits.
    r = tl.fma(n, ones * -0.693145751953125, clamped)
    r = tl.fma(n, ones * -1.428606765330187e-06, r)
    # e^r = 1 + r + r^2 q(r), with q the minimax polynomial of the relative error, 2^-28.
    p = tl.fma(ones * 0.0013814598787575960, r, ones * 0.008368717506527901)
    p = tl.fma(p, r, ones * 0.04166838899254799)
    p = tl.fma(p, r, ones * 0.16666521131992340)
    p = tl.fma(p, r, ones * 0.49999994039535522)
    p = tl.fma(p, r, ones)
    p = tl.fma(p, r, ones)
    return p, shifted


@triton.jit
def one_and_exponential(x):
    """1 + exponential(x), the same bits: what of e^x lies below 2^-25 does not show in the sum, so x is clamped to -86,
    and 2^n is one factor, of twice the polynomial. NaN stays NaN."""
    clamped = tl.minimum(x, tl.full(x.shape, LARGEST_ARGUMENT, tl.float32), propagate_nan=tl.PropagateNan.ALL)
    clamped = tl.maximum(clamped, tl.full(x.shape, -86.0, tl.float32), propagate_nan=tl.PropagateNan.ALL)
    ones = tl.full(x.shape, 1.0, tl.float32)
    p, shifted = exponential_parts(clamped)
    factor = ((shifted.to(tl.int32, bitcast=True) - (0x4B400000 - 126)) << 23).to(tl.float32, bitcast=True)
    finite = (p + p) * factor
    return ones + tl.where(x > LARGEST_ARGUMENT, float("inf"), finite)


@triton.jit
def silu(x):
    """x / (1 + e^-x); -0 below about -88.7, where e^-x overflows, and NaN at minus infinity.

    1. e = exponential(-x)
    2. d = 1 + e
    3. x / d
    """
    return tl.div_rn(x, one_and_exponential(-x))


@triton.jit
def gelu(x):
    """x Phi(x), exact GELU, within 5 ulps, subnormal results included; NaN at minus infinity.

    Measured on two million values: 4.7 ulps for negative x, 2.5 below 1, 1.2 beyond; 0.75 or less on average.

    With a = |x|: Phi(-a) = 0.5 erfc(a / sqrt 2) = q(a) e^(-a^2 / 2), so the result is x - a q(a) e^(-a^2 / 2) for x > 0
    and -a q(a) e^(-a^2 / 2) for x < 0; nothing cancels but for x - x / 2 near zero. q = t P(2t - 1) with
    t = 1 / (1 + a / 4) and P the minimax polynomial of the relative error on [0, 14.6], 2^-25.7 with the coefficients
    rounded; the steps compute -q. What the roundings of t and of the square leave out is carried along.

    1. a = |x|, exact, clamped to 15, beyond which e^(-a^2 / 2) is 0
    2. s = a * 0.25
    3. d = 1 + s
    4. t = 1 / d
    5. m = 1 - t
    6. r = fma(-t, s, m)
    7. l = t * r, what t lacks
    8. u = fma(2, t, -1)
    9. u = fma(2, l, u)
    10. p = fma(-3.1558392947772518e-05, u, -4.9800783017417416e-05)
    11. p = fma(p, u, k) for k in 0.00039552670205011964, 0.00088136515114456415, -0.0018838857067748904,
        -0.015101753175258636, -0.046630315482616425, -0.096784129738807678, -0.15197417140007019, -0.18882128596305847
    12. q = p * t
    13. q = fma(p, l, q)
    14. w = q * a
    15. h = a * a
    16. f = fma(-a, a, h), what h is above the square
    17. w = fma(w, f * 0.5, w), whose factor is exact
    18. e = exponential(h * -0.5), whose argument is exact
    19. z = x * 0 where x < 0 (-0, or NaN at minus infinity), else x
    20. fma(e, w, z)
    """
    a = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    a = tl.where(a > 15.0, 15.0, a)
    ones = tl.full(x.shape, 1.0, tl.float32)
    twos = ones * 2.0
    s = a * 0.25
    t = tl.div_rn(ones, 1.0 + s)
    lacking = t * tl.fma(t * -1.0, s, 1.0 - t)
    u = tl.fma(twos, lacking, tl.fma(twos, t, ones * -1.0))
    p = tl.fma(ones * -3.1558392947772518e-05, u, ones * -4.9800783017417416e-05)
    p = tl.fma(p, u, ones * 0.00039552670205011964)
    p = tl.fma(p, u, ones * 0.00088136515114456415)
    p = tl.fma(p, u, ones * -0.0018838857067748904)
    p = tl.fma(p, u, ones * -0.015101753175258636)
    p = tl.fma(p, u, ones * -0.046630315482616425)
    p = tl.fma(p, u, ones * -0.096784129738807678)
    p = tl.fma(p, u, ones * -0.15197417140007019)
    p = tl.fma(p, u, ones * -0.18882128596305847)
    w = tl.fma(p, lacking, p * t) * a
    h = a * a
    f = tl.fma(a * -1.0, a, h)
    w = tl.fma(w, f * 0.5, w)
    return tl.fma(exponential(h * -0.5), w, tl.where(x < 0.0, x * 0.0, x))


@triton.jit
def below(x, LIMIT: tl.constexpr):
    """min(x, LIMIT), exact; NaN stays NaN."""
    return tl.where(x > LIMIT, LIMIT, x)


@triton.jit
def within(x, LIMIT: tl.constexpr):
    """x clamped to [-LIMIT, LIMIT], exact; NaN stays NaN."""
    return tl.where(x < -LIMIT, -LIMIT, below(x, LIMIT))


@triton.jit
def swigluoai(gate, up):
    """g sigmoid(1.702 g) (u + 1), with g = min(gate, 7) and u = up clamped to [-7, 7]; NaN at a gate of minus infinity.

    1. g = min(gate, 7), exact
    2. u = up clamped to [-7, 7], exact
    3. s = g * 1.7020000219345093, the fp32 number nearest to 1.702
    4. e = exponential(-s)
    5. d = 1 + e
    6. t = g / d
    7. v = u + 1
    8. t * v
    """
    gate = below(gate, 7.0)
    t = tl.div_rn(gate, one_and_exponential(-(gate * 1.7020000219345093)))
    return t * (within(up, 7.0) + 1.0)


@triton.jit
def swiglustep(gate, up):
    """min(silu(gate), 7) times up clamped to [-7, 7].

    1. s = silu(gate)
    2. g = min(s, 7), exact
    3. u = up clamped to [-7, 7], exact
    4. g * u
    """
    return below(silu(gate), 7.0) * within(up, 7.0)


@triton.jit
def relu2(x):
    """max(x, 0)^2; NaN stays NaN.

    1. r = 0 where x < 0, else x
    2. r * r
    """
    r = tl.where(x < 0.0, 0.0, x)
    return r * r


@triton.jit
def activated_value(gate, up, NAME: tl.constexpr):
    """The activation of that name; without a gate, of `gate`."""
    if NAME == "silu":
        return silu(gate) * up
    elif NAME == "gelu":
        return gelu(gate) * up
    elif NAME == "swigluoai":
        return swigluoai(gate, up)
    elif NAME == "swiglustep":
        return swiglustep(gate, up)
    elif NAME == "silu_no_mul":
        return silu(gate)
    elif NAME == "gelu_no_mul":
        return gelu(gate)
    else:
        tl.static_assert(NAME == "relu2_no_mul")
        return relu2(gate)


@triton.jit(do_not_specialize=["rows"])
def activate_kernel(
    gate_up,
    present,
    activated,
    rows,
    columns,
    stride_row,
    NAME: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_PRESENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (columns + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    local = row < rows
    if HAS_PRESENT:
        local = tl.load(present + row, mask=local, other=-1) >= 0
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = local[:, None] & (column < columns)[None, :]
    gate_at = gate_up + row[:, None] * stride_row + column[None, :]
    gate = to_float32(tl.load(gate_at, mask=mask, other=0.0))
    up = gate
    if IS_GATED:
        up = to_float32(tl.load(gate_at + columns, mask=mask, other=0.0))
    value = activated_value(gate, up, NAME)
    value = round_float32(value, activated.dtype.element_ty)
    tl.store(activated + row[:, None] * columns + column[None, :], value, mask=mask)


def activate(
    gate_up: Tensor, name: str, *, present: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The activation `name` of the first GEMM's result.

    Recipe: silu and gelu times up, one more product in fp32; swigluoai and swiglustep as their functions say; those
    that end in _no_mul are the functions themselves. Then one rounding to `dtype`, to nearest even.

    Args:
        gate_up: (P, 2I) fp32, bf16 or fp16, the gate's columns, then the up's; (P, I) for an activation without a
            gate. A row's columns are contiguous, and rows any stride apart.
        name: one of `fp8moe.activations.GATED` and `NON_GATED`.
        present: (P,) int32; rows where it is negative are neither read nor written. None: all are present.
        dtype: fp32, bf16 or fp16.

    Returns:
        (P, I) of `dtype`, row-major.

    Raises:
        ValueError: no activation has that name.
    """
    if name not in GATED and name not in NON_GATED:
        raise ValueError(f"activation={name!r}: expected one of {', '.join((*GATED, *NON_GATED))}")
    rows, columns = gate_up.shape[0], gate_up.shape[1] // (2 if name in GATED else 1)
    activated = torch.empty((rows, columns), dtype=dtype, device=gate_up.device)
    # One program a block of rows and of columns, columns fastest: neighbours read neighbouring columns.
    rows_each = rows_of_program(rows, ROWS)
    grid = triton.cdiv(rows, rows_each) * triton.cdiv(columns, BLOCK)
    if grid:
        activate_kernel[(grid,)](
            gate_up,
            present,
            activated,
            rows,
            columns,
            gate_up.stride(0),
            NAME=name,
            IS_GATED=name in GATED,
            HAS_PRESENT=present is not None,
            ROWS=rows_each,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return activated
