"""One case on one backend again: the verdict, where it shows most, each stage beside the replay, and all tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from conformance.bits import StageResult, StageShapeError, compare_stages, difference, observed
from conformance.bounds import allowance_for
from conformance.bounds.statistics import element_bound
from conformance.bounds.suspect import BLOCK
from conformance.build import CaseTensors
from conformance.cases import Case
from conformance.checks import EQUIVALENCE, tried
from conformance.compared import Compared
from conformance.computes import make, replay_of
from conformance.oracles import Oracles, oracles_of, tensors_of
from conformance.plan import Subject, Target
from conformance.results import CheckResult, Mismatch, Status, finite
from conformance.trial import Trial, run
from conformance.versions import versions
from fp8moe.texts import said

SCALES = 4
"""Of a row, that are shown."""
FORMAT = 1
"""Of the metadata and names of a dump: a name is added without a new one."""


@dataclass(frozen=True)
class Again:
    """
    Args:
        result: of the case.
        trial: what it was come to by; None where the case has nothing to show for the check.
    """

    case: Case
    subject: Subject
    target: Target
    result: CheckResult
    trial: Trial | None

    @property
    def mismatch(self) -> Mismatch | None:
        """Where it fails most, if that can be told."""
        return None if self.trial is None else self.trial.mismatch

    @property
    def compared(self) -> Compared | None:
        """The two calls of a relation; None of equivalence, whose calls are all the case's own."""
        return None if self.trial is None or self.result.check == EQUIVALENCE else self.trial.compared.found

    @property
    def calls(self) -> Mapping[str, str]:
        """Each of the calls in words, by its name; of two the one with the mismatch says so."""
        found, trial = self.compared, self.trial
        if found is None or trial is None:
            return {}
        told = dict(found.told(trial.tensors))
        if self.mismatch is not None and len(told) > 1:
            told["first" if found.at_first else "second"] += "; the mismatch is in this one"
        return told


def run_again(case: Case, subject: Subject, target: Target, check: str, *, keep: bool = False) -> Again:
    """
    Args:
        keep: the outputs, for `dumped`.

    Raises:
        Exception: of the suite's own; no verdict on the backend.
    """
    return Again(case, subject, target, *tried(case, subject, target, check, keep=keep, explain=True))


def told_mismatch(again: Again) -> Iterator[tuple[str, str]]:
    """Name and value of all that is known of the element where a case fails most."""
    found, trial = again.mismatch, again.trial
    if found is None or trial is None:
        return
    case, compared = again.case, again.compared
    tensors, row = trial.tensors, found.token
    if compared is not None:
        tensors, row = compared.shown, found.token if compared.row is None else compared.row
    for name, what in again.calls.items():
        yield f"{name} call", what
    yield "token", f"{found.token} of {case.tokens}" + (f", row {row} of that call" if row != found.token else "")
    if 0 <= row < len(tensors.topk_ids):
        ids, weights = tensors.topk_ids[row].tolist(), tensors.topk_weights[row].tolist()
        slots = [f"{expert} (weight {weight:.6g})" for expert, weight in zip(ids, weights, strict=True)]
        yield "experts of the token", ", ".join(slots)
    yield "expert to blame", "cannot be told" if found.expert is None else str(found.expert)
    yield "column", f"{found.column} of {tensors.hidden_states.shape[1]}"
    yield "block of columns", f"{found.columns[0] // BLOCK}: columns {found.columns[0]} to {found.columns[1]}"
    yield "scale of w2 there", _scale_there(case, tensors, found)
    yield "expected", f"{found.expected:.9g}"
    yield "got", f"{found.got:.9g}"
    yield "error", f"{found.error:.6g}"
    yield "bound", "0: the bits must be equal" if found.bound == 0 else f"{found.bound:.6g}"
    yield "error/bound", f"{found.error_over_bound:.4g} (limit 1)"


def _scale_there(case: Case, tensors: CaseTensors, found: Mismatch) -> str:
    """Which scale the second weight's rows of that column have, and of the expert to blame its values."""
    group = tensors.quant.w1.shape
    scale = tensors.weights.w2_scale
    if scale is None or group is None:
        return f"none, scheme {case.scheme}"
    row = () if group.is_per_tensor() else (found.column // group.row if group.is_block() else found.column,)
    local = found.expert
    if local is not None and tensors.expert_map is not None:
        local = int(tensors.expert_map[local])
    if local is None or not 0 <= local < len(scale):
        return f"w2_scale[{', '.join(map(str, ('expert', *row)))}]"
    place = (local, *row)
    values = scale[place].reshape(-1)
    shown = ", ".join(f"{value:.6g}" for value in values[:SCALES].tolist())
    more = ", …" if len(values) > SCALES else ""
    return f"w2_scale[{', '.join(map(str, place))}] = {shown}{more}"


def stages_of(again: Again) -> Sequence[StageResult] | str:
    """Each stage beside the replay of what the backend declares; or why there is none to compare ("": none is due)."""
    case, subject, target = again.case, again.subject, again.target
    if again.result.check != EQUIVALENCE or again.result.status not in (Status.PASSED, Status.FAILED):
        return ""
    try:
        backend = make(case, subject, target)
        with observed(backend) as seen:
            output = run(backend, tensors_of(case, target.device))
    except (Exception, SystemExit) as error:  # the verdict stands as it is, this only explains it
        return f"not compared, since the backend raised {said(error)}"
    found = replay_of(case, backend, target)
    if isinstance(found, str):
        return ""
    try:
        return list(compare_stages(seen, output, *found))
    except StageShapeError as error:
        return str(error)


def dumped(again: Again) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a case that was run with `keep`, on the CPU, and texts that say what they are.

    Those of the case have the names of `MoEWeights` and of `apply`'s arguments. `got` is the output, (M, H); further
    calls that gave other bits are `got_2` …. `tokens`, (T,) int64, are those that were judged; `expected` and `bound`,
    (T, H) float64, what the declared recipe comes to for them and how far the output may be from it, and `replay`, (T,
    H), where the arithmetic is declared, the bits that it must have.

    A relation compares two calls (or judges one by itself). The texts `first` and `second` (`only`) say of each what it
    is, and the names here of its tensors: those of the case, or, where they are others, with the call's name and a
    point before them. `got` is among them, and of the one that was judged `expected`, with `bound` where it is not
    bits that must be equal, for `rows` of the call, where these are not all.
    """
    case, trial = again.case, again.trial
    tensors = tensors_of(case, again.target.device)
    found = tensors.named()
    if trial is not None:
        found |= _outputs(trial.kept or ())
        if trial.judged_by:  # it was started: there is a backend, and what it declares
            oracles = oracles_of(
                case, trial.contract.recipe, trial.arithmetic, again.target.device, by_bits=trial.by_bits
            )
            found |= _judged_by(oracles, trial)
    calls, named = _calls(again)
    found |= named
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    result = again.result
    told = {
        "format": str(FORMAT),
        "case": str(case),
        "check": result.check,
        "backend": again.subject.name,
        "origin": again.subject.origin,
        "target": again.target.name,
        "status": result.status.value,
        "reason": result.reason,
        "judged_by": result.judged_by,
        "digest": result.digest,
        "scheme": case.scheme,
        "apply_router_weight_on_input": str(case.weight_on_input).lower(),
        "versions": json.dumps(versions()),
        **calls,
        "mismatch": json.dumps(None if again.mismatch is None else finite(asdict(again.mismatch))),
    }
    return on_cpu, told


def _calls(again: Again) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Of a relation's calls what each is, as JSON, and the tensors that the case itself has not."""
    told: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    trial, compared = again.trial, again.compared
    if trial is None or compared is None:
        return told, found
    own = trial.tensors.named()
    for call, tensors in compared.tensors().items():
        names = {name: name if own.get(name) is tensor else f"{call}.{name}" for name, tensor in tensors.items()}
        if "got" not in names and compared.first is trial.tensors and trial.kept:
            names["got"] = "got"
        found |= {names[name]: tensor.clone() for name, tensor in tensors.items() if names[name] != name}
        told[call] = json.dumps({"what": again.calls[call], "tensors": names})
    return told, found


def _outputs(kept: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """The first, and those that differ from it."""
    others = [output for output in kept[1:] if kept[0].shape == output.shape and difference(kept[0], output).differing]
    named = {f"got_{number}": output for number, output in enumerate(others, 2)}
    return {"got": kept[0], **named} if kept else {}


def _judged_by(oracles: Oracles, trial: Trial) -> Mapping[str, Tensor]:
    trace = oracles.trace
    allowance = allowance_for(trace, trial.arithmetic)
    found = {
        "tokens": oracles.tokens.to(torch.int64),
        "expected": trace.smooth.double(),
        "bound": element_bound(trace.smooth, allowance.total, trace.problem.carrier).double(),
    }
    if trial.by_bits and trial.arithmetic is not None and trial.steps is not None:
        found["replay"] = oracles.replay(trial.arithmetic, trial.steps).output
    return found
