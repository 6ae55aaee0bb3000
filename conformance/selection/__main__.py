"""``python -m conformance.selection CELL``: one cell's call, the specification's answer and the selector's.

Without a cell: judges the selector over the whole grid and exits with 1 if an invariant is broken.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from conformance.selection.cells import Cell
from conformance.selection.explanations import verdict_code
from conformance.selection.judge import judge
from conformance.selection.model import RULES, expect_call
from conformance.selection.outcomes import Classifier, describe
from conformance.selection.predicates import BACKENDS, REASONS, SUPPORTED, UNKNOWN
from conformance.selection.single import CHECKS, Subject, violation
from fp8moe import explain_fp8_moe_backend, select_fp8_moe_backend
from fp8moe.registry import seed_backends


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m conformance.selection", description=__doc__)
    parser.add_argument("cell", nargs="?", help="the id of a cell, such as sel1:device=sm100,scheme=nvfp4")
    parser.add_argument("--without", choices=[b.value for b in BACKENDS], help="remove this backend")
    parser.add_argument("--only", choices=["nothing", *(b.value for b in BACKENDS)], help="leave only this backend")
    parser.add_argument("--check", choices=list(CHECKS), help="ask this check of single calls at the cell")
    options = parser.parse_args(arguments)
    if options.cell is None:
        report = judge(progress=lambda line: print(line, file=sys.stderr))
        print(report)
        return 0 if report.passed else 1
    try:
        cell = Cell.parse(options.cell)
    except ValueError as error:
        parser.error(str(error))
    if options.check is not None:
        specs = seed_backends()
        subject = Subject(select_fp8_moe_backend, explain_fp8_moe_backend, Classifier(specs), specs)
        found = violation(options.check, subject, [cell])
        print(found or f"{options.check} holds at {cell}")
        return 0 if found is None else 1
    return show(cell, options.without, options.only)


def show(cell: Cell, without: str | None = None, only: str | None = None) -> int:
    """Prints a cell's call and both answers; 1 if they differ."""
    config, weight_key, activation_key, allow, platform, env = cell.arguments
    order = [i for i, b in enumerate(BACKENDS) if b.value != without and only in (None, b.value)]
    specs = {spec.backend: spec for spec in seed_backends()}
    candidates: dict[str, Any] = {"platform": platform, "env": env, "backends": [specs[BACKENDS[i]] for i in order]}
    call = (config, weight_key, activation_key, allow)
    classifier = Classifier(specs.values())
    expected = expect_call(*call, platform, env, order)
    got = classifier.call(select_fp8_moe_backend, *call, **candidates)
    selection = explain_fp8_moe_backend(*call, **candidates)
    print(f"config          {config}\nweight_key      {weight_key}\nactivation_key  {activation_key}")
    print(f"allow           {allow}\nplatform        {platform}\nenv             {env}")
    print(f"specification   {RULES[int(expected.rule)]} {describe(int(expected.outcome))}")
    print(f"selector        {selection.rule} {describe(got)}")
    if selection.error is not None:
        print(f"error           {selection.error}")
    agree = got == int(expected.outcome) and selection.rule == RULES[int(expected.rule)]
    for index, verdict in zip(order, selection.verdicts, strict=True):
        want, found = int(expected.reason(index)), verdict_code(verdict, env)
        agree &= want == found
        mark = " " if want == found else "!"
        print(f"{mark} {BACKENDS[index].value:22} {_word(want):16} {_word(found):16} {verdict.detail}")
    return 0 if agree else 1


def _word(code: int) -> str:
    return {SUPPORTED: "supported", UNKNOWN: "unknown"}.get(code) or (
        REASONS[code].name if code < len(REASONS) else "contradiction"
    )


if __name__ == "__main__":
    sys.exit(main())
