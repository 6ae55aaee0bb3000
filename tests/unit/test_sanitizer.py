"""compute-sanitizer without a GPU: where it is looked for, what its log says, what becomes of it. A script plays it."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from conformance.cases import Case
from conformance.plan import Subject, Target
from conformance.results import Evidence, Status
from conformance.sanitizer import SanitizerMissing, chosen_cases, located, sanitize
from conformance.sanitizer.tool import ERRORS, RAISED, REFUSED, read_log
from conformance.zoo import UNSEEN
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.platforms import PLATFORMS

# As compute-sanitizer 2025.3.1 wrote it on an H200, host frames left out.
LOG = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at grouped_gemm_kernel+0x1100 in grouped_gemm_mutant_reads_past_the_weights.py:86
=========     by thread (121,0,0) in block (13,0,0)
=========     Access to 0x7f5df2f49500 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f5df2f24c00 of size 149,760 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch [0x2441] in __triton_launcher.cpython-312-x86_64-linux-gnu.so
=========
========= Invalid __global__ read of size 16 bytes
=========     at grouped_gemm_kernel+0x1100 in grouped_gemm_mutant_reads_past_the_weights.py:86
=========     by thread (122,0,0) in block (13,0,0)
=========
========= Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "unspecified launch failure" on CUDA API call
=========     Saved host backtrace up to driver entry point at error
=========
========= Target application returned an error
========= ERROR SUMMARY: 8 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACES = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
HERE = Target("cuda", PLATFORMS["h100"], "cpu")
SUBJECT = Subject("TorchExperts", TorchExperts, "TorchExperts")


def test_a_finding_is_one_line_and_told_once() -> None:
    found = read_log(LOG)
    assert found.errors == 8
    assert found.findings == (
        "Invalid __global__ read of size 16 bytes in grouped_gemm_kernel at "
        "grouped_gemm_mutant_reads_past_the_weights.py:86",
    )


@pytest.mark.parametrize(
    ("text", "errors"), [(CLEAN, 0), (RACES, 0), ("", None), ("========= COMPUTE-SANITIZER\n", None)]
)
def test_without_a_summary_it_did_not_come_to_its_end(text: str, errors: int | None) -> None:
    assert read_log(text) == type(read_log(""))(errors, ())


def program(folder: Path, body: str) -> str:
    path = folder / "compute-sanitizer"
    path.write_text(f"#!{sys.executable}\nimport pathlib, sys\nlog = pathlib.Path(sys.argv[4])\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_it_is_found_on_the_path_or_in_a_toolkit(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    made = program(tmp_path / "bin", "")
    assert located({"PATH": str(tmp_path / "bin")}) == made
    assert located({"PATH": "", "CUDA_HOME": str(tmp_path)}) == made
    with pytest.raises(SanitizerMissing, match="neither on PATH nor below CUDA_HOME or CUDA_PATH: it comes with"):
        located({"PATH": os.devnull, "CUDA_HOME": str(tmp_path / "elsewhere")})


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (f"log.write_text({CLEAN!r})", Status.PASSED, ""),
        (f"log.write_text({LOG!r}); sys.exit({ERRORS})", Status.FAILED, "memcheck found 8: Invalid __global__ read"),
        (f"log.write_text({LOG!r}); print('apply raised'); sys.exit({RAISED})", Status.FAILED, "memcheck found 8: "),
        (f"log.write_text({CLEAN!r}); print('apply raised X'); sys.exit({RAISED})", Status.FAILED, "apply raised X"),
        (f"log.write_text({CLEAN!r}); print('no such'); sys.exit({REFUSED})", Status.NOT_APPLICABLE, "no such"),
        (f"log.write_text({CLEAN!r}); sys.exit(-11)", Status.FAILED, "the process ended with status"),
        ("print('Device not supported'); sys.exit(1)", Status.NOT_RUN, "did not run here (status 1): Device not"),
    ],
)
def test_what_becomes_of_a_case(tmp_path: Path, body: str, status: Status, reason: str) -> None:
    case = Case(tokens=3)
    (result,) = sanitize(SUBJECT, HERE, program(tmp_path, body), ["memcheck"], [case])
    assert (result.status, result.check, result.case) == (status, "computes.sanitizer.memcheck", str(case))
    assert reason in result.reason
    assert result.evidence is (Evidence.HARDWARE if status in (Status.PASSED, Status.FAILED) else None)
    if status is not Status.PASSED:
        assert result.reproduce == f"python -m fp8moe sanitize TorchExperts --tool memcheck --case {case}"


def test_the_case_runs_in_the_process_that_is_watched(tmp_path: Path) -> None:
    body = f"import subprocess; log.write_text({CLEAN!r}); sys.exit(subprocess.run(sys.argv[11:]).returncode)"
    here = Target("cpu", PLATFORMS["cpu"], "cpu")
    (result,) = sanitize(SUBJECT, here, program(tmp_path, body), ["memcheck"], [Case(tokens=3)])
    assert result.status is Status.PASSED, result.reason


def test_cases_that_run_here_are_chosen_for_every_scheme() -> None:
    chosen = chosen_cases(SUBJECT, Target("cpu", PLATFORMS["cpu"], "cpu"), 2)
    assert {case.scheme for case in chosen} >= {"block", "channel_tok", "tensor_static", "none"}
    assert all(case.tokens % 16 and case.hidden % 128 and case.inter % 128 for case in chosen)


def test_the_faults_that_no_output_shows_are_planted() -> None:
    assert set(vars(UNSEEN)) == {"reads_past_the_weights", "reads_unwritten_rows"}
