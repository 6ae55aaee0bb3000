"""Faults at the ends of a computation: the output's rounding, overflow, indices that wrap, launch limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.cases import Case
from conformance.zoo.override import overriding
from conformance.zoo.plant import ORDINARY, Fault
from conformance.zoo.quantisation import Members
from fp8moe.dispatch import combine

SMALL = Case(tokens=17)
HALF = Case(tokens=17, dtype="fp16")


def _sum(self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
    return combine(slots, weights, present, torch.float32, False)


def returns(rounded: Callable[[Tensor, torch.dtype], Tensor]) -> Members:
    """The mutant's output is `rounded` of the fp32 sum."""
    return lambda _: {"combine": lambda self, *given: rounded(_sum(self, *given), self.config.in_dtype)}


def _toward_zero(total: Tensor, dtype: torch.dtype) -> Tensor:
    nearest = total.to(dtype)
    too_far = (nearest.float().abs() > total.abs()).to(torch.int16)
    return (nearest.view(torch.int16) - too_far).view(dtype)


def _half_away(total: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(total == 0, total, torch.nextafter(total, torch.inf * total.sign())).to(dtype)


def _by_chance(total: Tensor, dtype: torch.dtype) -> Tensor:
    """From a generator that starts anew in each call."""
    below = _toward_zero(total, dtype)
    above = (below.view(torch.int16) + 1).view(dtype)
    part = (total - below.float()) / (above.float() - below.float())
    chance = torch.rand(total.shape, generator=torch.Generator().manual_seed(0)).to(total.device)
    return torch.where(part > chance, above, below)


def _saturated(total: Tensor, dtype: torch.dtype) -> Tensor:
    return total.clamp(-(2.0**12), 2.0**12).to(dtype)


def _flushed(total: Tensor, dtype: torch.dtype) -> Tensor:
    found = total.to(dtype)
    return torch.where(found.abs() < torch.finfo(dtype).tiny, 0.0, found)


# -- overflow, indices and limits --


@overriding(
    "activation",
    "offsets into the intermediate wrap, as 32-bit ones do at 2^31: here at 2^12, so that small cases show it",
    catalogue="c-offset-int32",
    witness=SMALL,
)
def intermediate_offset_wraps(right: Any, self: Any, gate_up: Tensor) -> Any:
    offset = torch.arange(gate_up.numel(), device=gate_up.device) % (1 << 12)
    return right(self, gate_up.reshape(-1)[offset].view_as(gate_up))


@overriding(
    "combine",
    "offsets of rows wrap in the weighted sum, as 32-bit ones do at 2^31: here at 2^12",
    catalogue="sum-row-int32",
    witness=SMALL,
)
def slot_offset_wraps(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    offset = torch.arange(slots.numel(), device=slots.device) % (1 << 12)
    return right(self, slots.reshape(-1)[offset].view_as(slots), weights, present)


@overriding(
    "apply",
    "a product of sizes overflows in a check, as 32-bit ones do at 2^31 (here M * H at 2^15), and a call is refused",
    catalogue="shape-check-int32",
    subtle=True,
    witness=Case(tokens=130, experts=2),
    shows="raises",
)
def shape_check_overflows(right: Any, self: Any, hidden: Tensor, *given: Any, **options: Any) -> Any:
    size = (hidden.numel() + (1 << 15)) % (1 << 16) - (1 << 15)
    if size < 0:
        raise ValueError(f"hidden_states has {size} elements: expected at least 0")
    return right(self, hidden, *given, **options)


@overriding(
    "experts",
    "pairs beyond a launch grid's largest extent, 65,535 on hardware and 128 here, are never computed",
    catalogue="grid-limit",
    witness=ORDINARY,
)
def pairs_beyond_the_grid(right: Any, self: Any, *given: Tensor) -> Any:
    results = right(self, *given)
    results[128:] = 0
    return results


@overriding(
    "experts",
    "a pair's token is kept in 8 bits: a row index whose type was chosen for decoding",
    subtle=True,
    witness=Case(tokens=130, experts=2),
)
def token_index_of_8_bits(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    return right(self, tokens, source % 128, expert)


@overriding(
    "quantize_input",
    "bf16 tokens pass through fp16, which a kernel was compiled for: what is tiny loses bits, what is large overflows",
    subtle=True,
    witness=replace(SMALL, values="subnormals"),
)
def tokens_through_fp16(right: Any, self: Any, tokens: Tensor, expert: Any) -> Any:
    return right(self, tokens.to(torch.float16).to(tokens.dtype), expert)


LIMITS = (
    Fault(
        "output_toward_zero",
        "",
        "the output's cast cuts bits off: a shift of the fp32 bits",
        True,
        returns(_toward_zero),
        SMALL,
    ),
    Fault(
        "output_half_away",
        "",
        "the output's cast rounds ties away from zero: half added to the bits, then a shift",
        True,
        returns(_half_away),
        replace(SMALL, experts=4, values="exact_grid", activation="relu2_no_mul", law="unnormalised"),
    ),
    Fault(
        "output_by_chance",
        "",
        "the output is rounded stochastically, undeclared: an option of training kernels",
        True,
        returns(_by_chance),
        SMALL,
    ),
    Fault(
        "overflow_clamped",
        "",
        "the output saturates and never overflows: fp16's does past 65,504, which no case reaches; here past 4,096",
        True,
        returns(_saturated),
        Case(tokens=33, dtype="fp16", values="loud_quiet", activation="relu2_no_mul", law="unnormalised", bias=True),
    ),
    Fault(
        "output_subnormals_flushed",
        "",
        "subnormal outputs are 0: a kernel compiled to flush them",
        True,
        returns(_flushed),
        replace(HALF, values="loud_quiet"),
    ),
    Fault(
        "output_through_bf16",
        "",
        "fp16 outputs pass through bf16, the dtype of a buffer",
        True,
        returns(lambda total, dtype: total.bfloat16().to(dtype)),
        HALF,
    ),
    intermediate_offset_wraps,
    slot_offset_wraps,
    shape_check_overflows,
    pairs_beyond_the_grid,
    token_index_of_8_bits,
    tokens_through_fp16,
)
