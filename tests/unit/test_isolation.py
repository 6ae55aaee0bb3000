"""Which backends a run of pytest judges in a worker, and what follows from what one did there."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from conformance.contain.worker import HUNG
from conformance.isolation import ALL, NONE, OUTSIDE, Isolation
from conformance.plan import Subject, load_subject
from conformance.results import CheckResult, Status
from conformance.session import Session
from conformance.test_computes import Checker, Failing
from conformance.test_performs import why_not_timed
from fp8moe.backends.torch_experts import TorchExperts


class Outside(TorchExperts):
    """By its module's name from outside the tree, as this one is."""


def local() -> Subject:
    class Local(TorchExperts):
        pass

    return Subject("LOCAL", Local, "LOCAL")


OURS = load_subject("TRITON")
OURS_BY_CLASS = load_subject("fp8moe.backends.deepgemm:DeepGemmE8M0Experts")
THEIRS = Subject("THEIRS", Outside, f"{__name__}:Outside")
SUBJECTS = (OURS, OURS_BY_CLASS, THEIRS, local())


def test_those_from_outside_are_unless_no_other_process_finds_them() -> None:
    isolation = Isolation(OUTSIDE, "cpu", SUBJECTS)
    found = [subject.name for subject in SUBJECTS if isolation.reference(subject) is not None]
    assert found == ["THEIRS"]
    reference = isolation.reference(THEIRS)
    assert reference is not None
    assert reference.load() == THEIRS
    assert isolation.header() == [
        "in a worker process: THEIRS",
        "in pytest's own process, which it can end: LOCAL (no other process finds local.<locals>.Local)",
    ]


def test_none_and_all() -> None:
    none = Isolation(NONE, "cpu", SUBJECTS)
    assert all(none.reference(subject) is None for subject in SUBJECTS)
    assert [line.partition(": ")[2].split()[0] for line in none.header()] == ["THEIRS", "LOCAL"]
    every = Isolation(ALL, "cpu", SUBJECTS[:3])
    assert all(every.reference(subject) is not None for subject in SUBJECTS[:3])


def test_all_takes_classes_by_value_or_sayswhy_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cloudpickle", reason="cloudpickle carries classes that no name leads to")
    subject = local()
    reference = Isolation(ALL, "cpu", [subject]).reference(subject)
    assert reference is not None
    assert reference.pickled
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(ValueError, match=r"^--fp8moe-isolate: .*pip install cloudpickle"):
        Isolation(ALL, "cpu", [subject])


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, OUTSIDE),
        ({"--fp8moe-isolate": "all"}, ALL),
        ({"--fp8moe-isolate": "none"}, NONE),
        ({"usepdb": True}, NONE),
        ({"trace": True}, NONE),
        ({"usepdb": True, "--fp8moe-isolate": "all"}, ALL),
    ],
)
def test_what_the_options_come_to(options: dict[str, Any], mode: str) -> None:
    """A debugger sees a backend that is in its own process; what was asked for goes before it."""
    given = {
        "--fp8moe-device": "cpu",
        "--fp8moe-backend": ["TorchExperts"],
        "--fp8moe-scheme": ["block"],
        "--fp8moe-examples": 1,
        "--fp8moe-budget": None,
        "--fp8moe-report": None,
        "--fp8moe-seed": 0,
        "--fp8moe-isolate": None,
    }
    config: Any = SimpleNamespace(getoption=lambda name, default=None: {**given, **options}.get(name, default))
    assert Session.of(config).isolation.mode == mode


def failing(**measured: float) -> Failing:
    return Failing(
        CheckResult(
            "computes", "computes.equivalence", Status.FAILED, "THEIRS", "block", "v1:M=33", "why", measured=measured
        )
    )


@pytest.mark.parametrize(("measured", "asks"), [({}, True), ({HUNG: 600.0}, False)])
def test_a_hang_is_not_made_smaller(measured: dict[str, float], asks: bool) -> None:
    """Each smaller case would be waited for as long."""
    asked = []

    def judge(case: object, *_: object) -> CheckResult:
        asked.append(case)
        return failing().result

    session: Any = SimpleNamespace(judge=judge, convicted=set())
    cell: Any = SimpleNamespace(id="THEIRS-block", activations=("silu",), subject=THEIRS)
    told = Checker(cell, session, []).told(failing(**measured))
    assert "THEIRS does not compute v1:M=33" in told
    assert bool(asked) == asks
    assert session.convicted == {"THEIRS-block"}


def test_what_has_ended_a_worker_is_not_timed() -> None:
    """Times are taken in pytest's own process."""
    isolation = Isolation(OUTSIDE, "cpu", SUBJECTS)
    session: Any = SimpleNamespace(budget_is_spent=False, isolation=isolation)
    isolation.ended["THEIRS"] = "it ended the process with status 0"
    assert why_not_timed("TRITON", session) == ""
    assert why_not_timed("THEIRS", session).startswith("it ended the process with status 0 when it was judged")
