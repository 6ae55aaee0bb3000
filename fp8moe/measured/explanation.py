"""`explain_measured`: what was picked and by which times, or why the seed's order decided; in words and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from fp8moe.config import FusedMoEConfig
from fp8moe.counted import counted
from fp8moe.envs import Env
from fp8moe.keys import QuantKey
from fp8moe.measured.curves import Curve
from fp8moe.measured.policy import check_tokens, measured_decision
from fp8moe.measured.rows import CERTIFIED_AT, MeasuredDevice, key_in_words, key_of
from fp8moe.measured.table import Fallback, MeasuredTable
from fp8moe.platforms import Platform, detected_platform
from fp8moe.registry import AnyBackend, BackendSpec, default_backends
from fp8moe.selector import MEASURED, Selection, Verdict, decide, explain_fp8_moe_backend, query_of


@dataclass(frozen=True)
class CandidateTime:
    """What the table says of one candidate.

    Args:
        backend: the candidate.
        us: microseconds at the number of tokens asked about; None where the table has none.
        accepted: the selector's scan would take it.
        certified: the table has a certificate of the level that counts.
        rows: the measured numbers of tokens that `us` comes from: one, or the two it lies between.
        detail: all of this as a sentence.
    """

    backend: AnyBackend
    us: float | None
    accepted: bool
    certified: bool
    rows: tuple[int, ...]
    detail: str

    @property
    def eligible(self) -> bool:
        """It could be picked."""
        return self.accepted and self.certified and self.us is not None


@dataclass(frozen=True)
class MeasuredSelection(Selection):
    """A `Selection` by the measured policy; `rule` is "measured", or the seed's rule where that decided.

    Args:
        tokens: asked about.
        measured_on: the table's device.
        seed: the backend of the seed's order, for the same arguments; None where that is an error.
        fallback: why measurement did not decide, as a code; None where it did.
        why: the same, or the choice, as a sentence.
        times: of every candidate, in the order of `verdicts`; empty where the table is of no use here.
    """

    tokens: int
    measured_on: MeasuredDevice
    seed: AnyBackend | None
    fallback: Fallback | None
    why: str
    times: tuple[CandidateTime, ...] = field(default=(), repr=False)


def explain_measured(
    config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    *,
    tokens: int,
    table: MeasuredTable,
    allow_vllm_cutlass: bool = False,
    platform: Platform | None = None,
    env: Mapping[str, str] | None = None,
    backends: Sequence[BackendSpec] | None = None,
    device: str | None = None,
) -> MeasuredSelection:
    """What `select_measured` does with the same arguments, and why, with every candidate's verdict and time.

    Never raises where nothing fits or a variable is malformed: the exception is in `error`.

    Raises:
        ValueError: tokens below 1.
    """
    check_tokens(tokens)
    here = platform is None
    on, variables = detected_platform() if platform is None else platform, Env.of(env)
    specs = default_backends() if backends is None else backends
    question = (config, weight_key, activation_key, allow_vllm_cutlass)
    seed = explain_fp8_moe_backend(*question, platform=on, env=variables, backends=specs)
    if seed.rule != "R8":
        return _by_the_seed(seed, tokens, table, Fallback.RULE, _rule_in_words(seed))
    mismatch = table.mismatch(on, device, here=here)
    if mismatch is not None:
        return _by_the_seed(seed, tokens, table, *mismatch)
    curves = {curve.backend: curve for curve in table.curves(config, weight_key, activation_key)}
    times = tuple(_candidate(verdict, curves.get(verdict.backend.value), table, tokens) for verdict in seed.verdicts)
    query = query_of(*question, on, variables, specs)
    decision = measured_decision(query, decide(query), tokens, table, device, here=here)
    if decision.rule != MEASURED:
        shape = key_in_words(key_of(config, weight_key, activation_key))
        return _by_the_seed(seed, tokens, table, *_nothing_measured(times, curves, shape, tokens), times)
    backend, experts_cls = query.candidates.results[decision.chosen]
    return MeasuredSelection(
        backend,
        experts_cls,
        None,
        MEASURED,
        tuple(replace(verdict, consulted=True) for verdict in seed.verdicts),
        tokens,
        table.device,
        seed.backend,
        None,
        _choice_in_words(times[decision.chosen], times, tokens),
        times,
    )


def _by_the_seed(
    seed: Selection,
    tokens: int,
    table: MeasuredTable,
    fallback: Fallback,
    why: str,
    times: tuple[CandidateTime, ...] = (),
) -> MeasuredSelection:
    parts = {part.name: getattr(seed, part.name) for part in fields(Selection)}
    why = why if fallback is Fallback.RULE else f"{why}: the seed's order decides"
    return MeasuredSelection(
        **parts, tokens=tokens, measured_on=table.device, seed=seed.backend, fallback=fallback, why=why, times=times
    )


def _rule_in_words(seed: Selection) -> str:
    if seed.rule == "R9":
        return "no candidate takes the configuration, so there is nothing to choose from"
    return f"rule {seed.rule} decides before the scan, and measurement only chooses among what the scan accepts"


def _candidate(verdict: Verdict, curve: Curve | None, table: MeasuredTable, tokens: int) -> CandidateTime:
    name = verdict.backend.value
    certified = table.certified(name)
    us, rows = (None, ()) if curve is None else (curve.time(tokens), curve.around(tokens))
    parts = [_time_in_words(curve, us, rows, tokens)]
    if curve is not None and not certified:
        certificate = table.certificates.get(name)
        had = "it has none" if certificate is None else f"it passed {certificate.level}"
        parts.append(f"not certified ({had}; a certificate of level {CERTIFIED_AT} is needed)")
    if curve is not None and not verdict.supported:
        parts.append("refused by the selector")
    return CandidateTime(verdict.backend, us, verdict.supported, certified, rows, "; ".join(parts))


def _time_in_words(curve: Curve | None, us: float | None, rows: tuple[int, ...], tokens: int) -> str:
    if curve is None:
        return "not measured on this layer"
    if us is None:
        first, last = curve.tokens[0], curve.tokens[-1]
        return f"measured from {first} to {last} tokens, and {tokens} is outside"
    if len(rows) == 1:
        return f"{us:.4g} us, measured at {counted(tokens, 'token')}"
    low, high = (f"{rows[end]} ({curve.us[curve.tokens.index(rows[end])]:.4g} us)" for end in (0, 1))
    return f"{us:.4g} us, on the line from {low} to {high} tokens, log time over log tokens"


def _nothing_measured(
    times: Sequence[CandidateTime], curves: Mapping[str, Curve], shape: str, tokens: int
) -> tuple[Fallback, str]:
    """Why no candidate could be picked."""
    if not curves:
        return Fallback.SHAPE, f"the table has no times of this layer ({shape})"
    measured = [time for time in times if time.accepted and time.backend.value in curves]
    if not measured:
        return Fallback.SHAPE, f"no accepted candidate was measured on this layer ({shape})"
    certified = [time for time in measured if time.certified]
    if not certified:
        names = ", ".join(time.backend.value for time in measured)
        return Fallback.CERTIFICATE, f"of the accepted and measured candidates ({names}) none is certified"
    ranges = (curves[time.backend.value].tokens for time in certified)
    told = ", ".join(f"{time.backend.value} {r[0]} to {r[-1]}" for time, r in zip(certified, ranges, strict=True))
    return (
        Fallback.TOKENS,
        f"a call of {counted(tokens, 'token')} is outside the measured range of each certified candidate ({told})",
    )


def _choice_in_words(chosen: CandidateTime, times: Sequence[CandidateTime], tokens: int) -> str:
    rest = [time for time in times if time.eligible and time is not chosen]
    rest.sort(key=lambda time: time.us or 0.0)
    beside = ", ".join(f"{time.backend.value} {time.us:.4g} us" for time in rest) or "no other has a time"
    passed_over = [time.backend.value for time in times if time.accepted and not time.eligible]
    left = f"; passed over without a certified time: {', '.join(passed_over)}" if passed_over else ""
    return (
        f"{chosen.backend.value} is the fastest at {counted(tokens, 'token')}, {chosen.us:.4g} us; then {beside}{left}"
    )
