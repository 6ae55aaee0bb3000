"""The selector's quirks that users and other tools rely on, by their ids (specification section 6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.selection.ask import (
    AITER,
    AITER_MOE,
    CPU,
    DEEP_GEMM,
    ELEVEN,
    FLASHINFER,
    FLASHINFER_BACKEND,
    GFX942,
    LIBRARIES,
    MARLIN,
    MOE_DEEP_GEMM,
    SM89,
    SM90,
    SM100,
    XPU,
    explain,
    refusal,
    select,
    verdict,
    without,
)
from conformance.selection.axes import SCHEMES
from conformance.selection.build import BATCHED, make_config, make_parallel
from fp8moe import (
    Fp8MoeBackend,
    FusedMoEActivationFormat,
    GroupShape,
    Platform,
    QuantKey,
    Reason,
    RoutingMethodType,
    ScaleDesc,
    select_fp8_moe_backend,
)
from fp8moe.quant import kFp8Dynamic128Sym


@pytest.mark.parametrize("name", ["VLLM_CUTLASS", "FLASHINFER_TRTLLM", "DEEPGEMM", "BATCHED_DEEPGEMM", "AITER"])
def test_q1_removing_what_is_not_there_never_fails(name: str) -> None:
    env = {FLASHINFER: "0", DEEP_GEMM: "0", AITER: "0"}
    assert select(SM90, env, backends=without(name)) == "TRITON"


def test_q2_writing_a_default_changes_the_choice() -> None:
    assert select(SM90) == "FLASHINFER_CUTLASS"
    assert select(SM90, {DEEP_GEMM: "1"}) == "DEEPGEMM"
    assert select(SM90, {FLASHINFER: "0"}) == "DEEPGEMM"


def test_q3_the_general_deep_gemm_switch_refuses_every_other_scheme() -> None:
    for scheme in SCHEMES.keys() - {"block"}:
        with pytest.raises(ValueError, match="DEEPGEMM") as caught:
            select(SM90, {DEEP_GEMM: "1"}, scheme)
        assert caught.value.reason is Reason.SCHEME


@pytest.mark.parametrize("on", [SM90, CPU], ids=str)
def test_q4_aiter_on_other_platforms_raises(on: Platform) -> None:
    with pytest.raises(ValueError, match="AITER") as caught:
        select(on, {AITER: "1"})
    assert (caught.value.backend, caught.value.reason) == (Fp8MoeBackend.AITER, Reason.DEVICE)


def test_q5_aiter_never_wins_the_scan() -> None:
    selection = explain(GFX942)
    assert (selection.rule, selection.backend) == ("R8", Fp8MoeBackend.TRITON)
    assert refusal(selection, "AITER") == "DEVICE"


def test_q6_aiter_moe_alone_removes_aiter() -> None:
    assert refusal(explain(GFX942, {AITER_MOE: "1"}), "AITER") == "DISABLED_BY_ENV"


def test_q7_latency_elsewhere_names_cutlass() -> None:
    for on in (GFX942, CPU, XPU):
        with pytest.raises(ValueError, match="FLASHINFER_CUTLASS"):
            select(on, {FLASHINFER: "1", FLASHINFER_BACKEND: "latency"})


def test_q8_flashinfer_outranks_all_other_demands() -> None:
    assert select(SM90, {FLASHINFER: "1", DEEP_GEMM: "1", MARLIN: "1", AITER: "1"}) == "FLASHINFER_CUTLASS"


def test_q9_marlin_loses_to_deep_gemm_and_beats_aiter() -> None:
    assert select(SM90, {MARLIN: "1", DEEP_GEMM: "1"}) == "DEEPGEMM"
    assert select(SM90, {MARLIN: "1", AITER: "1"}) == "MARLIN"


def test_q11_the_choices_default_is_never_used() -> None:
    # `latency`, the default, would demand TRTLLM on SM100; left out, both are tried.
    env = {FLASHINFER: "1"}
    assert select(SM100, env, "none") == "FLASHINFER_CUTLASS"
    with pytest.raises(ValueError, match="FLASHINFER_TRTLLM"):
        select(SM100, env | {FLASHINFER_BACKEND: "latency"}, "none")


def test_q12_trtllm_needs_no_flashinfer() -> None:
    bare = Platform("cuda", capability=(10, 0), cuda_version=(12, 9))
    assert select(bare) == "FLASHINFER_TRTLLM"


def test_q14_keys_need_not_be_fp8() -> None:
    assert select(SM90, scheme="none") == "FLASHINFER_CUTLASS"
    assert select(XPU, scheme="none") == "XPU"
    assert select(SM100, scheme="nvfp4") == "FLASHINFER_CUTLASS"
    assert select(SM90, scheme="nvfp4") == "MARLIN"


@pytest.mark.parametrize("scheme", ["tensor_none", "tensor_128", "block_nvfp4", "block_64", "channel_dyn"])
def test_q15_marlin_ignores_the_activation_key(scheme: str) -> None:
    assert select(SM89, scheme=scheme) == "MARLIN"
    with pytest.raises(NotImplementedError):
        select(GFX942, scheme=scheme)


def test_q16_trtllm_orders_its_reasons_otherwise() -> None:
    wrong = {"routing": RoutingMethodType.Default, "logits_dtype": torch.float32, "parallel": BATCHED}
    eplb = make_parallel(dp=2, ep=2, use_ep=True, exchange="pplx", eplb=True)
    env = {MARLIN: "1"}  # ends before the scan, so that the predicate speaks

    def reason(**config: Any) -> str | None:
        return refusal(explain(SM100, env, **config), "FLASHINFER_TRTLLM")

    assert reason(**wrong | {"parallel": eplb}) == "PARALLEL"
    assert reason(**wrong) == "ROUTING"
    assert reason(**wrong | {"routing": RoutingMethodType.Renormalize}) == "FORMAT"
    fits = {"parallel": make_parallel(), "routing": RoutingMethodType.Renormalize}
    assert reason(**wrong | fits) == "LOGITS_DTYPE"
    assert reason(**wrong | {"parallel": make_parallel(), "routing": RoutingMethodType.DeepSeekV3}) is None


def test_q16_format_reasons_name_the_format() -> None:
    assert "batched_experts" in verdict(explain(SM89, parallel=BATCHED), "TRITON").detail
    assert "standard" in verdict(explain(SM89), "BATCHED_TRITON").detail
    assert FusedMoEActivationFormat.Standard.value == ("standard",)


def test_q17_device_hides_all_else_and_format_is_last() -> None:
    everything_wrong = {"activation": "relu", "gated": False, "parallel": BATCHED}
    assert refusal(explain(CPU, {}, "none_128", **everything_wrong), "TRITON") == "DEVICE"
    assert refusal(explain(SM89, {}, "none_128", **everything_wrong), "TRITON") == "GATING"
    assert refusal(explain(SM89, {}, "none_128", activation="relu", parallel=BATCHED), "TRITON") == "ACTIVATION"
    assert refusal(explain(SM89, {}, "none_128", parallel=BATCHED), "TRITON") == "SCHEME"
    assert refusal(explain(SM89, {}, "block", parallel=BATCHED), "TRITON") == "FORMAT"


def test_q18_the_class_needs_only_the_general_variable() -> None:
    # R3c ends before R4, so that the predicate speaks.
    env = {FLASHINFER: "1"}
    assert refusal(explain(SM90, env | {MOE_DEEP_GEMM: "0"}), "DEEPGEMM") is None
    assert refusal(explain(SM90, env | {DEEP_GEMM: "0"}), "DEEPGEMM") == "DEVICE"


def test_q19_batched_triton_lists_activations_that_only_an_odd_pair_reaches() -> None:
    off = {FLASHINFER: "0"}
    for activation in ("silu_no_mul", "gelu_no_mul", "relu2_no_mul"):
        assert select(SM89, off, activation=activation, parallel=BATCHED) == "BATCHED_TRITON"
        selection = explain(SM89, off, activation=activation, gated=False, parallel=BATCHED)
        assert refusal(selection, "BATCHED_TRITON") == "GATING"


def test_q20_flashinfer_cutlass_takes_silu_without_gating() -> None:
    assert select(SM90, gated=False) == "FLASHINFER_CUTLASS"


def test_q21_batched_fp8_below_sm89_has_nothing() -> None:
    sm80 = Platform("cuda", capability=(8, 0), cuda_version=(12, 9), libraries=LIBRARIES)
    with pytest.raises(NotImplementedError):
        select(sm80, parallel=BATCHED)
    assert select(XPU, parallel=BATCHED, scheme="tensor_dyn") == "NONE"
    assert select(CPU, parallel=BATCHED) == "NONE"


def test_q22_gfx90a_counts_as_fp8_hardware() -> None:
    gfx90a = Platform("rocm", capability=(9, 0), gcn_arch="gfx90a:sramecc+:xnack-")
    assert select(gfx90a) == "TRITON"
    with pytest.raises(NotImplementedError):
        select(Platform("rocm", capability=(9, 0), gcn_arch="gfx908"))


def test_q28_data_parallel_without_ep_is_no_exchange() -> None:
    without_ep = make_parallel(tp=4, dp=2, exchange="deepep_low_latency")
    assert select(SM89, parallel=without_ep) == "TRITON"
    high_throughput = make_parallel(tp=4, dp=2, exchange="deepep_high_throughput")
    off = {FLASHINFER: "0"}
    assert select(SM90, off, "tensor_dyn", allow=True, parallel=high_throughput) == "VLLM_CUTLASS"
    exchanging = make_parallel(dp=2, ep=2, use_ep=True, exchange="deepep_high_throughput")
    assert refusal(explain(SM90, off, "tensor_dyn", allow=True, parallel=exchanging), "VLLM_CUTLASS") == "PARALLEL"


def test_q29_aiters_predicate_gives_a_bool() -> None:
    experts_cls = next(spec.experts_cls for spec in ELEVEN if spec.name == "AITER")
    standard = FusedMoEActivationFormat.Standard
    arguments = (experts_cls, make_config(), *SCHEMES["block"], standard)
    assert experts_cls.is_supported_config(*arguments, platform=CPU, env={AITER: "1"}) == (False, Reason.DEVICE)
    assert experts_cls.is_supported_config(*arguments, platform=GFX942, env={AITER: "1"}) == (True, None)


def test_q30_block_keys_say_nothing_of_the_checkpoints_block() -> None:
    finer = QuantKey(torch.float8_e4m3fn, ScaleDesc(torch.float32, True, GroupShape(64, 128)))
    with pytest.raises(ValueError, match="DEEPGEMM"):
        select_fp8_moe_backend(make_config(), finer, kFp8Dynamic128Sym, platform=SM90, env={DEEP_GEMM: "1"})
