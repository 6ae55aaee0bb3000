"""What `check_backend` refuses, with the names that the command line has for its arguments."""

from __future__ import annotations

from conformance.planned import BadRequest
from fp8moe.commands.question import BadInput

OPTIONS = {"device": "--device"}


def as_typed(error: BadRequest, backend: str = "") -> BadInput:
    """
    Args:
        backend: the option that names it; "" where it is the command's argument.
    """
    if not error.argument:
        return BadInput(str(error))
    option = {**OPTIONS, "backend": backend}[error.argument]
    return BadInput(f"{option} {error.value}: {error.told}".strip())
