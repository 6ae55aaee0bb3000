"""DEEPGEMM and its batched form beside the DeepGEMM inside vLLM's released wheel, on a played one."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.build import build
from fp8moe import PLATFORMS, BackendUnavailable, Platform
from fp8moe.backends import batched_deepgemm, deepgemm
from fp8moe.backends.deepgemm_stages import BY_DEEPGEMM, DeepGemmStages
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.dispatch import combine, local_ids
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.recipe import Contract
from fp8moe.scaling import quantize
from tests.contracts.layers import ByTorch, case, same, with_holes
from tests.contracts.played_deepgemm import GROUP, WIDE, PlayedLibrary
from tests.contracts.released import VLLM

EXTENSION = "vllm/third_party/deep_gemm/_C.cpython-312-x86_64-linux-gnu.so"
AsDeclared = TorchExperts.with_recipe(BY_DEEPGEMM.recipe)
BatchedAsDeclared = BatchedTorchExperts.with_recipe(BY_DEEPGEMM.recipe)
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
        return placed(pairs[places >= 0], places[places >= 0], found)

    def requantised(self, gate_up: Tensor, places: Tensor, rows: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        there, flat = places[places >= 0], gate_up.flatten(0, -2)
        found = self.empty_codes(gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // 2)
        return placed(self.activated_by_triton(flat[there]), there, found)


def placed(values: Tensor, rows: Tensor, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Quantised, in these rows, counted through all batches."""
    codes, scale = quantize(values, GROUP)
    found[0].view(torch.uint8).flatten(0, -2)[rows] = codes.view(torch.uint8)
    batch = found[0].shape[-2]
    (found[1] if found[1].dim() == 3 else found[1][None])[rows // batch, rows % batch] = scale
    return found


class PlayedDeepGemm(Played, deepgemm.DeepGemmExperts):
    def fallback(self) -> FusedMoEPermuteExpertsUnpermute:
        return TorchExperts(self.config, self.quant, self.weights)

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


class PlayedBatchedDeepGemm(Played, batched_deepgemm.BatchedDeepGemmExperts):
    pass


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # (A, scale), (B, scale), D, and the rows' experts; or the counts and the number of rows that is expected.
        ("m_grouped_fp8_fp4_gemm_nt_contiguous", "ERKSt4pairIN2at6TensorES3_ES6_RKS3_S8_St8optional"),
        ("m_grouped_fp8_fp4_gemm_nt_masked", "ERKSt4pairIN2at6TensorES3_ES6_RKS3_S8_RKiSt8optional"),
    ],
)
def test_released_functions_take_what_the_adapters_pass(name: str, parameters: str) -> None:
    assert any(f"{name}{parameters}" in symbol for symbol in VLLM.symbols(EXTENSION, name))


def test_released_module_has_the_functions() -> None:
    module = VLLM.source("vllm/third_party/deep_gemm/__init__.py")
    imported = set(re.findall(r"\w+", " ".join(re.findall(r"from \._C import \(([^)]*)\)", module))))
    assert {deepgemm.GEMM, batched_deepgemm.GEMM} <= imported
    layout = VLLM.source("vllm/third_party/deep_gemm/utils/layout.py")
    assert deepgemm.ALIGNMENT in {
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


@pytest.mark.parametrize("cls", [PlayedDeepGemm, PlayedBatchedDeepGemm])
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
        def platform(self) -> Platform:
            return PLATFORMS["b200"]

    tensors = build(case("block"), "cpu")
    with pytest.raises(BackendUnavailable, match="fp32 scales alone, which are for CUDA SM90, not"):
        OnBlackwell(tensors.config, tensors.quant, tensors.weights)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed vLLM that must not be imported, with a copy of DeepGEMM that imports a part of its own."""
    copy = tmp_path / "vllm" / "third_party" / "deep_gemm"
    copy.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('vllm was imported')\n")
    (copy / "part.py").write_text("def m_grouped_fp8_gemm_nt_masked(): ...\n")
    (copy / "__init__.py").write_text("from .part import *\nimport deep_gemm.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(DeepGemmStages, "platform", lambda self: PLATFORMS["h200"])
    yield copy
    for name in [name for name in sys.modules if name.split(".")[0] == "deep_gemm"]:
        del sys.modules[name]


def batched() -> batched_deepgemm.BatchedDeepGemmExperts:
    tensors = build(case("block"), "cpu")
    return batched_deepgemm.BatchedDeepGemmExperts(tensors.config, tensors.quant, tensors.weights)


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="another deep_gemm is installed")
def test_the_copy_inside_vllm_serves_without_vllm(vllm: Path) -> None:
    assert batched().deep_gemm.__file__ == str(vllm / "__init__.py")
    assert batched().deep_gemm is sys.modules["deep_gemm"]


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="another deep_gemm is installed")
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("assert None is not None", "does not load (AssertionError: no text); install a DeepGEMM"),
        ("", "__init__.py) has no m_grouped_fp8_gemm_nt_masked: another version; install a DeepGEMM"),
    ],
)
def test_a_copy_that_cannot_be_used_is_told(vllm: Path, content: str, why: str) -> None:
    (vllm / "__init__.py").write_text(content)
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        batched()


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="deep_gemm is installed")
def test_without_a_library_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepGemmStages, "platform", lambda self: PLATFORMS["h200"])
    with pytest.raises(BackendUnavailable, match="deep_gemm does not load"):
        batched()


def test_what_is_declared_of_few_tokens_is_the_fallbacks() -> None:
    tensors = build(case("block", **WIDE), "cpu")
    adapter = PlayedDeepGemm(tensors.config, tensors.quant, tensors.weights)
    assert isinstance(adapter.contract, Contract)
    assert adapter.contract.for_tokens(127) is adapter.few.contract
