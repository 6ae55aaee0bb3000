"""Which rule ends a selection: looks on while the selector decides, in the call whose answer is judged."""

from __future__ import annotations

from types import TracebackType
from typing import Any
from unittest.mock import patch

from conformance.selection.model import RULES
from fp8moe import selector
from fp8moe.envs import FLASHINFER_BACKEND, FLASHINFER_FP8, MalformedVariable

OTHER_RULE = len(RULES)
"""Code of a rule that ``RULES`` does not have; a rule's index there is its code."""
WITHOUT_DECISION = RULES.index("R1")
"""Code before the selector decides: R1 answers without a decision, every other rule with one."""

_CODES = {rule: code for code, rule in enumerate(RULES)}
_MALFORMED = {FLASHINFER_FP8: _CODES["R3"], FLASHINFER_BACKEND: _CODES["R3b"]}


class RuleWatch:
    """While it is open, ``rule`` is the code of the last decision's rule; who asks sets it back before each call."""

    def __init__(self) -> None:
        self.rule = WITHOUT_DECISION
        self._patch = patch.object(selector, "decide", self._watched(selector.decide))

    def _watched(self, decide: Any) -> Any:
        def watched(query: Any) -> Any:
            try:
                decision = decide(query)
            except MalformedVariable as error:
                self.rule = _MALFORMED.get(error.variable, _CODES["R4"])
                raise
            self.rule = _CODES.get(decision.rule, OTHER_RULE)
            return decision

        return watched

    def __enter__(self) -> RuleWatch:
        self._patch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.stop()
