"""The plug-in as users meet it: `pytest` in a process of its own, its text, its report, its exit status."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from tests.suite.running import QUICK, SUITE, python, results_of, run_suite

VENDOR = '''
"""A vendor's first experiment."""
from dataclasses import replace
import torch
from fp8moe.backends.torch_experts import TorchExperts

class Right(TorchExperts):
    """Adds up K in two halves."""
    def first_gemm(self, inputs, index):
        weight = self.weight("w13", index)
        half = inputs.shape[1] // 2
        result = inputs[:, :half] @ weight[:, :half].t() + inputs[:, half:] @ weight[:, half:].t()
        bias = self.weights.w13_bias
        return result if bias is None else result + bias[index].float()

class Wrong(TorchExperts):
    """Forgets the last token of a batch of more than two."""
    def apply(self, hidden, weights, ids, **kwargs):
        result = super().apply(hidden, weights, ids, **kwargs)
        if len(result) > 2:
            result[-1] = 0
        return result

class Spoils(TorchExperts):
    """Converts its weights in place."""
    def __init__(self, config, quant, weights):
        weights.w2.view(torch.uint8)[0] ^= 1
        super().__init__(config, quant, weights)

class Forgets(TorchExperts):
    """Right once."""
    def apply(self, hidden, weights, ids, output=None, **kwargs):
        return super().apply(hidden, weights, ids, **kwargs)

class Limited(TorchExperts):
    """Declares how far its kernels go, and is not asked for more."""
    contract = replace(TorchExperts.contract, max_top_k=2)
    def apply(self, hidden, weights, ids, **kwargs):
        assert ids.shape[1] <= 2
        return super().apply(hidden, weights, ids, **kwargs)

class Absent(TorchExperts):
    def __init__(self, config, quant, weights):
        from fp8moe import BackendUnavailable
        raise BackendUnavailable("libacme is not installed: pip install acme")

class TakesNone(TorchExperts):
    """Takes every scheme, and no layer."""
    def __init__(self, config, quant, weights):
        from fp8moe import LayerNotSupported
        raise LayerNotSupported("expected multiples of 4096")

class Raises(TorchExperts):
    def apply(self, hidden, weights, ids, **kwargs):
        raise RuntimeError("the kernel was not built")

class EndsWhenAsked(TorchExperts):
    @staticmethod
    def is_supported_config(*about, **kwargs):
        import os
        os._exit(0)
'''

UNJUDGED = "FAILED {}: it was asked for by its name, and no case of it was judged; why, is said above"


@pytest.fixture
def vendor(tmp_path: Path) -> Path:
    (tmp_path / "vendor.py").write_text(VENDOR)
    return tmp_path


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A run of the pinned cases of one scheme, and its report; for those that look at it alone."""
    folder = tmp_path_factory.mktemp("quick")
    return run_suite(folder, *QUICK, "--fp8moe-report=report.json"), folder / "report.json"


def test_header_matrix_reasons_and_report(quick: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, path = quick
    assert done.returncode == 0, done.stdout[-3000:]
    for text in ("fp8moe ", f"torch {torch.__version__}", "kernel libraries:", "evidence in this run: hardware"):
        assert text in done.stdout
    assert re.search(r"^TorchExperts +ok \d+\* .* hw$", done.stdout, re.MULTILINE)
    assert "not run: TorchExperts, random cases: not selected in this run (block)" in done.stdout
    assert re.search(r"^AITER +- ", done.stdout, re.MULTILINE)
    assert "not supported: AITER: DEVICE, needs ROCm on gfx90a, gfx942 or gfx950, the library aiter, and" in done.stdout
    assert "not run: TRITON: no GPU here; the device interpreter simulates one" in done.stdout
    assert re.search(r"deepseek-v3 +block +NONE +FLASHINFER_CUTLASS +FLASHINFER_TRTLLM +TRITON", done.stdout)
    report = json.loads(path.read_text())
    assert report["format"] == 1
    statuses = {(cell["backend"], cell["status"]) for cell in report["cells"]}
    assert {("TorchExperts", "not_run"), ("AITER", "not_supported"), ("TRITON", "not_run")} <= statuses
    assert all(cell["reason"] for cell in report["cells"] if cell["status"] != "passed")
    assert all(0 <= r["error_over_bound"] <= 1 for r in report["results"] if "case" in r)


def test_workers_of_xdist_report_the_same(quick: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path) -> None:
    one, report = quick
    two = run_suite(tmp_path, *QUICK, "--fp8moe-report=two.json", "-n", "2")
    assert (one.returncode, two.returncode) == (0, 0), two.stdout[-3000:]
    assert results_of(report) == results_of(tmp_path / "two.json")
    assert "computes: backend x scheme" in two.stdout
    assert two.stdout.count("evidence in this run") == 1


def test_a_vendors_classes(vendor: Path) -> None:
    names = ("Right", "Wrong", "Raises")
    done = run_suite(vendor, *QUICK, *(f"--fp8moe-backend=vendor:{name}" for name in names))
    assert done.returncode == 1
    assert "1 passed" in done.stdout
    assert "2 failed" in done.stdout
    assert re.search(r"^Right +ok \d+", done.stdout, re.MULTILINE)
    assert re.search(r"^Wrong +FAIL 1", done.stdout, re.MULTILINE)
    assert "apply raised RuntimeError: the kernel was not built at vendor.py:" in done.stdout
    assert re.search(r"token \d+, .*expected \S+, got \S+, error/bound", done.stdout)
    assert "Traceback" not in done.stdout
    command = re.search(r"reproduce: python (-m fp8moe repro .*vendor:Wrong.*)", done.stdout)
    assert command is not None
    again = python(vendor, *shlex.split(command[1]))
    assert again.returncode == 1, again.stdout + again.stderr
    assert "status: failed" in again.stdout
    honest = python(vendor, *shlex.split(command[1].replace("Wrong", "Right")))
    assert honest.returncode == 0, honest.stdout + honest.stderr


def test_a_mutant_spoils_nothing_for_those_after_it(vendor: Path) -> None:
    done = run_suite(vendor, *QUICK, *(f"--fp8moe-backend=vendor:{name}" for name in ("Spoils", "Forgets", "Right")))
    assert re.search(r"^Spoils +FAIL 1", done.stdout, re.MULTILINE)
    assert "it changed its input" in done.stdout
    assert re.search(r"^Forgets +FAIL 1", done.stdout, re.MULTILINE)
    assert "apply did not write to the output it was given" in done.stdout
    assert re.search(r"^Right +ok \d+", done.stdout, re.MULTILINE)


def test_declared_limits_are_kept(vendor: Path) -> None:
    done = run_suite(vendor, *QUICK, "--fp8moe-backend=vendor:Limited", "--fp8moe-report=report.json")
    assert done.returncode == 0, done.stdout
    results = json.loads((vendor / "report.json").read_text())["results"]
    left_out = {r["reason"] for r in results if r["status"] == "not_applicable"}
    assert left_out == {"top_k=5 is beyond the declared max_top_k=2"}


def test_a_backend_that_cannot_be_had_is_not_run_and_says_why(vendor: Path) -> None:
    done = run_suite(vendor, *QUICK, "--fp8moe-backend=vendor:Absent", "-rs")
    assert done.returncode == 1
    assert re.search(r"^Absent +n/r .* -$", done.stdout, re.MULTILINE)
    assert "not run: Absent, pinned cases: libacme is not installed: pip install acme (block)" in done.stdout
    assert "1 skipped" in done.stdout
    assert UNJUDGED.format("Absent") in done.stdout


def test_each_that_was_asked_for_is_judged_or_the_run_fails(vendor: Path) -> None:
    """Whichever of them pass; here in workers of pytest-xdist, whose controller collects nothing."""
    named = [f"--fp8moe-backend={name}" for name in ("vendor:Right", "AITER")]
    done = run_suite(vendor, *QUICK, *named, "-n", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert UNJUDGED.format("AITER") in done.stdout
    assert UNJUDGED.format("Right") not in done.stdout
    assert "1 passed" in done.stdout
    other = run_suite(vendor, "-m", "selects or computes", "-k", "grid_brings_every_two_values or emulated", *named)
    assert other.returncode == 0, other.stdout + other.stderr


def test_a_backend_of_which_no_case_was_judged_has_not_passed(vendor: Path) -> None:
    done = run_suite(vendor, *QUICK[:-1], "pinned or model", "--fp8moe-backend=vendor:TakesNone")
    assert done.returncode == 1, done.stdout
    assert UNJUDGED.format("TakesNone") in done.stdout
    told = "not run: TakesNone, pinned cases: no case was judged: expected multiples of 4096 (block)"
    assert told in done.stdout
    assert re.search(r"= \d+ skipped, \d+ deselected in", done.stdout)


USAGE_ERRORS = {
    "--fp8moe-backend=TRITTON": "--fp8moe-backend=TRITTON: no backend has this name; did you mean TRITON",
    "--fp8moe-backend=vendor:Nobody": r"--fp8moe-backend=vendor:Nobody: vendor has no Nobody; there: .*\bRight\b",
    "--fp8moe-backend=vendr:Right": "there is no module vendr on the import path; did you mean vendor",
    "--fp8moe-backend=json:JSONDecoder": "expected a subclass of FusedMoEPermuteExpertsUnpermute",
    "--fp8moe-backend=ends_at_once:Experts": r"it cannot be used: importing it raised SystemExit: os\._exit\(0\)",
    "--fp8moe-backend=vendor:EndsWhenAsked": r"what it takes raised SystemExit: os\._exit\(0\) .* at vendor\.py:",
    "--fp8moe-scheme=blok": "expected one of block",
    "--fp8moe-device=xpu": "--fp8moe-device=xpu: torch .* sees a",
    "--fp8moe-device=gpu": "invalid choice: 'gpu'",
    "--fp8moe-examples=few": "invalid int value",
    "--fp8moe-examples=0": "expected at least 1",
    "--fp8moe-budget=-1": "expected seconds",
    "--fp8moe-report=nowhere/report.json": "the folder does not exist",
}
"""Bad options, and what is said once of each."""
ASKED_IN_TURN = """
import contextlib, io, json, sys
import pytest

told = {}
for option in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = pytest.main([*sys.argv[2:], option])
    told[option] = (int(status), out.getvalue())
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def usage_errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """The status and text of a start of the suite with each bad option: all in one process, which loads torch once."""
    folder = tmp_path_factory.mktemp("usage")
    (folder / "vendor.py").write_text(VENDOR)
    (folder / "ends_at_once.py").write_text("import os\nos._exit(0)\n")
    done = python(folder, "-c", ASKED_IN_TURN, json.dumps(list(USAGE_ERRORS)), *SUITE)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("option", USAGE_ERRORS)
def test_a_bad_option_is_a_usage_error(usage_errors: dict[str, tuple[int, str]], option: str) -> None:
    status, told = usage_errors[option]
    assert status == 4, told
    assert len(re.findall(USAGE_ERRORS[option], told)) == 1, told
    assert "Traceback" not in told


def test_where_nothing_computed_was_selected_there_is_no_matrix(tmp_path: Path) -> None:
    done = run_suite(tmp_path, "-m", "selects", "-k", "grid_brings_every_two_values")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "selects: 1 of 1 checks hold" in done.stdout
    assert "computes: backend x scheme" not in done.stdout
    assert "not selected in this run" not in done.stdout


def test_a_spent_budget_is_said(tmp_path: Path) -> None:
    options = ("--fp8moe-backend=TorchExperts", "--fp8moe-budget=0", "-rs", "--fp8moe-report=report.json")
    done = run_suite(tmp_path, *QUICK, *options)
    assert done.returncode == 1
    assert UNJUDGED.format("TorchExperts") in done.stdout
    assert "the budget of 0 s was spent before v1:" in done.stdout
    (cell,) = json.loads((tmp_path / "report.json").read_text())["cells"]
    assert cell["status"] == "not_run"
    assert "the budget of 0 s was spent" in cell["reason"]


def test_it_is_collected_without_pytest_xdist(tmp_path: Path) -> None:
    done = run_suite(tmp_path, "--collect-only", "-q", "-p", "no:xdist", "--strict-markers")
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"^\d+ tests collected", done.stdout, re.MULTILINE)


def test_other_peoples_sessions_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text("import sys\n\ndef test_it():\n    assert 'torch' not in sys.modules\n")
    done = python(tmp_path, "-m", "pytest", "-p", "conformance.plugin", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    for ours in ("evidence in this run", "kernel libraries", "fp8moe conformance", "backend x scheme"):
        assert ours not in done.stdout
