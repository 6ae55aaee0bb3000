"""The measured policy case by case: what it picks, why it does not, what it says and what it asks."""

from __future__ import annotations

import math
from typing import Any

import pytest

from conformance.selection.ask import ELEVEN, SM90
from conformance.selection.build import make_config
from fp8moe import PLATFORMS, BackendSpec, Fp8MoeBackend, Reason, select_fp8_moe_backend
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.counted import counted
from fp8moe.log_once import reset_log_deduplication
from fp8moe.measured import (
    Certificate,
    Fallback,
    LayerShape,
    MeasuredSelection,
    MeasuredTable,
    explain_measured,
    select_measured,
)
from fp8moe.schemes import BLOCK, SCHEMES
from tests.unit.measured_tables import (
    DEVICES,
    LAYER,
    PASSED,
    WITHOUT_FLASHINFER,
    carried_over,
    log_time,
    rows_of,
    table_of,
)

NAMES = tuple(spec.name for spec in ELEVEN)


def ask(table: MeasuredTable, tokens: int, **keywords: Any) -> MeasuredSelection:
    return explain_measured(
        make_config(), *BLOCK, tokens=tokens, table=table, **{"platform": WITHOUT_FLASHINFER, "env": {}} | keywords
    )


TIMES = {"TRITON": {1: 10.0, 100: 1000.0}, "MARLIN": {1: 8.0, 100: 4000.0}, "DEEPGEMM": {10: 200.0, 1000: 300.0}}


@pytest.mark.parametrize(
    ("tokens", "backend", "words"),
    [
        (1, "MARLIN", "8 us, measured at 1 token"),
        # the geometric mean of 10 and 1000, at the geometric mean of 1 and 100
        (10, "TRITON", "100 us, on the line from 1 (10 us) to 100 (1000 us) tokens, log time over log tokens"),
        (100, "DEEPGEMM", "244.9 us, on the line from 10 (200 us) to 1000 (300 us) tokens"),
        (1000, "DEEPGEMM", "300 us, measured at 1,000 tokens"),
    ],
)
def test_between_measured_tokens_log_time_is_linear_in_log_tokens(tokens: int, backend: str, words: str) -> None:
    answer = ask(table_of(rows_of(LAYER, TIMES)), tokens)
    assert answer.backend is Fp8MoeBackend[backend]
    (time,) = [time for time in answer.times if time.backend is answer.backend]
    assert words in time.detail
    log_us = log_time(TIMES[backend], tokens)
    assert log_us is not None
    assert time.us == TIMES[backend].get(tokens, math.exp(log_us))
    assert f"{backend} is the fastest at {counted(tokens, 'token')}" in answer.why
    assert [verdict.consulted for verdict in answer.verdicts] == [True] * len(NAMES)


def test_a_tie_goes_to_the_seeds_order() -> None:
    same = {name: {1: 5.0} for name in ("MARLIN", "TRITON", "DEEPGEMM")}
    assert ask(table_of(rows_of(LAYER, same)), 1).backend is Fp8MoeBackend.DEEPGEMM
    without = table_of(rows_of(LAYER, same), ("MARLIN", "TRITON"))
    assert ask(without, 1).backend is Fp8MoeBackend.TRITON


@pytest.mark.parametrize(
    ("table", "tokens", "keywords", "fallback", "words"),
    [
        (table_of([]), 1, {}, Fallback.SHAPE, "E=64 k=4 H=2048 I=1024 block silu standard"),
        (table_of(rows_of(LAYER, {"AITER": {1: 1.0}}), NAMES), 1, {}, Fallback.SHAPE, "no accepted candidate"),
        (table_of(rows_of(LAYER, TIMES)), 1001, {}, Fallback.TOKENS, "DEEPGEMM 10 to 1000, TRITON 1 to 100"),
        (table_of(rows_of(LAYER, TIMES), ()), 10, {}, Fallback.CERTIFICATE, "none is certified"),
        (
            table_of(rows_of(LAYER, TIMES)),
            10,
            {"device": "H200"},
            Fallback.DEVICE,
            "this is H200, the table is of H100",
        ),
        (table_of(rows_of(LAYER, TIMES)), 10, {"platform": PLATFORMS["b200"]}, Fallback.DEVICE, "this is cuda sm100"),
        (
            table_of(rows_of(LAYER, TIMES)),
            10,
            {"env": {"VLLM_TEST_FORCE_FP8_MARLIN": "1"}},
            Fallback.RULE,
            "rule R5 decides before the scan",
        ),
        (table_of(rows_of(LAYER, TIMES)), 10, {"platform": PLATFORMS["cpu"]}, Fallback.RULE, "nothing to choose from"),
    ],
    ids=["shape", "refused", "tokens", "certificate", "device", "architecture", "rule", "nothing"],
)
def test_why_the_seeds_order_decides(
    table: MeasuredTable, tokens: int, keywords: dict[str, Any], fallback: Fallback, words: str
) -> None:
    answer = ask(table, tokens, **keywords)
    assert answer.fallback is fallback
    assert words in answer.why


@pytest.mark.parametrize(
    ("name", "scheme", "keywords", "reason"),
    [
        ("FLASHINFER_CUTLASS", "block", {"env": {"VLLM_USE_FLASHINFER_MOE_FP8": "0"}}, Reason.DISABLED_BY_ENV),
        ("DEEPGEMM", "block", {"env": {"VLLM_USE_DEEP_GEMM": "0"}}, Reason.DISABLED_BY_ENV),
        ("DEEPGEMM", "block", {"env": {"VLLM_MOE_USE_DEEP_GEMM": "0"}}, Reason.DISABLED_BY_ENV),
        ("VLLM_CUTLASS", "channel_tok", {}, Reason.NOT_ALLOWED),
        ("BATCHED_TRITON", "block", {}, Reason.FORMAT),
        ("XPU", "block", {}, Reason.DEVICE),
        ("DEEPGEMM", "channel_tok", {}, Reason.SCHEME),
    ],
)
def test_what_is_refused_is_never_picked_however_fast(
    name: str, scheme: str, keywords: dict[str, Any], reason: Reason
) -> None:
    shape = LayerShape(64, 4, 2048, 1024, scheme)
    table = table_of(rows_of(shape, {name: {1: 1.0}, "TRITON": {1: 100.0}}), NAMES)
    question = {"tokens": 1, "table": table, "platform": PLATFORMS["h100"], "env": {}} | keywords
    answer = explain_measured(make_config(), *SCHEMES[scheme], **question)
    assert answer.backend is select_measured(make_config(), *SCHEMES[scheme], **question)[0] is Fp8MoeBackend.TRITON
    (verdict,) = [verdict for verdict in answer.verdicts if verdict.backend.value == name]
    assert (verdict.supported, verdict.reason) == (False, reason)
    (time,) = [time for time in answer.times if time.backend.value == name]
    assert (time.us, time.accepted, time.eligible) == (1.0, False, False)
    assert "refused by the selector" in time.detail


def test_a_lower_level_is_no_certificate_and_is_told() -> None:
    quick = Certificate("quick", "2026-11-24", "0" * 64)
    answer = ask(table_of(rows_of(LAYER, TIMES), ("TRITON",), MARLIN=quick), 1)
    assert answer.backend is Fp8MoeBackend.TRITON
    details = {time.backend.value: time.detail for time in answer.times}
    assert "it passed quick; a certificate of level certify is needed" in details["MARLIN"]
    assert "it has none" in details["DEEPGEMM"]
    assert "passed over without a certified time: DEEPGEMM, MARLIN" in answer.why


def test_on_the_device_that_is_here_name_and_versions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.measured.explanation.detected_platform", lambda: WITHOUT_FLASHINFER)
    monkeypatch.setattr("fp8moe.measured.table.device_name_here", lambda: "H100 80GB HBM3")
    monkeypatch.setattr("fp8moe.measured.table.installed_versions", lambda *names: dict.fromkeys(names, "0.1.0"))
    rows = rows_of(LAYER, TIMES)
    assert ask(table_of(rows), 10, platform=None).fallback is None
    assert ask(table_of(rows, device=DEVICES["h200"]), 10, platform=None).fallback is Fallback.DEVICE
    newer = MeasuredTable(DEVICES["h100"], {"fp8moe": "0.1.0", "triton": "9.9"}, rows, {"TRITON": PASSED})
    answer = ask(newer, 10, platform=None)
    assert answer.fallback is Fallback.VERSIONS
    assert "measured with triton 9.9, here it is 0.1.0" in answer.why
    assert ask(newer, 10).backend is Fp8MoeBackend.TRITON  # of a device elsewhere the versions here say nothing


def test_gating_that_is_not_the_activations_is_another_layer() -> None:
    odd = make_config(gated=False)
    everything = {name: {1: 1.0} for name in NAMES}
    table = table_of(rows_of(LAYER, everything), NAMES)
    answer = explain_measured(odd, *BLOCK, tokens=1, table=table, platform=PLATFORMS["h100"], env={})
    assert answer.fallback is Fallback.SHAPE
    assert "silu not gated standard" in answer.why


class Choosy(TorchExperts):
    """A backend with a predicate of its own, which takes 64 experts of 4."""

    asked = 0

    @staticmethod
    def is_supported_config(cls: Any, config: Any, *_: Any, **__: Any) -> tuple[bool, Reason | None]:
        Choosy.asked += 1
        return (True, None) if config.experts_per_token == 4 else (False, Reason.ROUTING)


def test_a_predicate_of_its_own_is_asked() -> None:
    backends = (*ELEVEN, BackendSpec("CHOOSY", Choosy))
    times = TIMES | {"CHOOSY": {10: 1.0}}
    table = table_of(rows_of(LAYER, times), (*NAMES, "CHOOSY"))
    answer = ask(table, 10, backends=backends)
    assert answer.backend is not None
    assert answer.backend.value == "CHOOSY"
    other = LayerShape(64, 2, 2048, 1024, "block")
    config = make_config()
    config = type(config)(**{**{n: getattr(config, n) for n in config.__dataclass_fields__}, "experts_per_token": 2})
    table = table_of(rows_of(other, times), (*NAMES, "CHOOSY"))
    question = {"tokens": 10, "table": table, "platform": SM90, "env": {}, "backends": backends}
    assert select_measured(config, *BLOCK, **question)[0] is Fp8MoeBackend.TRITON
    before = Choosy.asked
    question["tokens"] = 1  # where it has no time there is nothing to ask
    assert select_measured(config, *BLOCK, **question)[0] is Fp8MoeBackend.MARLIN
    assert Choosy.asked == before


def test_a_predicate_of_its_own_does_not_bring_back_what_is_not_allowed() -> None:
    backends = tuple(BackendSpec("VLLM_CUTLASS", Choosy) if spec.name == "VLLM_CUTLASS" else spec for spec in ELEVEN)
    table = table_of(rows_of(LAYER, {"VLLM_CUTLASS": {1: 1.0}, "TRITON": {1: 2.0}}))
    assert ask(table, 1, backends=backends).backend is Fp8MoeBackend.TRITON
    assert ask(table, 1, backends=backends, allow_vllm_cutlass=True).backend is Fp8MoeBackend.VLLM_CUTLASS


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "16", None])
def test_what_is_no_number_of_tokens(tokens: Any) -> None:
    for ask_with in (select_measured, explain_measured):
        with pytest.raises(ValueError, match=r"^tokens=.*: expected an integer of at least 1"):
            ask_with(make_config(), *BLOCK, tokens=tokens, table=table_of([]), platform=SM90, env={})


def test_the_choice_is_logged_as_one_by_measurement(caplog: pytest.LogCaptureFixture) -> None:
    reset_log_deduplication()
    with caplog.at_level("INFO", "fp8moe.selector"):
        table = table_of(rows_of(LAYER, TIMES))
        select_measured(make_config(), *BLOCK, tokens=1, table=table, platform=WITHOUT_FLASHINFER, env={})
    (record,) = caplog.records
    assert record.getMessage().startswith("FP8 MoE backend MARLIN, by measurement, out of [AITER, ")


def test_the_default_is_untouched() -> None:
    table = carried_over("h100")
    question = (make_config(), *BLOCK)
    before = select_fp8_moe_backend(*question, platform=WITHOUT_FLASHINFER, env={})
    select_measured(*question, tokens=16, table=table, platform=WITHOUT_FLASHINFER, env={})
    assert select_fp8_moe_backend(*question, platform=WITHOUT_FLASHINFER, env={}) == before
    assert before[0] is Fp8MoeBackend.DEEPGEMM
