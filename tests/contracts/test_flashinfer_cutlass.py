"""FlashInfer's CUTLASS kernels beside their released source, on a played library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.build import build
from conformance.checks import check_case
from conformance.plan import Subject, Target
from conformance.results import Status
from fp8moe import PLATFORMS, BackendUnavailable, MoEWeights, Platform
from fp8moe.backends import flashinfer_cutlass
from fp8moe.backends.common import one_of
from fp8moe.backends.flashinfer_cutlass import RECIPES
from fp8moe.backends.flashinfer_modules import AHEAD, CACHED, NO_JIT, FlashInferModule, Located
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.commands import flashinfer_needs
from fp8moe.commands.build import ARCHITECTURES
from fp8moe.recipe import Arithmetic, Contract, Recipe, Steps
from fp8moe.schemes import TENSOR_STATIC
from tests.contracts.layers import CASES, LAYER, as_fnuz, bits, case, same, with_holes
from tests.contracts.merged import merged_by_torch
from tests.contracts.released import FLASHINFER, played

HONEST = TorchExperts.with_recipe(Recipe(scaling="reciprocal"))
"""The played library; the adapter quantises the first input for it, per tensor, and by the contract's rule."""
FUSED_MOE = "flashinfer/data/csrc/fused_moe/cutlass_backend"
INTERNAL = "flashinfer/data/csrc/nv_internal/tensorrt_llm"
KERNELS = f"{FUSED_MOE}/cutlass_fused_moe_kernels.cuh"
BINDING = f"{FUSED_MOE}/flashinfer_cutlass_fused_moe_binding.cu"
DISPATCH = f"{INTERNAL}/kernels/cutlass_kernels/moe_gemm/moe_gemm_template_dispatch.h"
RUNNER = f"{INTERNAL}/kernels/cutlass_kernels/include/moe_kernels.h"
LAUNCHER = f"{INTERNAL}/kernels/cutlass_kernels/moe_gemm/launchers/moe_gemm_tma_ws_launcher.inl"
BLOCKS = f"{INTERNAL}/kernels/cutlass_kernels/fp8_blockscale_gemm/fp8_blockscale_gemm_kernel.cuh"
DEEP_GEMM = f"{INTERNAL}/deep_gemm/fp8_gemm_impl.cuh"
ACTIVATIONS = "flashinfer/data/cutlass/include/cutlass/epilogue/thread/activation.h"
RELU2 = f"{INTERNAL}/cutlass_extensions/include/cutlass_extensions/epilogue/thread/fused_activations.h"

READ = {
    "FP8 is accumulated in one chain": (
        LAUNCHER,
        "std::conditional_t< IsFP8, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeFP8FastAccum,",
    ),
    "its accumulator is fp32": (LAUNCHER, "using ElementAccumulator = float;"),
    "an expert's scale is the epilogue's alpha": (LAUNCHER, "EpilogueScalars>( tma_ws_input.alpha_scale_ptr_array);"),
    "both GEMMs store the output's dtype": (RUNNER, "using UnfusedGemmOutputType = BackBoneType;"),
    "which is that of biases too": (RUNNER, "static_assert(std::is_same_v<OutputType, BackBoneType>,"),
    "the first bias is added to that, in fp32": (
        KERNELS,
        "fc1_value = fc1_value + arrayConvert<BiasElem, ComputeElem>(bias_ptr_vec[elem_index + gated_off_vec]);",
    ),
    "the intermediate is multiplied, not divided": (KERNELS, "auto post_act_val = gate_act * quant_scale;"),
    "the second bias is added to what is stored": (
        KERNELS,
        "expert_result = expert_result + arrayConvert<BiasElem, ComputeElem>(bias_ptr[elem_index]);",
    ),
    "slots are added in their order, in fp32": (
        KERNELS,
        "thread_output = thread_output + row_scale * expert_result;",
    ),
    "relu2 is a product": (RELU2, "T val = relu_op(value); return mul(val, val);"),
    "silu has an exponential": (ACTIVATIONS, "return T(1) / (T(1) + fast_exp(-value));"),
    "which fast math makes approximate": ("flashinfer/jit/core.py", '"-use_fast_math",'),
    "blocks of activations are quantised by a factor": (
        BLOCKS,
        "float scale = amax != InputType(0.f) ? 448.f / float(amax) : 1.f;",
    ),
    "whose reciprocal is their scale": (BLOCKS, "scale_output = float(1.f / scale);"),
    "and which multiplies them": (BLOCKS, "float value = float(input_frag[i]) * scale;"),
    "block scales meet each other first": (DEEP_GEMM, "float scale_0_0 = scale_a_0 * scale_b_0,"),
    "then the sum over 128 of K": (
        DEEP_GEMM,
        "final_accum[i * 4 + 0] += (predicate ? scale_0_0 : scale_0_1) * accum[i * 4 + 0];",
    ),
    "for few tokens as well, the other way round": (
        DEEP_GEMM,
        "final_accum[i * 4 + 0] += scale_0_0[i] * accum[i * 4 + 0];",
    ),
    "without the tuner, the first kernels are taken": (BINDING, "auto best_gemm1_profile = mAllProfiles.front();"),
    "one kernel sorts the pairs of few tokens": (KERNELS, "if (num_tokens > 256) {"),
    "three others stop at a token's first slot with an expert": (
        KERNELS,
        "expanded_token_id = i * num_tokens + token_id; break;",
    ),
    "of either GEMM": (BINDING, "? mAllProfiles.at(mGemm1TacticCount)"),
    "TMA's come first": (DISPATCH, "candidate_configs = getTmaWarpSpecializedConfigs(sm, supports_finalize_fusion);"),
    "and those that add slots with atomics behind the others": (
        DISPATCH,
        "std::back_inserter(tma_ws_configs), [](auto& config) { config.epilogue_fusion_type = "
        "cutlass_extensions::CutlassGemmConfig::EpilogueFusionType::FINALIZE;",
    ),
    "which untuned ones are not": (
        f"{INTERNAL}/cutlass_extensions/include/cutlass_extensions/gemm_configs.h",
        "EpilogueFusionType epilogue_fusion_type = EpilogueFusionType::NONE;",
    ),
}
"""What the contract rests on: where it is in the release, with single spaces and without the ends of macros' lines."""


class PlayedCutlass(flashinfer_cutlass.FlashInferCutlassExperts):
    honest = HONEST

    def platform(self) -> Platform:
        return PLATFORMS["h200"]

    def library(self) -> Any:
        names: dict[str, Any] = {}
        exec(compile(FLASHINFER.source("flashinfer/tllm_enums.py"), "tllm_enums", "exec"), names)
        public = FLASHINFER.source("flashinfer/fused_moe/__init__.py")
        for name in flashinfer_cutlass.NAMES:
            assert f'"{name}"' in public, f"flashinfer.fused_moe gives no {name}"
        signature = FLASHINFER.signature("flashinfer/fused_moe/core.py", "cutlass_fused_moe")
        return SimpleNamespace(ActivationType=names["ActivationType"], cutlass_fused_moe=played(signature, self.answer))

    def slots(
        self, ids: Tensor, weights: Tensor, expert_map: Tensor | None, *, merge: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return merged_by_torch(ids, weights, expert_map, self.config.num_local_experts, merge=merge)

    def answer(self, given: Mapping[str, Any]) -> None:
        gated, block, own = self.config.is_act_and_mul, given["use_deepseek_fp8_block_scale"], self.weights
        assert given["activation_type"].name == ("Swiglu" if gated else "Relu2")
        assert given["output_dtype"] == given["output"].dtype
        first, second, bias = (
            given[name] for name in ("fc1_expert_weights", "fc2_expert_weights", "fc1_expert_biases")
        )
        hidden, scales = given["input"], given["quant_scales"]
        w13_scale, w2_scale = own.w13_scale, own.w2_scale
        if block:
            w13_scale, w2_scale = turned(scales[0]), scales[1]
        elif scales:
            assert own.w13_scale is not None
            assert own.w2_scale is not None
            assert own.a13_scale is not None
            assert own.a2_scale is not None
            assert scales[3].dim() == 0
            wanted = (own.w13_scale * own.a13_scale, 1 / own.a2_scale, own.w2_scale * own.a2_scale, own.a13_scale)
            assert all(torch.equal(got, want.reshape(got.shape)) for got, want in zip(scales, wanted, strict=True))
            hidden = (hidden.float() * scales[3]).to(self.config.in_dtype)
        weights = MoEWeights(
            turned(first) if gated else first,
            second,
            w13_scale,
            w2_scale,
            turned(bias) if gated and bias is not None else bias,
            given["fc2_expert_biases"],
            own.a13_scale,
            own.a2_scale,
        )
        if not flashinfer_cutlass.sorts_every_slot(*given["token_selected_experts"].shape):
            given = {**given, "token_selected_experts": first_alone(given["token_selected_experts"])}
        local, offset = self.config.num_local_experts, given["ep_rank"] * self.config.num_local_experts
        placed = torch.arange(local * given["ep_size"], dtype=torch.int32) - offset
        placed = placed.masked_fill((placed < 0) | (placed >= local), -1)
        told = {"intermediate_size_per_partition": second.shape[2], "num_experts": len(placed)}
        config = replace(self.config, **told)
        experts = self.honest(config, self.quant, weights)
        ids, routing = given["token_selected_experts"], given["token_final_scales"]
        experts.apply(hidden, routing, ids, expert_map=placed, output=given["output"])


def first_alone(ids: Tensor) -> Tensor:
    """As the release sorts most calls: of an expert in several slots of a token, the first is found."""
    rows = [[expert if expert not in row[:slot] else -1 for slot, expert in enumerate(row)] for row in ids.tolist()]
    return torch.tensor(rows, dtype=ids.dtype)


def turned(values: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    half = values.shape[1] // 2
    return torch.cat([bits(values[:, half:]), bits(values[:, :half])], 1).view(values.dtype)


@pytest.mark.parametrize("scheme", ["block", "tensor_static", "none"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_flashinfers_cutlass(scheme: str, fields: dict[str, Any]) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    adapter = PlayedCutlass(tensors.config, tensors.quant, tensors.weights)
    experts = HONEST(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(experts))


@pytest.mark.parametrize("scheme", ["block", "tensor_static", "none"])
@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
def test_flashinfers_cutlass_knows_no_absent_pair(scheme: str, fields: dict[str, Any]) -> None:
    tensors = with_holes(case(scheme, **fields))
    expected = tensors.call(HONEST(tensors.config, tensors.quant, tensors.weights))
    assert same(tensors.call(PlayedCutlass(tensors.config, tensors.quant, tensors.weights)), expected)


@pytest.mark.parametrize("fields", [{"inter": 20}, {"bias": True}, {"activation": "relu2_no_mul"}])
def test_flashinfers_cutlass_fills_up_each_half_and_takes_no_gate(fields: dict[str, Any]) -> None:
    tensors = build(case("tensor_static", **fields), "cpu")
    adapter = PlayedCutlass(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(HONEST(tensors.config, tensors.quant, tensors.weights)))


@pytest.mark.parametrize("what", READ)
def test_what_its_contract_rests_on_is_in_the_release(what: str) -> None:
    path, text = READ[what]
    assert text in re.sub(r"(\s|\\\n)+", " ", FLASHINFER.source(path))


def contract_of(scheme: str, device: str = "h200", **fields: Any) -> Contract:
    tensors = build(case(scheme, **fields), "cpu")
    return flashinfer_cutlass.contract_for(tensors.config, tensors.quant, tensors.weights, PLATFORMS[device])


@pytest.mark.parametrize(
    ("scheme", "arithmetic", "recipe"),
    [
        ("tensor_static", Arithmetic.on("hopper.wgmma"), {"scaling": "reciprocal"}),
        (
            "block",
            Arithmetic.on("hopper.wgmma", promote_every=128),
            {
                "scale_division": "approximate_inverse",
                "scaling": "reciprocal",
                "activation_output": "input",
                "amax_floor": 2.0**-119,
            },
        ),
        ("none", Arithmetic.on("hopper.wgmma_f16"), {"activation_output": "input"}),
    ],
)
def test_on_sm90_its_arithmetic_is_declared(scheme: str, arithmetic: Arithmetic, recipe: dict[str, Any]) -> None:
    rounded = Recipe(gemm1_output="input", gemm2_output="input", **recipe)
    expected = Contract(rounded, arithmetic, deterministic=True, batch_invariant=True, graph_capturable=True)
    assert contract_of(scheme) == expected
    tensors = build(case(scheme), "cpu")
    assert PlayedCutlass(tensors.config, tensors.quant, tensors.weights).contract == expected


def test_its_bits_are_declared_where_no_exponential_is_on_the_way() -> None:
    declared = contract_of("tensor_static", activation="relu2_no_mul", top_k=2)
    assert declared.steps_for(2 * 256) == Steps(scale_order="product")
    assert declared.steps_for(2 * 257) is None
    assert contract_of("tensor_static", activation="relu2_no_mul", top_k=3).steps_for(3) is None
    for scheme, fields in (("tensor_static", {"bias": True}), ("block", {}), ("none", {})):
        assert contract_of(scheme, activation="relu2_no_mul", **fields).steps is None


@pytest.mark.parametrize("scheme", ["block", "tensor_static", "none"])
def test_biases_are_added_to_what_its_gemms_store(scheme: str) -> None:
    recipe = contract_of(scheme, bias=True).recipe
    assert (recipe.bias, recipe.gemm1_output, recipe.gemm2_output) == ("input", "float32", "float32")


def test_on_other_devices_it_declares_what_it_rounds() -> None:
    for device in ("b200", "b300", "rtx_pro_6000"):
        assert contract_of("tensor_static", device) == Contract(contract_of("tensor_static").recipe)
    assert contract_of("none", "b200") == Contract(contract_of("none").recipe)
    assert contract_of("none", "rtx_pro_6000") == Contract()


def test_a_rank_may_have_any_experts() -> None:
    tensors = build(case("none", ep="2:1"), "cpu")
    scattered = torch.tensor([-1, 2, -1, 1, -1, -1, 3, 0], dtype=torch.int32)
    found, expected = (
        replace(tensors, expert_map=scattered).call(cls(tensors.config, tensors.quant, tensors.weights))
        for cls in (PlayedCutlass, HONEST)
    )
    assert same(found, expected)


class Anywhere(PlayedCutlass):
    """For the suite, which asks the predicate, and looks for every rounding that is declared."""

    honest = TorchExperts.with_recipe(RECIPES[TENSOR_STATIC])
    support = replace(PlayedCutlass.support, device=lambda _platform, _env: True, scheme=one_of(TENSOR_STATIC))


ANYWHERE, CPU = Subject("PLAYED", Anywhere, "PLAYED"), Target("cpu", PLATFORMS["cpu"], "cpu")


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("law", ["repeated", "masked"])
def test_an_expert_in_several_slots_counts_each_time(law: str, top_k: int) -> None:
    """Also where the release would find the first alone: there they are merged before."""
    result = check_case(case("tensor_static", law=law, top_k=top_k), ANYWHERE, CPU)
    assert result.status is Status.PASSED, result.reason


def test_its_sort_would_lose_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the suite said on a device before slots were merged."""
    merging = Anywhere.slots
    monkeypatch.setattr(Anywhere, "slots", lambda *given, merge: merging(*given, merge=False))
    result = check_case(case("tensor_static", law="repeated", top_k=3), ANYWHERE, CPU)
    assert result.status is Status.FAILED
    assert "outside its bound" in result.reason


@pytest.mark.parametrize(
    ("device", "module"), [("h100", "90"), ("b200", "100"), ("b300", "103"), ("rtx_pro_6000", "120")]
)
def test_kernels_that_are_not_built_are_told_with_the_command(device: str, module: str, tmp_path: Path) -> None:
    if device not in PLATFORMS:
        pytest.fail(f"the catalogue has no {device}: {', '.join(PLATFORMS)}")
    ahead, cache = tmp_path / "aot", tmp_path / "cached_ops"
    places = SimpleNamespace(FLASHINFER_AOT_DIR=ahead, FLASHINFER_JIT_DIR=cache)
    wanted = FlashInferModule.of(PLATFORMS[device], places)
    assert f"not built: no fused_moe_{module}.so in {ahead} or {cache}" in wanted.not_built({})
    source = FLASHINFER.source("flashinfer/jit/fused_moe.py")
    assert f"def {wanted.generator}(" in source
    assert 'f"fused_moe_{device_arch}"' in source
    for name in ("FLASHINFER_AOT_DIR", "FLASHINFER_JIT_DIR"):
        assert f"\n{name}" in FLASHINFER.source("flashinfer/jit/env.py")
    for place, kind in ((ahead, AHEAD), (cache, CACHED)):
        there = place / f"fused_moe_{module}" / f"fused_moe_{module}.so"
        there.parent.mkdir(parents=True)
        there.touch()
        assert wanted.located({}) == Located(there, kind)
        assert wanted.not_built({}) == ""
        there.unlink()


def test_what_the_build_relies_on_is_in_the_release() -> None:
    core, extension = (FLASHINFER.source(f"flashinfer/jit/{name}.py") for name in ("core", "cpp_ext"))
    spec = "JitSpec"
    for method in ("write_ninja", "build"):
        assert FLASHINFER.signature("flashinfer/jit/core.py", f"{spec}.{method}")
    assert "verbose" in FLASHINFER.signature("flashinfer/jit/core.py", f"{spec}.build").parameters
    for name in ("ninja_path", "build_dir"):
        assert FLASHINFER.signature("flashinfer/jit/core.py", f"{spec}.{name}")
    assert f'os.environ.get("{NO_JIT}")' in core
    assert 'FLASHINFER_JIT_DIR / self.name / f"{self.name}.so"' in core
    assert 'FLASHINFER_AOT_DIR / self.name / f"{self.name}.so"' in core
    assert not FLASHINFER.signature("flashinfer/jit/cpp_ext.py", "get_cuda_path").parameters
    for name in ("MAX_JOBS", "FLASHINFER_NVCC", "CXX"):
        assert f'os.environ.get("{name}"' in extension
    for name in (flashinfer_needs.EXTRA_CUDA, flashinfer_needs.EXTRA_CXX, flashinfer_needs.EXTRA_LINK):
        assert f'parse_env_flags("{name}")' in extension
    for name in ("cudart", "cuda"):
        assert f'"-l{name}",' in extension
    assert 'extra_ldflags=["-lnvrtc"]' in FLASHINFER.source("flashinfer/jit/fused_moe.py")
    assert '"ninja",\n        "-v",\n        "-C",' in extension
    assert f'"{ARCHITECTURES}" in os.environ' in FLASHINFER.source("flashinfer/compilation_context.py")


def test_kernels_of_block_scales_are_compiled_by_nvcc_at_the_first_call() -> None:
    folder = "flashinfer/data/csrc/nv_internal/tensorrt_llm/deep_gemm"
    compiler = FLASHINFER.source(f"{folder}/compiler.cuh")
    for name in (flashinfer_cutlass.BLOCK_NVCC, "CUDA_HOME"):
        assert f'getenv("{name}")' in compiler
    always = FLASHINFER.source(f"{folder}/runtime.cuh").partition("kJitUseNvcc = []() {")[2].partition("}")[0]
    assert [line for line in map(str.strip, always.splitlines()) if line and not line.startswith("//")] == [
        "return true;"
    ]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"scheme": "tensor_dyn"}, "tensor_dyn: expected none, tensor_static or block"),
        ({"inter": 192}, "intermediate_size_per_partition=192: expected a multiple of 128"),
        ({"hidden": 320}, "hidden_dim=320: expected a multiple of 128"),
        ({"scheme": "tensor_static", "hidden": 200}, "hidden_dim=200: expected a multiple of 16"),
        ({"dtype": "fp16"}, "in_dtype=torch.float16: expected torch.bfloat16"),
        ({"activation": "gelu"}, "activation=gelu: expected silu or relu2_no_mul"),
    ],
)
def test_what_flashinfers_cutlass_cannot_take_is_refused(fields: dict[str, Any], why: str) -> None:
    tensors = build(replace(LAYER, **fields), "cpu")
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        PlayedCutlass(tensors.config, tensors.quant, tensors.weights)


def test_codes_of_another_format_are_refused() -> None:
    tensors = build(case("block"), "cpu")
    with pytest.raises(
        BackendUnavailable, match=r"weights of dtype torch.float8_e4m3fnuz: expected torch.float8_e4m3fn"
    ):
        PlayedCutlass(tensors.config, tensors.quant, as_fnuz(tensors.weights))


def test_an_activation_that_wants_the_gate_that_is_not_there_is_refused() -> None:
    tensors = build(case("block", activation="relu2_no_mul"), "cpu")
    config = replace(tensors.config, activation="silu")
    with pytest.raises(BackendUnavailable, match=r"silu does not go without a gate \(is_act_and_mul=False\)"):
        PlayedCutlass(config, tensors.quant, tensors.weights)
