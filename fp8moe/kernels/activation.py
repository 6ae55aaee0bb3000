"""silu(gate) * up in fp32, quantised for the second GEMM in the same pass; with an exponential of our own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.quantize import ROWS, quantize_groups

LARGEST_ARGUMENT = tl.constexpr(88.72283172607422)
"""The largest fp32 x whose e^x is finite in fp32."""


@triton.jit
def exponential(x):
    """e^x in fp32, the same bits everywhere: x = n ln 2 + r, a polynomial in r of six fma steps, then times 2^n.

    Within 1 ulp (subnormal results included); 0 and infinity where e^x rounds to them; NaN stays NaN. `tl.exp` is an
    approximation of the device's own.
    """
    clamped = tl.where(x > LARGEST_ARGUMENT, LARGEST_ARGUMENT, tl.where(x < -104.0, -104.0, x))
    clamped = tl.where(x == x, clamped, 0.0)  # NaN has no n
    ones = tl.full(x.shape, 1.0, tl.float32)
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
    # 2^n in two factors, so that neither leaves the range; the first product is exact, the second rounds once.
    half = n.to(tl.int32) >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((n.to(tl.int32) - half + 127) << 23).to(tl.float32, bitcast=True)
    finite = p * low * high
    return tl.where(x == x, tl.where(x > LARGEST_ARGUMENT, float("inf"), finite), x)


@triton.jit
def silu(x):
    """x / (1 + e^-x); -0 below about -88.7, where e^-x overflows, and NaN at minus infinity."""
    return tl.div_rn(x, 1.0 + exponential(-x))


@triton.jit(do_not_specialize=["pairs"])
def silu_mul_quantize_kernel(
    gate_up,
    local_ids,
    codes,
    scales,
    pairs,
    columns,
    stride_row,
    AMAX_FLOOR: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    groups = tl.cdiv(columns, GROUP)
    group = tl.program_id(0) % groups
    pair = (tl.program_id(0) // groups) * ROWS + tl.arange(0, ROWS)
    local = tl.load(local_ids + pair, mask=pair < pairs, other=-1) >= 0
    row = pair.to(tl.int64)
    column = group * GROUP + tl.arange(0, GROUP)
    mask = local[:, None] & (column < columns)[None, :]
    gate_at = gate_up + row[:, None] * stride_row + column[None, :]
    gate = tl.load(gate_at, mask=mask, other=0.0)
    up = tl.load(gate_at + columns, mask=mask, other=0.0)
    value, scale = quantize_groups(silu(gate) * up, AMAX_FLOOR)
    tl.store(codes + row[:, None] * columns + column[None, :], value, mask=mask)
    tl.store(scales + row * groups + group, scale, mask=local)


def silu_mul_quantize(
    gate_up: Tensor, local_ids: Tensor, *, group: int = 128, amax_floor: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, quantised to e4m3fn in groups of `group` columns.

    Recipe: silu(x) = x / (1 + e^-x) with `exponential` and an IEEE division, times up, all in fp32; then as
    `quantize_per_token_group`.

    Args:
        gate_up: (P, 2I) fp32, row-major: the gate's columns, then the up's.
        local_ids: (P,) int32; rows where it is negative are neither read nor written.

    Returns:
        (P, I) float8_e4m3fn and (P, ceil(I / group)) fp32, row-major.
    """
    pairs, columns = gate_up.shape[0], gate_up.shape[1] // 2
    groups = triton.cdiv(columns, group)
    codes = torch.empty((pairs, columns), dtype=torch.float8_e4m3fn, device=gate_up.device)
    scales = torch.empty((pairs, groups), dtype=torch.float32, device=gate_up.device)
    if pairs:
        # As in quantize.py: one program a block of rows and a group, groups fastest.
        silu_mul_quantize_kernel[(triton.cdiv(pairs, ROWS) * groups,)](
            gate_up,
            local_ids,
            codes.view(torch.uint8),
            scales,
            pairs,
            columns,
            gate_up.stride(0),
            AMAX_FLOOR=amax_floor,
            GROUP=group,
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return codes, scales
