"""`python -m conformance.contain --faults N --seed S [--device D]`: injects faults and prints what was told of each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every fault was told for what it is and every honest job passed."""
    parser = argparse.ArgumentParser(prog="python -m conformance.contain", description=__doc__)
    parser.add_argument("--faults", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--device", default="cpu", choices=("cpu", "interpreter", "cuda"))
    parser.add_argument("--progress", action="store_true", help="a line on stderr for each fault")
    options = parser.parse_args(arguments)

    from conformance.contain.stress import stress

    def progress(line: str) -> None:
        if options.progress:
            print(line, file=sys.stderr, flush=True)

    run = stress(options.faults, options.seed, options.device, progress)
    print("\n".join(run.lines()))
    return 0 if run.clean else 1


if __name__ == "__main__":
    sys.exit(main())
