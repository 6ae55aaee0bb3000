"""Compiled evidence decides by the predicate, the device's limits and the compiler's own figures; hardly compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import conformance.compiled.runner as runner
from conformance.compiled.claims import Claims, claims_for
from conformance.compiled.outcome import MOST_SPILLED, Facts, Outcome, judge, short, spilled_amd, spilled_nvidia
from conformance.compiled.report import compile_lines, compile_table, result_of, told
from conformance.compiled.targets import TARGETS, CompileTarget, pairs_of
from conformance.matrix import render
from conformance.results import CheckResult, Evidence, Status
from fp8moe.platforms import PLATFORMS

CHECKOUT = Path(__file__).parents[2]
FITS = Facts(shared_bytes=1024)
EVERYTHING, NO_FP8 = Claims(fp8=True, unquantised=True), Claims(fp8=False, unquantised=True)
NO_E4M3 = 'CompilationError: at 1:0:\ndef kernel(\n^\nValueError("type fp8e4nv not supported in this architecture")'


def test_every_target_of_the_issue_is_there() -> None:
    wanted = {"sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950"}
    assert wanted <= set(TARGETS)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_target_is_its_platform(target: CompileTarget) -> None:
    assert target.platform.architecture == target.name.replace("sm_", "sm")
    assert target.platform.kind == {"cuda": "cuda", "hip": "rocm"}[target.backend]


def test_every_architecture_that_triton_runs_on_is_a_target() -> None:
    triton = {platform.architecture for platform in PLATFORMS.values() if platform.kind in ("cuda", "rocm")}
    assert triton == {target.platform.architecture for target in TARGETS.values()}


def test_claims_are_the_predicate_s() -> None:
    claimed = {name for name, target in TARGETS.items() if claims_for(target).fp8}
    newer = {"sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"}
    assert claimed == newer | {"gfx90a", "gfx942", "gfx950"}
    assert all(claims_for(target).unquantised for target in TARGETS.values())


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (FITS, ""),
        (replace(FITS, shared_bytes=99 * 1024), ""),
        (replace(FITS, shared_bytes=99 * 1024 + 1), "101377 bytes of shared memory: sm_89 takes 101376"),
        (replace(FITS, spilled_bytes=MOST_SPILLED), ""),
        (replace(FITS, spilled_bytes=MOST_SPILLED + 8), "40 bytes spilled by a thread: sm_89 takes 32"),
        (replace(FITS, tensor_columns=1), "1 columns of tensor memory: sm_89 takes 0"),
        (Facts(error=NO_E4M3), "claimed by the predicate, and the compiler refuses: ValueError"),
    ],
)
@pytest.mark.parametrize("fp8", [True, False])
def test_what_is_claimed_has_to_compile_within_the_limits(facts: Facts, told: str, fp8: bool) -> None:
    status, reason = judge(TARGETS["sm_89"], fp8=fp8, claims=EVERYTHING, facts=facts, refusal="not asked")
    assert status is (Status.FAILED if told else Status.PASSED)
    assert reason.startswith(told)
    assert bool(reason) == bool(told)


@pytest.mark.parametrize(
    ("target", "facts", "refusal", "status"),
    [
        ("sm_80", Facts(error=NO_E4M3), "no e4m3", Status.NOT_SUPPORTED),
        ("sm_80", FITS, "no e4m3", Status.FAILED),  # the compiler takes it
        ("sm_80", Facts(error=NO_E4M3), None, Status.FAILED),  # our class takes it
        ("sm_80", Facts(error="OSError: no space left"), "no e4m3", Status.FAILED),  # not because of e4m3
        ("gfx1100", None, "no e4m3", Status.NOT_SUPPORTED),
        ("gfx1100", None, None, Status.FAILED),
    ],
)
def test_what_is_refused_has_to_be_refused_by_all(
    target: str, facts: Facts | None, refusal: str | None, status: Status
) -> None:
    found, reason = judge(TARGETS[target], fp8=True, claims=NO_FP8, facts=facts, refusal=refusal)
    assert found is status
    assert reason


def test_a_kernel_without_e4m3_is_claimed_where_fp8_is_refused() -> None:
    assert judge(TARGETS["sm_80"], fp8=False, claims=NO_FP8, facts=FITS, refusal=None) == (Status.PASSED, "")


def test_our_class_refuses_by_itself() -> None:
    """In a process in which triton compiles, with the control on a device that is supported."""
    if sys.platform != "linux":
        pytest.skip("triton is a package for Linux")
    code = (
        "from conformance.compiled.claims import class_refusal as r; from conformance.compiled.targets import TARGETS\n"
        "for name in ('sm_80', 'gfx1100', 'sm_89', 'gfx90a'): print(name, r(TARGETS[name]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert "not supported on sm80" in found["sm_80"]
    assert "not supported on gfx1100" in found["gfx1100"]
    assert (found["sm_89"], found["gfx90a"]) == ("None", "None")


def test_spills_of_nvidia() -> None:
    usage = "Fatbin elf code:\nResource usage:\n Common:\n  GLOBAL:0\n Function {}:\n  {}"
    kernel = "REG:255 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:1040 TEXTURE:0 SURFACE:0 SAMPLER:0"
    assert spilled_nvidia(usage.format("k", kernel)) == 24
    with pytest.raises(ValueError, match="one kernel"):
        spilled_nvidia(usage.format("k", ""))
    with pytest.raises(ValueError, match="one kernel"):
        spilled_nvidia(f"{kernel}\n{kernel}")


def test_spills_of_amd() -> None:
    metadata = "    .private_segment_fixed_size: {}\n    .sgpr_spill_count: 14\n    .vgpr_spill_count: 0\n"
    assert spilled_amd(metadata.format(0)) == 0  # scalar registers in lanes of vector registers
    assert spilled_amd(metadata.format(28)) == 28
    with pytest.raises(ValueError, match="one kernel"):
        spilled_amd("\ts_endpgm\n")


def test_only_spills_are_waived_and_only_where_it_says_so() -> None:
    def verdict(target: str, facts: Facts) -> Status:
        return judge(TARGETS[target], fp8=False, claims=NO_FP8, facts=facts, refusal=None)[0]

    spilling = replace(FITS, spilled_bytes=8304)
    assert verdict("sm_75", spilling) is Status.WAIVED
    assert verdict("sm_80", spilling) is Status.FAILED
    assert verdict("sm_75", replace(spilling, shared_bytes=1 << 20)) is Status.FAILED
    assert verdict("sm_75", FITS) is Status.PASSED


def test_an_error_s_cause_is_told_in_one_line() -> None:
    assert short(NO_E4M3) == 'ValueError("type fp8e4nv not supported in this architecture")'
    assert short("") == "no text"
    assert len(short("x" * 1000)) < 400


def test_parts_of_the_matrix_that_a_run_has() -> None:
    kernels = ("gemm_row_16", "weighted_sum")
    assert pairs_of("none", kernels) == []
    assert len(pairs_of("all", kernels)) == 2 * len(TARGETS)
    subset = pairs_of("subset", kernels)
    assert {("sm_90", "weighted_sum"), ("gfx942", "gemm_row_16"), ("sm_100", "gemm_row_16")} <= set(subset)
    assert ("gfx942", "weighted_sum") not in subset


def test_results_are_of_their_own_class() -> None:
    outcome = Outcome("sm_89", "gemm.row", Status.PASSED, shared_bytes=4096, spilled_bytes=8, seconds=0.5)
    assert Outcome.from_json(outcome.to_json()) == outcome
    result = result_of(outcome)
    assert (result.verdict, result.check, result.evidence) == ("compiles", "compiles.sm_89.gemm.row", Evidence.COMPILED)
    assert result.measured["spilled_bytes"] == 8
    assert CheckResult.from_json(result.to_json()) == result
    assert result_of(replace(outcome, status=Status.NOT_RUN, reason="no ptxas")).evidence is None
    assert result_of(replace(outcome, status=Status.NOT_APPLICABLE, reason="never launched")).evidence is None


def test_table_and_lines() -> None:
    outcomes = [
        Outcome("sm_80", "gemm", Status.NOT_SUPPORTED, "no e4m3"),
        Outcome("sm_89", "gemm", Status.PASSED, spilled_bytes=8),
        Outcome("gfx942", "gemm", Status.FAILED, "too large"),
        Outcome("sm_89", "sum", Status.NOT_RUN, "no ptxas"),
        Outcome("gfx942", "sum", Status.NOT_APPLICABLE, "never launched"),
    ]
    results = [result_of(outcome) for outcome in outcomes]
    rows = [line.split() for line in render(compile_table(results), 118, False).splitlines()]
    assert rows[1:] == [
        ["kernel", "sm_80", "sm_89", "gfx942"],
        ["gemm", "refused", "ok", "FAIL"],
        ["sum", "n/r", "n/r", "n/a"],
    ]
    lines = compile_lines(results)
    assert lines[0] == "spills: 1 of 5, at most 8 bytes a thread (sm_89.gemm); the limit is 32"
    assert "refused: 1 on sm_80: no e4m3" in lines
    assert "not run: 1 on sm_89: no ptxas" in lines
    assert "not applicable: 1 on gfx942: never launched" in lines
    assert "--fp8moe-compile=all" in lines[-1]
    assert told(outcomes).endswith("FAILED compiles.gfx942.gemm: too large")


def test_a_program_for_more_shared_memory_than_there_is_is_never_launched() -> None:
    if sys.platform != "linux":
        pytest.skip("triton is a package for Linux")
    pair = ("sm_89", "deep_gemm_block_64")
    outcome = runner.outcomes_of([pair])[pair]
    assert outcome.status is Status.NOT_APPLICABLE, outcome
    assert "launched only where a multiprocessor has 196608 bytes" in outcome.reason


def test_a_compiler_that_dies_or_hangs_fails_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[runner.Pair]] = []
    died = ("sm_90", "bad")

    def process(pairs: list[runner.Pair]) -> tuple[runner.Pair | None, dict[runner.Pair, Outcome], str]:
        asked.append(list(pairs))
        until = pairs.index(died) if died in pairs else len(pairs)
        done = {pair: Outcome(*pair, Status.PASSED) for pair in pairs[:until]}
        return (died if died in pairs else pairs[-1]), done, "ended with status -6"

    monkeypatch.setattr(runner, "_one_process", process)
    pairs = [("sm_90", "a"), died, ("sm_90", "b")]
    found = runner.outcomes_of(pairs)
    assert {pair: outcome.status for pair, outcome in found.items()} == {
        pairs[0]: Status.PASSED,
        died: Status.FAILED,
        pairs[2]: Status.PASSED,
    }
    assert "status -6" in found[died].reason
    assert asked == [pairs, [pairs[2]]]


def test_a_process_that_cannot_begin_is_the_suite_s_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_one_process", lambda pairs: (None, {}, "ended with status 1: no module"))
    with pytest.raises(RuntimeError, match="no module"):
        runner.outcomes_of([("sm_90", "a")])
