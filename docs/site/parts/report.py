"""Words of reports and certificates, as the code has them."""

from __future__ import annotations

from conformance.bounds.judgement import MEANINGS
from conformance.certificate.verifying import NOT_PROVEN, PROVEN
from conformance.results import Evidence, Status
from parts.markdown import code, table, text

STATUSES = {
    Status.PASSED: "a verdict: equal bits, or within the bound, or the relation holds",
    Status.FAILED: "a verdict; `reason` says what was wrong, and `reproduce` is one command",
    Status.WAIVED: "it failed, and a waiver covers it until the waiver expires; `reason` has both",
    Status.NOT_APPLICABLE: "the check asks nothing of this backend or case, or the case is beyond its declared limits",
    Status.NOT_SUPPORTED: "the backend refuses the layer or the scheme; `reason` is its own",
    Status.NOT_RUN: "it was declared and did not run: the budget, a device, a library; `reason` says which",
}
EVIDENCE = {
    Evidence.HARDWARE: "it ran on the device that the report names",
    Evidence.SIMULATED: "it ran in Triton's interpreter, or asked about a platform that is not here",
    Evidence.COMPILED: "our kernel was compiled for that target, and did not run",
    Evidence.CONTRACT: "a call was compared with the library's real signature",
}


def results() -> str:
    return table(("status", "what it means"), ((code(status.value), STATUSES[status]) for status in Status))


def evidence() -> str:
    return table(("class", "what it means"), ((code(kind.value), EVIDENCE[kind]) for kind in Evidence))


def ratios() -> str:
    """Every ratio of a judgement by the bound."""
    return table(("ratio", "above 1 it says that"), ((code(name), text(means)) for name, means in MEANINGS.items()))


def proven() -> str:
    return f"> {PROVEN[0].upper()}{PROVEN[1:]}."


def not_proven() -> str:
    return f"> {NOT_PROVEN[0].upper()}{NOT_PROVEN[1:]}."
