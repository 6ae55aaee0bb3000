"""Whether a kernel ran in Triton's interpreter, whoever's it is: what runs there has run on no device."""

from __future__ import annotations

import sys


class Interpreted:
    """A look at the interpreter of this process, to be made before what is looked at."""

    def __init__(self) -> None:
        self._before = _last_grid()

    @property
    def ran(self) -> bool:
        """Whether it has run a kernel since."""
        return _last_grid() is not self._before


def _last_grid() -> object:
    """The grid of the interpreter's last kernel, a new tuple for each; None before the first."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    return getattr(getattr(interpreter, "interpreter_builder", None), "grid_dim", None)
