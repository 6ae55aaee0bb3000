"""What came of asking two selectors: questions by the rule that decided, and the kinds of disagreement."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from conformance.selection.model import RULES
from fp8moe.registry import Reason
from fp8moe.selector import Selection
from fp8moe_vllm.answers import kind
from fp8moe_vllm.question import Parts, told

ON_THE_WAY = {
    ("FLASHINFER_CUTLASS", Reason.DISABLED_BY_ENV): "R3a",
    ("DEEPGEMM", Reason.DISABLED_BY_ENV): "R4a",
    ("AITER", Reason.DISABLED_BY_ENV): "R6a",
    ("VLLM_CUTLASS", Reason.NOT_ALLOWED): "R7",
}
"""A verdict that tells of a rule which decides nothing and shortens the list."""
SHOWN = 20
"""Kinds of disagreement that are printed; the file has all."""


@dataclass
class Compared:
    """A question's answers.

    Args:
        selection: how ours came to its answer.
    """

    ours: str
    theirs: str
    selection: Selection

    @property
    def apart(self) -> bool:
        return self.ours != self.theirs

    @property
    def kind(self) -> tuple[str, str]:
        """Of the disagreement: both answers, whatever text a variable held."""
        return kind(self.ours), kind(self.theirs)

    @property
    def rule(self) -> str:
        return self.selection.rule

    @property
    def shortened_by(self) -> list[str]:
        found = [ON_THE_WAY.get((str(one.backend.value), one.reason)) for one in self.selection.verdicts if one.reason]
        return [rule for rule in found if rule is not None]


@dataclass
class Kind:
    """Disagreements of one kind: how many, the rules that ours ended with, the smallest question found."""

    ours: str
    theirs: str
    parts: Parts
    count: int = 0
    rules: Counter[str] = field(default_factory=Counter)


@dataclass
class Tally:
    """
    Args:
        not_put: questions that another version's types cannot hold.
    """

    agreed: Counter[str] = field(default_factory=Counter)
    apart: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    kinds: dict[tuple[str, str], Kind] = field(default_factory=dict)
    not_put: int = 0

    def add(self, parts: Parts, found: Compared | None) -> None:
        if found is None:
            self.not_put += 1
            return
        (self.apart if found.apart else self.agreed)[found.rule] += 1
        self.shortened.update(found.shortened_by)
        self.answers[kind(found.theirs)] += 1
        if found.apart:
            same = self.kinds.setdefault(found.kind, Kind(*found.kind, parts))
            same.count += 1
            same.rules[found.rule] += 1

    @property
    def questions(self) -> int:
        return self.agreed.total() + self.apart.total()

    def table(self) -> str:
        """A line for each rule that can decide, in their order; below it those that shorten the list."""
        lines = [f"{'rule':6s} {'questions':>10s} {'agreed':>10s} {'apart':>10s}"]
        for rule in RULES:
            lines.append(_row(rule, self.agreed[rule], self.apart[rule]))
        lines.append(_row("all", self.agreed.total(), self.apart.total()))
        ways = ", ".join(f"{rule} {self.shortened[rule]:,}" for rule in ON_THE_WAY.values())
        lines.append(f"lists shortened on the way: {ways}; {len(self.answers)} different answers of vLLM's")
        if self.not_put:
            lines.append(f"not put, since this version's types do not hold them: {self.not_put:,}")
        return "\n".join(lines)

    def ordered(self) -> list[Kind]:
        return sorted(self.kinds.values(), key=lambda one: -one.count)

    def told(self, again: str) -> str:
        """The kinds, the most frequent first; `again` is the command but for the question's text."""
        kinds, lines = self.ordered(), []
        for one in kinds[:SHOWN]:
            rules = ", ".join(rule for rule in RULES if one.rules[rule])
            lines.append(f"apart, {one.count:,} times ({rules}): ours {one.ours}; vLLM {one.theirs}")
            lines.append(f"  {again} {shlex.quote(told(one.parts))}")
        if len(kinds) > SHOWN:
            lines.append(f"and {len(kinds) - SHOWN} further kinds, {sum(k.count for k in kinds[SHOWN:]):,} times")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "questions": self.questions,
            "agreed": self.agreed.total(),
            "apart": self.apart.total(),
            "not_put": self.not_put,
            "rules": {rule: {"agreed": self.agreed[rule], "apart": self.apart[rule]} for rule in RULES},
            "shortened": {rule: self.shortened[rule] for rule in ON_THE_WAY.values()},
            "answers": dict(self.answers.most_common()),
            "kinds": [
                {"ours": k.ours, "vllm": k.theirs, "count": k.count, "rules": dict(k.rules), "ask": told(k.parts)}
                for k in self.ordered()
            ],
        }


def _row(name: str, agreed: int, apart: int) -> str:
    return f"{name:6s} {agreed + apart:10,d} {agreed:10,d} {apart:10,d}"
