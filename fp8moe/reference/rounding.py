"""Rounding of float64 to a narrower binary format, from the format's definition; no cast of torch's is relied on.

What torch's cast to FP8 does above the largest value changed between releases, and a cast from float64 goes through
float32 and rounds twice; so the formats are written down here, and everything is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format.

    Args:
        precision: significant bits, the hidden one included.
        min_exponent: exponent of the smallest normal number, which is also that of the subnormal ones.
        largest: largest finite value.
        saturates: larger values become the largest; otherwise they overflow to infinity as IEEE 754 says.
        nan_codes: the 8-bit codes of NaN; empty for wider formats, which are never decoded here.
    """

    precision: int
    min_exponent: int
    largest: float
    saturates: bool = False
    nan_codes: tuple[int, ...] = ()

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding to nearest, 2^-precision."""
        return 2.0**-self.precision


E4M3FN = FloatFormat(4, -6, 448.0, True, (0x7F, 0xFF))
E4M3FNUZ = FloatFormat(4, -7, 240.0, True, (0x80,))
BFLOAT16 = FloatFormat(8, -126, 2.0**127 * (2 - 2.0**-7))
FLOAT16 = FloatFormat(11, -14, 65504.0)
FLOAT32 = FloatFormat(24, -126, 2.0**127 * (2 - 2.0**-23))

FORMATS: dict[torch.dtype, FloatFormat] = {
    torch.float8_e4m3fn: E4M3FN,
    torch.float8_e4m3fnuz: E4M3FNUZ,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float32: FLOAT32,
}


def format_of(dtype: torch.dtype) -> FloatFormat:
    """The format of a dtype.

    Raises:
        ValueError: a dtype that is no output, input or FP8 dtype of an MoE layer.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(map(str, FORMATS))}")
    return FORMATS[dtype]


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64 for exponents of normal float64 numbers, by its bits: pow() need not be exact."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def binade(values: Tensor) -> Tensor:
    """floor(log2 |value|) as int64; 0 gives -1, as frexp has it."""
    return torch.frexp(values)[1].to(torch.int64) - 1


def spacing(values: Tensor, fmt: FloatFormat) -> Tensor:
    """Distance of the neighbouring numbers of `fmt` in the binade of each value, subnormal floor included."""
    exponent = binade(torch.where(torch.isfinite(values), values, 0.0)).clamp(min=fmt.min_exponent)
    exponent = torch.where(values == 0, fmt.min_exponent, exponent)
    return power_of_two(exponent - (fmt.precision - 1))


def round_to(values: Tensor, fmt: FloatFormat) -> Tensor:
    """Rounds to the nearest number of `fmt`, ties to even; NaN stays NaN.

    The quotient by a power of two is exact, so `round`, half to even, is the only rounding.

    Args:
        values: float64, any shape.

    Returns:
        float64 values that `fmt` can hold (or infinities, where it does not saturate).
    """
    step = spacing(values, fmt)
    rounded = torch.round(values / step) * step
    if fmt.saturates:
        return rounded.clamp(-fmt.largest, fmt.largest)
    return torch.where(rounded.abs() > fmt.largest, torch.sign(rounded) * torch.inf, rounded)


def to_float32(values: Tensor) -> Tensor:
    """Rounds float64 to float32, kept in float64: the IEEE conversion, about which no release disagrees."""
    return values.to(torch.float32).to(torch.float64)


def up_to_power_of_two(values: Tensor) -> Tensor:
    """The smallest power of two among fp32's normal numbers that is not below a float64 value, 0 or more."""
    mantissa, exponent = torch.frexp(values.clamp(min=2.0**FLOAT32.min_exponent))
    rounded = power_of_two(torch.where(mantissa == 0.5, exponent - 1, exponent))
    return torch.where(torch.isfinite(values), rounded, values)


def code_values(fmt: FloatFormat) -> list[float]:
    """The values of the 256 codes of an 8-bit format with 3 mantissa bits: sign, exponent, mantissa."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 0xF, code & 0x7
        fraction = mantissa / 8 if exponent == 0 else 1 + mantissa / 8
        magnitude = fraction * 2.0 ** (max(exponent, 1) - 1 + fmt.min_exponent)
        values.append(float("nan") if code in fmt.nan_codes else -magnitude if code & 0x80 else magnitude)
    return values


_ELEMENTS = 1 << 14  # of a temporary on a CPU: it stays in the cache, and torch does not split it among threads


def fma32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 tensors with one rounding, to nearest, ties to even: IEEE 754's fused multiply-add.

    The product is exact in float64. The sum there is rounded to odd: where it is inexact, to the neighbour whose last
    bit is 1, which no later rounding to fewer bits mistakes for a tie (Boldo and Melquiond 2008, "Emulation of FMA and
    correctly rounded sums", IEEE Transactions on Computers 57(4)).

    Args:
        a, b, c: float32, of shapes that broadcast.

    Returns:
        float32, subnormal results and overflow included; NaN and infinities as IEEE 754 has them.

    Raises:
        ValueError: an argument that is not float32.
    """
    for name, operand in (("a", a), ("b", b), ("c", c)):
        if operand.dtype != torch.float32:
            raise ValueError(f"{name} is {operand.dtype}: expected torch.float32, convert it first")
    operands: tuple[Tensor, Tensor, Tensor] = torch.broadcast_tensors(a, b, c)  # type: ignore[no-untyped-call]
    shape = operands[0].shape
    if a.device.type != "cpu" or shape.numel() <= _ELEMENTS:
        return _fma32(*operands)
    axis = next(axis for axis, size in enumerate(shape) if size > 1)
    length = max(_ELEMENTS * shape[axis] // shape.numel(), 1)
    pieces = zip(*(torch.split(operand, length, axis) for operand in operands), strict=True)
    return torch.cat([fma32(*piece) for piece in pieces], axis)


def _fma32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    term, start = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    total = term + start
    # Knuth's TwoSum: what the addition lost, exactly.
    virtual = total - term
    lost = (start - virtual).add_(term.sub_(total - virtual))
    bits = total.view(torch.int64)
    # Toward zero where the addition went away from it, then the last bit, is rounding to odd. NaN compares as False,
    # so what an infinity or NaN left in `lost` changes nothing.
    bits -= (lost * total < 0).to(torch.int64)
    bits |= (lost.abs_() > 0).to(torch.int64)
    return total.to(torch.float32)
