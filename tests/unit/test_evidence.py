"""The class of a result's evidence is that of what ran, and a heading says no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from conformance.results import Evidence, place
from fp8moe.commands.check import print_report
from tests.unit.certificates import invented
from tests.unit.command_line import python

CODE = """
import json
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl
from conformance.cases import Case
from conformance.checks import check_case
from conformance.plan import Subject, resolve_target
from conformance.probe.backend import probe_backend
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.recipe import Arithmetic, Contract

def copied(source, target, size: tl.constexpr):
    at = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(target + at, tl.load(source + at))

from triton.runtime.interpreter import InterpretedFunction
copied = InterpretedFunction(copied)

class Own(TorchExperts):
    contract = Contract(arithmetic=Arithmetic.on("hopper.wgmma", promote_every=128))
    def experts(self, *given):
        found = super().experts(*given).contiguous()
        made = torch.empty_like(found)
        copied[(found.numel() // 128,)](found, made, 128)
        return made

case, target = Case.parse("v1:M=3,E=2,H=128,I=128"), resolve_target("interpreter")
told = []
for cls in (TorchExperts, Own, TorchExperts):
    subject = Subject(cls.__name__, cls, "mine:Class")
    for result in (check_case(case, subject, target), probe_backend(subject, target)):
        told.append((cls.__name__, result.status.value, result.evidence.value))
print(json.dumps(told))
"""


def test_what_a_vendors_own_kernels_did_in_the_interpreter_ran_on_no_device() -> None:
    """Its class is derived from none of ours; its fingerprint there is that of numpy, and no lie of its declaration."""
    done = python(CODE)
    assert done.returncode == 0, done.stderr
    plain, own = ["passed", "hardware"], [["passed", "simulated"], ["not_applicable", "simulated"]]
    assert json.loads(done.stdout) == [
        ["TorchExperts", *plain],
        ["TorchExperts", *plain],
        ["Own", *own[0]],
        ["Own", *own[1]],
        ["TorchExperts", *plain],
        ["TorchExperts", *plain],
    ]


@pytest.mark.parametrize(
    ("target", "evidence", "told"),
    [
        ("interpreter", [Evidence.HARDWARE, None], "cpu"),
        ("interpreter", [Evidence.HARDWARE, Evidence.SIMULATED], "interpreter"),
        ("interpreter", [None], "interpreter"),
        ("cuda", [Evidence.HARDWARE], "cuda"),
    ],
)
def test_nothing_ran_in_the_interpreter(target: str, evidence: Sequence[Evidence | None], told: str) -> None:
    assert place(target, evidence) == told


def test_a_report_says_what_its_evidence_is(capsys: pytest.CaptureFixture[str]) -> None:
    report = replace(invented(), target="interpreter")
    count = sum(check.evidence is Evidence.HARDWARE for check in report.checks)
    assert report.evidence == {"hardware": count}
    print_report(report)
    told = capsys.readouterr().out.splitlines()
    assert " on cpu, " in told[0]
    assert told[2] == f"evidence: hardware ({count} results)"
    first = next(number for number, check in enumerate(report.checks) if check.evidence is not None)
    checks = list(report.checks)
    checks[first] = replace(checks[first], evidence=Evidence.SIMULATED)
    print_report(replace(report, checks=checks))
    told = capsys.readouterr().out.splitlines()
    assert " on interpreter, " in told[0]
    assert told[2] == f"evidence: simulated (1 result), hardware ({count - 1} results)"
