"""Faults of quantisation: how amaxes and scales are measured and rounded, and how values are cast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.cases import Case
from conformance.zoo.plant import ExpertsClass, Fault
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantDesc
from fp8moe.scaling import decode, encode, expand_scale, fp8_format, group_amax, power_of_two, scale_from_amax

Members = Callable[[ExpertsClass], dict[str, Any]]

BLOCK = Case(tokens=17)
STATIC = Case(tokens=17, scheme="tensor_static")
DYNAMIC = Case(tokens=17, scheme="tensor_dyn")
ZEROS = Case(tokens=17, values="zero_blocks")
TINY = Case(tokens=17, values="subnormals")
SMALLEST_NORMAL = 2.0**-126
LEAST_SCALE = 1.0 / (448 * 512)


def _amax(self: Any, values: Tensor, group: GroupShape) -> Tensor:
    return group_amax(values, group)


def _scale(self: Any, amax: Tensor) -> Tensor:
    recipe = self.recipe
    return scale_from_amax(amax, self.fp8_dtype, scale_rounding=recipe.scale_rounding, amax_floor=recipe.amax_floor)


def _cast(self: Any, quotient: Tensor) -> Tensor:
    return decode(encode(quotient, self.fp8_dtype))


def _read(self: Any, scale: Tensor) -> Tensor:
    return scale


def quantises(
    *,
    amax: Callable[[Any, Tensor, GroupShape], Tensor] = _amax,
    scale: Callable[[Any, Tensor], Tensor] = _scale,
    cast: Callable[[Any, Tensor], Tensor] = _cast,
    read: Callable[[Any, Tensor], Tensor] = _read,
    static: Callable[[Any, Tensor], Tensor] = _read,
) -> Members:
    """The mutant's quantiser, in both places, has one of its steps replaced.

    Args:
        amax: (rows, columns) and a group shape to (row groups, column groups).
        scale: from an amax to a scale.
        cast: from a quotient to an FP8 number.
        read: from the scale that a value was divided by to the one that it is multiplied by again.
        static: from a static scale to the one that is used.
    """

    def members(_: ExpertsClass) -> dict[str, Any]:
        def through_fp8(
            self: Any, values: Tensor, desc: FusedMoEQuantDesc, given: Tensor | None, expert: Tensor | None
        ) -> Tensor:
            if desc.dtype is None:
                return values.float()
            group = desc.shape or GroupShape.PER_TENSOR
            found = scale(self, amax(self, values, group)) if given is None else static(self, given).reshape(1, 1)
            rows, columns = values.shape
            quotient = values.float() / expand_scale(found, group, rows, columns)
            return cast(self, quotient) * expand_scale(read(self, found), group, rows, columns)

        return {"through_fp8": through_fp8}

    return members


def divides_by(largest: float) -> Members:
    """The scale is the amax over another number than the format's largest."""
    return quantises(scale=lambda self, amax: amax.clamp(min=self.recipe.amax_floor) / largest)


def over_groups(columns: int) -> Members:
    """Activations that are declared to have one scale for each 128 columns have one for each so many."""

    def members(base: Any) -> dict[str, Any]:
        def through_fp8(self: Any, values: Tensor, desc: FusedMoEQuantDesc, *rest: Any) -> Tensor:
            if desc.shape is not None and desc.shape.is_per_group():
                desc = replace(desc, shape=GroupShape(1, columns))
            found: Tensor = base.through_fp8(self, values, desc, *rest)
            return found

        return {"through_fp8": through_fp8}

    return members


def quantised_input(change: Callable[[Any, Tensor], Tensor]) -> Members:
    """The mutant quantises other tokens than it was given."""

    def members(base: Any) -> dict[str, Any]:
        def quantize_input(self: Any, tokens: Tensor, expert: Tensor | None) -> Tensor:
            found: Tensor = base.quantize_input(self, change(self, tokens), expert)
            return found

        return {"quantize_input": quantize_input}

    return members


def _even_lanes(self: Any, values: Tensor, group: GroupShape) -> Tensor:
    seen = values.clone()
    seen[:, 1::2] = 0
    return group_amax(seen, group)


def _signed(self: Any, values: Tensor, group: GroupShape) -> Tensor:
    return group_amax(values.clamp(min=0), group)


def _first_rows(self: Any, values: Tensor, group: GroupShape) -> Tensor:
    """Of the first tile of 16 rows, where all rows share a scale."""
    return group_amax(values[:16] if group.is_per_tensor() else values, group)


def _no_floor(self: Any, amax: Tensor) -> Tensor:
    return amax / 448


def _overflowing(self: Any, amax: Tensor) -> Tensor:
    return 1 / (448 / amax.clamp(min=SMALLEST_NORMAL))


def _down_to_power_of_two(self: Any, amax: Tensor) -> Tensor:
    return exponent_only(scale_from_amax(amax, self.fp8_dtype, amax_floor=self.recipe.amax_floor))


def exponent_only(scale: Tensor) -> Tensor:
    """What is left of a scale whose mantissa is not looked at."""
    return (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)


def _one_ulp_up(self: Any, amax: Tensor) -> Tensor:
    return torch.nextafter(_scale(self, amax), torch.tensor(torch.inf, device=amax.device))


def _rounded_to(dtype: torch.dtype) -> Callable[[Any, Tensor], Tensor]:
    return lambda self, amax: _scale(self, amax).to(dtype).float().clamp(min=SMALLEST_NORMAL)


def casts(rounded: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A cast that rounds a magnitude, counted in steps of the format, its own way."""

    def cast(self: Any, quotient: Tensor) -> Tensor:
        fmt = fp8_format(self.fp8_dtype)
        magnitude = quotient.abs().clamp(max=fmt.largest)
        exponent = (torch.frexp(magnitude)[1] - 1).clamp(min=fmt.min_exponent)
        step = power_of_two(exponent - fmt.mantissa_bits)
        return torch.copysign((rounded(magnitude / step) * step).clamp(max=fmt.largest), quotient)

    return cast


def _half_up(steps: Tensor) -> Tensor:
    return (steps + 0.5).floor()


def _dithered(steps: Tensor) -> Tensor:
    """Up or down by chance, from a generator that starts anew in each call."""
    chance = torch.rand(steps.shape, generator=torch.Generator().manual_seed(0))
    return (steps + chance.to(steps.device)).floor()


def _flushed(self: Any, quotient: Tensor) -> Tensor:
    found = _cast(self, quotient)
    return torch.where(found.abs() < 2.0 ** fp8_format(self.fp8_dtype).min_exponent, 0.0, found)


def _overflows_to_nan(self: Any, quotient: Tensor) -> Tensor:
    largest = fp8_format(self.fp8_dtype).largest
    return torch.where(quotient.abs() >= largest * (1 + 2.0**-4), torch.nan, _cast(self, quotient))


def _twice_rounded(self: Any, quotient: Tensor) -> Tensor:
    return _cast(self, quotient.to(torch.bfloat16))


def _zero_group_skipped(base: Any) -> dict[str, Any]:
    """A group of zeros is not written: there is what the buffer held, the row above."""

    def through_fp8(self: Any, values: Tensor, desc: FusedMoEQuantDesc, *rest: Any) -> Tensor:
        found: Tensor = base.through_fp8(self, values, desc, *rest)
        group = desc.shape or GroupShape.PER_TENSOR
        skipped = expand_scale(group_amax(values, group), group, *values.shape) == 0
        return torch.where(skipped, found.roll(1, 0), found)

    return {"through_fp8": through_fp8}


def declaring(members: Members, **fields: Any) -> Members:
    """The same of a backend whose recipe says something else than the plain one."""

    def both(base: ExpertsClass) -> dict[str, Any]:
        recipe = replace(base.contract.recipe, **fields)
        return {"contract": replace(base.contract, recipe=recipe), **members(base)}

    return both


def _storage(self: Any, tokens: Tensor) -> Tensor:
    """Row after row of the memory, whatever the rows' distance."""
    return tokens.as_strided(tokens.shape, (tokens.shape[1], 1))


QUANTISATION = (
    Fault("largest_is_240", "fnuz-wrong-max", "scales are amax / 240 on e4m3fn", True, divides_by(240.0), BLOCK),
    Fault(
        "largest_is_224",
        "",
        "scales are amax / 224, the guarded limit of fnuz",
        True,
        divides_by(224.0),
        Case(tokens=17, values="wide_groups"),
    ),
    Fault("largest_is_256", "", "scales are amax / 256, the last power of two below 448", True, divides_by(256.0)),
    Fault(
        "largest_is_480", "", "scales are amax / 480, as if e4m3fn had no NaN: amaxes saturate", True, divides_by(480.0)
    ),
    Fault(
        "cast_truncates", "", "the cast cuts bits off: a conversion by shifts", True, quantises(cast=casts(torch.floor))
    ),
    Fault(
        "cast_rounds_half_up",
        "",
        "the cast rounds ties away from zero: half a step added to the bits, then cut off",
        True,
        quantises(cast=casts(_half_up)),
        Case(tokens=17, values="ties"),
    ),
    Fault(
        "cast_rounds_by_chance",
        "",
        "the cast rounds stochastically, as in training, and says nothing of it",
        True,
        quantises(cast=casts(_dithered)),
    ),
    Fault(
        "subnormals_flushed",
        "",
        "FP8's subnormals become 0, as on devices that flush",
        True,
        quantises(cast=_flushed),
        TINY,
    ),
    Fault(
        "cast_overflows_to_nan",
        "",
        "the cast does not saturate: what a static scale cannot hold is NaN, as e4m3fn's conversion defines it",
        True,
        quantises(cast=_overflows_to_nan),
        STATIC,
    ),
    Fault(
        "cast_through_bf16",
        "",
        "the quotient is rounded to bf16 before it is cast: a quantiser in the activations' dtype",
        True,
        quantises(cast=_twice_rounded),
    ),
    Fault(
        "zero_group_gives_nan",
        "zero-block-zero-scale",
        "a group of zeros has scale 0: 0/0",
        True,
        quantises(scale=_no_floor),
        ZEROS,
    ),
    Fault(
        "zero_group_skipped",
        "",
        "a group of zeros is not written, so that its place keeps older data: an early return in a quantiser",
        True,
        _zero_group_skipped,
        ZEROS,
    ),
    Fault(
        "multiplier_overflows",
        "tiny-amax-overflow",
        "448 / amax overflows where the amax is at the smallest normal number",
        True,
        quantises(scale=_overflowing),
        ZEROS,
    ),
    Fault(
        "odd_lanes_skipped",
        "amax-skips-elements",
        "the amax is that of even columns: a loop that strides by 2",
        False,
        quantises(amax=_even_lanes),
    ),
    Fault(
        "amax_signed",
        "",
        "the amax is the largest value, not magnitude: a reduction without abs",
        False,
        quantises(amax=_signed),
    ),
    Fault(
        "amax_of_the_first_tile",
        "",
        "a dynamic per-tensor scale is that of the first 16 rows: a grid-wide maximum without the atomic",
        True,
        quantises(amax=_first_rows),
        replace(DYNAMIC, tokens=40, values="loud_quiet"),
    ),
    Fault(
        "scale_off_by_an_ulp",
        "",
        "a dynamic scale is one fp32 number too large: amax times a reciprocal",
        True,
        quantises(scale=_one_ulp_up),
    ),
    Fault(
        "scale_in_bf16",
        "",
        "dynamic scales are stored as bf16, the dtype of the tokens beside them",
        True,
        quantises(scale=_rounded_to(torch.bfloat16)),
    ),
    Fault(
        "scale_in_fp16",
        "",
        "dynamic scales are stored as fp16, for packed loads",
        True,
        quantises(scale=_rounded_to(torch.float16)),
        TINY,
    ),
    Fault(
        "scale_floor",
        "",
        "scales are at least 1 / (448 * 512), a floor that vLLM's per-token kernels had, and none is declared",
        True,
        quantises(scale=lambda self, amax: _scale(self, amax).clamp(min=LEAST_SCALE)),
        TINY,
    ),
    Fault(
        "power_of_two_rounded_down",
        "ue8m0-floor",
        "power-of-two scales are declared, and rounded down, so that amaxes saturate",
        False,
        declaring(quantises(scale=_down_to_power_of_two), scale_rounding="power_of_two"),
    ),
    Fault(
        "groups_of_64", "", "activation scales are of 64 columns, a key that exists, not of 128", True, over_groups(64)
    ),
    Fault("groups_of_256", "", "activation scales are of 256 columns: two groups to a tile", True, over_groups(256)),
    Fault(
        "storage_not_strides",
        "noncontiguous-activations",
        "the quantiser reads tokens that lie apart as if they did not",
        True,
        quantised_input(_storage),
        replace(BLOCK, layout="strided"),
    ),
)
