"""What one check came to, and the ledger that keeps every result of a run; nothing declared vanishes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Status(str, Enum):
    """The status of a check, or of a cell of the matrix."""

    PASSED = "passed"
    FAILED = "failed"
    WAIVED = "waived"
    NOT_APPLICABLE = "not_applicable"
    NOT_SUPPORTED = "not_supported"
    NOT_RUN = "not_run"


class Evidence(str, Enum):
    """How a result was obtained; a report never mixes the classes."""

    HARDWARE = "hardware"
    SIMULATED = "simulated"
    COMPILED = "compiled"
    CONTRACT = "contract"


def place(target: str, evidence: Iterable[Evidence | None]) -> str:
    """A target as a heading names it: "interpreter", where something ran and nothing in it, is the CPU."""
    found = set(evidence) - {None}
    return "cpu" if target == "interpreter" and found and Evidence.SIMULATED not in found else target


@dataclass(frozen=True)
class Mismatch:
    """Where an output is farthest outside its bound.

    `expert` is the one to which the error can be laid, None where it cannot be told; `columns` is the block of 128
    that holds `column`. `error` is what was judged: |got - expected|, less the flipped roundings that the output shows;
    `bound` is what it may be, 0 where the bits must be equal.
    """

    token: int
    expert: int | None
    column: int
    columns: tuple[int, int]
    expected: float
    got: float
    error_over_bound: float
    error: float
    bound: float

    def __str__(self) -> str:
        expert = "" if self.expert is None else f"expert {self.expert}, "
        return (
            f"token {self.token}, {expert}columns {self.columns[0]}-{self.columns[1]} (column {self.column}): "
            f"expected {self.expected:.9g}, got {self.got:.9g}, error/bound {self.error_over_bound:.3g}"
        )


NOT_FINITE = "finite"
"""The statistic of an output that is not finite where it must be, or finite where it must not."""


@dataclass(frozen=True)
class CheckResult:
    """One check on one case (or on one cell as a whole, where `case` is empty).

    Args:
        verdict: "selects", "computes" or "performs"; "compiles" for what the selector's claims rest on elsewhere.
        check: the check's id.
        backend: name of the backend; "" for checks of the selector.
        scheme: name of the quantisation scheme; "" where it plays no part.
        case: the case's id.
        reason: why, for every status but passed; of a measurement, how it was taken.
        error_over_bound: largest error/bound over the judged elements.
        statistics: further ratios, each with limit 1.
        reproduce: the command that runs it again.
        scope: what a check without a case was run over, in words.
        judged_by: "bits" where the verdict is equality with the replay, "bound: " and the reason where it is the bound.
        measured: figures without a limit, by name and unit.
        digest: of the first output, `conformance.bits.digest`; "" where there was none.
        seconds: wall time of the case in its worker; None where it was not taken, as in older reports.
    """

    verdict: str
    check: str
    status: Status
    backend: str = ""
    scheme: str = ""
    case: str = ""
    reason: str = ""
    error_over_bound: float | None = None
    evidence: Evidence | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    reproduce: str = ""
    scope: str = ""
    judged_by: str = ""
    measured: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    seconds: float | None = None

    def fails_like(self, other: CheckResult) -> bool:
        """Whether both fail, and either both or neither for a number that is not finite: so a small case has not
        another fault than the large one whose place it takes."""
        both = self.status is Status.FAILED and other.status is Status.FAILED
        return both and (NOT_FINITE in self.statistics) == (NOT_FINITE in other.statistics)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CheckResult:
        return cls.from_object(json.loads(text))

    @classmethod
    def from_object(cls, data: Mapping[str, Any]) -> CheckResult:
        """Of JSON with its fields, each of its type; what is no finite number is a text there, as `finite` makes it."""
        found = {name: value for name, value in data.items() if value is not None}
        for name in ("statistics", "measured"):
            found[name] = {key: float(value) for key, value in found.get(name, {}).items()}
        for name in ("error_over_bound", "seconds"):
            if name in found:
                found[name] = float(found[name])
        if "evidence" in found:
            found["evidence"] = Evidence(found["evidence"])
        return cls(**{**found, "status": Status(found["status"])})


class Ledger:
    """Every result of a run, by (check, backend, scheme, case); a later result replaces an earlier one, but a failure:
    one that does not come again, in another worker of pytest-xdist say, has been one all the same."""

    def __init__(self) -> None:
        self._results: dict[tuple[str, str, str, str], CheckResult] = {}

    def add(self, result: CheckResult) -> None:
        key = result.check, result.backend, result.scheme, result.case
        before = self._results.get(key)
        if before is None or before.status is not Status.FAILED:
            self._results[key] = result

    def __iter__(self) -> Iterator[CheckResult]:
        return iter(self._results.values())

    def __len__(self) -> int:
        return len(self._results)

    def of(self, **wanted: str) -> list[CheckResult]:
        """The results whose fields equal `wanted`."""
        return [result for result in self if all(getattr(result, name) == value for name, value in wanted.items())]

    def failures(self) -> list[CheckResult]:
        return [result for result in self if result.status is Status.FAILED]


def of_test(name: str, outcome: str, text: str) -> CheckResult:
    """The result of a test of the selector that keeps none itself."""
    status = {"passed": Status.PASSED, "failed": Status.FAILED}.get(outcome, Status.NOT_RUN)
    lines = [line for line in text.splitlines() if line.strip()]
    check = f"selects.{name.removeprefix('test_').split('@')[0]}"
    return CheckResult("selects", check, status, reason=lines[-1].strip() if lines and outcome != "passed" else "")


def finite(value: Any) -> Any:
    """Infinities and NaN as text: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
