"""`python -m conformance.sanitizer.one CASE ORIGIN DEVICE`: one case's calls, and nothing else, for a tool to watch.

No oracle is asked: under a sanitizer that would take minutes, and its own kernels are not what is looked at.
"""

from __future__ import annotations

import sys

from conformance.cases import Case
from conformance.plan import load_subject, resolve_target
from conformance.results import Status
from conformance.sanitizer.tool import RAISED, REFUSED, UNAVAILABLE
from conformance.trial import Ended, Trial

CALLS = 2
"""The second meets what the first has left: workspaces, caches."""


def main(case: str, origin: str, device: str) -> int:
    """0: it ran; REFUSED: the backend does not take the case; RAISED: it raised; UNAVAILABLE: no library."""
    trial = Trial(Case.parse(case), load_subject(origin), resolve_target(device))
    try:
        trial.start()
        for _ in range(CALLS):
            trial.call()
    except Ended as ended:
        print(ended)
        return {Status.FAILED: RAISED, Status.NOT_RUN: UNAVAILABLE}.get(ended.status, REFUSED)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
