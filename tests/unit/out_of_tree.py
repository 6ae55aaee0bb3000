"""Backends from outside the tree, as tests of the registry have them."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fp8moe.plug_ins
from fp8moe import registry
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.registry import (
    SEED_ORDER,
    BackendContractError,
    default_backends,
    register_backend,
    registered_backends,
)

SEED_NAMES = [name for name, _, _ in SEED_ORDER]
LAYER = FusedMoEConfig(
    num_experts=8,
    experts_per_token=2,
    hidden_dim=256,
    intermediate_size_per_partition=128,
    num_local_experts=8,
    activation="silu",
    device="cpu",
    routing_method=RoutingMethodType.Renormalize,
    moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
    in_dtype=torch.bfloat16,
)


class Acme(FusedMoEPermuteExpertsUnpermute):
    """The least that a vendor writes; it takes every configuration."""

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def apply(self, hidden_states: Any, topk_weights: Any, topk_ids: Any, **_: Any) -> Any:
        return hidden_states


class BatchedAcme(FusedMoEPermuteExpertsUnpermute):
    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def apply_batched(self, hidden_states: Any, expert_num_tokens: Any) -> Any:
        return hidden_states


def emptied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing from outside the tree, whatever is installed here; and nothing left behind."""
    monkeypatch.setattr(registry, "_registered", [])
    plug_ins(monkeypatch)
    yield
    forget()


def plug_ins(monkeypatch: pytest.MonkeyPatch, *found: EntryPoint) -> None:
    """Makes exactly these the installed entry points."""

    def entry_points(*, group: str) -> tuple[EntryPoint, ...]:
        return found if group == registry.ENTRY_POINT_GROUP else ()

    monkeypatch.setattr(registry, "entry_points", entry_points)
    forget()


def forget() -> None:
    """As in a fresh process, but for what was registered by a call."""
    registry._entry_point_backends.cache_clear()
    registry._forget_order()
    fp8moe.plug_ins._told.clear()


def plug_in(name: str, target: object, distribution: str | None = "acme-kernels") -> EntryPoint:
    """An entry point of an installed distribution; an exception as `target` is raised by loading it."""

    class FakeEntryPoint(EntryPoint):
        def load(self) -> Any:
            if isinstance(target, BaseException):
                raise target
            return target

    made = FakeEntryPoint(name, "acme.moe:SPEC", registry.ENTRY_POINT_GROUP)
    vars(made)["dist"] = None if distribution is None else SimpleNamespace(name=distribution)
    return made


def order() -> list[str]:
    return [spec.name for spec in default_backends()]


def class_with(**members: Any) -> type:
    return type("Broken", (Acme,), members)


def refused(match: str, *arguments: Any, **options: Any) -> None:
    before = registered_backends()
    with pytest.raises(BackendContractError, match=match):
        register_backend(*arguments, **options)
    assert registered_backends() == before
    assert set(SEED_NAMES) <= set(order())
