"""The selector's logger, on which each text appears once a process."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("fp8moe.selector")

_logged: set[str] = set()


def log_once(level: int, text: str) -> None:
    """Logs a text that was not logged before."""
    if text not in _logged:
        _logged.add(text)
        LOGGER.log(level, text)


def reset_log_deduplication() -> None:
    """Forgets which texts were logged."""
    _logged.clear()
