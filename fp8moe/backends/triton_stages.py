"""The stages of an MoE as our Triton kernels compute them, for both formats; each stage is a method of its own.

What differs between the schemes is decided here, once, from the quantisation of the layer: which scales the GEMM
applies, and how activations are quantised.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fp8moe.backends.triton_arithmetic import LARGE_TILE, arithmetic_by_tile, tile_height
from fp8moe.config import FusedMoEConfig
from fp8moe.envs import Env
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.keys import GroupShape, QuantKey
from fp8moe.platforms import Platform, detected_platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract, Recipe, Steps
from fp8moe.registry import BackendUnavailable, LayerNotSupported
from fp8moe.schemes import (
    BLOCK,
    CHANNEL_TOKEN,
    TENSOR_DYNAMIC,
    TENSOR_STATIC,
    TENSOR_TOKEN,
    UNQUANTISED,
    scheme_name,
)
from fp8moe.validation import InvalidMoEInput

if TYPE_CHECKING:
    from fp8moe.kernels.align import Alignment

TRITON_NEEDS = "CUDA or ROCm"
FP8_SCHEMES = frozenset({BLOCK, CHANNEL_TOKEN, TENSOR_TOKEN, TENSOR_STATIC, TENSOR_DYNAMIC})


def triton_device(platform: Platform, _env: Env) -> bool:
    return platform.is_cuda or platform.is_rocm


def triton_scheme(platform: Platform, weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
    scheme = (weight_key, activation_key)
    return scheme == UNQUANTISED or (platform.has_fp8_hardware and scheme in FP8_SCHEMES)


class TritonStages(FusedMoEPermuteExpertsUnpermute):
    """What TRITON and BATCHED_TRITON share. Arguments and errors: the base class.

    Takes the canonical layout as it is, contiguous or not. In Triton's interpreter (TRITON_INTERPRET=1, set before
    triton is imported) it runs on the CPU.

    Raises:
        BackendUnavailable: a device that Triton cannot run on.
        LayerNotSupported: a scheme or a dtype without a kernel.
    """

    batched = False
    """Whether a tensor of activations is one expert's batch, and tiles have the one height that batches have."""

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        missing = _unsupported(config, quant, weights)
        if missing:
            raise LayerNotSupported(f"{type(self).__name__}: {missing}; nothing was run")
        interpreted = interprets(type(self).__name__)
        platform = _platform_of(type(self).__name__, weights.w13.device, interpreted, self.quantised)
        self.contract = contract_on(platform, interpreted, config, quant, batched=self.batched)

    # -- what follows from the scheme --

    @property
    def quantised(self) -> bool:
        return self.quant.w1.dtype is not None

    @property
    def scales(self) -> Literal["block", "row", "none"]:
        """Where the GEMM applies its scales: to each 128 of K, once for each row and column, or nowhere."""
        if not self.quantised:
            return "none"
        return "block" if self.quant.w1.shape is not None and self.quant.w1.shape.is_block() else "row"

    def weight_scale(self, name: str) -> Tensor | None:
        """The scales of w13 or w2 as the GEMM takes them: blocks as they are, others as a view (E, rows)."""
        scale: Tensor | None = getattr(self.weights, f"{name}_scale")
        if scale is None or self.scales == "block":
            return scale
        rows = getattr(self.weights, name).shape[1]
        return scale[:, None].expand(-1, rows) if scale.dim() == 1 else scale[..., 0]

    # -- the stages; a mutant overrides one --

    def quantize(
        self, name: Literal["a1", "a2"], values: Tensor, present: Tensor | None, expert: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What a GEMM multiplies, and its scales (rows, groups) or None.

        Args:
            name: a1 for the first GEMM's input, a2 for the second's.
            values: (rows, columns).
            present: (rows,) int32, negative where a row is to be left alone; None: all are there.
            expert: (rows,) int64, whose batch a row belongs to, where dynamic scales per tensor are each batch's own.
        """
        from fp8moe.kernels import quantize as kernels

        desc = getattr(self.quant, name)
        if desc.dtype is None:
            return values, None
        group, floor = desc.shape or GroupShape.PER_TENSOR, self.contract.recipe.amax_floor
        if desc.static:
            scale: Tensor = getattr(self.weights, "a13_scale" if name == "a1" else "a2_scale").reshape(1)
        elif group.is_per_group():
            return kernels.quantize_per_token_group(values, amax_floor=floor, present=present)
        elif group.is_per_token():
            return kernels.quantize_per_token(values, amax_floor=floor, present=present)
        elif expert is not None:
            assert present is not None
            scale = _scale_by_expert(values, present, expert, self.config.num_local_experts, floor)
        else:
            scale = kernels.tensor_scale(values, amax_floor=floor, present=present)
        codes = kernels.quantize_per_tensor(values, scale, present=present)
        return codes, scale.reshape(-1, 1).expand(values.shape[0], 1)

    def gemm(
        self, name: Literal["w13", "w2"], a: Tensor, a_scale: Tensor | None, alignment: Alignment, pairs_per_row: int
    ) -> Tensor:
        """Each pair's row of `a` times its expert's w13 or w2, scaled, plus bias: (P, rows of the weight) fp32."""
        from fp8moe.kernels.grouped_gemm import grouped_gemm

        gated = name == "w13" and self.config.is_act_and_mul
        return grouped_gemm(
            a,
            a_scale,
            getattr(self.weights, name),
            self.weight_scale(name),
            alignment,
            pairs_per_row=pairs_per_row,
            parts=2 if gated else 1,
            scales=self.scales,
            bias=getattr(self.weights, f"{name}_bias"),
        )

    def activation(self, gate_up: Tensor, present: Tensor) -> Tensor:
        """(P, 2I or I) fp32 to (P, I): fp32, or the dtype of the hidden states where it enters the GEMM as it is."""
        from fp8moe.kernels.activation import activate

        dtype = torch.float32 if self.quantised else self.config.in_dtype
        return activate(gate_up, self.config.activation, present=present, dtype=dtype)

    def experts(
        self,
        hidden_states: Tensor,
        alignment: Alignment,
        pairs_per_row: int,
        expert: Tensor | None,
        quantised: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Both GEMMs and what lies between: (rows, H) to (P, H) fp32; rows of absent pairs are left undefined.

        Args:
            quantised: the codes and scales of the hidden states, where they have been made already.
        """
        present = alignment.local_ids if self.batched else None  # the rows of a batch are pairs, those of a call tokens
        h_scale: Tensor | None
        x, x_scale = quantised or self.quantize("a1", hidden_states, present, expert)
        gate_up = self.gemm("w13", x, x_scale, alignment, pairs_per_row)
        self._show("first_gemm", gate_up)
        if self.fuses():
            h, h_scale = self.fused(gate_up, alignment)
            del gate_up  # the largest buffer: its memory serves for what follows
        else:
            values = self.activation(gate_up, alignment.local_ids)
            del gate_up
            self._show("activation", values)
            h, h_scale = self.quantize("a2", values, alignment.local_ids, expert)
            if h_scale is not None:
                self._show("requantisation", h)
        y = self.gemm("w2", h, h_scale, alignment, 1)
        self._show("second_gemm", y)
        return y

    def fuses(self) -> bool:
        """Whether `activation` and the second `quantize` are one kernel, with the same bits: where rows share no
        dynamic scale, nobody looks between the two, and neither is another class's."""
        desc = self.quant.a2
        own = type(self).activation is TritonStages.activation and type(self).quantize is TritonStages.quantize
        shared = not desc.static and (desc.shape or GroupShape.PER_TENSOR).is_per_tensor()
        return own and self.observe is None and desc.dtype is not None and not shared

    def fused(self, gate_up: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
        """(P, 2I or I) fp32 to the codes of the activation, (P, I), and their scales, (P, groups)."""
        from fp8moe.kernels.fused import GROUP, activate_quantize
        from fp8moe.kernels.fused_rows import activate_quantize_rows

        desc, rows, inter = self.quant.a2, len(gate_up), self.config.intermediate_size_per_partition
        in_groups = not desc.static and desc.shape is not None and desc.shape.is_per_group()
        codes = gate_up.new_empty(rows, inter, dtype=torch.float8_e4m3fn)
        scales = gate_up.new_empty(rows, -(-inter // GROUP) if in_groups else 1)
        given = (gate_up, self.config.activation, alignment.local_ids, codes, scales)
        floor = self.contract.recipe.amax_floor
        if in_groups:
            activate_quantize(*given, amax_floor=floor, in_order=True)
        else:
            static = self.weights.a2_scale
            of_all = None if static is None else static.reshape(1)
            activate_quantize_rows(*given, of_all, amax_floor=floor, in_order=True)
        return codes, scales

    def check_size(self, tiles: int) -> None:
        """
        Raises:
            InvalidMoEInput: more programs than a launch can have.
        """
        from fp8moe.kernels.grouped_gemm import MOST_PROGRAMS, OF_SHORT

        columns = max(self.weights.w13.shape[1], self.config.hidden_dim)
        programs = tiles * (-(-columns // OF_SHORT.columns) + 1)  # the narrowest of those that many tiles have
        if programs > MOST_PROGRAMS:
            raise InvalidMoEInput(
                "topk_ids", f"so many that {programs} programs are needed", f"at most {MOST_PROGRAMS}: split the call"
            )

    def _show(self, stage: str, values: Tensor) -> None:
        if self.observe is not None:
            self.observe(stage, values)


def _scale_by_expert(values: Tensor, present: Tensor, expert: Tensor, experts: int, floor: float) -> Tensor:
    """(rows,) fp32: the dynamic scale of each row's batch, max(amax, floor) / 448, an IEEE division."""
    amax = values.abs().amax(-1).float() if values.shape[1] else values.new_zeros(len(values), dtype=torch.float32)
    amax = torch.where(present >= 0, amax, 0.0)
    largest = amax.new_zeros(experts).scatter_reduce(0, expert, amax, "amax")
    scale = largest.clamp(min=floor) / torch.full_like(largest, 448.0)
    return scale[expert]


def interprets(name: str) -> bool:
    """Whether triton was imported with TRITON_INTERPRET=1; setting it later has no effect.

    Raises:
        BackendUnavailable: triton is not installed, or its interpreter does not compute as devices do.
    """
    try:
        from fp8moe.kernels.interpreter import INTERPRETED, unlike_a_device
    except ImportError as error:
        raise BackendUnavailable(f"{name}: {error}; install triton") from error
    if INTERPRETED and unlike_a_device():
        raise BackendUnavailable(f"{name}: {unlike_a_device()}")
    return INTERPRETED


def device_guard(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensors'; without an index, changes nothing."""
    return torch.cuda.device(device.index if device.type == "cuda" and device.index is not None else -1)


def _unsupported(config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> str | None:
    """What of this configuration no kernel takes, in words; None where they take everything."""
    scheme = (quant.weight_key, quant.activation_key)
    if scheme != UNQUANTISED and scheme not in FP8_SCHEMES:
        return f"the scheme {scheme_name(*scheme)} has no kernel"
    if scheme != UNQUANTISED and weights.w13.dtype != torch.float8_e4m3fn:
        return f"weights of dtype {weights.w13.dtype} have no kernel yet, only torch.float8_e4m3fn has"
    if config.in_dtype not in (torch.bfloat16, torch.float16):
        return f"hidden states of dtype {config.in_dtype} have no kernel, only bfloat16 and float16 have"
    return gate_refused(config) or None


def gate_refused(config: FusedMoEConfig) -> str:
    """What is wrong of the activation and `is_act_and_mul` together; "" where they agree."""
    if config.activation.endswith("_no_mul") != config.is_act_and_mul:
        return ""
    gated = "with" if config.is_act_and_mul else "without"
    return f"the activation {config.activation} does not go {gated} a gate (is_act_and_mul={config.is_act_and_mul})"


def _platform_of(name: str, device: torch.device, interpreted: bool, fp8: bool) -> Platform:
    """The platform that the kernels run on.

    Raises:
        BackendUnavailable: Triton cannot run them on `device`.
    """
    if interpreted:
        return Platform("cpu")
    if device.type != "cuda":
        remedy = (
            "set TRITON_INTERPRET=1 before triton is imported, to run in its interpreter"
            if device.type == "cpu"
            else f"put them on a device that is {TRITON_NEEDS}"
        )
        raise BackendUnavailable(f"{name}: the weights are on {device}, where Triton cannot run; {remedy}")
    platform = detected_platform()
    if fp8 and not platform.has_fp8_hardware:
        raise BackendUnavailable(
            f"{name}: FP8 is not supported on {platform.architecture}; use a device of SM89 or newer, or of CDNA"
        )
    return platform


def contract_on(
    platform: Platform, interpreted: bool, config: FusedMoEConfig, quant: FusedMoEQuantConfig, *, batched: bool
) -> Contract:
    """The recipe of the scheme, and the arithmetic by tile height; a token's bits depend on its batch where the
    heights differ, and where a scale is dynamic and the whole batch's.

    The interpreter's GEMM is BLAS, whose order is its own affair: there batch invariance is unknown.
    """
    quantised = quant.w1.dtype is not None
    recipe = Recipe(activation_output="float32" if quantised else "input")
    if batched:
        recipe = replace(recipe, dynamic_tensor_scope="expert")
    steps = Steps(combine="slot_sum" if batched else "slot_fma")
    by_tile = arithmetic_by_tile(platform, interpreted, fp8=quantised)
    contract = Contract(recipe, steps=steps, deterministic=True, graph_capturable=not interpreted)
    if by_tile is None:
        return contract

    def arithmetic(pairs: int) -> Arithmetic:
        return by_tile[tile_height(pairs, config.num_experts)]

    one_height = batched or len(set(by_tile.values())) == 1
    shared = quant.a1.dtype is not None and not quant.a1.static and (quant.a1.shape or GroupShape.PER_TENSOR)
    return replace(
        contract,
        arithmetic=by_tile[LARGE_TILE] if batched else arithmetic,
        batch_invariant=None if interpreted else one_height and not (shared and shared.is_per_tensor()),
    )
