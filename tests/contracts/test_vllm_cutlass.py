"""VLLM_CUTLASS and its batched form beside vLLM's released operators, on played ones with their registered schemas.

Our kernels are played as well, unless triton interprets them: one test runs this file so, in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.build import CaseTensors, build
from conformance.checks import check_case
from conformance.plan import Subject, resolve_target
from conformance.results import Status
from fp8moe import PLATFORMS, BackendUnavailable, FusedMoEActivationFormat, Platform, Support
from fp8moe.backends import batched_vllm_cutlass, cutlass_stages, vllm_cutlass
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.backends.triton_stages import interprets
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.reference.rounding import fma32
from tests.contracts.layers import CASES, LAYER, case, same, with_holes
from tests.contracts.played_cutlass import batched_sizes, gemm, sizes
from tests.contracts.released import VLLM

NAMESPACE = "fp8moe_played_cutlass"
OF_C = (cutlass_stages.GEMM, vllm_cutlass.SIZES, batched_vllm_cutlass.SIZES)
SCHEMES = ["channel_tok", "tensor_dyn", "tensor_static"]
INTERPRETED = interprets("test_vllm_cutlass")
BY_OUR_KERNELS = pytest.mark.skipif(
    not INTERPRETED, reason="test_with_our_kernels_in_the_interpreter runs it in a process of its own"
)


class InFusedSteps(TorchExperts):
    """Sums over slots as our kernel does."""

    def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        total = slots.new_zeros(slots.shape[0], slots.shape[2])
        for slot in range(slots.shape[1]):
            found = fma32(weights[:, slot, None].expand(-1, slots.shape[2]), slots[:, slot], total)
            total = torch.where(present[:, slot, None], found, total)
        return total.to(self.config.in_dtype)


def as_declared(
    tensors: CaseTensors, cls: type[TorchExperts] | type[BatchedTorchExperts] = InFusedSteps
) -> FusedMoEPermuteExpertsUnpermute:
    recipe = cutlass_stages.contract_on(PLATFORMS["h200"]).recipe
    return cls.with_recipe(recipe)(tensors.config, tensors.quant, tensors.weights)


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """Registers played operators under the real ones' schemas, so that the dispatcher checks what they are given."""
    played: dict[str, Any] = {
        "cutlass_moe_mm": gemm,
        "get_cutlass_moe_mm_problem_sizes_from_expert_offsets": sizes,
        "get_cutlass_batched_moe_mm_data": batched_sizes,
    }
    schemas = VLLM.schemas("vllm/_C_stable_libtorch.abi3.so", OF_C)
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in schemas.items():
        library.define(schema)
        library.impl(name, played[name], "CPU")
    yield
    library._destroy()


class Played(cutlass_stages.CutlassStages):
    def platform(self) -> Platform:
        return PLATFORMS["h200"]

    def library(self) -> Any:
        namespace = getattr(torch.ops, NAMESPACE)
        return SimpleNamespace(**{name: getattr(namespace, name) for name in OF_C})


class PlayedCutlass(Played, vllm_cutlass.VllmCutlassExperts):
    pass


class PlayedBatchedCutlass(Played, batched_vllm_cutlass.BatchedVllmCutlassExperts):
    pass


@BY_OUR_KERNELS
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "fields",
    [
        *CASES.values(),
        {"inter": 48},
        {"activation": "gelu"},
        {"activation": "swigluoai"},
        {"dtype": "fp16"},
        {"tokens": 40, "ep": "2:0"},
    ],
    ids=[*CASES, "narrow", "gelu", "swigluoai", "fp16", "more than 64 rows"],
)
def test_vllms_cutlass(scheme: str, fields: dict[str, Any]) -> None:
    # A product's sums are exact: torch's own depend on how many rows it has.
    tensors = build(case(scheme, **({"values": "exact_sums"} | fields)), "cpu")
    adapter = PlayedCutlass(tensors.config, tensors.quant, tensors.weights)
    experts = as_declared(tensors)
    assert same(tensors.call(adapter), tensors.call(experts))


@BY_OUR_KERNELS
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
def test_vllms_cutlass_knows_no_absent_pair(scheme: str, fields: dict[str, Any]) -> None:
    tensors = with_holes(case(scheme, **fields))
    expected = tensors.call(as_declared(tensors))
    assert same(tensors.call(PlayedCutlass(tensors.config, tensors.quant, tensors.weights)), expected)


@BY_OUR_KERNELS
@pytest.mark.parametrize("rows", [63, 64, 65])
def test_sizes_are_told_the_way_round_that_the_kernel_computes(rows: int) -> None:
    tensors = build(case("channel_tok", tokens=rows, top_k=1), "cpu")
    adapter = PlayedCutlass(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(as_declared(tensors)))


class OnBlackwell(PlayedCutlass):
    def platform(self) -> Platform:
        return PLATFORMS["b200"]

    def fallback(self) -> FusedMoEPermuteExpertsUnpermute:
        return TorchExperts(self.config, self.quant, self.weights)


@BY_OUR_KERNELS
@pytest.mark.parametrize(("tokens", "by_cutlass"), [(1, False), (8, False), (9, True)])
@pytest.mark.parametrize("holes", [False, True])
def test_few_tokens_go_to_triton_on_blackwell(tokens: int, by_cutlass: bool, holes: bool) -> None:
    made = case("channel_tok", tokens=tokens, ep="2:1")
    tensors = with_holes(made) if holes else build(made, "cpu")
    adapter = OnBlackwell(tensors.config, tensors.quant, tensors.weights)
    recipe = (as_declared(tensors) if by_cutlass else TorchExperts).contract.recipe
    assert adapter.contract.for_tokens(tokens).recipe == recipe
    expected = TorchExperts.with_recipe(recipe)(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(expected))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"scheme": "block"}, "block: expected channel_tok, tensor_dyn, tensor_static"),
        ({"hidden": 200}, "hidden_dim=200: expected a multiple of 16"),
        ({"inter": 40}, "intermediate_size_per_partition=40: expected a multiple of 16"),
        ({"activation": "swiglustep"}, "activation=swiglustep: expected gelu, silu, swigluoai"),
        ({"bias": True}, "biases: the grouped GEMM has none"),
        ({"experts": 1025, "hidden": 16, "inter": 16}, "num_local_experts=1025: expected at most 1024"),
    ],
)
def test_what_vllms_cutlass_cannot_take_is_refused(fields: dict[str, Any], why: str) -> None:
    tensors = build(replace(LAYER, **({"scheme": "channel_tok"} | fields)), "cpu")
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        PlayedCutlass(tensors.config, tensors.quant, tensors.weights)


@BY_OUR_KERNELS
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tokens": 1},
        {"law": "skewed"},
        {"ep": "2:1"},
        {"inter": 48},
        {"activation": "gelu"},
        {"activation": "swigluoai"},
        {"tokens": 40},
    ],
    ids=["plain", "one token", "few experts", "a rank of two", "narrow", "gelu", "swigluoai", "more than 64 rows"],
)
def test_vllms_batched_cutlass(scheme: str, fields: dict[str, Any]) -> None:
    for tensors in (build(case(scheme, values="exact_sums", **fields), "cpu"), with_holes(case(scheme, **fields))):
        adapter = PlayedBatchedCutlass(tensors.config, tensors.quant, tensors.weights)
        experts = as_declared(tensors, BatchedTorchExperts)
        assert same(tensors.call(adapter), tensors.call(experts))


def test_the_scales_order_is_that_of_the_product_the_kernel_computes() -> None:
    tensors = build(case("channel_tok"), "cpu")
    contract = PlayedCutlass(tensors.config, tensors.quant, tensors.weights).contract
    orders = {rows: steps.scale_order for rows in (64, 65) if (steps := contract.steps_for(rows)) is not None}
    assert orders == {64: "activation_first", 65: "weights_first"}
    assert OnBlackwell(tensors.config, tensors.quant, tensors.weights).contract.for_tokens(9).steps is None


@BY_OUR_KERNELS
@pytest.mark.parametrize("longest", [1, 8, 9])
def test_batches_are_long_enough_for_the_product_that_is_declared(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = build(case("channel_tok"), "cpu")  # eight experts: 64 rows and more than that
    adapter = PlayedBatchedCutlass(tensors.config, tensors.quant, tensors.weights)
    rows = []
    whole = adapter.gemm
    monkeypatch.setattr(adapter, "gemm", lambda out, *given: (rows.append(len(out)), whole(out, *given)))
    batches = tensors.hidden_states[:1].expand(8, longest, -1).contiguous()
    found = adapter.apply_batched(batches, torch.full((8,), longest))
    assert found.shape == batches.shape
    assert rows == [72, 72]
    steps = adapter.contract.steps_for(1)
    assert steps is not None
    assert steps.scale_order == "weights_first"


class OneScale(PlayedBatchedCutlass):
    """The fault: one scale for all experts' batches."""

    def dynamic_scale(self, values: Tensor, present: Tensor | None) -> Tensor:
        return cutlass_stages.CutlassStages.dynamic_scale(self, values, present)


def of_two_batches(cls: type[PlayedBatchedCutlass], other: float) -> Tensor:
    """What the first expert makes of two tokens, beside another expert's that are so much larger."""
    tensors = build(case("tensor_dyn"), "cpu")
    adapter = cls(tensors.config, tensors.quant, tensors.weights)
    batches = torch.full((8, 4, 256), torch.nan, dtype=torch.bfloat16)  # past a batch's count is nothing to look at
    batches[0, :2], batches[5, :3] = tensors.hidden_states[:2], tensors.hidden_states[2:5] * other
    return adapter.apply_batched(batches, torch.tensor([2, 0, 0, 0, 0, 3, 0, 0]))[0, :2]


@BY_OUR_KERNELS
def test_a_batchs_scale_is_its_own() -> None:
    assert bool(of_two_batches(PlayedBatchedCutlass, 1.0).isfinite().all())
    assert same(of_two_batches(PlayedBatchedCutlass, 1.0), of_two_batches(PlayedBatchedCutlass, 4096.0))
    assert not same(of_two_batches(OneScale, 1.0), of_two_batches(OneScale, 4096.0))


@BY_OUR_KERNELS
@pytest.mark.parametrize(
    ("cls", "status"), [(PlayedBatchedCutlass, Status.PASSED), (OneScale, Status.FAILED)], ids=["honest", "one scale"]
)
def test_the_oracle_tells_a_batchs_scale_from_one_for_all(cls: type[PlayedBatchedCutlass], status: Status) -> None:
    support = Support(
        device=lambda platform, env: True,
        needs="nothing",
        scheme=batched_vllm_cutlass.CUTLASS_SCHEMES,
        activations=batched_vllm_cutlass.CUTLASS_ACTIVATIONS,
        activation_format=FusedMoEActivationFormat.BatchedExperts,
    )
    here = type(cls.__name__, (cls,), {"support": support})
    result = check_case(case("tensor_dyn", tokens=40), Subject(cls.__name__, here, ""), resolve_target("cpu"))
    assert result.status is status, result.reason


@pytest.mark.parametrize(
    ("scheme", "declared"), [("channel_tok", True), ("tensor_static", True), ("tensor_dyn", False)]
)
def test_a_batchs_scale_depends_on_its_other_tokens(scheme: str, declared: bool) -> None:
    tensors = build(case(scheme), "cpu")
    contract = PlayedBatchedCutlass(tensors.config, tensors.quant, tensors.weights).contract
    assert contract.batch_invariant is declared
    assert contract.recipe.dynamic_tensor_scope == "expert"


@BY_OUR_KERNELS
@pytest.mark.parametrize("cls", [PlayedCutlass, PlayedBatchedCutlass])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_nan_stays_nan_and_with_those_that_share_its_scale(cls: type[Played], scheme: str) -> None:
    tensors = build(case(scheme), "cpu")
    states = tensors.hidden_states.clone()
    states[1, 3] = torch.nan
    adapter = cls(tensors.config, tensors.quant, tensors.weights)
    expected, found = tensors.call(adapter), replace(tensors, hidden_states=states).call(adapter)
    assert bool(found[1].isnan().all())
    if scheme != "tensor_dyn":
        others = torch.arange(len(states)) != 1
        assert same(found[others], expected[others])


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_with_our_kernels_in_the_interpreter() -> None:
    # Without the options of the run that we are part of.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    environment["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, for its dots: they are small, and its threads would wait
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", __file__]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
