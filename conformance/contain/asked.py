"""Functions that a worker runs for the suite: what a backend's class says of itself."""

from __future__ import annotations

from typing import Any

from conformance.contain.inside import told
from conformance.contain.jobs import SubjectRef
from conformance.plan import plan, resolve_target


def cells_of(ref: SubjectRef, schemes: tuple[str, ...], target_name: str) -> dict[str, Any]:
    """The cells of a plan, as JSON has them; or {"failed": why}, where the backend's own code raised."""
    target = resolve_target(target_name)
    try:
        cells = plan([ref.load()], target, schemes)
    except BaseException as error:  # the plan itself raises nothing: this is the class's own
        return {"failed": f"asking its class raised {told(error)}"}
    return {
        "cells": [
            {
                "scheme": cell.scheme,
                "status": None if cell.status is None else cell.status.value,
                "reason": cell.reason,
                "evidence": None if cell.evidence is None else cell.evidence.value,
                "activations": list(cell.activations),
            }
            for cell in cells
        ]
    }
