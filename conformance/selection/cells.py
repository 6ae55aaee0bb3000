"""One cell of the selection grid: a readable id that can be parsed, and the arguments it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from conformance.selection.axes import AXES, AXIS, VARIABLES
from conformance.selection.build import make_config
from fp8moe import FusedMoEConfig, Platform, QuantKey

PREFIX = "sel1:"
"""Of every id; the number is the version of the grammar: ``sel1:axis=value,axis=value``, usual values left out."""

PLATFORM_AXES = ("device", "libraries")
CONFIG_AXES = ("parallel", "activation", "gating", "routing", "logits", "lora")
ENVIRONMENT_AXES = (*VARIABLES, "unread")
Indices = tuple[int, ...]


class Arguments(NamedTuple):
    """A call of the selector: the first four by position, the last two by keyword."""

    config: FusedMoEConfig
    weight_key: QuantKey | None
    activation_key: QuantKey | None
    allow_vllm_cutlass: bool
    platform: Platform
    env: Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """One value of each axis, as indices into ``AXES``."""

    indices: Indices

    @classmethod
    def of(cls, /, **names: str) -> Cell:
        """The cell with these values by name; axes left out have their first value.

        Raises:
            ValueError: an axis or a value that does not exist.
        """
        indices = [0] * len(AXES)
        for axis, value in names.items():
            if axis not in AXIS:
                raise ValueError(f"no axis {axis!r}; there are {', '.join(AXIS)}")
            known = AXES[AXIS[axis]].names
            if value not in known:
                raise ValueError(f"axis {axis!r} has no value {value!r}; it has {', '.join(known)}")
            indices[AXIS[axis]] = known.index(value)
        return cls(tuple(indices))

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell of an id.

        Raises:
            ValueError: text that is not of the grammar, or names an axis or value that does not exist.
        """
        if not text.startswith(PREFIX):
            raise ValueError(f"{text!r} is no cell id: it starts with {PREFIX!r}")
        rest = text.removeprefix(PREFIX)
        pairs = [part.partition("=") for part in rest.split(",")] if rest else []
        names = {axis: value for axis, separator, value in pairs if separator}
        if len(names) != len(pairs):
            raise ValueError(f"{text!r} is no cell id: expected axis=value, separated by commas, each axis once")
        return cls.of(**names)

    def __str__(self) -> str:
        changed = [
            f"{axis.name}={axis.names[index]}" for axis, index in zip(AXES, self.indices, strict=True) if index != 0
        ]
        return PREFIX + ",".join(changed)

    @property
    def arguments(self) -> Arguments:
        """The call that this cell stands for; equal parts of two cells are the same object."""
        weight_key, activation_key = _value("scheme", self.indices)
        return Arguments(
            config_at(_part(CONFIG_AXES, self.indices)),
            weight_key,
            activation_key,
            _value("allow_vllm_cutlass", self.indices),
            platform_at(_part(PLATFORM_AXES, self.indices)),
            environment_at(_part(ENVIRONMENT_AXES, self.indices)),
        )


@cache
def platform_at(indices: Indices) -> Platform:
    """The platform with these values of ``PLATFORM_AXES``."""
    device, libraries = _values(PLATFORM_AXES, indices)
    platform: Platform = replace(device, libraries=libraries)
    return platform


@cache
def config_at(indices: Indices) -> FusedMoEConfig:
    """The configuration with these values of ``CONFIG_AXES``."""
    parallel, activation, gated, routing, (logits_dtype, in_dtype), lora = _values(CONFIG_AXES, indices)
    return make_config(
        parallel=parallel,
        activation=activation,
        gated=gated,
        routing=routing,
        logits_dtype=logits_dtype,
        in_dtype=in_dtype,
        lora=lora,
    )


@cache
def environment_at(indices: Indices) -> Mapping[str, str]:
    """The environment with these values of ``ENVIRONMENT_AXES``; it cannot be changed."""
    *texts, unread = _values(ENVIRONMENT_AXES, indices)
    read: dict[str, str] = {name: text for name, text in zip(VARIABLES, texts, strict=True) if text is not None}
    read.update(unread)
    return MappingProxyType(read)


def _values(axes: tuple[str, ...], indices: Indices) -> list[Any]:
    tables = [AXES[AXIS[name]].values for name in axes]
    return [list(table.values())[index] for table, index in zip(tables, indices, strict=True)]


def _value(axis: str, indices: Indices) -> Any:
    return _values((axis,), _part((axis,), indices))[0]


def _part(axes: tuple[str, ...], indices: Indices) -> Indices:
    return tuple(indices[AXIS[name]] for name in axes)
