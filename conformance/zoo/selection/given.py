"""Mutants that take the candidates, or an argument, for something else than what was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conformance.selection.ask import FLASHINFER, MARLIN
from conformance.zoo.selection.plant import (
    Call,
    Ending,
    Make,
    SelectorMutant,
    answering,
    considering,
    either,
    ending,
    explained,
    seeing,
)
from conformance.zoo.selection.scan import leaving
from fp8moe import BackendNotSupported, BackendSpec, Fp8MoeBackend
from fp8moe.quant import kFp8Static128BlockSym
from fp8moe.registry import seed_backends

DISABLES = {FLASHINFER: ("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS"), "VLLM_USE_DEEP_GEMM": ("DEEPGEMM",)}


def _absent(call: Call, end: Ending) -> Ending:
    for variable, names in DISABLES.items():
        if call.env.get(variable) == "0" and not call.config.is_lora_enabled and set(names) - set(call.names()):
            return ValueError("list.remove(x): x not in list")
    return end


def _from_the_registry(call: Call, end: Ending) -> Ending:
    """A demanded backend is looked up among all, not among those given."""
    if isinstance(end, BackendNotSupported) and end.backend.value not in call.names():
        return ending(call._replace(backends=seed_backends()))
    return end


def _in_registry_order(given: tuple[BackendSpec, ...]) -> list[BackendSpec]:
    names = [spec.name for spec in seed_backends()]
    return sorted(given, key=lambda spec: names.index(spec.name) if spec.name in names else -1)


def _by_hash(given: tuple[BackendSpec, ...]) -> list[BackendSpec]:
    """As a set would give them: by a hash, here one that is the same in every process."""
    return sorted(given, key=lambda spec: sum(map(ord, spec.name)) % 13)


def _first_variable_wins(call: Call) -> Call:
    """Of Marlin's variable and FlashInfer's the one that the mapping gives first is read."""
    order = [name for name in call.env if name in (MARLIN, FLASHINFER)]
    if len(order) == 2 and order[0] == MARLIN and call.env[MARLIN] == "1":
        return call._replace(env={name: text for name, text in call.env.items() if name != FLASHINFER})
    return call


def _by_identity(call: Call) -> Call:
    if call.weight_key == kFp8Static128BlockSym and call.weight_key is not kFp8Static128BlockSym:
        return call._replace(weight_key=None)
    return call


def _trtllm_wants(suits: Callable[[Call], bool]) -> Make:
    """FLASHINFER_TRTLLM is left out where something does not suit its kernel."""

    without = leaving("FLASHINFER_TRTLLM")
    return either(suits, seeing(lambda call: call), without)


def _known(given: Sequence[BackendSpec]) -> list[BackendSpec]:
    names = {spec.name for spec in seed_backends()}
    return [spec for spec in given if spec.name in names]


def _newcomer_ends_the_scan(call: Call, end: Ending) -> Ending:
    if (
        not isinstance(end, Exception)
        and len(_known(call.backends)) < len(call.backends)
        and explained(call).rule == "R8"
    ):
        return Fp8MoeBackend.NONE, None
    return end


GIVEN = (
    SelectorMutant(
        "disabling_the_absent_raises",
        "disable-removes-absent",
        "disabling a family raises where one of it is not among the candidates",
        answering(_absent),
        "sel1:VLLM_USE_DEEP_GEMM=0",
    ),
    SelectorMutant(
        "backends_ignored",
        "removing an unselected backend does not change the choice, removing the selected does",
        "the registry's backends are used, whatever was given",
        seeing(lambda call: call._replace(backends=seed_backends())),
        "sel1:",
    ),
    SelectorMutant(
        "demand_beyond_the_given",
        "a must-use backend that is not among the given fails with NOT_ALLOWED",
        "a demanded backend is found in the registry",
        answering(_from_the_registry),
        "sel1:VLLM_ROCM_USE_AITER=True",
    ),
    SelectorMutant(
        "registry_order",
        "a sequence given is the order as it stands",
        "the backends given are put in the registry's order",
        considering(_in_registry_order),
        "sel1:",
    ),
    SelectorMutant(
        "order_by_hash",
        "the same answer with every hash seed",
        "the candidates come in the order of a hash",
        considering(_by_hash),
        "sel1:",
    ),
    SelectorMutant(
        "first_variable_wins",
        "precedence is the rules', not the mapping's order",
        "Marlin's variable wins over FlashInfer's where the mapping gives it first",
        seeing(_first_variable_wins),
        "sel1:device=sm100,VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=throughput,VLLM_USE_DEEP_GEMM=1,VLLM_TEST_FORCE_FP8_MARLIN=1",
    ),
    SelectorMutant(
        "keys_by_identity",
        "keys are equal by value",
        "a block key that is not the very same object is not known",
        seeing(_by_identity),
        "sel1:",
    ),
    SelectorMutant(
        "experts_in_fours",
        "the number of experts is not checked",
        "FLASHINFER_TRTLLM wants a number of experts that 4 divides",
        _trtllm_wants(lambda call: call.config.num_experts % 4 == 0),
        "sel1:device=sm100",
    ),
    SelectorMutant(
        "few_experts_a_token",
        "top-k is not checked",
        "FLASHINFER_TRTLLM wants at most 10 experts a token",
        _trtllm_wants(lambda call: call.config.experts_per_token <= 10),
        "sel1:device=sm100",
    ),
    SelectorMutant(
        "only_the_first_rank",
        "the same answer on every rank",
        "only rank 0 gets the FlashInfer backend",
        _trtllm_wants(lambda call: call.config.moe_parallel_config.dp_rank == 0),
        "sel1:device=sm100,parallel=dp2-ep-pplx,VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=latency",
    ),
    SelectorMutant(
        "a_newcomer_ends_the_scan",
        "adding an unsupported backend does not change the choice",
        "with a backend from outside the tree a scan finds nothing",
        answering(_newcomer_ends_the_scan),
        "sel1:",
    ),
    SelectorMutant(
        "newcomers_left_out",
        "a backend from outside the tree is a candidate like any other",
        "only the eleven are considered",
        considering(_known),
        "sel1:",
    ),
)
