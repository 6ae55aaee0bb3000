"""The casts, against the formats' definitions: every bf16 value, and fp32 bit patterns drawn at random."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8_cast import float32_to_e4m3, has_cast, quotient, scaled_to_e4m3
from fp8moe.kernels.widths import round_float32, to_float32


@triton.jit
def to_e4m3_kernel(x, codes, BLOCK: tl.constexpr, HAS_CAST: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes + at, float32_to_e4m3(tl.load(x + at), HAS_CAST))


@triton.jit
def quotient_kernel(x, scales, results, BLOCK: tl.constexpr):
    row, at = tl.program_id(0) + tl.arange(0, 1), tl.arange(0, BLOCK)[None, :]
    x_at = row[:, None] * BLOCK + at
    tl.store(results + x_at, quotient(tl.load(x + x_at), tl.load(scales + row)))


@triton.jit
def scaled_kernel(x, scales, codes, BLOCK: tl.constexpr, HAS_CAST: tl.constexpr):
    row, at = tl.program_id(0) + tl.arange(0, 1), tl.arange(0, BLOCK)[None, :]
    x_at = row[:, None] * BLOCK + at
    tl.store(codes + x_at, scaled_to_e4m3(tl.load(x + x_at), tl.load(scales + row), HAS_CAST))


@triton.jit
def widen_kernel(x, wide, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(wide + at, to_float32(tl.load(x + at)))


@triton.jit
def round_kernel(x, rounded, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rounded + at, round_float32(tl.load(x + at), rounded.dtype.element_ty))


BLOCK = 8192


def run(kernel, x: Tensor, dtype: torch.dtype, device: torch.device, **constants: bool) -> Tensor:
    padded = torch.nn.functional.pad(x.to(device), (0, -x.numel() % BLOCK))
    result = torch.empty(padded.shape, dtype=dtype, device=device)
    kernel[(padded.numel() // BLOCK,)](padded, result, BLOCK=BLOCK, enable_fp_fusion=False, **constants)
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


@pytest.mark.parametrize("by_instruction", [False, True])
@pytest.mark.parametrize("values", VALUES)
def test_e4m3_is_the_nearest_code(values: str, by_instruction: bool, device: torch.device) -> None:
    if by_instruction and not has_cast(device):
        pytest.skip(f"{device} has no instruction for it")
    x = VALUES[values]()
    got, expected = run(to_e4m3_kernel, x, torch.uint8, device, HAS_CAST=by_instruction), nearest_code(x)
    wrong = (got != expected).nonzero().flatten()
    assert not len(wrong), [(float(x[i]), int(got[i]), int(expected[i])) for i in wrong[:5]]


def some_scales() -> Tensor:
    """Mantissas of all kinds, the longest and the shortest among them, and the smallest and largest exponents."""
    mantissas = torch.tensor([0, 1, 2, 0x400000, 0x555555, 0x7FFFFE, 0x7FFFFF, 0x2AAAAB, 0x123456])
    exponents = torch.tensor([-80, -79, -42, -20, -3, 0, 5, 41, 79])
    return (((exponents + 127) << 23) + mantissas[:, None]).to(torch.int32).view(torch.float32).flatten()


def near_midpoints(scales: Tensor) -> Tensor:
    """(scales, BLOCK): times each scale, what lies halfway between two codes, and its neighbours in fp32; then values
    at random, some of them far too large, and signs of zero."""
    codes = halfway_and_edges()
    around = (codes * scales[:, None]).view(torch.int32)[..., None] + torch.arange(-1, 2, dtype=torch.int32)
    near = around.view(torch.float32).flatten(1)
    generator = torch.Generator().manual_seed(2)
    more = torch.randn(len(scales), BLOCK - near.shape[1], generator=generator)
    more *= 2.0 ** torch.randint(-12, 14, more.shape, generator=generator)
    return torch.cat([near, more * scales[:, None]], 1)


def by_rows(kernel, x: Tensor, scales: Tensor, dtype: torch.dtype, device: torch.device, **constants: bool) -> Tensor:
    result = torch.empty(x.shape, dtype=dtype, device=device)
    given = (x.to(device), scales.to(device), result)
    kernel[(len(x),)](*given, BLOCK=BLOCK, enable_fp_fusion=False, **constants)
    return result.cpu()


def test_the_quotient_is_that_of_a_division(device: torch.device) -> None:
    scales = some_scales()
    x = near_midpoints(scales)
    expected = x / scales[:, None]
    got = by_rows(quotient_kernel, x, scales, torch.float32, device)
    plain = (expected.abs() >= 2.0**-11) & (expected.abs() <= 1024)
    assert plain.float().mean() > 0.7
    wrong = plain & (got != expected)
    assert not wrong.any(), (x[wrong][:5], got[wrong][:5], expected[wrong][:5])
    assert torch.equal(got[~plain].signbit(), expected[~plain].signbit())


@pytest.mark.parametrize("scale", [0.0, 2.0**-149, 1e-30, 2.0**-81, 0.3, 3e24, 1e30, float("inf"), float("nan")])
def test_codes_with_any_scale_are_those_of_a_division(scale: float, device: torch.device) -> None:
    x = torch.cat([random_patterns(BLOCK - 200), halfway_and_edges()[:200]])[None]
    scales = torch.tensor([scale])
    got = by_rows(scaled_kernel, x, scales, torch.uint8, device, HAS_CAST=has_cast(device))
    assert torch.equal(got, nearest_code((x / scales).flatten())[None])


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
