"""From a checkpoint's weights to what a backend's kernel takes, and to the backend itself (specification section 4).

Adapters convert in their constructors by these same functions; nothing here needs a library or a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fp8moe.config import FusedMoEConfig
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.layouts import deepgemm, flashinfer, marlin, rocm, xpu
from fp8moe.platforms import Platform, detected_platform
from fp8moe.quant import FusedMoEQuantConfig, FusedMoEQuantDesc
from fp8moe.registry import Fp8MoeBackend, backend_named

BLOCK_SHAPE = (128, 128)
"""Of weights, the one that the kernels know."""
Convert = Callable[[MoEWeights, FusedMoEConfig, FusedMoEQuantConfig, Platform], MoEWeights]


def convert_to_fp8_moe_kernel_format(
    backend: Fp8MoeBackend,
    config: FusedMoEConfig,
    quant: FusedMoEQuantConfig,
    weights: MoEWeights,
    *,
    e8m0: bool = False,
    platform: Platform | None = None,
) -> MoEWeights:
    """A layer's weights and scales in the layout of a backend's kernel; `weights` stay as they are.

    Args:
        quant: of the canonical weights, before `make_fp8_moe_quant_config`.
        e8m0: whether DeepGEMM takes scales that are powers of two; weights are then quantised anew.
        platform: whose FP8 format counts, for AITER; None: the detected device.

    Raises:
        ValueError: NONE, which has no kernel, or weights that the kernel's layout cannot hold; the text names what.
    """
    if backend is Fp8MoeBackend.NONE:
        raise ValueError("backend=NONE has no kernel to convert for: select a backend that has one")
    dtype = weights.w13.dtype
    if dtype == torch.float8_e4m3fnuz and (e8m0 or backend in _CONVERT) and backend is not Fp8MoeBackend.AITER:
        raise ValueError(
            f"w13 of dtype {dtype}: {backend.name}'s kernel would read other numbers; expected torch.float8_e4m3fn, as "
            "checkpoints have it"
        )
    if quant.block_shape not in (None, BLOCK_SHAPE) and (e8m0 or backend in _CONVERT):
        raise ValueError(
            f"quant.w1.shape={quant.w1.shape}: {backend.name}'s layout has scales of 128 x 128 "
            "blocks; expected these, or scales per channel or tensor"
        )
    if e8m0 and backend in (Fp8MoeBackend.DEEPGEMM, Fp8MoeBackend.BATCHED_DEEPGEMM):
        return _powers_of_two(weights, config, quant)
    here = detected_platform() if platform is None else platform
    return _CONVERT.get(backend, _as_it_is)(weights, config, quant, here)


def make_fp8_moe_quant_config(backend: Fp8MoeBackend, quant: FusedMoEQuantConfig) -> FusedMoEQuantConfig | None:
    """The quantisation as a backend's class takes it; None for FLASHINFER_TRTLLM, which is no such class.

    Args:
        quant: the layer's.

    Raises:
        ValueError: FLASHINFER_CUTLASS with per-tensor weights and without static activation scales.
    """
    if backend is Fp8MoeBackend.FLASHINFER_TRTLLM:
        return None
    if backend is Fp8MoeBackend.MARLIN:
        block = quant.w1.shape if quant.block_shape is not None else None
        weights = replace(quant.w1, shape=block)  # whether a scale is a channel's or a tensor's shows in the scales
        return FusedMoEQuantConfig(FusedMoEQuantDesc(), FusedMoEQuantDesc(), weights, weights)
    needs_static = backend is Fp8MoeBackend.FLASHINFER_CUTLASS and quant.use_fp8_w8a8 and quant.block_shape is None
    if needs_static and not (quant.a1.static and quant.a2.static):
        raise ValueError(
            "quant.a1, quant.a2: dynamic; FLASHINFER_CUTLASS multiplies per-tensor weights with static activation "
            "scales: expected the checkpoint's input scales"
        )
    return quant


def make_fp8_moe_kernel(
    backend: Fp8MoeBackend,
    config: FusedMoEConfig,
    quant: FusedMoEQuantConfig,
    weights: MoEWeights,
    experts_cls: type[FusedMoEPermuteExpertsUnpermute] | None = None,
) -> FusedMoEPermuteExpertsUnpermute:
    """A backend, ready to be called.

    Args:
        quant, weights: the layer's, in the checkpoint's layout: the class converts.
        experts_cls: as the selector returned it; None: the registered class.

    Raises:
        ValueError: NONE, which has no class.
        InvalidMoEInput: as `FusedMoEPermuteExpertsUnpermute`.
        BackendUnavailable: its library, its device or its adapter is not there.
    """
    if experts_cls is None and backend is Fp8MoeBackend.NONE:
        raise ValueError("backend=NONE has no kernel: nothing fits this layer here")
    cls = backend_named(backend.name).experts_cls if experts_cls is None else experts_cls
    assert cls is not None
    return cls(config, quant, weights)


def _as_it_is(weights: MoEWeights, _: FusedMoEConfig, __: FusedMoEQuantConfig, ___: Platform) -> MoEWeights:
    return weights


def _powers_of_two(weights: MoEWeights, config: FusedMoEConfig, quant: FusedMoEQuantConfig) -> MoEWeights:
    if quant.block_shape is None or weights.w13_scale is None or weights.w2_scale is None:
        raise ValueError("w13_scale, w2_scale: DEEPGEMM takes FP8 weights with block scales")
    w13, w13_scale = deepgemm.power_of_two_scales(weights.w13, weights.w13_scale, 2 if config.is_act_and_mul else 1)
    w2, w2_scale = deepgemm.power_of_two_scales(weights.w2, weights.w2_scale)
    return MoEWeights(w13, w2, w13_scale, w2_scale, weights.w13_bias, weights.w2_bias)


def _aiter(weights: MoEWeights, _: FusedMoEConfig, quant: FusedMoEQuantConfig, platform: Platform) -> MoEWeights:
    """Weights that are e4m3fnuz already stay so; on a device of the other format they are no numbers of it."""
    dtype = weights.w13.dtype
    if dtype == torch.float8_e4m3fnuz and not platform.uses_fnuz:
        raise ValueError(f"w13 of dtype {dtype}: {platform.architecture} takes torch.float8_e4m3fn")
    to_fnuz = dtype == torch.float8_e4m3fn and platform.uses_fnuz and quant.use_fp8_w8a8
    return rocm.layer_shuffled(rocm.layer_as_fnuz(weights) if to_fnuz else weights)


def _marlin(weights: MoEWeights, config: FusedMoEConfig, quant: FusedMoEQuantConfig, _: Platform) -> MoEWeights:
    group = -1 if quant.block_shape is None else quant.block_shape[1]
    return marlin.layer(weights, group, config.in_dtype, gated=config.is_act_and_mul)


def _flashinfer_cutlass(
    weights: MoEWeights, config: FusedMoEConfig, quant: FusedMoEQuantConfig, _: Platform
) -> MoEWeights:
    return flashinfer.cutlass_weights(weights, gated=config.is_act_and_mul, block=quant.block_shape is not None)


def _flashinfer_trtllm(
    weights: MoEWeights, config: FusedMoEConfig, quant: FusedMoEQuantConfig, _: Platform
) -> MoEWeights:
    return flashinfer.trtllm_weights(weights, gated=config.is_act_and_mul, block=quant.block_shape is not None)


def _xpu(weights: MoEWeights, config: FusedMoEConfig, _: FusedMoEQuantConfig, __: Platform) -> MoEWeights:
    """Upstream's seed leaves them alone; the released library takes them transposed, and for swigluoai in turn."""
    return xpu.transposed(xpu.in_turn(weights) if config.activation == "swigluoai" else weights)


_CONVERT: dict[Fp8MoeBackend, Convert] = {
    Fp8MoeBackend.AITER: _aiter,
    Fp8MoeBackend.MARLIN: _marlin,
    Fp8MoeBackend.FLASHINFER_CUTLASS: _flashinfer_cutlass,
    Fp8MoeBackend.FLASHINFER_TRTLLM: _flashinfer_trtllm,
    Fp8MoeBackend.XPU: _xpu,
}
"""The others take the checkpoint's layout."""
