"""Rounding to a format, from its definition: every code, every tie, what lies past the ends, no double rounding."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fp8moe.keys import GroupShape
from fp8moe.recipe import Recipe
from fp8moe.reference.ideal import fp8_values
from fp8moe.reference.quantisation import group_amax, scale_of, scaled, spread
from fp8moe.reference.rounding import (
    BFLOAT16,
    E4M3FN,
    E4M3FNUZ,
    FLOAT16,
    FLOAT32,
    FORMATS,
    FloatFormat,
    code_values,
    fma32,
    format_of,
    round_to,
    spacing,
    up_to_power_of_two,
)

FP8 = {torch.float8_e4m3fn: E4M3FN, torch.float8_e4m3fnuz: E4M3FNUZ}


def finite_values(fmt: FloatFormat) -> list[float]:
    """The distinct finite values, ascending."""
    return sorted({value for value in code_values(fmt) if value == value})


def rounded(values: list[float], fmt: FloatFormat) -> list[float]:
    return round_to(torch.tensor(values, dtype=torch.float64), fmt).tolist()


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_all_256_codes_have_the_values_of_the_format(dtype: torch.dtype) -> None:
    decoded = torch.arange(256, dtype=torch.uint8).view(dtype).double()  # widening a code is exact in every release
    for table in (code_values(FP8[dtype]), fp8_values(dtype)):
        mine = torch.tensor(table, dtype=torch.float64)
        assert torch.equal(mine.isnan(), decoded.isnan())
        assert torch.equal(mine.nan_to_num(), decoded.nan_to_num())


@pytest.mark.parametrize("fmt", FP8.values(), ids=["e4m3fn", "e4m3fnuz"])
def test_every_value_is_kept_and_every_tie_goes_to_the_even_code(fmt: FloatFormat) -> None:
    values = finite_values(fmt)
    assert rounded(values, fmt) == values
    positive = [value for value in values if value >= 0]
    for code, (low, high) in enumerate(itertools.pairwise(positive)):
        middle = (low + high) / 2
        even = low if code % 2 == 0 else high
        assert rounded([middle, -middle], fmt) == [even, -even]
        just = middle * 2.0**-45
        assert rounded([middle - just, middle + just], fmt) == [low, high]


@pytest.mark.parametrize("fmt", FP8.values(), ids=["e4m3fn", "e4m3fnuz"])
def test_random_values_go_to_the_nearest(fmt: FloatFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(4096, generator=generator, dtype=torch.float64) * 22 - 12
    drawn = torch.randn(4096, generator=generator, dtype=torch.float64) * 2.0**exponents
    table = torch.tensor(finite_values(fmt), dtype=torch.float64)
    distance = (drawn[:, None] - table).abs()
    assert torch.equal((round_to(drawn, fmt) - drawn).abs(), distance.amin(1))


def test_what_lies_past_the_largest_value_saturates_and_nan_stays() -> None:
    assert rounded([448.1, 464.0, 1e300, float("inf"), -1e9], E4M3FN) == [448.0, 448.0, 448.0, 448.0, -448.0]
    assert rounded([240.1, 248.0, float("-inf")], E4M3FNUZ) == [240.0, 240.0, -240.0]
    assert round_to(torch.tensor([float("nan")], dtype=torch.float64), E4M3FN).isnan().all()
    assert rounded([65519.0, 65520.0, -65520.0], FLOAT16) == [65504.0, float("inf"), float("-inf")]


def test_float64_is_rounded_once() -> None:
    # Through float32 the first becomes the tie 1.0625, and goes to 1.0.
    assert rounded([1.0625 + 2.0**-40, 1.0625, 1.0625 - 2.0**-40], E4M3FN) == [1.125, 1.0, 1.0]
    assert rounded([2.0**-10, 2.0**-10 * (1 + 2.0**-40), 3 * 2.0**-10], E4M3FN) == [0.0, 2.0**-9, 2.0**-8]


@pytest.mark.parametrize(("dtype", "fmt"), [(torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)], ids=str)
def test_16_bit_rounding_is_the_ieee_conversion(dtype: torch.dtype, fmt: FloatFormat) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(4000, generator=generator) * 2.0 ** torch.randint(-40, 16, (4000,), generator=generator)
    assert torch.equal(round_to(drawn.double(), fmt), drawn.to(dtype).double())
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)].double()
    assert torch.equal(round_to(every, fmt), every)
    ties = every + spacing(every, fmt) / 2
    assert torch.equal(round_to(ties, fmt), ties.float().to(dtype).double())


def test_scales_are_those_of_exact_arithmetic() -> None:
    amax = torch.rand(500, generator=torch.Generator().manual_seed(2)).double()
    for value, scale in zip(amax.tolist(), scale_of(amax, E4M3FN, Recipe()).tolist(), strict=True):
        exact = Fraction(value) / 448
        nearest = torch.tensor(scale, dtype=torch.float32)
        for other in (torch.nextafter(nearest, nearest * 2), torch.nextafter(nearest, nearest * 0)):
            assert abs(Fraction(scale) - exact) <= abs(Fraction(float(other)) - exact)
    powers = Recipe(scale_rounding="power_of_two")
    up = scale_of(torch.tensor([448.0, 448.5, 0.0], dtype=torch.float64), E4M3FN, powers)
    assert up.tolist() == [1.0, 2.0, 2.0**-42]  # the last from the floor, 1e-10 / 448
    assert up_to_power_of_two(torch.tensor([0.75, 1.0, 3.0], dtype=torch.float64)).tolist() == [1.0, 1.0, 4.0]


def test_division_and_multiplication_by_the_reciprocal_differ_as_declared() -> None:
    generator = torch.Generator().manual_seed(3)
    values, scale = torch.randn(4096, generator=generator), torch.rand(4096, generator=generator) + 0.01
    divided = scaled(values.double(), scale.double(), Recipe())
    reciprocal = scaled(values.double(), scale.double(), Recipe(scaling="reciprocal"))
    assert torch.equal(divided, (values / scale).double())
    assert torch.equal(reciprocal, (values * (1 / scale)).double())
    assert not torch.equal(divided, reciprocal)


def test_the_last_group_may_be_partial() -> None:
    values = torch.tensor([[1.0] * 64 + [-3.0] + [2.0] * 10], dtype=torch.float64)
    group = GroupShape(1, 64)
    assert group_amax(values, group).tolist() == [[1.0, 3.0]]
    assert spread(torch.tensor([[5.0, 7.0]]), group, 75).tolist() == [[5.0] * 64 + [7.0] * 11]
    assert group_amax(values, GroupShape.PER_TOKEN).tolist() == [[3.0]]


def test_unknown_formats_are_named() -> None:
    with pytest.raises(ValueError, match="float64"):
        format_of(torch.float64)
    with pytest.raises(ValueError, match="e5m2"):
        fp8_values(torch.float8_e5m2)
    assert all(fmt.unit_roundoff == 2.0**-fmt.precision for fmt in FORMATS.values())


def exact_float32(value: Fraction) -> float:
    """The float32 nearest to a value, ties to even, by its definition."""
    exponent = FLOAT32.min_exponent
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - FLOAT32.precision + 1)
    rounded = round(value / step) * step  # Python rounds a fraction half to even
    return float(rounded) if abs(rounded) <= Fraction(FLOAT32.largest) else math.copysign(math.inf, value)


def assert_fma_is_exact(a: Tensor, b: Tensor, c: Tensor) -> None:
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), fma32(a, b, c).tolist(), strict=True):
        assert got == exact_float32(Fraction(x) * Fraction(y) + Fraction(z)), (x, y, z)


def test_fma_of_random_numbers_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(4)
    a, b, c = (torch.randn(400, generator=generator) for _ in range(3))
    assert_fma_is_exact(a, b, c)
    assert_fma_is_exact(a, b, -a * b)
    assert_fma_is_exact(a, b, c * 2.0 ** torch.randint(-60, 60, (400,), generator=generator))
    small, large = (2.0 ** torch.randint(low, low + 24, (400,), generator=generator) for low in (-76, 52))
    assert_fma_is_exact(a * small, b * small, c * 2.0**-126 * small.sign())  # around the smallest normal number
    assert_fma_is_exact(a * small, b * small, torch.zeros(400))
    assert_fma_is_exact(a * large, b * large, c * 2.0**126)  # around the largest


def test_fma_where_the_product_is_a_tie_that_only_bits_lost_in_float64_decide() -> None:
    a, b = torch.full((3,), 97.0), torch.full((3,), 172961.0)  # 2^24 + 1, half way between two neighbours
    c = torch.tensor([2.0**-40, 0.0, -(2.0**-40)])
    assert fma32(a, b, c).tolist() == [2.0**24 + 2, 2.0**24, 2.0**24]
    assert fma32(-a, b, c).tolist() == [-(2.0**24), -(2.0**24), -(2.0**24) - 2]
    below = torch.full((3,), 2.0**-149)  # the same tie among subnormal results: 2^-150 (1 +- 2^-24)
    assert fma32(below, torch.tensor([0.5 + 2.0**-24, 0.5, 0.5 - 2.0**-25]), below * 0).tolist() == [2.0**-149, 0, 0]


def test_fma_of_nan_and_infinity_is_that_of_ieee() -> None:
    inf, nan = math.inf, math.nan
    a = torch.tensor([inf, inf, inf, 0.0, 1.0, nan, 1.0, -inf])
    b = torch.tensor([1.0, 1.0, 0.0, inf, 1.0, 1.0, 1.0, 2.0])
    c = torch.tensor([1.0, -inf, 1.0, 1.0, inf, 1.0, nan, 1.0])
    assert str(fma32(a, b, c).tolist()) == str([inf, nan, nan, nan, inf, nan, nan, -inf])


def test_fma_broadcasts_in_pieces_and_names_what_is_not_float32() -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(300, 1, 7, generator=generator), torch.randn(40, 1, generator=generator)
    c = torch.randn(300, 40, 7, generator=generator)
    expected = torch.stack([fma32(x, b, z) for x, z in zip(a, c, strict=True)])
    assert torch.equal(fma32(a, b, c), expected)
    long = torch.randn(1, 100_000, generator=generator)
    assert torch.equal(
        fma32(long, a[0, 0, :1], long)[0, 50_000:], fma32(long[0, 50_000:], a[0, 0, :1], long[0, 50_000:])
    )
    assert fma32(a[:0], b, c[:0]).shape == (0, 40, 7)
    with pytest.raises(ValueError, match=r"b is torch\.float64"):
        fma32(a, b.double(), c)
