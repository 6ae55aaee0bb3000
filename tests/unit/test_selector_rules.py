"""The selector's rules R1 to R9, one by one (specification section 1.1)."""

from __future__ import annotations

import pytest

from conformance.selection.ask import (
    AITER,
    CPU,
    DEEP_GEMM,
    ELEVEN,
    FLASHINFER,
    FLASHINFER_BACKEND,
    GFX942,
    GFX1100,
    LIBRARIES,
    MARLIN,
    PLATFORMS,
    SM89,
    SM90,
    SM100,
    XPU,
    call,
    explain,
    refusal,
    select,
    verdict,
    without,
)
from conformance.selection.build import BATCHED, make_config, make_parallel
from fp8moe import PLATFORMS as CATALOGUE
from fp8moe import Fp8MoeBackend, Platform, Reason, explain_fp8_moe_backend, select_fp8_moe_backend
from fp8moe.quant import kFp8Dynamic128Sym, kFp8Static128BlockSym


@pytest.mark.parametrize("on", PLATFORMS.values(), ids=PLATFORMS)
@pytest.mark.parametrize("scheme", ["block", "none", "nvfp4", "none_128"])
def test_r1_lora_is_triton_everywhere_q13(on: Platform, scheme: str) -> None:
    env = {FLASHINFER: "not an int", DEEP_GEMM: "", AITER: "1", MARLIN: "1"}
    assert select(on, env, scheme, lora=True) == "TRITON"
    assert select(on, env, scheme, lora=True, parallel=BATCHED) == "TRITON"
    assert select(on, env, scheme, lora=True, backends=without("TRITON")) == "TRITON"


def test_r1_verdicts_are_there_and_none_was_consulted() -> None:
    selection = explain(CPU, {DEEP_GEMM: "1"}, lora=True)
    assert (selection.rule, selection.backend, selection.error) == ("R1", Fp8MoeBackend.TRITON, None)
    assert [v.backend for v in selection.verdicts] == [spec.backend for spec in ELEVEN]
    assert not any(v.consulted for v in selection.verdicts)
    assert verdict(selection, "TRITON").supported
    assert refusal(selection, "MARLIN") == "DEVICE"


def test_r1_comes_with_tritons_class() -> None:
    expected = next(spec.experts_cls for spec in ELEVEN if spec.name == "TRITON")
    assert select_fp8_moe_backend(make_config(lora=True), None, None, platform=CPU, env={})[1] is expected


@pytest.mark.parametrize("on", PLATFORMS.values(), ids=PLATFORMS)
def test_r3b_masked_gemm_has_no_fp8_anywhere(on: Platform) -> None:
    env = {FLASHINFER: "1", FLASHINFER_BACKEND: "masked_gemm"}
    with pytest.raises(ValueError, match="FP8") as caught:
        select(on, env)
    text = str(caught.value)
    assert "maskedgemm" in text.lower().replace(" ", "")
    assert not any(spec.name in text for spec in ELEVEN)
    assert getattr(caught.value, "backend", None) is None
    selection = explain(on, env)
    assert selection.rule == "R3b"
    assert not any(v.consulted for v in selection.verdicts)


def test_r3b_returns_trtllm_without_a_class() -> None:
    answer = select_fp8_moe_backend(
        make_config(),
        kFp8Static128BlockSym,
        kFp8Dynamic128Sym,
        platform=SM100,
        env={FLASHINFER: "1", FLASHINFER_BACKEND: "latency"},
    )
    assert answer == (Fp8MoeBackend.FLASHINFER_TRTLLM, None)


def test_r3b_latency_off_sm10x_demands_cutlass() -> None:
    assert select(SM90, {FLASHINFER: "1", FLASHINFER_BACKEND: "latency"}) == "FLASHINFER_CUTLASS"


def test_r3b_family_test_does_not_ask_for_cuda() -> None:
    rdna2 = Platform("rocm", capability=(10, 3), gcn_arch="gfx1030", libraries=LIBRARIES)
    with pytest.raises(ValueError, match="FLASHINFER_TRTLLM") as caught:
        select(rdna2, {FLASHINFER: "1", FLASHINFER_BACKEND: "latency"})
    assert (caught.value.backend, caught.value.reason) == (Fp8MoeBackend.FLASHINFER_TRTLLM, Reason.DEVICE)


@pytest.mark.parametrize("on", [SM89, GFX942, CPU, XPU], ids=str)
def test_r3c_never_continues_and_lists_both_reasons_q7_q24(on: Platform) -> None:
    with pytest.raises(NotImplementedError, match=f"{FLASHINFER}=1") as caught:
        select(on, {FLASHINFER: "1"})
    for part in ("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "DEVICE"):
        assert part in str(caught.value)
    assert "MARLIN" not in str(caught.value)


def test_r3c_lists_two_different_reasons() -> None:
    with pytest.raises(NotImplementedError) as caught:
        select(SM100, {FLASHINFER: "1"}, "tensor_dyn", activation="gelu")
    assert str(caught.value).count("ACTIVATION") == 2
    with pytest.raises(NotImplementedError) as caught:
        select(SM100, {FLASHINFER: "1"}, "block", parallel=make_parallel(eplb=True))
    assert "PARALLEL" in str(caught.value)
    assert "SCHEME" in str(caught.value)


def test_r3c_tries_trtllm_first() -> None:
    assert select(SM100, {FLASHINFER: "1"}) == "FLASHINFER_TRTLLM"
    assert select(SM100, {FLASHINFER: "1"}, "none") == "FLASHINFER_CUTLASS"


def test_r4b_batched_format_demands_batched_deepgemm() -> None:
    assert select(SM90, {DEEP_GEMM: "1"}, parallel=BATCHED) == "BATCHED_DEEPGEMM"
    with pytest.raises(ValueError, match="BATCHED_DEEPGEMM") as caught:
        select(SM89, {DEEP_GEMM: "1"}, parallel=BATCHED)
    assert (caught.value.backend, caught.value.reason) == (Fp8MoeBackend.BATCHED_DEEPGEMM, Reason.DEVICE)


MUST_USE = {
    "FLASHINFER_TRTLLM": ({FLASHINFER: "1", FLASHINFER_BACKEND: "latency"}, SM100, "tensor_dyn", "SCHEME", "R3b"),
    "FLASHINFER_CUTLASS": ({FLASHINFER: "1", FLASHINFER_BACKEND: "throughput"}, SM90, "nvfp4", "SCHEME", "R3b"),
    "DEEPGEMM": ({DEEP_GEMM: "1"}, SM90, "channel_tok", "SCHEME", "R4b"),
    "MARLIN": ({MARLIN: "1"}, SM89, "none", "SCHEME", "R5"),
    "AITER": ({AITER: "1"}, GFX942, "tensor_tok", "SCHEME", "R6b"),
}


@pytest.mark.parametrize("backend", MUST_USE)
def test_failed_must_use_carries_backend_and_reason(backend: str) -> None:
    env, on, scheme, reason, rule = MUST_USE[backend]
    with pytest.raises(ValueError, match=backend) as caught:
        select(on, env, scheme)
    assert (caught.value.backend, caught.value.reason) == (Fp8MoeBackend[backend], Reason[reason])
    selection = explain(on, env, scheme)
    assert (selection.rule, selection.backend, selection.experts_cls) == (rule, None, None)
    assert type(selection.error) is type(caught.value)
    assert str(selection.error) == str(caught.value)
    assert [v.backend.value for v in selection.verdicts if v.consulted] == [backend]


@pytest.mark.parametrize("backend", MUST_USE)
def test_must_use_that_is_no_candidate_fails_with_not_allowed(backend: str) -> None:
    env, on, _, _, rule = MUST_USE[backend]
    with pytest.raises(ValueError, match=backend) as caught:
        select(on, env, backends=without(backend))
    assert (caught.value.backend, caught.value.reason) == (Fp8MoeBackend[backend], Reason.NOT_ALLOWED)
    selection = explain(on, env, backends=without(backend))
    assert selection.rule == rule
    assert [v.backend for v in selection.verdicts] == [spec.backend for spec in without(backend)]


def test_r3c_without_its_candidates_fails() -> None:
    assert select(SM100, {FLASHINFER: "1"}, "none", backends=without("FLASHINFER_TRTLLM")) == "FLASHINFER_CUTLASS"
    with pytest.raises(NotImplementedError, match="NOT_ALLOWED"):
        select(SM100, {FLASHINFER: "1"}, backends=without("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS"))


def test_precedence_in_one_line() -> None:
    ladder = [{AITER: "1"}, {MARLIN: "1"}, {DEEP_GEMM: "1"}, {FLASHINFER: "1"}]
    env: dict[str, str] = {}
    rules = [explain(SM90, env).rule]
    for step in ladder:
        env = env | step
        rules.append(explain(SM90, env).rule)
    rules.append(explain(SM90, env, lora=True).rule)
    assert rules == ["R8", "R6b", "R5", "R4b", "R3c", "R1"]


def test_r7_removes_both_cutlass_and_no_variable_readmits_them() -> None:
    off = {FLASHINFER: "0", DEEP_GEMM: "0"}
    assert select(SM90, off, "tensor_dyn", allow=True) == "VLLM_CUTLASS"
    assert select(SM90, off, "tensor_dyn", allow=True, parallel=BATCHED) == "BATCHED_VLLM_CUTLASS"
    selection = explain(SM90, off, "tensor_dyn")
    assert (selection.backend, refusal(selection, "VLLM_CUTLASS")) == (Fp8MoeBackend.TRITON, "NOT_ALLOWED")
    assert refusal(selection, "BATCHED_VLLM_CUTLASS") == "NOT_ALLOWED"
    assert verdict(selection, "BATCHED_VLLM_CUTLASS").consulted


@pytest.mark.parametrize(("on", "scheme"), [(GFX1100, "block"), (GFX942, "tensor_128"), (SM89, "none_128")], ids=str)
def test_r9_raises_on_cuda_and_rocm_and_lists_every_reason_q24(on: Platform, scheme: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        select(on, {FLASHINFER: "0"}, scheme)
    for shown in explain(on, {FLASHINFER: "0"}, scheme).verdicts:
        assert shown.backend.value in str(caught.value)
        assert shown.reason is not None
        assert shown.reason.name in str(caught.value)


@pytest.mark.parametrize("on", [CPU, XPU, Platform("tpu"), Platform("npu"), Platform("unspecified")], ids=str)
def test_r9_returns_none_elsewhere(on: Platform) -> None:
    arguments, keywords = call(on, {}, "block", {})
    assert select_fp8_moe_backend(*arguments, **keywords) == (Fp8MoeBackend.NONE, None)
    selection = explain_fp8_moe_backend(*arguments, **keywords)
    assert (selection.rule, selection.backend, selection.experts_cls) == ("R9", Fp8MoeBackend.NONE, None)
    assert selection.error is None
    assert all(v.consulted for v in selection.verdicts)


def test_no_candidates_at_all_is_r9() -> None:
    assert select(CPU, backends=[]) == "NONE"
    with pytest.raises(NotImplementedError):
        select(SM90, backends=[])
    assert explain(SM90, backends=[]).verdicts == ()


def test_a_given_sequence_is_the_order() -> None:
    backwards = list(reversed(ELEVEN))
    assert select(SM90, backends=backwards) == "MARLIN"
    assert [v.backend for v in explain(SM90, backends=backwards).verdicts] == [spec.backend for spec in backwards]


def test_compiled_cutlass_needs_its_operators_and_a_new_enough_toolkit() -> None:
    off = {FLASHINFER: "0"}
    for capability, build, libraries, expected in (
        ((9, 0), (12, 3), {"vllm"}, "VLLM_CUTLASS"),
        ((9, 0), (12, 2), {"vllm"}, "TRITON"),
        ((9, 0), None, {"vllm"}, "TRITON"),
        ((9, 0), (12, 9), set(), "TRITON"),
        ((10, 0), (12, 8), {"vllm"}, "VLLM_CUTLASS"),
        ((10, 0), (12, 7), {"vllm"}, "TRITON"),
        ((11, 0), (13, 0), {"vllm"}, "TRITON"),
        (None, (12, 9), {"vllm"}, "NotImplementedError"),
    ):
        on = Platform("cuda", capability=capability, cuda_version=build, libraries=frozenset(libraries))
        selection = explain(on, off, "tensor_dyn", allow=True)
        got = type(selection.error).__name__ if selection.error else selection.backend.value
        assert got.startswith(expected) or isinstance(selection.error, NotImplementedError), (capability, build)
        if expected != "NotImplementedError":
            assert got == expected


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_platform_of_the_catalogue_has_an_answer(name: str) -> None:
    on = CATALOGUE[name]
    selection = explain(on)
    fits_nothing = on.kind in ("cuda", "rocm") and selection.backend is None
    assert isinstance(selection.error, NotImplementedError) if fits_nothing else selection.error is None
