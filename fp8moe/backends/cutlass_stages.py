"""What VLLM_CUTLASS and BATCHED_VLLM_CUTLASS share: vLLM's grouped GEMM, our quantisation and activation around it."""

from __future__ import annotations

from collections.abc import Callable
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
from fp8moe.schemes import TENSOR_DYNAMIC, Scheme, scheme_name

ROUNDED = Recipe(gemm1_output="input", gemm2_output="input")
"""Of both backends and every scheme: vLLM's products are 16-bit, and what lies between them is ours."""
GEMM = "cutlass_moe_mm"
MULTIPLE = 16
"""Of both sizes, for 128-bit loads of 8-bit numbers."""
MOST_EXPERTS = 1024
"""One block has a thread for each, and a launch that fails is not told."""


class CutlassStages(LibraryBackend):
    """The stages; products are in the hidden states' dtype.

    Raises:
        BackendUnavailable: another device or no operators.
        LayerNotSupported: a layer that the kernels cannot take.
    """

    written_from = "vllm 0.25.1"
    tried_on = "an H200"
    package = "vllm"
    schemes: ClassVar[tuple[Scheme, ...]]
    more: ClassVar[tuple[str, ...]]
    """Operators beside that of this class."""

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
        self.dynamic = (quant.weight_key, quant.activation_key) == TENSOR_DYNAMIC
        self.scales = {name: _scale_of(weights, name) for name in ("w13", "w2")}
        self.strides = {size: _strides(weights, size) for size in {*weights.w13.shape[1:], *weights.w2.shape[1:]}}

    def library(self) -> Any:
        """The operators.

        Raises:
            BackendUnavailable: they do not load, or one of them is missing.
        """
        return operators(type(self).__name__, {"_C": (GEMM, *self.more)})

    def quantised_to(self, states: Tensor, places: Tensor, present: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
        """Codes (rows, H), each row of `states` in the places of its pairs, and fp32 scales, (rows, 1) or (1,), by our
        kernels: vLLM's per-token operator makes 448 of a NaN. What has no pair is left undefined.

        Args:
            places: as `fp8moe.kernels.fused_rows.quantize_rows_to_places` has them.
            present: negative where a row of `states` has no part in a scale; None: all have.
        """
        from fp8moe.kernels.fused_rows import quantize_rows_to_places

        given = self.given_scale(states, present, self.weights.a13_scale)
        codes, scales = _empty_codes(states, rows, states.shape[1])
        with device_guard(states.device):
            floor = self.contract.recipe.amax_floor
            quantize_rows_to_places(states, places, codes, scales, given, amax_floor=floor)
        return codes, scales if given is None or given.numel() > 1 else given

    def requantised(
        self, gate_up: Tensor, places: Tensor, present: Tensor, in_order: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(rows, 2I) to codes of the activation and their scales, as `quantised_to`. vLLM's operator rounds the gate's
        part before the product, ours nothing before the codes.

        Args:
            places: the rows that are there, among negative numbers.
            present: (rows,), negative for the others; read where a scale is dynamic and shared.
            in_order: as `show` has it.
        """
        from fp8moe.kernels.fused_rows import activate_quantize_rows
        from fp8moe.kernels.quantize import quantize_per_tensor

        name, floor = self.config.activation, self.contract.recipe.amax_floor
        values = None
        if self.dynamic or self.observe is not None:
            values = self.activated_by_triton(gate_up, present=present if self.dynamic else None)
            self.show("activation", values, in_order)
        codes, scales = _empty_codes(gate_up, len(gate_up), gate_up.shape[1] // 2)
        given = self.given_scale(values, present, self.weights.a2_scale)
        with device_guard(gate_up.device):
            if self.dynamic:
                assert values is not None
                assert given is not None
                if given.numel() > 1:
                    given = given.repeat_interleave(len(values) // len(given))[:, None]
                codes = quantize_per_tensor(values, given.flatten(), present=present)
            else:
                activate_quantize_rows(gate_up, name, places, codes, scales, given, amax_floor=floor)
        self.show("requantisation", codes, in_order)
        return codes, scales if given is None else given

    def given_scale(self, values: Tensor | None, present: Tensor | None, static: Tensor | None) -> Tensor | None:
        """(1,), or one for each batch; None where each row has its own, which the kernel finds."""
        if static is not None:
            return static.reshape(1)
        if not self.dynamic:
            return None
        assert values is not None
        with device_guard(values.device):
            return self.dynamic_scale(values, present)

    def dynamic_scale(self, values: Tensor, present: Tensor | None) -> Tensor:
        """(1,), that of all present rows."""
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
    if config.num_local_experts > MOST_EXPERTS:
        return f"num_local_experts={config.num_local_experts}: expected at most {MOST_EXPERTS}"
    sizes = {"hidden_dim": config.hidden_dim, "intermediate_size_per_partition": config.intermediate_size_per_partition}
    wrong = [f"{name}={size}: expected a multiple of {MULTIPLE}" for name, size in sizes.items() if size % MULTIPLE]
    return "; ".join(wrong)


def _scale_of(weights: MoEWeights, name: str) -> Tensor:
    """(E, rows), or (E, 1) per tensor."""
    scale: Tensor = getattr(weights, f"{name}_scale")
    return scale.reshape(scale.shape[0], -1).contiguous()


def _empty_codes(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Undefined codes, and a scale for each row."""
    return (
        like.new_empty(rows, columns, dtype=torch.float8_e4m3fn),
        like.new_empty(rows, 1, dtype=torch.float32),
    )


def _strides(weights: MoEWeights, size: int) -> Tensor:
    """(E,) int64: the distance of rows of so many columns."""
    return torch.full((weights.w13.shape[0],), size, dtype=torch.int64, device=weights.w13.device)
