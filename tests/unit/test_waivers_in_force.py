"""Which waivers hold in a run, what they do to results, and when they are rotten; without a backend or a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from conformance.cases import Case
from conformance.contain import SubjectRef, WorkerEnded
from conformance.levels import Item
from conformance.planned import Plan, smallest
from conformance.results import CheckResult, Status
from conformance.waivers import parse_waivers
from conformance.waivers.in_force import InForce, is_known
from conformance.waivers.release import Release
from tests.unit.waiver_files import TODAY, written

EQUIVALENCE, REPEAT = "computes.equivalence", "computes.relation.repeat"
ITEMS = [Item(EQUIVALENCE, Case(tokens=number), "pinned cases") for number in range(100)]
PLAN = Plan("ACME", "NVIDIA H200", [], ITEMS, {"block": ("silu",)}, False)
HERE = Release("acme-kernels", "1.3+cu129")


def result(tokens: int, status: Status = Status.FAILED) -> CheckResult:
    case = str(Case(tokens=tokens))
    return CheckResult("computes", EQUIVALENCE, status, "ACME", "block", case, "token 3: expected 1, got 2")


def in_force(*waivers: dict[str, object], plan: Plan = PLAN, release: Release = HERE) -> InForce:
    """Of a file whose waivers are for M=7, where they do not say else."""
    file = parse_waivers(written(*({"case": "M=7"} | waiver for waiver in waivers)), "acme.toml", today=TODAY)
    return InForce(file, plan, "acme.moe:SPEC", "cuda", release, TODAY)


def judged(found: InForce, *results: CheckResult, stopped: str = "", more: Sequence[Item] = ()) -> CheckResult:
    by_key = {(one.check, one.case): one for one in results}
    (told,) = found.result(by_key, stopped, lambda: more)
    return told


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        ({}, True),
        ({"backend": "acme.moe:SPEC"}, True),
        ({"backend": "OTHER"}, False),
        ({"backend": "TRITON"}, False),
        ({"device": "NVIDIA*"}, True),
        ({"device": "cuda"}, True),
        ({"device": "*"}, True),
        ({"device": "NVIDIA H100"}, False),
        ({"backend_version": "==1.3"}, True),
        ({"backend_version": "<1.3"}, False),
        ({"backend_version": ">=1.4.dev0"}, False),
        ({"expires": TODAY.isoformat()}, True),
    ],
)
def test_which_hold(fields: dict[str, object], holds: bool) -> None:
    found = in_force(fields)
    assert bool(found.waivers) is holds
    assert found.rotten == []
    told = judged(found, result(7, Status.WAIVED))
    assert told.status is Status.PASSED
    assert told.scope.startswith(f"{int(holds)} of 1 waiver for ACME on NVIDIA H200, acme-kernels 1.3+cu129")


def test_what_does_not_hold_here_is_told_with_why() -> None:
    version, device = {"backend_version": "<1.3", "case": "M=8"}, {"device": "NVIDIA H100", "case": "M=9"}
    told = judged(in_force({}, version, device, {"backend": "TRITON"}))
    assert told.status is Status.PASSED
    assert told.scope.endswith("; not in force here: waiver 2 is for versions <1.3, waiver 3 is for device NVIDIA H100")
    told = judged(in_force(*({"backend_version": "<1.3", "case": f"M={n}"} for n in range(7))))
    assert told.scope.endswith("waiver 5 is for versions <1.3 and 2 more")


def test_a_class_of_an_installed_package_is_known() -> None:
    names = ("TRITON", "TorchExperts", "fp8moe.backends.torch_experts:TorchExperts", "ACNE", "no_such_package.a:B")
    assert [is_known(name) for name in names] == [True, True, True, False, False]


def test_a_name_that_nothing_has_is_told() -> None:
    told = judged(in_force({}, {"backend": "ACNE"}, {"backend": "TRITON"}, {"backend": "TorchExperts"}))
    assert told.status is Status.PASSED
    assert told.scope.startswith("1 of 4 waivers for ACME")
    assert told.scope.endswith("; backends that are not known here: ACNE")


def test_a_release_before_a_range_begins() -> None:
    assert in_force({"backend_version": ">=1.2"}, release=Release("acme-kernels", "1.3.dev7")).waivers


def test_a_failure_that_is_covered_is_waived_and_nothing_else() -> None:
    found = in_force({})
    waived = found.applied(ITEMS[7], result(7))
    assert waived.status is Status.WAIVED
    assert waived.reason == (
        "waived (Kernels team, https://tracker.example/12, until 2026-04-01): the tail of a group is added twice; "
        "what failed: token 3: expected 1, got 2"
    )
    assert found.applied(ITEMS[8], result(8)) == result(8)
    for one in (result(7, status) for status in Status if status is not Status.FAILED):
        assert found.applied(ITEMS[7], one) is one


def test_a_waived_result_is_kept_under_the_same_waiver_alone() -> None:
    found = in_force({})
    waived, before = found.applied(ITEMS[7], result(7)), [waiver.told() for waiver in found.waivers]
    assert found.keeps(ITEMS[7], waived, before)
    assert not found.keeps(ITEMS[7], waived, [])
    assert not found.keeps(ITEMS[7], replace(waived, reason="waived (nobody)"), before)
    for fields in ({"owner": "nobody"}, {"expires": "2026-05-01"}, {"backend_version": ">=1"}, {"case": "M=8"}):
        assert not in_force(fields).keeps(ITEMS[7], waived, before)


ROTTEN: list[tuple[dict[str, Any], list[CheckResult], str]] = [
    ({"expires": "2026-02-28"}, [], "has expired: remove it, or renew expires with a reason why"),
    ({"expires": "2026-02-28", "device": "NVIDIA H100"}, [], "has expired"),
    ({"case": "M=100"}, [], "covers none of the cases for this backend on this device: correct its check or case"),
    ({"check": REPEAT}, [], "covers none of the cases"),
    (
        {},
        [result(7, Status.PASSED)],
        "covers cases that pass (all of them, such as computes.equivalence on v1:M=7)",
    ),
    ({}, [result(7, Status.NOT_SUPPORTED)], "covers only cases that the backend does not take: remove it"),
    ({}, [result(7, Status.NOT_APPLICABLE)], "covers only cases that the backend does not take"),
    ({"case": "*"}, [], "covers 100 of the 100 cases that must pass (100.0%), at most 5%: narrow"),
    (
        {"case": "scheme=block"},
        [*(result(n, Status.NOT_SUPPORTED) for n in range(50)), result(60), result(61, Status.PASSED)],
        "covers cases that pass (1 of 50, such as computes.equivalence on v1:M=61): remove it, or narrow it",
    ),
]


@pytest.mark.parametrize(("fields", "results", "words"), ROTTEN, ids=[words for *_, words in ROTTEN])
def test_what_is_rotten_is_told(fields: dict[str, object], results: list[CheckResult], words: str) -> None:
    told = judged(in_force(fields), *results)
    assert (told.verdict, told.check, told.status) == ("computes", "computes.waivers", Status.FAILED)
    assert told.reason.startswith("acme.toml: waiver 1 (computes.")
    assert words in told.reason


def test_one_in_twenty_and_all_together() -> None:
    five = [{"case": f"M={n}"} for n in range(5)]
    assert judged(in_force(*five), stopped="later").status is Status.NOT_RUN
    told = judged(in_force(*five, {"case": "M=5"}))
    assert told.status is Status.FAILED
    assert "the waivers together cover 6 of the 100 cases that must pass (6.0%), at most 5%" in told.reason
    # The same cases twice count once, and what the backend does not take does not count among what must pass.
    same = [{"case": f"v1:M={n}"} for n in range(5)]
    assert judged(in_force(*five, *same)).status is Status.PASSED
    assert judged(in_force(*five), result(99, Status.NOT_SUPPORTED)).status is Status.FAILED


def test_without_a_version_no_range_holds() -> None:
    found = in_force({}, release=Release("vllm", why="its operators come from a folder"))
    assert found.waivers == []
    assert "is for versions >=1.2,<1.4, and which is here cannot be told: vllm (its operators" in judged(found).reason


def test_a_case_that_was_not_run_is_not_missing() -> None:
    told = judged(in_force({}), stopped="the budget of 1 s was spent")
    assert told.status is Status.NOT_RUN
    assert told.reason == "the budget of 1 s was spent: not every case that they cover was run"


def test_a_case_of_another_level_is_not_missing() -> None:
    more = [Item(REPEAT, Case(tokens=7), "relations")]
    assert judged(in_force({"check": REPEAT}), more=more).status is Status.PASSED

    def ended() -> Sequence[Item]:
        raise WorkerEnded("it hung")

    assert in_force({"check": REPEAT}).result({}, "", ended)[0].status is Status.PASSED


def test_nothing_is_told_where_nothing_was_planned() -> None:
    nothing = replace(PLAN, items=[])
    assert in_force({}, plan=nothing).result({}, "", list) == []
    assert in_force({}, plan=nothing, release=Release("vllm", why="it is not installed")).result({}, "", list) == []
    assert in_force({"expires": "2026-02-28"}, plan=nothing).result({}, "", list)[0].status is Status.FAILED


def test_a_failure_does_not_shrink_into_one_that_is_waived() -> None:
    class Failing:
        """Whatever it is asked, it fails."""

        def run(self, job: Any) -> CheckResult:
            return replace(result(0), case=job.case)

    large = replace(result(0), case=str(Case(tokens=64, law="skewed")))
    found = in_force({"case": "M=16"})
    worker: Any = Failing()
    ref = SubjectRef.named("TorchExperts")
    plain = smallest(worker, ref, large, 5.0)
    spared = smallest(worker, ref, large, 5.0, found.covering)
    assert Case.parse(plain.case).tokens == 16
    assert Case.parse(spared.case).tokens == 17
