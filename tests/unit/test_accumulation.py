"""Bounds of a GEMM's accumulation: above what fp32 orders and simulated matrix units do, and not far above."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conformance.bounds.accumulation import UNKNOWN, Operands, accumulation_error
from fp8moe.recipe import FP32, Arithmetic
from tests.unit.honest_experts import ORDERS, exponents, powers, simulated_unit

pytestmark = pytest.mark.usefixtures("one_thread")

FP8_BITS = 6
ROWS, COLUMNS = 12, 16


def codes(values: Tensor) -> Tensor:
    """e4m3 values, groups of 128 scaled to their largest, 448."""
    groups = values.view(len(values), -1, 128)
    scaled = (groups / groups.abs().amax(-1, keepdim=True) * 448).view(values.shape)
    step = powers(exponents(scaled).clamp(min=-6) - 3)
    return torch.round(scaled / step) * step


def bound_of(a: Tensor, b: Tensor, arithmetic: Arithmetic) -> Tensor:
    least = torch.full((1, 1), 2.0**-6, dtype=torch.float64)
    return accumulation_error(Operands(a, b, least, least, FP8_BITS), arithmetic)


def operands(law: str, terms: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, terms, generator=generator, dtype=torch.float64)

    def wide(rows: int) -> Tensor:
        return normal(rows) * 2.0 ** (12 * torch.rand(rows, terms, generator=generator, dtype=torch.float64) - 6)

    a, b = (wide(ROWS), wide(COLUMNS)) if "wide" in law else (normal(ROWS), normal(COLUMNS))
    if "same sign" in law:
        a, b = a.abs(), b.abs()
    if law == "outlier channels":
        a[:, ::97] *= 32
    if law == "alternating":
        a, b = a.abs() * torch.where(torch.arange(terms) % 2 == 0, 1.0, -1.0), b.abs()
    if law == "loud first group":
        a[:, 32:] *= 2.0**-8
    if law == "gated":
        a = torch.nn.functional.silu(a) * normal(ROWS)
    if "quiet" in law:  # subnormal codes, as a loud token's neighbour has them under a per-tensor scale
        return torch.round(normal(ROWS) * 2) * 2.0**-9, codes(b)
    return codes(a), codes(b)


LAWS = (
    "normal",
    "same sign",
    "outlier channels",
    "alternating",
    "loud first group",
    "gated",
    "quiet",
    "wide",
    "wide, same sign",
    "wide, quiet",
)
UNITS = {
    "hopper, promoted": Arithmetic("hopper.wgmma", 13, 32, 128),
    "hopper, unpromoted": Arithmetic("hopper.wgmma", 13, 32, None),
    "ada": Arithmetic("ada.mma", 13, 16, 128),
    "f16 mma": Arithmetic("hopper.mma_f16", 25, 16, 128),
    "blackwell, unpromoted": Arithmetic("blackwell.tcgen05", 25, 32, None),
}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("law", LAWS)
def test_a_simulated_unit_stays_within_its_bound(law: str, unit: str) -> None:
    arithmetic = UNITS[unit]
    for terms, seed in ((128, 0), (512, 1), (1024, 2)):
        a, b = operands(law, terms, seed)
        error = (simulated_unit(a, b, arithmetic) - a @ b.t()).abs()
        bound = bound_of(a, b, arithmetic)
        # Six standard deviations, or the sound bound: what is seen lies at half of it in the worst of these laws.
        assert float((error / bound).max()) <= 3 / 4, (law, unit, terms)


@pytest.mark.parametrize("law", LAWS)
def test_every_order_of_fp32_stays_within_its_bound(law: str) -> None:
    for terms, seed in ((128, 0), (1024, 1), (4096, 2)):
        a, b = operands(law, terms, seed)
        bound = bound_of(a, b, FP32)
        for name, product in ORDERS.items():
            error = (product(a.float(), b.float()).double() - a @ b.t()).abs()
            assert float((error / bound).max()) <= 1, (name, law, terms)


def test_the_bound_of_a_promoted_unit_is_useful() -> None:
    """A dozen times the errors' root mean square on ordinary data, three orders of magnitude above fp32's."""
    a, b = operands("normal", 1024, 3)
    arithmetic = UNITS["hopper, promoted"]
    spread = (simulated_unit(a, b, arithmetic) - a @ b.t()).square().mean().sqrt()
    bound = bound_of(a, b, arithmetic)
    assert bound.mean() < 20 * spread
    assert bound.mean() > 100 * bound_of(a, b, FP32).mean()
    # The mean of the truncations, not their spread, is what a unit errs by where signs agree.
    a, b = operands("same sign", 1024, 3)
    unpromoted = UNITS["hopper, unpromoted"]
    error = a @ b.t() - simulated_unit(a, b, unpromoted)
    assert float(error.min()) > 0
    assert float((bound_of(a, b, unpromoted) / error).max()) < 4


def test_a_coarser_unit_than_declared_is_outside() -> None:
    a, b = operands("normal", 1024, 4)
    exact = a @ b.t()
    for computed, declared in ((UNITS["hopper, promoted"], FP32), (UNITS["hopper, promoted"], UNITS["f16 mma"])):
        error = (simulated_unit(a, b, computed) - exact).abs()
        assert float((error / bound_of(a, b, declared)).max()) > 10
    a, b = operands("same sign", 1024, 4)
    error = (simulated_unit(a, b, UNITS["hopper, unpromoted"]) - a @ b.t()).abs()
    assert float((error / bound_of(a, b, UNKNOWN)).max()) > 1


def test_exact_sums_have_no_truncation_to_allow_for() -> None:
    ones = torch.ones(2, 256, dtype=torch.float64)
    fp32 = bound_of(ones, ones, FP32)
    promoted = bound_of(ones, ones, UNKNOWN)
    assert torch.equal(simulated_unit(ones, ones, UNKNOWN), ones @ ones.t())
    assert float(promoted.max()) < 2  # of 256: the bound cannot know that nothing was lost
    assert float(fp32.max()) < 2.0**-10
    nothing = bound_of(ones * 0, ones, UNKNOWN)
    assert float(nothing.max()) <= 256 * 2.0**-126


def test_partial_groups_and_chains() -> None:
    for terms in (1, 31, 130, 200):
        a, b = torch.randn(3, terms, dtype=torch.float64), torch.randn(4, terms, dtype=torch.float64)
        for arithmetic in (FP32, UNKNOWN, UNITS["hopper, unpromoted"]):
            bound = bound_of(a, b, arithmetic)
            assert bound.shape == (3, 4)
            assert bool((bound > 0).all() and torch.isfinite(bound).all())
