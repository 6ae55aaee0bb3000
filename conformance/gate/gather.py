"""What a backend's outputs come to on the pinned cases, taken in worker processes: the numerics of a baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch

from conformance.bounds import judge
from conformance.cases import Case
from conformance.checks import EQUIVALENCE
from conformance.contain import SubjectRef, Worker, WorkerEnded
from conformance.gate.numerics import CaseFigures
from conformance.oracles import trace_of
from conformance.plan import resolve_target
from conformance.planned import Plan
from conformance.results import Status
from conformance.trial import Ended, Trial

DIGITS = 16
SKIPPED, FAILED = "skipped", "failed"
Progress = Callable[[str, str], None]


class NotGathered(RuntimeError):
    """A backend failed where a baseline needs its output; the text says on which case and why."""


def gather(
    workers: Sequence[Worker], backends: Sequence[SubjectRef], seed: int = 0, progress: Progress | None = None
) -> dict[str, dict[str, CaseFigures]]:
    """By cell ("BACKEND SCHEME", the backend as it was asked for) and case; what a backend does not take is left out.

    Args:
        workers: on one device; each runs cases beside the others.
        progress: called with the cell and the case before each.

    Raises:
        NotGathered: a backend is not there, runs nothing here, raised, or its output is wrong.
    """
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def told(ref: SubjectRef, cell: str, case: Case) -> dict[str, Any]:
        worker = free.get()
        try:
            if progress is not None:
                progress(cell, str(case))
            answer: dict[str, Any] = worker.call(told_figures, ref, worker.target_name, str(case))
        except WorkerEnded as ended:
            answer = {FAILED: str(ended)}
        finally:
            free.put(worker)
        if FAILED in answer:
            raise NotGathered(f"{ref.origin} on {case}: {answer[FAILED]}; run `fp8moe check {ref.origin}` first")
        return answer

    wanted = [(ref, f"{ref.origin} {case.scheme}", case) for ref in backends for case in _cases(workers[0], ref, seed)]
    found: dict[str, dict[str, CaseFigures]] = {}
    with ThreadPoolExecutor(len(workers)) as threads:
        futures = [threads.submit(told, *one) for one in wanted]
        try:
            for (_, cell, case), future in zip(wanted, futures, strict=True):
                answer = future.result()
                if SKIPPED not in answer:
                    found.setdefault(cell, {})[str(case)] = CaseFigures(**answer)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return found


def _cases(worker: Worker, ref: SubjectRef, seed: int) -> list[Case]:
    try:
        plan = Plan.of(worker, ref, None, "smoke", seed, selects=False)
    except WorkerEnded as ended:
        raise NotGathered(f"{ref.origin}: {ended}") from None
    failed = [result.reason for result in plan.settled if result.status is Status.FAILED]
    if failed or not plan.items:
        why = failed or [result.reason for result in plan.settled] or ["it runs no scheme here"]
        raise NotGathered(f"{ref.origin} gives no output here: {'; '.join(dict.fromkeys(why))}")
    return [item.case for item in plan.items if item.check == EQUIVALENCE]


def told_figures(ref: SubjectRef, device: str, text: str) -> dict[str, Any]:
    """In a worker: one case's figures as plain data, or why there are none."""
    trial = Trial(Case.parse(text), ref.load(), resolve_target(device))
    try:
        trial.start()
        output = trial.call()
    except Ended as ended:
        return {FAILED if ended.status is Status.FAILED else SKIPPED: str(ended)}
    trace = trace_of(trial.tensors, trial.contract.recipe)
    judgement = judge(trace, output.to(trace.R.device), trial.arithmetic)
    if not judgement.passed:
        return {FAILED: judgement.reason}
    exact, got = trace.smooth.double(), output.to(trace.smooth.device).double()
    finite = torch.isfinite(exact) & torch.isfinite(got)  # what overflows, as it may, is for the digest alone
    distance = torch.where(finite, got - exact, 0.0)
    norm = float(torch.where(finite, exact, 0.0).norm())
    error = float(distance.norm())
    digest = hashlib.sha256(output.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return {
        "digest": digest[:DIGITS],
        "error": error / norm if norm else error,
        "error_over_bound": judgement.error_over_bound,
    }
