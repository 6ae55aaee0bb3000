"""One case on one backend: build, run, judge.

Where the backend declares its arithmetic, the verdict is equality with the replay oracle, bit for bit; elsewhere it is
the bound around the recipe oracle, and the wide band around the ideal one.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from conformance.bits import (
    Difference,
    StageResult,
    StageShapeError,
    compare_stages,
    difference,
    observed,
    parting_stage,
    why_not_bits,
)
from conformance.bounds import Judgement, judge, judge_ideal
from conformance.build import CaseTensors
from conformance.cases import Case
from conformance.matrix import BY_BITS, BY_BOUND
from conformance.oracles import Oracles, forget, is_small, oracles_of, tensors_of
from conformance.plan import Subject, Target, is_triton
from conformance.relations import broken_relation, captured_differs
from conformance.results import CheckResult, Evidence, Mismatch, Status
from conformance.untouched import Watch
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.recipe import Arithmetic, Contract
from fp8moe.reference.replay import Replay
from fp8moe.registry import BackendUnavailable

CHECK = "computes.equivalence"
OBSERVED_ELEMENTS = 1 << 23
"""Copies of a backend's stages are kept up to so many elements."""
SIMULATED_TWICE_ONE_IN = 4
"""In Triton's interpreter, which takes half a second for a call, one seed in so many has two calls, the others one."""
BOTH_WAYS_SEED = 0
"""Small cases of this seed are judged by the bound as well, whoever declares what: a replay may share a mistake with
the backend that it was written beside."""
GRAPH_SEED = 3
"""Cases of this seed are captured in a graph too, where a backend declares that it can be."""


class _Ended(Exception):
    """A verdict that was come to on the way."""

    def __init__(self, status: Status, reason: str, judgement: Judgement | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.judgement = judgement


def check_case(case: Case, subject: Subject, target: Target) -> CheckResult:
    """The verdict on one case; a backend's own exception is its failure, the suite's own is not caught.

    The backend is called twice, the second time with an `output` full of NaN and, where it shows its stages, observed:
    both results are judged, and the stages where bits are compared.
    """
    simulated = is_triton(subject.experts_cls) and target.device == "cpu"
    check = _Check(case, subject, tensors_of(case, target.device), target, simulated)
    status, reason = Status.PASSED, ""
    try:
        check.run()
    except _Ended as ended:
        status, reason, check.judgement = ended.status, str(ended), ended.judgement or check.judgement
    if status is Status.FAILED:
        forget()  # whatever went wrong may have left its marks in tensors that others would get
    judgement = check.judgement
    evidence = Evidence.SIMULATED if simulated else Evidence.HARDWARE
    judged = status in (Status.PASSED, Status.FAILED)
    return CheckResult(
        "computes",
        CHECK,
        status,
        subject.name,
        case.scheme,
        str(case),
        reason,
        None if judgement is None else judgement.error_over_bound,
        evidence if judged else None,
        {} if judgement is None else dict(judgement.statistics),
        ""
        if status is Status.PASSED
        else f"python -m fp8moe repro {case} --backend {subject.origin} --device {target.name}",
        judged_by=check.judged_by if judged else "",
    )


class _Check:
    """One case on its way to a verdict: `run` returns where it passes, and raises `_Ended` everywhere else."""

    def __init__(self, case: Case, subject: Subject, tensors: CaseTensors, target: Target, simulated: bool) -> None:
        self.case = case
        self.subject = subject
        self.tensors = tensors
        self.target = target
        self.simulated = simulated
        self.watch = Watch(tensors)
        self.judged_by = ""
        self.judgement: Judgement | None = None
        self.seen: dict[str, Tensor] = {}

    def run(self) -> None:
        with _guarded("its constructor"):
            self.backend = self.subject.experts_cls(self.tensors.config, self.tensors.quant, self.tensors.weights)
        # Read once, before anything is computed: a contract does not follow from the outcome.
        self.contract, self.arithmetic = self._declared()
        beyond = _beyond(self.contract, self.case)
        if beyond:
            raise _Ended(Status.NOT_APPLICABLE, beyond)
        outputs = self._outputs()
        again = difference(outputs[0], outputs[-1])
        if self.contract.deterministic and again.differing:
            raise _Ended(Status.FAILED, f"it declares that it is deterministic, and two calls differ: {again}")
        why = why_not_bits(self.tensors, self.contract)
        self.judged_by = f"{BY_BOUND}{why}" if why else BY_BITS
        oracles = oracles_of(self.case, self.contract.recipe, self.arithmetic, self.target.device, by_bits=not why)
        for output in outputs if again.differing else outputs[:1]:
            judged = output.to(oracles.tokens.device)[oracles.tokens]
            if not why:
                self._compare_bits(judged, outputs[-1], oracles)
            if why or (is_small(self.case) and self.case.seed == BOTH_WAYS_SEED):
                self._judge_by_bound(judged, oracles)
        if not why:
            self._relate(outputs[0], oracles)

    def _declared(self) -> tuple[Contract, Arithmetic | None]:
        with _guarded("its contract"):
            contract = self.backend.contract
            if not isinstance(contract, Contract):
                raise TypeError(f"it is a {type(contract).__name__}: expected a fp8moe.recipe.Contract")
            arithmetic = contract.arithmetic_for(int(self.tensors.topk_ids.numel()))
            if arithmetic is not None and not isinstance(arithmetic, Arithmetic):
                raise TypeError(f"its arithmetic is a {type(arithmetic).__name__}: expected a fp8moe.recipe.Arithmetic")
        return contract, arithmetic

    def _outputs(self) -> list[Tensor]:
        """Of the two calls; in the interpreter mostly of one or the other, by the seed, and not observed."""
        poisoned = torch.full_like(self.tensors.hidden_states, torch.nan, memory_format=torch.contiguous_format)
        calls: tuple[Tensor | None, ...] = (None, poisoned)
        once = self.simulated and self.case.seed % SIMULATED_TWICE_ONE_IN != 0
        if once:
            calls = calls[self.case.seed % 2 :][:1]
        outputs = []
        for given in calls:
            looking = observed(self.backend) if not once and given is not None and self._is_observed else nullcontext()
            with looking as seen:
                output = self.call(
                    self.tensors.hidden_states, self.tensors.topk_weights, self.tensors.topk_ids, output=given
                )
            self.seen = seen or self.seen
            if given is not None and output.data_ptr() != given.data_ptr():
                raise _Ended(Status.FAILED, "apply did not write to the output it was given")
            outputs.append(output)
        return outputs

    @property
    def _is_observed(self) -> bool:
        case = self.case
        return case.tokens * case.top_k * (2 * case.inter + case.hidden) <= OBSERVED_ELEMENTS

    def call(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, output: Tensor | None = None
    ) -> Tensor:
        """One call, whose result has the form that it must have, and which leaves its inputs as they were."""
        given = replace(self.tensors, hidden_states=hidden_states, topk_weights=topk_weights, topk_ids=topk_ids)
        with _guarded("apply"):
            result = run(self.backend, given, output)
        broken = _form_of(result, hidden_states) or self.watch.changed()
        if broken:
            raise _Ended(Status.FAILED, broken)
        return result

    def _compare_bits(self, judged: Tensor, last: Tensor, oracles: Oracles) -> None:
        assert self.arithmetic is not None
        assert self.contract.steps is not None
        replay = oracles.replay(self.arithmetic, self.contract.steps)
        found = difference(replay.output, judged)
        try:
            parted = parting_stage(compare_stages(self.seen, last, self.tensors, replay))
        except StageShapeError as error:
            raise _Ended(Status.FAILED, str(error)) from error
        if found.differing or parted:
            raise _Ended(Status.FAILED, _told_difference(found, parted, replay))

    def _judge_by_bound(self, judged: Tensor, oracles: Oracles) -> None:
        self.judgement = judge(oracles.trace, judged, self.arithmetic)
        if not self.judgement.passed:
            raise _Ended(Status.FAILED, _reason(self.judgement, oracles.tokens))
        wide = judge_ideal(oracles.ideal, judged, oracles.trace)
        if not wide.passed:
            raise _Ended(Status.FAILED, f"outside the band of the ideal oracle: {_reason(wide, oracles.tokens)}", wide)

    def _relate(self, output: Tensor, oracles: Oracles) -> None:
        """What reaches the tokens that were not judged, and what a graph makes of other inputs."""
        broken = broken_relation(self.call, self.tensors, output) if oracles.tokens.numel() < self.case.tokens else ""
        captures = self.contract.graph_capturable and self.target.device == "cuda" and self.case.tokens > 0
        if not broken and captures and self.case.seed == GRAPH_SEED:
            with _guarded("a captured call"):
                broken = captured_differs(self.backend, self.tensors, output)
        if broken:
            raise _Ended(Status.FAILED, broken)


@contextmanager
def _guarded(what: str) -> Iterator[None]:
    """The backend's own code: what it raises is the verdict on it."""
    try:
        yield
    except BackendUnavailable as error:
        raise _Ended(Status.NOT_RUN, str(error)) from error
    except torch.OutOfMemoryError as error:
        raise _Ended(Status.NOT_RUN, f"out of memory: {error}") from error
    except (Exception, SystemExit) as error:
        raise _Ended(Status.FAILED, f"{what} raised {_told(error)}") from error


def _told_difference(found: Difference, parted: StageResult | None, replay: Replay) -> str:
    """What differs, in the caller's tokens, and the stage at which the two part, where the backend shows its stages."""
    text = "bits: the output equals the replay of the declared arithmetic, and what led to it does not"
    if found.differing:
        token = int(replay.tokens[found.row])
        text = (
            f"bits: {found.differing} of {found.elements} elements differ from the replay of the declared arithmetic; "
            f"the farthest at token {token}, column {found.column}: expected {found.expected:.9g}, got {found.got:.9g}"
        )
    return text + ("" if parted is None else f"; they part at {parted}")


def replay_of(case: Case, backend: FusedMoEPermuteExpertsUnpermute, target: Target) -> tuple[CaseTensors, Replay] | str:
    """A case's tensors and its replay for a backend made from them; or why there is none."""
    tensors = tensors_of(case, target.device)
    why = why_not_bits(tensors, backend.contract)
    arithmetic = backend.contract.arithmetic_for(int(tensors.topk_ids.numel()))
    if why or arithmetic is None or backend.contract.steps is None:
        return why
    oracles = oracles_of(case, backend.contract.recipe, arithmetic, target.device, by_bits=True)
    return tensors, oracles.replay(arithmetic, backend.contract.steps)


def make(case: Case, subject: Subject, target: Target) -> FusedMoEPermuteExpertsUnpermute:
    """A backend with a case's weights."""
    tensors = tensors_of(case, target.device)
    return subject.experts_cls(tensors.config, tensors.quant, tensors.weights)


def run(backend: FusedMoEPermuteExpertsUnpermute, tensors: CaseTensors, output: Tensor | None = None) -> Tensor:
    """One call of `apply`, to its end."""
    result = tensors.call(backend, output)
    if tensors.hidden_states.device.type == "cuda":
        torch.cuda.synchronize()
    return result


def _beyond(contract: Contract, case: Case) -> str:
    """Which declared limit of the backend the case passes; "" where none."""
    limits = {"top_k": (case.top_k, contract.max_top_k), "experts": (case.experts, contract.max_experts)}
    for name, (value, limit) in limits.items():
        if limit is not None and value > limit:
            return f"{name}={value} is beyond the declared max_{name}={limit}"
    return ""


def _form_of(output: object, hidden: Tensor) -> str:
    if not isinstance(output, Tensor):
        return f"apply returned a {type(output).__name__}: expected a tensor"
    for name in ("shape", "dtype", "device"):
        if getattr(output, name) != getattr(hidden, name):
            return f"apply returned {name} {getattr(output, name)}: expected {getattr(hidden, name)}"
    if output.numel() and output.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr():
        return "apply returned memory of its input"
    return ""


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _reason(judgement: Judgement, tokens: Tensor) -> str:
    worst: Mismatch | None = judgement.worst
    if worst is None:
        return judgement.reason
    token = int(tokens[worst.token])
    told = Mismatch(token, worst.expert, worst.column, worst.columns, worst.expected, worst.got, worst.error_over_bound)
    return f"{judgement.reason}: {told}"
