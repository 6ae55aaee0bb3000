"""Which backends a run of pytest judges in a worker, and what follows from what one did there."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
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
from fp8moe.registry import register_backend, unregister_backend


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
        "in pytest's own process, which it can end: LOCAL (no other process finds local.<locals>.Local: "
        "give it a name at the top of a module on the import path)",
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


def session(*backends: str) -> Session:
    given = {"--fp8moe-device": "cpu", "--fp8moe-backend": list(backends), "--fp8moe-examples": 1, "--fp8moe-seed": 0}
    given |= {"--fp8moe-scheme": ["block"]}
    config: Any = SimpleNamespace(getoption=lambda name, default=None: given.get(name, default))
    return Session.of(config)


def made() -> type[TorchExperts]:
    class Made(TorchExperts):
        pass

    return Made


Made = made()


def test_results_are_not_kept_under_one_name_of_two() -> None:
    with pytest.raises(
        ValueError, match=r"^--fp8moe-backend=fp8moe\.\S+:TorchExperts: .* which is TorchExperts: judge one"
    ):
        session("TorchExperts", "fp8moe.backends.torch_experts:TorchExperts")


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), SystemExit(0), pytest.skip.Exception("no"), pytest.exit.Exception("no", returncode=0)]
)
def test_a_predicate_that_raises_is_told_by_its_backends_name(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicate(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Outside, "is_supported_config", staticmethod(predicate))
    kind = type(error).__name__
    with pytest.raises(ValueError, match=rf"^asking {__name__}:Outside what it takes raised {kind}.*--fp8moe-backend$"):
        session(f"{__name__}:Outside")


def test_a_backend_that_a_call_registered_is_told_by_the_place_of_its_class() -> None:
    """No other process knows the name, nor does `fp8moe repro` in one."""
    register_backend("BY_CALL", Outside)
    try:
        (cell,) = session("BY_CALL").cells
        assert (cell.subject.name, cell.subject.origin) == ("BY_CALL", f"{__name__}:Outside")
    finally:
        unregister_backend("BY_CALL")


def test_a_class_that_a_function_made_is_found_where_it_is_kept() -> None:
    subject = load_subject(f"{__name__}:Made")
    reference = Isolation(OUTSIDE, "cpu", [subject]).reference(subject)
    assert reference is not None
    assert reference.load() == subject


def test_a_class_that_a_function_made_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "acme-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fp8moe.backends]\nMADE = {__name__} : Made [fast]\n")
    monkeypatch.syspath_prepend(tmp_path)
    subject = Subject("MADE", Made, "MADE")
    assert Isolation(OUTSIDE, "cpu", [subject]).reference(subject) is not None
    other = Subject("MADE", made(), "MADE")
    assert Isolation(OUTSIDE, "cpu", [other]).reference(other) is None


@pytest.mark.parametrize(("kind", "is_found"), [("__editable___acme_1_0_finder", True), ("conftest", False)])
def test_a_class_of_an_editable_install_is_found(
    kind: str, is_found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build tool's finder is in every process of the environment; one that a test has put there is not."""
    package = tmp_path / "src" / "acme_editable"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "experts.py").write_text(
        "from fp8moe.backends.torch_experts import TorchExperts\n\n\nclass Acme(TorchExperts):\n    pass\n"
    )

    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != package.name:
            return None
        return spec_from_file_location(name, package / "__init__.py", submodule_search_locations=[str(package)])

    finder = type("Finder", (), {"__module__": kind, "find_spec": staticmethod(find_spec)})
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    subject = load_subject("acme_editable.experts:Acme")
    try:
        assert (Isolation(OUTSIDE, "cpu", [subject]).reference(subject) is not None) is is_found
    finally:
        for name in ("acme_editable", "acme_editable.experts"):
            del sys.modules[name]


def failing(**measured: float) -> Failing:
    return Failing(
        CheckResult(
            "computes", "computes.equivalence", Status.FAILED, "THEIRS", "block", "v1:M=33", "why", measured=measured
        )
    )


@pytest.mark.parametrize(
    ("measured", "asks", "mode"), [({}, True, OUTSIDE), ({HUNG: 600.0}, False, OUTSIDE), ({}, True, NONE)]
)
def test_a_hang_is_not_made_smaller(measured: dict[str, float], asks: bool, mode: str) -> None:
    """Each smaller case would be waited for as long."""
    asked = []

    def judge(case: object, *_: object) -> CheckResult:
        asked.append(case)
        return failing().result

    isolation = Isolation(mode, "cpu", SUBJECTS)
    session: Any = SimpleNamespace(judge=judge, convicted=set(), isolation=isolation)
    cell: Any = SimpleNamespace(id="THEIRS-block", activations=("silu",), subject=THEIRS)
    told = Checker(cell, session, []).told(failing(**measured))
    assert ("--fp8moe-no-isolate" in told) == (mode == OUTSIDE)
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
