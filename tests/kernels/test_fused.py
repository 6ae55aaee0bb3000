"""Kernels of two steps: the bits of the kernels of one (with powers of two, of torch), in the right rows, and no other
row touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.activation import activate
from fp8moe.kernels.fused import activate_quantize, quantize_to_places
from fp8moe.kernels.quantize import quantize_per_token_group
from fp8moe.keys import GroupShape
from fp8moe.layouts.deepgemm import empty_rows_fastest
from fp8moe.scaling import quantize

UNTOUCHED = 7.0


def wide(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values of every size, a NaN, infinities."""
    generator = torch.Generator().manual_seed(rows)
    sizes = torch.exp2(torch.randint(-20, 9, (rows, 1), generator=generator).float())
    values = torch.randn(rows, columns, generator=generator) * sizes
    values[0, 1], values[-1, -1], values[rows // 2, 0] = float("nan"), float("inf"), -float("inf")
    return values.to(dtype).to(device)


def codes_and_scales(rows: int, columns: int, batches: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.full((rows, columns), UNTOUCHED, device=device).to(torch.float8_e4m3fn)
    shape = (rows, -(-columns // 128)) if batches == 1 else (batches, rows // batches, -(-columns // 128))
    return codes, empty_rows_fastest(torch.empty(0, device=device), *shape).fill_(UNTOUCHED)


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], places: Tensor) -> None:
    """`expected` has a row for each place that is none of the negative ones."""
    codes, scales = found[0].view(torch.uint8), found[1].flatten(0, -2)
    rows = places[places >= 0].long()
    assert torch.equal(codes[rows], expected[0].view(torch.uint8))
    assert torch.equal(scales[rows].view(torch.int32), expected[1].view(torch.int32))
    others = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
    others[rows] = False
    assert bool((found[0].float()[others] == UNTOUCHED).all())
    assert bool((scales[others] == UNTOUCHED).all())


def some_places(count: int, rows: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    places = torch.randperm(rows, generator=generator)[:count].to(torch.int32)
    places[torch.rand(count, generator=generator) < 0.4] = -1
    return places.to(device)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(("tokens", "top_k", "columns"), [(1, 1, 128), (5, 3, 256), (37, 4, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_to_places(
    tokens: int, top_k: int, columns: int, batches: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = wide(tokens, columns, dtype, device)
    rows = 3 * (tokens * top_k + 2)
    places = some_places(tokens * top_k, rows, device)
    found = codes_and_scales(rows, columns, batches, device)
    quantize_to_places(x, places, *found)
    pairs = x.repeat_interleave(top_k, dim=0)[places >= 0]
    check(found, quantize_per_token_group(pairs), places)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", ["silu", "gelu", "swigluoai", "swiglustep", "relu2_no_mul"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(3, 128), (60, 200)])
def test_activated_and_quantized(
    rows: int, columns: int, dtype: torch.dtype, name: str, batches: int, device: torch.device
) -> None:
    gate_up = wide(rows, columns * (1 if name.endswith("_no_mul") else 2), dtype, device)
    places = some_places(rows - 1, rows, device)
    found = codes_and_scales(rows, columns, batches, device)
    activate_quantize(gate_up, name, places, *found)
    check(found, quantize_per_token_group(activate(gate_up[places[places >= 0].long()], name)), places)


def test_rows_in_order_need_no_names(device: torch.device) -> None:
    """Whatever the numbers are: by their sign alone, each tells whether the row of its place is there."""
    gate_up = wide(60, 400, torch.float32, device)
    signs = torch.randint(-3, 7, (60,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).to(device)
    there = torch.arange(60, dtype=torch.int32, device=device)
    named, in_order = codes_and_scales(60, 200, 1, device), codes_and_scales(60, 200, 1, device)
    activate_quantize(gate_up, "silu", torch.where(signs >= 0, there, -1), *named)
    activate_quantize(gate_up, "silu", signs, *in_order, in_order=True)
    assert 0 < int((signs >= 0).sum()) < 60
    assert torch.equal(named[0].view(torch.uint8), in_order[0].view(torch.uint8))
    assert torch.equal(named[1].view(torch.int32), in_order[1].view(torch.int32))


# -- scales that are powers of two --


def by_torch(values: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    """The same by `fp8moe.scaling`, with one NaN for all, since a NaN's bits are nobody's business."""
    how: dict[str, Any] = {"scale_rounding": "power_of_two", "amax_floor": amax_floor}
    codes, scale = quantize(values, GroupShape(1, 128), **how)
    return codes, torch.where(scale.isnan(), torch.nan, scale)


def with_one_nan(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return found[0], torch.where(found[1].isnan(), torch.nan, found[1])


def around_powers(device: torch.device) -> Tensor:
    """(rows, 256) fp32: amaxes of 448 times every power of two, and one step to both sides of it, down to subnormal
    ones and quotients; zeros; values of every size beside them."""
    powers = 448 * torch.exp2(torch.arange(-140, 119).double())
    here = powers.float()
    amax = torch.cat([torch.nextafter(here, torch.zeros(())), here, torch.nextafter(here, torch.full((), torch.inf))])
    amax = torch.cat([amax, torch.tensor([0.0, 2.0**-149, 2.0**-126])])
    generator = torch.Generator().manual_seed(5)
    below = torch.exp2(-20 * torch.rand(len(amax), 256, generator=generator))
    values = torch.where(torch.rand(below.shape, generator=generator) < 0.5, -below, below) * amax[:, None]
    values[:, 3] = -amax
    values[:, 200] = amax
    return values.to(device)


@pytest.mark.parametrize("amax_floor", [1e-10, 1e-4, 0.0])
def test_powers_of_two_are_those_of_torch(amax_floor: float, device: torch.device) -> None:
    x = around_powers(device)
    found = codes_and_scales(len(x), 256, 1, device)
    places = torch.arange(len(x), dtype=torch.int32, device=device)
    quantize_to_places(x, places, *found, amax_floor=amax_floor, power_of_two=True)
    check(found, by_torch(x, amax_floor), places)
    assert bool((torch.frexp(found[1])[0] == 0.5).all())
    assert bool((found[1] >= torch.finfo(torch.float32).tiny).all())


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(("tokens", "top_k", "columns"), [(5, 3, 256), (37, 4, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_to_places_by_powers_of_two(
    tokens: int, top_k: int, columns: int, batches: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = wide(tokens, columns, dtype, device)
    rows = 3 * (tokens * top_k + 2)
    places = some_places(tokens * top_k, rows, device)
    found = codes_and_scales(rows, columns, batches, device)
    quantize_to_places(x, places, *found, power_of_two=True)
    pairs = x.repeat_interleave(top_k, dim=0)[places >= 0]
    check(with_one_nan(found), by_torch(pairs, 1e-10), places)


@pytest.mark.parametrize("name", ["silu", "swiglustep", "relu2_no_mul"])
@pytest.mark.parametrize(("rows", "columns", "batches"), [(3, 128, 1), (60, 200, 3)])
@pytest.mark.parametrize("amax_floor", [1e-10, 1e-4])
def test_activated_and_quantized_by_powers_of_two(
    rows: int, columns: int, batches: int, name: str, amax_floor: float, device: torch.device
) -> None:
    gate_up = wide(rows, columns * (1 if name.endswith("_no_mul") else 2), torch.bfloat16, device)
    places = some_places(rows - 1, rows, device)
    found = codes_and_scales(rows, columns, batches, device)
    activate_quantize(gate_up, name, places, *found, amax_floor=amax_floor, power_of_two=True)
    activated = activate(gate_up[places[places >= 0].long()], name)
    check(with_one_nan(found), by_torch(activated, amax_floor), places)


def test_no_rows(device: torch.device) -> None:
    codes, scales = codes_and_scales(2, 128, 1, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    activate_quantize(torch.zeros(2, 256, device=device), "silu", none, codes, scales)
    assert bool((codes.float() == UNTOUCHED).all())
