"""Every (rule, backend, reason) that the specification permits: rebuilt from the model, and the committed list.

A triple says at which rule a backend was chosen (reason None) or refused: ``R3a`` ``R4a`` ``R6a`` ``R7`` remove,
``R3b`` ``R4b`` ``R5`` ``R6b`` demand, ``R3c`` tries two, ``R8`` is a scan that ended in a choice, ``R9`` one that did
not.

That the grid misses none was checked by 200 million random combinations of the model's facts, which need not be those
of any device; the property-based tests go on looking. ``python -m conformance.selection.triples`` prints the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from conformance.selection.cells import Cell
from conformance.selection.facts import Array
from conformance.selection.grid import GRID, Product
from conformance.selection.model import DISABLED, NOT_ALLOWED, RULES, Expectation, expect
from conformance.selection.outcomes import NO_BACKEND, is_must_use_failure, must_use_parts
from conformance.selection.predicates import BACKENDS, INDEX, REASONS, SUPPORTED
from fp8moe import Fp8MoeBackend, Reason

Triple = tuple[str, str, str | None]
FILE = "reason_triples.json"

REMOVED_AT = {
    "FLASHINFER_TRTLLM": "R3a",
    "FLASHINFER_CUTLASS": "R3a",
    "DEEPGEMM": "R4a",
    "BATCHED_DEEPGEMM": "R4a",
    "AITER": "R6a",
    "VLLM_CUTLASS": "R7",
    "BATCHED_VLLM_CUTLASS": "R7",
}
SCANS = ("R3c", "R8", "R9")
ORDER = ("R1", "R3a", "R3b", "R3c", "R4a", "R4b", "R5", "R6a", "R6b", "R7", "R8", "R9")


def triples_of(expectation: Expectation, shape: tuple[int, ...]) -> Iterator[tuple[Triple, Array]]:
    """The triples that occur in an expectation, each with the mask of its cells."""
    rule = np.broadcast_to(expectation.rule, shape)
    outcome = np.broadcast_to(expectation.outcome, shape)
    ends = rule.astype(np.uint16) * 256 + outcome
    for end_code in np.flatnonzero(np.bincount(ends.ravel())).tolist():
        name, end = RULES[end_code // 256], end_code % 256
        if is_must_use_failure(end):
            failed, reason = must_use_parts(end)
            yield (name, BACKENDS[failed].value, REASONS[reason].name), ends == end_code
        elif end <= NO_BACKEND:
            chosen = BACKENDS[end] if end < NO_BACKEND else Fp8MoeBackend.NONE
            yield (name, chosen.value, None), ends == end_code
    in_scan = np.isin(rule, [RULES.index(name) for name in SCANS])
    for index, backend in enumerate(BACKENDS):
        removed, predicate = expectation.removed[index], expectation.predicates[index]
        for removal in {DISABLED, NOT_ALLOWED} & set(np.unique(removed).tolist()):
            mask = np.broadcast_to(removed == removal, shape)
            yield (REMOVED_AT[backend.name], backend.value, REASONS[removal].name), mask
        refused = in_scan & (removed == SUPPORTED) & (predicate >= 0) & expectation.consulted(index)
        codes = np.where(refused, rule.astype(np.int16) * len(REASONS) + predicate + 1, 0)
        for code in np.flatnonzero(np.bincount(codes.ravel()))[1:].tolist():
            rule_code, reason = divmod(code - 1, len(REASONS))
            yield (RULES[rule_code], backend.value, REASONS[reason].name), codes == code


def witnesses(products: Sequence[Product] = GRID) -> dict[Triple, Cell]:
    """For every triple that the model permits over the products, a cell at which it occurs; sorted."""
    found: dict[Triple, Cell] = {}
    for product in products:
        for triple, mask in triples_of(expect(product.facts()), product.shape):
            if triple not in found:
                found[triple] = product.cell(int(np.argmax(mask)))
    return {triple: found[triple] for triple in sorted(found, key=sort_key)}


def sort_key(triple: Triple) -> tuple[int, int, int]:
    """By rule, then backend, then reason, each in the specification's order; a choice before refusals."""
    rule, backend, reason = triple
    return (
        ORDER.index(rule),
        INDEX.get(backend, len(INDEX)),
        -1 if reason is None else [known.name for known in REASONS].index(reason),
    )


def observed(selection: Any) -> set[Triple]:
    """The triples that an explained selection shows."""
    found: set[Triple] = set()
    if selection.backend is not None:
        found.add((selection.rule, selection.backend.value, None))
    for verdict in selection.verdicts:
        if verdict.consulted and not verdict.supported:
            name = verdict.backend.name
            removal = verdict.reason is Reason.DISABLED_BY_ENV or (
                verdict.reason is Reason.NOT_ALLOWED and REMOVED_AT.get(name) == "R7"
            )
            rule = REMOVED_AT.get(name, selection.rule) if removal else selection.rule
            found.add((rule, verdict.backend.value, None if verdict.reason is None else verdict.reason.name))
    return found


@cache
def committed() -> tuple[Triple, ...]:
    """The committed list."""
    text = files("conformance.selection").joinpath(FILE).read_text(encoding="utf-8")
    return tuple((rule, backend, reason) for rule, backend, reason in json.loads(text))


def as_text(triples: Iterable[Triple]) -> str:
    """The committed file's text for these triples: JSON, one triple a line, sorted."""
    lines = [json.dumps(list(triple)) for triple in sorted(triples, key=sort_key)]
    return "[\n" + ",\n".join(f"  {line}" for line in lines) + "\n]\n"


if __name__ == "__main__":
    print(as_text(witnesses()), end="")
