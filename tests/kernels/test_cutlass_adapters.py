"""What the adapters of vLLM's CUTLASS kernels do around its GEMMs, by our kernels; its operators are played, the GEMM
in the arithmetic that is declared: the verdict is equality, stage by stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.cases import Case
from conformance.checks import check_case
from conformance.matrix import BY_BITS
from conformance.plan import Subject, resolve_target
from conformance.results import Status
from fp8moe import PLATFORMS, FusedMoEActivationFormat, Platform, Support
from fp8moe.backends.batched_vllm_cutlass import BatchedVllmCutlassExperts
from fp8moe.backends.cutlass_stages import CutlassStages
from fp8moe.backends.vllm_cutlass import CUTLASS_ACTIVATIONS, CUTLASS_SCHEMES, SWAPPED_ROWS, VllmCutlassExperts
from fp8moe.reference.units import promoted
from tests.contracts import played_cutlass as played

LAYER = {"tokens": 7, "experts": 8, "top_k": 3, "hidden": 256, "inter": 128}


def gemm(out: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *rest: Any) -> None:
    """One chain over all of K, then both scales, the product's columns' first where it is computed transposed."""
    played.gemm(out, a, b, a_scale, b_scale, *rest)  # checks what it is given
    offsets, table, *_, per_token, _ = rest
    swapped = len(a) <= SWAPPED_ROWS
    out.fill_(torch.nan)
    for expert, (rows, columns, _) in enumerate(table.tolist()):
        held = slice(int(offsets[expert]), int(offsets[expert]) + (columns if swapped else rows))
        if held.start == held.stop:
            continue
        (sums,) = promoted(a[held], b[expert], "hopper.wgmma", None)
        of_rows = a_scale[held] if per_token else a_scale
        first, second = (of_rows, b_scale[expert][None]) if swapped else (b_scale[expert][None], of_rows)
        out[held] = ((sums * first) * second).to(out.dtype)


class PlayedOperators(CutlassStages):
    def platform(self) -> Platform:
        return PLATFORMS["h200"]

    def library(self) -> Any:
        return SimpleNamespace(
            cutlass_moe_mm=gemm,
            get_cutlass_moe_mm_problem_sizes_from_expert_offsets=played.sizes,
            get_cutlass_batched_moe_mm_data=played.batched_sizes,
        )


def anywhere(layout: FusedMoEActivationFormat) -> Support:
    return Support(
        device=lambda platform, env: True,
        needs="nothing",
        scheme=CUTLASS_SCHEMES,
        activations=CUTLASS_ACTIVATIONS,
        activation_format=layout,
    )


class Standard(PlayedOperators, VllmCutlassExperts):
    support = anywhere(FusedMoEActivationFormat.Standard)


class Batched(PlayedOperators, BatchedVllmCutlassExperts):
    support = anywhere(FusedMoEActivationFormat.BatchedExperts)


@pytest.mark.parametrize("cls", [Standard, Batched])
@pytest.mark.parametrize("scheme", ["channel_tok", "tensor_static", "tensor_dyn"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"tokens": 40}, {"ep": "2:1"}, {"law": "skewed"}, {"values": "block_scales"}, {"values": "overflow"}],
    ids=["few rows", "many rows", "a rank of two", "few experts", "wide scales", "overflow"],
)
def test_equal_bits(cls: type[PlayedOperators], scheme: str, fields: dict[str, Any], device: torch.device) -> None:
    target = resolve_target("auto" if device.type == "cuda" else "interpreter")
    result = check_case(Case(**(LAYER | {"scheme": scheme} | fields)), Subject(cls.__name__, cls, ""), target)
    assert (result.status, result.reason) == (Status.PASSED, "")
    assert (result.judged_by == BY_BITS) == (scheme != "tensor_dyn"), result.judged_by
