"""What VLLM_CUTLASS and BATCHED_VLLM_CUTLASS share: vLLM's grouped GEMM, our quantisation and activation around it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fp8moe.backends.libraries import LibraryBackend
from fp8moe.backends.triton_stages import device_guard, interprets
from fp8moe.backends.vllm_ops import operators
from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.platforms import Platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract, Recipe, Steps
from fp8moe.registry import BackendUnavailable, LayerNotSupported
from fp8moe.schemes import CHANNEL_TOKEN, Scheme, scheme_name

ROUNDED = Recipe(gemm1_output="input", activation_output="input", gemm2_output="input")
"""Of both backends and every scheme: vLLM's products are 16-bit, and what lies between them is ours."""
GEMM = "cutlass_moe_mm"
MULTIPLE = 16
"""Of both sizes, for 128-bit loads of 8-bit numbers."""


class CutlassStages(LibraryBackend):
    """The stages; results in between are in the hidden states' dtype.

    Raises:
        BackendUnavailable: another device or no operators.
        LayerNotSupported: a layer that the kernels cannot take.
    """

    written_from = "vllm 0.25.1"
    package = "vllm"
    schemes: ClassVar[tuple[Scheme, ...]]
    more: ClassVar[dict[str, tuple[str, ...]]]
    """Operators beside those of this class, by extension."""

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        name, platform = type(self).__name__, self.platform()
        if not _takes(platform):
            told = "vLLM's grouped GEMM is for CUDA SM90 to SM109"
            raise BackendUnavailable(f"{name}: {told}, not {platform.architecture}")
        refusal = _refused(config, quant, weights, self.schemes) or self.refused_activation()
        if refusal:
            raise LayerNotSupported(f"{name}: {refusal}")
        interprets(name)
        self.contract = contract_on(platform)
        self.ops = self.library()
        self.per_token = (quant.weight_key, quant.activation_key) == CHANNEL_TOKEN
        self.scales = {name: _scale_of(weights, name) for name in ("w13", "w2")}
        self.strides = {size: _strides(weights, size) for size in {*weights.w13.shape[1:], *weights.w2.shape[1:]}}

    def library(self) -> Any:
        """The operators.

        Raises:
            BackendUnavailable: they do not load, or one of them is missing.
        """
        needed: dict[str, tuple[str, ...]] = {"_C": (GEMM,)}
        for extension, names in self.more.items():
            needed[extension] = (*needed.get(extension, ()), *names)
        return operators(type(self).__name__, needed)

    def activated(self, gate_up: Tensor, present: Tensor) -> Tensor:
        """(rows, 2I) to (rows, I); rows where `present` is negative are left undefined. vLLM's operator rounds the
        gate's part before the product, ours does not."""
        return self.activated_by_triton(gate_up, present=present, dtype=gate_up.dtype)

    def quantised(self, values: Tensor, static: Tensor | None, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(rows, columns) to codes and fp32 scales, (rows, 1) or (1,), by our kernels: vLLM's per-token operator makes
        448 of a NaN. Rows where `present` is negative have no part in a scale, and their codes are left undefined."""
        from fp8moe.kernels.quantize import quantize_per_tensor, quantize_per_token

        with device_guard(values.device):
            if static is None and self.per_token:
                return quantize_per_token(values, amax_floor=self.contract.recipe.amax_floor, present=present)
            scale = self.dynamic_scale(values, present) if static is None else static.reshape(1)
            return quantize_per_tensor(values, scale, present=present), scale

    def dynamic_scale(self, values: Tensor, present: Tensor | None) -> Tensor:
        """(1,), that of all present rows, where a scale is dynamic and per tensor."""
        from fp8moe.kernels.quantize import tensor_scale

        return tensor_scale(values, amax_floor=self.contract.recipe.amax_floor, present=present)

    def gemm(self, out: Tensor, a: Tensor, scale: Tensor, name: str, offsets: Tensor, sizes: Tensor) -> None:
        """Each expert's rows of `a`, from its offset on, times its w13 or w2, scaled, into `out`; other rows of it are
        left undefined. The kernel is told of activations and of weights apart whether each row has a scale."""
        matrix: Tensor = getattr(self.weights, name)
        inner, outer = self.strides[a.shape[1]], self.strides[out.shape[1]]
        per = (scale.dim() == 2, self.scales[name].shape[1] > 1)
        self.ops.cutlass_moe_mm(out, a, matrix, scale, self.scales[name], offsets, sizes, inner, inner, outer, *per)


def contract_on(platform: Platform) -> Contract:
    """Of either backend, for sums over slots in fused steps, and products that are not swapped."""
    known = platform.cap == 90
    return Contract(
        ROUNDED,
        arithmetic=Arithmetic.on("hopper.wgmma") if known else None,  # all of K in one chain
        steps=Steps(scale_order="weights_first") if known else None,
        deterministic=True,
        graph_capturable=True,
    )


def _takes(platform: Platform) -> bool:
    """Whether the device is one that the grouped GEMM is compiled for."""
    return platform.is_cuda and platform.cap is not None and 90 <= platform.cap < 110


def _refused(
    config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights, schemes: tuple[Scheme, ...]
) -> str:
    """What the kernels cannot take of a layer; "" where they take it."""
    scheme = (quant.weight_key, quant.activation_key)
    if scheme not in schemes:
        return f"{scheme_name(*scheme)}: expected {', '.join(scheme_name(*known) for known in schemes)}"
    if weights.w13.dtype != torch.float8_e4m3fn:
        return f"weights of dtype {weights.w13.dtype}: expected torch.float8_e4m3fn"
    if weights.w13_bias is not None or weights.w2_bias is not None:
        return "biases: the grouped GEMM has none"
    sizes = {"hidden_dim": config.hidden_dim, "intermediate_size_per_partition": config.intermediate_size_per_partition}
    wrong = [f"{name}={size}: expected a multiple of {MULTIPLE}" for name, size in sizes.items() if size % MULTIPLE]
    return "; ".join(wrong)


def _scale_of(weights: MoEWeights, name: str) -> Tensor:
    """(E, rows), or (E, 1) per tensor."""
    scale: Tensor = getattr(weights, f"{name}_scale")
    return scale.reshape(scale.shape[0], -1).contiguous()


def _strides(weights: MoEWeights, size: int) -> Tensor:
    """(E,) int64: the distance of rows of so many columns."""
    return torch.full((weights.w13.shape[0],), size, dtype=torch.int64, device=weights.w13.device)
