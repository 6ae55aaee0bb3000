"""Compiles many kernels in a process of their own, and outlives a compiler that does not come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import conformance
from conformance.compiled.outcome import Outcome
from conformance.results import Status

Pair = tuple[str, str]
START_S = 120.0
EACH_S = 60.0
"""Seconds for the process to begin, and for each kernel; the slowest was measured at 4."""


def outcomes_of(pairs: Sequence[Pair]) -> dict[Pair, Outcome]:
    """(target, kernel) to what it came to. The kernel at which the process dies or hangs has failed; the rest goes on.

    Raises:
        RuntimeError: the process did not come to a first kernel.
    """
    found: dict[Pair, Outcome] = {}
    left = list(dict.fromkeys(pairs))
    while left:
        begun, done, ending = _one_process(left)
        found |= done
        left = [pair for pair in left if pair not in found]
        if not left:
            break
        if begun is None or begun in found:
            raise RuntimeError(f"python -m conformance.compiled {ending}")
        found[begun] = Outcome(*begun, Status.FAILED, f"the compiler took its process down: it {ending}")
        left.remove(begun)
    return found


def _one_process(pairs: Sequence[Pair]) -> tuple[Pair | None, dict[Pair, Outcome], str]:
    """The last pair begun, those that came to an end, and how the process ended."""
    # triton decides when it is imported whether it interprets, and the tests around may want it to.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(conformance.__file__).parents[1])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "conformance.compiled", "--json", *(f"{target}:{name}" for target, name in pairs)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        limit = START_S + EACH_S * len(pairs)
        try:
            status = subprocess.run(command, env=env, stdout=out, stderr=err, timeout=limit, check=False).returncode
            ending = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            ending = f"did not end within {limit:g} s"
        out.seek(0)
        err.seek(0)
        lines, tail = out.read().splitlines(), err.read()[-1000:].strip()
    begun, done = None, {}
    for line in lines:
        if not line.endswith("}"):
            continue  # cut off
        if "begin" in (data := json.loads(line)):
            begun = (data["begin"][0], data["begin"][1])
        else:
            outcome = Outcome.from_json(line)
            done[outcome.target, outcome.kernel] = outcome
    return begun, done, f"{ending}: {tail}" if tail else ending
