"""Every check of what a backend computes, by id, and how one is run: on one case, to one result.

A check is a function of a `Trial` that returns where the backend passes and raises `Ended` where it does not. Whatever
else it raises is an error of the suite, and no verdict on the backend.
"""

from __future__ import annotations

from collections.abc import Mapping

from conformance.cases import Case
from conformance.computes import equivalence
from conformance.matrix import EQUIVALENCE
from conformance.named_check import Check, Exactness
from conformance.oracles import forget
from conformance.plan import Subject, Target
from conformance.relations import RELATIONS
from conformance.results import CheckResult, Status
from conformance.trial import Ended, Trial

__all__ = ["CHECKS", "EQUIVALENCE", "check_case", "reproduction", "tried"]

CHECKS: Mapping[str, Check] = {
    check.id: check
    for check in (
        Check(
            EQUIVALENCE,
            "the output is what the oracles say, bit for bit where the arithmetic is declared, else within the bound",
            Exactness.BOUND,
            equivalence,
        ),
        *RELATIONS,
    )
}


def check_case(case: Case, subject: Subject, target: Target, check: str = EQUIVALENCE) -> CheckResult:
    """The verdict of one check on one case; a backend's own exception is its failure, the suite's own is not caught.

    Raises:
        KeyError: no such check.
    """
    return tried(case, subject, target, check)[0]


def tried(
    case: Case, subject: Subject, target: Target, check: str, *, keep: bool = False, explain: bool = False
) -> tuple[CheckResult, Trial | None]:
    """As `check_case`, with what the verdict was come to by; None where the case has nothing to show for the check.

    Args:
        keep: the outputs, in `Trial.kept`.
        explain: keep the calls that were compared last, in `Trial.compared`.
    """
    chosen = CHECKS[check]
    why_not = chosen.why_not(case)
    if why_not:
        left = CheckResult(
            "computes", check, Status.NOT_APPLICABLE, subject.name, case.scheme, str(case), reason=why_not
        )
        return left, None
    trial = Trial(case, subject, target)
    trial.kept = [] if keep else None
    trial.compared.kept = explain
    status, reason = Status.PASSED, ""
    try:
        trial.start()
        chosen.run(trial)
    except Ended as ended:
        status, reason, trial.judgement = ended.status, str(ended), ended.judgement or trial.judgement
        trial.mismatch = ended.mismatch
    if status is Status.FAILED:
        forget()  # whatever went wrong may have left its marks in tensors that others would get
    judgement = trial.judgement
    judged = status in (Status.PASSED, Status.FAILED)
    result = CheckResult(
        "computes",
        check,
        status,
        subject.name,
        case.scheme,
        str(case),
        reason,
        None if judgement is None else judgement.error_over_bound,
        trial.evidence if judged else None,
        {} if judgement is None else dict(judgement.statistics),
        "" if status is Status.PASSED else reproduction(case, subject, target, check),
        judged_by=trial.judged_by if judged else "",
        measured=dict(judgement.sums) if judgement is not None and status is Status.PASSED else {},
        digest=trial.digest if judged else "",
    )
    return result, trial


def reproduction(case: Case, subject: Subject, target: Target, check: str) -> str:
    """The command that runs a check on a case again."""
    return repro_command(case, subject.origin, target.name, check)


def repro_command(case: Case, origin: str, device: str, check: str) -> str:
    """The same, of a backend and a device by their names."""
    which = "" if check == EQUIVALENCE else f" --check {check.removeprefix('computes.')}"
    return f"python -m fp8moe repro {case} --backend {origin} --device {device}{which}"
