"""Planted faults: `pytest conformance` fails for each, and names the case, the place and the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.build import build
from conformance.cases import Case
from conformance.checks import check_case
from conformance.plan import Subject, Target
from conformance.results import Status
from conformance.shrink import non_default_fields
from conformance.trial import run
from conformance.zoo import FAULTS, TORCH
from conformance.zoo.around import AROUND
from conformance.zoo.attackers import ATTACKERS
from conformance.zoo.inside import INSIDE
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.platforms import PLATFORMS

ROOT = Path(__file__).parents[2]
HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
ORDINARY = Case(tokens=64, experts=8, top_k=4, seed=5)


def output_of(cls: type, case: Case) -> torch.Tensor:
    tensors = build(case)
    return run(cls(tensors.config, tensors.quant, tensors.weights), tensors).double()


FIRST = {fault.name: fault for fault in (*AROUND, *INSIDE)}
"""The first zoo, which a whole run of the suite is shown on; `fp8moe zoo --score` runs all of them."""


@pytest.mark.parametrize("name", [name for name, fault in FIRST.items() if fault.subtle])
def test_a_subtle_fault_hides_from_the_cosine(name: str) -> None:
    """And it does change the output: no mutant is a no-op."""
    right, wrong = output_of(TorchExperts, ORDINARY), output_of(getattr(TORCH, name), ORDINARY)
    assert not torch.equal(right, wrong), "the fault changes nothing here"
    cosine = torch.nn.functional.cosine_similarity(right.flatten(), wrong.flatten(), dim=0)
    assert cosine > 0.99


def test_at_least_five_are_subtle() -> None:
    assert sum(fault.subtle for fault in FIRST.values()) >= 5


def test_the_zoo_is_as_large_as_it_says() -> None:
    """And no two mutants share a name or a defect of the catalogue."""
    named = [fault.catalogue for fault in FAULTS.values() if fault.catalogue]
    assert len(FAULTS) >= 90
    assert len(named) == len(set(named)) >= 70
    assert len(ATTACKERS) >= 8


def run_suite(names: list[str], zoo: str, report: Path, device: str) -> subprocess.CompletedProcess[str]:
    """`pytest conformance` on these mutants, in a process of its own."""
    backends = [f"--fp8moe-backend=conformance.zoo:{zoo}.{name}" for name in names]
    command = [sys.executable, "-m", "pytest", "conformance", "-m", "computes", "-q", "-p", "no:cacheprovider"]
    command += [*backends, "--fp8moe-scheme=block", f"--fp8moe-device={device}", f"--fp8moe-report={report}"]
    left_out = ("VLLM_", "TRITON_INTERPRET", "PYTEST_")  # the last: options of the run that we are part of
    env = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


def assert_all_convicted(names: list[str], zoo: str, tmp_path: Path, device: str) -> None:
    report = tmp_path / "report.json"
    done = run_suite(names, zoo, report, device)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-2000:]
    results = json.loads(report.read_text())["results"]
    for name in names:
        failed = [r for r in results if r["backend"] == f"{zoo}.{name}" and r["status"] == "failed" and "case" in r]
        assert failed, f"{zoo}.{name} was not convicted:\n{done.stdout[-3000:]}"
        for result in failed:
            assert re.search(r"token \d+|NaN|zero|raised", result["reason"]), result["reason"]
            assert f"fp8moe repro {result['case']} --backend conformance.zoo:{zoo}.{name}" in result["reproduce"]
            assert result["case"] in done.stdout
        simplest = min(len(non_default_fields(Case.parse(result["case"]))) for result in failed)
        assert simplest <= 3, [result["case"] for result in failed]


def test_every_fault_in_torch_experts_is_convicted(tmp_path: Path) -> None:
    assert_all_convicted(list(FIRST), "TORCH", tmp_path, "cpu")


@pytest.mark.parametrize("zoo", ["TRITON", "BATCHED_TRITON"])
def test_faults_around_our_kernels_are_convicted(zoo: str, device: str, tmp_path: Path) -> None:
    """All on a GPU; in the interpreter, which takes minutes for all, one: the next test has a case of each."""
    if zoo != "TRITON" and device == "interpreter":
        pytest.skip("a run of the whole suite in the interpreter is shown once, with TRITON")
    names = [fault.name for fault in AROUND]
    assert_all_convicted(names if device == "cuda" else ["output_truncated"], zoo, tmp_path, device)


AROUND_KERNELS = Case(tokens=16, experts=2, values="exact_sums", seed=1)
LAW_THAT_SHOWS = {"duplicate_dropped": "repeated", "renormalised": "unnormalised"}


def test_each_fault_around_our_kernels_is_convicted_on_its_case(
    verdicts: Callable[[Sequence[tuple[str, str, str]]], list[dict[str, Any]]],
) -> None:
    """In both formats, and the honest backends pass the same cases."""
    asked = []
    for zoo in ("TRITON", "BATCHED_TRITON"):
        for law in ("uniform", *LAW_THAT_SHOWS.values()):
            asked.append((zoo, "", str(replace(AROUND_KERNELS, law=law))))
        for fault in AROUND:
            law = LAW_THAT_SHOWS.get(fault.name, "uniform")
            asked.append((zoo, fault.name, str(replace(AROUND_KERNELS, law=law))))
    for (zoo, name, case), found in zip(asked, verdicts(asked), strict=True):
        assert found["status"] == ("failed" if name else "passed"), f"{zoo}.{name} on {case}: {found}"
        if name:
            assert re.search(r"token \d+|NaN|zero", found["reason"]), found
            assert f"fp8moe repro {case} --backend conformance.zoo:{zoo}.{name}" in found["reproduce"]


def test_a_conviction_can_be_reproduced_and_the_honest_backend_passes_it() -> None:
    case = Case(tokens=17, values="block_scales", seed=1)
    mutant = Subject("mutant", TORCH.expert0_scale, "conformance.zoo:TORCH.expert0_scale")
    assert check_case(case, mutant, HERE).status is Status.FAILED
    assert check_case(case, Subject("TorchExperts", TorchExperts, "TorchExperts"), HERE).status is Status.PASSED
