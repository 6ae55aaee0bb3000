"""The activations: bit for bit against their steps, carried out apart in numpy, and against the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from fp8moe.activations import GATED, NON_GATED
from fp8moe.kernels.activation import activate, exponential, gelu, silu

F32 = NDArray[np.float32]
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def fma(x: F32 | float, y: F32 | float, z: F32 | float) -> F32:
    """x * y + z rounded once to fp32.

    The product of two fp32 is exact in float64. Its sum with z is rounded to odd there: 53 bits are more than 24 + 2,
    so the second rounding, to nearest, does what a single one would.
    """
    x, y, z = (np.asarray(value, np.float32).astype(np.float64) for value in (x, y, z))
    product = x * y
    total = product + z
    back = total - product
    lost = (product - (total - back)) + (z - back)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    away = (lost > 0) == (total > 0)
    odd = np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(np.float64)
    return odd.astype(np.float32)


def f(value: float) -> np.float32:
    """A constant, which must be an fp32 number to the 17 digits given."""
    narrow = np.float32(value)
    assert float(f"{float(narrow):.17g}") == value or abs(float(narrow) / value - 1) < 1e-15
    return narrow


def exponential_steps(x: F32) -> F32:
    limit = f(88.72283172607422)
    c = np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(-104), limit))
    n = fma(c, f(1.4426950216293335), f(12582912)) - f(12582912)
    r = fma(n, f(-0.693145751953125), c)
    r = fma(n, f(-1.428606765330187e-06), r)
    p = fma(f(0.0013814598787575960), r, f(0.008368717506527901))
    for k in (0.04166838899254799, 0.16666521131992340, 0.49999994039535522, 1.0, 1.0):
        p = fma(p, r, f(k))
    # p 2^n is exact in float64, so the way back rounds once.
    finite = np.ldexp(p.astype(np.float64), n.astype(np.int32)).astype(np.float32)
    return np.where(np.isnan(x), x, np.where(x > limit, np.float32(np.inf), finite))


def silu_steps(x: F32) -> F32:
    return x / (np.float32(1) + exponential_steps(-x))


def gelu_steps(x: F32) -> F32:
    one = np.float32(1)
    a = np.minimum(np.abs(x), np.float32(15))  # which keeps NaN
    s = a * np.float32(0.25)
    t = one / (one + s)
    lacking = t * fma(-t, s, one - t)
    u = fma(2.0, lacking, fma(2.0, t, -1.0))
    p = fma(f(-3.1558392947772518e-05), u, f(-4.9800783017417416e-05))
    for k in (
        0.00039552670205011964,
        0.00088136515114456415,
        -0.0018838857067748904,
        -0.015101753175258636,
        -0.046630315482616425,
        -0.096784129738807678,
        -0.15197417140007019,
        -0.18882128596305847,
    ):
        p = fma(p, u, f(k))
    w = fma(p, lacking, p * t) * a
    h = a * a
    w = fma(w, fma(-a, a, h) * np.float32(0.5), w)
    return fma(exponential_steps(h * np.float32(-0.5)), w, np.where(x < 0, x * np.float32(0), x))


def swigluoai_steps(gate: F32, up: F32) -> F32:
    g, u = np.minimum(gate, np.float32(7)), np.clip(up, np.float32(-7), np.float32(7))
    t = g / (np.float32(1) + exponential_steps(-(g * np.float32(1.702))))
    return t * (u + np.float32(1))


STEPS: dict[str, Callable[..., F32]] = {
    "silu": lambda gate, up: silu_steps(gate) * up,
    "gelu": lambda gate, up: gelu_steps(gate) * up,
    "swigluoai": swigluoai_steps,
    "swiglustep": lambda gate, up: (
        np.minimum(silu_steps(gate), np.float32(7)) * np.clip(up, np.float32(-7), np.float32(7))
    ),
    "silu_no_mul": silu_steps,
    "gelu_no_mul": gelu_steps,
    "relu2_no_mul": lambda x: np.square(np.maximum(x, np.float32(0))),
}


def patterns(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)


TINY = [0.0, 2.0**-149, 2.0**-126, 2.0**-24]
ENDS = [1.0, 5.25, 6.999999, 7.0, 7.000001, 13.5, 14.2, 15.0, 15.000001, 88.72283, 88.72284, 103.97208, 104.5]
SPECIALS = torch.tensor([*TINY, *ENDS, 3e38, float("inf"), float("nan")])


def values(count: int, seed: int) -> Tensor:
    """Every bit pattern, ordinary values, the tails, and the specials of both signs."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    parts = [patterns(count, seed), normal, normal * 2.0**-10, normal * 6, normal * 40, SPECIALS, -SPECIALS]
    return torch.cat(parts)


def pairs_of(count: int) -> tuple[Tensor, Tensor]:
    """Gate and up: drawn apart, then every special with every special."""
    both = torch.cat([SPECIALS, -SPECIALS])
    gate = torch.cat([values(count, 0), both.repeat(len(both))])
    up = torch.cat([values(count, 1).flip(0), both.repeat_interleave(len(both))])
    return gate, up


def same_bits(got: Tensor, expected: Tensor) -> Tensor:
    """NaN equals NaN; +0 is not -0."""
    return (got.view(torch.int32) == expected.view(torch.int32)) | (got.isnan() & expected.isnan())


def in_rows(x: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % columns)).reshape(-1, columns)


def test_every_activation_has_its_steps() -> None:
    assert set(STEPS) == {*GATED, *NON_GATED}


@pytest.mark.parametrize("name", STEPS)
def test_bits(name: str, device: torch.device) -> None:
    gate, up = (in_rows(x, 300) for x in pairs_of(3000))
    operands = (gate, up) if name in GATED else (gate,)
    got = activate(torch.cat(operands, 1).to(device), name).cpu()
    expected = torch.from_numpy(STEPS[name](*(x.numpy() for x in operands)))
    wrong = ~same_bits(got, expected)
    assert not bool(wrong.any()), [x[wrong][:5].tolist() for x in (gate, up, got, expected)]


@pytest.mark.parametrize("name", STEPS)
def test_nan_in_gives_nan(name: str, device: torch.device) -> None:
    nan = float("nan")
    gated = torch.tensor([[nan, 1.0, nan, 1.0, 1.0, nan]])  # gate nan, 1, nan; up 1, 1, nan
    x = gated if name in GATED else torch.tensor([[nan, 1.0, nan]])
    assert activate(x.to(device), name).isnan().cpu().tolist() == [[True, False, True]]
    if name in GATED:
        assert activate(torch.tensor([[1.0, nan]], device=device), name).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["silu", "relu2_no_mul"])
def test_rounded_once_to_the_dtype(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x = (torch.randn(33, 288, generator=torch.Generator().manual_seed(4)) * 3).to(device)
    x[3, 3] = 1e30
    assert torch.equal(activate(x, name, dtype=dtype), activate(x, name).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STEPS)
def test_16_bit_values_are_computed_in_fp32(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x = (torch.randn(33, 288, generator=torch.Generator().manual_seed(6)) * 3).to(device, dtype)
    assert torch.equal(activate(x, name), activate(x.float(), name))


@pytest.mark.parametrize(("name", "width"), [("swigluoai", 400), ("gelu_no_mul", 200)])
def test_absent_rows_are_neither_read_nor_written(
    name: str, width: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 37
    x = torch.randn(rows, width + 5, generator=torch.Generator().manual_seed(5)).to(device)[:, :width]
    present = torch.arange(rows, dtype=torch.int32, device=device) % 3 - 1
    expected = activate(x.contiguous(), name)
    x[present < 0] = float("nan")
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: allocate(*size, **options).fill_(77.0))
    got = activate(x, name, present=present)
    assert torch.equal(got[present >= 0], expected[present >= 0])
    assert bool((got[present < 0] == 77.0).all())


def test_no_rows(device: torch.device) -> None:
    assert activate(torch.empty(0, 256, device=device), "silu").shape == (0, 128)
    assert activate(torch.empty(0, 256, device=device), "silu_no_mul").shape == (0, 256)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="activation='tanh': expected one of silu, gelu"):
        activate(torch.empty(1, 2), "tanh")


def test_past_two_to_the_31_elements(gpu: torch.device) -> None:
    rows, columns = 2**31 // 4096 + 32, 4096
    gate_up = torch.zeros(rows, columns, device=gpu)
    gate_up[-16:] = torch.randn(16, columns, generator=torch.Generator().manual_seed(6)).to(gpu)
    whole = activate(gate_up, "silu", dtype=torch.bfloat16)
    assert torch.equal(whole[-16:], activate(gate_up[-16:], "silu", dtype=torch.bfloat16))
    assert not bool(whole[: 2**16].any())


@triton.jit
def elementwise_kernel(x, result, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(result + at, FUNCTION(tl.load(x + at)))


def elementwise(function: object, x: Tensor, device: torch.device) -> Tensor:
    block = 8192
    padded = torch.nn.functional.pad(x.to(device), (0, -x.numel() % block))
    result = torch.empty_like(padded)
    elementwise_kernel[(padded.numel() // block,)](
        padded, result, FUNCTION=function, BLOCK=block, enable_fp_fusion=False
    )
    return result[: x.numel()].cpu()


def ulps(got: Tensor, exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """|got - exact| in units of the spacing of fp32 at `exact`, subnormals included."""
    _, exponent = np.frexp(exact)
    spacing = np.exp2(np.maximum(exponent - 24, -149).astype(np.float64))
    error: NDArray[np.float64] = np.abs(got.double().numpy() - exact) / spacing
    return error


def assert_within(limit: float, got: Tensor, exact: NDArray[np.float64], x: Tensor) -> None:
    error = ulps(got, exact)
    worst = int(error.argmax())
    assert error[worst] <= limit, (float(error[worst]), float(x[worst]), float(got[worst]), exact[worst])


def exponents() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = patterns(100_000, 0)
    near = torch.arange(-152, 130, dtype=torch.float64) * np.log(2.0) / 2  # where the integer part changes
    return torch.cat(
        [
            drawn[drawn.isfinite()],
            torch.linspace(-105.0, 89.5, 200_000),
            torch.randn(50_000, generator=generator),
            near.float(),
            torch.nextafter(near.float(), torch.tensor(float("inf"))),
        ]
    )


def test_exponential_is_within_one_ulp(device: torch.device) -> None:
    x = exponents()
    got = elementwise(exponential, x, device)
    with np.errstate(over="ignore"):
        exact = np.exp(x.double().numpy())
        to_infinity = np.isinf(exact.astype(np.float32))
    assert np.isinf(got.numpy()[to_infinity]).all()
    assert_within(1.0, got[~to_infinity], exact[~to_infinity], x[~to_infinity])


def test_exponential_at_the_ends(device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 88.72283, 88.72284, -103.97208, -103.97209, 3e38, -3e38])
    got = elementwise(exponential, x, device).tolist()
    assert got[:2] == [inf, 0.0]
    assert got[2] != got[2]
    assert got[3:5] == [1.0, 1.0]
    assert (got[5] < inf, got[6], got[7] > 0, got[8]) == (True, inf, True, 0.0)
    assert got[9:] == [inf, 0.0]


def test_silu_is_within_three_ulps(device: torch.device) -> None:
    x = exponents()
    x = x[(x > -87.0) & (x.abs() > 2.0**-120)]
    wide = x.double().numpy()
    assert_within(3.0, elementwise(silu, x, device), wide / (1 + np.exp(-wide)), x)


def test_gelu_is_within_five_ulps(device: torch.device) -> None:
    """For both signs, into the subnormal results of the far tail."""
    drawn = patterns(20_000, 3)
    near_zero = torch.randn(20_000, generator=torch.Generator().manual_seed(7))
    x = torch.cat([torch.linspace(-15.5, 8.0, 60_000), near_zero, near_zero * 2.0**-8, drawn[drawn.isfinite()]])
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2.0)) for v in x.double().tolist()])
    assert_within(5.0, elementwise(gelu, x, device), exact, x)


def test_gelu_at_the_ends(device: torch.device) -> None:
    inf = float("inf")
    got = elementwise(gelu, torch.tensor([inf, -inf, 0.0, -0.0, 3e38, -3e38, 2.0**-149]), device)
    assert got[1].isnan()
    kept = torch.tensor([0, 2, 3, 4, 5])
    assert torch.equal(got[kept].view(torch.int32), torch.tensor([inf, 0.0, -0.0, 3e38, -0.0]).view(torch.int32))
    assert 0.0 <= float(got[6]) <= 2.0**-149
