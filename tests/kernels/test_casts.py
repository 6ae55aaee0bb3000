"""The casts, against the formats' definitions: every bf16 value, and fp32 bit patterns drawn at random."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8_cast import float32_to_e4m3
from fp8moe.kernels.widths import round_float32, to_float32


@triton.jit
def to_e4m3_kernel(x, codes, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes + at, float32_to_e4m3(tl.load(x + at)))


@triton.jit
def widen_kernel(x, wide, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(wide + at, to_float32(tl.load(x + at)))


@triton.jit
def round_kernel(x, rounded, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rounded + at, round_float32(tl.load(x + at), rounded.dtype.element_ty))


BLOCK = 8192


def run(kernel, x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    padded = torch.nn.functional.pad(x.to(device), (0, -x.numel() % BLOCK))
    result = torch.empty(padded.shape, dtype=dtype, device=device)
    kernel[(padded.numel() // BLOCK,)](padded, result, BLOCK=BLOCK, enable_fp_fusion=False)
    return result[: x.numel()].cpu()


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def random_patterns(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)


def e4m3_table() -> Tensor:
    """The values of codes 0 to 126, ascending, from the format's definition."""
    code = torch.arange(127, dtype=torch.float64)
    exponent, mantissa = torch.div(code, 8, rounding_mode="floor"), code % 8
    return torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def nearest_code(x: Tensor) -> Tensor:
    """The code whose value is nearest, the even one of two, saturating; NaN is 0x7f."""
    table = e4m3_table()
    magnitude = x.double().abs().clamp(max=448.0)
    magnitude = torch.where(x.isnan(), 0.0, magnitude)
    above = torch.searchsorted(table, magnitude)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - magnitude, magnitude - table[below]
    code = torch.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    code = code + torch.where(torch.signbit(x), 128, 0)
    return torch.where(x.isnan(), 0x7F, code).to(torch.uint8)


def same(got: Tensor, expected: Tensor) -> Tensor:
    return (got == expected) | (got.isnan() & expected.isnan())


def halfway_and_edges() -> Tensor:
    """Every code's value, every midpoint, and their neighbours in fp32; the values around saturation; the specials."""
    table = e4m3_table()
    points = torch.cat([table, (table[1:] + table[:-1]) / 2, torch.tensor([448.0, 464.0, 465.0, 1e30])]).float()
    infinity = torch.tensor(float("inf"))
    points = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    specials = torch.tensor([0.0, float("inf"), float("nan"), 2.0**-149, 2.0**-126, 2.0**-10])
    points = torch.cat([points, specials])
    return torch.cat([points, -points])


VALUES = {
    "every bf16": lambda: every_pattern(torch.bfloat16).float(),
    "random fp32": lambda: random_patterns(100_000),
    "fp32 near e4m3": lambda: torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * 2.0**-5,
    "edges": halfway_and_edges,
}


@pytest.mark.parametrize("values", VALUES)
def test_e4m3_is_the_nearest_code(values: str, device: torch.device) -> None:
    x = VALUES[values]()
    got, expected = run(to_e4m3_kernel, x, torch.uint8, device), nearest_code(x)
    wrong = (got != expected).nonzero().flatten()
    assert not len(wrong), [(float(x[i]), int(got[i]), int(expected[i])) for i in wrong[:5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widening_is_exact(dtype: torch.dtype, device: torch.device) -> None:
    x = random_patterns(8192) if dtype == torch.float32 else every_pattern(dtype)
    got = run(widen_kernel, x, torch.float32, device)
    assert bool(same(got, x.float()).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # fp16, in the interpreter
def test_rounding_is_to_nearest_even(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    ties = every_pattern(torch.bfloat16).float().view(torch.int32) + 0x8000  # halfway between two bf16
    x = torch.cat([random_patterns(50_000), torch.randn(50_000, generator=generator), ties.view(torch.float32)])
    got, expected = run(round_kernel, x, dtype, device), x.to(dtype)
    wrong = (~same(got, expected)).nonzero().flatten()
    assert not len(wrong), [(float(x[i]), float(got[i]), float(expected[i])) for i in wrong[:5]]
