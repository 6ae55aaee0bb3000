"""Quantisation of activations, plain and fused with silu; and the exponential."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.activation import exponential, silu, silu_mul_quantize
from fp8moe.kernels.quantize import quantize_per_token_group

Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, left, right in zip(("codes", "scales"), got, expected, strict=True):
        left, right = left.cpu().double(), right.double()
        wrong = ~((left == right) | (left.isnan() & right.isnan()))
        assert not bool(wrong.any()), (name, wrong.nonzero()[:5].tolist(), left[wrong][:5], right[wrong][:5])


def rows_of(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "wide":
        x = x * 2.0 ** torch.randint(-30, 12, (rows, columns), generator=generator)
    elif kind == "special" and x.numel():
        x[0] = 0.0
        x[-1, -1] = float("nan")
        x[rows // 2, 0] = float("inf")
        x[rows // 3] = 1e-30
    return x.to(dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity over infinity
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["normal", "wide", "special"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (17, 200), (33, 144), (2, 1000)])
def test_quantise(
    rows: int, columns: int, kind: str, dtype: torch.dtype, quantised: Quantise, device: torch.device
) -> None:
    x = rows_of(kind, rows, columns, dtype)
    assert_same(quantize_per_token_group(x.to(device)), quantised(x))


def test_quantise_no_rows(device: torch.device) -> None:
    codes, scales = quantize_per_token_group(torch.empty(0, 200, dtype=torch.bfloat16, device=device))
    assert codes.shape == (0, 200)
    assert scales.shape == (0, 2)


def test_quantise_any_strides(quantised: Quantise, device: torch.device) -> None:
    x = rows_of("normal", 20, 300, torch.bfloat16)
    wide = torch.full((40, 600), float("nan"), dtype=torch.bfloat16, device=device)
    wide[::2, ::2] = x.to(device)
    assert_same(quantize_per_token_group(wide[::2, ::2]), quantised(x))
    assert_same(quantize_per_token_group(x.t().contiguous().to(device).t()), quantised(x))


def test_quantise_past_two_to_the_31_elements(quantised: Quantise, gpu: torch.device) -> None:
    rows, columns = 2**31 // 4096 + 32, 4096
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=gpu)
    x[-16:] = rows_of("normal", 16, columns, torch.bfloat16).to(gpu)
    codes, scales = quantize_per_token_group(x)
    assert_same((codes[-16:], scales[-16:]), quantised(x[-16:].cpu()))
    assert float(codes[: 2**16].float().abs().max()) == 0


@triton.jit
def exponential_kernel(x, result, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(result + at, exponential(tl.load(x + at)))


@triton.jit
def silu_kernel(x, result, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(result + at, silu(tl.load(x + at)))


def elementwise(kernel, x: Tensor, device: torch.device) -> Tensor:
    block = 8192
    padded = torch.nn.functional.pad(x.to(device), (0, -x.numel() % block))
    result = torch.empty_like(padded)
    kernel[(padded.numel() // block,)](padded, result, BLOCK=block, enable_fp_fusion=False)
    return result[: x.numel()].cpu()


def ulps(got: Tensor, exact: np.ndarray) -> np.ndarray:
    """|got - exact| in units of the spacing of fp32 at `exact`, subnormals included."""
    _, exponent = np.frexp(exact)
    spacing = np.exp2(np.maximum(exponent - 24, -149).astype(np.float64))
    return np.abs(got.double().numpy() - exact) / spacing


def exponents() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    near = torch.arange(-152, 130, dtype=torch.float64) * np.log(2.0) / 2  # where the integer part changes
    return torch.cat(
        [
            patterns[patterns.isfinite()],
            torch.linspace(-105.0, 89.5, 200_000),
            torch.randn(50_000, generator=generator),
            near.float(),
            torch.nextafter(near.float(), torch.tensor(float("inf"))),
        ]
    )


def test_exponential_is_within_one_ulp(device: torch.device) -> None:
    x = exponents()
    got = elementwise(exponential_kernel, x, device)
    with np.errstate(over="ignore"):
        exact = np.exp(x.double().numpy())
        to_infinity = np.isinf(exact.astype(np.float32))
    assert np.isinf(got.numpy()[to_infinity]).all()
    error = ulps(got[~to_infinity], exact[~to_infinity])
    worst = int(error.argmax())
    assert error[worst] <= 1.0, (float(error[worst]), float(x[~to_infinity][worst]))


def test_exponential_at_the_ends(device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 88.72283, 88.72284, -103.97208, -103.97209, 3e38, -3e38])
    got = elementwise(exponential_kernel, x, device).tolist()
    assert got[:2] == [inf, 0.0]
    assert got[2] != got[2]
    assert got[3:5] == [1.0, 1.0]
    assert (got[5] < inf, got[6], got[7] > 0, got[8]) == (True, inf, True, 0.0)
    assert got[9:] == [inf, 0.0]


def test_silu_is_within_three_ulps(device: torch.device) -> None:
    x = exponents()
    x = x[(x > -87.0) & (x.abs() > 2.0**-120)]
    got = elementwise(silu_kernel, x, device)
    wide = x.double().numpy()
    error = ulps(got, wide / (1 + np.exp(-wide)))
    worst = int(error.argmax())
    assert error[worst] <= 3.0, (float(error[worst]), float(x[worst]))


@pytest.mark.parametrize(("pairs", "columns"), [(1, 128), (17, 200), (33, 144)])
def test_silu_mul_quantise(pairs: int, columns: int, quantised: Quantise, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(pairs)
    gate_up = torch.randn(pairs, 2 * columns, generator=generator) * 3
    local_ids = torch.randint(0, 4, (pairs,), generator=generator).to(torch.int32)
    gate, up = gate_up[:, :columns], gate_up[:, columns:]
    # The kernel's own silu, which the test above holds to float64, so that no code can differ by a flip.
    activated = elementwise(silu_kernel, gate.reshape(-1), device).reshape(gate.shape) * up
    assert_same(silu_mul_quantize(gate_up.to(device), local_ids.to(device)), quantised(activated))


def test_silu_mul_quantise_leaves_absent_rows(device: torch.device) -> None:
    gate_up = torch.ones(20, 256, device=device)
    gate_up[5] = float("nan")
    local_ids = torch.zeros(20, dtype=torch.int32, device=device)
    local_ids[5] = -1
    codes, scales = silu_mul_quantize(gate_up, local_ids)
    kept = local_ids >= 0
    assert float(codes[kept].float().min()) == 448.0
    assert scales[kept].unique().numel() == 1
