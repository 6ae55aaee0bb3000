"""Mutants that remember earlier calls, or write to what they are given."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from typing import Any

from conformance.selection.ask import FLASHINFER, FLASHINFER_BACKEND
from conformance.zoo.selection.plant import (
    Call,
    Ending,
    Make,
    Pair,
    SelectorMutant,
    ending,
    explained,
    function,
    selected,
)
from fp8moe import BackendNotSupported, Fp8MoeBackend


def remembering(key: Callable[[Call], Any]) -> Make:
    """``select`` keeps its first answer for each key; the explanation is honest."""

    def make() -> Pair:
        known: dict[Any, Ending] = {}

        def answer(call: Call) -> tuple[Any, Any]:
            wanted = key(call)
            if wanted not in known:
                known[wanted] = ending(call)
            end = known[wanted]
            if isinstance(end, Exception):
                raise end
            return end

        return function(answer), function(explained)

    return make


def first_seen(part: str) -> Make:
    """One argument is read at the first call, and taken for the same from then on."""

    def make() -> Pair:
        kept: list[Any] = []

        def change(call: Call) -> Call:
            kept.append(getattr(call, part)) if not kept else None
            return call._replace(**{part: kept[0]})

        return function(lambda call: selected(change(call))), function(lambda call: explained(change(call)))

    return make


def now_and_then() -> Pair:
    calls = count(1)

    def answer(call: Call) -> tuple[Any, Any]:
        backend, cls = selected(call)
        if next(calls) % 37 == 0 and backend is Fp8MoeBackend.DEEPGEMM:
            spec = call.spec("TRITON")
            return spec.backend, spec.experts_cls
        return backend, cls

    return function(answer), function(explained)


def after_a_failure() -> Pair:
    """A failed must-use leaves something behind: the next call finds nothing for FlashInfer."""
    failed: list[bool] = []

    def answer(call: Call) -> tuple[Any, Any]:
        if failed:
            failed.clear()
            call = call._replace(env=dict(call.env) | {FLASHINFER: "0"}) if FLASHINFER not in call.env else call
        try:
            return selected(call)
        except BackendNotSupported:
            failed.append(True)
            raise

    return function(answer), function(explained)


def writing(write: Callable[[Call], Any]) -> Make:
    """Both functions write to something that is not theirs, after they are done."""

    def make() -> Pair:
        def then_write(ask: Callable[[Call], Any]) -> Callable[..., Any]:
            def answer(call: Call) -> Any:
                try:
                    return ask(call)
                finally:
                    write(call)

            return function(answer)

        return then_write(selected), then_write(explained)

    return make


def _pop(call: Call) -> None:
    if isinstance(call.env, dict):
        call.env.pop(FLASHINFER_BACKEND, None)


def _set_default(call: Call) -> None:
    if isinstance(call.env, dict):
        call.env.setdefault("VLLM_USE_DEEP_GEMM", "1")


def _to_the_process(call: Call) -> None:
    os.environ["FP8MOE_ZOO_LAST_PLATFORM"] = call.platform.kind


def _remove(call: Call) -> None:
    if isinstance(call.backends, list) and call.env.get(FLASHINFER) == "0":
        call.backends[:] = [spec for spec in call.backends if not spec.name.startswith("FLASHINFER")]


def _resize(call: Call) -> None:
    object.__setattr__(call.config, "hidden_dim", -(-call.config.hidden_dim // 4096) * 4096)


PURITY = (
    SelectorMutant(
        "remembers_without_the_environment",
        "a pure function of device, configuration and environment",
        "answers are kept by platform and configuration alone",
        remembering(lambda c: (c.platform, c.config, c.weight_key, c.activation_key, c.allow_vllm_cutlass)),
        "sel1:device=gfx942",
    ),
    SelectorMutant(
        "remembers_without_the_platform",
        "one platform a call",
        "answers are kept by configuration and environment alone",
        remembering(lambda c: (c.config, c.weight_key, c.activation_key, c.allow_vllm_cutlass, tuple(c.env.items()))),
        "sel1:libraries=none",
    ),
    SelectorMutant(
        "remembers_by_capability",
        "the libraries are part of the platform",
        "answers are kept by the device's kind and capability, not by its libraries and toolkit",
        remembering(
            lambda c: (
                (c.platform.kind, c.platform.capability, c.platform.gcn_arch),
                (c.config, c.weight_key, c.activation_key, c.allow_vllm_cutlass),
                tuple(c.env.items()),
            )
        ),
        "sel1:libraries=none",
    ),
    SelectorMutant(
        "remembers_without_the_flag",
        "allow_vllm_cutlass is an argument of the call",
        "answers are kept without allow_vllm_cutlass",
        remembering(lambda c: (c.platform, c.config, c.weight_key, c.activation_key, tuple(c.env.items()))),
        "sel1:scheme=tensor_dyn",
    ),
    SelectorMutant(
        "environment_of_the_first_call",
        "the environment is read at the call",
        "the environment is read once a process",
        first_seen("env"),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=0",
    ),
    SelectorMutant(
        "platform_of_the_first_call",
        "the platform is the one given",
        "the platform is looked at once a process",
        first_seen("platform"),
        "sel1:libraries=none",
    ),
    SelectorMutant(
        "now_and_then_triton",
        "the same call gives the same answer",
        "every so often DEEPGEMM comes back as TRITON",
        now_and_then,
        "sel1:device=sm109,parallel=single-eplb",
    ),
    SelectorMutant(
        "a_failure_leaves_a_trace",
        "the list is rebuilt at each call",
        "after a failed must-use the FlashInfer backends are missing from the next call's list",
        after_a_failure,
        "sel1:",
    ),
    SelectorMutant(
        "takes_a_variable_out",
        "the environment given is not changed",
        "the FlashInfer backend's name is taken out of the mapping",
        writing(_pop),
        "sel1:VLLM_FLASHINFER_MOE_BACKEND=bogus,VLLM_MOE_USE_DEEP_GEMM=blank",
    ),
    SelectorMutant(
        "writes_a_default",
        "reading a default does not set it",
        "the default of VLLM_USE_DEEP_GEMM is written into the mapping",
        writing(_set_default),
        "sel1:",
    ),
    SelectorMutant(
        "writes_to_the_process",
        "the process environment is not changed",
        "something is left in the process environment",
        writing(_to_the_process),
        "sel1:",
    ),
    SelectorMutant(
        "shortens_the_list",
        "the sequence of backends is not changed",
        "disabling removes from the caller's own list",
        writing(_remove),
        "sel1:scheme=channel_tok,VLLM_USE_FLASHINFER_MOE_FP8=0",
    ),
    SelectorMutant(
        "rounds_the_hidden_size",
        "the configuration is not changed",
        "the hidden size is rounded up in the caller's configuration",
        writing(_resize),
        "sel1:",
    ),
)
