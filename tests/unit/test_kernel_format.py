"""From a checkpoint to a kernel, by the specification's section 4: which backend takes what, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from conformance.build import build
from conformance.cases import Case
from fp8moe import Fp8MoeBackend, FusedMoEQuantConfig, MoEWeights
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.kernel_format import (
    convert_to_fp8_moe_kernel_format,
    make_fp8_moe_kernel,
    make_fp8_moe_quant_config,
)
from fp8moe.layouts import halves
from fp8moe.platforms import PLATFORMS
from fp8moe.schemes import SCHEMES

H100 = PLATFORMS["h100"]
AS_IT_IS = ("TRITON", "BATCHED_TRITON", "VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS", "DEEPGEMM", "BATCHED_DEEPGEMM")


def case(scheme: str, **fields: Any) -> Case:
    return replace(Case(tokens=3, experts=4, top_k=2, hidden=256, inter=128, scheme=scheme), **fields)


@pytest.mark.parametrize("name", [backend.name for backend in Fp8MoeBackend if backend is not Fp8MoeBackend.NONE])
@pytest.mark.parametrize("scheme", ["block", "tensor_static", "channel_tok"])
def test_a_conversion_leaves_the_checkpoint_alone(name: str, scheme: str) -> None:
    tensors = build(case(scheme), "cpu")
    if scheme == "channel_tok" and name.startswith("FLASHINFER"):
        with pytest.raises(ValueError, match=r"w13_scale of shape \(4, 256, 1\): FlashInfer has one scale per tensor"):
            convert_to_fp8_moe_kernel_format(
                Fp8MoeBackend[name], tensors.config, tensors.quant, tensors.weights, platform=H100
            )
        return
    before = {key: None if value is None else value.clone() for key, value in vars(tensors.weights).items()}
    found = convert_to_fp8_moe_kernel_format(
        Fp8MoeBackend[name], tensors.config, tensors.quant, tensors.weights, platform=H100
    )
    for key, value in vars(tensors.weights).items():
        was = before[key]
        assert (was is None) == (value is None), key
        assert was is None or torch.equal(was.view(torch.uint8), value.view(torch.uint8)), key
    assert (found is tensors.weights) == (name in AS_IT_IS)


def test_deepgemm_with_powers_of_two_is_quantised_anew() -> None:
    tensors = build(case("block"), "cpu")
    for backend in (Fp8MoeBackend.DEEPGEMM, Fp8MoeBackend.BATCHED_DEEPGEMM):
        found = convert_to_fp8_moe_kernel_format(
            backend, tensors.config, tensors.quant, tensors.weights, e8m0=True, platform=H100
        )
        assert found.w13_scale is not None
        assert (torch.frexp(found.w13_scale)[0] == 0.5).all()
        assert not torch.equal(found.w13.view(torch.uint8), tensors.weights.w13.view(torch.uint8))
    unscaled = replace(tensors, weights=MoEWeights(tensors.weights.w13, tensors.weights.w2))
    for given in (unscaled, build(case("tensor_dyn"), "cpu"), build(case("channel_tok"), "cpu")):
        with pytest.raises(ValueError, match="DEEPGEMM takes FP8 weights with block scales"):
            convert_to_fp8_moe_kernel_format(
                Fp8MoeBackend.DEEPGEMM, given.config, given.quant, given.weights, e8m0=True
            )


@pytest.mark.parametrize(("device", "dtype"), [("mi300x", torch.float8_e4m3fnuz), ("mi355x", torch.float8_e4m3fn)])
def test_aiter_has_the_devices_own_format(device: str, dtype: torch.dtype) -> None:
    tensors = build(case("channel_tok"), "cpu")
    found = convert_to_fp8_moe_kernel_format(
        Fp8MoeBackend.AITER, tensors.config, tensors.quant, tensors.weights, platform=PLATFORMS[device]
    )
    assert found.w13.dtype == dtype
    assert found.w13_scale is not None
    assert tensors.weights.w13_scale is not None
    assert torch.equal(found.w13_scale, tensors.weights.w13_scale * (2 if dtype == torch.float8_e4m3fnuz else 1))


def test_marlin_packs_by_the_activations_dtype() -> None:
    tensors = build(case("block"), "cpu")
    for dtype in (torch.float16, torch.bfloat16):
        config = replace(tensors.config, in_dtype=dtype)
        found = convert_to_fp8_moe_kernel_format(
            Fp8MoeBackend.MARLIN, config, tensors.quant, tensors.weights, platform=H100
        )
        assert found.w13_scale is not None
        assert (found.w13.dtype, found.w13_scale.dtype) == (torch.int32, dtype)
        assert found.w13.shape == (4, 256 // 16, 4 * 256)
        assert found.w13_scale.shape == (4, 2, 256)


@pytest.mark.parametrize("name", ["FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "MARLIN", "XPU", "DEEPGEMM"])
def test_codes_that_a_kernel_would_read_as_other_numbers_are_refused(name: str) -> None:
    tensors = build(case("block"), "cpu")
    w13, w2 = (codes.view(torch.float8_e4m3fnuz) for codes in (tensors.weights.w13, tensors.weights.w2))
    given = (tensors.config, tensors.quant, replace(tensors.weights, w13=w13, w2=w2))
    with pytest.raises(ValueError, match=f"w13 of dtype torch.float8_e4m3fnuz: {name}'s kernel .*torch.float8_e4m3fn"):
        convert_to_fp8_moe_kernel_format(Fp8MoeBackend[name], *given, e8m0=name == "DEEPGEMM", platform=H100)


@pytest.mark.parametrize("name", ["AITER", "FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "MARLIN", "XPU", "DEEPGEMM"])
def test_blocks_of_another_shape_are_refused(name: str) -> None:
    """A kernel would take a block's scale for rows of its neighbour."""
    tensors = build(case("block"), "cpu")
    quant = FusedMoEQuantConfig.make(torch.float8_e4m3fn, block_shape=(64, 128))
    with pytest.raises(ValueError, match=rf"quant.w1.shape=.*64.*: {name}'s layout has scales of 128 x 128 blocks"):
        convert_to_fp8_moe_kernel_format(
            Fp8MoeBackend[name], tensors.config, quant, tensors.weights, e8m0=name == "DEEPGEMM", platform=H100
        )


def test_none_has_no_kernel() -> None:
    tensors = build(case("block"), "cpu")
    with pytest.raises(ValueError, match="backend=NONE"):
        convert_to_fp8_moe_kernel_format(Fp8MoeBackend.NONE, tensors.config, tensors.quant, tensors.weights)
    with pytest.raises(ValueError, match="backend=NONE"):
        make_fp8_moe_kernel(Fp8MoeBackend.NONE, tensors.config, tensors.quant, tensors.weights)
    assert make_fp8_moe_quant_config(Fp8MoeBackend.NONE, tensors.quant) is tensors.quant  # quirk Q25


def test_quantisation_as_each_class_takes_it() -> None:
    static, dynamic = (FusedMoEQuantConfig.from_keys(*SCHEMES[name]) for name in ("tensor_static", "tensor_dyn"))
    block = FusedMoEQuantConfig.from_keys(*SCHEMES["block"])
    assert make_fp8_moe_quant_config(Fp8MoeBackend.FLASHINFER_TRTLLM, block) is None
    marlin = make_fp8_moe_quant_config(Fp8MoeBackend.MARLIN, block)
    assert marlin is not None
    assert marlin.use_fp8_w8a16
    assert marlin.block_shape == (128, 128)
    channel = make_fp8_moe_quant_config(Fp8MoeBackend.MARLIN, FusedMoEQuantConfig.from_keys(*SCHEMES["channel_tok"]))
    assert channel is not None
    assert not channel.per_out_ch_quant
    cutlass = Fp8MoeBackend.FLASHINFER_CUTLASS
    assert make_fp8_moe_quant_config(cutlass, block) is block
    assert make_fp8_moe_quant_config(cutlass, static) is static
    with pytest.raises(ValueError, match=r"quant.a1, quant.a2: dynamic"):
        make_fp8_moe_quant_config(cutlass, dynamic)
    for name in ("TRITON", "DEEPGEMM", "VLLM_CUTLASS", "AITER", "XPU"):
        assert make_fp8_moe_quant_config(Fp8MoeBackend[name], dynamic) is dynamic


def test_a_kernel_is_the_class_ready_to_be_called() -> None:
    tensors = build(case("block"), "cpu")
    made = make_fp8_moe_kernel(Fp8MoeBackend.TRITON, tensors.config, tensors.quant, tensors.weights, TorchExperts)
    assert isinstance(made, TorchExperts)
    assert tensors.call(made).shape == (3, 256)


def test_a_layer_that_is_filled_up_computes_the_same() -> None:
    """I = 20 filled up to 32, halves apart: what kernels do with zeros in between."""
    tensors = build(case("tensor_static", inter=20, hidden=128), "cpu")
    wide = halves.padded(tensors.weights, 32, gated=True)
    config = replace(tensors.config, intermediate_size_per_partition=32)
    expected = tensors.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))
    torch.testing.assert_close(tensors.call(TorchExperts(config, tensors.quant, wide)), expected, rtol=0, atol=0)
