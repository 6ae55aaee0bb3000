"""One scale for a row, or given ones: the bits of the kernels of one step, in the right rows, no other row touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.activation import activate
from fp8moe.kernels.fused_rows import activate_quantize_rows, quantize_rows_to_places
from fp8moe.kernels.quantize import MOST_COLUMNS, quantize_per_tensor, quantize_per_token
from tests.kernels.test_fused import UNTOUCHED, check, codes_and_scales, some_places, wide


def expected(values: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if scale is None:
        return quantize_per_token(values)
    return quantize_per_tensor(values, scale), scale[:, None]


def given_scales(parts: int, device: torch.device) -> Tensor | None:
    return torch.tensor([0.25, 3.0, 0.01])[:parts].to(device) if parts else None


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize(("tokens", "top_k", "columns"), [(3, 1, 128), (36, 4, 200), (6, 3, MOST_COLUMNS + 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_to_places(
    tokens: int, top_k: int, columns: int, parts: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = wide(tokens, columns, dtype, device)
    rows = tokens * top_k + 7
    places, given = some_places(tokens * top_k, rows, device), given_scales(parts, device)
    codes, _ = codes_and_scales(rows, columns, 1, device)
    scales = torch.full((rows,), UNTOUCHED, device=device)
    quantize_rows_to_places(x, places, codes, scales, given)
    held = places >= 0
    of_pair = None if given is None else given.repeat_interleave(tokens * top_k // parts)[held]
    check((codes, scales[:, None]), expected(x.repeat_interleave(top_k, dim=0)[held], of_pair), places)


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("name", ["silu", "gelu", "swigluoai", "relu2_no_mul"])
@pytest.mark.parametrize(("rows", "columns", "dtype"), [(3, 128, torch.bfloat16), (60, 200, torch.float32)])
def test_activated_and_quantized(
    rows: int, columns: int, dtype: torch.dtype, name: str, parts: int, device: torch.device
) -> None:
    gate_up = wide(rows, columns * (1 if name.endswith("_no_mul") else 2), dtype, device)
    places, given = some_places(rows - 1, rows, device), given_scales(parts, device)
    codes, _ = codes_and_scales(rows, columns, 1, device)
    scales = torch.full((rows,), UNTOUCHED, device=device)
    activate_quantize_rows(gate_up, name, places, codes, scales, given)
    there = places[places >= 0].long()
    of_row = None if given is None else given.repeat_interleave(rows // parts)[there]
    check((codes, scales[:, None]), expected(activate(gate_up[there], name), of_row), places)


@pytest.mark.parametrize("given", [False, True])
def test_rows_in_order_need_no_names(given: bool, device: torch.device) -> None:
    """Whatever the numbers are: by their sign alone, each tells whether the row of its place is there."""
    gate_up = wide(60, 400, torch.float32, device)
    signs = torch.randint(-3, 7, (60,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).to(device)
    there = torch.arange(60, dtype=torch.int32, device=device)
    scale = given_scales(1, device) if given else None
    named, in_order = codes_and_scales(60, 200, 1, device)[0], codes_and_scales(60, 200, 1, device)[0]
    scales, of_order = torch.full((60,), UNTOUCHED, device=device), torch.full((60,), UNTOUCHED, device=device)
    activate_quantize_rows(gate_up, "silu", torch.where(signs >= 0, there, -1), named, scales, scale)
    activate_quantize_rows(gate_up, "silu", signs, in_order, of_order, scale, in_order=True)
    assert 0 < int((signs >= 0).sum()) < 60
    assert torch.equal(named.view(torch.uint8), in_order.view(torch.uint8))
    assert torch.equal(scales.view(torch.int32), of_order.view(torch.int32))


def test_no_rows(device: torch.device) -> None:
    codes, none = torch.empty(0, 128, device=device, dtype=torch.float8_e4m3fn), torch.empty(0, device=device)
    places = none.to(torch.int32)
    quantize_rows_to_places(torch.empty(0, 128, device=device), places, codes, none)
    activate_quantize_rows(torch.empty(0, 256, device=device), "silu", places, codes, none)
