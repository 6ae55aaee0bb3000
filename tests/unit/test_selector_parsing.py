"""How the selector reads its variables: spellings, errors, laziness (specification section 1.3)."""

from __future__ import annotations

import pytest

from conformance.selection.ask import (
    AITER,
    AITER_MOE,
    DEEP_GEMM,
    FLASHINFER,
    FLASHINFER_BACKEND,
    GFX942,
    MARLIN,
    MOE_DEEP_GEMM,
    PLATFORMS,
    SM89,
    SM90,
    explain,
    refusal,
    select,
)
from fp8moe import Platform


@pytest.mark.parametrize("text", ["1", "2", "-1", " 1 ", "+1", "01", "1_0", "\t1\n"])
def test_r3_any_int_but_zero_is_true(text: str) -> None:
    assert explain(SM90, {FLASHINFER: text}).rule == "R3c"
    assert select(SM90, {DEEP_GEMM: text}) == "DEEPGEMM"
    assert explain(SM90, {MOE_DEEP_GEMM: text}).rule == "R4b"


@pytest.mark.parametrize("text", ["0", "-0", "00", " 0 ", "+0", "0_0"])
def test_r3a_zero_excludes_and_goes_on(text: str) -> None:
    assert select(SM90, {FLASHINFER: text}) == "DEEPGEMM"
    assert select(SM90, {FLASHINFER: "0", DEEP_GEMM: text}) == "TRITON"
    assert select(SM90, {FLASHINFER: "0", MOE_DEEP_GEMM: text}) == "TRITON"


@pytest.mark.parametrize("name", [FLASHINFER, DEEP_GEMM, MOE_DEEP_GEMM])
@pytest.mark.parametrize("text", ["", " ", "true", "yes", "0x1", "1.0", "1__0", "_1", "1 0", "\N{SUPERSCRIPT TWO}"])
def test_q10_malformed_int_names_the_variable_and_its_text(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b") as caught:
        select(SM90, {name: text})
    assert repr(text) in str(caught.value)
    assert getattr(caught.value, "backend", None) is None


@pytest.mark.parametrize("text", ["", "Latency", " latency", "LATENCY", "cutlass", "masked-gemm"])
def test_r3b_malformed_choice_names_variable_text_and_options(text: str) -> None:
    with pytest.raises(ValueError, match=FLASHINFER_BACKEND) as caught:
        select(SM90, {FLASHINFER: "1", FLASHINFER_BACKEND: text})
    for part in (repr(text), "throughput", "latency", "masked_gemm"):
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["1", "true", "TRUE", " TRUE ", "\ttrue\n", " 1"])
def test_r5_marlin_strips_and_lowers(text: str) -> None:
    assert explain(SM89, {MARLIN: text}).rule == "R5"
    assert select(SM89, {MARLIN: text}) == "MARLIN"


@pytest.mark.parametrize("text", ["", "0", "2", "yes", "on", "01", "t rue", "False"])
def test_r5_anything_else_is_as_unset(text: str) -> None:
    assert select(SM89, {MARLIN: text}) == "TRITON"
    assert refusal(explain(SM89, {MARLIN: text}), "MARLIN") is None


@pytest.mark.parametrize("text", ["1", "true", "True", "TRUE"])
def test_r6_aiter_lowers(text: str) -> None:
    assert select(GFX942, {AITER: text}) == "AITER"
    assert select(GFX942, {AITER: "1", AITER_MOE: text}) == "AITER"


@pytest.mark.parametrize("text", ["", "0", " 1", "1 ", " true", "yes", "2"])
def test_r6_aiter_does_not_strip(text: str) -> None:
    assert select(GFX942, {AITER: text}) == "TRITON"
    assert refusal(explain(GFX942, {AITER: text}), "AITER") == "DISABLED_BY_ENV"
    assert select(GFX942, {AITER: "1", AITER_MOE: text}) == "TRITON"


def test_malformed_choice_is_unnoticed_unless_flashinfer_is_on() -> None:
    assert select(SM90, {FLASHINFER_BACKEND: "x"}) == "FLASHINFER_CUTLASS"
    assert select(SM90, {FLASHINFER_BACKEND: "x", FLASHINFER: "0"}) == "DEEPGEMM"
    with pytest.raises(ValueError, match=FLASHINFER_BACKEND):
        select(SM90, {FLASHINFER_BACKEND: "x", FLASHINFER: "1"})


def test_malformed_second_deep_gemm_is_unnoticed_where_the_first_is_off() -> None:
    assert select(SM90, {DEEP_GEMM: "0", MOE_DEEP_GEMM: "x"}) == "FLASHINFER_CUTLASS"
    assert select(SM90, {FLASHINFER: "1", MOE_DEEP_GEMM: "x"}) == "FLASHINFER_CUTLASS"
    assert select(SM90, {MOE_DEEP_GEMM: "x"}, lora=True) == "TRITON"
    for env in ({}, {DEEP_GEMM: "1"}):
        with pytest.raises(ValueError, match=MOE_DEEP_GEMM):
            select(SM90, env | {MOE_DEEP_GEMM: "x"})


@pytest.mark.parametrize("on", PLATFORMS.values(), ids=PLATFORMS)
def test_malformed_first_deep_gemm_is_unnoticed_only_after_flashinfer_or_lora(on: Platform) -> None:
    env = {DEEP_GEMM: "x", MOE_DEEP_GEMM: "0", MARLIN: "1", AITER: "1"}
    assert select(on, env, lora=True) == "TRITON"
    for choice in ({}, {FLASHINFER_BACKEND: "latency"}, {FLASHINFER_BACKEND: "throughput"}):
        selection = explain(on, env | {FLASHINFER: "1"} | choice)
        assert DEEP_GEMM not in str(selection.error)
        assert selection.rule in ("R3b", "R3c")
    with pytest.raises(ValueError, match=DEEP_GEMM):
        select(on, env)
    with pytest.raises(ValueError, match=DEEP_GEMM):
        select(on, env | {FLASHINFER: "0"})


def test_deep_gemm_is_parsed_in_order() -> None:
    with pytest.raises(ValueError, match=rf"(?<!MOE_){DEEP_GEMM}\b"):
        select(SM90, {DEEP_GEMM: "x", MOE_DEEP_GEMM: "y"})


def test_the_empty_text_counts_as_set() -> None:
    with pytest.raises(ValueError, match=FLASHINFER):
        select(SM90, {FLASHINFER: ""})
    assert refusal(explain(GFX942, {AITER_MOE: ""}), "AITER") == "DISABLED_BY_ENV"


@pytest.mark.parametrize("name", ["VLLM_BATCH_INVARIANT", "VLLM_USE_DEEP_GEMM_E8M0", "VLLM_ALL2ALL_BACKEND"])
def test_other_variables_are_not_read(name: str) -> None:
    for text in ("", "0", "1", "x", "pplx"):
        assert select(SM90, {name: text}) == "FLASHINFER_CUTLASS"
