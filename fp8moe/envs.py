"""The VLLM_* variables that selection reads: one immutable snapshot a call, parsed when a rule asks.

Spellings and defaults are those of the specification's section 1.3. A variable that is *set* to its default is
not the same as one that is unset: the properties below that return `None` say "unset".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property

FLASHINFER_FP8 = "VLLM_USE_FLASHINFER_MOE_FP8"
FLASHINFER_BACKEND = "VLLM_FLASHINFER_MOE_BACKEND"
DEEP_GEMM = "VLLM_USE_DEEP_GEMM"
MOE_DEEP_GEMM = "VLLM_MOE_USE_DEEP_GEMM"
FORCE_MARLIN = "VLLM_TEST_FORCE_FP8_MARLIN"
AITER = "VLLM_ROCM_USE_AITER"
AITER_MOE = "VLLM_ROCM_USE_AITER_MOE"

SELECTOR_VARIABLES = (FLASHINFER_FP8, FLASHINFER_BACKEND, DEEP_GEMM, MOE_DEEP_GEMM, FORCE_MARLIN, AITER, AITER_MOE)
FLASHINFER_CHOICES = ("throughput", "latency", "masked_gemm")

_POSITION = {name: position for position, name in enumerate(SELECTOR_VARIABLES)}
_ENCODED = tuple(os.fsencode(name) for name in SELECTOR_VARIABLES)
_SNAPSHOTS_AT_MOST = 4096


class MalformedVariable(ValueError):
    """A variable holds a text that its parser refuses; `variable`, `text` and `expected` carry the parts."""

    def __init__(self, variable: str, text: str, expected: str) -> None:
        super().__init__(f"{variable}={text!r}: expected {expected}; unset it or fix it")
        self.variable = variable
        self.text = text
        self.expected = expected

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.variable, self.text, self.expected)


class Env(Mapping[str, str]):
    """An immutable snapshot of the selector's variables; a mapping of those that are set."""

    def __init__(self, texts: tuple[str | None, ...]) -> None:
        self._texts = texts

    @staticmethod
    def of(source: Mapping[str, str] | None = None) -> Env:
        """The snapshot of `source` (default: the process environment). Equal texts share one snapshot.

        Raises:
            TypeError: a selector variable's value in `source` is not a text.
        """
        if source is None:
            texts = _process_texts()
        elif isinstance(source, Env):
            return source
        else:
            get = source.get
            texts = tuple([get(name) for name in SELECTOR_VARIABLES])
        try:
            found = _SNAPSHOTS.get(texts)
        except TypeError:  # something unhashable: said below
            found = None
        if found is None:
            for name, text in zip(SELECTOR_VARIABLES, texts, strict=True):
                if text is not None and not isinstance(text, str):
                    raise TypeError(f"env[{name!r}]={text!r}: expected a str, as in os.environ")
            if len(_SNAPSHOTS) >= _SNAPSHOTS_AT_MOST:
                _SNAPSHOTS.clear()
            found = _SNAPSHOTS[texts] = Env(texts)
        return found

    def __getitem__(self, name: str) -> str:
        text = self._texts[_POSITION[name]]
        if text is None:
            raise KeyError(name)
        return text

    def __iter__(self) -> Iterator[str]:
        return (name for name, text in zip(SELECTOR_VARIABLES, self._texts, strict=True) if text is not None)

    def __len__(self) -> int:
        return sum(text is not None for text in self._texts)

    def __hash__(self) -> int:
        return hash(self._texts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Env) and other._texts == self._texts

    def __repr__(self) -> str:
        return f"Env({dict(self)})"

    def __reduce__(self) -> tuple[type, tuple[tuple[str | None, ...]]]:
        return Env, (self._texts,)

    def is_set(self, name: str) -> bool:
        """Present in the environment, empty texts included.

        Raises:
            AttributeError: not one of `SELECTOR_VARIABLES`.
        """
        if name not in _POSITION:
            raise AttributeError(f"{name!r} is none of the selector's variables {', '.join(SELECTOR_VARIABLES)}")
        return self._texts[_POSITION[name]] is not None

    # -- one value a variable; the default where it is unset --

    @cached_property
    def use_deep_gemm(self) -> bool:
        """VLLM_USE_DEEP_GEMM's value, default true. Raises `MalformedVariable`."""
        return self._int(DEEP_GEMM, default=True)

    @cached_property
    def use_aiter_moe(self) -> bool:
        """Both AITER variables' values; defaults false and true."""
        return self._word(AITER, default=False) and self._word(AITER_MOE, default=True)

    # -- one answer a rule; None where the rule's variables are unset --

    @cached_property
    def flashinfer(self) -> bool | None:
        """R3: VLLM_USE_FLASHINFER_MOE_FP8, or None when unset. Raises `MalformedVariable`."""
        return self._int(FLASHINFER_FP8) if self.is_set(FLASHINFER_FP8) else None

    @cached_property
    def flashinfer_backend(self) -> str | None:
        """R3b: VLLM_FLASHINFER_MOE_BACKEND, or None when unset. Raises `MalformedVariable`."""
        text = self._texts[_POSITION[FLASHINFER_BACKEND]]
        if text is not None and text not in FLASHINFER_CHOICES:
            raise MalformedVariable(FLASHINFER_BACKEND, text, "one of " + ", ".join(map(repr, FLASHINFER_CHOICES)))
        return text

    @cached_property
    def deep_gemm(self) -> bool | None:
        """R4: VLLM_USE_DEEP_GEMM and VLLM_MOE_USE_DEEP_GEMM, or None when both are unset.

        The first is parsed first and, when false, keeps the second from being parsed at all.
        Raises `MalformedVariable`.
        """
        if not (self.is_set(DEEP_GEMM) or self.is_set(MOE_DEEP_GEMM)):
            return None
        return self.use_deep_gemm and self._int(MOE_DEEP_GEMM, default=True)

    @cached_property
    def force_marlin(self) -> bool:
        """R5: VLLM_TEST_FORCE_FP8_MARLIN; the one word parser that strips blanks."""
        text = self._texts[_POSITION[FORCE_MARLIN]]
        return text is not None and text.strip().lower() in ("1", "true")

    @cached_property
    def aiter(self) -> bool | None:
        """R6: the two AITER variables together, or None when both are unset."""
        return self.use_aiter_moe if self.is_set(AITER) or self.is_set(AITER_MOE) else None

    @cached_property
    def device_bits(self) -> int:
        """What the device predicates read: bit 0 VLLM_USE_DEEP_GEMM, bit 1 both AITER variables.

        A malformed VLLM_USE_DEEP_GEMM counts as false here. No rule can tell: R4 raises for it before the scan, and
        what decides earlier never asks for DeepGEMM.
        """
        try:
            deep_gemm = self.use_deep_gemm
        except MalformedVariable:
            deep_gemm = False
        return int(deep_gemm) | int(self.use_aiter_moe) << 1

    def _int(self, name: str, default: bool = False) -> bool:
        text = self._texts[_POSITION[name]]
        if text is None:
            return default
        try:
            return int(text) != 0
        except ValueError:
            raise MalformedVariable(name, text, "an integer (0 is off, any other is on)") from None

    def _word(self, name: str, default: bool) -> bool:
        text = self._texts[_POSITION[name]]
        return default if text is None else text.lower() in ("1", "true")


def _process_texts() -> tuple[str | None, ...]:
    """The variables' texts in `os.environ`.

    `os.environ.get` costs a microsecond for a name that is absent; the dictionary behind it, where CPython has
    one, answers in a tenth of that. Anything else goes through the public interface.
    """
    data = getattr(os.environ, "_data", None)
    if type(data) is dict and os.name == "posix":
        get = data.get
        raw = [get(name) for name in _ENCODED]
        return tuple([None if text is None else os.fsdecode(text) for text in raw])
    return tuple(os.environ.get(name) for name in SELECTOR_VARIABLES)


_SNAPSHOTS: dict[tuple[str | None, ...], Env] = {}
