"""Equivalence, the check that every case gets: the backend's output against the oracles.

Where the backend declares its arithmetic, the verdict is equality with the replay oracle, bit for bit; elsewhere it is
the bound around the recipe oracle, and the wide band around the ideal one.
"""

from __future__ import annotations

from contextlib import nullcontext
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
from conformance.bounds import judge, judge_ideal
from conformance.build import CaseTensors
from conformance.cases import Case
from conformance.mismatches import in_bits, told_judgement, worst_of
from conformance.oracles import Oracles, is_small, oracles_of, tensors_of
from conformance.plan import Subject, Target
from conformance.results import Status
from conformance.tokens import broken_relation, captured_differs
from conformance.trial import Ended, Trial, guarded
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.reference.replay import Replay

OBSERVED_ELEMENTS = 1 << 23
"""Copies of a backend's stages are kept up to so many elements."""
SIMULATED_TWICE_ONE_IN = 4
"""In Triton's interpreter, which takes half a second for a call, one seed in so many has two calls, the others one."""
BOTH_WAYS_SEED = 0
"""Small cases of this seed are judged by the bound as well, whoever declares what: a replay may share a mistake with
the backend that it was written beside."""
GRAPH_SEED = 3
"""Cases of this seed are captured in a graph too, where a backend declares that it can be."""


def equivalence(trial: Trial) -> None:
    """The backend is called twice, the second time with an `output` full of NaN and, where it shows its stages,
    observed: both results are judged, and the stages where bits are compared.

    Raises:
        Ended: everywhere but where it passes.
    """
    _Equivalence(trial).run()


class _Equivalence:
    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.case = trial.case
        self.seen: dict[str, Tensor] = {}

    def run(self) -> None:
        trial = self.trial
        outputs = self._outputs()
        again = difference(outputs[0], outputs[-1])
        if trial.contract.deterministic and again.differing:
            told = f"it declares that it is deterministic, and two calls differ: {again}"
            raise Ended(Status.FAILED, told, mismatch=in_bits(again, again.row, outputs[0].shape[1]))
        oracles = oracles_of(
            self.case, trial.contract.recipe, trial.arithmetic, trial.target.device, by_bits=trial.by_bits
        )
        for output in outputs if again.differing else outputs[:1]:
            judged = output.to(oracles.tokens.device)[oracles.tokens]
            if trial.by_bits:
                self._compare_bits(judged, outputs[-1], oracles)
            if not trial.by_bits or (is_small(self.case) and self.case.seed == BOTH_WAYS_SEED):
                self._judge_by_bound(judged, oracles)
        if trial.by_bits:
            self._relate(outputs[0], oracles)

    def _outputs(self) -> list[Tensor]:
        """Of the two calls; in the interpreter mostly of one or the other, by the seed, and not observed."""
        trial = self.trial
        poisoned = torch.full_like(trial.tensors.hidden_states, torch.nan, memory_format=torch.contiguous_format)
        calls: tuple[Tensor | None, ...] = (None, poisoned)
        once = trial.simulated and self.case.seed % SIMULATED_TWICE_ONE_IN != 0
        if once:
            calls = calls[self.case.seed % 2 :][:1]
        outputs = []
        for given in calls:
            looking = observed(trial.backend) if not once and given is not None and self._is_observed else nullcontext()
            with looking as seen:
                outputs.append(trial.call(output=given))
            self.seen = seen or self.seen
        return outputs

    @property
    def _is_observed(self) -> bool:
        case = self.case
        return case.tokens * case.top_k * (2 * case.inter + case.hidden) <= OBSERVED_ELEMENTS

    def _compare_bits(self, judged: Tensor, last: Tensor, oracles: Oracles) -> None:
        trial = self.trial
        assert trial.arithmetic is not None
        assert trial.steps is not None
        replay = oracles.replay(trial.arithmetic, trial.steps)
        found = difference(replay.output, judged)
        try:
            parted = parting_stage(compare_stages(self.seen, last, trial.tensors, replay))
        except StageShapeError as error:
            raise Ended(Status.FAILED, str(error)) from error
        if found.differing or parted:
            where = None
            if found.differing:
                where = in_bits(found, int(replay.tokens[found.row]), judged.shape[1])
            raise Ended(Status.FAILED, _told_difference(found, parted, replay), mismatch=where)

    def _judge_by_bound(self, judged: Tensor, oracles: Oracles) -> None:
        judgement = self.trial.judgement = judge(oracles.trace, judged, self.trial.arithmetic)
        if not judgement.passed:
            where = worst_of(judgement, oracles.tokens)
            raise Ended(Status.FAILED, told_judgement(judgement, oracles.tokens), mismatch=where)
        wide = judge_ideal(oracles.ideal, judged, oracles.trace)
        if not wide.passed:
            told = told_judgement(wide, oracles.tokens)
            where = worst_of(wide, oracles.tokens)
            raise Ended(Status.FAILED, f"outside the band of the ideal oracle: {told}", wide, where)

    def _relate(self, output: Tensor, oracles: Oracles) -> None:
        """What reaches the tokens that were not judged, and what a graph makes of other inputs."""
        trial = self.trial

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
            given = replace(trial.tensors, hidden_states=hidden_states, topk_weights=topk_weights, topk_ids=topk_ids)
            return trial.call(given)

        broken = broken_relation(call, trial.tensors, output) if oracles.tokens.numel() < self.case.tokens else ""
        captures = trial.contract.graph_capturable and trial.target.device == "cuda" and self.case.tokens > 0
        if not broken and captures and self.case.seed == GRAPH_SEED:
            with guarded("a captured call"):
                broken = captured_differs(trial.backend, trial.tensors, output)
        if broken:
            raise Ended(Status.FAILED, broken)


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
    tensors, contract = tensors_of(case, target.device), backend.contract.for_tokens(case.tokens)
    why = why_not_bits(tensors, contract)
    pairs = int(tensors.topk_ids.numel())
    arithmetic, steps = contract.arithmetic_for(pairs), contract.steps_for(pairs)
    if why or arithmetic is None or steps is None:
        return why
    oracles = oracles_of(case, contract.recipe, arithmetic, target.device, by_bits=True)
    return tensors, oracles.replay(arithmetic, steps)


def make(case: Case, subject: Subject, target: Target) -> FusedMoEPermuteExpertsUnpermute:
    """A backend with a case's weights."""
    tensors = tensors_of(case, target.device)
    return subject.experts_cls(tensors.config, tensors.quant, tensors.weights)
