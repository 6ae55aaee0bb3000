"""One case on one backend: build, run, judge.

Where the backend declares its arithmetic, the verdict is equality with the replay oracle, bit for bit; elsewhere it is
the bound around the recipe oracle, and the wide band around the ideal one.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from conformance.bits import Difference, StageResult, compare_stages, difference, observed, parting_stage, why_not_bits
from conformance.bounds import Judgement, judge, judge_ideal
from conformance.build import CaseTensors, build, judged_tokens
from conformance.cases import Case
from conformance.matrix import BY_BITS, BY_BOUND
from conformance.plan import Subject, Target, is_triton
from conformance.relations import broken_relation
from conformance.results import CheckResult, Evidence, Mismatch, Status
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.recipe import FP32, Arithmetic, Contract, Recipe, Steps
from fp8moe.reference.ideal import ideal_moe
from fp8moe.reference.recipe import RecipeTrace, recipe_moe
from fp8moe.reference.replay import Replay, replay_moe
from fp8moe.registry import BackendUnavailable
from fp8moe.schemes import SCHEMES, TENSOR_DYNAMIC

CHECK = "computes.equivalence"
KEPT_CASES = 32
COPIED_BYTES = 1 << 22
SIMULATED_TWICE = 4
OBSERVED_ELEMENTS = 1 << 23


REPLAYED_WHOLE = 1 << 30
"""Up to so many products all tokens of a case are replayed on a GPU; else some are, and relations do the rest."""
BOTH_WAYS_SEED = 0
"""Small cases of this seed are judged by the bound as well, whoever declares what: a replay may share a mistake with
the backend that it was written beside."""


@dataclass(frozen=True, eq=False)
class Oracles:
    """What a case must come to, for its judged tokens."""

    tokens: Tensor
    trace: RecipeTrace
    replays: dict[tuple[Arithmetic, Steps], Replay] = field(default_factory=dict)

    @cached_property
    def ideal(self) -> Tensor:
        call = self.trace.problem
        return ideal_moe(
            call.config,
            call.quant,
            call.weights,
            call.hidden_states,
            call.topk_weights,
            call.topk_ids,
            expert_map=call.expert_map,
            apply_router_weight_on_input=call.apply_router_weight_on_input,
            tokens=self.tokens,
        )

    def replay(self, arithmetic: Arithmetic, steps: Steps) -> Replay:
        """Computed once for each declared arithmetic."""
        if (arithmetic, steps) not in self.replays:
            self.replays[arithmetic, steps] = replay_moe(self.trace, arithmetic, steps)
        return self.replays[arithmetic, steps]


def check_case(case: Case, subject: Subject, target: Target) -> CheckResult:
    """The verdict on one case; a backend's own exception is its failure, the suite's own is not caught.

    The backend is called twice, the second time with an `output` full of NaN: both results are judged. In Triton's
    interpreter, which takes half a second for a call, most cases have the second call alone.
    """
    tensors = _tensors(case, target.device)
    simulated = is_triton(subject.experts_cls) and target.device == "cpu"
    evidence = Evidence.SIMULATED if simulated else Evidence.HARDWARE

    def result(status: Status, reason: str, judgement: Judgement | None = None, judged_by: str = "") -> CheckResult:
        if status is Status.FAILED:
            _forget()  # whatever went wrong may have left its marks in tensors that others would get
        repro = f"python -m fp8moe repro {case} --backend {subject.origin} --device {target.name}"
        return CheckResult(
            "computes",
            CHECK,
            status,
            subject.name,
            case.scheme,
            str(case),
            reason,
            None if judgement is None else judgement.error_over_bound,
            evidence if status in (Status.PASSED, Status.FAILED) else None,
            {} if judgement is None else dict(judgement.statistics),
            "" if status is Status.PASSED else repro,
            judged_by=judged_by,
        )

    before = [_fingerprint(tensor) for tensor in _inputs(tensors)]
    try:
        backend = subject.experts_cls(tensors.config, tensors.quant, tensors.weights)
    except BackendUnavailable as error:
        return result(Status.NOT_RUN, str(error))
    except (Exception, SystemExit) as error:
        return result(Status.FAILED, f"its constructor raised {_told(error)}")
    beyond = _beyond(backend.contract, case)
    if beyond:
        return result(Status.NOT_APPLICABLE, beyond)
    outputs, seen = [], {}
    poisoned = torch.full_like(tensors.hidden_states, torch.nan, memory_format=torch.contiguous_format)
    once = simulated and case.seed % SIMULATED_TWICE != 0
    for given in (poisoned,) if once else (None, poisoned):
        try:
            if given is not None and _is_observed(case):
                with observed(backend) as seen:
                    output = run(backend, tensors, given)
            else:
                output = run(backend, tensors, given)
        except torch.OutOfMemoryError as error:
            return result(Status.NOT_RUN, f"out of memory: {error}")
        except (Exception, SystemExit) as error:
            return result(Status.FAILED, f"apply raised {_told(error)}")
        broken = _form_of(output, tensors) or _changed(before, tensors)
        if not broken and given is not None and output.data_ptr() != given.data_ptr():
            broken = "apply did not write to the output it was given"
        if broken:
            return result(Status.FAILED, broken)
        outputs.append(output)
    again = difference(outputs[0], outputs[-1])
    if backend.contract.deterministic and again.differing:
        return result(Status.FAILED, f"it declares that it is deterministic, and two calls differ: {again}")
    arithmetic = backend.contract.arithmetic_for(int(tensors.topk_ids.numel()))
    why = why_not_bits(tensors, backend.contract)
    judged_by = f"{BY_BOUND}{why}" if why else BY_BITS
    oracles = _oracles_for(case, backend.contract.recipe, arithmetic, target.device, by_bits=not why)
    judgement = None
    for output in outputs if again.differing else outputs[:1]:
        judged = output.to(oracles.tokens.device)[oracles.tokens]
        if not why:
            assert arithmetic is not None
            assert backend.contract.steps is not None
            replay = oracles.replay(arithmetic, backend.contract.steps)
            found = difference(replay.output, judged)
            parted = parting_stage(compare_stages(seen, outputs[-1], tensors, replay))
            if found.differing or parted:
                return result(Status.FAILED, _told_difference(found, parted, replay), None, judged_by)
        if why or (_is_small(case) and case.seed == BOTH_WAYS_SEED):
            judgement = judge(oracles.trace, judged, arithmetic)
            if not judgement.passed:
                return result(Status.FAILED, _reason(judgement, oracles.tokens), judgement, judged_by)
            wide = judge_ideal(oracles.ideal, judged, oracles.trace)
            if not wide.passed:
                reason = f"outside the band of the ideal oracle: {_reason(wide, oracles.tokens)}"
                return result(Status.FAILED, reason, wide, judged_by)
    broken = broken_relation(backend, tensors, outputs[0]) if not why and oracles.tokens.numel() < case.tokens else ""
    if broken:
        return result(Status.FAILED, broken, judgement, judged_by)
    return result(Status.PASSED, "", judgement, judged_by)


def _told_difference(found: Difference, parted: StageResult | None, replay: Replay) -> str:
    """What differs, in the caller's tokens, and the stage at which the two part, where the backend shows its stages."""
    text = "bits: the output equals the replay of the declared arithmetic, and what led to it does not"
    if found.differing:
        token = int(replay.tokens[found.row])
        text = (
            f"bits: {found.differing} of {found.elements} elements differ from the replay of the declared arithmetic; "
            f"the farthest at token {token}, column {found.column}: expected {found.expected:.9g}, got {found.got:.9g}"
        )
    return text + ("" if parted is None else f"; they part at {parted.stage}: {parted.difference}")


def replay_of(case: Case, backend: FusedMoEPermuteExpertsUnpermute, target: Target) -> tuple[CaseTensors, Replay] | str:
    """A case's tensors and its replay for a backend made from them; or why there is none."""
    tensors = _tensors(case, target.device)
    why = why_not_bits(tensors, backend.contract)
    arithmetic = backend.contract.arithmetic_for(int(tensors.topk_ids.numel()))
    if why or arithmetic is None or backend.contract.steps is None:
        return why
    oracles = _oracles_for(case, backend.contract.recipe, arithmetic, target.device, by_bits=True)
    return tensors, oracles.replay(arithmetic, backend.contract.steps)


def make(case: Case, subject: Subject, target: Target) -> FusedMoEPermuteExpertsUnpermute:
    """A backend with a case's weights."""
    tensors = _tensors(case, target.device)
    return subject.experts_cls(tensors.config, tensors.quant, tensors.weights)


def run(backend: FusedMoEPermuteExpertsUnpermute, tensors: CaseTensors, output: Tensor | None = None) -> Tensor:
    """One call of `apply`, three arguments by position and the rest by keyword."""
    result = backend.apply(
        tensors.hidden_states,
        tensors.topk_weights,
        tensors.topk_ids,
        expert_map=tensors.expert_map,
        apply_router_weight_on_input=tensors.apply_router_weight_on_input,
        output=output,
    )
    if tensors.hidden_states.device.type == "cuda":
        torch.cuda.synchronize()
    return result


def _build(text: str, device: str) -> CaseTensors:
    return build(Case.parse(text), device)


_small_tensors = lru_cache(maxsize=KEPT_CASES)(_build)
_large_tensors = lru_cache(maxsize=1)(_build)


def _tensors(case: Case, device: str) -> CaseTensors:
    """The case's tensors, kept: every backend and every mutant asks for them again."""
    return (_small_tensors if _is_small(case) else _large_tensors)(str(case), device)


def _oracles_for(case: Case, recipe: Recipe, arithmetic: Arithmetic | None, device: str, *, by_bits: bool) -> Oracles:
    """The oracles of a case; of all its tokens, where they are replayed and the products are few enough."""
    products = case.tokens * case.top_k * case.hidden * case.inter * (3 if case.gated else 2)
    everything = by_bits and device != "cpu" and products <= REPLAYED_WHOLE
    return _oracles(case, recipe, oracle_device(case, arithmetic, device), everything)


def _oracles(case: Case, recipe: Recipe, device: str, everything: bool = False) -> Oracles:
    """What the case must come to under a recipe, kept likewise."""
    if SCHEMES[case.scheme] != TENSOR_DYNAMIC:  # the only scheme in which what shares a tensor's scale plays a part
        recipe = replace(recipe, dynamic_tensor_scope=Recipe().dynamic_tensor_scope)
    return (_small_oracles if _is_small(case) else _large_oracles)(str(case), recipe, device, everything)


def oracle_device(case: Case, arithmetic: Arithmetic | None, device: str) -> str:
    """Where the oracles of a case compute. Its tensors have the same bits on every device, and a small case is a
    thousand tiny operations, which a CPU has done before a GPU has launched them; but for the bound of a matrix unit,
    which adds up every group of its terms."""
    fp32 = arithmetic is not None and arithmetic.unit == FP32.unit
    return "cpu" if _is_small(case) and fp32 else device


def _is_small(case: Case) -> bool:
    return case.weight_bytes <= 1 << 22 and case.tokens * case.hidden <= 1 << 20


def _is_observed(case: Case) -> bool:
    """Whether copies of a backend's stages are small enough to keep."""
    return case.tokens * case.top_k * (2 * case.inter + case.hidden) <= OBSERVED_ELEMENTS


def _compute_oracles(text: str, recipe: Recipe, device: str, everything: bool) -> Oracles:
    case = Case.parse(text)
    tensors = _tensors(case, device)
    tokens = torch.arange(case.tokens, device=device) if everything else judged_tokens(case).to(device)
    arguments = (tensors.hidden_states, tensors.topk_weights, tensors.topk_ids)
    trace = recipe_moe(
        tensors.config,
        tensors.quant,
        recipe,
        tensors.weights,
        *arguments,
        expert_map=tensors.expert_map,
        apply_router_weight_on_input=tensors.apply_router_weight_on_input,
        tokens=tokens,
    )
    return Oracles(tokens, trace)


_small_oracles = lru_cache(maxsize=KEPT_CASES)(_compute_oracles)
_large_oracles = lru_cache(maxsize=2)(_compute_oracles)


def _forget() -> None:
    """Drops every kept case."""
    for kept in (_small_tensors, _large_tensors, _small_oracles, _large_oracles):
        kept.cache_clear()


def _inputs(tensors: CaseTensors) -> list[Tensor]:
    """What a backend must leave as it is: the call's tensors and all weights."""
    given = [tensors.hidden_states, tensors.topk_weights, tensors.topk_ids, tensors.expert_map]
    return [tensor for tensor in (*given, *vars(tensors.weights).values()) if tensor is not None]


def _fingerprint(tensor: Tensor) -> Tensor:
    """A copy of a tensor's bytes; of a large one the sums of its bytes, in 1,024 parts, which one change changes."""
    raw = tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if raw.numel() <= COPIED_BYTES:
        return raw
    return torch.stack([part.sum(dtype=torch.int64) for part in raw.chunk(1024)])


def _changed(before: list[Tensor], tensors: CaseTensors) -> str:
    for kept, tensor in zip(before, _inputs(tensors), strict=True):
        if not torch.equal(kept, _fingerprint(tensor)):
            return f"it changed an input of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
    return ""


def _beyond(contract: Contract, case: Case) -> str:
    """Which declared limit of the backend the case passes; "" where none."""
    limits = {"top_k": (case.top_k, contract.max_top_k), "experts": (case.experts, contract.max_experts)}
    for name, (value, limit) in limits.items():
        if limit is not None and value > limit:
            return f"{name}={value} is beyond the declared max_{name}={limit}"
    return ""


def _form_of(output: object, tensors: CaseTensors) -> str:
    hidden = tensors.hidden_states
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
