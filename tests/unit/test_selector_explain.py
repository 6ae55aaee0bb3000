"""What `explain` says, and what each call reads."""

from __future__ import annotations

import os

import pytest
import torch

from conformance.selection.ask import (
    AITER_MOE,
    DEEP_GEMM,
    ELEVEN,
    FLASHINFER,
    FLASHINFER_BACKEND,
    MOE_DEEP_GEMM,
    PLATFORMS,
    SM90,
    SM100,
    explain,
    refusal,
    select,
    verdict,
)
from conformance.selection.axes import SCHEMES
from conformance.selection.build import make_config
from fp8moe import (
    Fp8MoeBackend,
    GroupShape,
    Platform,
    QuantKey,
    Reason,
    RoutingMethodType,
    ScaleDesc,
    explain_fp8_moe_backend,
    select_fp8_moe_backend,
)


@pytest.mark.parametrize(
    "env",
    [{FLASHINFER: "x"}, {FLASHINFER: "1", FLASHINFER_BACKEND: "x"}, {DEEP_GEMM: "x"}, {MOE_DEEP_GEMM: "x"}],
    ids=str,
)
@pytest.mark.parametrize("on", PLATFORMS.values(), ids=PLATFORMS)
def test_explain_never_raises_for_a_malformed_variable(on: Platform, env: dict[str, str]) -> None:
    selection = explain(on, env)
    with pytest.raises(ValueError, match="VLLM_") as caught:
        select(on, env)
    assert type(selection.error) is type(caught.value)
    assert str(selection.error) == str(caught.value)
    assert (selection.backend, selection.experts_cls) == (None, None)
    assert len(selection.verdicts) == len(ELEVEN)


def test_verdicts_that_need_a_malformed_variable_say_so() -> None:
    selection = explain(SM90, {DEEP_GEMM: "maybe"})
    for backend in ("DEEPGEMM", "BATCHED_DEEPGEMM"):
        assert not verdict(selection, backend).supported
        assert DEEP_GEMM in verdict(selection, backend).detail
        assert "'maybe'" in verdict(selection, backend).detail
    assert verdict(selection, "FLASHINFER_CUTLASS").supported


@pytest.mark.parametrize("on", PLATFORMS.values(), ids=PLATFORMS)
def test_explain_never_raises_where_nothing_fits(on: Platform) -> None:
    selection = explain(on, {FLASHINFER: "1"}, "none_128")
    assert isinstance(selection.error, NotImplementedError)
    assert [v.backend.value for v in selection.verdicts if v.consulted] == ["FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS"]


def test_verdicts_beyond_the_choice_are_evaluated_and_not_consulted() -> None:
    selection = explain(SM90)
    names = [v.backend.value for v in selection.verdicts]
    assert names == [spec.name for spec in ELEVEN]
    chosen = names.index("FLASHINFER_CUTLASS")
    removed = ("VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS")
    for position, shown in enumerate(selection.verdicts):
        assert shown.consulted == (position <= chosen or shown.backend.value in removed)
        assert shown.supported == (shown.reason is None)
    assert verdict(selection, "TRITON").supported
    assert refusal(selection, "BATCHED_TRITON") == "FORMAT"


def test_a_removal_before_a_must_use_is_told_and_one_after_it_is_not() -> None:
    selection = explain(SM90, {FLASHINFER: "0", DEEP_GEMM: "1", AITER_MOE: "0"})
    assert selection.backend is Fp8MoeBackend.DEEPGEMM
    assert refusal(selection, "FLASHINFER_CUTLASS") == "DISABLED_BY_ENV"
    assert verdict(selection, "FLASHINFER_CUTLASS").consulted
    assert refusal(selection, "VLLM_CUTLASS") == "SCHEME"
    assert refusal(selection, "AITER") == "DEVICE"
    assert not verdict(selection, "VLLM_CUTLASS").consulted


def test_env_none_is_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)
    arguments = (make_config(), *SCHEMES["block"])
    assert select_fp8_moe_backend(*arguments, platform=SM90)[0] is Fp8MoeBackend.FLASHINFER_CUTLASS
    monkeypatch.setenv(FLASHINFER, "0")
    assert select_fp8_moe_backend(*arguments, platform=SM90)[0] is Fp8MoeBackend.DEEPGEMM
    monkeypatch.setenv(DEEP_GEMM, "0")
    assert select_fp8_moe_backend(*arguments, platform=SM90)[0] is Fp8MoeBackend.TRITON
    monkeypatch.delenv(FLASHINFER)
    assert select_fp8_moe_backend(*arguments, platform=SM90)[0] is Fp8MoeBackend.FLASHINFER_CUTLASS
    assert select_fp8_moe_backend(*arguments, platform=SM90, env={})[0] is Fp8MoeBackend.FLASHINFER_CUTLASS


def test_platform_none_is_the_detected_device(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (make_config(), *SCHEMES["block"])
    expected = explain_fp8_moe_backend(*arguments, platform=Platform.detect(), env={})
    assert explain_fp8_moe_backend(*arguments, env={}).rule == expected.rule
    assert explain_fp8_moe_backend(*arguments, env={}).backend == expected.backend


def test_a_mutable_environment_is_read_at_every_call() -> None:
    env: dict[str, str] = {}
    assert select(SM90, env) == "FLASHINFER_CUTLASS"
    env[FLASHINFER] = "0"
    assert select(SM90, env) == "DEEPGEMM"


def test_logits_dtype_left_out_is_the_inputs() -> None:
    renormalize = {"routing": RoutingMethodType.Renormalize, "logits_dtype": None}
    assert select(SM100, **renormalize) == "FLASHINFER_TRTLLM"
    selection = explain(SM100, in_dtype=torch.float32, **renormalize)
    assert refusal(selection, "FLASHINFER_TRTLLM") == "LOGITS_DTYPE"


def test_equal_keys_built_elsewhere_match() -> None:
    block = QuantKey(torch.float8_e4m3fn, ScaleDesc(torch.float32, True, GroupShape(128, 128)))
    groups = QuantKey(torch.float8_e4m3fn, ScaleDesc(torch.float32, False, GroupShape(1, 128)))
    assert select_fp8_moe_backend(make_config(), block, groups, platform=SM100, env={})[0].value == "FLASHINFER_TRTLLM"
    fnuz = QuantKey(torch.float8_e4m3fnuz, ScaleDesc(torch.float32, True, GroupShape(128, 128)))
    with pytest.raises(ValueError, match="SCHEME") as caught:
        select_fp8_moe_backend(make_config(), fnuz, groups, platform=SM90, env={DEEP_GEMM: "1"})
    assert caught.value.reason is Reason.SCHEME
