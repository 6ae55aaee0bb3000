"""What an error's text has to say: every backend that it is about with its reason, or the variable and what it held."""

from __future__ import annotations

import re
from collections.abc import Mapping

from conformance.selection.facts import FLASHINFER
from conformance.selection.model import FLASHINFER_CUTLASS, TRTLLM, Expectation
from conformance.selection.outcomes import (
    MALFORMED_CODES,
    NO_FLASHINFER_FITS,
    NOTHING_FITS,
    is_must_use_failure,
    must_use_parts,
)
from conformance.selection.predicates import BACKENDS, REASONS

_NAMES = "|".join(backend.value for backend in BACKENDS)


def missing_from(text: str, expected: Expectation, env: Mapping[str, str]) -> list[str]:
    """What an error of this expectation should say and does not, in words; of a call with the model's outcome."""
    outcome = int(expected.outcome)
    if is_must_use_failure(outcome):
        backend, reason = must_use_parts(outcome)
        return _unexplained(text, {BACKENDS[backend].value: REASONS[reason].value})
    if outcome in (NO_FLASHINFER_FITS, NOTHING_FITS):
        about = (TRTLLM, FLASHINFER_CUTLASS) if outcome == NO_FLASHINFER_FITS else expected.order
        missing = _unexplained(text, {BACKENDS[b].value: REASONS[int(expected.reason(b))].value for b in about})
        return missing + [f"{FLASHINFER}=1"] * (outcome == NO_FLASHINFER_FITS and f"{FLASHINFER}=1" not in text)
    for variable, code in MALFORMED_CODES.items():
        if code == outcome:
            return [part for part in (variable, repr(env[variable])) if part not in text]
    return []


def _unexplained(text: str, reasons: Mapping[str, str]) -> list[str]:
    """Backends whose name is nowhere followed, before another's name comes, by the reason."""
    parts = re.split(rf"\b({_NAMES})\b", text)
    said = list(zip(parts[1::2], parts[2::2], strict=True))
    return [
        f"{name} and its reason {reason}"
        for name, reason in reasons.items()
        if not any(named == name and re.search(rf"\b{reason}\b", rest) for named, rest in said)
    ]
