"""Quantisation in groups, rows and tensors, bit for bit against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.quantize import quantize_per_tensor, quantize_per_token, quantize_per_token_group, tensor_scale

E4M3 = torch.float8_e4m3fn
Nearest = Callable[[Tensor], Tensor]
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


def scale_of(amax: Tensor, floor: float = 1e-10) -> Tensor:
    """max(amax, floor) / 448 in fp32; NaN stays NaN."""
    return torch.where(amax < floor, floor, amax).float() / torch.tensor(448.0)


def amax_of(x: Tensor) -> Tensor:
    """Each row's largest magnitude, (rows, 1); NaN where there is one."""
    return x.float().abs().amax(1, keepdim=True)


SIZES = [(1, 128), (17, 200), (33, 144), (2, 1100)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["normal", "wide", "special"]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity over infinity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_groups(
    rows: int, columns: int, kind: str, dtype: torch.dtype, quantised: Quantise, device: torch.device
) -> None:
    x = rows_of(kind, rows, columns, dtype)
    assert_same(quantize_per_token_group(x.to(device)), quantised(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_rows(rows: int, columns: int, kind: str, dtype: torch.dtype, nearest: Nearest, device: torch.device) -> None:
    x = rows_of(kind, rows, columns, dtype)
    scale = scale_of(amax_of(x))
    assert_same(quantize_per_token(x.to(device)), (nearest(x.float() / scale), scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_tensors(
    rows: int, columns: int, kind: str, dtype: torch.dtype, nearest: Nearest, device: torch.device
) -> None:
    x = rows_of(kind, rows, columns, dtype)
    got = tensor_scale(x.to(device))
    scale = scale_of(amax_of(x).amax().reshape(1))  # NaN where a row's is: amax keeps it
    # A scale that was given, too small for the largest values, which saturate; infinities too.
    given = torch.tensor([0.0023])
    for each in (scale, given):
        codes = quantize_per_tensor(x.to(device), each.to(device))
        assert_same((codes, got), (nearest(x.float() / each), scale))
    assert torch.equal(
        quantize_per_tensor(x.to(device), given[0].to(device)).view(torch.uint8),
        quantize_per_tensor(x.to(device), given.to(device)).view(torch.uint8),
    )


def test_the_floor(device: torch.device) -> None:
    x = torch.full((3, 200), 2.0**-30, device=device)
    for floor in (1e-10, 2.0**-29, 1.0):
        expected = scale_of(torch.full((1,), 2.0**-30), floor).item()
        assert quantize_per_token_group(x, amax_floor=floor)[1].unique().tolist() == [expected]
        assert quantize_per_token(x, amax_floor=floor)[1].unique().tolist() == [expected]
        assert tensor_scale(x, amax_floor=floor).tolist() == [expected]


def test_no_rows(device: torch.device) -> None:
    x = torch.empty(0, 200, dtype=torch.bfloat16, device=device)
    codes, scales = quantize_per_token_group(x)
    assert (codes.shape, scales.shape) == ((0, 200), (0, 2))
    codes, scales = quantize_per_token(x)
    assert (codes.shape, scales.shape) == ((0, 200), (0, 1))
    assert quantize_per_tensor(x, torch.ones(1, device=device)).shape == (0, 200)
    floor = scale_of(torch.zeros(1)).tolist()
    assert tensor_scale(x).tolist() == floor
    absent = torch.full((3,), -1, dtype=torch.int32, device=device)
    assert tensor_scale(torch.full((3, 200), float("nan"), device=device), present=absent).tolist() == floor


def every_way(x: Tensor, present: Tensor | None = None) -> list[Tensor]:
    """Codes as bytes and scales, (rows, ...), of every kind; the tensor's scale once for each row."""
    scale = tensor_scale(x, present=present)
    codes, group_scales = quantize_per_token_group(x, present=present)
    row_codes, row_scales = quantize_per_token(x, present=present)
    tensor_codes = quantize_per_tensor(x, scale, present=present)
    every_scale = [group_scales, row_scales, scale.expand(len(x), 1)]
    return [each.view(torch.uint8) for each in (codes, row_codes, tensor_codes)] + every_scale


def test_any_strides(device: torch.device) -> None:
    x = rows_of("normal", 20, 1300, torch.bfloat16).to(device)
    wide = torch.full((40, 2600), float("nan"), dtype=torch.bfloat16, device=device)
    wide[::2, ::2] = x
    expected = every_way(x)
    for strided in (wide[::2, ::2], x.t().contiguous().t()):
        assert all(torch.equal(a, b) for a, b in zip(every_way(strided), expected, strict=True))
    one = x[:1].expand(20, -1)
    assert all(torch.equal(a, b) for a, b in zip(every_way(one), every_way(one.contiguous()), strict=True))


def poisoned(*size: object, **options: object) -> Tensor:
    """For torch.empty: NaN in every format."""
    allocated = torch.zeros(*size, **options)  # type: ignore[call-overload]
    allocated.view(torch.uint8).fill_(0xFF)
    return allocated


def test_absent_rows_are_neither_read_nor_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows_of("normal", 37, 300, torch.bfloat16).to(device)
    present = torch.arange(37, dtype=torch.int32, device=device) % 3 - 1
    kept = present >= 0
    expected = every_way(x[kept])
    x[~kept] = float("nan")
    monkeypatch.setattr(torch, "empty", poisoned)
    got = every_way(x, present)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine[kept], theirs)
    for unwritten in got[:-1]:  # the last is the tensor's scale
        assert bool((unwritten[~kept].contiguous().view(torch.uint8) == 0xFF).all())


def test_the_same_bits_again(gpu: torch.device) -> None:
    """Thousands of programs race for the tensor's amax; a NaN anywhere is never lost."""
    x = torch.randn(5000, 3000, generator=torch.Generator().manual_seed(1)).to(gpu)
    first = every_way(x)
    assert float(first[-1][0]) == float(x.abs().max().cpu() / torch.tensor(448.0))
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(every_way(x), first, strict=True))
    x[4321, 1234] = float("nan")
    assert all(bool(tensor_scale(x).isnan().all()) for _ in range(5))


def test_captured_in_a_graph(gpu: torch.device) -> None:
    x = rows_of("normal", 33, 1100, torch.bfloat16).to(gpu)
    eager = every_way(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every_way(x)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_past_two_to_the_31_elements(gpu: torch.device) -> None:
    rows, columns = 2**31 // 4096 + 32, 4096
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=gpu)
    x[-16:] = rows_of("normal", 16, columns, torch.bfloat16).to(gpu)
    for got, expected in zip(every_way(x), every_way(x[-16:]), strict=True):
        assert torch.equal(got[-16:], expected)
        if got.dtype == torch.uint8:
            assert not bool(got[: 2**16].any())
