"""The declared grid of selection cells: a list of products over the axes, and how a product's cells are numbered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from math import prod
from typing import Any

import numpy as np

from conformance.selection.axes import AXES, AXIS, BOUNDARY_DEVICES, MALFORMED, WELL_FORMED
from conformance.selection.cells import (
    CONFIG_AXES,
    ENVIRONMENT_AXES,
    PLATFORM_AXES,
    Cell,
    config_at,
    environment_at,
    platform_at,
)
from conformance.selection.facts import FACTS, Array, Facts, facts_from
from conformance.selection.predicates import Scheme
from fp8moe import FusedMoEConfig, Platform

GROUPS = (PLATFORM_AXES, ("scheme",), CONFIG_AXES, ("allow_vllm_cutlass",), ENVIRONMENT_AXES)
"""The axes that make up one argument each: platform, keys, configuration, flag, environment."""
if tuple(name for group in GROUPS for name in group) != tuple(AXIS):
    raise AssertionError("the groups are not the axes in their order")


@dataclass(frozen=True)
class Product:
    """All combinations of chosen values. Cells are numbered in the order of the axes, the last axis fastest."""

    name: str
    choices: tuple[tuple[int, ...], ...]
    """For each axis of ``AXES`` the indices of the chosen values."""

    @classmethod
    def over(cls, name: str, **values: Sequence[str] | str) -> Product:
        """A product by names: ``"*"`` is the whole axis, an axis left out has its first value."""
        choices = []
        for axis in AXES:
            chosen = values.pop(axis.name, axis.names[:1])
            names = axis.names if chosen == "*" else (chosen,) if isinstance(chosen, str) else chosen
            choices.append(tuple(axis.names.index(value) for value in names))
        if values:
            raise ValueError(f"product {name!r}: no axes {sorted(values)}")
        return cls(name, tuple(choices))

    @cached_property
    def size(self) -> int:
        return prod(len(chosen) for chosen in self.choices)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the arrays over this product: one dimension a group, which keeps numpy's inner loops long."""
        return tuple(prod(len(self.choices[AXIS[name]]) for name in group) for group in GROUPS)

    def facts(self) -> Facts:
        """The facts of all cells, each over the one dimension that it depends on."""
        found: dict[str, Array] = {}
        for dimension, group in enumerate(GROUPS):
            chosen = [self.choices[AXIS[name]] for name in group]
            grids = np.meshgrid(*[np.arange(len(c)) for c in chosen], indexing="ij")
            shape = [-1 if d == dimension else 1 for d in range(len(GROUPS))]
            for name, positions, grid in zip(group, chosen, grids, strict=True):
                axis = AXES[AXIS[name]]
                values = list(axis.values.values())
                reads = [axis.read(values[index]) for index in positions]
                for fact in reads[0]:
                    column = np.asarray([read[fact] for read in reads])
                    small = column if column.dtype == bool else column.astype(np.int16)
                    found[fact] = small[grid.ravel()].reshape(shape)
        return facts_from(found)

    def facts_at(self, numbers: Array) -> Facts:
        """The facts of the cells with these numbers, each fact one value a cell."""
        everywhere, positions = self.facts(), np.unravel_index(numbers, self.shape)
        return Facts(**{name: np.broadcast_to(getattr(everywhere, name), self.shape)[positions] for name in FACTS})

    def cell(self, number: int) -> Cell:
        """The cell of a number."""
        return Cell(tuple(int(index[0]) for index in self.indices(np.asarray([number]))))

    def indices(self, numbers: Array) -> list[Array]:
        """For each axis the index of the value, of the cells with these numbers."""
        positions = np.unravel_index(numbers, [len(chosen) for chosen in self.choices])
        return [np.asarray(chosen)[position] for chosen, position in zip(self.choices, positions, strict=True)]

    def columns(self, numbers: Array) -> Iterator[tuple[Platform, Scheme, FusedMoEConfig, bool, Mapping[str, str]]]:
        """Platform, keys, configuration, flag and environment of each of the cells; costs a fraction of a selection."""
        positions: Array = np.unravel_index(numbers, self.shape)
        tables = zip(self._tables, positions, strict=True)
        columns = [[table[index] for index in position.tolist()] for table, position in tables]
        return zip(*columns, strict=True)

    @cached_property
    def _tables(self) -> list[list[Any]]:
        platforms, _, configs, _, environments = (
            list(product(*[self.choices[AXIS[name]] for name in group])) for group in GROUPS
        )
        schemes, allowed = (list(AXES[AXIS[name]].values.values()) for name in ("scheme", "allow_vllm_cutlass"))
        return [
            [platform_at(indices) for indices in platforms],
            [schemes[index] for index in self.choices[AXIS["scheme"]]],
            [config_at(indices) for indices in configs],
            [allowed[index] for index in self.choices[AXIS["allow_vllm_cutlass"]]],
            [environment_at(indices) for indices in environments],
        ]


def cell_keys(products: Sequence[Product]) -> Array:
    """One number a cell that is the same wherever the cell occurs."""
    lengths = [len(axis) for axis in AXES]
    return np.concatenate([np.ravel_multi_index(p.indices(np.arange(p.size)), lengths) for p in products])


def uncovered_pairs(products: Sequence[Product]) -> list[tuple[str, str, str, str]]:
    """Pairs of values of two axes that no product brings together."""
    missing = []
    for (i, a), (j, b) in combinations(enumerate(AXES), 2):
        met = np.zeros((len(a), len(b)), dtype=bool)
        for p in products:
            met[np.ix_(p.choices[i], p.choices[j])] = True
        missing += [(a.name, a.names[m], b.name, b.names[n]) for m, n in np.argwhere(~met)]
    return missing


def thin(products: Sequence[Product], values: int = 2) -> tuple[Product, ...]:
    """A small grid of the same form: at most so many values of every axis; for tests of the checks themselves."""
    return tuple(Product(p.name, tuple(chosen[:values] for chosen in p.choices)) for p in products)


EXECUTED_SCHEMES = AXES[AXIS["scheme"]].names[:9]
BOTH_FORMATS = ("single", "dp2-ep-deepep_low_latency")
DEVICES = tuple(name for name in AXES[AXIS["device"]].names if name not in BOUNDARY_DEVICES)
PLAIN_OR_MALFORMED = {name: (*plain, *filter(None, [MALFORMED.get(name)])) for name, plain in WELL_FORMED.items()}
FEW_DEVICES = ("sm75", "sm90", "sm100", "sm120", "gfx942", "xpu")
CUTLASS_DEVICES = (
    "sm89",
    "sm90",
    "sm90-cuda12.2",
    "sm90-cuda12.3",
    "sm99",
    "sm100",
    "sm100-cuda12.7",
    "sm100-cuda12.8",
    "sm103",
    "sm109",
    "sm110",
    "gfx942",
    "gfx90a",
    "other-10.0",
    "xpu",
    "cpu",
)

MAIN: tuple[Product, ...] = (
    Product.over("environments", device=DEVICES, scheme=EXECUTED_SCHEMES, parallel=BOTH_FORMATS, **WELL_FORMED),
    Product.over(
        "environments with CUTLASS",
        device=CUTLASS_DEVICES,
        scheme=EXECUTED_SCHEMES,
        parallel=BOTH_FORMATS,
        allow_vllm_cutlass="yes",
        **WELL_FORMED,
    ),
    Product.over(
        "libraries",
        device=DEVICES,
        libraries="*",
        scheme="*",
        parallel="*",
        allow_vllm_cutlass="*",
        VLLM_USE_FLASHINFER_MOE_FP8=("unset", "1"),
        VLLM_ROCM_USE_AITER=("unset", "1"),
    ),
    Product.over(
        "layers",
        device=FEW_DEVICES,
        scheme="*",
        parallel=(*BOTH_FORMATS, "dp2-ep-deepep_high_throughput", "dp2-ep-flashinfer_all2allv", "single-eplb"),
        activation="*",
        gating="*",
        routing="*",
        logits="*",
        VLLM_USE_FLASHINFER_MOE_FP8=("unset", "1"),
    ),
    Product.over(
        "activations",
        device=DEVICES,
        libraries=("all", "none"),
        scheme="*",
        parallel="*",
        activation="*",
        gating="*",
        allow_vllm_cutlass="*",
    ),
    Product.over(
        "must-use",
        device=("sm75", "sm90", "sm100", "gfx942", "cpu"),
        scheme=("block", "tensor_static", "none", "nvfp4"),
        parallel=(*BOTH_FORMATS, "single-eplb", "single-sp", "dp2-ep-flashinfer_all2allv"),
        activation="*",
        gating="*",
        routing=("DeepSeekV3", "Llama4", "Default"),
        logits=("bf16", "fp32"),
        VLLM_USE_FLASHINFER_MOE_FP8=("unset", "1"),
        VLLM_FLASHINFER_MOE_BACKEND=("unset", "latency"),
        VLLM_USE_DEEP_GEMM=("unset", "1"),
        VLLM_TEST_FORCE_FP8_MARLIN=("unset", "1"),
        VLLM_ROCM_USE_AITER=("unset", "1"),
    ),
    Product.over(
        "LoRA",
        device=DEVICES,
        libraries=("all", "none"),
        scheme="*",
        parallel="*",
        lora="yes",
        allow_vllm_cutlass="*",
        VLLM_USE_FLASHINFER_MOE_FP8=PLAIN_OR_MALFORMED["VLLM_USE_FLASHINFER_MOE_FP8"],
    ),
    Product.over(
        "malformed",
        device=("sm89", "sm90", "sm100", "gfx942", "cpu"),
        scheme=("block", "tensor_static"),
        parallel=BOTH_FORMATS,
        **PLAIN_OR_MALFORMED,
    ),
    Product.over(
        "unread variables",
        device=FEW_DEVICES,
        scheme=EXECUTED_SCHEMES,
        parallel=BOTH_FORMATS,
        VLLM_USE_FLASHINFER_MOE_FP8=("unset", "0", "1"),
        VLLM_USE_DEEP_GEMM=("unset", "0", "1"),
        VLLM_TEST_FORCE_FP8_MARLIN=("unset", "1"),
        VLLM_ROCM_USE_AITER=("unset", "1"),
        unread="*",
    ),
    Product.over(
        "boundaries",
        device=BOUNDARY_DEVICES,
        libraries=("all", "none"),
        scheme="*",
        parallel=BOTH_FORMATS,
        allow_vllm_cutlass="*",
        **WELL_FORMED
        | {"VLLM_ROCM_USE_AITER_MOE": "unset", "VLLM_TEST_FORCE_FP8_MARLIN": ("unset", "1")}
        | {"VLLM_FLASHINFER_MOE_BACKEND": ("unset", "latency"), "VLLM_MOE_USE_DEEP_GEMM": "unset"},
    ),
)
PAIRS = tuple(Product.over(f"{a.name} x {b.name}", **{a.name: "*", b.name: "*"}) for a, b in combinations(AXES, 2))
"""Two whole axes each, all others at their usual value: what MAIN may leave out."""
GRID = MAIN + PAIRS
