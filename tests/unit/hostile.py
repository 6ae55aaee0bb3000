"""What somebody may put into a file that we read: any bytes, a valid one with mistakes, and values of other kinds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["inf", "nan", "passed", "failed", "waived", "not_run", "v1:M=3", "", "block", "hardware", "cuda"]
    )
    | st.sampled_from([10**400, -(10**400), 2**63, -0.0, 1e308, "x" * 30_000, "\ud800", "\x1b[2J", "a\nb", "\u202e"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TEXTS = (
    b"",
    b"null",
    b"[]",
    b"3",
    b'""',
    b"NaN",
    b'{"format": Infinity}',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00",
    b"[" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b'{"a": ' + b"9" * 100_000 + b"}",
    b'{"a": 1e999999}',
    b"{" + b'"a": 1, ' * 200_000 + b'"a": 1}',
    b"{" + b", ".join(b'"%d": 1' % number for number in range(200_000)) + b"}",
    b"[" + b"[], " * 500_000 + b"[]]",
    b'"' + b"\\u0000" * 200_000 + b'"',
)
"""Any of these is no file of ours, and none may take long."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in it; of a list the first few and the last."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({*range(min(len(value), 4)), *range(max(len(value) - 1, 0), len(value))}):
            yield from places(value[index], (*path, index))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Puts it there; where that is the whole, returns it, else None."""
    if not path:
        return new
    for step in path[:-1]:
        value = value[step]
    value[path[-1]] = new
    return None


@st.composite
def values_changed(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value with some places replaced, taken away, or given a field more."""
    changed = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(changed))))
        at = changed
        for step in path[:-1]:
            at = at[step]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if not path or kind == "replace":
            whole = put(changed, path, draw(ANYTHING))
            changed = changed if path else whole
        elif kind == "remove":
            del at[path[-1]]
        elif isinstance(at[path[-1]], dict):
            at[path[-1]][draw(st.text(max_size=8))] = draw(ANYTHING)
    return changed


@st.composite
def bytes_changed(draw: st.DrawFn, valid: bytes) -> bytes:
    """A file with bytes changed, put in, taken out, or cut off."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["flip", "put", "cut", "end", "twice"]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "put":
            content[at:at] = draw(st.binary(max_size=8))
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, 50))]
        elif kind == "end":
            del content[at:]
        else:
            content[at:at] = content[at : at + draw(st.integers(1, 200))]
    return bytes(content)


def is_told(read: Callable[[], object], error: type[Exception], longest: int = 2500) -> bool:
    """Whether it could be read. Where it could not, the one error of its own says so, in a line that can be printed."""
    said = ""
    try:
        read()
    except error as refused:
        said = str(refused) or "nothing"
    assert said.isprintable(), ascii(said)[:500]
    assert len(said) < longest, said[:500]
    return not said


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
