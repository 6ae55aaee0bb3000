"""The suite's verdicts on faults of arithmetic, in a process of its own: `verdicts.py DEVICE CASES.json`, to stdout.

CASES.json is a list of (zoo, fault or "", case id); the answer a list of objects, in the same order. Triton's
interpreter is chosen before triton is imported, which is why this is no part of the process that asks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CHECKOUT = str(Path(__file__).parents[2])

if CHECKOUT not in sys.path:
    sys.path.append(CHECKOUT)  # last, so that an installed fp8moe is the one that gets tested

import torch  # noqa: E402

from conformance.bounds import judge  # noqa: E402
from conformance.cases import Case  # noqa: E402
from conformance.checks import check_case  # noqa: E402
from conformance.computes import make, replay_of  # noqa: E402
from conformance.oracles import oracles_of  # noqa: E402
from conformance.plan import Subject, Target, load_subject, resolve_target  # noqa: E402
from conformance.results import Status  # noqa: E402
from conformance.trial import run  # noqa: E402
from conformance.zoo import ARITHMETIC  # noqa: E402


def verdict(zoo: str, fault: str, text: str, target: Target) -> dict[str, Any]:
    """What `check_case` says of a mutant, or of the honest backend, whose name is the zoo's.

    Of a conviction by bits also the cosine with the replay, and what the bound would have said.
    """
    case = Case.parse(text)
    subject = load_subject(f"conformance.zoo:{zoo}.{fault}" if fault else zoo)
    result = check_case(case, subject, target)
    found = {name: getattr(result, name) for name in ("reason", "judged_by", "reproduce")}
    found["status"] = result.status.value
    if result.status is Status.FAILED and fault in ARITHMETIC:
        found |= hiding(case, subject, target)
    return found


def hiding(case: Case, subject: Subject, target: Target) -> dict[str, Any]:
    backend = make(case, subject, target)
    replayed = replay_of(case, backend, target)
    if isinstance(replayed, str):
        return {}
    tensors, replay = replayed
    output = run(backend, tensors)
    right, wrong = replay.output.double().flatten(), output.to(replay.tokens.device)[replay.tokens].double().flatten()
    arithmetic = backend.contract.arithmetic_for(int(tensors.topk_ids.numel()))
    trace = oracles_of(case, backend.contract.recipe, None, target.device, by_bits=False).trace
    bound = judge(trace, output.to(trace.problem.device)[trace.problem.tokens], arithmetic)
    cosine = float(torch.nn.functional.cosine_similarity(right, wrong, dim=0))
    return {"cosine": cosine, "within_bound": bound.passed}


def main(device: str, cases: str) -> None:
    target = resolve_target(device)
    if target.device == "cpu":
        torch.set_num_threads(1)  # the interpreter works in small steps, where threads wait for each other
    asked = json.loads(Path(cases).read_text(encoding="utf-8"))
    print(json.dumps([verdict(zoo, fault, text, target) for zoo, fault, text in asked]))


if __name__ == "__main__":
    main(*sys.argv[1:])
