"""The named invariants of selection that hold cell by cell: each gives the mask of the cells that break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from conformance.selection.facts import FALSE, MALFORMED, TRUE, UNSET, Array, Facts
from conformance.selection.model import RULES, TRITON, Expectation
from conformance.selection.outcomes import (
    FIRST_FAILURE,
    MALFORMED_CODES,
    MASKED_GEMM_HAS_NO_FP8,
    NO_BACKEND,
    NO_FLASHINFER_FITS,
    NOT_A_BACKEND,
    NOTHING_FITS,
    OTHER_ERROR,
    WRONG_CLASS,
)
from conformance.selection.predicates import BACKENDS, INDEX, REASONS, SUPPORTED


@dataclass(frozen=True)
class View:
    """One product's answers beside what the model says of them; the arrays broadcast to the product's shape."""

    facts: Facts
    expected: Expectation
    outcome: Array

    @property
    def is_choice(self) -> Array:
        """A backend was chosen, whatever class came with it."""
        return _backend_of(self.outcome) < NO_BACKEND

    def chose(self, *names: str) -> Array:
        """One of these backends was chosen, whatever class came with it."""
        return np.isin(_backend_of(self.outcome), [INDEX[name] for name in names])

    def ends_at(self, *rules: str) -> Array:
        """The model's selection ends at one of these rules."""
        return np.isin(self.expected.rule, [RULES.index(rule) for rule in rules])


Invariant = Callable[[View], Array]
INVARIANTS: dict[str, Invariant] = {}


def invariant(check: Invariant) -> Invariant:
    """Registers an invariant under its function's name."""
    INVARIANTS[check.__name__] = check
    return check


@invariant
def total(v: View) -> Array:
    """Every call gives a backend, NONE, or an exception of the specification's types."""
    return (v.outcome == NOT_A_BACKEND) | (v.outcome == OTHER_ERROR)


@invariant
def class_is_none_only_for_trtllm_and_none(v: View) -> Array:
    """Every other backend comes with its class."""
    return (v.outcome >= WRONG_CLASS) & (v.outcome < 2 * WRONG_CLASS)


@invariant
def lora_means_triton(v: View) -> Array:
    """Whatever the platform, the format, the keys, the environment."""
    return v.facts.lora & (v.outcome != TRITON)


@invariant
def disabled_never_chosen(v: View) -> Array:
    """A backend that a variable or the flag excludes is not chosen."""
    f = v.facts
    deep_gemm_off = (f.use_deep_gemm == FALSE) | ((f.moe_use_deep_gemm == FALSE) & (f.use_deep_gemm != MALFORMED))
    aiter_set = (f.use_aiter != UNSET) | (f.use_aiter_moe != UNSET)
    aiter_off = aiter_set & ((f.use_aiter != TRUE) | (f.use_aiter_moe == FALSE))
    return (
        ((f.use_flashinfer == FALSE) & v.chose("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS"))
        | (deep_gemm_off & v.chose("DEEPGEMM", "BATCHED_DEEPGEMM"))
        | (aiter_off & v.chose("AITER"))
        | (~f.allow_cutlass & v.chose("VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS"))
    )


@invariant
def must_use_is_honoured_or_raises(v: View) -> Array:
    """A demanded backend is returned, or an error names it and the reason; it is never replaced."""
    demanded = _demanded_backend(v.expected.outcome)
    named = v.ends_at("R3b", "R4b", "R5", "R6b") & (demanded < len(BACKENDS))
    one_of_two = v.ends_at("R3c")
    fits_rule = v.chose("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS") | (v.outcome == NO_FLASHINFER_FITS)
    masked = v.expected.outcome == MASKED_GEMM_HAS_NO_FP8
    return (
        (named & (_demanded_backend(v.outcome) != demanded))
        | (one_of_two & ~fits_rule)
        | (masked & (v.outcome != MASKED_GEMM_HAS_NO_FP8))
    )


@invariant
def malformed_variable_is_named_where_it_is_read(v: View) -> Array:
    """It raises, naming itself, exactly where its rule is reached."""
    codes = list(MALFORMED_CODES.values())
    either = np.isin(v.expected.outcome, codes) | np.isin(v.outcome, codes)
    return either & (v.outcome != v.expected.outcome)


@invariant
def first_supported_in_order(v: View) -> Array:
    """Where backends are tried one after the other, the first that is left and supported is chosen."""
    scanned = v.ends_at("R3c", "R8") & (v.expected.outcome < NO_BACKEND)
    return scanned & (_backend_of(v.outcome) != v.expected.outcome)


@invariant
def selected_is_supported(v: View) -> Array:
    """The chosen backend's predicate holds and nothing had removed it; LoRA's TRITON needs neither."""
    unfit = np.zeros(v.outcome.shape, dtype=bool)
    for index, backend in enumerate(BACKENDS):
        refused = (v.expected.predicates[index] != SUPPORTED) | (v.expected.removed[index] != SUPPORTED)
        unfit |= v.chose(backend.name) & refused
    return unfit & ~v.facts.lora


@invariant
def raises_on_cuda_and_rocm_when_nothing_fits(v: View) -> Array:
    """A scan that finds nothing raises NotImplementedError there, and only there."""
    here = v.ends_at("R9") & (v.facts.cuda | v.facts.rocm)
    return here != (v.outcome == NOTHING_FITS)


@invariant
def none_elsewhere(v: View) -> Array:
    """A scan that finds nothing returns NONE on every other platform, and only there."""
    here = v.ends_at("R9") & ~(v.facts.cuda | v.facts.rocm)
    return here != (v.outcome == NO_BACKEND)


@invariant
def agrees_with_model(v: View) -> Array:
    """The whole outcome, the error's kind, backend and reason included, is the specification's."""
    return v.outcome != v.expected.outcome


def _backend_of(outcome: Array) -> Array:
    wrong_class = (outcome >= WRONG_CLASS) & (outcome < 2 * WRONG_CLASS)
    return np.where(wrong_class, outcome - np.uint8(WRONG_CLASS), outcome)


def _demanded_backend(outcome: Array) -> Array:
    """The backend that was chosen or that the error names; a number past the backends where there is none."""
    code = np.asarray(_backend_of(outcome))
    failure = (code >= FIRST_FAILURE) & (code < FIRST_FAILURE + len(BACKENDS) * len(REASONS))
    backend = (code.astype(np.int16) - FIRST_FAILURE) // len(REASONS)
    nobody = np.int16(len(BACKENDS))
    return np.where(failure, backend, np.where(code < NO_BACKEND, code.astype(np.int16), nobody))
