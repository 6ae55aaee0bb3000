"""What a report's results cannot be: each beside its own figures, all beside one another. For reports that nobody
trusts."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from conformance.cases import Case, InvalidCase
from conformance.certification import NOT_TIMED
from conformance.checks import CHECKS, EQUIVALENCE
from conformance.computes import BOTH_WAYS_SEED
from conformance.editions import Edition
from conformance.matrix import BY_BITS, BY_BOUND
from conformance.oracles import is_small
from conformance.pooling import POOLED
from conformance.predicate import CONTRACT, PREDICATE
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.report import BEYOND, Report
from conformance.results import CheckResult, Evidence, Status
from conformance.vocabulary import SCHEME_NAMES
from conformance.waivers.in_force import CHECK as WAIVERS

JUDGED = (Status.PASSED, Status.FAILED, Status.WAIVED)
DIGITS = 16
WITHOUT_LIMITS = {"swiglustep": "silu"}
"""Of values within its limits, as most are, an activation gives the bits of the other one."""
SCHEME = "computes.scheme"
ALWAYS = (CONTRACT, PREDICATE, FINGERPRINT, NOT_TIMED.check)
"""Of the backend as a whole, in every run that has cases."""
MAYBE = (POOLED, WAIVERS)
STATUSES: Mapping[str, tuple[Status, ...]] = {
    **dict.fromkeys((CONTRACT, PREDICATE, POOLED, WAIVERS), (Status.PASSED, Status.FAILED)),
    SCHEME: (Status.NOT_SUPPORTED,),
    NOT_TIMED.check: (Status.NOT_RUN,),
}
"""That a check of the backend as a whole can have in a complete run; others can have any."""
LIMIT = re.compile(rf"(top_k|experts)=([0-9]{{1,9}}) {BEYOND} max_\1=([0-9]{{1,9}})")
"""The reason of a case that a backend's declared limit leaves out."""


def of_result(check: CheckResult, report: Report, which: Edition) -> Iterator[str]:
    """That a result's status follows from its figures."""
    where = f"{check.check} {check.case}".strip()
    question = check.check.partition(".")[0]
    if check.verdict not in ("selects", "computes", "performs") or check.verdict != question:
        yield f"{where}: verdict={check.verdict[:40]!r}: none of the three, or not its own"
    if check.backend != report.backend and check.check != NOT_TIMED.check:
        yield f"{where}: of backend {check.backend[:80]!r}, in a report on {report.backend!r}"
    figures = [("error/bound", check.error_over_bound), *check.statistics.items()]
    over = [f"{name} = {value:g}" for name, value in figures if value is not None and not value <= which.limit]
    if check.status is Status.PASSED and over:
        yield f"{where}: passed, with {', '.join(over)} above the limit {which.limit:g}"
    numbers = [value for _, value in figures if value is not None]
    seconds = 0.0 if check.seconds is None else check.seconds
    if (
        any(math.isnan(value) or value < 0 for value in numbers)
        or any(map(math.isnan, check.measured.values()))
        or not (math.isfinite(seconds) and seconds >= 0)
    ):
        yield f"{where}: a figure that no check gives"
    if check.status is Status.PASSED and check.reason and check.case:
        yield f"{where}: passed, with a reason: {check.reason[:80]}"
    if check.status not in (Status.PASSED,) and not check.reason:
        yield f"{where}: {check.status.value} without a reason"
    if check.case:
        yield from _of_case(check, where)


def _of_case(check: CheckResult, where: str) -> Iterator[str]:
    try:
        case = Case.parse(check.case)
    except InvalidCase as error:
        yield f"{where[:120]}: no case: {error}"
        return
    if str(case) != check.case or case.scheme != check.scheme:
        yield f"{where}: another spelling of {case}, or of another scheme than {check.scheme!r}"
    if check.status is Status.PASSED:
        yield from _of_passed(check, case, where)
    elif check.status not in JUDGED and (check.digest or check.error_over_bound is not None):
        yield f"{where}: {check.status.value}, with figures of a case that was judged"
    if check.status is Status.NOT_APPLICABLE and check.check == EQUIVALENCE:
        limit = LIMIT.fullmatch(check.reason)
        if limit is None or not int(limit[2]) == getattr(case, limit[1]) > int(limit[3]):
            yield f"{where}: not applicable, by no limit that it is beyond: {check.reason[:80]}"


def _of_passed(check: CheckResult, case: Case, where: str) -> Iterator[str]:
    if check.evidence is not Evidence.HARDWARE:
        told = "nothing" if check.evidence is None else check.evidence.value
        yield f"{where}: passed by {told}, not on a device"
    if len(check.digest) != DIGITS or not set(check.digest) <= set("0123456789abcdef"):
        yield f"{where}: digest={check.digest[:40]!r}: expected {DIGITS} hexadecimal digits"
    if check.judged_by != BY_BITS and not check.judged_by.startswith(BY_BOUND):
        yield f"{where}: judged_by={check.judged_by[:40]!r}: neither bits nor the bound"
    if check.check == EQUIVALENCE:
        bounded = check.error_over_bound is not None
        both = is_small(case) and case.seed == BOTH_WAYS_SEED
        if not bounded and check.judged_by != BY_BITS:
            yield f"{where}: passed by the bound, without an error/bound"
        elif bounded != both and check.judged_by == BY_BITS:
            yield f"{where}: passed by bits, {'with' if bounded else 'without'} an error/bound"
        # In fp16 every token may overflow on the way, so that there is nothing to pool.
        if bounded and case.tokens and case.dtype == "bf16" and "gain.signed" not in check.measured:
            yield f"{where}: passed within the bound, without the sums that are pooled"


def of_the_whole(report: Report) -> Iterator[str]:
    """The checks of the backend as a whole: each that a run has is there once, and no other."""
    found = Counter((check.check, check.scheme) for check in report.checks if not check.case)
    refused = [scheme for scheme in SCHEME_NAMES if scheme not in report.takes]
    always = {*((name, "") for name in ALWAYS), *((SCHEME, scheme) for scheme in refused)}
    missing = [key for key in always if key not in found]
    left = {
        (check.check, check.scheme)
        for check in report.checks
        if check.status is Status.NOT_RUN and not check.case and check.check.partition(" (")[0] in CHECKS
    }
    known = always | left | {(name, "") for name in MAYBE}
    strange = [key for key, count in found.items() if key not in known or count > 1]
    for what, keys in (("missing", missing), ("there twice, or no check of a whole backend", strange)):
        for check, scheme in sorted(keys):
            yield f"{check[:80]}{f' on {scheme[:40]}' if scheme else ''}: {what}"
    for one in report.checks:
        if not one.case and one.status not in STATUSES.get(one.check, (one.status,)):
            yield f"{one.check} {one.scheme}: {one.status.value}, which it cannot be"
        if not one.case and one.evidence not in (None, Evidence.HARDWARE):
            yield f"{one.check}: {one.evidence.value}, not on a device"


def of_digests(report: Report) -> Iterator[str]:
    """Outputs of another shape or dtype are never the same, nor those of other values, but for one of zeros alone. Of
    what passed: outputs that are wrong may well be alike."""
    found: dict[str, list[Case]] = {}
    for check in report.checks:
        if check.check == EQUIVALENCE and check.digest and check.status is Status.PASSED:
            with suppress(InvalidCase):
                found.setdefault(check.digest, []).append(Case.parse(check.case))
    for digest, cases in found.items():
        forms = {_form(case): case for case in cases}
        values = {
            (case.seed, WITHOUT_LIMITS.get(case.activation, case.activation)): case
            for case in cases
            if not _may_be_nan(case)
        }
        if len(forms) > 1:
            yield f"digest {digest}: the output of cases of {len(forms)} shapes: {_two(forms.values())}"
        elif len(values) > 1 and digest != zeros(cases[0]):
            yield f"digest {digest}: the output of cases of {len(values)} seeds or activations: {_two(values.values())}"


def _two(cases: Iterable[Case]) -> str:
    return ", ".join(sorted(map(str, cases))[:2])


def _may_be_nan(case: Case) -> bool:
    """Its only token passes fp16's range on the way, where a recipe that rounds there makes NaN of all of it."""
    return case.values == "overflow" and case.dtype == "fp16" and case.tokens == 1


def _form(case: Case) -> str:
    """What a digest has of an output beside its bits."""
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[case.dtype]
    return f"{dtype} {case.tokens}x{case.hidden} "


def zeros(case: Case) -> str:
    """The digest of an output of zeros."""
    return hashlib.sha256(_form(case).encode() + bytes(2 * case.tokens * case.hidden)).hexdigest()[:DIGITS]
