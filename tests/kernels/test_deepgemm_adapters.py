"""What the adapters of DeepGEMM do around its GEMMs, by our kernels; the GEMMs are played, in the arithmetic that is
declared: the verdict is equality, stage by stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.cases import Case
from conformance.checks import check_case
from conformance.plan import Subject, resolve_target
from conformance.results import Status
from fp8moe import FusedMoEActivationFormat, Support
from fp8moe.backends.batched_deepgemm import BatchedDeepGemmExperts
from fp8moe.backends.deepgemm import DeepGemmExperts
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


def status(cls: type[PlayedLibrary], device: torch.device, **fields: Any) -> tuple[Status, str]:
    target = resolve_target("auto" if device.type == "cuda" else "interpreter")
    result = check_case(Case(**(WIDE | {"values": "block_scales"} | fields)), Subject(cls.__name__, cls, ""), target)
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
