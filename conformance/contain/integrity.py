"""Whether the functions that judge are still those that were loaded: by identity, code and defaults.

It finds what is replaced in a module or a class, and what is changed in a function or a table, not what a backend does
to torch's own dispatcher or to memory: it guards against accidents and plain tricks, not against every one.
"""

from __future__ import annotations

import builtins
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter, is_
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

JUDGING = ("conformance", "fp8moe")
NOT_JUDGING = ("conformance.zoo", "conformance.contain", "fp8moe.backends", "fp8moe.kernels")
_SHARED: tuple[ModuleType | type, ...] = (torch, torch.Tensor, math, builtins)
"""Where the names that judging functions use are looked up as well."""
_PARTS: tuple[tuple[str, Callable[[FunctionType], object]], ...] = tuple(
    (name, attrgetter(name)) for name in ("__code__", "__defaults__", "__kwdefaults__")
)


class Judges:
    """The judging modules as they were when this was made."""

    def __init__(self) -> None:
        self._modules: set[str] = set()
        self._attributes: list[tuple[Any, str, object, str]] = []
        self._namespaces: list[tuple[Mapping[str, object], tuple[str, ...], tuple[object, ...]]] = []
        self._functions: list[FunctionType] = []
        self._labels: list[str] = []
        self._parts: dict[str, list[object]] = {part: [] for part, _ in _PARTS}
        self._tables: list[tuple[dict[Any, Any], dict[Any, Any], str]] = []
        self._borrowed: list[tuple[Any, str, object]] = []
        self._names: set[str] = set()
        self._seen: set[int] = set()
        self._count = 0
        self.extend()

    def extend(self) -> None:
        """Adds what was imported since."""
        if len(sys.modules) == self._count:
            return
        self._count = len(sys.modules)
        for name in sorted(set(sys.modules) - self._modules):
            module = sys.modules[name]
            if isinstance(module, ModuleType) and _judges(name):
                self._modules.add(name)
                self._add(module, name)
        self._borrowed = list(_borrowed(self._names))

    def _add(self, owner: ModuleType | type, path: str) -> None:
        names = vars(owner)
        own: list[tuple[str, object]] = []
        for name, value in list(names.items()):
            label = f"{path}.{name}"
            if isinstance(
                value, (FunctionType, type, staticmethod, classmethod, property, functools._lru_cache_wrapper)
            ):
                own.append((name, value))
                self._attributes.append((names, name, value, label))
            for function in _functions(value):
                self._add_function(function, label)
            if isinstance(value, type) and value.__module__ == path and id(value) not in self._seen:
                self._seen.add(id(value))
                self._add(value, label)
            elif isinstance(value, dict) and name.isupper() and not name.startswith("_"):  # those are caches
                self._tables.append((value, dict(value), label))

        self._namespaces.append((names, tuple(name for name, _ in own), tuple(value for _, value in own)))

    def _add_function(self, function: FunctionType, label: str) -> None:
        if id(function) in self._seen or not _judges(function.__module__ or ""):
            return
        self._seen.add(id(function))
        self._functions.append(function)
        self._labels.append(label)
        for part, read in _PARTS:
            self._parts[part].append(read(function))
        self._names.update(_names(function.__code__))

    def replaced(self) -> str:
        """The first thing that is another than it was, by its path; "" where nothing is."""
        for names, found, values in self._namespaces:
            if not all(map(is_, map(names.get, found), values)):
                return next(
                    label
                    for owner, name, value, label in self._attributes
                    if owner is names and owner.get(name) is not value
                )
        for part, read in _PARTS:
            was = self._parts[part]
            if not all(map(is_, map(read, self._functions), was)):
                changed = map(is_, map(read, self._functions), was)
                return next(label for same, label in zip(changed, self._labels, strict=True) if not same)
        for table, kept, label in self._tables:
            if len(table) != len(kept) or not all(map(is_, map(table.get, kept), kept.values())):
                return label
        for owner, name, value in self._borrowed:
            if getattr(owner, name, None) is not value:
                return f"{owner.__name__}.{name}"
        return ""


def _judges(name: str) -> bool:
    return name.split(".")[0] in JUDGING and not name.startswith(NOT_JUDGING)


def _functions(value: object) -> Iterator[FunctionType]:
    """The functions behind an attribute, through what wraps them."""
    if isinstance(value, property):
        inner: Iterable[object] = (value.fget, value.fset)
    elif isinstance(value, (staticmethod, classmethod)):
        inner = (value.__func__,)
    elif isinstance(value, (functools._lru_cache_wrapper, functools.cached_property)):
        inner = (getattr(value, "__wrapped__", None) or getattr(value, "func", None),)
    else:
        inner = (value,)
    for function in inner:
        if isinstance(function, FunctionType):
            yield function


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _borrowed(names: set[str]) -> Iterator[tuple[Any, str, object]]:
    """What the judges use of torch, of tensors, of the language: by name, and every operator of a tensor."""
    for owner in _SHARED:
        wanted = names
        if owner is torch.Tensor:
            wanted = names | {
                name for name in dir(owner) if name.startswith("__") and name not in ("__dict__", "__doc__")
            }
        for name in wanted:
            value = getattr(owner, name, None)
            # A module is no function, and some attributes are made anew each time that one looks.
            if callable(value) and value is getattr(owner, name, None):
                yield owner, name, value
