"""A backend's fingerprint beside its declaration: the check `computes.fingerprint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum

import torch

from conformance.interpreted import Interpreted
from conformance.plan import Cell, Subject, Target, is_simulated, plan
from conformance.probe.fingerprint import Fingerprint, Unreadable, read
from conformance.probe.known import Match, error, expected, nearest, tells_something
from conformance.probe.layer import ACTIVATIONS, crafted_layer
from conformance.probe.questions import BLOCK, sheet
from conformance.results import CheckResult, Evidence, Status
from conformance.trial import Ended, arithmetic_of, contract_of, guarded
from fp8moe.counted import counted
from fp8moe.recipe import Arithmetic
from fp8moe.reference.units import UNITS

CHECK = "computes.fingerprint"
ROW_SCALES = ("channel_tok", "tensor_static", "tensor_tok", "tensor_dyn")
"""Schemes whose scales are applied once, to the sum over all of K, so that promotion is the kernel's own choice."""
BLOCK_SCALES = ("block",)
TOKENS = (16, 128)
"""A kernel may choose its instruction by the number of tokens: for tiles of the smallest height and of the largest."""
LAYERS = 2 * len(TOKENS)
"""That are probed at most: of either kind of scales, with each number of tokens."""


class Verdict(str, Enum):
    """A fingerprint beside a declaration."""

    AS_DECLARED = "as declared"
    BETTER = "better than declared"
    """Another arithmetic, with smaller errors: a new declaration is asked for."""
    WORSE = "worse than declared"
    """Another arithmetic whose errors are not smaller."""
    NOT_DECLARED = "not declared"
    UNREADABLE = "unreadable"
    """The outputs are not the crafted sums at all, so that this check has nothing to say of their rounding."""


@dataclass(frozen=True)
class Reading:
    """One layer's fingerprint.

    Args:
        scheme, tokens: of the layer; 0 tokens for a product that is no layer's.
        seen: the fingerprint; nothing told where it is unreadable.
        declared: the backend's arithmetic for this call.
        verdict: of the two.
        detail: why, in words, for every verdict but as declared.
        looks_like: the known units that are nearest.
    """

    scheme: str
    tokens: int
    seen: Fingerprint
    declared: Arithmetic | None
    verdict: Verdict
    detail: str = ""
    looks_like: tuple[Match, ...] = ()

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        tokens = f", {counted(self.tokens, 'token')}" if self.tokens else ""
        return f"{self.scheme}{tokens}: {self.verdict.value}{detail}"


@dataclass(frozen=True)
class Probed:
    """All that a backend was asked: the result, and what it rests on."""

    result: CheckResult
    readings: tuple[Reading, ...] = ()


def compare(seen: Fingerprint, declared: Fingerprint) -> Verdict:
    """What was seen beside what the declaration leads to, in the fields that the latter tells."""
    if declared.is_fp32 and seen.aligned is False:
        short = seen.carried_bits is not None and seen.carried_bits < (declared.carried_bits or 0)
        return Verdict.WORSE if short or seen.result not in ("to nearest", None) else Verdict.AS_DECLARED
    if not seen.differing(declared):
        return Verdict.AS_DECLARED
    return Verdict.BETTER if error(seen, declared) < error(declared, declared) else Verdict.WORSE


def probe_backend(subject: Subject, target: Target) -> CheckResult:
    """Which arithmetic the second GEMM of a backend has, beside what the backend declares.

    Returns:
        The check `computes.fingerprint`: failed where some reading is worse than declared; passed where each is as
        declared, better, or not declared (`reason` says so); not_applicable where the outputs are not the crafted
        sums and yet within the bound (outside, it failed), and in Triton's interpreter, whose sums are numpy's, where
        they are not as declared.
    """
    return probed(subject, target).result


def probed(subject: Subject, target: Target) -> Probed:
    """As `probe_backend`, with the readings."""
    cells = [_first_that_runs(subject, target, schemes) for schemes in (ROW_SCALES, BLOCK_SCALES)]
    runs = [cell for cell in cells if cell.status is None]
    if not runs:
        status = next((cell.status for cell in cells if cell.status is Status.NOT_RUN), Status.NOT_SUPPORTED)
        reasons = dict.fromkeys(f"{cell.scheme}: {cell.reason}" for cell in cells)
        return Probed(_result(subject, target, status, "; ".join(reasons)))
    readings: list[Reading] = []
    simulated, interpreted = is_simulated(subject.experts_cls, target), Interpreted()
    ended: Ended | None = None
    try:
        for cell in runs:
            for tokens in TOKENS[:1] if simulated else TOKENS:
                readings.append(_reading(cell, target, tokens))
    except Ended as found:
        ended = found
    evidence = Evidence.SIMULATED if simulated or interpreted.ran else Evidence.HARDWARE
    if ended is not None:
        return Probed(_result(subject, target, ended.status, str(ended), readings, evidence), tuple(readings))
    return Probed(_concluded(subject, target, readings, evidence), tuple(readings))


def _first_that_runs(subject: Subject, target: Target, schemes: Sequence[str]) -> Cell:
    cells = plan([subject], target, schemes)
    running = [cell for cell in cells if cell.status is None]
    for cell in running:
        if set(ACTIVATIONS) & set(cell.activations):
            return cell
    if running:
        reason = f"it takes neither {' nor '.join(ACTIVATIONS)}"
        return replace(running[0], status=Status.NOT_SUPPORTED, reason=reason)
    return cells[0]


def _reading(cell: Cell, target: Target, tokens: int) -> Reading:
    dtype = torch.float8_e4m3fnuz if target.platform.uses_fnuz else torch.float8_e4m3fn
    asked = sheet(dtype)
    activation = next(name for name in ACTIVATIONS if name in cell.activations)
    layer = crafted_layer(asked, cell.scheme, tokens, activation=activation, device=target.device)
    with guarded("the crafted layer"):
        output, backend = layer.output(cell.subject.experts_cls)
    contract = contract_of(backend, tokens)
    given = declared = arithmetic_of(contract, tokens)
    if declared is not None and layer.quant.w1.shape is not None and layer.quant.w1.shape.is_block():
        declared = at_most_every(declared, BLOCK)
    try:
        seen = read(asked, layer.products(output))
    except Unreadable as found:
        judgement = layer.judged(output, contract, given)
        if not judgement.passed:  # not another rounding of the crafted sums: wrong
            raise Ended(
                Status.FAILED,
                f"{cell.scheme}, {counted(tokens, 'token')}, the crafted layer: {judgement.reason}",
                judgement,
            ) from None
        return Reading(cell.scheme, tokens, Fingerprint(), declared, Verdict.UNREADABLE, str(found))
    return reading(seen, declared, cell.scheme, tokens, target, dtype)


def at_most_every(declared: Arithmetic, terms: int) -> Arithmetic:
    """The declaration under block scales: a chain cannot be longer than the block that shares a scale."""
    every = declared.promote_every
    return declared if every is not None and every <= terms else replace(declared, promote_every=terms)


def reading(
    seen: Fingerprint, declared: Arithmetic | None, scheme: str, tokens: int, target: Target, dtype: torch.dtype
) -> Reading:
    """The verdict on one fingerprint, in words."""
    looks = tuple(nearest(seen, dtype=dtype, platform=target.platform))
    told = f"{seen}; looks like {' or '.join(map(str, looks))}" if looks else str(seen)
    advice = f"; declare {looks[0].declaration}" if looks and not looks[0].differing else ""
    if declared is None or not tells_something(declared):
        return Reading(scheme, tokens, seen, declared, Verdict.NOT_DECLARED, told + advice, looks)
    if declared.unit != "unknown" and not UNITS[declared.unit].takes(dtype):
        detail = f"it declares {declared.unit}, which does not take {dtype}; {told}{advice}"
        return Reading(scheme, tokens, seen, declared, Verdict.WORSE, detail, looks)
    ours = expected(declared, dtype)
    verdict = compare(seen, ours)
    if verdict is Verdict.AS_DECLARED:
        return Reading(scheme, tokens, seen, declared, verdict, "", looks)
    fields = ", ".join(seen.differing(ours))
    detail = f"declared {declared.unit}: {ours}; seen {told}; they differ in {fields}"
    detail += advice if verdict is Verdict.BETTER else ""
    return Reading(scheme, tokens, seen, declared, verdict, detail, looks)


def _concluded(subject: Subject, target: Target, readings: Sequence[Reading], evidence: Evidence) -> CheckResult:
    by = {verdict: [r for r in readings if r.verdict is verdict] for verdict in Verdict}
    if len(by[Verdict.AS_DECLARED]) == len(readings):
        return _result(subject, target, Status.PASSED, "", readings, evidence)
    told = "; ".join(str(r) for verdict in _BY_WEIGHT for r in by[verdict])
    if evidence is Evidence.SIMULATED:
        reason = f"Triton's interpreter sums as numpy does, which shows no device's arithmetic: {told}"
        return _result(subject, target, Status.NOT_APPLICABLE, reason, readings, evidence)
    if by[Verdict.WORSE]:
        return _result(subject, target, Status.FAILED, told, readings, evidence)
    status = Status.NOT_APPLICABLE if by[Verdict.UNREADABLE] else Status.PASSED
    return _result(subject, target, status, told, readings, evidence)


_BY_WEIGHT = (Verdict.WORSE, Verdict.UNREADABLE, Verdict.BETTER, Verdict.NOT_DECLARED)


def _result(
    subject: Subject,
    target: Target,
    status: Status,
    reason: str,
    readings: Sequence[Reading] = (),
    evidence: Evidence | None = None,
) -> CheckResult:
    return CheckResult(
        "computes",
        CHECK,
        status,
        subject.name,
        reason=reason,
        evidence=evidence if readings else None,
        reproduce="" if status is Status.PASSED else f"python -m fp8moe probe {subject.origin} --device {target.name}",
        scope=", ".join(f"{r.scheme} with {counted(r.tokens, 'token')}" for r in readings),
        measured={
            f"{r.scheme}/{r.tokens}/{name}": float(value)
            for r in readings
            for name, value in asdict(r.seen).items()
            if isinstance(value, (bool, int))
        },
    )
