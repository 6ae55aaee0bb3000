"""Waivers in a run of `check_backend`: a planted fault on one scheme passes under them, and they cannot rot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from conformance import check_backend
from conformance.report import Report
from conformance.results import CheckResult, Status
from fp8moe import FusedMoEActivationFormat, Support
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.commands.check import print_report
from fp8moe.keys import GroupShape
from fp8moe.schemes import BLOCK, CHANNEL_TOKEN
from tests.unit.waiver_files import in_days, in_folder

pytest.importorskip("cloudpickle", reason="classes that are local to a function travel by cloudpickle, a dev extra")

MANY = 128
"""Tokens, of which the planted fault takes more amiss. Two cases of level smoke have that, of 88 on its scheme."""


def planted(*, mended: bool = False) -> type[TorchExperts]:
    class Planted(TorchExperts):
        """Of two schemes, one is computed wrongly for many tokens."""

        support = Support(
            device=lambda platform, env: True,
            needs="nothing",
            scheme=lambda platform, weight_key, activation_key: (weight_key, activation_key) in (BLOCK, CHANNEL_TOKEN),
            activations=frozenset({"silu"}),
            activation_format=FusedMoEActivationFormat.Standard,
        )

        def apply(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = super().apply(hidden_states, *args, **kwargs)
            per_channel = self.quant.w1.shape == GroupShape.PER_CHANNEL
            return result.mul_(1.5) if per_channel and len(hidden_states) > MANY and not mended else result

    return Planted


def waiver(tokens: int, **fields: object) -> dict[str, object]:
    known: dict[str, object] = {
        "case": f"scheme=channel_tok,M={tokens}",
        "backend": "Planted",
        "backend_version": ">=0",
        "device": "cpu",
        "expires": in_days(90),
    }
    return known | fields


def checked(cls: type[TorchExperts], *waivers: dict[str, object], folder: Path, **options: Any) -> Report:
    return check_backend(cls, device="cpu", waivers=in_folder(folder, *waivers) if waivers else None, **options)


def told_of(report: Report) -> CheckResult:
    return next(check for check in report.checks if check.check == "computes.waivers")


def test_known_failures_pass_while_they_are_waived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = (waiver(130), waiver(300, owner="GEMM team"))
    report = checked(planted(), *both, folder=tmp_path)
    assert report.verdict == "passed", [failure.reason for failure in report.failures]
    assert [check.case for check in report.waived] == [
        "v1:E=4,H=136,I=72,M=130,scheme=channel_tok,values=loud_quiet,seed=14",
        "v1:E=4,k=1,H=128,I=24,M=300,scheme=channel_tok,law=last,seed=16",
    ]
    for check, owner in zip(report.waived, ("Kernels team", "GEMM team"), strict=True):
        assert check.reason.startswith(f"waived ({owner}, https://tracker.example/12, until {in_days(90)}): the tail")
        assert "; what failed: E1 = " in check.reason
        assert check.reproduce
    assert told_of(report).status is Status.PASSED
    assert told_of(report).scope.endswith("2 of 176 cases covered, 2 waived")
    assert [kept["owner"] for kept in report.waivers] == ["Kernels team", "GEMM team"]
    assert Report.from_json(report.to_json()) == report
    print_report(report)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("passed with 2 waived: selects passed, computes passed")
    assert "WAIVED computes.equivalence v1:E=4,k=1,H=128" in printed
    assert "waived 2" in printed

    # What a run to go on with has waived stays so under the same waivers alone; there is no time to run anything here.
    again = checked(planted(), *both, folder=tmp_path, resume=report, budget_s=0.0)
    assert again.waived == report.waived
    assert told_of(again).status is Status.NOT_RUN
    fewer = checked(planted(), both[0], waiver(300, owner="nobody"), folder=tmp_path, resume=report, budget_s=0.0)
    assert fewer.waived == report.waived[:1]
    assert fewer.verdict == "incomplete"
    assert checked(planted(), folder=tmp_path, resume=report, budget_s=0.0).waived == []
    expired = checked(planted(), both[0], waiver(300, expires=in_days(-1)), folder=tmp_path, resume=report)
    assert expired.waived == report.waived[:1]
    assert {failure.check for failure in expired.failures} == {"computes.equivalence", "computes.waivers"}
    # And a failure that is covered now is run again, also when it was made smaller before.
    assert expired.unshrunk
    renewed = checked(planted(), *both, folder=tmp_path, resume=Report.from_json(expired.to_json()))
    assert (renewed.verdict, [check.case for check in renewed.waived]) == (
        "passed",
        [check.case for check in report.waived],
    )


def test_an_expired_waiver_waives_nothing_and_fails_the_run(tmp_path: Path) -> None:
    expired, holds = waiver(130, expires=in_days(-1)), waiver(300)
    report = checked(planted(), expired, holds, folder=tmp_path, stop_at_first=True)
    assert report.verdict == "failed"
    assert any("M=130" in failure.case for failure in report.failures)
    found = told_of(report)
    assert found.status is Status.FAILED
    assert "waiver 1 (computes.equivalence on scheme=channel_tok,M=130; Kernels team" in found.reason
    assert "has expired: remove it, or renew expires with a reason" in found.reason
    assert "waiver 2" not in found.reason
    assert [kept["case"] for kept in report.waivers] == ["scheme=channel_tok,M=300"]


def test_a_waiver_of_what_passes_fails_the_run(tmp_path: Path) -> None:
    report = checked(planted(mended=True), waiver(130), waiver(300), folder=tmp_path)
    assert report.verdict == "failed"
    assert report.failures == [told_of(report)]
    assert "waiver 1 (" in told_of(report).reason
    assert "waiver 2 (" in told_of(report).reason
    assert "covers cases that pass (all of them, such as computes.equivalence on v1:" in told_of(report).reason


def test_what_was_planned_counts_and_not_what_a_budget_left(tmp_path: Path) -> None:
    report = checked(planted(), waiver(130), waiver(300), folder=tmp_path, budget_s=0.0)
    assert (report.verdict, report.failures, told_of(report).status) == ("incomplete", [], Status.NOT_RUN)
    assert "the budget of 0 s was spent" in told_of(report).reason
    report = checked(planted(), waiver(131), folder=tmp_path, budget_s=0.0)
    assert (report.verdict, report.failures) == ("failed", [told_of(report)])
    assert "covers none of the cases for this backend on this device" in told_of(report).reason
    seeds = {"case": "v1:E=4,k=3,H=128,I=128,M=8,seed=3", "check": "computes.relation.repeat"}
    report = checked(planted(), waiver(0, **seeds), folder=tmp_path, budget_s=0.0)
    assert (report.verdict, report.failures) == ("incomplete", []), "certify has that case"


@pytest.mark.parametrize("content", [None, "[[waiver]]\nchek = 1", b"\xff"])
def test_a_file_that_is_none(content: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"waivers: .*waivers\.toml"):
        check_backend("TorchExperts", device="cpu", waivers=path)
