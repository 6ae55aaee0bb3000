"""The selector's rules R1 to R9 as arrays: for each cell the rule, the choice or the error, and every verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conformance.selection.facts import (
    BAD_CHOICE,
    FALSE,
    LATENCY,
    MALFORMED,
    MASKED_GEMM,
    TRUE,
    UNSET,
    Array,
    Facts,
    scalar_facts,
)
from conformance.selection.outcomes import (
    MALFORMED_DEEP_GEMM,
    MALFORMED_FLASHINFER,
    MALFORMED_FLASHINFER_BACKEND,
    MALFORMED_MOE_DEEP_GEMM,
    MASKED_GEMM_HAS_NO_FP8,
    NO_BACKEND,
    NO_FLASHINFER_FITS,
    NOTHING_FITS,
    must_use_failure,
)
from conformance.selection.predicates import (
    BACKENDS,
    INDEX,
    REASONS,
    SUPPORTED,
    is_family,
    refusals,
    wants_batched,
)
from fp8moe import FusedMoEConfig, Platform, QuantKey, Reason

RULES = ("R1", "R3", "R3b", "R3c", "R4", "R4b", "R5", "R6b", "R8", "R9")
"""Where a selection can end; R3 and R4 alone: the rule's variable is malformed. A rule's index is its code."""
EVERY = tuple(range(len(BACKENDS)))
DISABLED = REASONS.index(Reason.DISABLED_BY_ENV)
NOT_ALLOWED = REASONS.index(Reason.NOT_ALLOWED)

TRTLLM, FLASHINFER_CUTLASS = INDEX["FLASHINFER_TRTLLM"], INDEX["FLASHINFER_CUTLASS"]
DEEPGEMM, BATCHED_DEEPGEMM = INDEX["DEEPGEMM"], INDEX["BATCHED_DEEPGEMM"]
CUTLASS_PAIR = (INDEX["VLLM_CUTLASS"], INDEX["BATCHED_VLLM_CUTLASS"])
TRITON, MARLIN, AITER = INDEX["TRITON"], INDEX["MARLIN"], INDEX["AITER"]


@dataclass(frozen=True)
class Expectation:
    """What the specification says of each cell; arrays that broadcast to the cells' shape."""

    predicates: tuple[Array, ...]
    """A backend: the code of the first failing check, ``SUPPORTED`` or ``UNKNOWN``, whatever the rules do."""
    removed: tuple[Array, ...]
    """A backend: ``DISABLED`` or ``NOT_ALLOWED`` where a rule removed it before the end, else ``SUPPORTED``."""
    rule: Array
    """Index into ``RULES``."""
    outcome: Array
    """Code of ``outcomes``."""
    order: tuple[int, ...]
    """The candidates, in the order considered."""

    def reason(self, backend: int) -> Array:
        """Code of a candidate's verdict: its removal if it was removed, else its predicate; LoRA overrides TRITON's."""
        verdict: Array = np.where(self.removed[backend] != SUPPORTED, self.removed[backend], self.predicates[backend])
        if backend == TRITON:
            verdict = np.where(self.rule == RULES.index("R1"), np.int8(SUPPORTED), verdict)
        return verdict

    def consulted(self, backend: int) -> Array:
        """Whether a rule reached the candidate before the selection ended: removed, demanded, or come to in a scan."""
        reached = self._ends_at("R9")
        reached = reached | (self._ends_at("R8") & np.isin(self.outcome, self.order[self.order.index(backend) :]))
        if backend == TRTLLM:
            reached = reached | self._ends_at("R3c")
        if backend == FLASHINFER_CUTLASS:
            reached = reached | (self._ends_at("R3c") & (self.outcome != TRTLLM))
        failures = [must_use_failure(backend, reason) for reason in range(len(REASONS))]
        demanded = self._ends_at("R3b", "R4b", "R5", "R6b") & np.isin(self.outcome, [backend, *failures])
        return reached | demanded | (self.removed[backend] != SUPPORTED)

    def _ends_at(self, *rules: str) -> Array:
        return np.isin(self.rule, [RULES.index(rule) for rule in rules])


def expect(f: Facts, order: Sequence[int] = EVERY) -> Expectation:
    """What the specification says of each cell, for the candidates ``order`` (indices into ``BACKENDS``)."""
    predicates = tuple(refusals(f))
    missing = np.int8(NOT_ALLOWED)

    def demand(backend: int) -> Array:
        """A must-use rule: the backend, or the error that names it and its reason."""
        reason = predicates[backend] if backend in order else missing
        failure = (np.int16(must_use_failure(backend, 0)) + reason).astype(np.uint8)
        return np.where(reason == SUPPORTED, np.uint8(backend), failure)

    def fits(backend: int) -> Array:
        return predicates[backend] == SUPPORTED if backend in order else np.asarray(False)

    # R3: FlashInfer
    flashinfer_on = f.use_flashinfer == TRUE
    named = flashinfer_on & (f.flashinfer_choice != UNSET)
    wants_trtllm = (f.flashinfer_choice == LATENCY) & is_family(f, 100)
    by_name = np.where(wants_trtllm, demand(TRTLLM), demand(FLASHINFER_CUTLASS))
    either = np.where(
        fits(TRTLLM),
        np.uint8(TRTLLM),
        np.where(fits(FLASHINFER_CUTLASS), np.uint8(FLASHINFER_CUTLASS), np.uint8(NO_FLASHINFER_FITS)),
    )
    # R4: both variables default to 1; the first is parsed first and, where false, alone
    deep_gemm_set = (f.use_deep_gemm != UNSET) | (f.moe_use_deep_gemm != UNSET)
    first_true = (f.use_deep_gemm == UNSET) | (f.use_deep_gemm == TRUE)
    both_true = first_true & ((f.moe_use_deep_gemm == UNSET) | (f.moe_use_deep_gemm == TRUE))
    deep_gemm = np.where(wants_batched(f), demand(BATCHED_DEEPGEMM), demand(DEEPGEMM))
    # R6: AITER's own variable defaults to false
    aiter_set = (f.use_aiter != UNSET) | (f.use_aiter_moe != UNSET)
    aiter_on = (f.use_aiter == TRUE) & (f.use_aiter_moe != FALSE)

    endings: list[tuple[str, Array, Array]] = [
        ("R1", f.lora, np.uint8(TRITON)),
        ("R3", f.use_flashinfer == MALFORMED, np.uint8(MALFORMED_FLASHINFER)),
        ("R3b", named & (f.flashinfer_choice == BAD_CHOICE), np.uint8(MALFORMED_FLASHINFER_BACKEND)),
        ("R3b", named & (f.flashinfer_choice == MASKED_GEMM), np.uint8(MASKED_GEMM_HAS_NO_FP8)),
        ("R3b", named, by_name),
        ("R3c", flashinfer_on, either),
        ("R4", deep_gemm_set & (f.use_deep_gemm == MALFORMED), np.uint8(MALFORMED_DEEP_GEMM)),
        ("R4", first_true & (f.moe_use_deep_gemm == MALFORMED), np.uint8(MALFORMED_MOE_DEEP_GEMM)),
        ("R4b", deep_gemm_set & both_true, deep_gemm),
        ("R5", f.force_marlin == TRUE, demand(MARLIN)),
        ("R6b", aiter_set & aiter_on, demand(AITER)),
    ]

    # What each removing rule removes, and whether the selection got as far as that rule
    ended_before: dict[str, Array] = dict.fromkeys(("R4", "R5", "R6", "R7"), f.lora)
    for rule, condition, _ in endings:
        for later in ended_before:
            if rule[:2] < later:
                ended_before[later] = ended_before[later] | condition
    nothing = np.int8(SUPPORTED)
    off = {
        "R3a": ~f.lora & (f.use_flashinfer == FALSE),
        "R4a": ~ended_before["R4"] & deep_gemm_set & _is_false(f.use_deep_gemm, f.moe_use_deep_gemm),
        "R6a": ~ended_before["R6"] & aiter_set & ~aiter_on,
    }
    by_environment = {TRTLLM: "R3a", FLASHINFER_CUTLASS: "R3a", DEEPGEMM: "R4a", BATCHED_DEEPGEMM: "R4a", AITER: "R6a"}
    not_allowed = ~ended_before["R7"] & ~f.allow_cutlass
    removed: list[Array] = [np.asarray(nothing) for _ in BACKENDS]
    for backend, rule in by_environment.items():
        removed[backend] = np.where(off[rule], np.int8(DISABLED), nothing)
    for backend in CUTLASS_PAIR:
        removed[backend] = np.where(not_allowed, np.int8(NOT_ALLOWED), nothing)

    # R8 and R9: the first that is left and supported; else by platform
    scan: Array = np.where(f.cuda | f.rocm, np.uint8(NOTHING_FITS), np.uint8(NO_BACKEND))
    found: Array = np.asarray(False)
    for backend in reversed(order):
        here = (removed[backend] == SUPPORTED) & fits(backend)
        scan, found = np.where(here, np.uint8(backend), scan), found | here
    scan_rule = np.where(found, np.int8(RULES.index("R8")), np.int8(RULES.index("R9")))

    rule_code, outcome = scan_rule, scan
    for rule, condition, result in reversed(endings):
        rule_code = np.where(condition, np.int8(RULES.index(rule)), rule_code)
        outcome = np.where(condition, result, outcome)
    return Expectation(predicates, tuple(removed), rule_code, outcome, tuple(order))


def expect_call(
    config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    allow_vllm_cutlass: bool,
    platform: Platform,
    env: Mapping[str, str],
    order: Sequence[int] = EVERY,
) -> Expectation:
    """The scalar door: what the specification says of one call; every array has one element."""
    return expect(scalar_facts(config, weight_key, activation_key, allow_vllm_cutlass, platform, env), order)


def _is_false(use: Array, moe_use: Array) -> Array:
    # A false first variable decides alone; a false second needs the first well-formed.
    return (use == FALSE) | ((use != MALFORMED) & (moe_use == FALSE))
