"""The portable activations are accurate: against the formulas in float64, in units in the last place of fp32."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp8moe.activations import GATED, NON_GATED
from fp8moe.reference.portable import PORTABLE, exponential, gelu, silu

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(largest: float) -> Tensor:
    """Dense around zero, over all binades down to the smallest, and at large magnitudes; both signs."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand(20_000, generator=generator) * largest
    tiny = 2.0 ** (torch.rand(10_000, generator=generator).double() * 149 - 149).float()
    values = torch.cat([plain, tiny, torch.linspace(0, largest, 20_001)])
    return torch.cat([values, -values])


def ulps(got: Tensor, exact: Tensor) -> Tensor:
    """Distance in the spacing of fp32 at the exact result."""
    exponent = (torch.frexp(exact)[1] - 1).clamp(min=-126)
    spacing = torch.ldexp(torch.ones_like(exact), exponent - 23)
    return (got.double() - exact).abs() / spacing


def exact_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def exact_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize(
    ("function", "exact", "largest", "most"),
    [
        (exponential, torch.exp, 88.0, 1.0),
        (silu, exact_silu, 87.0, 3.0),
        (gelu, exact_gelu, 13.0, 5.0),
    ],
)
def test_accuracy(
    function: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], largest: float, most: float
) -> None:
    x = numbers(largest)
    assert float(ulps(function(x), exact(x.double())).max()) <= most


def test_where_the_exponential_ends() -> None:
    x = torch.tensor([88.72283, 88.72284, 1e30, torch.inf, -103.97, -103.98, -1e30, -torch.inf, 0.0, -0.0])
    assert exponential(x).tolist() == [
        pytest.approx(3.4028e38, rel=1e-4),
        math.inf,
        math.inf,
        math.inf,
        2.0**-149,
        0.0,
        0.0,
        0.0,
        1.0,
        1.0,
    ]
    assert math.isnan(float(exponential(torch.tensor(torch.nan))))


@pytest.mark.parametrize("name", PORTABLE)
def test_far_out_and_nan(name: str) -> None:
    large = torch.tensor([[1e4, -1e4, torch.nan]])
    values = torch.cat([large, large], 1) if name in GATED else large
    got = PORTABLE[name](values)[0]
    expected = {
        "silu": (1e8, 0.0),
        "gelu": (1e8, 0.0),
        "swigluoai": (56.0 / (1 + math.exp(-1.702 * 7)), 0.0),
        "swiglustep": (49.0, 0.0),
        "silu_no_mul": (1e4, 0.0),
        "gelu_no_mul": (1e4, 0.0),
        "relu2_no_mul": (1e8, 0.0),
    }[name]
    assert tuple(got[:2].tolist()) == pytest.approx(expected, rel=2.0**-21)
    assert bool(got[2].isnan())


@pytest.mark.parametrize("name", PORTABLE)
def test_gates_and_clamps(name: str) -> None:
    """The whole activation, whose products and clamps add a rounding or two."""
    x = numbers(12.0)
    gate, up = (x, x.flip(0).roll(7)) if name in GATED else (x, x)
    got = PORTABLE[name](torch.stack([gate, up], 1).reshape(-1, 2) if name in GATED else x[:, None])[:, 0]
    g, u = gate.double(), up.double()
    exact = {
        "silu": lambda: exact_silu(g) * u,
        "gelu": lambda: exact_gelu(g) * u,
        "swigluoai": lambda: g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)) * (u.clamp(-7, 7) + 1),
        "swiglustep": lambda: exact_silu(g).clamp(max=7) * u.clamp(-7, 7),
        "silu_no_mul": lambda: exact_silu(g),
        "gelu_no_mul": lambda: exact_gelu(g),
        "relu2_no_mul": lambda: g.clamp(min=0).square(),
    }[name]()
    # Relative to the result, which may be subnormal: then the product rounds to a multiple of the smallest number.
    error = (got.double() - exact).abs() - 2.0**-148 * (1 + u.abs())
    assert float((error / exact.abs().clamp(min=2.0**-126)).max()) <= {"swigluoai": 24}.get(name, 6) * 2.0**-23


def test_every_activation_is_there() -> None:
    assert set(PORTABLE) == {*GATED, *NON_GATED}
