"""Judges ``explain``: every verdict of a sample of cells against the model, and that every permitted triple occurs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.selection.cells import Cell
from conformance.selection.facts import DEEP_GEMM, MALFORMED, Array, integer_state
from conformance.selection.grid import Product
from conformance.selection.model import RULES, expect
from conformance.selection.outcomes import Classifier, describe
from conformance.selection.predicates import BACKENDS, REASONS, SUPPORTED, UNKNOWN
from conformance.selection.triples import Triple, committed, observed
from conformance.selection.violations import Violation, simplest_of_all

Explain = Callable[..., Any]
REASON_CODES = {id(reason): code for code, reason in enumerate(REASONS)} | {id(None): SUPPORTED}
NONSENSE = 99
"""Code of a verdict whose reason and ``supported`` contradict each other."""


def verdict_code(verdict: Any, env: Mapping[str, str]) -> int:
    """The code of a verdict's reason; ``UNKNOWN`` where the detail says that a malformed variable is in the way."""
    text = env.get(DEEP_GEMM)
    says_so = DEEP_GEMM in verdict.detail and repr(text) in verdict.detail
    if integer_state(text) == MALFORMED and not verdict.supported and says_so:
        return UNKNOWN
    code = REASON_CODES.get(id(verdict.reason), NONSENSE)
    return code if verdict.supported == (code == SUPPORTED) else NONSENSE


@dataclass
class ExplainedSample:
    """Runs ``explain`` on cells and remembers where it disagrees with the model, and the triples it showed."""

    explain: Explain
    classifier: Classifier
    products: Sequence[Product]
    broken: list[Array] = field(default_factory=list)
    texts: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)
    triples: set[Triple] = field(default_factory=set)
    count: int = 0

    def run(self, numbers_of: Sequence[Array]) -> None:
        """Explains the cells with these numbers of each product."""
        for index, (product, numbers) in enumerate(zip(self.products, numbers_of, strict=True)):
            expected = expect(product.facts_at(numbers))
            size = (len(numbers),)
            rule, outcome = (np.broadcast_to(a, size).tolist() for a in (expected.rule, expected.outcome))
            backends = range(len(BACKENDS))
            reasons = np.stack([np.broadcast_to(expected.reason(b), size) for b in backends], axis=1).tolist()
            consulted = np.stack([np.broadcast_to(expected.consulted(b), size) for b in backends], axis=1).tolist()
            broken = []
            for position, (platform, (weight_key, activation_key), config, allow, env) in enumerate(
                product.columns(numbers)
            ):
                want = (RULES[rule[position]], outcome[position], reasons[position], consulted[position])
                try:
                    selection = self.explain(config, weight_key, activation_key, allow, platform=platform, env=env)
                    got = self._read(selection, env)
                except Exception as error:
                    got_text = f"explain raised {type(error).__name__}: {error}"
                else:
                    self.triples |= observed(selection)
                    if got == want:
                        continue
                    got_text = _text(*got) if len(got[2]) == len(BACKENDS) else f"verdicts of {len(got[2])} backends"
                broken.append(position)
                self.texts[index, int(numbers[position])] = (_text(*want), got_text)
            self.broken.append(numbers[broken])
            self.count += len(numbers)

    def _read(self, selection: Any, env: Mapping[str, str]) -> tuple[str, int, list[int], list[bool]]:
        if selection.error is not None:
            outcome = self.classifier.error(selection.error)
        else:
            outcome = self.classifier.result((selection.backend, selection.experts_cls))
        in_order = [verdict.backend for verdict in selection.verdicts] == list(BACKENDS)
        verdicts = selection.verdicts if in_order else ()
        return (
            selection.rule,
            outcome,
            [verdict_code(verdict, env) for verdict in verdicts],
            [verdict.consulted for verdict in verdicts],
        )

    def reasons_agree_with_model(self) -> Violation | None:
        """Rule, outcome, and for every candidate in order its support, reason and whether it was consulted."""
        if not any(len(numbers) for numbers in self.broken):
            return None
        count, index, number = simplest_of_all(self.products, self.broken)
        want, got = self.texts[index, number]
        return Violation("reasons_agree_with_model", count, str(self.products[index].cell(number)), want, got)

    def every_permitted_triple_occurs(self, witnesses: dict[Triple, Cell]) -> Violation | None:
        """Each triple occurs at the cell where the model has it, and no other triple anywhere in the sample."""
        missing = {}
        for triple, cell in witnesses.items():
            config, weight_key, activation_key, allow, platform, env = cell.arguments
            try:
                selection = self.explain(config, weight_key, activation_key, allow, platform=platform, env=env)
            except Exception as error:
                missing[triple] = (cell, f"explain raised {type(error).__name__}: {error}")
                continue
            found = observed(selection)
            self.triples |= found
            if triple not in found:
                missing[triple] = (cell, f"only {sorted(map(str, found))}")
        if missing:
            (triple, (cell, got)), *_ = missing.items()
            return Violation(
                "every_permitted_triple_occurs", len(missing), str(cell), f"{triple} is among the verdicts", got
            )
        unexpected = sorted(map(str, self.triples - set(committed())))
        if unexpected:
            return Violation(
                "every_permitted_triple_occurs",
                len(unexpected),
                "(any)",
                "only triples of the committed list",
                ", ".join(unexpected),
            )
        return None


def _text(rule: str, outcome: int, reasons: Sequence[int], consulted: Sequence[bool]) -> str:
    verdicts = []
    for backend, code, reached in zip(BACKENDS, reasons, consulted, strict=True):
        words = {SUPPORTED: "supported", UNKNOWN: "unknown", NONSENSE: "a reason that contradicts `supported`"}
        reason = words[code] if code in words else REASONS[code].name
        verdicts.append(f"{backend.value} {reason}" + ("" if reached else " (not consulted)"))
    return f"{rule} {describe(outcome)}; {', '.join(verdicts)}"
