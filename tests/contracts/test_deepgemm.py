"""DEEPGEMM and its batched form beside the DeepGEMM inside vLLM's released wheel, on a played one."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.build import build
from conformance.plan import load_subject, probe_config
from fp8moe import PLATFORMS, BackendUnavailable, FusedMoEActivationFormat, LayerNotSupported
from fp8moe.backends import batched_deepgemm, deepgemm
from fp8moe.backends.deepgemm_stages import ALIGNMENT, BY_DEEPGEMM, LAYOUT, by_powers_of_two
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.dispatch import combine, local_ids
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.kernel_format import convert_to_fp8_moe_kernel_format
from fp8moe.recipe import Contract
from fp8moe.registry import seed_backends
from fp8moe.scaling import quantize
from fp8moe.schemes import BLOCK
from tests.contracts.layers import ByTorch, bits, case, same, with_holes
from tests.contracts.played_deepgemm import GROUP, WIDE, PlayedLibrary
from tests.contracts.released import VLLM

EXTENSION = "vllm/third_party/deep_gemm/_C.cpython-312-x86_64-linux-gnu.so"
AsDeclared = TorchExperts.with_recipe(BY_DEEPGEMM.recipe)
BatchedAsDeclared = BatchedTorchExperts.with_recipe(BY_DEEPGEMM.recipe)
BY_E8M0 = by_powers_of_two(BY_DEEPGEMM)
AsE8M0 = TorchExperts.with_recipe(BY_E8M0.recipe)
BatchedAsE8M0 = BatchedTorchExperts.with_recipe(BY_E8M0.recipe)
FULL_PRECISION = TorchExperts.contract.recipe


class Played(ByTorch, PlayedLibrary):
    # Triton's kernels have tests of their own; here there is no device for them. What they leave undefined is NaN.
    def empty_codes(self, like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
        codes, scale = super().empty_codes(like, *shape)
        codes.view(torch.uint8).fill_(0x7F)
        return codes, scale.fill_(torch.nan)

    def quantised_to(self, hidden_states: Tensor, places: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
        found = self.empty_codes(hidden_states, *shape, hidden_states.shape[1])
        pairs = hidden_states.repeat_interleave(len(places) // len(hidden_states), dim=0)
        return placed(pairs[places >= 0], places[places >= 0], found, self.e8m0)

    def requantised(self, gate_up: Tensor, places: Tensor, rows: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        there, flat = places[places >= 0], gate_up.flatten(0, -2)
        found = self.empty_codes(gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // 2)
        return placed(self.activated_by_triton(flat[there]), there, found, self.e8m0)


def placed(values: Tensor, rows: Tensor, found: tuple[Tensor, Tensor], e8m0: bool) -> tuple[Tensor, Tensor]:
    """Quantised, in these rows, counted through all batches."""
    codes, scale = quantize(values, GROUP, scale_rounding="power_of_two" if e8m0 else "continuous")
    found[0].view(torch.uint8).flatten(0, -2)[rows] = codes.view(torch.uint8)
    batch = found[0].shape[-2]
    (found[1] if found[1].dim() == 3 else found[1][None])[rows // batch, rows % batch] = scale
    return found


class PlayedContiguous(Played, deepgemm.ContiguousDeepGemm):
    def layout_of(self, ids: Tensor, expert_map: Tensor | None) -> deepgemm.ContiguousLayout:
        local, alignment = local_ids(ids, expert_map, self.config.num_local_experts).flatten(), self.alignment()
        rows = deepgemm.contiguous_rows(len(local), self.config.num_local_experts, alignment)
        expert, places = torch.full((rows,), -1, dtype=torch.int32), torch.full((len(local),), -1, dtype=torch.int32)
        start = 0
        for index in range(self.config.num_local_experts):
            pairs = (local == index).nonzero()[:, 0]
            places[pairs] = torch.arange(start, start + len(pairs), dtype=torch.int32)
            expert[start : start + len(pairs)] = index
            start += -(-len(pairs) // alignment) * alignment
        return deepgemm.ContiguousLayout(expert, places)

    def combine(self, results: Tensor, places: Tensor, output: Tensor, weights: Tensor) -> None:
        slots = results[places.long().clamp(min=0)].float().view(*weights.shape, -1)
        output.copy_(combine(slots, weights, places.view(weights.shape) >= 0, output.dtype, round_sum=False))


class PlayedDeepGemm(PlayedContiguous, deepgemm.DeepGemmExperts):
    def fallback(self) -> FusedMoEPermuteExpertsUnpermute:
        return TorchExperts(self.config, self.quant, self.weights)


class PlayedDeepGemmE8M0(PlayedContiguous, deepgemm.DeepGemmE8M0Experts):
    pass


class PlayedBatchedDeepGemm(Played, batched_deepgemm.BatchedDeepGemmExperts):
    pass


class PlayedBatchedDeepGemmE8M0(Played, batched_deepgemm.BatchedDeepGemmE8M0Experts):
    pass


class DeepGemmOnBlackwell(PlayedDeepGemmE8M0):
    device = "b200"


class BatchedDeepGemmOnBlackwell(PlayedBatchedDeepGemmE8M0):
    device = "b200"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # (A, scale), (B, scale), D, and the rows' experts; or the counts and the number of rows that is expected.
        ("m_grouped_fp8_fp4_gemm_nt_contiguous", "ERKSt4pairIN2at6TensorES3_ES6_RKS3_S8_St8optional"),
        ("m_grouped_fp8_fp4_gemm_nt_masked", "ERKSt4pairIN2at6TensorES3_ES6_RKS3_S8_RKiSt8optional"),
        # The scales, both sizes, three numbers (or two) of a recipe, the number of experts, whose scales they are.
        (LAYOUT, "ERKN2at6TensorERKiS6_RKSt7variantIJSt5tupleIJiiiEES8_IJiiEEEERKSt8optionalIiERKSE_IbERKb"),
    ],
)
def test_released_functions_take_what_the_adapters_pass(name: str, parameters: str) -> None:
    assert any(f"{name}{parameters}" in symbol for symbol in VLLM.symbols(EXTENSION, name))


def test_released_module_has_the_functions() -> None:
    module = VLLM.source("vllm/third_party/deep_gemm/__init__.py")
    nodes = [node for node in ast.walk(ast.parse(module)) if isinstance(node, ast.ImportFrom) and node.module == "_C"]
    imported = {alias.name for node in nodes for alias in node.names}
    assert {deepgemm.GEMM, batched_deepgemm.GEMM, LAYOUT} <= imported
    layout = VLLM.source("vllm/third_party/deep_gemm/utils/layout.py")
    assert ALIGNMENT in {
        alias.name for node in ast.parse(layout).body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation": "swiglustep"},
        {"ep": "2:1"},
        {"top_k": 1, "weight_on_input": True},
        {"layout": "strided"},
        {"law": "skewed", "seed": 3},
        {"tokens": 200, "hidden": 256},
    ],
    ids=["plain", "swiglustep", "a rank of two", "weights on the input", "rows apart", "few experts", "larger"],
)
def test_deepgemm(fields: dict[str, Any]) -> None:
    for tensors in (build(case("block", **(WIDE | fields)), "cpu"), with_holes(case("block", **(WIDE | fields)))):
        adapter = PlayedDeepGemm(tensors.config, tensors.quant, tensors.weights)
        assert adapter.takes_layer
        expected = tensors.call(AsDeclared(tensors.config, tensors.quant, tensors.weights))
        assert same(tensors.call(adapter), expected)


@pytest.mark.parametrize(
    ("fields", "by_deepgemm"),
    [
        ({}, True),
        ({"tokens": 127}, False),
        ({"inter": 512}, False),
        ({"inter": 576}, False),
        ({"hidden": 256}, True),
        ({"hidden": 192}, False),
    ],
)
def test_the_turn_is_that_of_the_specification(fields: dict[str, Any], by_deepgemm: bool) -> None:
    tensors = build(case("block", **(WIDE | fields)), "cpu")
    adapter = PlayedDeepGemm(tensors.config, tensors.quant, tensors.weights)
    recipe = BY_DEEPGEMM.recipe if by_deepgemm else FULL_PRECISION
    assert adapter.contract.for_tokens(len(tensors.hidden_states)).recipe == recipe
    found = tensors.call(adapter)
    of_each = {
        declared: tensors.call(TorchExperts.with_recipe(declared)(tensors.config, tensors.quant, tensors.weights))
        for declared in (BY_DEEPGEMM.recipe, FULL_PRECISION)
    }
    assert not same(*of_each.values())
    assert same(found, of_each[recipe])


def test_another_alignment_is_refused_when_a_layer_is_made() -> None:
    class Other(PlayedDeepGemm):
        def alignment(self) -> int:
            return 64

    tensors = build(case("block", **(WIDE | {"inter": 576})), "cpu")
    with pytest.raises(
        BackendUnavailable, match=r"is 64: call deep_gemm.set_mk_alignment_for_contiguous_layout\(128\)"
    ):
        Other(tensors.config, tensors.quant, tensors.weights)


def test_stages_of_the_fallback_are_shown() -> None:
    tensors = build(case("block", **(WIDE | {"tokens": 3})), "cpu")
    adapter = PlayedDeepGemm(tensors.config, tensors.quant, tensors.weights)
    adapter.observe = lambda stage, values: None
    tensors.call(adapter)
    assert adapter.few.observe is adapter.observe


def test_another_alignment_of_the_process_is_followed() -> None:
    class Other(PlayedDeepGemm):
        def alignment(self) -> int:
            return 256 if hasattr(self, "takes_layer") else 128

    tensors = build(case("block", **WIDE), "cpu")
    adapter = Other(tensors.config, tensors.quant, tensors.weights)
    expected = tensors.call(AsDeclared(tensors.config, tensors.quant, tensors.weights))
    assert same(tensors.call(adapter), expected)


@pytest.mark.parametrize(
    "fields",
    [{}, {"tokens": 1}, {"law": "skewed"}, {"ep": "2:1"}, {"tokens": 40}],
    ids=["plain", "one token", "few experts", "a rank of two", "more"],
)
def test_batched_deepgemm(fields: dict[str, Any]) -> None:
    for tensors in (build(case("block", **fields), "cpu"), with_holes(case("block", **fields))):
        adapter = PlayedBatchedDeepGemm(tensors.config, tensors.quant, tensors.weights)
        expected = tensors.call(BatchedAsDeclared(tensors.config, tensors.quant, tensors.weights))
        assert same(tensors.call(adapter), expected)


# -- E8M0 --


@pytest.mark.parametrize("cls", [PlayedDeepGemmE8M0, DeepGemmOnBlackwell])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tokens": 1, "inter": 128},
        {"tokens": 127, "inter": 512},
        {"activation": "swiglustep"},
        {"ep": "2:1"},
        {"top_k": 1, "weight_on_input": True},
        {"law": "skewed", "seed": 3},
        {"hidden": 640, "values": "block_scales", "tokens": 9},
    ],
    ids=["plain", "one token", "narrow", "swiglustep", "a rank of two", "weights on the input", "few experts", "words"],
)
def test_every_call_is_deepgemms_with_powers_of_two(cls: type[Played], fields: dict[str, Any]) -> None:
    for tensors in (build(case("block", **(WIDE | fields)), "cpu"), with_holes(case("block", **(WIDE | fields)))):
        adapter = cls(tensors.config, tensors.quant, tensors.weights)
        assert adapter.contract.fewer is None
        found = tensors.call(adapter)
        assert same(found, tensors.call(AsE8M0(tensors.config, tensors.quant, tensors.weights)))
        other = tensors.call(AsDeclared(tensors.config, tensors.quant, tensors.weights))
        assert not same(found, other) or not found.any()


@pytest.mark.parametrize("cls", [PlayedBatchedDeepGemmE8M0, BatchedDeepGemmOnBlackwell])
@pytest.mark.parametrize("fields", [{}, {"tokens": 1}, {"law": "skewed"}, {"ep": "2:1"}, {"hidden": 640}])
def test_batches_with_powers_of_two(cls: type[Played], fields: dict[str, Any]) -> None:
    for tensors in (build(case("block", **fields), "cpu"), with_holes(case("block", **fields))):
        adapter = cls(tensors.config, tensors.quant, tensors.weights)
        expected = tensors.call(BatchedAsE8M0(tensors.config, tensors.quant, tensors.weights))
        assert same(tensors.call(adapter), expected)


@pytest.mark.parametrize("cls", [PlayedDeepGemmE8M0, PlayedBatchedDeepGemmE8M0])
def test_the_matrices_are_the_converters(cls: type[Any]) -> None:
    tensors = build(case("block"), "cpu")
    adapter = cls(tensors.config, tensors.quant, tensors.weights)
    given = (cls.backend, tensors.config, tensors.quant, tensors.weights)
    converted = convert_to_fp8_moe_kernel_format(*given, e8m0=True)
    for name, (codes, scale) in adapter.matrices.items():
        assert torch.equal(bits(codes), bits(getattr(converted, name)))
        assert torch.equal(scale, getattr(converted, f"{name}_scale"))


@pytest.mark.parametrize(
    ("cls", "unit"),
    [
        (PlayedDeepGemmE8M0, "hopper.wgmma"),
        (PlayedBatchedDeepGemmE8M0, "hopper.wgmma"),
        (DeepGemmOnBlackwell, None),
        (BatchedDeepGemmOnBlackwell, None),
    ],
)
def test_what_is_declared_is_hoppers_alone(cls: type[Played], unit: str | None) -> None:
    tensors = build(case("block"), "cpu")
    contract = cls(tensors.config, tensors.quant, tensors.weights).contract
    assert (contract.recipe.scale_rounding, contract.recipe.w13, contract.recipe.w2) == (
        "power_of_two",
        "requantised",
        "requantised",
    )
    arithmetic = contract.arithmetic_for(1)
    assert (arithmetic.unit if arithmetic else None) == unit
    assert contract.deterministic is (True if unit else None)


def test_no_variable_has_a_part_in_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = build(case("block", **WIDE), "cpu")
    outputs = []
    for value in ("0", "1"):
        monkeypatch.setenv("VLLM_USE_DEEP_GEMM_E8M0", value)
        classes = (PlayedDeepGemm, PlayedDeepGemmE8M0)
        outputs.append([tensors.call(cls(tensors.config, tensors.quant, tensors.weights)) for cls in classes])
    assert same(outputs[0][0], outputs[1][0])
    assert same(outputs[0][1], outputs[1][1])
    assert not same(*outputs[0])


@pytest.mark.parametrize("cls", [PlayedDeepGemmE8M0, PlayedBatchedDeepGemmE8M0])
def test_another_height_of_tiles_is_refused_with_powers_of_two(cls: type[Played]) -> None:
    tensors = build(case("block"), "cpu")
    other = type("Other", (cls,), {"alignment": lambda self: 224})
    with pytest.raises(BackendUnavailable, match="is 224: call deep_gemm"):
        other(tensors.config, tensors.quant, tensors.weights)


@pytest.mark.parametrize("cls", [PlayedDeepGemmE8M0, PlayedBatchedDeepGemmE8M0])
@pytest.mark.parametrize("fields", [{"inter": 192}, {"hidden": 192}])
def test_layers_of_parts_of_blocks_have_no_powers_of_two(cls: type[Played], fields: dict[str, Any]) -> None:
    tensors = build(case("block", **fields), "cpu")
    with pytest.raises(LayerNotSupported, match="=192: expected a multiple of 128"):
        cls(tensors.config, tensors.quant, tensors.weights)


@pytest.mark.parametrize("device", ["a100", "l40s", "mi300x", "thor"])
def test_powers_of_two_on_other_devices_are_refused(device: str) -> None:
    tensors = build(case("block"), "cpu")
    other = type("Elsewhere", (PlayedDeepGemmE8M0,), {"device": device})
    with pytest.raises(BackendUnavailable, match="E8M0 scales are for CUDA SM90 and SM10x, not"):
        other(tensors.config, tensors.quant, tensors.weights)


def test_neither_class_is_a_backend_of_its_own() -> None:
    registered = {spec.experts_cls for spec in seed_backends()}
    assert deepgemm.DeepGemmExperts in registered
    for name in ("deepgemm:DeepGemmE8M0Experts", "batched_deepgemm:BatchedDeepGemmE8M0Experts"):
        subject = load_subject(f"fp8moe.backends.{name}")
        assert subject.experts_cls not in registered
        batched = subject.experts_cls.activation_format() is FusedMoEActivationFormat.BatchedExperts
        given = (probe_config("silu", batched=batched), *BLOCK, subject.experts_cls.activation_format())
        for device, takes in (("h200", True), ("b200", True), ("l40s", False)):
            supported, _ = subject.experts_cls.is_supported_config(
                subject.experts_cls, *given, platform=PLATFORMS[device], env={}
            )
            assert supported is takes


@pytest.mark.parametrize("cls", [PlayedDeepGemm, PlayedBatchedDeepGemm, PlayedDeepGemmE8M0, PlayedBatchedDeepGemmE8M0])
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"scheme": "channel_tok"}, "channel_tok: expected block"),
        ({"dtype": "fp16"}, "hidden states of dtype torch.float16: expected torch.bfloat16"),
        ({"activation": "gelu"}, "activation=gelu: expected silu"),
        ({"bias": True}, "biases: the grouped GEMM has none"),
    ],
)
def test_what_deepgemm_cannot_take_is_refused(cls: type[Played], fields: dict[str, Any], why: str) -> None:
    tensors = build(replace(case("block"), **fields), "cpu")
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        cls(tensors.config, tensors.quant, tensors.weights)


def test_batches_of_other_widths_are_refused() -> None:
    tensors = build(case("block", inter=192), "cpu")
    why = "intermediate_size_per_partition=192: expected a multiple of 128"
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        PlayedBatchedDeepGemm(tensors.config, tensors.quant, tensors.weights)


def test_other_devices_are_refused() -> None:
    class OnBlackwell(PlayedDeepGemm):
        device = "b200"

    tensors = build(case("block"), "cpu")
    with pytest.raises(BackendUnavailable, match="fp32 scales alone, which are for CUDA SM90, not"):
        OnBlackwell(tensors.config, tensors.quant, tensors.weights)


def test_what_is_declared_of_few_tokens_is_the_fallbacks() -> None:
    tensors = build(case("block", **WIDE), "cpu")
    adapter = PlayedDeepGemm(tensors.config, tensors.quant, tensors.weights)
    assert isinstance(adapter.contract, Contract)
    assert adapter.contract.for_tokens(127) is adapter.few.contract
