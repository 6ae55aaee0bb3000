"""What the selector raises: a backend that was asked for and does not fit, and nothing that fits."""

from __future__ import annotations

from collections.abc import Callable

from fp8moe.registry import AnyBackend, Reason


class BackendNotSupported(ValueError):
    """A backend that a variable asks for by name does not take the configuration; no other is tried instead."""

    def __init__(self, backend: AnyBackend, reason: Reason, detail: str) -> None:
        super().__init__(f"{backend.value} was asked for and cannot be used: {reason.value}: {detail}")
        self.backend = backend
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[AnyBackend, Reason, str]]:
        return type(self), (self.backend, self.reason, self.detail)


class NoBackendFits(NotImplementedError):
    """Nothing in the list takes the configuration; the text has a line for each backend.

    The text is made when it is first read: a search over configurations raises a million of these and reads none.

    Args:
        rule: R3c (FlashInfer was asked for) or R9.
        text: the text, or what makes it.
    """

    def __init__(self, rule: str, text: str | Callable[[], str]) -> None:
        super().__init__()
        self.rule = rule
        self._text = text

    def __str__(self) -> str:
        if not isinstance(self._text, str):
            self._text = self._text()
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule!r}, {str(self)!r})"

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.rule, str(self))
