"""What each backend of the order takes, found by asking its declared support about every device and layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from fp8moe.backends import deepgemm, deepgemm_stages, vllm_cutlass
from fp8moe.backends.libraries import LibraryBackend
from fp8moe.config import ACTIVATIONS, ALL2ALL_BACKENDS, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.envs import SELECTOR_VARIABLES, Env
from fp8moe.platforms import PLATFORMS, Platform
from fp8moe.registry import BackendSpec, seed_backends
from fp8moe.schemes import SCHEMES
from fp8moe.support import Support
from parts.asked import BATCHED, Question, outcome
from parts.markdown import code, listed, table, text

EVERYTHING_ON = Env.of({name: "1" for name in SELECTOR_VARIABLES if not name.endswith("_BACKEND")})
FALLBACKS = {
    "DEEPGEMM": (
        f"the whole layer where the intermediate size is {deepgemm.NARROW} or less, either size is no multiple of "
        f"{deepgemm_stages.MULTIPLE}, or the weights are not contiguous; else each call of fewer than "
        f"{deepgemm_stages.MULTIPLE} tokens"
    ),
    "VLLM_CUTLASS": f"on SM10x each call of {vllm_cutlass.FEW_TOKENS} tokens or fewer",
}
"""What of a backend's work Triton does; the sizes are the adapters' own."""
AROUND = {
    "EPLB": FusedMoEParallelConfig.make(enable_eplb=True),
    "tensor parallelism": FusedMoEParallelConfig.make(tp_size=2),
    "expert parallelism": FusedMoEParallelConfig.make(tp_size=2, enable_expert_parallel=True),
    "sequence parallelism": FusedMoEParallelConfig.make(is_sequence_parallel=True),
}
"""What a parallel configuration may have besides an exchange of tokens."""


def catalogue() -> dict[Platform, list[str]]:
    """The catalogue's devices, those together that the selector cannot tell apart."""
    found: dict[Platform, list[str]] = {}
    for name, platform in PLATFORMS.items():
        found.setdefault(platform, []).append(name)
    return found


def order() -> str:
    """The order of the scan."""
    return table(
        ("place", "backend", "needs", "layout"),
        (
            (str(place), f"[{spec.name}](#{spec.name.lower()})", text(support.needs), _layout(support))
            for place, (spec, support) in enumerate(_supported(), 1)
        ),
    )


def orders_by_device() -> str:
    """Of each device the candidates that its device rules take, in the scan's order."""
    rows = []
    for platform, names in catalogue().items():
        takes = [spec.name for spec, support in _supported() if support.device(platform, Env.of({}))]
        more = [spec.name for spec, support in _supported() if support.device(platform, EVERYTHING_ON)]
        asked = [name for name in more if name not in takes]
        rows.append((", ".join(map(code, names)), platform.architecture, _arrows(takes), ", ".join(asked) or "-"))
    return table(("devices", "architecture", "candidates in their order", "only where its variable is on"), rows)


def choices_by_device(layout: str) -> str:
    """What is selected for each scheme; devices with the same answers together.

    Args:
        layout: "standard" or "batched".
    """
    parallel: dict[str, Any] = {"standard": {}, "batched": BATCHED}[layout]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in PLATFORMS:
        answers = (Question(name, scheme, parallel=parallel).answer() for scheme in SCHEMES)
        shown = tuple("error" if answer.error is not None else outcome(answer) for answer in answers)
        rows.setdefault(shown, []).append(code(name))
    return table(("devices", *SCHEMES), ((", ".join(names), *shown) for shown, names in rows.items()))


def backends() -> str:
    """A section for each."""
    return "\n\n".join(_section(spec, support) for spec, support in _supported())


def _supported() -> Iterator[tuple[BackendSpec, Support]]:
    for spec in seed_backends():
        if spec.experts_cls.support is None:
            raise LookupError(f"{spec.name} declares no support")
        yield spec, spec.experts_cls.support


def _section(spec: BackendSpec, support: Support) -> str:
    cls = spec.experts_cls
    facts = [
        f"Class: {code(f'{cls.__module__}:{cls.__qualname__}')}"
        + ("" if spec.returns_class else "; the selector names the backend and returns no class"),
        f"Device: {text(support.needs)}.",
        *_variables(support),
        f"Layout: {_layout(support)}.",
        f"Schemes: {_schemes(support)}.",
        f"Activations: {', '.join(map(code, (name for name in ACTIVATIONS if name in support.activations)))}; "
        + ("also" if support.non_gated else "not")
        + " for an MLP that is not gated (`is_act_and_mul=False`).",
        f"Parallel: {_parallel(support)}.",
        f"Routing methods: {_routing(support)}.",
        f"Router logits: {_logits(support)}.",
    ]
    if hasattr(cls, "fallback"):
        facts.append(f"Triton takes over {FALLBACKS[spec.name]}. So the layer has to be one that TRITON takes, too.")
    if issubclass(cls, LibraryBackend):
        facts.append(f"Adapter: written from {text(cls.written_from)}; tried on {text(cls.tried_on or 'no device')}.")
        facts += [
            f"With {text(what)}: {code(place)}, a class for `fp8moe check`." for what, place in cls.variants.items()
        ]
    about = (inspect.getdoc(inspect.getmodule(cls)) or "").splitlines()[0]
    return f"### {spec.name}\n\n{text(about.partition(': ')[2])}\n\n{listed(facts)}"


def _arrows(names: list[str]) -> str:
    return " → ".join(names) or "none"


def _layout(support: Support) -> str:
    return str(support.activation_format.value[0])


def _variables(support: Support) -> list[str]:
    """The variables that its device rule reads, and what each does there."""
    found = []
    for name in SELECTOR_VARIABLES:
        for value, word in (("0", "off"), ("1", "on")):
            around = {other: "1" for other in EVERYTHING_ON if other != name} if value == "0" else {}
            changed = any(
                support.device(platform, Env.of({**around, name: value})) != support.device(platform, Env.of(around))
                for platform in PLATFORMS.values()
            )
            if changed:
                found.append(f"{code(name)} turns it {word} with {code(value)}.")
    return [f"Its device rule reads a variable: {' '.join(found)}"] if found else []


def _schemes(support: Support) -> str:
    """By architecture, those together that take the same."""
    by_schemes: dict[tuple[str, ...], dict[str, None]] = {}
    for platform in PLATFORMS.values():
        if support.device(platform, EVERYTHING_ON):
            takes = tuple(name for name, keys in SCHEMES.items() if support.scheme(platform, *keys))
            by_schemes.setdefault(takes, {})[platform.architecture] = None
    return "; ".join(
        f"{', '.join(map(code, takes)) or 'none'} on {', '.join(where)}" for takes, where in by_schemes.items()
    )


def _parallel(support: Support) -> str:
    refused = []
    for name in ALL2ALL_BACKENDS:
        config = FusedMoEParallelConfig.make(dp_size=2, enable_expert_parallel=True, all2all_backend=name)
        if config.activation_format is support.activation_format and not support.parallel(config):
            refused.append(f"all2all by {code(name)}")
    refused += [what for what, config in AROUND.items() if not support.parallel(config)]
    return f"all but {', '.join(refused)}" if refused else "all"


def _routing(support: Support) -> str:
    taken: dict[tuple[str, ...], list[str]] = {}
    for scheme, keys in SCHEMES.items():
        if any(support.scheme(platform, *keys) for platform in PLATFORMS.values()):
            methods = tuple(method.name for method in RoutingMethodType if support.routing(method, *keys))
            taken.setdefault(methods, []).append(scheme)
    if list(taken) == [tuple(method.name for method in RoutingMethodType)]:
        return "all"
    return "; ".join(
        f"{', '.join(map(code, methods))} with {', '.join(map(code, schemes))}" for methods, schemes in taken.items()
    )


def _logits(support: Support) -> str:
    refused = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        methods = [method.name for method in RoutingMethodType if not support.logits_dtype(method, dtype)]
        if methods:
            refused.append(f"{code(dtype)} with {', '.join(map(code, methods))}")
    return f"all but {'; '.join(refused)}" if refused else "all"
