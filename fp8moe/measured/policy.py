"""`select_measured`: the fastest certified backend among those that the selector's scan accepts.

The rules are the selector's own (`fp8moe.selector.decide`), and so are the predicates. Only where R8's scan would take
the first that accepts, the fastest is taken instead; ties go to the one that the seed's order has first. An accepted
backend without a certificate, or without a time at this number of tokens, is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fp8moe.config import FusedMoEConfig
from fp8moe.keys import QuantKey
from fp8moe.measured.table import MeasuredTable
from fp8moe.platforms import Platform
from fp8moe.registry import AnyBackend, BackendSpec
from fp8moe.selector import MEASURED, Decision, ExpertsClass, Query, decide, lora_outcome, outcome_of, query_of


def select_measured(
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
) -> tuple[AnyBackend, ExpertsClass | None]:
    """What `select_fp8_moe_backend` returns, but by measurement where the table has times; else by the seed's order.

    Args:
        tokens: of the call, as `MeasuredRow` counts them.
        table: times on this device.
        device: the device's name, to be the table's; it tells an H100 from an H200, which `platform` does not. Default:
            the name of the device that is here where `platform` is None, else only kind and architecture are compared.
            Where `platform` is None the installed versions have to be the table's, too.

    The other arguments, and what is raised, are those of `select_fp8_moe_backend`.

    Raises:
        ValueError: tokens below 1.
    """
    check_tokens(tokens)
    if config.is_lora_enabled:  # R1 reads neither platform nor environment
        return lora_outcome()
    query = query_of(config, weight_key, activation_key, allow_vllm_cutlass, platform, env, backends)
    return outcome_of(query, measured_decision(query, decide(query), tokens, table, device, here=platform is None))


def measured_decision(
    query: Query, decision: Decision, tokens: int, table: MeasuredTable, device: str | None, *, here: bool
) -> Decision:
    """The decision with the fastest candidate in place of the first, or as it was where measurement does not decide."""
    if decision.rule != "R8" or table.mismatch(query.platform, device, here=here) is not None:
        return decision
    curves = table.certified_curves(query.config, query.weight_key, query.activation_key)
    if not curves:
        return decision
    candidates = query.candidates
    opaque = decision.listed & candidates.opaque
    accepted = decision.listed & query.supported()
    log_tokens = math.log(tokens)
    chosen, least = -1, math.inf
    for curve in curves:
        position = candidates.index.get(curve.backend, -1)
        if position < 0 or not (accepted | opaque) >> position & 1:
            continue
        time = curve.log_time(tokens, log_tokens)
        if time is None or time > least or (time == least and position > chosen):
            continue
        if opaque >> position & 1 and not query.takes(position):
            continue
        chosen, least = position, time
    if chosen < 0:
        return decision
    return Decision(
        MEASURED, chosen, None, decision.listed, candidates.all, decision.disabled, decision.not_allowed
    )  # in full: `_replace` costs a microsecond


def check_tokens(tokens: int) -> None:
    """Refuses what is no number of tokens.

    Raises:
        ValueError: tokens is no integer of at least 1.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens={tokens!r}: expected an integer of at least 1, the tokens of the call")
