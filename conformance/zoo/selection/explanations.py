"""Mutants of the explanation alone: a verdict, a reason, a rule, or an exception that should not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from conformance.zoo.selection.plant import Call, Make, SelectorMutant, ending, explaining, supporting
from fp8moe import Fp8MoeBackend, MalformedVariable, Reason, Selection, Support, Verdict

FIRST_CHECK = {Reason.GATING, Reason.ACTIVATION, Reason.SCHEME, Reason.PARALLEL, Reason.FORMAT}


class FormatFirst(Support):
    """The format is looked at before the device."""

    def first_refusal(self, platform, env, facets, weight_key, activation_key, activation_format=None):  # type: ignore[no-untyped-def]
        if (activation_format or facets.activation_format) is not self.activation_format:
            return Reason.FORMAT
        return super().first_refusal(platform, env, facets, weight_key, activation_key, activation_format)


class SchemeBeforeActivation(Support):
    """The scheme is looked at before the activation and the gating."""

    def first_refusal(self, platform, env, facets, weight_key, activation_key, activation_format=None):  # type: ignore[no-untyped-def]
        found = super().first_refusal(platform, env, facets, weight_key, activation_key, activation_format)
        if found in (Reason.GATING, Reason.ACTIVATION) and not self.scheme(platform, weight_key, activation_key):
            return Reason.SCHEME
        return found


class LogitsBeforeRouting(Support):
    """The logits' dtype is looked at before the routing method and the format."""

    def first_refusal(self, platform, env, facets, weight_key, activation_key, activation_format=None):  # type: ignore[no-untyped-def]
        found = super().first_refusal(platform, env, facets, weight_key, activation_key, activation_format)
        fits = self.logits_dtype(facets.routing_method, facets.router_logits_dtype)
        return Reason.LOGITS_DTYPE if found in (Reason.ROUTING, Reason.FORMAT) and not fits else found


def checking_as(support: type[Support]) -> Make:
    """The predicates in another order; what they take is the same."""
    return supporting(lambda _, declared: support(**vars(declared)))


def verdicts(change: Callable[[Call, Selection, Verdict], Verdict]) -> Make:
    """Each verdict on its own."""
    return explaining(
        lambda call, selection: replace(
            selection, verdicts=tuple(change(call, selection, verdict) for verdict in selection.verdicts)
        )
    )


def _raises(when: Callable[[Exception], bool]) -> Make:
    def change(call: Call, selection: Selection) -> Selection:
        if selection.error is not None and when(selection.error):
            raise selection.error
        return selection

    return explaining(change)


def _silent(call: Call, selection: Selection, verdict: Verdict) -> Verdict:
    """The detail of a verdict that a malformed variable keeps open is lost."""
    unknown = isinstance(selection.error, MalformedVariable) and verdict.detail.startswith("cannot be told")
    return replace(verdict, detail="") if unknown else verdict


def _removed_by_predicate(call: Call, selection: Selection, verdict: Verdict) -> Verdict:
    if verdict.reason in (Reason.DISABLED_BY_ENV, Reason.NOT_ALLOWED):
        return replace(verdict, reason=Reason.DEVICE)
    return verdict


def _of_the_default_environment(call: Call, selection: Selection) -> Selection:
    end = ending(call._replace(env={}))
    if isinstance(end, Exception):
        return replace(selection, backend=None, experts_cls=None, error=end)
    return replace(selection, backend=end[0], experts_cls=end[1], error=None)


def _without_lora(call: Call, selection: Selection, verdict: Verdict) -> Verdict:
    if selection.rule == "R1" and verdict.backend is Fp8MoeBackend.TRITON and not call.platform.is_cuda:
        return replace(verdict, supported=False, reason=Reason.DEVICE)
    return verdict


EXPLANATIONS = (
    SelectorMutant(
        "format_first",
        "the order of the checks: FORMAT last",
        "a config wrong in several ways reports its format",
        checking_as(FormatFirst),
        "sel1:parallel=dp2-ep-deepep_low_latency,VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "scheme_before_activation",
        "the order of the checks: GATING, ACTIVATION, SCHEME",
        "the scheme is reported before gating and activation",
        checking_as(SchemeBeforeActivation),
        "sel1:scheme=none,parallel=dp2-ep-deepep_low_latency,activation=swiglustep,routing=Default,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "logits_before_routing",
        "the order of FLASHINFER_TRTLLM's checks: ROUTING, FORMAT, LOGITS_DTYPE",
        "float32 logits are reported before the routing method",
        checking_as(LogitsBeforeRouting),
        "sel1:device=sm100,routing=Default,logits=fp32,VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=latency",
    ),
    SelectorMutant(
        "every_reason_is_the_device",
        "the reason's code is that of the failing check",
        "every check that fails is reported as DEVICE",
        verdicts(lambda _, __, v: replace(v, reason=Reason.DEVICE) if v.reason in FIRST_CHECK else v),
        "sel1:",
    ),
    SelectorMutant(
        "refused_without_a_reason",
        "every failing predicate returns a reason",
        "a refused backend has no reason",
        verdicts(lambda _, __, v: replace(v, reason=None) if v.reason is Reason.PARALLEL else v),
        "sel1:parallel=dp2-ep-flashinfer_all2allv-eplb",
    ),
    SelectorMutant(
        "supported_with_a_reason",
        "a verdict is supported, or has a reason",
        "a refused backend is called supported",
        verdicts(lambda _, __, v: replace(v, supported=True) if v.reason is Reason.SCHEME else v),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "removed_backends_are_judged",
        "what a rule removed is DISABLED_BY_ENV or NOT_ALLOWED",
        "a removed backend is reported with a device reason",
        verdicts(_removed_by_predicate),
        "sel1:",
    ),
    SelectorMutant(
        "not_allowed_is_disabled",
        "NOT_ALLOWED is the caller's doing, DISABLED_BY_ENV the environment's",
        "the two are confused",
        verdicts(lambda _, __, v: replace(v, reason=Reason.DISABLED_BY_ENV) if v.reason is Reason.NOT_ALLOWED else v),
        "sel1:",
    ),
    SelectorMutant(
        "only_the_consulted",
        "one verdict for every candidate",
        "candidates that no rule reached are left out",
        explaining(lambda _, s: replace(s, verdicts=tuple(v for v in s.verdicts if v.consulted))),
        "sel1:",
    ),
    SelectorMutant(
        "all_consulted",
        "consulted is False where the rules decided before",
        "every candidate is called consulted",
        verdicts(lambda _, __, v: replace(v, consulted=True)),
        "sel1:",
    ),
    SelectorMutant(
        "verdicts_by_name",
        "verdicts in the order considered",
        "the verdicts are sorted by name",
        explaining(lambda _, s: replace(s, verdicts=tuple(sorted(s.verdicts, key=lambda v: v.backend.value)))),
        "sel1:",
    ),
    SelectorMutant(
        "rule_of_the_scan",
        "the rule that decided",
        "R9 is reported as R8",
        explaining(lambda _, s: replace(s, rule="R8") if s.rule == "R9" else s),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "rule_of_the_family",
        "a must-use by name is rule R3b, any of the two R3c",
        "both are reported as R3",
        explaining(lambda _, s: replace(s, rule="R3") if s.rule in ("R3b", "R3c") else s),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1_0",
    ),
    SelectorMutant(
        "no_error",
        "the explanation holds the exception that select raises",
        "the explanation of a failed must-use has no error",
        explaining(lambda _, s: replace(s, error=None) if s.rule == "R5" else s),
        "sel1:device=sm100-cuda12.7,parallel=dp2-ep-deepep_low_latency,VLLM_USE_FLASHINFER_MOE_FP8=0,VLLM_FLASHINFER_MOE_BACKEND=latency,VLLM_TEST_FORCE_FP8_MARLIN=1",
    ),
    SelectorMutant(
        "another_error",
        "the explanation's error is select's",
        "the explanation's error has a text of its own",
        explaining(lambda _, s: s if s.error is None else replace(s, error=_reworded(s.error))),
        "sel1:VLLM_MOE_USE_DEEP_GEMM=0x1",
    ),
    SelectorMutant(
        "raises_where_nothing_fits",
        "explain does not raise where nothing fits",
        "explain raises what select raises where nothing fits",
        _raises(lambda error: isinstance(error, NotImplementedError)),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "raises_for_a_malformed_variable",
        "explain does not raise for a malformed variable",
        "explain raises for a malformed variable",
        _raises(lambda error: isinstance(error, MalformedVariable)),
        "sel1:device=sm70,VLLM_USE_FLASHINFER_MOE_FP8=empty",
    ),
    SelectorMutant(
        "malformed_without_a_word",
        "verdicts that need a malformed variable say so",
        "the verdict of DEEPGEMM does not say what keeps it open",
        verdicts(_silent),
        "sel1:device=sm70,VLLM_USE_DEEP_GEMM=empty",
    ),
    SelectorMutant(
        "none_is_no_backend",
        "NONE is a backend of the enum",
        "where NONE is selected the explanation has no backend",
        explaining(lambda _, s: replace(s, backend=None) if s.backend is Fp8MoeBackend.NONE else s),
        "sel1:device=xpu",
    ),
    SelectorMutant(
        "explains_trtllms_class",
        "explanation and selection give the same class",
        "the explanation has FLASHINFER_TRTLLM's adapter",
        explaining(
            lambda call, s: (
                replace(s, experts_cls=call.spec("FLASHINFER_TRTLLM").experts_cls)
                if s.backend is Fp8MoeBackend.FLASHINFER_TRTLLM
                else s
            )
        ),
        "sel1:device=sm100",
    ),
    SelectorMutant(
        "explains_the_default_environment",
        "explanation and selection walk the same rules",
        "the explanation's backend is that of an empty environment",
        explaining(_of_the_default_environment),
        "sel1:device=cuda-unknown,VLLM_USE_DEEP_GEMM=blank",
    ),
    SelectorMutant(
        "lora_verdict_checked",
        "with LoRA TRITON is supported, unchecked",
        "with LoRA off CUDA TRITON is chosen and called unsupported",
        verdicts(_without_lora),
        "sel1:device=tpu,parallel=dp2-ep-deepep_low_latency,lora=yes",
    ),
)


def _reworded(error: Exception) -> Exception:
    if isinstance(error, MalformedVariable):
        return MalformedVariable(error.variable, error.text, "another text")
    return error
