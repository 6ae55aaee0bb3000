"""What the adapters of DeepGEMM do around its GEMMs, by our kernels; the GEMMs are played, in the arithmetic that is
declared: the verdict is equality, stage by stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.cases import Case
from conformance.checks import check_case
from conformance.matrix import BY_BITS
from conformance.plan import Subject, resolve_target
from conformance.results import CheckResult, Status
from fp8moe import FusedMoEActivationFormat, Support
from fp8moe.backends.batched_deepgemm import BatchedDeepGemmE8M0Experts, BatchedDeepGemmExperts
from fp8moe.backends.deepgemm import DeepGemmE8M0Experts, DeepGemmExperts
from fp8moe.backends.deepgemm_stages import PowersOfTwo
from fp8moe.experts import MoEWeights
from fp8moe.platforms import Platform
from fp8moe.recipe import Contract
from fp8moe.schemes import BLOCK
from tests.contracts.played_deepgemm import WIDE, PlayedLibrary, as_hopper


def anywhere(layout: FusedMoEActivationFormat) -> Support:
    return Support(
        device=lambda platform, env: True,
        needs="nothing",
        scheme=lambda platform, weight_key, activation_key: (weight_key, activation_key) == BLOCK,
        activations=frozenset({"silu", "swiglustep"}),
        activation_format=layout,
    )


class Contiguous(PlayedLibrary, DeepGemmExperts):
    product = staticmethod(as_hopper)
    support = anywhere(FusedMoEActivationFormat.Standard)


class Masked(PlayedLibrary, BatchedDeepGemmExperts):
    product = staticmethod(as_hopper)
    support = anywhere(FusedMoEActivationFormat.BatchedExperts)


class ContiguousE8M0(PlayedLibrary, DeepGemmE8M0Experts):
    product = staticmethod(as_hopper)
    support = anywhere(FusedMoEActivationFormat.Standard)


class MaskedE8M0(PlayedLibrary, BatchedDeepGemmE8M0Experts):
    product = staticmethod(as_hopper)
    support = anywhere(FusedMoEActivationFormat.BatchedExperts)


def judged(cls: type[PlayedLibrary], device: torch.device, **fields: Any) -> CheckResult:
    target = resolve_target("auto" if device.type == "cuda" else "interpreter")
    return check_case(Case(**(WIDE | {"values": "block_scales"} | fields)), Subject(cls.__name__, cls, ""), target)


def status(cls: type[PlayedLibrary], device: torch.device, **fields: Any) -> tuple[Status, str]:
    result = judged(cls, device, **fields)
    return result.status, result.reason


@pytest.mark.parametrize(
    "fields",
    [{}, {"tokens": 127}, {"law": "skewed"}, {"ep": "2:1"}, {"activation": "swiglustep"}],
    ids=["plain", "by Triton", "few experts", "a rank of two", "swiglustep"],
)
def test_contiguous(fields: dict[str, Any], device: torch.device) -> None:
    assert status(Contiguous, device, **fields) == (Status.PASSED, "")


@pytest.mark.parametrize("fields", [{}, {"law": "skewed"}, {"ep": "2:1"}])
def test_masked(fields: dict[str, Any], device: torch.device) -> None:
    assert status(Masked, device, **fields, tokens=9, inter=128) == (Status.PASSED, "")


# -- E8M0 --


@pytest.mark.parametrize(
    "fields",
    [
        WIDE,
        {"tokens": 127},
        {"tokens": 1},
        {"law": "skewed"},
        {"ep": "2:1"},
        {"activation": "swiglustep"},
        {"values": "bimodal_scales"},
        {"values": "zero_blocks"},
    ],
    ids=["plain", "odd", "one token", "few experts", "a rank of two", "swiglustep", "below the floor", "zeros"],
)
def test_contiguous_with_powers_of_two(fields: dict[str, Any], device: torch.device) -> None:
    result = judged(ContiguousE8M0, device, **({"tokens": 37, "inter": 256} | fields))
    assert (result.status, result.reason, result.judged_by) == (Status.PASSED, "", BY_BITS)


@pytest.mark.parametrize("fields", [{}, {"law": "skewed"}, {"ep": "2:1"}, {"values": "bimodal_scales"}])
def test_masked_with_powers_of_two(fields: dict[str, Any], device: torch.device) -> None:
    result = judged(MaskedE8M0, device, **fields, tokens=9, inter=128)
    assert (result.status, result.reason, result.judged_by) == (Status.PASSED, "", BY_BITS)


class NotRequantised(PowersOfTwo):
    """Gives the checkpoint's weights to the kernel, whose scales are any."""

    def converted_weights(self, platform: Platform, *, e8m0: bool = False) -> MoEWeights:
        return super().converted_weights(platform)


class ByExponents(PowersOfTwo):
    """Of the checkpoint's scales it takes the exponents."""

    def converted_weights(self, platform: Platform, *, e8m0: bool = False) -> MoEWeights:
        given = super().converted_weights(platform)
        scales = (given.w13_scale, given.w2_scale)
        cut = [(scale.view(torch.int32) >> 23 << 23).view(torch.float32) for scale in scales if scale is not None]
        return MoEWeights(given.w13, given.w2, *cut)


class Continuous(PowersOfTwo):
    """Leaves the activations' scales as they are."""

    e8m0 = False

    def converted_weights(self, platform: Platform, *, e8m0: bool = False) -> MoEWeights:
        return super().converted_weights(platform, e8m0=True)


class Undeclared(PowersOfTwo):
    """Says nothing of its arithmetic, as on SM10x."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.contract = Contract(self.contract.recipe)


@pytest.mark.parametrize("fault", [NotRequantised, ByExponents, Continuous])
@pytest.mark.parametrize("base", [ContiguousE8M0, MaskedE8M0])
def test_half_a_recipe_is_convicted(fault: type[PowersOfTwo], base: type[PlayedLibrary], device: torch.device) -> None:
    cls = type("Faulty", (fault, base), {})
    assert status(cls, device, tokens=9, inter=128)[0] is Status.FAILED
    # By the bound as well, where nothing is known of the arithmetic.
    bound = type("Unknown", (Undeclared, cls), {})
    assert status(bound, device, tokens=9, inter=128)[0] is Status.FAILED
    honest = type("Honest", (Undeclared, base), {})
    assert status(honest, device, tokens=9, inter=128) == (Status.PASSED, "")
