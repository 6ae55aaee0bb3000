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


def test_no_rows(device: torch.device) -> None:
    codes, none = torch.empty(0, 128, device=device, dtype=torch.float8_e4m3fn), torch.empty(0, device=device)
    places = none.to(torch.int32)
    quantize_rows_to_places(torch.empty(0, 128, device=device), places, codes, none)
    activate_quantize_rows(torch.empty(0, 256, device=device), "silu", places, codes, none)
