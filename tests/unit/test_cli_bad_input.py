"""The command line and bad input: one line on standard error, with the remedy."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from fp8moe import cli
from fp8moe.platforms import Platform
from fp8moe.registry import BackendContractError
from tests.unit.command_line import no_variables, python, run  # noqa: F401 (a fixture)

ELSEWHERE = "rocm" if Platform.detect().kind == "cuda" else "cuda"
"""A device that is not here."""
BAD = [
    (["explain", "--platform", "h1000"], "'h1000' is not known; did you mean h100"),
    (["explain", "--platform", "quantum"], "expected one of here, t4, "),
    (["explain", "--libraries", "flashinfr"], "did you mean flashinfer?"),
    (["explain", "--libraries", "deep_gemm,numpy"], "--libraries 'numpy' is not known"),
    (["explain", "--model", "deepseek"], "did you mean deepseek-v3?"),
    (["explain", "--model", "deepseek-v3:tp7"], "expected a tp size that divides"),
    (["explain", "--model", "deepseek-v3:"], "expected a split such as tp8"),
    (["explain", "--model", "deepseek-v3:tp8", "--tp", "8"], "leave out --tp, --dp, --ep, or the split"),
    (["explain", "--scheme", "blocks"], "did you mean block"),
    (["explain", "--activation", "silo"], "did you mean silu"),
    (["explain", "--routing", "renormalise"], "did you mean Renormalize or RenormalizeNaive?"),
    (["explain", "--all2all", "deepep"], "expected one of naive, pplx"),
    (["explain", "--format", "batch"], "did you mean batched?"),
    (["explain", "--format", "batched", "--no-ep"], "it takes --dp 2 or more, --ep"),
    (["explain", "--format", "batched", "--dp", "1"], "it takes --dp 2 or more, --ep"),
    (["explain", "--format", "standard", "--dp", "2", "--ep", "--all2all", "pplx"], "leave out --all2all"),
    (["explain", "--logits-dtype", "fp8"], "expected one of bfloat16, float16, float32"),
    (["explain", "--experts", "4", "--top-k", "5"], "FusedMoEConfig.experts_per_token=5: expected at most"),
    (["explain", "--intermediate", "100", "--tp", "3"], "--intermediate 100 does not divide by 3"),
    (["explain", "--experts", "10", "--tp", "3", "--ep"], "--experts 10 does not divide by 3"),
    (["explain", "--env", "VLLM_USE_DEEP_GEMM"], "expected NAME=VALUE"),
    (["explain", "--env", "VLLM_USE_DEEPGEMM=1"], "did you mean VLLM_USE_DEEP_GEMM"),
    (["explain", "--env", "vllm_use_deep_gemm=1"], "did you mean VLLM_USE_DEEP_GEMM?"),
    (["explain", "--all-platforms", "--platform", "h100"], "leave one of the two options out"),
    (["check", "TorchExperts", "--level", "full"], "expected one of smoke, quick, certify"),
    (["check", "TorchExperts", "--device", "quantum"], "fp8moe: --device quantum: expected one of auto, cpu"),
    (["check", "TorchExperts", "--device", ELSEWHERE], f"fp8moe: --device {ELSEWHERE}: torch "),
    (["certify", "TorchExperts", "--out", "nowhere", "--device", ELSEWHERE], f"fp8moe: --device {ELSEWHERE}: torch "),
    (["probe", "TorchExperts", "--device", ELSEWHERE], f"fp8moe: --device {ELSEWHERE}: torch "),
    (["zoo", "--score", "--kind", "backend", "--device", ELSEWHERE], f"fp8moe: --device {ELSEWHERE}: torch "),
    (["check", "acme", "--device", "cpu"], "fp8moe: acme: no backend has this name; expected one of AITER, "),
    (["check", "triton", "--device", "cpu"], "fp8moe: triton: no backend has this name; did you mean TRITON or "),
    (["check", "json:Nobody", "--device", "cpu"], "fp8moe: json:Nobody: json has no Nobody; no class of a backend is "),
    (["probe", "TRITTON", "--device", "cpu"], "fp8moe: TRITTON: no backend has this name; did you mean TRITON"),
    (["gate", "--write", "b.json", "--device", "cpu", "--backend", "TRITTON"], "fp8moe: --backend TRITTON: no backend"),
    (["check", "TorchExperts", "--report", "nowhere/report.json"], "the folder does not exist"),
    (["check", "TorchExperts", "--report", "."], "--report .: it is a folder; name a file"),
    (["certify", "TorchExperts", "--out", "nowhere", "--sign", "no-key"], "--sign no-key: [Errno 2]"),
    (["check", "TorchExperts", "--resume", "nowhere.json"], "--resume nowhere.json: [Errno 2]"),
    (["repro", "v1:M=3", "--number", "2"], "--number 2: it goes with a report or a certificate"),
    (["repro", "v1:M=3", "--check", "relation.nothing"], "--check=relation.nothing: expected one of equivalence, "),
    (["repro", "v1:M=3", "--device", "quantum"], "fp8moe: --device quantum: expected one of auto, cpu"),
    (["repro", "v1:M=3", "--device", "cpu", "--backend", "TRITTON"], "fp8moe: --backend TRITTON: no backend has this"),
    (["repro", "v1:k=9"], "case top_k=9: expected at most experts=8"),
    (["repro", "nowhere.json"], "nowhere.json: no such file or folder, and no case's id"),
    (["verify", "nowhere"], "fp8moe: nowhere: no such folder"),
    (["verify", __file__], "it is a file; name the folder of a certificate"),
    (["schema", "reprot"], "did you mean report?"),
    (["zoo", "--score", "--level", "full"], "expected one of smoke, quick, certify"),
    (["zoo", "--score", "--kind", "beast"], "expected one of selector, backend, attacker, kernel"),
    (["zoo", "--score", "--part", "3/3"], "--part 3/3: expected i/n with 0 <= i < n"),
]

if ELSEWHERE == "cuda":
    BAD.append((["gate", "--against-backend", "TRITON", "--backend", "MARLIN"], "this needs a CUDA device: torch "))


@pytest.mark.parametrize(
    ("arguments", "remedy"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input(arguments: list[str], remedy: str) -> None:
    result = run(*arguments, status=cli.EXIT_BAD_INPUT)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("fp8moe: ")
    assert remedy in line


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["explian"], "explain"),
        (["explain", "--platfrom", "h100"], "--platform"),
        (["explain", "--tp", "two"], "--tp"),
        (["explain", "--tp", "0"], "--tp"),
        (["explain", "h100"], "h100"),
        (["repro"], "fp8moe repro --help"),
        (["explain", "--platform", "h1000"], "did you mean h100"),
    ],
)
def test_usage_errors_are_one_line_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], remedy: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["fp8moe", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == cli.EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("fp8moe")
    assert remedy in line


def test_a_variable_that_is_read_at_import() -> None:
    done = python("from fp8moe.cli import main; main()", "explain", VLLM_MOE_DP_CHUNK_SIZE="many")
    assert done.returncode == cli.EXIT_BAD_INPUT
    (line,) = done.stderr.splitlines()
    assert line.startswith("fp8moe: VLLM_MOE_DP_CHUNK_SIZE='many': expected a positive integer")


def test_a_broken_plug_in_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> Any:
        raise BackendContractError("entry point 'ACME' of acme-kernels: loading it raised ImportError: libacme.so")

    monkeypatch.setattr("fp8moe.selector.default_backends", refuses)
    result = run("explain", "--platform", "h100", status=cli.EXIT_BAD_INPUT)
    assert result.stderr.splitlines() == [
        "fp8moe: entry point 'ACME' of acme-kernels: loading it raised ImportError: libacme.so"
    ]


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["explain", "--platform", "w7900"], 2)])
def test_main_passes_the_status_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["fp8moe", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == status
    assert capsys.readouterr().out


def test_main_does_not_hide_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Callable[..., Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(ZeroDivisionError):
        cli.main()
