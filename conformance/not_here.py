"""What was named and is not there. Its text begins with the name as it was given, so that each front end can put before
it what was typed: an option, an argument."""

from __future__ import annotations


class NotHere(ValueError):
    """
    Args:
        value: what was named.
        told: why it is not there, and what would be.
    """

    def __init__(self, value: str, told: str) -> None:
        super().__init__(value, told)
        self.value = value
        self.told = told

    def __str__(self) -> str:
        return f"{self.value}: {self.told}"


class UnknownBackend(NotHere):
    """There is no backend, module or class of that name, or the class is none of a backend."""


class NoDevice(NotHere):
    """There is no such device here."""
