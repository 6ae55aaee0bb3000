"""Which variables demand what, and how a mutant reads the rules in another order or goes on from one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from conformance.selection.ask import AITER, AITER_MOE, DEEP_GEMM, MOE_DEEP_GEMM
from conformance.zoo.selection.plant import (
    Call,
    Ending,
    Make,
    answering,
    ending,
    reading,
)
from fp8moe import BackendNotSupported, Fp8MoeBackend, FusedMoEActivationFormat

NOTHING: Ending = (Fp8MoeBackend.NONE, None)


def without(*variables: str) -> Callable[[dict[str, str]], None]:
    """Takes variables out of an environment."""

    def change(env: dict[str, str]) -> None:
        for variable in variables:
            env.pop(variable, None)

    return change


def on(env: dict[str, str], variable: str, default: bool = False) -> bool:
    """Whether a variable is well-formed and true."""
    with suppress(ValueError):
        return int(env.get(variable, str(int(default)))) != 0
    return False


def aiter_demanded(env: dict[str, str]) -> bool:
    return on(env, AITER) and on(env, AITER_MOE, True)


def deep_gemm_demanded(env: dict[str, str]) -> bool:
    return (DEEP_GEMM in env or MOE_DEEP_GEMM in env) and on(env, DEEP_GEMM, True) and on(env, MOE_DEEP_GEMM, True)


def where(condition: Callable[[dict[str, str]], bool], *variables: str) -> Make:
    """Under a condition, these variables are not read: their rules come later, or never."""
    take_out = without(*variables)
    return reading(lambda env: take_out(env) if condition(env) else None)


def going_on(*backends: str, without_variables: tuple[str, ...]) -> Make:
    """A demand for one of these backends that fails goes on with the rules that are left."""

    def change(call: Call, end: Ending) -> Ending:
        if not isinstance(end, BackendNotSupported) or end.backend.value not in backends:
            return end
        return ending(call._replace(env={k: v for k, v in call.env.items() if k not in without_variables}))

    return answering(change)


def batched(call: Call) -> bool:
    return call.config.moe_parallel_config.activation_format is FusedMoEActivationFormat.BatchedExperts
