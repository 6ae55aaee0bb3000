"""`python -m conformance.compiled TARGET[:KERNEL,...] ...`: compiles here and now, and gives a table, or JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence

from conformance.compiled.targets import TARGETS

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("conformance.compiled: TRITON_INTERPRET=1 is set, so triton interprets and does not compile; unset it")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m conformance.compiled", description=__doc__)
    parser.add_argument("targets", nargs="+", metavar="TARGET[:KERNEL,...]", help=f"all, {', '.join(TARGETS)}")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as they come")
    options = parser.parse_args(arguments)

    from conformance.compiled.compile import outcome_of
    from fp8moe.kernels.variants import VARIANTS

    pairs = []
    for text in options.targets:
        name, _, kernels = text.partition(":")
        targets = list(TARGETS) if name == "all" else [name]
        chosen = [kernel for kernel in kernels.split(",") if kernel] or options.kernel or list(VARIANTS)
        if not set(targets) <= set(TARGETS):
            parser.error(f"{name}: expected all or one of {', '.join(TARGETS)}")
        if not set(chosen) <= set(VARIANTS):
            parser.error(f"{', '.join(sorted(set(chosen) - set(VARIANTS)))}: expected of {', '.join(VARIANTS)}")
        pairs += [(target, kernel) for target in targets for kernel in chosen]
    outcomes = []
    for target, kernel in dict.fromkeys(pairs):
        if options.json:
            print(json.dumps({"begin": [target, kernel]}), flush=True)
        with contextlib.redirect_stdout(sys.stderr):  # where ptxas fails, triton prints the program
            outcome = outcome_of(TARGETS[target], kernel)
        outcomes.append(outcome)
        if options.json:
            print(outcome.to_json(), flush=True)
    if not options.json:
        from conformance.compiled.report import told

        print(told(outcomes))
    return any(outcome.status.value == "failed" for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
