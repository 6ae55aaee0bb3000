"""While a backend runs, the oracles that judge it are closed: an answer that came from them would be no evidence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class OracleClosed(RuntimeError):
    """A backend asked an oracle for the answer."""


_calls: list[None] = []


@contextmanager
def oracles_closed() -> Iterator[None]:
    """Closes them for as long as a backend's own code runs."""
    _calls.append(None)
    try:
        yield
    finally:
        _calls.pop()


def must_be_open(name: str) -> None:
    """An oracle begins with this.

    Raises:
        OracleClosed: a backend is running.
    """
    if _calls:
        raise OracleClosed(f"{name} was called from within a backend: compute the layer, the oracles are its judges")
