"""`policy_regret`: how much time the measured policy and the seed's order lose against the best eligible backend.

Regret is the time of the backend that is chosen over the least time among the eligible ones, minus one. With one left
out, the rows at the number of tokens asked about are hidden from the policy, which then has to interpolate, and its
choice is judged by the time that was hidden.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fp8moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.measured.explanation import explain_measured
from fp8moe.measured.rows import LayerShape
from fp8moe.measured.table import Fallback, MeasuredTable
from fp8moe.platforms import Platform
from fp8moe.registry import BackendSpec
from fp8moe.schemes import SCHEMES


@dataclass(frozen=True)
class PointRegret:
    """One layer and number of tokens. Times in microseconds, regrets as fractions; None where the choice has no time.

    Args:
        best, best_us: the fastest eligible backend, certified or not.
        chosen, chosen_us: of the measured policy.
        fallback: why measurement did not decide; None where it did.
        seed, seed_us: of the seed's order.
    """

    shape: LayerShape
    tokens: int
    best: str
    best_us: float
    chosen: str
    chosen_us: float | None
    fallback: Fallback | None
    seed: str
    seed_us: float | None

    @property
    def policy_regret(self) -> float | None:
        return None if self.chosen_us is None else self.chosen_us / self.best_us - 1

    @property
    def seed_regret(self) -> float | None:
        return None if self.seed_us is None else self.seed_us / self.best_us - 1


@dataclass(frozen=True)
class Regrets:
    """Regrets over `count` points, as fractions; p95 is the smallest that 95% of them do not exceed."""

    count: int
    median: float
    p95: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Regrets:
        ordered = sorted(values)
        if not ordered:
            return cls(0, math.nan, math.nan, math.nan)
        rank = -(-95 * len(ordered) // 100) - 1
        return cls(len(ordered), statistics.median(ordered), ordered[rank], ordered[-1])

    def __str__(self) -> str:
        return f"median {self.median:.1%}, p95 {self.p95:.1%}, max {self.worst:.1%} over {self.count}"


@dataclass(frozen=True)
class PolicyRegret:
    """Every point, and the regrets over those where both choices have a time.

    Args:
        points: in the order of the table's rows.
        unjudged: (shape, tokens) at which no eligible backend has a time, or nothing is selected.
    """

    points: tuple[PointRegret, ...]
    unjudged: tuple[tuple[LayerShape, int], ...] = ()

    def judged(self, *, measured_only: bool = False) -> tuple[PointRegret, ...]:
        """The points where both choices have a time; `measured_only`: and where measurement decided."""
        return tuple(
            point
            for point in self.points
            if point.chosen_us is not None
            and point.seed_us is not None
            and (point.fallback is None or not measured_only)
        )

    def policy(self, *, measured_only: bool = False) -> Regrets:
        """Of the measured policy, its falls back to the seed's order included unless `measured_only`."""
        return _over(point.policy_regret for point in self.judged(measured_only=measured_only))

    def seed(self, *, measured_only: bool = False) -> Regrets:
        """Of the seed's order, over the same points."""
        return _over(point.seed_regret for point in self.judged(measured_only=measured_only))


def _over(values: Iterator[float | None]) -> Regrets:
    return Regrets.of([value for value in values if value is not None])


def layer_of(shape: LayerShape) -> FusedMoEConfig:
    """A layer of this shape on one device; in the batched format on the first of two that exchange tokens."""
    batched = shape.format == "batched"
    ranks = 2 if batched else 1
    return FusedMoEConfig(
        num_experts=max(ranks * shape.experts, shape.top_k),
        experts_per_token=shape.top_k,
        hidden_dim=shape.hidden,
        intermediate_size_per_partition=shape.intermediate,
        num_local_experts=shape.experts,
        activation=shape.activation,
        device="cuda",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make(
            dp_size=ranks, enable_expert_parallel=batched, all2all_backend="deepep_low_latency"
        ),
        in_dtype=torch.bfloat16,
        is_act_and_mul=shape.gated,
    )


def policy_regret(
    table: MeasuredTable,
    *,
    leave_one_out: bool = True,
    allow_vllm_cutlass: bool = False,
    platform: Platform | None = None,
    env: Mapping[str, str] | None = None,
    backends: Sequence[BackendSpec] | None = None,
    device: str | None = None,
    layer: Callable[[LayerShape], FusedMoEConfig] = layer_of,
) -> PolicyRegret:
    """Regret of the measured policy, and of the seed's order beside it, at every measured point of a table.

    The table should have the times of all eligible backends: what has no time cannot be the best. At the ends of a
    backend's range leaving one out leaves nothing to interpolate between, and there the policy falls back, as it would.

    Args:
        table: times, and the certificates without which nothing is picked.
        leave_one_out: hide the rows at the number of tokens asked about.
        layer: the configuration that stands for a shape.

    The other arguments are those of `select_measured`.
    """
    times: dict[tuple[LayerShape, int], dict[str, float]] = {}
    for row in table.rows:
        times.setdefault((row.shape, row.tokens), {})[row.backend] = row.us
    points, unjudged = [], []
    for (shape, tokens), column in times.items():
        answer = explain_measured(
            layer(shape),
            *SCHEMES[shape.scheme],
            tokens=tokens,
            table=table.without(shape, tokens) if leave_one_out else table,
            allow_vllm_cutlass=allow_vllm_cutlass,
            platform=platform,
            env=env,
            backends=backends,
            device=device,
        )
        eligible = {verdict.backend.value for verdict in answer.verdicts if verdict.supported} & column.keys()
        if not eligible or answer.backend is None or answer.seed is None:
            unjudged.append((shape, tokens))
            continue
        best = min(sorted(eligible), key=column.__getitem__)
        chosen, seed = answer.backend.value, answer.seed.value
        points.append(
            PointRegret(
                shape,
                tokens,
                best,
                column[best],
                chosen,
                column.get(chosen),
                answer.fallback,
                seed,
                column.get(seed),
            )
        )
    return PolicyRegret(tuple(points), tuple(unjudged))
