"""Kernels of two steps: the bits of the kernels of one, in the right rows, and no other row touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.activation import activate
from fp8moe.kernels.fused import activate_quantize, quantize_to_places
from fp8moe.kernels.quantize import quantize_per_token_group
from fp8moe.layouts.deepgemm import empty_rows_fastest

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


def test_no_rows(device: torch.device) -> None:
    codes, scales = codes_and_scales(2, 128, 1, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    activate_quantize(torch.zeros(2, 256, device=device), "silu", none, codes, scales)
    assert bool((codes.float() == UNTOUCHED).all())
