"""`fp8moe.quant`'s numbers, bit by bit, against the formats' definition and not against torch's cast."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe.keys import (
    KEYS,
    GroupShape,
    kFp8Dynamic128Sym,
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
    kNvfp4Dynamic,
)
from fp8moe.quant import dequantize, quantize
from fp8moe.scaling import E4M3FN, E4M3FNUZ, Fp8Format, decode, encode, group_amax, power_of_two, scale_from_amax

FORMATS = {"e4m3fn": E4M3FN, "e4m3fnuz": E4M3FNUZ}
BIAS = {"e4m3fn": 7, "e4m3fnuz": 8}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

both_formats = pytest.mark.parametrize("name", FORMATS)
each_device = pytest.mark.parametrize("device", DEVICES)


def value_of(name: str, code: int) -> Fraction | None:
    """The format's definition: sign, four exponent bits, three mantissa bits; None for NaN."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if name == "e4m3fn" and exponent == 15 and mantissa == 7:
        return None
    if name == "e4m3fnuz" and code == 0x80:
        return None
    magnitude = Fraction(mantissa, 8) if exponent == 0 else 1 + Fraction(mantissa, 8)
    magnitude *= Fraction(2) ** ((exponent or 1) - BIAS[name])
    return -magnitude if sign else magnitude


def nearest_code(name: str, value: Fraction) -> int:
    """Nearest finite code of a non-negative value; ties to the even code; past the largest, the largest."""
    finite = [(found, code) for code in range(128) if (found := value_of(name, code)) is not None]
    best = min(finite, key=lambda pair: (abs(pair[0] - value), pair[1] & 1))
    return best[1]


def bits(codes: torch.Tensor) -> list[int]:
    return codes.cpu().view(torch.uint8).flatten().tolist()


@both_formats
@each_device
def test_every_code_decodes_to_its_definition(name: str, device: str) -> None:
    fmt = FORMATS[name]
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(fmt.dtype)
    for code, got in enumerate(decode(codes).cpu().tolist()):
        expected = value_of(name, code)
        assert math.isnan(got) if expected is None else Fraction(got) == expected, (code, got, expected)


@both_formats
@each_device
def test_every_code_encodes_to_itself(name: str, device: str) -> None:
    fmt = FORMATS[name]
    codes = torch.tensor([code for code in range(256) if value_of(name, code) is not None], dtype=torch.uint8)
    assert bits(encode(decode(codes.to(device).view(fmt.dtype)), fmt.dtype)) == codes.tolist()


@both_formats
@each_device
def test_between_two_codes_the_nearest_wins_and_ties_go_to_even(name: str, device: str) -> None:
    fmt = FORMATS[name]
    positive = [found for code in range(127) if (found := value_of(name, code)) is not None]
    points = []
    for low, high in pairwise(positive):
        middle = (low + high) / 2
        points += [middle, middle - (high - low) / 1024, middle + (high - low) / 1024]
    values = torch.tensor([float(point) for point in points], dtype=torch.float32, device=device)
    assert [Fraction(value) for value in values.cpu().tolist()] == points, "fp32 holds every point exactly"
    assert bits(encode(values, fmt.dtype)) == [nearest_code(name, point) for point in points]
    negative = [code | 0x80 if code or fmt.signed_zero else 0 for code in (nearest_code(name, p) for p in points)]
    assert bits(encode(-values, fmt.dtype)) == negative


@both_formats
@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_saturation_infinity_nan_and_zero(name: str, device: str, dtype: torch.dtype) -> None:
    fmt = FORMATS[name]
    top = nearest_code(name, Fraction(10**6))
    values = torch.tensor([fmt.largest, 60000.0, math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=dtype, device=device)
    zero = 0x80 if fmt.signed_zero else 0
    got = bits(encode(values, fmt.dtype))
    assert got[:4] == [top, top, top, top | 0x80]
    assert value_of(name, got[4]) is None
    assert got[5:] == [0, zero]


def test_float64_is_rounded_once() -> None:
    """Through float32 the first would tie to 1.0 and the second to 0.002."""
    values = torch.tensor([1.0625 + 2**-40, 2**-10, 2**-10 + 2**-50], dtype=torch.float64)
    assert decode(encode(values)).tolist() == [1.125, 0.0, 2**-9]


@both_formats
@settings(max_examples=300, deadline=None)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_float32(name: str, value: float) -> None:
    fmt = FORMATS[name]
    got = bits(encode(torch.tensor([value], dtype=torch.float32), fmt.dtype))[0]
    code = nearest_code(name, abs(Fraction(value)))
    negative = math.copysign(1, value) < 0 and (code != 0 or fmt.signed_zero)
    assert got == (code | 0x80 if negative else code)


@each_device
def test_powers_of_two_are_exact(device: str) -> None:
    exponents = torch.arange(-126, 128, device=device)
    assert [Fraction(value) for value in power_of_two(exponents).cpu().tolist()] == [
        Fraction(2) ** exponent for exponent in range(-126, 128)
    ]


@pytest.mark.parametrize(
    ("key", "shape", "scales"),
    [
        (kFp8DynamicTensorSym, (5, 300), (1, 1)),
        (kFp8DynamicTokenSym, (5, 300), (5, 1)),
        (kFp8StaticChannelSym, (2, 200, 300), (2, 200, 1)),
        (kFp8Dynamic128Sym, (5, 300), (5, 3)),
        (KEYS["kFp8Dynamic64Sym"], (5, 300), (5, 5)),
        (kFp8Static128BlockSym, (2, 200, 300), (2, 2, 3)),
    ],
)
@both_formats
@each_device
@pytest.mark.parametrize("scale_rounding", ["continuous", "power_of_two"])
def test_each_scheme_against_its_formula(key, shape, scales, name, device, scale_rounding) -> None:
    """Each group: scale = amax / largest in fp32 (or the next power of two), codes = encode(x / scale)."""
    fmt: Fp8Format = FORMATS[name]
    generator = torch.Generator().manual_seed(7)
    values = torch.rand(shape, generator=generator).sub(0.5).mul(8).to(torch.bfloat16).float().to(device)
    measured = key if not key.scale.static else key.scale.group_shape
    codes, scale = quantize(values, measured, dtype=fmt.dtype, scale_rounding=scale_rounding)
    assert tuple(scale.shape) == scales
    assert codes.shape == values.shape
    assert codes.dtype == fmt.dtype
    group = key.scale.group_shape
    high = 1 if group.row == 1 or group.is_per_channel() else group.row if group.row > 0 else shape[-2]
    wide = shape[-1] if group.col in (-1, 1) else group.col
    matrix, found = values.reshape(-1, *shape[-2:]).cpu(), codes.reshape(-1, *shape[-2:]).cpu()
    for index in range(matrix.shape[0]):
        for row in range(0, shape[-2], high):
            for column in range(0, shape[-1], wide):
                tile = (index, slice(row, row + high), slice(column, column + wide))
                one = scale.reshape(-1, *scales[-2:])[index, row // high, column // wide].cpu()
                expected = matrix[tile].abs().max() / torch.tensor(fmt.largest)
                if scale_rounding == "power_of_two":
                    assert math.frexp(float(one))[0] == 0.5
                    assert float(one) / 2 < float(expected) <= float(one)
                else:
                    assert float(one) == float(expected)
                assert bits(encode(matrix[tile] / one, fmt.dtype)) == bits(found[tile].contiguous())
    back = dequantize(codes, scale, key).cpu()
    worst = (back - values.cpu()).abs().max()
    assert worst <= values.abs().max().cpu() / 16 * (2 if scale_rounding == "power_of_two" else 1)


def test_static_scales_are_used_as_given() -> None:
    values = torch.tensor([[1.0, 2.0, 1000.0]])
    codes, scale = quantize(values, kFp8StaticTensorSym, torch.tensor(0.5))
    assert decode(codes).tolist() == [[2.0, 4.0, 448.0]]
    assert scale.item() == 0.5
    weights = torch.ones(2, 3, 4)
    codes, _ = quantize(weights, kFp8StaticTensorSym, torch.tensor([1.0, 0.25]))
    assert decode(codes)[:, 0, 0].tolist() == [1.0, 4.0]


def test_reciprocal_scaling_differs_where_it_may() -> None:
    values = torch.rand(64, 256, generator=torch.Generator().manual_seed(0))
    divided, scale = quantize(values, kFp8DynamicTokenSym)
    multiplied, _ = quantize(values, kFp8DynamicTokenSym, scaling="reciprocal")
    assert bits(encode(values * (1.0 / scale))) == bits(multiplied)
    assert bits(encode(values / scale)) == bits(divided)


def test_a_factor_multiplies_the_values_and_its_reciprocal_is_their_scale() -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = quantize(values, kFp8Dynamic128Sym, scale_division="inverse", scaling="reciprocal")
    factor = (1.0 / values.float().view(64, 2, 128).abs().amax(-1)) * 448.0
    assert torch.equal(scale, 1.0 / factor)
    assert bits(codes) == bits(encode(values.float() * factor.repeat_interleave(128, 1)))
    assert bits(codes) != bits(quantize(values, kFp8Dynamic128Sym, scaling="reciprocal")[0])


def test_a_group_of_zeros_takes_the_floor_and_stays_zero() -> None:
    values = torch.zeros(2, 256)
    values[1, 200] = 1e-30
    codes, scale = quantize(values, kFp8Dynamic128Sym)
    expected = torch.tensor(1e-10) / torch.tensor(448.0)
    assert torch.equal(scale, expected.expand(2, 2))
    assert bits(codes) == [0] * 512


def test_a_nan_poisons_its_own_group_only() -> None:
    values = torch.ones(2, 256)
    values[0, 3] = math.nan
    codes, _ = quantize(values, kFp8Dynamic128Sym)
    wide = decode(codes)
    assert wide[0, 3].isnan()
    assert not wide[0, 128:].isnan().any()
    assert not wide[1].isnan().any()


@pytest.mark.parametrize(("rows", "columns"), [(0, 256), (3, 1), (1, 129)])
def test_small_and_empty_shapes(rows: int, columns: int) -> None:
    codes, scale = quantize(torch.ones(rows, columns), kFp8Dynamic128Sym)
    assert codes.shape == (rows, columns)
    assert scale.shape == (rows, -(-columns // 128))
    assert group_amax(torch.ones(rows, columns), GroupShape.PER_TOKEN).shape == (rows, 1)


def test_errors_say_what_is_expected() -> None:
    with pytest.raises(ValueError, match="static: expected its scale"):
        quantize(torch.ones(2, 2), kFp8StaticTensorSym)
    with pytest.raises(ValueError, match="expected an FP8 key"):
        quantize(torch.ones(2, 2), kNvfp4Dynamic)
    with pytest.raises(ValueError, match="rows, columns"):
        quantize(torch.ones(2), kFp8DynamicTokenSym)
    with pytest.raises(ValueError, match="expected one of"):
        encode(torch.ones(2), torch.float16)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (9, 7), (1, 2), (2, 1)])
def test_a_scale_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    values, scale = torch.ones(4, 384), torch.ones(shape)
    fits = shape == (2, 1)
    group = GroupShape(2, -1)
    if fits:
        quantize(values, group, scale)
        return
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 2, 1\)"):
        quantize(values, group, scale)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 2, 1\)"):
        dequantize(encode(values), scale, group)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_static_scale_that_is_no_scale_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        quantize(torch.ones(2, 2), kFp8StaticTensorSym, torch.tensor(bad))


def test_power_of_two_scales_hide_neither_nan_nor_infinity() -> None:
    scale = scale_from_amax(torch.tensor([math.nan, math.inf, 448.0]), scale_rounding="power_of_two")
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert scale[2] == 1.0


def test_scale_from_amax_rounds_up_to_a_power_of_two() -> None:
    amax = torch.tensor([448.0, 449.0, 447.0, 1e-30])
    got = scale_from_amax(amax, scale_rounding="power_of_two").tolist()
    assert got[:3] == [1.0, 2.0, 1.0]
    assert math.frexp(got[3])[0] == 0.5
