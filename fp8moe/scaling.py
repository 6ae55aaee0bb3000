"""FP8 numbers and scales: encode, decode, quantise and dequantise, on any device, the same bits everywhere.

The formats are the OCP e4m3fn (largest 448, NaN 0x7f/0xff, no infinity) and e4m3fnuz (largest 240, NaN 0x80, one
zero). What torch's cast does above the largest value changed between releases, so nothing here relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fp8moe.approximate_reciprocal import approximate_reciprocal
from fp8moe.keys import GroupShape, QuantKey
from fp8moe.recipe import FACTORS, ScaleDivision


@dataclass(frozen=True)
class Fp8Format:
    """An 8-bit float: `largest` finite value, exponent of the smallest normal, mantissa bits, code of NaN."""

    dtype: torch.dtype
    largest: float
    min_exponent: int
    mantissa_bits: int
    nan_code: int
    signed_zero: bool


E4M3FN = Fp8Format(torch.float8_e4m3fn, 448.0, -6, 3, 0x7F, True)
E4M3FNUZ = Fp8Format(torch.float8_e4m3fnuz, 240.0, -7, 3, 0x80, False)
FP8_FORMATS = {fmt.dtype: fmt for fmt in (E4M3FN, E4M3FNUZ)}


def fp8_format(dtype: torch.dtype) -> Fp8Format:
    """The format of an FP8 dtype.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in FP8_FORMATS:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(map(str, FP8_FORMATS))}")
    return FP8_FORMATS[dtype]


def encode(values: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Rounds to the nearest FP8 value, ties to the even code.

    Finite values past the largest, and infinities, saturate; NaN stays NaN; the sign of zero stays where the
    format has one. float64 is rounded once, not through float32.

    Args:
        values: any shape, any floating dtype.

    Returns:
        The same shape, dtype `dtype`.
    """
    fmt = fp8_format(dtype)
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    magnitude = values.abs().clamp(max=fmt.largest)  # NaN passes through clamp
    exponent = torch.frexp(magnitude).exponent - 1
    exponent = torch.where(magnitude == 0, fmt.min_exponent, exponent).clamp(min=fmt.min_exponent)
    # Multiplying by a power of two is exact, so this is the one rounding, half to even.
    steps = (magnitude * power_of_two(fmt.mantissa_bits - exponent)).round()
    # `steps` of the smallest binade and below is the code itself; a binade adds 2^mantissa_bits codes, and a
    # carry out of the mantissa lands on the next binade's first code.
    code = (exponent - fmt.min_exponent) * (1 << fmt.mantissa_bits) + torch.nan_to_num(steps).to(exponent.dtype)
    negative = torch.signbit(values)
    if not fmt.signed_zero:
        negative = negative & (code != 0)
    code = torch.where(negative, code | 0x80, code)
    code = torch.where(values.isnan(), fmt.nan_code, code)
    return code.to(torch.uint8).view(dtype)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32 from its bits, -126 to 127: exact everywhere, which a device's pow() does not promise."""
    return ((exponent.to(torch.int32).clamp(-126, 127) + 127) << 23).view(torch.float32)


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """FP8 to a wider dtype; exact."""
    return codes.to(torch.float32).to(dtype)  # never a view of `codes`


def rows_and_columns(group: GroupShape, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that share a scale in a matrix of this size; a channel is a row of a weight (N, K)."""
    if group.is_per_channel():
        return 1, max(columns, 1)
    return (group.row if group.row > 0 else max(rows, 1)), (group.col if group.col > 0 else max(columns, 1))


def group_amax(values: Tensor, group: GroupShape) -> Tensor:
    """Largest magnitude of each group of the last two dimensions, fp32: (..., row groups, column groups)."""
    rows, columns = values.shape[-2:]
    high, wide = rows_and_columns(group, rows, columns)
    row_groups, column_groups = -(-rows // high), -(-columns // wide)
    magnitude = values.abs().float()
    if magnitude.numel() == 0:  # which torch 2.9 does not pad
        return magnitude.new_zeros(*values.shape[:-2], row_groups, column_groups)
    padded = torch.nn.functional.pad(magnitude, (0, column_groups * wide - columns, 0, row_groups * high - rows))
    tiles = padded.reshape(*values.shape[:-2], row_groups, high, column_groups, wide)
    return tiles.amax(dim=(-3, -1))


def scale_from_amax(
    amax: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    scale_rounding: Literal["continuous", "power_of_two"] = "continuous",
    scale_division: ScaleDivision = "divide",
    amax_floor: float = 1e-10,
) -> Tensor:
    """fp32 scale = max(amax, floor) / largest, or times fp32(1 / largest), or the reciprocal of `factor_from_amax`;
    rounded up to a power of two where asked, a normal number of fp32."""
    if scale_division in FACTORS:
        return 1.0 / factor_from_amax(amax, dtype, scale_division=scale_division, amax_floor=amax_floor)
    largest = torch.tensor(fp8_format(dtype).largest, dtype=torch.float32, device=amax.device)
    amax = amax.float().clamp(min=amax_floor)
    scale = amax / largest if scale_division == "divide" else amax * (1.0 / largest)
    if scale_rounding == "power_of_two":
        mantissa, exponent = torch.frexp(scale.clamp(min=torch.finfo(torch.float32).tiny))
        rounded = power_of_two(torch.where(mantissa == 0.5, exponent - 1, exponent))
        scale = torch.where(scale.isfinite(), rounded, scale)  # NaN and infinity stay what they are
    return scale


def factor_from_amax(
    amax: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    scale_division: ScaleDivision = "inverse",
    amax_floor: float = 1e-10,
) -> Tensor:
    """fp32 factor = fp32(1 / max(amax, floor)) * largest; that reciprocal as `scale_division` has it."""
    amax = amax.float().clamp(min=amax_floor)
    inverse = approximate_reciprocal(amax) if scale_division == "approximate_inverse" else 1.0 / amax
    return inverse * fp8_format(dtype).largest


def expand_scale(scale: Tensor, group: GroupShape, rows: int, columns: int) -> Tensor:
    """One scale for each element, from one for each group: (..., row groups, column groups) to (..., rows, columns)."""
    high, wide = rows_and_columns(group, rows, columns)
    # A view where one scale serves a whole dimension: a copy of it would cost as much as the matrix.
    spread = scale.repeat_interleave(high, dim=-2)[..., :rows, :] if 1 < high < rows else scale
    spread = spread.repeat_interleave(wide, dim=-1)[..., :columns] if 1 < wide < columns else spread
    return spread.expand(*spread.shape[:-2], rows, columns)


def quantize(
    values: Tensor,
    key: QuantKey | GroupShape,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    scale_rounding: Literal["continuous", "power_of_two"] = "continuous",
    scale_division: ScaleDivision = "divide",
    scaling: Literal["divide", "reciprocal"] = "divide",
    amax_floor: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    """Quantises the last two dimensions to FP8, one scale a group.

    Args:
        values: (..., rows, columns), a floating dtype.
        key: a key, or a group shape; `(128, 128)` blocks and `(1, 128)` groups may be cut off at the edges.
        scale: for static scales, (..., row groups, column groups) or anything that broadcasts to it.
        dtype: e4m3fn (default) or e4m3fnuz.
        scale_rounding: of a measured scale.
        scale_division: divide an amax by the format's largest number, or multiply by its fp32 reciprocal, or take the
            reciprocal of the factor `factor_from_amax`, of which there are two.
        scaling: divide by the scale, or multiply by its fp32 reciprocal; or, of a row's groups, by that factor.
        amax_floor: smallest amax that a scale is measured from.

    Returns:
        FP8 values of the same shape, and fp32 scales (..., row groups, column groups).

    Raises:
        ValueError: fewer than two dimensions, a key that is not FP8, a static key without a scale, a scale that is
            not positive and finite, or one whose shape is not that of the groups.
    """
    group, static = (key.scale.group_shape, key.scale.static) if isinstance(key, QuantKey) else (key, scale is not None)
    if isinstance(key, QuantKey) and key.dtype != torch.float8_e4m3fn:
        raise ValueError(f"quantize: key {key}: expected an FP8 key")
    if values.dim() < 2:
        raise ValueError(f"quantize: values of shape {tuple(values.shape)}: expected (..., rows, columns)")
    dtype = dtype or torch.float8_e4m3fn
    rows, columns = values.shape[-2:]
    factor = None
    if scale is None:
        if static:
            raise ValueError(f"quantize: key {key} is static: expected its scale")
        amax = group_amax(values, group)
        scale = scale_from_amax(
            amax, dtype, scale_rounding=scale_rounding, scale_division=scale_division, amax_floor=amax_floor
        )
        if scale_division in FACTORS and not group.is_per_tensor():
            factor = factor_from_amax(amax, dtype, scale_division=scale_division, amax_floor=amax_floor)
    elif isinstance(key, QuantKey) and not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError("quantize: scale has values that are not positive and finite: expected positive scales")
    spread = expand_scale(_with_groups(scale, values, group), group, rows, columns)
    wide = values.float()
    if factor is not None:
        scaled = wide * expand_scale(factor, group, rows, columns)
    else:
        scaled = wide / spread if scaling == "divide" else wide * (1.0 / spread)
    return encode(scaled, dtype), scale


def dequantize(
    codes: Tensor, scale: Tensor, key: QuantKey | GroupShape, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """FP8 values times their scales, in `dtype`: (..., rows, columns); arguments as `quantize` returned them."""
    group = key.scale.group_shape if isinstance(key, QuantKey) else key
    rows, columns = codes.shape[-2:]
    return decode(codes, dtype).mul_(expand_scale(_with_groups(scale.to(dtype), codes, group), group, rows, columns))


def _with_groups(scale: Tensor, values: Tensor, group: GroupShape) -> Tensor:
    """A scalar, or one scale a matrix, gets the two group dimensions that it lacks.

    Raises:
        ValueError: the scale's shape is not that of the groups.
    """
    if scale.dim() == 0 or scale.numel() == 1:
        return scale.reshape((1,) * max(values.dim(), 2))
    if scale.dim() == values.dim() - 2:
        scale = scale[..., None, None]
    rows, columns = values.shape[-2:]
    high, wide = rows_and_columns(group, rows, columns)
    groups = (-(-rows // high), -(-columns // wide))
    if scale.dim() < 2 or any(have not in (1, want) for have, want in zip(scale.shape[-2:], groups, strict=True)):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} for values of shape {tuple(values.shape)} and groups of {group}: "
            f"expected (..., {groups[0]}, {groups[1]}), or one scale"
        )
    return scale
