"""All backends that could have been selected, timed side by side on one case; and what the selected one costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from conformance.build import config_of
from conformance.cases import Case
from conformance.gate.interval import estimate, interquartile_mean, timer_floor
from conformance.gate.policy import DEFAULT
from conformance.performs import Work
from conformance.plan import Target
from conformance.timing.cells import Built, Layers, prepared_beside
from conformance.timing.graphs import Unrolled, replays
from conformance.timing.memory import Memory
from fp8moe.schemes import SCHEMES
from fp8moe.selector import explain_fp8_moe_backend

ROUNDS = 16
"""Of all backends, forwards and backwards in turn: as many as the gate's interval needs at the least."""
LEVEL = 0.025
"""With which either limit of a regret is wrong, over all contenders: the best is found by the same rounds."""


@dataclass(frozen=True)
class Contenders:
    """Who can be timed on a case.

    Args:
        selected: by the seed's order; "" where nothing is.
        eligible: those that the selector's rules take here, in their order.
        absent: that they would take with every library of this device installed, and why each is not here.
    """

    selected: str
    eligible: tuple[str, ...]
    absent: Mapping[str, str]


def contenders(case: Case, target: Target) -> Contenders:
    """By the selector's own rules, no variable set, CUTLASS allowed as a per-channel checkpoint's caller does."""
    platform = target.platform
    libraries = {"deep_gemm", "flashinfer", "aiter", "vllm", "vllm_xpu_kernels"}
    question = (config_of(case, target.device), *SCHEMES[case.scheme], case.scheme == "channel_tok")
    here = explain_fp8_moe_backend(*question, platform=platform, env={})
    full = explain_fp8_moe_backend(*question, platform=platform.with_libraries(*libraries), env={})
    eligible = tuple(verdict.backend.name for verdict in here.verdicts if verdict.supported)
    absent = {
        verdict.backend.name: "its library is not installed"
        for verdict in full.verdicts
        if verdict.supported and verdict.backend.name not in eligible
    }
    selected = "" if here.backend is None or here.experts_cls is None else here.backend.name
    return Contenders(selected, eligible, absent)


@dataclass(frozen=True)
class SideBySide:
    """Times of one case.

    Args:
        us: (rounds,) microseconds of a call, by backend.
        absent: backends without a time, and why.
        work: of one call.
        memory: of one layer, by backend.
    """

    us: Mapping[str, NDArray[np.float64]]
    absent: Mapping[str, str]
    work: Work
    memory: Mapping[str, Memory]

    def typical_us(self, name: str) -> float:
        """Of a backend's rounds."""
        return typical(self.us[name])

    @property
    def best(self) -> str:
        """The fastest."""
        return min(self.us, key=self.typical_us)


@dataclass(frozen=True)
class Regret:
    """What selecting `selected` costs over `best`: 0.1 is 10%; with the limits of its interval."""

    selected: str
    best: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """Layers, and the backends that stand on them, for calls of several numbers of tokens: to draw the weights of a
    large layer and convert them for each backend takes longer than to time it."""

    layers: Layers
    built: dict[str, Built] = field(default_factory=dict)

    @classmethod
    def of(cls, largest: Case) -> Standing:
        """For calls of at most this case's tokens."""
        return cls(Layers.of(largest, "cuda"))


def typical(us: NDArray[np.float64]) -> float:
    """The interquartile mean of rounds, on the scale of logarithms."""
    return float(np.exp(interquartile_mean(np.log(us))))


def side_by_side(
    case: Case,
    names: Sequence[str],
    absent: Mapping[str, str],
    rounds: int = ROUNDS,
    standing: Standing | None = None,
) -> SideBySide:
    """Times them in turn, on the same weights and inputs.

    Args:
        names: backends, registered or module:Class.
        absent: what is known to be missing; those that cannot be timed after all join it, with the reason.
        standing: the case's layer, called with the first of its tokens; None: the case's own tensors.
    """
    layers = Layers.of(case, "cuda") if standing is None else standing.layers.first(case)
    missing = dict(absent)
    graphs: dict[str, Unrolled] = {}
    memory: dict[str, Memory] = {}
    for name, made in prepared_beside(case, names, layers, None if standing is None else standing.built):
        if isinstance(made, str):
            missing[name] = made
        else:
            graphs[name], memory[name] = made.graph, made.memory
    if any(made.graphs for made in graphs.values()):
        for name in [name for name, made in graphs.items() if not made.graphs]:
            missing[name] = "it does not declare that it can be captured, and eager calls are not timed beside graphs"
            del graphs[name]
    if not graphs:
        return SideBySide({}, missing, layers.work, {})
    forwards = list(graphs)
    order = [name for number in range(rounds) for name in (forwards if number % 2 == 0 else forwards[::-1])]
    taken = replays([graphs[name] for name in order])
    us = {
        name: np.array([one.us / graphs[name].count for one, of in zip(taken, order, strict=True) if of == name])
        for name in graphs
    }
    return SideBySide(us, missing, layers.work, memory)


def regret(times: SideBySide, selected: str) -> Regret:
    """Of one backend over the fastest, by the rounds' own ratios.

    Raises:
        KeyError: `selected` has no time.
    """
    best = times.best
    ratios = np.log(times.us[selected] / times.us[best])
    if selected == best:
        return Regret(selected, best, 0.0, 0.0, 0.0)
    floor = timer_floor(times.us[selected], times.us[best])
    found = estimate(ratios, floor, DEFAULT.resamples, DEFAULT.seed)
    level = LEVEL / (len(times.us) - 1)
    limits = (found.log_ratio, max(found.low(level), 0.0), found.high(level))
    value, low, high = (math.expm1(limit) for limit in limits)
    return Regret(selected, best, value, low, high)
