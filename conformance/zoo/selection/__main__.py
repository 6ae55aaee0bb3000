"""``python -m conformance.zoo.selection [NAME ...]``: which mutant of the selector is convicted, by what, and where.

Exits with 1 if one survives, or if the honest selector does not pass.
"""

from __future__ import annotations

import argparse
import sys
from time import perf_counter

from conformance.selection.smoke import smoke
from conformance.zoo.selection.mutants import MUTANTS
from conformance.zoo.selection.score import Survival, score
from fp8moe import explain_fp8_moe_backend, select_fp8_moe_backend


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m conformance.zoo.selection", description=__doc__)
    parser.add_argument("name", nargs="*", help="of a mutant; default all")
    names: list[str] = parser.parse_args(arguments).name
    unknown = sorted(set(names) - set(MUTANTS))
    if unknown:
        parser.error(f"no mutant {', '.join(unknown)}; there are {', '.join(MUTANTS)}")
    start = perf_counter()
    false_alarm = smoke().first_violation(select_fp8_moe_backend, explain_fp8_moe_backend)
    print(f"the honest selector: {false_alarm or 'passes'}")
    survivors = []
    print(f"{'mutant':<44} {'killed by':<54} {'s':>5}  cell")
    for found in score(MUTANTS[name] for name in names or MUTANTS):
        if isinstance(found, Survival):
            survivors.append(found)
            print(f"{found.mutant:<44} {found.why or 'SURVIVES':<54} {found.seconds:>5.2f}")
        else:
            print(f"{found.mutant:<44} {found.killed_by:<54} {found.seconds:>5.2f}  {found.cell}", flush=True)
    count = len(names or MUTANTS)
    print(f"{count - len(survivors)} of {count} convicted in {perf_counter() - start:.0f} s")
    return 1 if survivors or false_alarm else 0


if __name__ == "__main__":
    sys.exit(main())
