"""The conformance suite: what is selected, and whether it computes what it claims.

Two doors: `pytest conformance`, and `conformance.check_backend(...)`, which is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conformance.certification import check_backend
    from conformance.report import Report

__all__ = ["Report", "check_backend"]


def __getattr__(name: str) -> Any:
    if name == "check_backend":
        from conformance.certification import check_backend

        return check_backend
    if name == "Report":
        from conformance.report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
