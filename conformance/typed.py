"""Whether the values of JSON have the types that a dataclass's fields declare; the first that has not is a `Malformed`.

JSON has no infinities and no NaN: there they are the texts that `conformance.results.finite` makes of them.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from conformance.untrusted import Malformed, shown

MOST = 50_000
"""Members of one list; a certificate has some thousand results."""
NOT_FINITE = ("inf", "-inf", "nan")
LARGEST = 1 << 53
"""Of whole numbers: JSON's readers agree on no larger ones."""
NAMES: Mapping[Any, str] = {
    str: "a text",
    int: f"a whole number of at most {LARGEST}",
    float: "a number that is not too large; inf, -inf and nan as texts",
    bool: "true or false",
}


def check_object(value: Any, kind: type, where: str, may_lack: Collection[str] | None = None) -> None:
    """
    Args:
        kind: the dataclass.
        where: names the object in errors.
        may_lack: fields that need not be there; None: those with a default.

    Raises:
        Malformed: no object, a field that is missing or is none of the class's, or one of another type.
    """
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object")
    known = _hints(kind)
    optional = _with_default(kind) if may_lack is None else may_lack
    for name in known:
        if name not in value and name not in optional:
            raise Malformed(f"{where}.{name}: is missing")
    for name, each in value.items():
        if name not in known:
            raise Malformed(f"{where}: {shown(name)}: no field of it; written by a newer version of fp8moe? upgrade it")
        check_value(each, known[name], f"{where}.{name}")


def check_value(value: Any, kind: Any, where: str) -> None:
    """
    Args:
        kind: a type as an annotation has it: a plain type, a dataclass, an enumeration of texts, a sequence, a mapping
            by texts, or one of these or None.

    Raises:
        Malformed: a value of another type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is not None:
            check_value(value, next(one for one in inner if one is not type(None)), where)
    elif origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise Malformed(f"{where}={shown(value)}: expected an object")
        for name, each in value.items():
            check_value(each, inner[1], f"{where}: {shown(name)}")
    elif origin is not None and issubclass(origin, Sequence):
        if not isinstance(value, list) or len(value) > MOST:
            raise Malformed(f"{where}: expected a list of at most {MOST}")
        for number, each in enumerate(value):
            check_value(each, inner[0], f"{where}[{number}]")
    elif is_dataclass(kind) and isinstance(kind, type):
        check_object(value, kind, where)
    elif issubclass(kind, Enum):
        if value not in [one.value for one in kind]:
            raise Malformed(f"{where}={shown(value)}: expected one of {', '.join(one.value for one in kind)}")
    elif not _is_plain(value, kind):
        raise Malformed(f"{where}={shown(value)}: expected {NAMES[kind]}")


def _is_plain(value: Any, kind: type) -> bool:
    if kind is float:
        return value in NOT_FINITE if isinstance(value, str) else _is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, kind)


def _is_number(value: Any) -> bool:
    """One that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return float(value) not in (float("inf"), float("-inf"))
    except OverflowError:
        return False


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


@cache
def _with_default(kind: type) -> frozenset[str]:
    return frozenset(
        field.name for field in fields(kind) if field.default is not MISSING or field.default_factory is not MISSING
    )
