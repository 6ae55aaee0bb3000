"""Conditions in words: a set of an axis's values as shortly as it can be said without losing any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from conformance.selection.axes import AXES, AXIS, LIBRARIES, LIBRARY_SETS, VARIABLES, Axis
from conformance.selection.facts import BAD_CHOICE, FALSE, FLASHINFER_BACKEND, MALFORMED, TRUE, UNSET

_STATES = {UNSET: "unset", FALSE: "off", TRUE: "on", MALFORMED: "malformed"}


def in_words(when: Mapping[str, Sequence[str]]) -> str:
    """All conditions of a rule, with commas between; "" where there is none."""
    return ", ".join(condition(name, when[name]) for name in AXIS if name in when)


def condition(axis: str, values: Sequence[str]) -> str:
    """One condition, such as ``scheme = block``, ``device not in {cpu, xpu}``, ``VLLM_USE_DEEP_GEMM unset or off``."""
    found = AXES[AXIS[axis]]
    if axis in VARIABLES:
        return _of_variable(found, set(values))
    if axis == "libraries":
        return _of_libraries(set(values))
    rest = [name for name in found.names if name not in values]
    named = _families if axis == "device" else _each
    inside, outside = named(found.names, values), named(found.names, rest)
    return _listed(axis, inside, outside)


def _listed(axis: str, inside: Sequence[str], outside: Sequence[str]) -> str:
    if len(outside) < len(inside):
        return f"{axis} not {outside[0]}" if len(outside) == 1 else f"{axis} not in {{{', '.join(outside)}}}"
    return f"{axis} = {inside[0]}" if len(inside) == 1 else f"{axis} in {{{', '.join(inside)}}}"


def _each(_names: Sequence[str], values: Iterable[str]) -> list[str]:
    return list(values)


def _families(names: Sequence[str], values: Iterable[str]) -> list[str]:
    """Devices, where all that differ in what follows a hyphen are one word: ``sm90*`` for sm90 and every toolkit."""
    chosen, found = set(values), list[str]()
    for name in names:
        if name in chosen:
            family = [other for other in names if other.split("-")[0] == name.split("-")[0]]
            word = f"{family[0].split('-')[0]}*" if len(family) > 1 and chosen.issuperset(family) else name
            if word not in found:
                found.append(word)
    return found


def _of_variable(axis: Axis, values: set[str]) -> str:
    """By the states that its texts stand for, where the values are whole states; else text by text."""
    groups: dict[str, set[str]] = {}
    state = _choice if axis.name == FLASHINFER_BACKEND else _STATES.__getitem__
    for name, value in axis.values.items():
        groups.setdefault(_state(axis, value, name, state), set()).add(name)
    inside = [word for word, names in groups.items() if names <= values]
    if sum(len(groups[word]) for word in inside) == len(values):
        outside = [word for word in groups if word not in inside]
        return f"{axis.name} not {outside[0]}" if len(outside) == 1 else f"{axis.name} {' or '.join(inside)}"
    return _listed(
        axis.name, *([name for name in axis.names if (name in values) is chosen] for chosen in (True, False))
    )


def _state(axis: Axis, value: object, name: str, word: Callable[[int], str]) -> str:
    (code,) = axis.read(value).values()
    return word(int(code)) or name


def _choice(code: int) -> str:
    """A choice's own name, which is "" here, but for what is no choice."""
    return {UNSET: "unset", BAD_CHOICE: "malformed"}.get(code, "")


def _of_libraries(values: set[str]) -> str:
    """``with`` and ``without`` where that says it, also of those left out."""
    rest = set(LIBRARY_SETS) - values
    if (said := _with_and_without(values)) is not None:
        return said
    if (said := _with_and_without(rest)) is not None:
        return f"not ({said})"
    few, word = (rest, "libraries not in") if len(rest) < len(values) else (values, "libraries in")
    return f"{word} {{{', '.join(name for name in LIBRARY_SETS if name in few)}}}"


def _with_and_without(values: set[str]) -> str | None:
    sets = [LIBRARY_SETS[name] for name in values]
    there = frozenset.intersection(*sets)
    missing = frozenset(LIBRARIES) - frozenset.union(*sets)
    if len(sets) != 2 ** (len(LIBRARIES) - len(there) - len(missing)):
        return None
    said = [f"with {' and '.join(n for n in LIBRARIES if n in there)}"] if there else []
    return ", ".join([*said, *([f"without {' and '.join(n for n in LIBRARIES if n in missing)}"] if missing else [])])
