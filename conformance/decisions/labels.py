"""A label is one cell's decision as a number: the outcome's code, and the rule's in the bits above it."""

from __future__ import annotations

from conformance.decisions.watch import OTHER_RULE
from conformance.selection.model import RULES
from conformance.selection.outcomes import describe, is_must_use_failure, must_use_parts
from conformance.selection.predicates import BACKENDS

OUTCOMES = 256
_RULES = (*RULES, "another rule")
_BY_TEXT = {describe(code): code for code in range(OUTCOMES)}
_RULE_CODES = {rule: code for code, rule in enumerate(_RULES)}


def label_of(outcome: int, rule: int) -> int:
    """The label of a code of ``outcomes`` and an index into ``RULES``."""
    return rule * OUTCOMES + outcome


def outcome_text(label: int) -> str:
    """The outcome in words: a backend's value, ``(NONE, None)`` or an error."""
    return describe(label % OUTCOMES)


def rule_text(label: int) -> str:
    """The rule's name."""
    return _RULES[min(label // OUTCOMES, OTHER_RULE)]


def parse_label(outcome: str, rule: str) -> int:
    """The label of two such texts.

    Raises:
        ValueError: an outcome or a rule that the suite does not have.
    """
    if outcome not in _BY_TEXT:
        raise ValueError(f"outcome {outcome!r} is not one that this version has")
    if rule not in _RULE_CODES:
        raise ValueError(f"rule {rule!r} is none of {', '.join(_RULES)}")
    return label_of(_BY_TEXT[outcome], _RULE_CODES[rule])


def reading_order(label: int) -> tuple[int, ...]:
    """Sorts labels as the selector comes to them: by rule, by backend, its refusals in the order of its checks, itself.

    Rules that are learnt in this order need not say what those before them have already taken.
    """
    rule, outcome = divmod(label, OUTCOMES)
    if is_must_use_failure(outcome):
        backend, reason = must_use_parts(outcome)
        return rule, backend, 0, reason, outcome
    if outcome < len(BACKENDS):
        return rule, outcome, 1, 0, outcome
    return rule, len(BACKENDS), 0, 0, outcome
