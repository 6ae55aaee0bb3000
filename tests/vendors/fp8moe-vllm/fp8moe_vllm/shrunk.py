"""From a question that parts two selectors to a small one: parts back to the usual ones, then plainer values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from conformance.selection import axes
from conformance.selection.axes import SCHEMES
from conformance.selection.draw import READ_AS
from fp8moe_vllm.question import KEYS, PARALLEL, PLATFORM, USUAL, Parts, key_text, platform_parts, told

PLAIN_TEXTS = ("1", "0")


def shrink(parts: Parts, fails: Callable[[Parts], bool]) -> Parts:
    """The smallest found that still fails; `fails` is false of parts that are no call."""
    improved = True
    while improved:
        improved = False
        for candidate in simpler(parts):
            if size(candidate) < size(parts) and fails(candidate):
                parts, improved = candidate, True
                break
    return parts


def size(parts: Parts) -> tuple[int, int, int]:
    """How many parts are unusual, each library and variable counted; how many texts are odd; how long the line is."""
    unusual = sum(value != USUAL[name] for name, value in parts.items() if name not in ("env", "libraries"))
    env = parts["env"]
    odd = sum(text not in PLAIN_TEXTS for text in env.values())
    return unusual + len(env) + len(parts["libraries"]), odd, len(told(parts))


def simpler(parts: Parts) -> Iterator[Parts]:
    """Parts with fewer that are unusual, or with plainer values; the boldest first."""
    for group in (PLATFORM, PARALLEL, KEYS):
        yield from _changed(parts, {name: USUAL[name] for name in group})
    for name, value in USUAL.items():
        yield from _changed(parts, {name: value})
    for name in parts["env"]:
        yield parts | {"env": {one: text for one, text in parts["env"].items() if one != name}}
    for name in parts["libraries"]:
        yield parts | {"libraries": [one for one in parts["libraries"] if one != name]}
    for together, plain in PLAIN.items():
        if any(parts[name] != USUAL[name] for name in together):
            for values in plain:
                yield from _changed(parts, values)
    for name, text in parts["env"].items():
        plainer = (*PLAIN_TEXTS, *READ_AS[name]) if name in READ_AS else ()
        for candidate in plainer[: plainer.index(text) if text in plainer else None]:
            yield parts | {"env": parts["env"] | {name: candidate}}


def _same(parts: Parts, values: Parts) -> bool:
    return all(parts[name] == value for name, value in values.items())


def _changed(parts: Parts, values: Parts) -> Iterator[Parts]:
    if not _same(parts, values):
        yield parts | values


def _plain_platforms() -> list[Parts]:
    found = [platform_parts(device) for device in axes.DEVICES.values()]
    return [{name: one[name] for name in PLATFORM[:-1]} for one in found]


def _plain_parallels() -> list[Parts]:
    return [{name: getattr(one, name) for name in PARALLEL} for one in axes.PARALLELS.values()]


def _plain_keys() -> list[Parts]:
    return [dict(zip(KEYS, map(key_text, pair), strict=True)) for pair in SCHEMES.values()]


PLAIN: dict[tuple[str, ...], list[Parts]] = {
    PLATFORM[:-1]: _plain_platforms(),
    PARALLEL: _plain_parallels(),
    KEYS: _plain_keys(),
    ("activation",): [{"activation": name} for name in axes.ACTIVATIONS],
}
"""Values of the grid's axes, for parts that stand together."""
