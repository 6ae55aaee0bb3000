"""The waivers of a file in one run: which hold for this backend here and today, what they cover, and what is rotten."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import entry_points
from importlib.util import find_spec

from conformance.cases import Case
from conformance.contain import DeviceLost, SubjectRef, Worker, WorkerEnded
from conformance.levels import Item
from conformance.plan import reference_subjects
from conformance.planned import Plan
from conformance.results import CheckResult, Status
from conformance.waivers.patterns import matches
from conformance.waivers.release import Release, release_of
from conformance.waivers.waiver import Waiver, Waivers, utc_today
from fp8moe.counted import counted
from fp8moe.registry import ENTRY_POINT_GROUP, Fp8MoeBackend

CHECK = "computes.waivers"
SHOWN = 5
ONE_IN = 20
"""A waiver, and all of them together, may cover one in so many of the cases that must pass."""
NOT_JUDGED = (Status.NOT_SUPPORTED, Status.NOT_APPLICABLE)
Key = tuple[str, str]


class InForce:
    """What the waivers of a file come to in one run.

    Args:
        origin: as `Plan.name`, what a waiver may name the backend by.
        target: the device as `--device` names it; `Plan.device` is it in the driver's words.
        release: which version of the backend is here.
    """

    def __init__(self, file: Waivers, plan: Plan, origin: str, target: str, release: Release, today: date) -> None:
        self.file, self.plan, self.release = file, plan, release
        self.names, self.devices = (plan.name, origin), (plan.device, target)
        self.rotten: list[str] = []
        self.left: list[str] = []
        """Why waivers for this backend do not hold here, and are not rotten for it."""
        self.waivers = [waiver for waiver in file.waivers if self._holds(waiver, today)]

    @classmethod
    def of(cls, file: Waivers, worker: Worker, ref: SubjectRef, plan: Plan, target: str) -> InForce:
        """Asks a worker for the backend's version, where there are waivers."""
        release = release_of(worker, ref) if file.waivers else Release(plan.name)
        return cls(file, plan, ref.origin, target, release, utc_today())

    def _holds(self, waiver: Waiver, today: date) -> bool:
        """Whether a waiver is about this backend, in this version, on this device, and today."""
        if waiver.backend not in self.names:
            return False
        if waiver.days_left(today) < 0:
            self.rotten.append(
                f"{waiver} has expired: remove it, or renew expires with a reason why the case still fails"
            )
            return False
        if not any(matches(waiver.device, name) for name in self.devices):
            self.left.append(f"waiver {waiver.number} is for device {waiver.device}")
            return False
        if not self.release.version:
            here = f"which is here cannot be told: {self.release}"
            if self.plan.items:  # else it does not run here at all, and its library may be missing
                self.rotten.append(f"{waiver} is for versions {waiver.backend_version}, and {here}")
            return False
        if not waiver.holds_for(self.release.version):
            self.left.append(f"waiver {waiver.number} is for versions {waiver.backend_version}")
            return False
        return True

    def covering(self, check: str, case: Case) -> Waiver | None:
        """The first that covers a case: of a failure, the case that it was found as, not the one that it shrinks to."""
        return next((waiver for waiver in self.waivers if waiver.covers(check, case)), None)

    def applied(self, item: Item, result: CheckResult) -> CheckResult:
        """The result of an item: waived where it failed and is covered, else as it is."""
        waiver = self.covering(item.check, item.case) if result.status is Status.FAILED else None
        if waiver is None:
            return result
        return replace(result, status=Status.WAIVED, reason=f"{excuse(waiver)}; what failed: {result.reason}")

    def keeps(self, item: Item, result: CheckResult, before: Sequence[Mapping[str, str]]) -> bool:
        """Whether a waived result of a run to go on with is one still: by the same waiver, in force then and now."""
        waiver = self.covering(item.check, item.case)
        return waiver is not None and waiver.told() in before and result.reason.startswith(f"{excuse(waiver)}; ")

    def result(
        self, results: Mapping[Key, CheckResult], stopped: str, everything: Callable[[], Sequence[Item]]
    ) -> list[CheckResult]:
        """Whether the waivers are what they should be: one result; none without waivers, or where nothing was run.

        Args:
            results: so far, by the items' keys.
            stopped: why not every case was run; "" where each was.
            everything: what the fullest level goes through.
        """

        def is_elsewhere(waiver: Waiver) -> bool:
            try:
                return any(waiver.covers(item.check, item.case) for item in everything())
            except (WorkerEnded, DeviceLost):  # then nothing can be said of it
                return True

        found = [*self.rotten, *rotten(self.waivers, self.plan.items, results, is_elsewhere)]
        if not found and not (self.file.waivers and self.plan.items):
            return []
        waived = sum(result.status is Status.WAIVED for result in results.values())
        covered = sum(self.covering(item.check, item.case) is not None for item in self.plan.items)
        scope = (
            f"{len(self.waivers)} of {counted(len(self.file.waivers), 'waiver')} for {self.names[0]} on "
            f"{self.plan.device}, {self.release}; {covered} of {counted(len(self.plan.items), 'case')} covered, "
            f"{waived} waived"
        )
        more = f" and {len(self.left) - SHOWN} more" if len(self.left) > SHOWN else ""
        scope += f"; not in force here: {', '.join(self.left[:SHOWN])}{more}" if self.left else ""
        unknown = {waiver.backend for waiver in self.file.waivers if not is_known(waiver.backend)} - {*self.names}
        scope += f"; backends that are not known here: {', '.join(sorted(unknown))}" if unknown else ""
        status, reason = Status.PASSED, ""
        if found:
            status, reason = Status.FAILED, f"{self.file.source}: {'; '.join(found)}"
        elif stopped:
            status, reason = Status.NOT_RUN, f"{stopped}: not every case that they cover was run"
        return [CheckResult("computes", CHECK, status, self.plan.name, reason=reason, scope=scope)]


def rotten(
    waivers: Sequence[Waiver],
    items: Sequence[Item],
    results: Mapping[Key, CheckResult],
    is_elsewhere: Callable[[Waiver], bool],
) -> Iterator[str]:
    """What is rotten about waivers that are in force, by what was planned and what was run.

    Args:
        is_elsewhere: whether one that covers nothing here covers a case of another level.
    """
    must_pass = {item.key for item in items if item.key not in results or results[item.key].status not in NOT_JUDGED}
    together: set[Key] = set()
    broad = False
    for waiver in waivers:
        covered = [item.key for item in items if waiver.covers(item.check, item.case)]
        mine = [key for key in covered if key in must_pass]
        together.update(mine)
        if not covered:
            if items and not is_elsewhere(waiver):
                yield (
                    f"{waiver} covers none of the cases for this backend on this device: correct its check or case "
                    "(a failure counts as the case that it was found as, not the smaller one), or remove it"
                )
        elif not mine:
            yield f"{waiver} covers only cases that the backend does not take: remove it"
        elif len(mine) * ONE_IN > len(must_pass):
            broad = True
            yield f"{waiver} covers {_share(mine, must_pass)}: narrow its check and case, or repair the backend"
        passed = [key for key in mine if key in results and results[key].status is Status.PASSED]
        if passed:
            told = f"{passed[0][0]} on {passed[0][1]}"
            which = "all of them" if len(passed) == len(mine) else f"{len(passed)} of {len(mine)}"
            yield f"{waiver} covers cases that pass ({which}, such as {told}): remove it, or narrow it"
    if not broad and len(together) * ONE_IN > len(must_pass):
        yield f"the waivers together cover {_share(together, must_pass)}: repair the backend, and remove some"


def excuse(waiver: Waiver) -> str:
    """What the reason of a waived result begins with."""
    return f"waived ({waiver.answered_for}): {waiver.reason}"


def _share(some: Collection[Key], of: Collection[Key]) -> str:
    share = 100 * len(some) / len(of)
    return f"{len(some)} of the {counted(len(of), 'case')} that must pass ({share:.1f}%), at most {100 / ONE_IN:.0f}%"


def is_known(backend: str) -> bool:
    """Whether a waiver may be for it, though another one is judged: a name, or "module:Class" of a package that is
    installed. Nothing of it is loaded."""
    package, colon, _ = backend.partition(":")
    if not colon:
        return backend in known_names()
    try:
        return find_spec(package.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def known_names() -> set[str]:
    """Of the backends that are here."""
    registered = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    return {*Fp8MoeBackend.__members__, *(subject.name for subject in reference_subjects()), *registered}
