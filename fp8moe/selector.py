"""The selector: `select_fp8_moe_backend`, and `explain_fp8_moe_backend` which tells every candidate's verdict.

The rules stand in `decide`, R1 to R9, in the order of the specification's section 1.1; both functions walk it, and so
does the measured policy (`fp8moe.measured`), which chooses among what R8's scan accepts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fp8moe.candidates import Candidates, compiled
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.envs import (
    AITER,
    AITER_MOE,
    DEEP_GEMM,
    FLASHINFER_BACKEND,
    FLASHINFER_FP8,
    MOE_DEEP_GEMM,
    Env,
    MalformedVariable,
)
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.keys import QuantKey
from fp8moe.log_once import LOGGER, log_once
from fp8moe.platforms import Platform, detected_platform
from fp8moe.refusals import BackendNotSupported, NoBackendFits
from fp8moe.registry import AnyBackend, BackendSpec, Fp8MoeBackend, Reason, default_backends, seed_backends

FLASHINFER_BACKENDS = ("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS")
"""In the order in which rule R3c tries them."""
MEASURED = "measured"
"""The rule of a decision that `fp8moe.measured` took in R8's place."""

ExpertsClass = type[FusedMoEPermuteExpertsUnpermute]


@dataclass(frozen=True)
class Verdict:
    """One candidate's answer. `consulted` is False where the rules decided before they reached it."""

    backend: AnyBackend
    supported: bool
    reason: Reason | None
    detail: str
    consulted: bool


@dataclass(frozen=True)
class Selection:
    """What was selected, by which rule, and what every candidate answers.

    `error` is the exception that `select_fp8_moe_backend` raises for the same arguments, or None.
    """

    backend: AnyBackend | None
    experts_cls: ExpertsClass | None
    error: Exception | None
    rule: str
    verdicts: tuple[Verdict, ...] = field(repr=False)


class Query(NamedTuple):
    """The arguments of one call, each read once."""

    config: FusedMoEConfig
    weight_key: QuantKey | None
    activation_key: QuantKey | None
    allow_vllm_cutlass: bool
    platform: Platform
    env: Env
    candidates: Candidates

    def supported(self) -> int:
        return self.candidates.supported(
            self.platform, self.env, self.config.facets, self.weight_key, self.activation_key
        )

    def refusal(self, position: int) -> tuple[Reason | None, str]:
        return self.candidates.refusal(
            position, self.platform, self.env, self.config, self.weight_key, self.activation_key
        )

    def takes(self, position: int) -> bool:
        if self.candidates.opaque >> position & 1:
            return self.refusal(position)[0] is None
        return bool(self.supported() >> position & 1)


class Decision(NamedTuple):
    """What the rules came to; masks as in `Candidates`."""

    rule: str
    chosen: int = -1  # position of the chosen candidate
    error: Exception | None = None
    listed: int = 0  # candidates left in the list when the rule decided
    consulted: int = 0  # candidates asked before the decision, the chosen one included
    disabled: int = 0  # taken out by a variable
    not_allowed: int = 0  # taken out by allow_vllm_cutlass=False


def decide(query: Query) -> Decision:
    """The rules, in order; the first that returns wins.

    Raises:
        MalformedVariable: a rule was reached whose variable holds nonsense.
    """
    env, candidates = query.env, query.candidates
    facets = query.config.facets

    # R1: with LoRA, Triton; no check of any kind.
    if facets.is_lora_enabled:
        return Decision("R1")

    # R2: a fresh list, and the layout that the dispatch calls for.
    listed = candidates.all
    disabled = 0
    standard = facets.activation_format is FusedMoEActivationFormat.Standard

    # R3: FlashInfer, where its variable is set.
    if env.flashinfer is not None:
        if not env.flashinfer:  # R3a: off, and on with the rules
            disabled |= candidates.flashinfer
            listed &= ~disabled
        elif env.flashinfer_backend is not None:  # R3b: on, and one of them by name
            name = flashinfer_backend_named(env.flashinfer_backend, query.platform)
            if name is None:
                return Decision("R3b", error=_no_masked_gemm(), listed=listed)
            return _must_use(query, "R3b", name, listed, disabled)
        else:  # R3c: on, whichever of the two
            return _try_flashinfer(query, listed)

    # R4: DeepGEMM, where either of its variables is set.
    if env.deep_gemm is not None:
        if not env.deep_gemm:  # R4a: off, and on with the rules
            disabled |= candidates.deep_gemm
            listed &= ~disabled
        else:  # R4b: on, and the one for this layout
            return _must_use(query, "R4b", "DEEPGEMM" if standard else "BATCHED_DEEPGEMM", listed, disabled)

    # R5: Marlin by force.
    if env.force_marlin:
        return _must_use(query, "R5", "MARLIN", listed, disabled)

    # R6: AITER, where either of its variables is set.
    if env.aiter is not None:
        if not env.aiter:  # R6a: off, and on with the rules
            disabled |= candidates.aiter
            listed &= ~disabled
        else:  # R6b: on, and AITER
            return _must_use(query, "R6b", "AITER", listed, disabled)

    # R7: vLLM's CUTLASS only where the caller allows it.
    not_allowed = 0
    if not query.allow_vllm_cutlass:
        not_allowed = candidates.vllm_cutlass
        listed &= ~not_allowed

    # R8: the first in the list that takes the configuration.
    chosen = _first_supported(query, listed)
    if chosen >= 0:
        consulted = (2 << chosen) - 1
        return Decision("R8", chosen, None, listed, consulted, disabled, not_allowed)

    # R9: nothing fits.
    error = None
    if query.platform.is_cuda or query.platform.is_rocm:
        error = _nothing_fits(query, disabled, not_allowed)
    return Decision("R9", -1, error, listed, candidates.all, disabled, not_allowed)


def flashinfer_backend_named(choice: str, platform: Platform) -> str | None:
    """The backend that a VLLM_FLASHINFER_MOE_BACKEND choice stands for (section 1.4); None for the masked GEMM."""
    if choice == "masked_gemm":
        return None
    return "FLASHINFER_TRTLLM" if choice == "latency" and platform.in_family(100) else "FLASHINFER_CUTLASS"


def _first_supported(query: Query, listed: int) -> int:
    opaque = query.candidates.opaque
    remaining = listed & (query.supported() | opaque)
    while remaining:
        lowest = remaining & -remaining
        position = lowest.bit_length() - 1
        if not lowest & opaque or query.takes(position):
            return position
        remaining ^= lowest
    return -1


def _must_use(query: Query, rule: str, name: str, listed: int, disabled: int) -> Decision:
    """The named backend, or an error: never the scan."""
    position = query.candidates.index.get(name, -1)
    if position < 0:
        return Decision(
            rule, -1, BackendNotSupported(Fp8MoeBackend[name], Reason.NOT_ALLOWED, _NOT_GIVEN), listed, 0, disabled
        )
    bit = 1 << position
    if query.takes(position):
        return Decision(rule, position, None, listed, bit, disabled)
    reason, detail = query.refusal(position)
    assert reason is not None, f"{name} refuses without a reason"
    return Decision(rule, -1, BackendNotSupported(Fp8MoeBackend[name], reason, detail), listed, bit, disabled)


def _try_flashinfer(query: Query, listed: int) -> Decision:
    candidates = query.candidates
    consulted = 0
    for name in FLASHINFER_BACKENDS:
        position = candidates.index.get(name, -1)
        if position < 0:
            continue
        consulted |= 1 << position
        if query.takes(position):
            return Decision("R3c", position, None, listed, consulted)

    def text() -> str:
        lines = [f"{FLASHINFER_FP8}=1 asks for FlashInfer, and no FlashInfer FP8 MoE backend fits:"]
        for name in FLASHINFER_BACKENDS:
            position = candidates.index.get(name, -1)
            absent = f"{name}: {Reason.NOT_ALLOWED.value}: {_NOT_GIVEN}"
            lines.append(absent if position < 0 else _refusal_line(query, position))
        return "\n  ".join(lines)

    return Decision("R3c", -1, NoBackendFits("R3c", text), listed, consulted)


def _refusal_line(query: Query, position: int) -> str:
    reason, detail = query.refusal(position)
    assert reason is not None
    return f"{query.candidates.specs[position].name}: {reason.value}: {detail}"


def _no_masked_gemm() -> ValueError:
    return ValueError(
        f"{FLASHINFER_BACKEND}='masked_gemm': the FlashInfer MaskedGEMM kernels have no FP8 support; "
        "choose 'throughput' or 'latency'"
    )


def _nothing_fits(query: Query, disabled: int, not_allowed: int) -> NoBackendFits:
    def text() -> str:
        lines = [f"no FP8 MoE backend takes this configuration on {query.platform}:"]
        for position, spec in enumerate(query.candidates.specs):
            if disabled >> position & 1:
                lines.append(f"{spec.name}: {Reason.DISABLED_BY_ENV.value}: {_disabled_detail(query.env, spec.name)}")
            elif not_allowed >> position & 1:
                lines.append(f"{spec.name}: {Reason.NOT_ALLOWED.value}: {_NOT_ALLOWED_DETAIL}")
            else:
                lines.append(_refusal_line(query, position))
        return "\n  ".join(lines)

    return NoBackendFits("R9", text)


_NOT_GIVEN = "it is not among the backends given"
_NOT_ALLOWED_DETAIL = "the caller does not allow vLLM's CUTLASS (allow_vllm_cutlass=False)"
_VARIABLES_OF = {"FLASHINFER": (FLASHINFER_FP8,), "AITER": (AITER, AITER_MOE), "": (DEEP_GEMM, MOE_DEEP_GEMM)}


def _disabled_detail(env: Env, name: str) -> str:
    family = next(family for family in _VARIABLES_OF if name.startswith(family))
    return "taken out by " + ", ".join(f"{key}={env[key]!r}" for key in _VARIABLES_OF[family] if key in env)


def query_of(
    config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    allow_vllm_cutlass: bool,
    platform: Platform | None,
    env: Mapping[str, str] | None,
    backends: Sequence[BackendSpec] | None,
) -> Query:
    return Query(
        config,
        weight_key,
        activation_key,
        allow_vllm_cutlass,
        detected_platform() if platform is None else platform,
        Env.of(env),
        compiled(default_backends() if backends is None else backends),
    )


def select_fp8_moe_backend(
    config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    allow_vllm_cutlass: bool = False,
    *,
    platform: Platform | None = None,
    env: Mapping[str, str] | None = None,
    backends: Sequence[BackendSpec] | None = None,
) -> tuple[AnyBackend, ExpertsClass | None]:
    """The FP8 MoE backend for a layer, and the class that computes it (None for FLASHINFER_TRTLLM and NONE).

    Args:
        config: the layer.
        weight_key, activation_key: the quantisation scheme; None stands for unquantised.
        allow_vllm_cutlass: whether VLLM_CUTLASS and BATCHED_VLLM_CUTLASS may be chosen.
        platform: default the detected device.
        env: default `os.environ`; only the variables of `fp8moe.envs.SELECTOR_VARIABLES` are read.
        backends: candidates in their order; default the registry's.

    Raises:
        BackendNotSupported: (a ValueError) a variable asks for a backend that does not take the configuration.
        MalformedVariable: (a ValueError) a variable that a rule reached holds nonsense.
        ValueError: VLLM_FLASHINFER_MOE_BACKEND=masked_gemm with VLLM_USE_FLASHINFER_MOE_FP8 on.
        NoBackendFits: (a NotImplementedError) nothing fits on CUDA or ROCm, or no FlashInfer backend where
            FlashInfer is asked for.
    """
    if config.is_lora_enabled:  # R1 reads neither platform nor environment
        return lora_outcome()
    query = query_of(config, weight_key, activation_key, allow_vllm_cutlass, platform, env, backends)
    return outcome_of(query, decide(query))


def outcome_of(query: Query, decision: Decision) -> tuple[AnyBackend, ExpertsClass | None]:
    """What `select_fp8_moe_backend` returns, logs or raises for a decision."""
    if LOGGER.isEnabledFor(logging.INFO):
        _log(query, decision)
    if decision.error is not None:
        raise decision.error
    if decision.chosen < 0:
        return Fp8MoeBackend.NONE, None
    return query.candidates.results[decision.chosen]


def explain_fp8_moe_backend(
    config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    allow_vllm_cutlass: bool = False,
    *,
    platform: Platform | None = None,
    env: Mapping[str, str] | None = None,
    backends: Sequence[BackendSpec] | None = None,
) -> Selection:
    """The same rules, with every candidate's verdict; arguments as `select_fp8_moe_backend`.

    Never raises where nothing fits or a variable is malformed: the exception is in `Selection.error`.
    """
    query = query_of(config, weight_key, activation_key, allow_vllm_cutlass, platform, env, backends)
    try:
        decision = decide(query)
    except MalformedVariable as error:
        rule = {FLASHINFER_FP8: "R3", FLASHINFER_BACKEND: "R3b"}.get(error.variable, "R4")
        disabled = query.candidates.flashinfer if rule == "R4" and query.env.flashinfer is not None else 0
        decision = Decision(rule, error=error, listed=query.candidates.all & ~disabled, disabled=disabled)
    verdicts = tuple(_verdict(query, decision, position) for position in range(len(query.candidates.specs)))
    if decision.rule == "R1":
        return Selection(*lora_outcome(), None, "R1", verdicts)
    if decision.chosen >= 0:
        return Selection(*query.candidates.results[decision.chosen], None, decision.rule, verdicts)
    nothing = Fp8MoeBackend.NONE if decision.error is None else None
    return Selection(nothing, None, decision.error, decision.rule, verdicts)


def lora_outcome() -> tuple[AnyBackend, ExpertsClass | None]:
    """R1's answer."""
    return next((spec.backend, spec.experts_cls) for spec in seed_backends() if spec.name == "TRITON")


def _verdict(query: Query, decision: Decision, position: int) -> Verdict:
    spec = query.candidates.specs[position]
    if decision.rule == "R1" and spec.name == "TRITON":
        return Verdict(spec.backend, True, None, "LoRA is on: TRITON by rule R1, unchecked", False)
    if decision.disabled >> position & 1:
        return Verdict(spec.backend, False, Reason.DISABLED_BY_ENV, _disabled_detail(query.env, spec.name), True)
    if decision.not_allowed >> position & 1:
        return Verdict(spec.backend, False, Reason.NOT_ALLOWED, _NOT_ALLOWED_DETAIL, True)
    consulted = bool(decision.consulted >> position & 1)
    try:
        reason, detail = query.refusal(position)
    except MalformedVariable as error:
        return Verdict(spec.backend, False, Reason.DEVICE, f"cannot be told: {error}", consulted)
    return Verdict(spec.backend, reason is None, reason, detail, consulted)


def _log(query: Query, decision: Decision) -> None:
    """One INFO for a choice, with the candidates left; one DEBUG for each refusal of a scan."""
    if LOGGER.isEnabledFor(logging.DEBUG) and decision.rule in ("R3c", "R8", "R9"):
        asked = decision.consulted & decision.listed
        for position in range(len(query.candidates.specs)):
            if asked >> position & 1 and position != decision.chosen:
                log_once(logging.DEBUG, f"refused {_refusal_line(query, position)}")
    if decision.chosen >= 0:
        spec = query.candidates.specs[decision.chosen]
        left = ", ".join(query.candidates.names(decision.listed))
        how = ", by measurement," if decision.rule == MEASURED else ""
        log_once(logging.INFO, f"FP8 MoE backend {spec.name}{how} out of [{left}]")
