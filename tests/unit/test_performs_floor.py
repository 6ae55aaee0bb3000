"""The floor of a case is what a person with a pencil gets, and a time below it is a failure."""

from __future__ import annotations

import pytest
import torch

from conformance import performs
from conformance.build import build
from conformance.cases import Case
from conformance.matrix import performs_table, render
from conformance.performs import (
    Floor,
    Selected,
    Timing,
    Work,
    floor_of,
    not_timed,
    timed_cases,
    verdict_of,
    work_of,
    work_of_case,
)
from conformance.plan import Target
from conformance.rates import RATES, Rates, rates_of
from conformance.results import CheckResult, Evidence, Status
from conformance.vocabulary import SCHEME_NAMES
from fp8moe.platforms import PLATFORMS

ROUND = Rates(bandwidth=1e12, fp8=2e12, sixteen_bit=1e12, source="a round device")
HOPPER = Target("cuda", PLATFORMS["h100"].with_libraries(), "cuda")


def tensors(**fields: object):  # type: ignore[no-untyped-def]
    sizes = {"experts": 4, "top_k": 2, "hidden": 256, "inter": 128, "tokens": 3}
    return build(Case(**(sizes | fields)))  # type: ignore[arg-type]


def with_ids(found, ids):  # type: ignore[no-untyped-def]
    found.topk_ids.copy_(torch.tensor(ids, dtype=found.topk_ids.dtype))
    return found


def test_work_of_block_scales() -> None:
    # w13 256 x 256 and w2 256 x 128, a byte each; scales 2 x 2 (gate and up apart) and 2 x 1, four bytes each.
    expert = 256 * 256 + 256 * 128 + 4 * 4 + 2 * 4
    work = work_of(with_ids(tensors(), [[0, 1], [1, 0], [-1, 1]]))
    assert work.bytes == 2 * expert + (3 + 3) * 256 * 2
    assert work.flops == 2 * 5 * (256 * 256 + 256 * 128)


def test_a_token_without_an_expert_is_not_read_and_is_written() -> None:
    work = work_of(with_ids(tensors(), [[3, 3], [-1, -1], [-1, -1]]))
    assert work.bytes == 256 * 256 + 256 * 128 + 24 + (1 + 3) * 256 * 2
    assert work.flops == 2 * 2 * (256 * 256 + 256 * 128)
    nobody = work_of(with_ids(tensors(), [[-1, -1]] * 3))
    assert (nobody.bytes, nobody.flops) == (3 * 256 * 2, 0)


def test_work_of_unquantised_weights_without_a_gate_and_with_a_bias() -> None:
    found = tensors(scheme="none", activation="relu2_no_mul", bias=True, top_k=1)
    work = work_of(with_ids(found, [[0], [1], [2]]))
    assert work.bytes == 3 * 2 * (128 * 256 + 256 * 128 + 128 + 256) + 6 * 256 * 2
    assert work.flops == 2 * 3 * (128 * 256 + 256 * 128)


def test_experts_of_other_ranks_are_not_counted() -> None:
    # Rank 1 of 2 has experts 2 and 3.
    work = work_of(with_ids(tensors(ep="2:1"), [[0, 1], [0, 2], [1, 2]]))
    assert work.bytes == 256 * 256 + 256 * 128 + 24 + (2 + 3) * 256 * 2
    assert work.flops == 2 * 2 * (256 * 256 + 256 * 128)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize(
    "fields",
    [
        {"bias": True, "law": "masked", "tokens": 9},
        {"ep": "4:3", "experts": 8, "tokens": 33, "dtype": "fp16", "layout": "strided"},
        {"activation": "relu2_no_mul", "tokens": 0, "experts": 5, "inter": 72},
    ],
)
def test_work_is_the_same_from_the_case_alone(scheme: str, fields: dict[str, object]) -> None:
    found = tensors(scheme=scheme, **fields)
    assert work_of_case(found.case) == work_of(found)


def test_the_floor_is_the_larger_time() -> None:
    assert floor_of(Work(bytes=3_000_000, flops=4_000_000), ROUND, "block") == Floor(3.0, "bytes")
    assert floor_of(Work(bytes=3_000_000, flops=8_000_000), ROUND, "block") == Floor(4.0, "flops")
    assert floor_of(Work(bytes=3_000_000, flops=4_000_000), ROUND, "none") == Floor(4.0, "flops")


def test_the_floor_of_a_published_model_on_an_h100() -> None:
    # Qwen3-30B-A3B, M = 1: 8 experts of 3 x 2048 x 768 bytes from 3.35 TB/s, 11.3 us; scales and rows are 0.1%.
    work = Work(bytes=8 * 3 * 2048 * 768, flops=2 * 8 * 3 * 2048 * 768)
    floor = floor_of(work, RATES["NVIDIA H100 80GB HBM3"], "block")
    assert floor is not None
    assert floor.by == "bytes"
    assert f"{floor.us:.1f}" == "11.3"


def test_rates_go_by_the_whole_name() -> None:
    assert rates_of("NVIDIA H100 80GB HBM3") is RATES["NVIDIA H100 80GB HBM3"]
    assert rates_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert rates_of("NVIDIA A100-SXM4-80GB") is None
    for name, rates in RATES.items():
        assert 2e11 < rates.bandwidth < 1e13, name
        assert 1.9 <= rates.fp8 / rates.sixteen_bit <= 2.1, name
        assert rates.source


def test_faster_than_the_device_is_a_failure() -> None:
    floor = Floor(10.0, "bytes")
    assert verdict_of(Timing(10.0, 5.0, "graph replays"), floor)[0] is Status.PASSED
    assert verdict_of(Timing(9.9, 9.9, "graph replays"), floor)[0] is Status.FAILED
    assert verdict_of(Timing(9.9, 9.9, "graph replays"), None)[0] is Status.PASSED


def test_cases_are_the_published_models_that_were_asked_for() -> None:
    found = timed_cases(HOPPER, {"block"}, {"TRITON"})
    assert found
    assert {selected.case.scheme for selected in found} == {"block"}
    assert {selected.backend for selected in found} == {"TRITON"}
    assert len({(selected.case.model or "").partition(":")[0] for selected in found}) >= 5
    assert timed_cases(HOPPER, {"block"}, {"MARLIN"}) == []


def test_a_case_without_a_backend_is_not_run_and_says_why() -> None:
    measured = performs.time_case(Selected(Case(), "TRITON", None, "its kernels are not written yet"), HOPPER)
    assert (measured.result.status, measured.stopwatch) == (Status.NOT_RUN, None)
    assert measured.result.evidence is None
    assert not_timed([measured.result]) == ["performs: TRITON: its kernels are not written yet (1 case)"]
    assert not_timed([CheckResult("performs", "performs.time", Status.NOT_RUN, reason="no GPU")]) == [
        "performs: no GPU"
    ]


def test_table() -> None:
    case = Case(model="qwen3-30b-a3b:tp1", tokens=64)
    figures = {"median_us": 240.0, "warm_us": 228.04, "floor_us": 180.0, "floor_over_time": 0.75}
    figures |= {"measured_floor_over_time": 0.83, "peak_bytes": 3 << 20}
    kept = CheckResult(
        "performs",
        "performs.time",
        Status.PASSED,
        "TRITON",
        "block",
        str(case),
        evidence=Evidence.HARDWARE,
        measured=figures,
    )
    assert CheckResult.from_json(kept.to_json()) == kept
    rows = [line.split() for line in render(performs_table([kept]), 118, False).splitlines()]
    assert ["qwen3-30b-a3b:tp1", "block", "64", "TRITON", "240.0", "228.0", "180.0", "0.75", "0.83", "3.0"] in rows
