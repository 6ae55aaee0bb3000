"""The file of a table of times: JSON of format 1, one line a layer, with a digest over all of its content.

    {"format": "fp8moe-measured/1", "digest": "sha256:...", "device": {"name", "kind", "architecture"},
     "versions": {package: version}, "source": text, "certificates": {backend: {"level", "date", "report"}},
     "shapes": [{LayerShape's fields, "tokens": [1, 16], "us": {backend: [23.5, null]}}]}

Times are microseconds, one for each number of tokens, null where there is none.

The digest is SHA-256 of the content without it, as JSON with sorted keys and no blanks, so that an edited file is
refused. It guards against accidents: whoever can write the file can write a digest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import groupby
from typing import Any, NamedTuple

from fp8moe.measured.rows import (
    Certificate,
    InvalidMeasuredTable,
    LayerShape,
    MeasuredDevice,
    MeasuredRow,
    check_count,
    quoted,
    refuse,
)

FORMAT = "fp8moe-measured/1"
"""Any change of what a file may hold takes a new number."""
KEYS = ("format", "digest", "device", "versions", "source", "certificates", "shapes")
SHAPE_KEYS = tuple(field.name for field in fields(LayerShape))
NAMED, SHOWN = 5, 80
"""Names in an error, and characters of one."""
REMEDY = "the file was edited or cut; copy it again, or write it again with MeasuredTable.save"


class Content(NamedTuple):
    """What a file holds, in the order of `MeasuredTable`'s fields."""

    device: MeasuredDevice
    versions: dict[str, str]
    rows: tuple[MeasuredRow, ...]
    certificates: dict[str, Certificate]
    source: str


def written(
    device: MeasuredDevice,
    versions: Mapping[str, str],
    rows: Iterable[MeasuredRow],
    certificates: Mapping[str, Certificate],
    source: str,
) -> str:
    """The text of a file; rows in their own order, so that equal tables have equal texts."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "device": asdict(device),
        "versions": dict(sorted(versions.items())),
        "source": source,
        "certificates": {name: asdict(certificates[name]) for name in sorted(certificates)},
        "shapes": [
            _shape_block(shape, list(group)) for shape, group in groupby(sorted(rows), key=lambda row: row.shape)
        ],
    }
    whole = {"format": FORMAT, "digest": digest_of(content), **content}
    lines = [f"{_json(key)}: {_json(whole[key])}" for key in KEYS if key != "shapes"]
    shapes = ",\n  ".join(_json(shape) for shape in content["shapes"])
    lines.append('"shapes": [' + (f"\n  {shapes}\n " if shapes else "") + "]")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _shape_block(shape: LayerShape, rows: list[MeasuredRow]) -> dict[str, Any]:
    tokens = sorted({row.tokens for row in rows})
    times: dict[str, list[float | None]] = {row.backend: [None] * len(tokens) for row in rows}
    for row in rows:
        times[row.backend][tokens.index(row.tokens)] = int(row.us) if row.us.is_integer() else row.us
    return {**asdict(shape), "tokens": tokens, "us": dict(sorted(times.items()))}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def digest_of(content: Mapping[str, Any]) -> str:
    """The digest of a file's content."""
    bare = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def read(text: str, where: str, known: frozenset[str]) -> Content:
    """What the text of a file holds, all of it checked.

    Args:
        where: names the file in errors.
        known: names of the backends that rows and certificates may be of.

    Raises:
        InvalidMeasuredTable: (a ValueError) the text is no table of this format, or was edited.
    """
    with _within(where):
        content = _parsed(text)
        if content.get("format") != FORMAT:
            raise refuse("format", content.get("format"), f"{FORMAT!r}; measure again with this version of fp8moe")
        _check_keys("the file", content, KEYS)
        try:
            found = digest_of(content)
        except RecursionError:
            raise InvalidMeasuredTable("the file", f" is nested too deeply: {REMEDY}") from None
        if content["digest"] != found:
            raise refuse("digest", content["digest"], f"{found!r}: {REMEDY}")
        with _within("device"):
            device = _built(MeasuredDevice, content["device"], tuple(MeasuredDevice.__dataclass_fields__))
        return Content(
            device,
            _mapping("versions", content["versions"]),
            tuple(_rows(content["shapes"], known)),
            dict(_certificates(content["certificates"], known)),
            content["source"],
        )


def _parsed(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = [name for name, count in counts.items() if count > 1]
            raise InvalidMeasuredTable(_listed(twice), ": given more than once in one object; keep one")
        return found

    def constant(name: str) -> Any:
        raise refuse("a number", name, "a finite one")

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except InvalidMeasuredTable:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidMeasuredTable("the file", f" is no JSON ({error}): {REMEDY}") from None
    if not isinstance(content, dict):
        raise refuse("the file", type(content).__name__, "a JSON object")
    return content


def _certificates(given: Any, known: frozenset[str]) -> Iterator[tuple[str, Certificate]]:
    for name, certificate in _mapping("certificates", given).items():
        _check_backend("certificates", name, known)
        with _within(f"certificates[{name!r}]"):
            yield name, _built(Certificate, certificate, tuple(Certificate.__dataclass_fields__))


def _rows(given: Any, known: frozenset[str]) -> Iterator[MeasuredRow]:
    if not isinstance(given, list):
        raise refuse("shapes", given, "a list")
    for number, block in enumerate(given):
        with _within(f"shapes[{number}]"):
            _check_keys("the shape", block, (*SHAPE_KEYS, "tokens", "us"))
            shape = LayerShape(**{name: block[name] for name in SHAPE_KEYS})
            tokens, times = block["tokens"], _mapping("us", block["us"])
            if not isinstance(tokens, list) or not tokens:
                raise refuse("tokens", tokens, "a list of numbers of tokens")
            for name, column in times.items():
                _check_backend("us", name, known)
                if not isinstance(column, list) or len(column) != len(tokens):
                    raise refuse(f"us[{name!r}]", column, f"{len(tokens)} times, one for each number of tokens")
                for place, (count, us) in enumerate(zip(tokens, column, strict=True)):
                    check_count(f"tokens[{place}]", count)
                    if us is not None:
                        with _within(f"us[{name!r}][{place}]"):
                            yield MeasuredRow(shape, count, name, us)


def _check_backend(field: str, name: str, known: frozenset[str]) -> None:
    if name not in known:
        raise InvalidMeasuredTable(
            f"{field}[{quoted(name)}]",
            f": no backend of this name; known: {', '.join(sorted(known))}; install the package that registers it, "
            "or measure without it",
        )


def _mapping(field: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise refuse(field, given, "an object")
    return given


def _check_keys(what: str, given: Any, expected: tuple[str, ...]) -> None:
    found = _mapping(what, given).keys()
    if set(found) != set(expected):
        lacks, more = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        told = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"has {_listed(more)} on top"] * bool(more)
        raise InvalidMeasuredTable(what, f" {' and '.join(told)}: expected exactly {', '.join(expected)}")


def _listed(names: Sequence[str]) -> str:
    """Names that the file gives, the first few as they are spelt, where there is something odd about them quoted."""
    shown = [name if name.isidentifier() and len(name) < SHOWN else quoted(name) for name in sorted(names)[:NAMED]]
    return ", ".join(shown) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _built(cls: Any, given: Any, names: tuple[str, ...]) -> Any:
    _check_keys("the object", given, names)
    return cls(**given)


@contextmanager
def _within(where: str) -> Iterator[None]:
    """Errors from inside say where they are."""
    try:
        yield
    except InvalidMeasuredTable as error:
        field = error.field.removeprefix(f"{where}.")
        raise InvalidMeasuredTable(f"{where}: {field}", error.problem) from None
