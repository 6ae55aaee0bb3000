"""Runs cases of one backend under the tools, each pair in a process of its own, and makes results of what is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from conformance.cases import Case
from conformance.pinned import pinned_cases
from conformance.plan import Subject, Target, plan
from conformance.results import CheckResult, Evidence, Status
from conformance.sanitizer.tool import ERRORS, RAISED, REFUSED, UNAVAILABLE, command_for, read_log

CHECK = "computes.sanitizer"
ONE = "conformance.sanitizer.one"
"""Not imported here: it is what a process of its own runs."""
SECONDS = 300.0
"""Of one case under one tool."""
AT_ONCE = 4
LAST_WORDS = 400
Progress = Callable[[int, int, CheckResult], None]
SEPARATE = {
    # Each tensor is an allocation of its own: in torch's pool a load past a tensor's end meets its neighbour.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


def chosen_cases(subject: Subject, target: Target, count: int) -> list[Case]:
    """`count` cases of each scheme that runs here: first two of sizes at which kernels go wrong first (tokens that fill
    no tile, columns that are no multiple of a block, pairs without an expert), then the pinned ones."""
    found: list[Case] = []
    for cell in plan([subject], target):
        if cell.status is None:
            ragged = replace(
                Case(scheme=cell.scheme, activation=cell.activations[0]), tokens=37, hidden=208, inter=144, experts=5
            )
            masked = replace(ragged, law="masked", bias=True, seed=1)
            found += list(dict.fromkeys([ragged, masked, *pinned_cases(cell, small=True)]))[:count]
    return found


def sanitize(
    subject: Subject,
    target: Target,
    program: str,
    tools: Sequence[str],
    cases: Sequence[Case],
    *,
    at_once: int = AT_ONCE,
    progress: Progress | None = None,
) -> list[CheckResult]:
    """One result for each tool and case, in that order.

    Args:
        subject: the backend; its origin has to be importable, since each case is a process of its own.
        target: a CUDA device.
        program: compute-sanitizer's path.
        tools: of `conformance.sanitizer.TOOLS`.
        cases: to run, each under each tool.
        at_once: processes that share the device.
    """
    jobs = [(tool, case) for tool in tools for case in cases]
    done: list[CheckResult] = []
    running: set[subprocess.Popen[str]] = set()

    def run(job: tuple[str, Case]) -> CheckResult:
        result = _one(subject, target, program, *job, running)
        done.append(result)
        if progress is not None:
            progress(len(done), len(jobs), result)
        return result

    threads = ThreadPoolExecutor(at_once)
    try:
        return list(threads.map(run, jobs))
    finally:  # interrupted, what runs is ended and what waits is not begun
        threads.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            _kill(process)


def _one(
    subject: Subject, target: Target, program: str, tool: str, case: Case, running: set[subprocess.Popen[str]]
) -> CheckResult:
    with tempfile.TemporaryDirectory(prefix="fp8moe-sanitizer-") as folder:
        log = Path(folder, "log.txt")
        ours = [sys.executable, "-m", ONE, str(case), subject.origin, target.name]
        status, output = _to_its_end(command_for(program, tool, log, ours), running)
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    verdict, reason = _verdict(tool, status, output, text)
    return CheckResult(
        "computes",
        f"{CHECK}.{tool}",
        verdict,
        subject.name,
        case.scheme,
        str(case),
        reason,
        evidence=Evidence.HARDWARE if verdict in (Status.PASSED, Status.FAILED) else None,
        reproduce=""
        if verdict is Status.PASSED
        else f"python -m fp8moe sanitize {subject.origin} --tool {tool} --case {case}",
    )


def _to_its_end(command: Sequence[str], running: set[subprocess.Popen[str]]) -> tuple[int | None, str]:
    """Exit status, None where time ran out; and what was printed."""
    environment = {**os.environ, **SEPARATE}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.path.abspath(entry) for entry in sys.path)))
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    running.add(process)
    try:
        output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        _kill(process)
        output, _ = process.communicate()
        return None, f"{output}\nstopped after {SECONDS:g} s"
    finally:
        running.discard(process)
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """With all that it started; nothing where it has ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _verdict(tool: str, status: int | None, output: str, log: str) -> tuple[Status, str]:
    """By what the tool found first, then by how the process ended."""
    found = read_log(log)
    if found.errors:
        what = "; ".join(found.findings[:3]) or "what it found is not in its log"
        return Status.FAILED, f"{tool} found {found.errors}: {what}"
    words = " | ".join(list(_last_lines(output))[-3:])[-LAST_WORDS:]
    if status is None:
        return Status.NOT_RUN, f"{tool} did not end within {SECONDS:g} s"
    if status == REFUSED:
        return Status.NOT_APPLICABLE, words
    if status == UNAVAILABLE:
        return Status.NOT_RUN, words
    if status == RAISED:
        return Status.FAILED, f"under {tool}: {words}"
    if found.errors is None:
        return Status.NOT_RUN, f"{tool} did not run here (status {status}): {words or log.strip()[-LAST_WORDS:]}"
    if status in (0, ERRORS):
        return (Status.PASSED, "") if status == 0 else (Status.FAILED, f"{tool} ended with its status for errors")
    return Status.FAILED, f"under {tool} the process ended with status {status}: {words}"


def _last_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.strip() and not line.startswith("========="):
            yield line.strip()
