"""FLASHINFER_TRTLLM: FlashInfer's TensorRT-LLM kernels on SM10x, which route as well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8moe.backends.common import one_of
from fp8moe.backends.libraries import LibraryCall, LibraryExperts, first_local, loaded, once_a_token
from fp8moe.backends.triton_stages import gate_refused
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig, RoutingMethodType
from fp8moe.envs import Env
from fp8moe.experts import MoEWeights
from fp8moe.keys import QuantKey, kFp8Dynamic128Sym
from fp8moe.platforms import Platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Contract, Recipe
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend, LayerNotSupported
from fp8moe.scaling import E4M3FN, quantize
from fp8moe.schemes import BLOCK, TENSOR_STATIC, scheme_name
from fp8moe.support import Support
from fp8moe.validation import InvalidMoEInput

REMEDY = "install flashinfer-python and flashinfer-cubin of one version, 0.6.13 or newer"
NAMES = ("trtllm_fp8_block_scale_routed_moe", "Fp8QuantizationType", "WeightLayout", "RoutingMethodType")
CUBINS = "FLASHINFER_CUBIN_DIR"
"""The folder of compiled kernels: FlashInfer's name for it, and the variable that sets it."""
EXPERTS_MULTIPLE = 4
LEAST_SCALE = 2.0**-126
"""Of an intermediate's group: the smallest normal number of fp32."""
MOST_TOP_K = 10
"""What vLLM, too, allows at the most."""

_BLOCK_ROUTING = (RoutingMethodType.DeepSeekV3, RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive)
_TENSOR_ROUTING = (RoutingMethodType.Llama4, RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive)


def _device(platform: Platform, _env: Env) -> bool:
    """No library test, as upstream: SM10x without FlashInfer is selected all the same (quirk Q12)."""
    return platform.is_cuda_family(100)


def _routing(method: RoutingMethodType, weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
    return method in (_BLOCK_ROUTING if (weight_key, activation_key) == BLOCK else _TENSOR_ROUTING)


def _logits_dtype(method: RoutingMethodType, dtype: Any) -> bool:
    return dtype is not torch.float32 or method == RoutingMethodType.DeepSeekV3


class FlashInferTrtllmExperts(LibraryExperts):
    """FlashInfer's TRTLLM fused MoE; `select` returns no class for it, as upstream.

    With block scales, where the library takes experts that are chosen already; their weights enter in bf16. Its
    per-tensor kernel chooses by itself, from logits that no class is given. Written from the library's released source;
    it has run on no SM10x yet. Its arithmetic is not declared, and how its compiled kernels come to the scales of the
    first GEMM's result, which they keep in FP8, is taken to be as its source has it for the second's inputs.

    Raises:
        BackendUnavailable: another device or no library.
        LayerNotSupported: the per-tensor scheme, or a layer that the kernel cannot take.
    """

    backend = Fp8MoeBackend.FLASHINFER_TRTLLM
    contract = Contract(
        Recipe(
            gemm1_output="float8",
            intermediate_amax_floor=E4M3FN.largest * LEAST_SCALE,
            gemm2_output="input",
            routing_weights="input",
        )
    )
    written_from = "flashinfer-python 0.6.13"
    package = "flashinfer"
    support = Support(
        device=_device,
        needs="CUDA SM10x",
        scheme=one_of(BLOCK, TENSOR_STATIC),
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=lambda parallel: not parallel.enable_eplb,
        routing=_routing,
        logits_dtype=_logits_dtype,
    )

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        name, platform = type(self).__name__, self.platform()
        if not platform.is_cuda_family(100):
            raise BackendUnavailable(f"{name}: TRTLLM's kernels are for CUDA SM10x, not {platform.architecture}")
        refusal = _refusal(config, quant, weights)
        if refusal:
            raise LayerNotSupported(f"{name}: {refusal}")
        self.flashinfer = self.library()
        self.converted = self.converted_weights(platform)

    def library(self) -> Any:
        """What has the function and the enumerations of `NAMES`.

        Raises:
            BackendUnavailable: it does not load, lacks one of them, or has no kernels and would fetch them.
        """
        name = type(self).__name__
        library = loaded("flashinfer.fused_moe", NAMES, name, REMEDY)
        places = loaded("flashinfer.jit.env", (CUBINS,), name, REMEDY)
        missing = no_cubins(Path(getattr(places, CUBINS)))
        if missing:
            raise BackendUnavailable(f"{name}: {missing}")
        return library

    @classmethod
    def lacks_here(cls, platform: Platform, env: Mapping[str, str]) -> str:
        try:
            places = loaded("flashinfer.jit.env", (CUBINS,), cls.__name__, REMEDY)
        except BackendUnavailable as error:
            return str(error)
        return no_cubins(Path(getattr(places, CUBINS)))

    def compute(self, call: LibraryCall, output: Tensor) -> None:
        library, local = self.flashinfer, self.config.num_local_experts
        experts = local if call.expert_map is None else call.expert_map.numel()
        if experts % EXPERTS_MULTIPLE or experts <= call.ids.shape[1]:
            told = f"{call.ids.shape[1]} for each token, of {experts} experts"
            raise InvalidMoEInput("topk_ids", told, f"a multiple of {EXPERTS_MULTIPLE} experts, and more of them")
        # For few tokens its sort has a table of experts by tokens, with one slot in each place; -1 it passes over.
        ids, weights = once_a_token(call.ids.masked_fill(~call.present, -1), call.weights)
        codes, scale = quantize(call.hidden_states, kFp8Dynamic128Sym)
        self.flashinfer.trtllm_fp8_block_scale_routed_moe(
            topk_ids=packed(weights, ids),
            routing_bias=None,
            hidden_states=codes,
            hidden_states_scale=scale.t().contiguous(),
            gemm1_weights=self.converted.w13,
            gemm1_weights_scale=self.converted.w13_scale,
            gemm2_weights=self.converted.w2,
            gemm2_weights_scale=self.converted.w2_scale,
            num_experts=experts,
            top_k=call.ids.shape[1],
            n_group=None,
            topk_group=None,
            intermediate_size=self.config.intermediate_size_per_partition,
            local_expert_offset=0 if call.expert_map is None else first_local(call.expert_map, local),
            local_num_experts=local,
            routed_scaling_factor=None,
            routing_method_type=library.RoutingMethodType.Renormalize,  # of no meaning where experts are chosen
            use_shuffled_weight=True,
            weight_layout=library.WeightLayout.BlockMajorK,
            fp8_quantization_type=library.Fp8QuantizationType.DeepSeekFp8,
            output=output,
        )


def no_cubins(folder: Path) -> str:
    """Why there are no compiled kernels; "" where the folder has some."""
    if folder.is_dir() and any(folder.iterdir()):
        return ""
    return f"no kernels in {folder}, and FlashInfer would fetch them at the first call; {REMEDY}, or set {CUBINS}"


def packed(weights: Tensor, ids: Tensor) -> Tensor:
    """(M, k) int32: the expert, or -1, in the upper half of a word, its weight's bf16 in the lower one."""
    lower = weights.to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return ids << 16 | lower


def _refusal(config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> str:
    """What the kernel cannot take of a layer; "" where it takes it."""
    scheme = (quant.weight_key, quant.activation_key)
    if scheme != BLOCK:
        return f"{scheme_name(*scheme)}: only `block` has an entry that takes chosen experts"
    if gate_refused(config):
        return gate_refused(config)
    limits = {
        f"weights of dtype {weights.w13.dtype}: expected torch.float8_e4m3fn": (
            weights.w13.dtype != torch.float8_e4m3fn
        ),
        f"activation={config.activation}: expected silu": config.activation != "silu",
        f"in_dtype={config.in_dtype}: expected torch.bfloat16": config.in_dtype != torch.bfloat16,
        f"hidden_dim={config.hidden_dim}: expected a multiple of 128": config.hidden_dim % 128 != 0,
        f"intermediate_size_per_partition={config.intermediate_size_per_partition}: expected a multiple of 128": (
            config.intermediate_size_per_partition % 128 != 0
        ),
        f"num_experts={config.num_experts}: expected a multiple of 4": config.num_experts % EXPERTS_MULTIPLE != 0,
        f"experts_per_token={config.experts_per_token}: expected at most {MOST_TOP_K}, and fewer than num_experts": (
            config.experts_per_token > MOST_TOP_K or config.experts_per_token >= config.num_experts
        ),
        "biases: it has none": weights.w13_bias is not None or weights.w2_bias is not None,
    }
    return "; ".join(text for text, broken in limits.items() if broken)
