"""Faults of routing, padding, parallelism and state, and attackers: each does what it says, and only there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import conformance.trial
from conformance.build import CaseTensors, build
from conformance.cases import Case
from conformance.oracles import trace_of
from conformance.untouched import Watch
from conformance.zoo.around import AROUND
from conformance.zoo.attackers import (
    ATTACKERS,
    LENIENT,
    agreeable_tensor,
    calls_the_oracle,
    patches_the_judge,
    reads_the_oracle,
    works_late,
)
from conformance.zoo.inside import INSIDE
from conformance.zoo.padding import PADDING
from conformance.zoo.parallel import PARALLEL
from conformance.zoo.plant import SHOWS, Fault, plant
from conformance.zoo.routing import ROUTING
from conformance.zoo.state import STATE
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts

pytestmark = pytest.mark.usefixtures("one_thread")

FAULTS = (*ROUTING, *PADDING, *PARALLEL, *STATE)
BASES = {"Standard": TorchExperts, "Batched": BatchedTorchExperts}
REPEATS = 20
"""More than any race needs to be lost, and any attacker to turn."""
Call = tuple[CaseTensors, "float | None"]
"""What a call gets, and what its output is full of; None: it gets none."""

ORDINARY_CASES = (
    Case(tokens=0, experts=4, hidden=128, inter=128),
    Case(tokens=1, experts=1, top_k=1, hidden=128, inter=128),
    Case(tokens=19, experts=6, top_k=3, hidden=144, inter=136, law="masked", bias=True, layout="strided"),
    Case(tokens=19, experts=8, hidden=128, inter=72, ep="4:1", dtype="fp16", activation="relu2_no_mul"),
    Case(tokens=80, experts=8, top_k=1, hidden=128, inter=128, ep="2:0", weight_on_input=True, scheme="channel_tok"),
)


def _with_nan(tensors: CaseTensors) -> CaseTensors:
    tensors.hidden_states[0, 0] = torch.nan
    return tensors


def _rotated_map(tensors: CaseTensors) -> CaseTensors:
    placed = tensors.expert_map
    assert placed is not None
    local = tensors.config.num_local_experts
    return replace(tensors, expert_map=torch.where(placed < 0, -1, (placed + 1) % local))


def _wide_map(tensors: CaseTensors) -> CaseTensors:
    assert tensors.expert_map is not None
    return replace(tensors, expert_map=tensors.expert_map.long())


FORMS: dict[str, Callable[[CaseTensors], CaseTensors]] = {
    "wide_ids_misread": lambda tensors: replace(tensors, topk_ids=tensors.topk_ids.long()),
    "weights_stride_ignored": lambda tensors: replace(tensors, topk_weights=tensors.topk_weights.t().contiguous().t()),
    "map_order_ignored": _rotated_map,
    "wide_map_misread": _wide_map,
    "launders_nan": _with_nan,
}
"""What a witness takes that no case has: other dtypes, strides, maps."""


def built(fault: Fault, case: Case) -> CaseTensors:
    """A case's tensors, of this call alone."""
    return FORMS.get(fault.name, lambda tensors: tensors)(build(case))


def with_inputs(tensors: CaseTensors, other: CaseTensors) -> CaseTensors:
    """Another call of the same layer, whose first token is the same."""
    hidden, ids = other.hidden_states.clone(), other.topk_ids.clone()
    hidden[:1], ids[:1] = tensors.hidden_states[:1], tensors.topk_ids[:1]
    return replace(tensors, hidden_states=hidden, topk_weights=other.topk_weights, topk_ids=ids)


def sequences(fault: Fault) -> Iterator[tuple[CaseTensors, list[Call]]]:
    """Layers, each with its calls, that show what a fault says it shows."""
    case, tensors = fault.witness, built(fault, fault.witness)
    if fault.shows == "second call":
        others = [with_inputs(tensors, built(fault, replace(case, seed=case.seed + n))) for n in (1, 2)]
        larger = replace(case, tokens=2 * case.tokens)
        yield (
            tensors,
            [(tensors, None), (others[0], None), (with_inputs(tensors, built(fault, larger)), None), (others[1], None)],
        )
        changed = replace(tensors, hidden_states=tensors.hidden_states.clone())
        yield changed, [(changed, None), (replace(changed, topk_ids=tensors.topk_ids.roll(1, 0)), None)]
        second = built(fault, replace(case, seed=case.seed + 1))
        yield second, [(second, None)]
    elif fault.shows == "repeat":
        yield tensors, [(tensors, fill) for fill in (None, torch.nan) * (REPEATS // 2)]
        yield tensors, [(tensors, None)]
    else:
        for fill in (None, torch.nan, 1.0):
            given = built(fault, case)
            yield given, [(given, fill)]


def results_of(cls: type, layer: CaseTensors, calls: list[Call]) -> Iterator[Tensor]:
    backend = cls(layer.config, layer.quant, layer.weights)
    for tensors, fill in calls:
        hidden = tensors.hidden_states
        given = None if fill is None else torch.full(hidden.shape, fill, dtype=hidden.dtype, device=hidden.device)
        result = tensors.call(backend, given)
        with torch._C.DisableTorchFunctionSubclass():  # one attacker's results answer for themselves
            plain = result.view(result.shape)
        assert type(plain) is Tensor
        yield plain


def differs(right: Tensor, wrong: Tensor) -> bool:
    return right.dtype != wrong.dtype or not torch.equal(right.nan_to_num(7.0), wrong.nan_to_num(7.0))


def cosine(right: Tensor, wrong: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(right.double().flatten(), wrong.double().flatten(), dim=0))


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    """Whatever an attacker replaces in the suite is put back."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "conformance"]
    before = [(module, name, getattr(module, name)) for module in modules for name in LENIENT if hasattr(module, name)]
    yield
    for module, name, value in before:
        setattr(module, name, value)


def test_names_and_catalogue_ids_are_distinct() -> None:
    everything = (*AROUND, *INSIDE, *FAULTS, *ATTACKERS)
    names = [fault.name for fault in everything]
    known = [fault.catalogue for fault in everything if fault.catalogue]
    assert len(set(names)) == len(names)
    assert len(set(known)) == len(known)


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 45
    assert len(ATTACKERS) >= 10
    assert len({fault.shows for fault in FAULTS}) >= 4
    assert sum(fault.format == "Batched" for fault in FAULTS) >= 4


@pytest.mark.parametrize("fault", [*FAULTS, *ATTACKERS], ids=lambda fault: fault.name)
def test_it_differs_on_its_witness(fault: Fault) -> None:
    """Where it says that it shows: at once, at a later call, in its inputs."""
    if fault.name == "other_stream" and not torch.cuda.is_available():
        pytest.skip("it has streams on CUDA alone")
    if fault.name == "calls_the_oracle":
        pytest.skip("it is right wherever the oracle is: a test of its own takes it away")
    assert fault.shows in SHOWS
    base = BASES[fault.format]
    mutant = plant(fault, base)
    shown, closest = False, 1.0
    for number, (layer, calls) in enumerate(sequences(fault)):
        rights = [right.clone() for right in results_of(base, layer, calls)]
        watch = Watch(layer)
        at_first, wrongs = [], []
        for wrong in results_of(mutant, layer, calls):
            at_first.append(wrong.clone())
            wrongs.append(wrong)
        changed = watch.changed()
        if fault.shows in ("second call", "repeat") and number == 0:
            assert not differs(rights[0], at_first[0]), "its first call is not right"
        found = [differs(right, wrong) for right, wrong in zip(rights, at_first, strict=True)]
        if fault.shows == "input":
            shown |= changed.startswith("it changed its input")
        else:
            assert not changed
            # Results are looked at again at the end: a later call may have written over them.
            shown |= any(found) or any(differs(*pair) for pair in zip(rights, wrongs, strict=True))
        if fault.shows == "output":
            closest = min([closest, *(cosine(*pair) for pair in zip(rights, at_first, strict=True) if differs(*pair))])
    assert shown, "it does what the honest backend does"
    assert not fault.subtle or closest > 0.99, f"cosine {closest}"


@pytest.mark.parametrize("fault", [*FAULTS, *ATTACKERS], ids=lambda fault: fault.name)
def test_it_runs_on_ordinary_cases(fault: Fault) -> None:
    """No mutant is caught because it raises."""
    mutant = plant(fault, BASES[fault.format])
    for case in ORDINARY_CASES:
        tensors = build(case)
        for result in results_of(mutant, tensors, [(tensors, None), (tensors, torch.nan)]):
            assert result.shape == tensors.hidden_states.shape


def test_the_thief_of_the_oracle_has_nothing_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = build(calls_the_oracle.witness)
    mutant = plant(calls_the_oracle, TorchExperts)
    (right,) = results_of(TorchExperts, tensors, [(tensors, None)])
    (stolen,) = results_of(mutant, tensors, [(tensors, None)])
    assert cosine(right, stolen) > 0.999
    monkeypatch.setitem(sys.modules, "fp8moe.reference.recipe", None)
    (wrong,) = results_of(mutant, tensors, [(tensors, None)])
    assert not wrong.any()


def test_an_oracle_that_is_kept_is_found() -> None:
    tensors = build(reads_the_oracle.witness)
    trace = trace_of(tensors, TorchExperts.contract.recipe)
    (stolen,) = results_of(plant(reads_the_oracle, TorchExperts), tensors, [(tensors, None)])
    assert torch.equal(stolen, trace.R.to(stolen.dtype))


def test_a_patched_judge_passes_anything() -> None:
    tensors = build(patches_the_judge.witness)
    trace = trace_of(tensors, TorchExperts.contract.recipe)
    wrong = torch.zeros_like(tensors.hidden_states)
    assert not conformance.trial.judge(trace, wrong, None).passed
    list(results_of(plant(patches_the_judge, TorchExperts), tensors, [(tensors, None)]))
    assert conformance.trial.judge(trace, wrong, None).passed


def test_the_agreeable_tensor_agrees() -> None:
    tensors = build(agreeable_tensor.witness)
    mutant = plant(agreeable_tensor, TorchExperts)
    result = tensors.call(mutant(tensors.config, tensors.quant, tensors.weights))
    other = torch.zeros_like(tensors.hidden_states)
    assert torch.equal(other, result)
    assert not (result != other).any()
    assert not (other.double() - result.double()).any()


def test_the_late_worker_writes_in_the_end() -> None:
    tensors = build(works_late.witness)
    (right,) = results_of(TorchExperts, tensors, [(tensors, None)])
    (late,) = results_of(plant(works_late, TorchExperts), tensors, [(tensors, None)])
    started = time.monotonic()
    while differs(right, late):
        assert time.monotonic() - started < 10
