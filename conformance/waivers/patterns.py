"""What a waiver names checks, devices and cases by: text with *, and fields that a case has. Data, never a regex."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conformance.cases import KEYS, VERSION, Case, InvalidCase, value_of
from conformance.models import SplitError, model_and_split
from conformance.vocabulary import one_of

ANY = "*"


def matches(pattern: str, text: str) -> bool:
    """Whether the text is the pattern, where each * stands for any text; in time that grows as their product does."""
    first, *others = pattern.split(ANY)
    if not others:
        return pattern == text
    *middle, last = others
    if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
        return False
    at, end = len(first), len(text) - len(last)
    for part in middle:
        at = text.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


@dataclass(frozen=True)
class CasePattern:
    """Cases: one by its id, or all that have certain values.

    Args:
        exact: the one, where an id was given.
        wanted: values by name of a field of `Case`; a model without its split stands for every split of it.
    """

    exact: Case | None = None
    wanted: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> CasePattern:
        """
        Raises:
            InvalidCase: (a ValueError) neither an id, nor fields with values that a case can have, nor "*".
        """
        if text.startswith(f"{VERSION}:"):
            return cls(exact=Case.parse(text))
        if text == ANY:
            return cls()
        names: dict[str, str] = {name: name for name in KEYS} | {key: name for name, key in KEYS.items()}
        wanted: dict[str, object] = {}
        for pair in text.split(","):
            key, equals, value = (part.strip() for part in pair.partition("="))
            if key not in names:
                known = one_of(key, tuple(KEYS.values()))
                raise InvalidCase("pattern", text, f'an id that starts with "{VERSION}:", "*", or keys of {known}')
            name = names[key]
            if not equals or not value:
                raise InvalidCase(name, value, f"{key}=VALUE")
            if name in wanted:
                raise InvalidCase(name, value, f"{key} once")
            wanted[name] = _model(value) if name == "model" else value_of(name, value)
        return cls(wanted=wanted)

    def holds(self, case: Case) -> bool:
        """Whether a case is among them."""
        if self.exact is not None:
            return case == self.exact
        return all(_has(getattr(case, name), value, name) for name, value in self.wanted.items())


def _has(own: Any, value: object, name: str) -> bool:
    if name == "model" and own is not None and ":" not in str(value):
        return bool(own.partition(":")[0] == value)
    return bool(own == value)


def _model(text: str) -> str:
    """A model's name as an id has it, with the split where there is one."""
    name, colon, _ = text.partition(":")
    try:
        spec, split = model_and_split(text if colon else f"{name}:tp1")
    except SplitError as error:
        raise InvalidCase("model", text, str(error)) from None
    return f"{spec.name}:{split}" if colon else spec.name
