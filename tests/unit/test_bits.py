"""Equal bits, and what reaches the tokens that no oracle judges: differences, stages, relations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.bits import StageResult, compare_stages, difference, observed, parting_stage, why_not_bits
from conformance.build import CaseTensors, build
from conformance.cases import Case
from conformance.checks import check_case
from conformance.oracles import trace_of
from conformance.plan import Subject, Target
from conformance.results import Status
from conformance.tokens import broken_relation
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.keys import GroupShape
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Arithmetic, Contract, Steps
from fp8moe.reference.portable import PORTABLE
from fp8moe.reference.replay import STAGES, Replay, replay_moe
from fp8moe.scaling import quantize

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
PROMOTED = Arithmetic(promote_every=128)
EXACT = Case(
    tokens=9, experts=4, top_k=2, hidden=144, inter=136, scheme="tensor_tok", values="exact_sums", law="router", seed=1
)


# -- differences --

NARROWEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
DTYPES = pytest.mark.parametrize("dtype", NARROWEST, ids=str)
NAN, INF = float("nan"), float("inf")


@DTYPES
def test_equal_numbers(dtype: torch.dtype) -> None:
    """NaN of any payload, infinities, zeros of either sign."""
    values = torch.tensor([[1.5, NAN, INF], [-INF, 0.0, -0.0]], dtype=dtype)
    other = torch.tensor([[1.5, -NAN, INF], [-INF, -0.0, 0.0]], dtype=dtype)
    found = difference(values, other)
    assert (found.differing, found.elements, str(found)) == (0, 6, "all 6 equal")
    assert difference(values[:0], values[:0]).differing == 0


@DTYPES
def test_steps_across_zero(dtype: torch.dtype) -> None:
    least = NARROWEST[dtype]
    expected = torch.tensor([[1.0, -2 * least]], dtype=dtype)
    found = difference(expected, torch.tensor([[1.0, 3 * least]], dtype=dtype))
    assert (found.differing, found.row, found.column, found.steps) == (1, 0, 1, 5)
    assert (found.expected, found.got) == (-2 * least, 3 * least)


@DTYPES
def test_the_farthest_is_told(dtype: torch.dtype) -> None:
    """Counted in numbers of the format, across a power of two as well, and not in their distance."""
    eps = torch.finfo(dtype).eps
    expected = torch.tensor([[1.0, 1000.0], [2.0, 0.0]], dtype=dtype)
    got = torch.tensor([[1 + 2 * eps, 1000.0 * (1 + eps)], [2 - 3 * eps, 0.0]], dtype=dtype)
    found = difference(expected, got)
    assert (found.differing, found.row, found.column, found.steps) == (3, 1, 0, 3)
    assert str(found).startswith("3 of 4 differ; the farthest at row 1, column 0: expected 2, got 1.9")
    assert str(found).endswith("3 steps of the format apart")
    assert str(difference(expected[:1, :1], expected[:1, :1] + eps)).endswith("1 step of the format apart")


@DTYPES
def test_a_nan_is_farther_than_any_number(dtype: torch.dtype) -> None:
    expected = torch.tensor([[1.0, -INF, 2.0]], dtype=dtype)
    found = difference(expected, torch.tensor([[NAN, INF, 2.0]], dtype=dtype))
    assert (found.differing, found.column, found.steps) == (2, 0, 0)
    assert str(found).endswith("got nan, one is NaN")
    assert difference(expected, torch.tensor([[1.0, INF, 2.0]], dtype=dtype)).steps > 2**14


# -- stages --


class Fake:
    """Shows the stages that it was given, in its `apply`."""

    def __init__(self, shown: dict[str, Tensor], output: Tensor) -> None:
        self.shown, self.output = shown, output
        self.observe: Any = None

    def apply(self) -> Tensor:
        for stage, values in self.shown.items():
            if self.observe is not None:
                self.observe(stage, values)
            values.zero_()  # what a backend does with its memory afterwards is its affair
        return self.output


def replayed(case: Case, tokens: Tensor | None = None) -> tuple[CaseTensors, Replay]:
    tensors = build(case)
    return tensors, replay_moe(trace_of(tensors, Contract().recipe, tokens), PROMOTED, Steps())


def as_shown(replay: Replay, pairs: int, top_k: int) -> dict[str, Tensor]:
    """The stages as a backend has them: in the order of the pairs, and something else where the replay has none."""
    place = replay.pairs.row * top_k + replay.pairs.slot
    shown = {}
    for stage, rows in replay.stages.items():
        if stage != "combine":
            shown[stage] = torch.full((pairs, rows.shape[1]), 7.0)
            shown[stage][place] = rows
    return shown


def compared(fake: Fake, tensors: CaseTensors, replay: Replay) -> list[StageResult]:
    with observed(fake) as seen:  # type: ignore[arg-type]
        output = fake.apply()
    assert fake.observe is None
    return list(compare_stages(seen, output, tensors, replay))


@pytest.mark.parametrize("tokens", [None, torch.tensor([2, 3, 7])], ids=["all", "some"])
def test_stages_are_compared_pair_by_pair(tokens: Tensor | None) -> None:
    case = replace(EXACT, law="masked")
    tensors, replay = replayed(case, tokens)
    whole = replayed(case)[1].output
    honest = Fake(as_shown(replay, 18, 2), whole)
    results = compared(honest, tensors, replay)
    assert [result.stage for result in results] == list(STAGES)
    assert not any(result.difference.differing for result in results if result.difference)
    assert parting_stage(results) is None


@pytest.mark.parametrize("stage", STAGES)
def test_the_stage_where_they_part_is_the_first_that_differs(stage: str) -> None:
    tensors, replay = replayed(EXACT, torch.tensor([1, 4]))
    shown, output = as_shown(replay, 18, 2), replayed(EXACT)[1].output.clone()
    for later in STAGES[STAGES.index(stage) : -1]:
        shown[later][2 * 4 + 1, 5] += 1  # token 4's second slot
    output[4, 5] += 1
    parted = parting_stage(compared(Fake(shown, output), tensors, replay))
    assert parted is not None
    assert parted.stage == stage
    assert parted.difference is not None
    assert (parted.difference.differing, parted.difference.column) == (1, 5)


def test_what_is_not_shown_is_not_compared() -> None:
    tensors, replay = replayed(EXACT)
    results = compared(Fake({}, replay.output + 1), tensors, replay)
    assert [result.difference is None for result in results] == [True, True, True, True, False]
    parted = parting_stage(results)
    assert parted is not None
    assert parted.stage == "combine"
    assert parting_stage(results[:-1]) is None


def test_a_backend_that_raises_is_no_longer_observed() -> None:
    fake = Fake({}, torch.zeros(1))
    with pytest.raises(ZeroDivisionError), observed(fake):  # type: ignore[arg-type]
        raise ZeroDivisionError
    assert fake.observe is None


# -- a verdict by bits --


class Exact(TorchExperts):
    """Keeps to declared steps where the sums over each 128 of K are exact; scales per token and per tensor only."""

    contract = Contract(arithmetic=PROMOTED, steps=Steps(combine="slot_sum"), deterministic=True)

    def activation(self, gate_up: Tensor) -> Tensor:
        return PORTABLE[self.config.activation](gate_up)

    def experts(self, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
        codes, scale = quantize(tokens, GroupShape.PER_TOKEN)
        gate_up = self.gemm("w13", codes.float()[source], scale[source], expert)
        codes, scale = quantize(self.activation(gate_up), GroupShape.PER_TOKEN)
        return self.gemm("w2", codes.float(), scale, expert)

    def gemm(self, name: str, codes: Tensor, scale: Tensor, expert: Tensor) -> Tensor:
        weight = getattr(self.weights, name).float()[expert]
        blocks = [
            (codes[:, None, start : start + 128] * weight[:, :, start : start + 128]).sum(-1)
            for start in range(0, codes.shape[1], 128)
        ]
        return sum(blocks[1:], blocks[0]) * scale * getattr(self.weights, f"{name}_scale")[expert, None]


def verdict(cls: type[TorchExperts], case: Case) -> Any:
    return check_case(case, Subject(cls.__name__, cls, cls.__name__), HERE)


def test_a_backend_that_keeps_to_its_steps_is_judged_by_bits() -> None:
    result = verdict(Exact, EXACT)
    assert (result.status, result.judged_by) == (Status.PASSED, "bits"), result.reason
    result = verdict(Exact, replace(EXACT, values="iid"))
    assert result.status is Status.PASSED
    assert result.judged_by == "bound: its sums are fp32 in an order of their own"


class Rounded(Exact):
    """Rounds the activation's result to 16 bits, which its recipe does not say."""

    def activation(self, gate_up: Tensor) -> Tensor:
        return super().activation(gate_up).bfloat16().float()


def test_a_step_that_was_not_declared_is_convicted() -> None:
    result = verdict(Rounded, replace(EXACT, tokens=64))
    assert (result.status, result.judged_by) == (Status.FAILED, "bits")
    assert "differ from the replay of the declared arithmetic" in result.reason


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (replace(EXACT, scheme="tensor_128"), "no steps are known for the scheme tensor_128"),
        (replace(EXACT, scheme="block_none"), "no steps are known for the scheme block_none"),
        (replace(EXACT, scheme="none"), "order of their own"),
        (EXACT, ""),
        (replace(EXACT, values="one_hot"), "order of their own"),
    ],
    ids=str,
)
def test_why_a_verdict_is_the_bounds(case: Case, words: str) -> None:
    why = why_not_bits(build(case), Exact.contract)
    assert words in why
    assert bool(why) == bool(words)


@pytest.mark.parametrize("scheme", ["tensor_128", "tensor_none", "channel_none", "block_none"])
def test_steps_that_do_not_fit_a_scheme_convict_nobody(scheme: str) -> None:
    """A class declares one arithmetic and its steps, and is asked about schemes that they say nothing of."""
    contract = replace(TorchExperts.contract, arithmetic=PROMOTED, steps=Steps())
    cls = type("Declares", (TorchExperts,), {"contract": contract})
    result = verdict(cls, replace(EXACT, scheme=scheme))
    assert result.status is Status.PASSED, result.reason
    contract = replace(contract, arithmetic=Arithmetic.on("hopper.wgmma", promote_every=128))
    for other in (replace(EXACT, scheme="none"), replace(EXACT, fnuz=True), replace(EXACT, scheme=scheme)):
        assert why_not_bits(build(other), contract)


# -- relations --

LARGE = replace(EXACT, tokens=80)


class ByPosition(Exact):
    """The last token of a call is a little too large."""

    def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        result = super().combine(slots, weights, present)
        result[-1] *= 1 + 2.0**-7
        return result


class Mixing(Exact):
    """A token gets something of what all tokens of its first expert have, wherever they stand."""

    def experts(self, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
        results = super().experts(tokens, source, expert)
        ours = expert == expert.min() if len(expert) else expert == 0
        largest = results[ours].abs().amax() if bool(ours.any()) else torch.zeros(())
        return results + largest * 2.0**-4


def relation(cls: type[TorchExperts], case: Case) -> str:
    tensors = build(case)
    backend = cls(tensors.config, tensors.quant, tensors.weights)

    def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return backend.apply(
            hidden_states,
            topk_weights,
            topk_ids,
            expert_map=tensors.expert_map,
            apply_router_weight_on_input=tensors.apply_router_weight_on_input,
        )

    output = call(tensors.hidden_states, tensors.topk_weights, tensors.topk_ids)
    return broken_relation(call, tensors, output)


@pytest.mark.parametrize(
    "case",
    [
        LARGE,
        replace(LARGE, law="masked", dtype="fp16"),
        replace(LARGE, ep="2:1"),
        replace(LARGE, top_k=1, weight_on_input=True),
        replace(LARGE, tokens=1),
        replace(LARGE, tokens=0),
    ],
    ids=str,
)
def test_an_honest_backend_keeps_the_relations(case: Case) -> None:
    assert relation(Exact, case) == ""


def test_what_depends_on_the_position_breaks_the_permutation() -> None:
    found = relation(ByPosition, LARGE)
    assert found.startswith("relation permutation: with its tokens in another order ")
    assert " differ, the farthest of token " in found


def test_what_depends_on_other_tokens_breaks_the_chunks() -> None:
    found = relation(Mixing, replace(LARGE, values="loud_quiet", top_k=1))
    assert found.startswith("relation chunk: with only part "), found


def test_a_scale_that_the_batch_shares_stays_when_tokens_change_places() -> None:
    assert relation(Exact, replace(LARGE, scheme="tensor_dyn")) == ""
    assert relation(ByPosition, replace(LARGE, scheme="tensor_dyn")).startswith("relation permutation: ")


class RefusesEmpty(Exact):
    """Raises where a token has no expert at all, which only the relations ask of it here."""

    def apply(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, **options: Any) -> Tensor:
        if bool((topk_ids < 0).all(-1).any()):
            raise RuntimeError("no expert")
        return super().apply(hidden_states, topk_weights, topk_ids, **options)


class WrongStage(Exact):
    """Shows a stage of another shape than it has."""

    def apply(self, *arguments: Any, **options: Any) -> Tensor:
        if self.observe is not None:
            self.observe("activation", torch.zeros(3, 5))
        return super().apply(*arguments, **options)


def test_what_the_relations_make_a_backend_raise_is_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(RefusesEmpty, LARGE).status is Status.PASSED  # all its tokens are judged
    monkeypatch.setattr("conformance.oracles.REPLAYED_WHOLE_ON_CPU", 0)
    result = verdict(RefusesEmpty, LARGE)
    assert (result.status, result.judged_by) == (Status.FAILED, "bits")
    assert "apply raised RuntimeError: no expert" in result.reason


def test_a_stage_of_another_shape_is_the_backends_failure() -> None:
    result = verdict(WrongStage, EXACT)
    assert result.status is Status.FAILED
    assert result.reason.startswith("observe: stage='activation' has the shape (3, 5): expected (")


def test_few_bits_over_much_k_do_not_say_which_pair_sets_a_shared_scale() -> None:
    case = replace(EXACT, scheme="tensor_dyn")
    for every, words in ((None, "which pair sets a scale"), (256, "which pair sets a scale"), (128, "")):
        contract = Contract(arithmetic=Arithmetic.on("hopper.wgmma", promote_every=every), steps=Steps())
        assert why_not_bits(build(case), contract).startswith(words)
        assert bool(why_not_bits(build(case), contract)) is bool(words)
